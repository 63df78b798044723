"""Transcripts: CTC proposes strings, and the decoder rescores them (attention rescoring).

The decoder alone writes likely text, but may drift away from the sound; CTC alone (`mmtx/ctc.py`) hears every step, but knows no
words. So the best strings of CTC, by prefix beam search (Hannun et al. 2014, https://arxiv.org/abs/1408.2873), and the decoder's own
answer are scored by both, and the sum decides, as in WeNet (Yao et al. 2021, https://arxiv.org/abs/2102.01547).

Shapes: T tokens of the prompt, N tokens of all candidates, C candidates, S time steps, D width, H heads, G key-value heads, K head
width, V pieces of text.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmtx.ctc import BLANK, ctc_scores, time_steps
from mmtx.inference.engine import pad
from mmtx.kernels import attend
from mmtx.modality.base import Tokenizer
from mmtx.model import Decoder, rotary_embedding
from mmtx.sequence import Prompt
from mmtx.vocabulary import Vocabulary

# Strings of CTC. With 8 / 24 / 48 of them, demos/speech, after its first run, had character error rates of 0.166 / 0.152 / 0.155,
# 0.485 / 0.471 / 0.465 and 0.332 / 0.317 / 0.314 on the first 60 sounds of each speech test, in relative times of 0.6, 1 and 1.9.
BEAM = 24
MIN_LOG_PROBABILITY = np.log(1e-3)  # of a piece that extends a string; 1e-4 took longer and found no others

Pieces = tuple[int, ...]  # of text, by the tokenizer's numbers


class Heard(NamedTuple):
    """The state of a decoder after prefill of a prompt with one sound."""

    last: Tensor                       # (1, D) hidden state that predicts the first piece
    scores: Tensor                     # (S, 1 + V) log-probabilities of CTC
    past: list[tuple[Tensor, Tensor]]  # keys and values (1, T, G, K) of each block


@torch.inference_mode()
def transcribe(decoder: Decoder, vocabulary: Vocabulary, text: Tokenizer, prompt: Prompt, answer: str) -> str:
    """The transcript of the sound that a prompt ends with: `answer`, which is the decoder's own, or one with a better score."""
    heard = hear(decoder, prompt, vocabulary)
    strings = [*map(text.decode, prefix_beam_search(heard.scores.cpu().numpy())), answer]
    # Each string is scored in the pieces of the tokenizer, whatever pieces CTC found it in.
    candidates = {tuple(text.encode(string)): string for string in strings}
    sums = rescore(decoder, heard, list(candidates), vocabulary).sum(0)
    return list(candidates.values())[int(sums.argmax())]


def hear(decoder: Decoder, prompt: Prompt, vocabulary: Vocabulary) -> Heard:
    """Prefill a prompt that ends with a sound."""
    ids, _, features = pad([prompt], decoder.embedding.weight.device)
    states, past = _blocks(decoder, decoder.embed(ids, features), torch.arange(ids.shape[1], device=ids.device))
    written = decoder.norm(states[decoder.config.ctc_blocks][0])
    scores = ctc_scores(decoder.output or decoder.embedding, written[time_steps(features["audio"])[-1]], vocabulary)
    return Heard(decoder.norm(states[-1][0, -1:]), scores, past)


def rescore(decoder: Decoder, heard: Heard, candidates: Sequence[Pieces], vocabulary: Vocabulary) -> Tensor:
    """Log-probabilities (2, C) of the candidates as the answer, by the decoder and by CTC, in nats."""
    device, first = heard.last.device, vocabulary.range("text").start
    sizes = [len(pieces) for pieces in candidates]
    owners = torch.arange(len(sizes), device=device).repeat_interleave(torch.tensor(sizes, device=device))    # (N,)
    behind = torch.cat([torch.arange(size, device=device) for size in sizes])
    written = torch.tensor([piece for pieces in candidates for piece in pieces], dtype=torch.long, device=device)
    length = heard.past[0][0].shape[1]
    # Each token attends to the prompt and to the earlier ones of its own candidate: the prompt is read once for all.
    own = (owners[:, None] == owners) & (behind[:, None] >= behind)
    seen = torch.cat([own.new_ones(len(owners), length), own], 1)
    states, _ = _blocks(decoder, decoder.embed(written[None] + first), length + behind, seen, heard.past)
    after = decoder.norm(states[-1][0]).split(sizes)
    hidden = torch.cat([state for each in after for state in (heard.last, each)])                             # (N + C, D)
    targets = torch.cat([torch.cat([pieces + first, pieces.new_tensor([vocabulary.end])]) for pieces in written.split(sizes)])
    scores = decoder.logits(hidden, decoder.output_matrix(plain=True)).float().log_softmax(-1)
    told = scores.gather(1, targets[:, None])[:, 0].split([size + 1 for size in sizes])
    by_decoder = torch.stack([each.sum() for each in told])
    by_ctc = -F.ctc_loss(heard.scores[:, None].expand(-1, len(sizes), -1).cpu(),
                         pad_sequence([pieces + 1 for pieces in written.cpu().split(sizes)], batch_first=True),
                         torch.full((len(sizes),), len(heard.scores)), torch.tensor(sizes), blank=BLANK, reduction="none")
    return torch.stack([by_decoder.cpu(), by_ctc])


def prefix_beam_search(scores: np.ndarray, beam: int = BEAM) -> list[Pieces]:
    """Log-probabilities of CTC (S, 1 + V) -> the most likely strings of pieces, best first.

    For each prefix it keeps the log-probabilities of all paths that end in a blank and of all that end in its last piece: only after
    a blank is the same piece repeated.
    """
    prefixes: dict[Pieces, tuple[float, float]] = {(): (0.0, -np.inf)}
    for step in scores.astype(np.float64):
        best = np.argpartition(-step, min(beam, len(step) - 1))[:beam]
        likely = [int(number) for number in best if number != BLANK and step[number] > MIN_LOG_PROBABILITY]
        found: dict[Pieces, tuple[float, float]] = {}

        def add(pieces: Pieces, in_blank: float, in_piece: float) -> None:
            if max(in_blank, in_piece) > -np.inf:
                held = found.get(pieces, (-np.inf, -np.inf))  # noqa: B023
                found[pieces] = np.logaddexp(held[0], in_blank), np.logaddexp(held[1], in_piece)  # noqa: B023

        for pieces, (in_blank, in_piece) in prefixes.items():
            either = np.logaddexp(in_blank, in_piece)
            add(pieces, either + step[BLANK], in_piece + step[pieces[-1] + 1] if pieces else -np.inf)
            for number in likely:
                again = pieces and pieces[-1] == number - 1
                add((*pieces, number - 1), -np.inf, (in_blank if again else either) + step[number])
        prefixes = dict(sorted(found.items(), key=lambda item: -np.logaddexp(*item[1]))[:beam])
    return list(prefixes)


def _blocks(decoder: Decoder, x: Tensor, positions: Tensor, seen: Tensor | None = None,
            past: Sequence[tuple[Tensor, Tensor]] = ()) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Run inputs (1, T, D) through all blocks, with a causal mask or the mask `seen` (T, past + T).

    -> The hidden states before the first block and after each, and the keys and values (1, past + T, G, K) of each block.
    """
    config = decoder.config
    angles = rotary_embedding(positions[None], config.head_dim, config.rope_theta, config.rope_scaling)
    states: list[Tensor] = [x]
    held: list[tuple[Tensor, Tensor]] = []

    def attention_fn(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if past:
            before = past[len(held)]
            key, value = torch.cat([before[0], key], 1), torch.cat([before[1], value], 1)
        held.append((key, value))
        if seen is None:
            return attend(query, key, value, causal=True)
        return F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=seen,
                                              enable_gqa=config.heads != config.kv_heads).transpose(1, 2)

    for block in decoder.blocks:
        states.append(block(states[-1], angles, attention_fn=attention_fn))
    return states, held
