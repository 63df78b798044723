"""Generation: an engine scores the next id, the grammar says which ids are allowed, and sampling chooses one of them.

Shapes: B batch, N ids that an answer can consist of.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmtx.grammar import Grammar, GrammarState
from mmtx.inference.choose import choose_engine
from mmtx.inference.engine import Engine
from mmtx.inference.guidance import Guided
from mmtx.inference.sampling import Draws, Sampling, sample
from mmtx.inference.weights import Weights
from mmtx.model import Decoder
from mmtx.sequence import Prompt
from mmtx.vocabulary import MAX_SIDE

Choose = Callable[[Decoder, Weights | None, int], Engine]
LOOK_EVERY = 4  # steps between two checks of which rows are finished, on a GPU
BEHIND = 2      # steps launched before the result of such a check is read, so that the GPU has work meanwhile


class AllowedIds:
    """Which ids may come next. On a CPU, equal masks in a row are the same tensor, so that `Engine.best` can cache."""

    def __init__(self, grammar: Grammar, out: str):
        self.grammar, self.reach = grammar, grammar.reach(out)
        self._place: tuple | None = None

    def of(self, state: GrammarState, closing: bool) -> Tensor:
        """The mask of a state (B, N); with `closing`, only ids that close something, in rows that allow any."""
        place = (state.phase.tolist(), closing) if state.phase.device.type == "cpu" else None
        if place is None or place != self._place:
            allowed = self.grammar.allowed(state, self.reach)
            self._place, self._allowed = place, self.grammar.closing(allowed) if closing else allowed
        return self._allowed


@dataclass(frozen=True)
class Choice:
    """How the next id is chosen: among those that the grammar allows, by their logits and a random number (B,)."""

    grammar: Grammar
    out: str
    sampling: Sampling                       # except its seed and length
    allowed: AllowedIds = field(compare=False)

    def __call__(self, engine: Engine, state: GrammarState, draws: Tensor | None,
                 closing: bool = False) -> tuple[Tensor, GrammarState]:
        may_come = self.allowed.of(state, closing)
        if draws is None:
            ids = engine.best(may_come)
        else:
            ids = sample(engine.scores(self.allowed.reach).masked_fill_(~may_come, -torch.inf), self.sampling, draws)
        return ids, self.grammar.advance(state, ids)


class FinishedCopy:
    """An asynchronous copy to the CPU of which rows were finished at some step, (B,) bool."""

    def __init__(self, finished: Tensor):
        self._finished = finished.to("cpu", non_blocking=True)
        self._there = torch.cuda.current_stream(finished.device).record_event() if finished.is_cuda else None

    def finished(self) -> Tensor:
        """The copy, after waiting for it."""
        if self._there is not None:
            self._there.synchronize()
        return self._finished


def steps(
    decoder: Decoder,
    grammar: Grammar,
    prompts: Sequence[Prompt],
    out: str = "text",
    sampling: Sampling = Sampling(),
    prefix: Sequence[int] = (),
    weights: Weights | None = None,
    places: Sequence[int] | None = None,
    choose: Choose = choose_engine,
    wanted: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yield one id per prompt (B,) at a time until all rows are finished; finished rows yield <pad>.

    `prefix` are ids that every answer starts with (not yielded): the size of a picture, or its first codes. `weights` are
    those of the decoder, if they were made before, for many answers. `places` are the indices of the prompts in the caller's
    list, which determine the random choices. `choose` makes the engine. `wanted` (B,), bool on the CPU, marks the rows that
    the caller waits for, and may be changed between steps: other rows end as if they were finished.

    Each answer is the one that its prompt gets alone, up to differences of float32 rounding between batch shapes: where two
    logits, or a random number and the boundary between two ids, are closer than that (some 1e-6), the other id may win.
    """
    # No context may be open where a caller can leave this generator: unfinished, it is closed at exit, without torch.
    with torch.inference_mode():
        device, batch, prefix = decoder.embedding.weight.device, len(prompts), np.asarray(prefix, np.int64)
        state = grammar.start(batch, out, device, prefix if len(prefix) else None)
        last = sampling.max_new_tokens     # steps from here on only close what is open
        limit = last + _steps_to_close(grammar, out, state, len(prefix) > 0)
        choice = Choice(grammar, out, replace(sampling, max_new_tokens=1, seed=None), AllowedIds(grammar, out))
        places = range(batch) if places is None else places
        draws = Draws(sampling.seed, places, device) if sampling.temperature > 0 else None
        if sampling.guidance_scale == 1:
            engine = choose(decoder, weights, batch)
        else:
            engine = Guided(choose(decoder, weights, 2 * batch), sampling.guidance_scale, grammar.vocabulary)
        engine.prefill([prompt._replace(ids=np.concatenate([prompt.ids, prefix])) for prompt in prompts])
        writing = torch.arange(batch, device=device)  # rows of the batch that are still computed
        nothing = torch.full_like(writing, grammar.vocabulary.pad)
    ids, look = None, None
    for step in range(limit):
        with torch.inference_mode():
            if ids is not None:
                engine.step(ids)
            numbers = None if draws is None else draws.next()
            if step < last:
                ids, state = engine.choose(choice, state, numbers)
            else:
                ids, state = choice(engine, state, numbers, closing=True)
            written = (ids.clone() if engine.static else ids) if len(ids) == batch else nothing.index_copy(0, writing, ids)
            left = len(ids)
            if engine.static and step < last:
                if look is not None and step % LOOK_EVERY == BEHIND:
                    finished = look.finished()
                    left = int((~finished if wanted is None else wanted & ~finished).sum())
                if step % LOOK_EVERY == 0:
                    look = FinishedCopy(grammar.finished(state))
            else:
                going = ~grammar.finished(state)
                if wanted is not None:
                    going &= wanted.to(device)[writing]
                going = going.nonzero().squeeze(1)
                left = len(going)
            if 0 < 2 * left <= len(ids) and not engine.static:
                engine, state, ids, writing = engine.keep(going), state.keep(going), ids[going], writing[going]
                if draws is not None:
                    draws.keep(going)
        yield written
        if not left:
            return


def _steps_to_close(grammar: Grammar, out: str, state: GrammarState, begun: bool) -> int:
    """Upper bound on the steps that close what is open after the last one, if only closing ids are allowed where there are any."""
    v = grammar.vocabulary
    grids = {kind for kind in v.media if v.layout(kind) == "grid"}
    step = max((v.bands(kind) for kind in v.media if kind not in grids), default=0)
    if out in v.kinds and out not in grids:
        return step + 2
    # Only an answer of one picture of a given size is known not to open a larger one.
    known = int(state.remaining.max()) if out in grids and begun else 0
    return (known or max(MAX_SIDE ** 2, step)) + 4


def generate(decoder: Decoder, grammar: Grammar, prompts: Sequence[Prompt], out: str = "text",
             sampling: Sampling = Sampling(), prefix: Sequence[int] = (), **options: Any) -> list[np.ndarray]:
    """Answer each prompt: the ids after it, `prefix` first, up to and including <end>. `options` are those of `steps`."""
    columns = list(steps(decoder, grammar, prompts, out, sampling, prefix, **options))
    rows = torch.stack(columns, dim=1).cpu().numpy()
    pad = grammar.vocabulary.pad
    return [np.concatenate([np.asarray(prefix, np.int64), row[row != pad]]) for row in rows]
