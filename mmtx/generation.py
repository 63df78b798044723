"""Generation as free functions over explicit state: prefill, one step at a time, sampling under the grammar.

Shapes: B batch, T tokens, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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

LOOK_EVERY = 8  # steps between two looks at whether rows are finished: on a GPU each look waits for the device


@dataclass(frozen=True)
class Sampling:
    """How the next id is chosen; the names are those of the Hugging Face `generate`.

    temperature: 0 takes the best id (greedy), 1 samples the model's distribution.
    top_k, top_p: keep the k best ids, or the fewest whose probabilities reach p.
    max_new_tokens: text and sound end here; a picture that is being written is finished, so that all output parses.
    seed: fixes the random choices; None draws new ones each time.
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
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature: found {self.temperature}, expected 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k: found {self.top_k}, expected 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p: found {self.top_p}, expected a number in (0, 1]")
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens: found {self.max_new_tokens}, expected 1 or more")
        if not 0 <= self.guidance < math.inf:
            raise InputError(f"guidance: found {self.guidance}, expected 0 or more")


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """Scores (B, V), -inf where forbidden -> one id a row (B,)."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    # Relative to the best: a tiny temperature must not end in inf - inf.
    logits = (logits.float() - logits.amax(-1, keepdim=True)) / max(sampling.temperature, 1e-6)
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        kept = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kept, -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, order = logits.softmax(-1).sort(dim=-1, descending=True)
        # An id stays while the ids before it have not reached p: the best one always does.
        drop = ordered.cumsum(-1) - ordered >= sampling.top_p
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


def guide(logits: Tensor, guidance: float) -> Tensor:
    """Scores of B prompts, then of the same without their user turns (2B, V) -> guided scores (B, V).

    Classifier-free guidance (https://arxiv.org/abs/2207.12598), for pictures as codes in Parti
    (https://arxiv.org/abs/2206.10789).
    """
    asked, unasked = logits.float().chunk(2)
    return unasked + guidance * (asked - unasked)


def without_user_turns(prompt: Prompt, vocabulary: Vocabulary) -> Prompt:
    """The prompt with its user turns emptied: <user> <end>."""
    v, ids = vocabulary, prompt.ids
    tags = np.isin(ids, [v.bos, v.user, v.assistant, v.end])
    owner = ids[np.maximum.accumulate(np.where(tags, np.arange(len(ids)), 0))]
    return Prompt(ids[tags | (owner != v.user)])


def prefill(decoder: Decoder, weights: Weights, prompts: Sequence[Prompt], more: int) -> tuple[Tensor, KVCache]:
    """Feed prompts of any lengths -> the last hidden state of each (B, D) and a cache with room for `more` tokens."""
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
    return decoding.prefill(weights, inputs, lengths, longest + more)


@torch.inference_mode()
def steps(
    decoder: Decoder,
    grammar: Grammar,
    prompts: Sequence[Prompt],
    out: str = "text",
    sampling: Sampling = Sampling(),
    prefix: Sequence[int] = (),
    weights: Weights | None = None,
) -> Iterator[Tensor]:
    """Yield one id for each prompt (B,) at a time until all rows are finished; finished rows yield <pad>.

    `prefix` are ids that every answer starts with (not yielded): the size of a picture, or its first codes. `weights` are
    those of the decoder where they were made before, for many answers.
    """
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
    hidden, cache = prefill(decoder, weights, prompts, limit)
    generator = None
    if sampling.temperature > 0:
        generator = torch.Generator(device)
        generator.manual_seed(sampling.seed) if sampling.seed is not None else generator.seed()
    batch = len(state.phase)
    writing = torch.arange(batch, device=device)  # rows of the batch that are still computed
    nothing = torch.full_like(writing, grammar.vocabulary.pad)
    alone, place = None, None
    for step in range(limit):
        if alone is None and Row.takes(weights, cache):
            alone = Row(weights, cache)
        before, place = place, alone and (int(state.phase), step >= sampling.max_new_tokens)
        if place is None or place != before:
            allowed = grammar.allowed(state, reach)
            if step >= sampling.max_new_tokens:
                allowed = grammar.closing(allowed)
        if alone is not None and sampling.temperature == 0 and reach <= weights.plain:
            ids = alone.best(hidden, allowed)
        else:
            logits = weights.scores(hidden, reach)
            if guided:
                logits = guide(logits, sampling.guidance)
            ids = sample(logits.masked_fill_(~allowed, -torch.inf), sampling, generator)
        state = grammar.advance(state, ids)
        yield ids if len(ids) == batch else nothing.index_copy(0, writing, ids)
        if device.type == "cpu" or step % LOOK_EVERY == LOOK_EVERY - 1 or step >= sampling.max_new_tokens:
            going = (~grammar.finished(state)).nonzero().squeeze(1)
            if not len(going):
                return
            # On a GPU shapes stay as they are.
            if device.type == "cpu" and 2 * len(going) <= len(ids):
                cache = cache.keep(torch.cat([going, going + len(ids)]) if guided else going)
                writing, ids, state = writing[going], ids[going], state.keep(going)
        inputs = decoder.embedding(ids.repeat(2) if guided else ids)
        hidden = decoding.step(weights, inputs, cache) if alone is None else alone.step(inputs)


def generate(
    decoder: Decoder,
    grammar: Grammar,
    prompts: Sequence[Prompt],
    out: str = "text",
    sampling: Sampling = Sampling(),
    prefix: Sequence[int] = (),
    weights: Weights | None = None,
) -> list[np.ndarray]:
    """Answer each prompt: the ids behind it, `prefix` first, up to and including <end>."""
    columns = list(steps(decoder, grammar, prompts, out, sampling, prefix, weights))
    rows = torch.stack(columns, dim=1).cpu().numpy()
    pad = grammar.vocabulary.pad
    return [np.concatenate([np.asarray(prefix, np.int64), row[row != pad]]) for row in rows]
