"""A second loss for sounds whose answer is text: what is said so far is already told while the sound is read.

By the next-token loss alone a small decoder must find out at once what is heard and where to look for it, which takes long. CTC
(`mmtx/ctc.py`) asks for the first only: that the pieces of the answer come one after another along the sound, wherever that is.
Beside the other loss it shows the way (Watanabe et al. 2017, https://arxiv.org/abs/1609.06773). It may be asked of a block before the
last (Lee and Watanabe 2021, https://arxiv.org/abs/2102.03216): the blocks behind it then find written what they are to answer.

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
from mmtx.vocabulary import Vocabulary


@dataclass(frozen=True)
class CTCConfig:
    """The loss by which sounds of user turns are written down while they are read.

    Args:
        blocks: behind how many blocks they are; those that follow, which should be two at least, read what is written there.
        weight: what it counts for beside the next-token loss, both in nats a piece of text.
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
    """A forward pass of the decoder inside this context appends the hidden states (B, T, D) behind `blocks` blocks to the list;
    with None it appends nothing.
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
    """Normalised states (N, D) -> the sum over sounds of -log P(the text of their document that is trained), (), in nats.

    Sounds without text for an answer, or with too few steps for it, count 0.
    """
    given = batch.features.get("audio")
    if given is None:
        return hidden.sum() * 0.0
    starts = torch.arange(len(hidden), device=hidden.device) - batch.positions.flatten()  # where the document of a token begins
    text = vocabulary.range("text")
    # In a chat format <end> is a piece of text, too, and nothing that is heard.
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
