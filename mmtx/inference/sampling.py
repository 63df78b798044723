"""Sampling: how the next id is chosen from logits, and the random numbers for it.

Shapes: B batch, V vocabulary.
"""

import difflib
import math
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmtx.errors import InputError

MAX_SEED = 2 ** 64 - 1
DRAW_CHUNK = 64  # random numbers of a row that are drawn at a time


@dataclass(frozen=True)
class Sampling:
    """How the next id is chosen; the names are those of the Hugging Face `generate`.

    Attributes:
        temperature: 0 takes the most likely id (greedy), 1 samples the model's distribution.
        top_k, top_p: sample from only the k most likely ids, or from the fewest whose probabilities add up to p.
        max_new_tokens: text and sound end after so many ids; a picture in progress is finished, so that all output parses.
        seed: fixes the random choices of each prompt; they depend on its index in the caller's list, not on the other prompts.
            None draws new ones each time.
        guidance_scale: strength of classifier-free guidance, which makes an answer follow its prompt more closely. 1 turns it
            off, 2 to 4 are usual, 0 ignores user turns. It needs a model trained with `cond_drop_prob`, and doubles the cost.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    max_new_tokens: int = 256
    seed: int | None = None
    guidance_scale: float = 1.0

    def __post_init__(self):
        number, whole = "a number", "a whole number"
        self._check("temperature", _number, lambda t: 0 <= t < math.inf, f"{number}, 0 or more")
        self._check("guidance_scale", _number, lambda g: 0 <= g < math.inf, f"{number}, 0 or more")
        self._check("max_new_tokens", _whole, lambda n: n >= 1, f"{whole}, 1 or more")
        if self.top_k is not None:
            self._check("top_k", _whole, lambda k: k >= 1, f"{whole}, 1 or more")
        if self.top_p is not None:
            self._check("top_p", _number, lambda p: 0 < p <= 1, f"{number} in (0, 1]")
        if self.seed is not None:
            self._check("seed", _whole, lambda seed: 0 <= seed <= MAX_SEED, f"{whole} from 0 to {MAX_SEED}")

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
        """Make it from options by name. Raises InputError that names the option for an unknown name or a wrong value."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                meant = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
                raise InputError(f"{name[:40]}: unknown option, {meant}")
        return cls(**options)


def _number(value: Any) -> float | None:
    """The value as a float, or None if it is not a number."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _whole(value: Any) -> int | None:
    """The value as an int, or None if it is not a whole number."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None


class Draws:
    """Random numbers in (0, 1], one per row and step, which depend only on the seed, the place of the row and the step.

    So an answer is the same in any batch, in any order, and whichever other rows have ended, unless a number is so close to the
    boundary between two ids that rounding decides.
    """

    def __init__(self, seed: int | None, places: Sequence[int], device: torch.device):
        if seed is None:
            seed = np.random.SeedSequence().entropy
        sequences = [np.random.SeedSequence(seed, spawn_key=(place,)) for place in places]
        self._rows = [np.random.Philox(sequence) for sequence in sequences]
        self._device, self._next = device, DRAW_CHUNK
        self._numbers: Tensor | None = None

    def next(self) -> Tensor:
        """The numbers of the next step (B,)."""
        if self._next == DRAW_CHUNK:
            bits = np.stack([row.random_raw(DRAW_CHUNK) >> np.uint64(40) for row in self._rows], axis=1)     # of 24 bits
            self._numbers = torch.from_numpy((bits + 1).astype(np.float32) / 2 ** 24).to(self._device)
            self._next = 0
        self._next += 1
        return self._numbers[self._next - 1]

    def keep(self, rows: Tensor) -> None:
        """Keep only some rows."""
        self._rows = [self._rows[row] for row in rows.tolist()]
        if self._numbers is not None:
            self._numbers = self._numbers[:, rows]


def sample(logits: Tensor, sampling: Sampling, draws: Tensor | None = None) -> Tensor:
    """Logits (B, V), -inf where forbidden, and a random number in (0, 1] per row (B,) -> one id per row (B,)."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    # If a network overflows, logits are not finite: then any allowed id may be drawn, but no other.
    logits = logits.float().nan_to_num(torch.finfo(torch.float32).min, neginf=-torch.inf)
    # Relative to the best: a tiny temperature must not end in inf - inf, nor a huge one in inf / inf.
    logits = (logits - logits.amax(-1, keepdim=True)) / min(max(sampling.temperature, 1e-6), 1e30)
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        kept = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kept, -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        # An id stays while the ids before it have not reached p. The best one always does, also if p is 0 in the type of the logits.
        drop = ordered.cumsum(-1) - ordered >= sampling.top_p
        drop[..., 0] = False
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -torch.inf)
    # The first id at which the sum of the probabilities reaches the random number: one number chooses among all ids.
    shares = logits.softmax(-1)
    reached = shares.cumsum(-1).masked_fill_(shares == 0, 0)
    return (reached >= draws[:, None] * reached.amax(-1, keepdim=True)).byte().argmax(-1)
