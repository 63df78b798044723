"""Generation as free functions over explicit state: prefill, one step at a time, sampling under the grammar.

Shapes: B batch, T tokens, V vocabulary.
"""

import difflib
import math
import reprlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmtx import decoding
from mmtx.decoding import KVCache, Weights
from mmtx.errors import InputError
from mmtx.model import Decoder
from mmtx.row import Row
from mmtx.sequence import Grammar, Prompt, gather_features
from mmtx.vocabulary import MAX_SIDE, Vocabulary

LARGEST_SEED = 2 ** 64 - 1
DRAWN = 64  # random numbers of a row that are drawn together
LOOK_EVERY = 8  # steps between two looks at whether rows are finished: on a GPU each look waits for the device


@dataclass(frozen=True)
class Sampling:
    """How the next id is chosen; the names are those of the Hugging Face `generate`.

    temperature: 0 takes the best id (greedy), 1 samples the model's distribution.
    top_k, top_p: keep the k best ids, or the fewest whose probabilities reach p.
    max_new_tokens: text and sound end here; a picture that is being written is finished, so that all output parses.
    seed: fixes the random choices of each prompt, by its place in the caller's list and whatever is answered beside it;
        None draws new ones each time.
    guidance: classifier-free guidance, of use where training dropped captions: the scores lie this many times as far as
        those of the prompt from those without its user turns. 1 is off, 0 ignores user turns; both passes cost double.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    max_new_tokens: int = 256
    seed: int | None = None
    guidance: float = 1.0

    def __post_init__(self):
        number, whole = "a number", "a whole number"
        self._check("temperature", _number, lambda t: 0 <= t < math.inf, f"{number}, 0 or more")
        self._check("guidance", _number, lambda g: 0 <= g < math.inf, f"{number}, 0 or more")
        self._check("max_new_tokens", _whole, lambda n: n >= 1, f"{whole}, 1 or more")
        if self.top_k is not None:
            self._check("top_k", _whole, lambda k: k >= 1, f"{whole}, 1 or more")
        if self.top_p is not None:
            self._check("top_p", _number, lambda p: 0 < p <= 1, f"{number} in (0, 1]")
        if self.seed is not None:
            self._check("seed", _whole, lambda seed: 0 <= seed <= LARGEST_SEED, f"{whole} from 0 to {LARGEST_SEED}")

    def _check(self, name: str, convert: Callable[[Any], Any], fits: Callable[[Any], bool], expected: str) -> None:
        given = getattr(self, name)
        value = convert(given)
        if value is None or not fits(value):
            long = isinstance(given, int) and given.bit_length() > 128
            found = f"a number of {given.bit_length()} bits" if long else reprlib.repr(given)
            raise InputError(f"{name}: found {found}, expected {expected}")
        object.__setattr__(self, name, value)

    @classmethod
    def of(cls, **options: Any) -> "Sampling":
        """From options by name. Raises InputError, which names the option, on an unknown name and on a wrong value."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                meant = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
                raise InputError(f"{name[:40]}: unknown option, {meant}")
        return cls(**options)


def _number(value: Any) -> float | None:
    """A float, or None where something is no number."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _whole(value: Any) -> int | None:
    """An int, or None where something is no whole number."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None


class Draws:
    """Random numbers in (0, 1], one for each row and step: of the seed, the place of the row and the step alone.

    So an answer is the same in any batch, in any order, and whichever rows beside it have ended.
    """

    def __init__(self, seed: int | None, places: Sequence[int], device: torch.device):
        if seed is None:
            seed = np.random.SeedSequence().entropy
        sequences = [np.random.SeedSequence(seed, spawn_key=(place,)) for place in places]
        self._rows = [np.random.Philox(sequence) for sequence in sequences]
        self._device, self._numbers, self._next = device, None, DRAWN

    def next(self) -> Tensor:
        """The numbers of a step (B,)."""
        if self._next == DRAWN:
            bits = np.stack([row.random_raw(DRAWN) >> np.uint64(40) for row in self._rows], axis=1)     # of 24 bits
            self._numbers = torch.from_numpy((bits + 1).astype(np.float32) / 2 ** 24).to(self._device)
            self._next = 0
        self._next += 1
        return self._numbers[self._next - 1]

    def keep(self, rows: Tensor) -> None:
        """Only some rows from now on."""
        self._rows = [self._rows[row] for row in rows.tolist()]
        if self._numbers is not None:
            self._numbers = self._numbers[:, rows]


def sample(logits: Tensor, sampling: Sampling, draws: Tensor | None = None) -> Tensor:
    """Scores (B, V), -inf where forbidden, and a random number in (0, 1] for each row (B,) -> one id a row (B,)."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    # Relative to the best: a tiny temperature must not end in inf - inf, nor a huge one in inf / inf.
    logits = (logits.float() - logits.amax(-1, keepdim=True)) / min(max(sampling.temperature, 1e-6), 1e30)
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        kept = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kept, -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        # An id stays while the ids before it have not reached p: the best one always does.
        drop = ordered.cumsum(-1) - ordered >= sampling.top_p
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -torch.inf)
    # The first id at which the sum of the probabilities reaches the random number: one number chooses among all ids.
    shares = logits.softmax(-1)
    reached = shares.cumsum(-1).masked_fill_(shares == 0, 0)
    return (reached >= draws[:, None] * reached.amax(-1, keepdim=True)).byte().argmax(-1)


def guide(logits: Tensor, guidance: float) -> Tensor:
    """Scores of B prompts, then of the same without their user turns (2B, V) -> guided scores (B, V).

    Classifier-free guidance (https://arxiv.org/abs/2207.12598), for pictures as codes in Parti
    (https://arxiv.org/abs/2206.10789).
    """
    asked, unasked = logits.float().chunk(2)
    return unasked + min(guidance, 1e30) * (asked - unasked)   # beyond that there would be inf - inf


def without_user_turns(prompt: Prompt, vocabulary: Vocabulary) -> Prompt:
    """The prompt with its user turns emptied: <user> <end>."""
    v, ids = vocabulary, prompt.ids
    tags = np.isin(ids, [v.bos, v.user, v.assistant, v.end])
    owner = ids[np.maximum.accumulate(np.where(tags, np.arange(len(ids)), 0))]
    return Prompt(ids[tags | (owner != v.user)])


def prefill(decoder: Decoder, weights: Weights, prompts: Sequence[Prompt]) -> tuple[Tensor, KVCache]:
    """Feed prompts of any lengths -> the last hidden state of each (B, D) and a cache."""
    weight = decoder.embedding.weight
    lengths = torch.tensor([len(prompt.ids) for prompt in prompts], device=weight.device)
    longest = max(len(prompt.ids) for prompt in prompts)
    ids = np.zeros((len(prompts), longest), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, :len(prompt.ids)] = prompt.ids
    features = gather_features((row * longest, prompt.spans) for row, prompt in enumerate(prompts))
    features = {kind: given._replace(places=given.places.to(weight.device), values=given.values.to(weight.device))
                for kind, given in features.items()}
    inputs = decoder.embed(torch.from_numpy(ids).to(weight.device), features)
    return decoding.prefill(weights, inputs, lengths)


def steps(
    decoder: Decoder,
    grammar: Grammar,
    prompts: Sequence[Prompt],
    out: str = "text",
    sampling: Sampling = Sampling(),
    prefix: Sequence[int] = (),
    weights: Weights | None = None,
    places: Sequence[int] | None = None,
) -> Iterator[Tensor]:
    """Yield one id for each prompt (B,) at a time until all rows are finished; finished rows yield <pad>.

    `prefix` are ids that every answer starts with (not yielded): the size of a picture, or its first codes. `weights` are
    those of the decoder where they were made before, for many answers. `places` are those of the prompts among all that
    the caller asks, which the random choices go by.

    Each answer is the one that the prompt gets alone, up to what float32 rounds otherwise in a batch of another shape:
    where two scores, or a random number and the edge between two ids, are closer than that (some 1e-6), the other may win.
    """
    # No context may be open where a caller can leave this generator: what is left at exit is closed without torch.
    with torch.inference_mode():
        device = decoder.embedding.weight.device
        prefix = np.asarray(prefix, np.int64)
        state = grammar.start(len(prompts), out, device, prefix if len(prefix) else None)
        # Beyond max_new_tokens only closing ids are allowed where there are any, so what is open can still be finished.
        if out in ("text", "audio"):
            rest = (grammar.vocabulary.bands or 0) + 2
        else:
            # Only an answer of one picture with its size given is known to open no larger one.
            known = int(state.remaining.max()) if out == "image" and len(prefix) else 0
            rest = (known or MAX_SIDE ** 2) + 4
        limit = sampling.max_new_tokens + rest
        rows = list(prompts)
        guided = sampling.guidance != 1
        if guided:
            rows += [without_user_turns(prompt, grammar.vocabulary) for prompt in prompts]
        weights, reach = weights or Weights.of(decoder), grammar.reach(out)
        prompts = [row._replace(ids=np.concatenate([row.ids, prefix])) for row in rows]
        hidden, cache = prefill(decoder, weights, prompts)
        batch = len(state.phase)
        draws = None
        if sampling.temperature > 0:
            draws = Draws(sampling.seed, range(batch) if places is None else places, device)
        writing = torch.arange(batch, device=device)  # rows of the batch that are still computed
        nothing = torch.full_like(writing, grammar.vocabulary.pad)
    ids, alone, place = None, None, None
    for step in range(limit):
        with torch.inference_mode():
            if ids is not None:
                inputs = decoder.embedding(ids.repeat(2) if guided else ids)
                hidden = decoding.step(weights, inputs, cache) if alone is None else alone.step(inputs)
            if alone is None and Row.takes(weights, cache):
                alone = Row(weights, cache)
            before, place = place, alone and (int(state.phase), step >= sampling.max_new_tokens)
            if place is None or place != before:
                allowed = grammar.allowed(state, reach)
                if step >= sampling.max_new_tokens:
                    allowed = grammar.closing(allowed)
            if alone is not None and draws is None and reach <= weights.plain:
                ids = alone.best(hidden, allowed)
            else:
                logits = weights.scores(hidden, reach)
                if guided:
                    logits = guide(logits, sampling.guidance)
                ids = sample(logits.masked_fill_(~allowed, -torch.inf), sampling, draws and draws.next())
            state = grammar.advance(state, ids)
            written = ids if len(ids) == batch else nothing.index_copy(0, writing, ids)
            over = False
            if device.type == "cpu" or step % LOOK_EVERY == LOOK_EVERY - 1 or step >= sampling.max_new_tokens:
                going = (~grammar.finished(state)).nonzero().squeeze(1)
                over = not len(going)
                # On a GPU shapes stay as they are.
                if device.type == "cpu" and 0 < 2 * len(going) <= len(ids):
                    cache.keep(torch.cat([going, going + len(ids)]) if guided else going)
                    writing, ids, state = writing[going], ids[going], state.keep(going)
                    if draws is not None:
                        draws.keep(going)
        yield written
        if over:
            return


def generate(
    decoder: Decoder,
    grammar: Grammar,
    prompts: Sequence[Prompt],
    out: str = "text",
    sampling: Sampling = Sampling(),
    prefix: Sequence[int] = (),
    weights: Weights | None = None,
    places: Sequence[int] | None = None,
) -> list[np.ndarray]:
    """Answer each prompt: the ids behind it, `prefix` first, up to and including <end>."""
    columns = list(steps(decoder, grammar, prompts, out, sampling, prefix, weights, places))
    rows = torch.stack(columns, dim=1).cpu().numpy()
    pad = grammar.vocabulary.pad
    return [np.concatenate([np.asarray(prefix, np.int64), row[row != pad]]) for row in rows]
