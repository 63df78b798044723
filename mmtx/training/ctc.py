"""An auxiliary CTC loss for sounds that are answered with text: the decoder transcribes a sound while it reads it.

With the next-token loss alone a small decoder must learn at once what is heard and where to attend to it, which takes long. CTC
(`mmtx/ctc.py`) asks only for the first: that the pieces of the answer follow one another along the sound, wherever that is. As an
auxiliary loss it speeds up learning (Watanabe et al. 2017, https://arxiv.org/abs/1609.06773). It may apply to an intermediate block
(Lee and Watanabe 2021, https://arxiv.org/abs/2102.03216): the blocks after it can then read the transcript from its output.

Shapes: B batch, T tokens, N = B * T, D width, S time steps of the longest sound, C sounds, V pieces of text.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmtx.ctc import BLANK, ctc_scores, time_steps
from mmtx.data.packing import Batch
from mmtx.embedding import TokenEmbedding
from mmtx.errors import InputError
from mmtx.model import Decoder
from mmtx.schema import typed
from mmtx.vocabulary import Vocabulary


@typed
@dataclass(frozen=True)
class CTCConfig:
    """An auxiliary CTC loss by which the decoder transcribes the sounds of user turns while it reads them.

    Args:
        blocks: number of blocks after which it applies; at least two should follow, which can then read the transcript.
        weight: its weight relative to the next-token loss; both are in nats per piece of text.
    """

    blocks: int
    weight: float = 1.0

    def __post_init__(self):
        if self.blocks < 0:
            raise InputError(f"ctc.blocks: found {self.blocks}, expected 0 or more")
        if not 0 < self.weight < math.inf:
            raise InputError(f"ctc.weight: found {self.weight}, expected a finite number of more than 0")


@contextmanager
def states_behind(decoder: Decoder, blocks: int | None) -> Iterator[list[Tensor]]:
    """In this context, a forward pass of the decoder appends the hidden states (B, T, D) after `blocks` blocks to the list.

    With None it appends nothing.
    """
    found: list[Tensor] = []
    if blocks is None:
        yield found
        return
    reader = [*decoder.blocks, decoder.norm][blocks]
    handle = reader.register_forward_pre_hook(lambda module, given: found.append(given[0]))
    try:
        yield found
    finally:
        handle.remove()


def ctc_loss(output: TokenEmbedding, hidden: Tensor, batch: Batch, vocabulary: Vocabulary) -> Tensor:
    """Normalised states (N, D) -> the sum over sounds of -log P(supervised text of their document), (), in nats.

    Sounds whose answer has no text, or more text than fits their steps, count as 0.
    """
    given = batch.features.get("audio")
    if given is None:
        return hidden.sum() * 0.0
    starts = torch.arange(len(hidden), device=hidden.device) - batch.positions.flatten()  # where the document of a token begins
    text = vocabulary.range("text")
    # In a chat format <end> is a piece of text too, but not part of the transcript.
    written = (batch.targets >= text.start) & (batch.targets < text.stop) & (batch.targets != vocabulary.end)
    owners = starts[batch.supervised]
    steps, answers = [], []
    for places in time_steps(given):
        answer = batch.targets[written & (owners == starts[places[0]])] - text.start
        if len(answer):
            steps.append(places)
            answers.append(answer)
    if not steps:
        return hidden.sum() * 0.0
    lengths = [len(places) for places in steps]
    scores = ctc_scores(output, hidden[torch.cat(steps)], vocabulary)
    return F.ctc_loss(pad_sequence(list(scores.split(lengths))), torch.cat(answers) + 1, torch.tensor(lengths),  # (S, C, 1 + V)
                      torch.tensor([len(answer) for answer in answers]), blank=BLANK, reduction="sum", zero_infinity=True)
