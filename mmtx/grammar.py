"""Constrained decoding: an automaton of which ids may come next, so that generated streams always parse.

Shapes: B batch, V vocabulary, P phases, N classes.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmtx.errors import InputError
from mmtx.vocabulary import MAX_SIDE, Vocabulary

# Classes of ids that the grammar distinguishes. Each kind of media adds three: "open KIND", "code KIND" and "close KIND".
CLASSES = ("other", "text", "pad", "eos", "end", "height", "width")  # other: never generated
# Phases: the states of a row. Each kind adds more, see `Rules`.
PHASES = (
    "illegal",  # after an id that was not allowed
    "done",
    "resume",  # in `after` only: back to the phase before the medium
    "text",  # pieces, then <end>
    "any",  # parts, then <end>
    "document",  # parts, then <eos>
    "closing",  # <end>
)
ILLEGAL, DONE, RESUME = range(3)
HEIGHT, WIDTH = CLASSES.index("height"), CLASSES.index("width")


class Rules:
    """The automaton of a vocabulary, by names.

    classes, phases: all names; a name's index is its number.
    after: phase -> {allowed class: next phase}. Anything else is illegal.
    back: phase -> phase in which a row continues after a medium that it opened there.
    counted: phase -> phase in which a row continues when no codes remain.
    """

    def __init__(self, vocabulary: Vocabulary):
        kinds = vocabulary.media
        opens: dict[str, str] = {}
        self.classes = [*CLASSES, *(f"{what} {kind}" for kind in kinds for what in ("open", "code", "close"))]
        self.counted: dict[str, str] = {}
        self.back = {"any": "any", "document": "document"}
        self.after = {"illegal": {"pad": "illegal"}, "done": {"pad": "done"}, "closing": {"end": "done"},
                      "text": {"text": "text", "end": "done"}}
        for kind in kinds:
            inside, behind = f"in {kind}", f"after {kind}"  # a picture or time step with codes to come, and with none
            self.after[inside] = {f"code {kind}": inside}
            self.after[behind] = {f"close {kind}": "resume"}
            if vocabulary.layout(kind) == "grid":
                first = f"height {kind}"
                self.after[first], self.after[f"width {kind}"] = {"height": f"width {kind}"}, {"width": inside}
            else:
                first = inside
                self.after[behind][f"code {kind}"] = inside
            opens[f"open {kind}"] = first
            self.after[f"one {kind}"] = {f"open {kind}": first}
            self.back[f"one {kind}"], self.counted[inside] = "closing", behind
        self.after["any"] = {"text": "any", **opens, "end": "done"}
        self.after["document"] = {"text": "document", **opens, "eos": "done"}
        self.phases = [*PHASES, *(phase for phase in self.after if phase not in PHASES)]
        # Kind of answer -> the phase that it starts in.
        self.starts = {"text": "text", **{kind: f"one {kind}" for kind in kinds}, "any": "any", "document": "document"}


class GrammarState(NamedTuple):
    """The state of each row of a batch: int64 tensors (B,) on the device of the batch.

    If all rows write only text, there is nothing to resume or count, and only the phase is kept.
    """

    phase: Tensor
    resume: Tensor | None = None  # phase after the open medium
    height: Tensor | None = None  # rows of the open picture, or other grid
    remaining: Tensor | None = None  # codes left in the open grid or time step

    def keep(self, rows: Tensor) -> "GrammarState":
        """The state of some rows."""
        return GrammarState(*(each if each is None else each[rows] for each in self))


class _Tables(NamedTuple):
    """The grammar as tensors on one device. P phases, N classes."""

    classes: Tensor  # (V,) uint8: id -> class
    next_phase: Tensor  # (P, N) int64
    allowed: Tensor  # (P, V) bool
    back: Tensor  # (P,) int64
    counted: Tensor  # (P,) int64: phase when `remaining` is 0
    closers: Tensor  # (V,) bool: ids that close a medium, turn or stream
    opens: Tensor  # (N,) bool: classes that open a medium
    counts: Tensor  # (N,) int64: 1 for codes, which are counted, 0 for others
    bands: Tensor  # (N,) int64: codes in a time step, for classes that open a medium of steps, 0 for others
    step: Tensor  # (P,) int64: codes in the time step that may follow, 0 elsewhere


class Grammar:
    """The automaton that constrains generation, so that generated ids always parse.

    `allowed` and `advance` are lookups in small tables and never synchronise with the device. Each row has its own state:
    one may write text while another writes a picture.
    """

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary, self.rules = vocabulary, Rules(vocabulary)
        self._tables = {torch.device("cpu"): _build_tables(vocabulary, self.rules)}

    def start(
        self,
        batch: int,
        out: str | Sequence[str] = "any",
        device: torch.device | str = "cpu",
        prefix: Any = None,
    ) -> GrammarState:
        """The state before the first id that a model generates.

        `out`, one for all rows or one per row: "text" is text pieces, then <end>; a kind of media ("image", "audio") is exactly
        one of it, then <end>; "any" is a mixture, then <end>; "document" the same, then <eos> (for plain prompts). After that
        only <pad> is allowed. `prefix`, ids (P,) or (B, P), counts as generated already: <image> <h:8> <w:8> fixes the size of
        a picture, and codes after it leave only the rest to generate.
        Raises InputError for a modality without ids, a wrong number of `out`, or an illegal prefix.
        """
        outs = [out] * batch if isinstance(out, str) else list(out)
        starts = {name: self.rules.phases.index(phase) for name, phase in self.rules.starts.items()}
        for name in set(outs):
            if name not in starts:
                raise InputError(f"out: found {name!r}, expected one of {', '.join(starts)}")
        if len(outs) != batch:
            raise InputError(f"out: found {len(outs)} kinds, expected {batch}, one per row")
        phase = torch.tensor([starts[name] for name in outs], dtype=torch.int64, device=device)
        self._on(phase.device)  # copy the tables now, not in the first decode step
        text = set(outs) <= {"text"}
        state = GrammarState(phase, *(() if text else (phase, torch.zeros_like(phase), torch.zeros_like(phase))))
        if prefix is None:
            return state
        prefix = torch.as_tensor(prefix, dtype=torch.int64, device=device)
        for ids in prefix.expand(batch, prefix.shape[-1]).unbind(1):
            state = self.advance(state, ids)
        # The only synchronisation with the device, once and before generation starts.
        if bool((state.phase == ILLEGAL).any()):
            raise InputError("prefix: found ids that the grammar forbids, expected the start of an answer")
        return state

    def reach(self, out: str) -> int:
        """Number of leading ids that contains all an answer can consist of: text needs no media codes."""
        return self.vocabulary.range("special").stop if out == "text" else self.vocabulary.size

    def allowed(self, state: GrammarState, reach: int | None = None) -> Tensor:
        """Which ids may come next, (B, V) or (B, reach) bool; at least one in every row."""
        return self._on(state.phase.device).allowed[:, :reach][state.phase]

    def closing(self, allowed: Tensor) -> Tensor:
        """Restrict `allowed` (B, V) to ids that close a medium, turn or stream, in rows that allow any."""
        closes = allowed & self._on(allowed.device).closers[:allowed.shape[1]]
        return torch.where(closes.any(1, keepdim=True), closes, allowed)

    def advance(self, state: GrammarState, ids: Tensor) -> GrammarState:
        """The state after each row wrote one id, (B,). After a forbidden id a row may only write <pad>."""
        tables = self._on(state.phase.device)
        kind = tables.classes[ids].long()
        if state.resume is None:
            return GrammarState(tables.next_phase[state.phase, kind])
        resume = torch.where(tables.opens[kind], tables.back[state.phase], state.resume)
        phase = tables.next_phase[state.phase, kind]
        phase = torch.where(phase == RESUME, resume, phase)
        # Count codes down: from h * w in a picture, from `bands` in each time step.
        height = torch.where(kind == HEIGHT, ids - self.vocabulary.height(1) + 1, state.height)
        remaining = state.remaining - tables.counts[kind]
        remaining = torch.where(kind == WIDTH, height * (ids - self.vocabulary.width(1) + 1), remaining)
        remaining = torch.where(tables.opens[kind], tables.bands[kind], remaining)
        phase = torch.where(remaining == 0, tables.counted[phase], phase)
        step = tables.step[phase]
        return GrammarState(phase, resume, height, torch.where(step > 0, step, remaining))

    def finished(self, state: GrammarState) -> Tensor:
        """Which rows are complete, or illegal, (B,) bool."""
        return state.phase <= DONE  # includes ILLEGAL

    def _on(self, device: torch.device) -> _Tables:
        if device not in self._tables:
            cpu = self._tables[torch.device("cpu")]
            self._tables[device] = _Tables(*(table.to(device) for table in cpu))
        return self._tables[device]


def _build_tables(v: Vocabulary, rules: Rules) -> _Tables:
    number, place = rules.classes.index, rules.phases.index
    classes = torch.zeros(v.size, dtype=torch.uint8)  # other
    classes[v.height(1) : v.height(MAX_SIDE) + 1] = HEIGHT
    classes[v.width(1) : v.width(MAX_SIDE) + 1] = WIDTH
    classes[v.range("text").start : v.range("text").stop] = number("text")
    if v.chat_format is not None:
        classes[list(v.chat_format.control)] = 0  # other: they are not text
    for name, id in (("pad", v.pad), ("eos", v.eos), ("end", v.end)):  # <end> may be one of these
        classes[id] = number(name)
    closers = torch.zeros(v.size, dtype=torch.bool)
    closers[[v.pad, v.end, v.eos]] = True
    opens, counts, bands = torch.zeros(3, len(rules.classes), dtype=torch.int64).unbind()
    step = torch.zeros(len(rules.phases), dtype=torch.int64)
    for kind in v.media:
        classes[v.range(kind).start : v.range(kind).stop] = number(f"code {kind}")
        classes[v.opening(kind)], classes[v.closing(kind)] = number(f"open {kind}"), number(f"close {kind}")
        closers[v.closing(kind)] = True
        opens[number(f"open {kind}")] = counts[number(f"code {kind}")] = 1
        bands[number(f"open {kind}")] = step[place(f"after {kind}")] = v.bands(kind) or 0

    next_phase = torch.full((len(rules.phases), len(rules.classes)), ILLEGAL)
    allowed_class = torch.zeros(len(rules.phases), len(rules.classes), dtype=torch.bool)
    for phase, after in rules.after.items():
        for name, then in after.items():
            next_phase[place(phase), number(name)] = place(then)
            allowed_class[place(phase), number(name)] = True
    back, counted = (torch.tensor([place(table.get(phase, phase)) for phase in rules.phases])
                     for table in (rules.back, rules.counted))
    return _Tables(classes, next_phase, allowed_class[:, classes.long()], back, counted, closers, opens.bool(), counts, bands, step)
