"""Direct preference optimization: a decoder learns which of two answers is better (Rafailov et al. 2023,
https://arxiv.org/abs/2305.18290).

The loss of a pair is -log sigmoid(margin), where the margin is beta times by how many nats more the decoder prefers the better answer
than the reference, a frozen copy of what it started from, does. There is no reward model, and no answer is generated in training.

Shapes: M targets of a batch, P pairs.
"""

import copy
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmtx.data.packing import Batch
from mmtx.errors import InputError
from mmtx.loss import TokenLoss, next_token_loss
from mmtx.model import Decoder
from mmtx.schema import typed


@typed
@dataclass(frozen=True)
class DPOConfig:
    """Direct preference optimization: learn from rows with a preferred and a rejected answer.

    Args:
        beta: how strongly the decoder is held to what it started from; lower lets it move further.
        sft_weight: weight of the mean loss of the preferred answer's tokens, which keeps it likely while the other becomes
            unlikely (https://arxiv.org/abs/2404.19733).
    """

    beta: float = 0.1
    sft_weight: float = 0.0

    def __post_init__(self):
        if not 0 < self.beta < math.inf:
            raise InputError(f"dpo.beta: found {self.beta}, expected a finite number of more than 0")
        if not 0 <= self.sft_weight < math.inf:
            raise InputError(f"dpo.sft_weight: found {self.sft_weight}, expected a finite number of 0 or more")


class PairLoss(NamedTuple):
    """The loss of the pairs of a batch."""

    total: Tensor     # () sum over pairs; it has a gradient
    loss: Tensor      # (P,) of each pair
    margin: Tensor    # (P,) more than 0 where the decoder has learned the preference
    tokens: TokenLoss  # of each target, without gradient


def reference_of(decoder: Decoder) -> Decoder:
    """A frozen copy of a decoder, which shares the weights that are frozen in the decoder itself."""
    shared = {id(weight): weight for weight in decoder.parameters() if not weight.requires_grad}
    return copy.deepcopy(decoder, shared).requires_grad_(False).eval()  # type: ignore[arg-type]  # a memo by id


def pair_loss(config: DPOConfig, decoder: Decoder, reference: Decoder, batch: Batch, weights: Tensor) -> PairLoss:
    """The loss of a batch of pairs, whose documents follow each other; `weights` (M,) scale the log-probability of each target."""
    hidden = _states(decoder, batch)
    with torch.no_grad():
        ours = _next_token_loss(decoder, hidden.detach(), batch)
        theirs = _next_token_loss(reference, _states(reference, batch), batch).loss
    document = (batch.positions[0] == 0).cumsum(0)[batch.supervised] - 1                          # (M,)
    per_document = lambda values: values.new_zeros(2 * len(batch.samples)).index_add_(0, document, values)
    gained = per_document(weights * (theirs - ours.loss)).view(-1, 2)                             # (P, 2) nats
    margin = config.beta * (gained[:, 0] - gained[:, 1])
    # The gradient of -log sigmoid(margin) is that of the targets' cross entropies with these weights, negative for rejected answers.
    pull = config.beta * torch.sigmoid(-margin)
    scale = torch.stack([pull, -pull], 1).flatten()
    likely = config.sft_weight / per_document(weights).clamp_min(1e-9)
    likely[1::2] = 0
    surrogate = _next_token_loss(decoder, hidden, batch, weights * (scale + likely)[document]).total
    loss = -F.logsigmoid(margin) + (likely * per_document(weights * ours.loss))[::2]
    return PairLoss(surrogate + (loss.sum() - surrogate).detach(), loss, margin, ours)


def _states(decoder: Decoder, batch: Batch) -> Tensor:
    """The final hidden state before each target (M, D)."""
    return decoder(batch.ids, batch.positions, batch.packing, batch.features).flatten(0, 1)[batch.supervised]


def _next_token_loss(decoder: Decoder, hidden: Tensor, batch: Batch, weights: Tensor | None = None) -> TokenLoss:
    return next_token_loss(decoder.output or decoder.embedding, hidden, batch.targets, batch.plain, weights)
