"""Connectionist temporal classification (CTC): a decoder's log-probabilities of text at each time step of a sound.

At each step it emits a piece of text or nothing (the blank). The transcript is the sequence of emissions with repeats merged
and blanks removed (Graves et al. 2006, https://doi.org/10.1145/1143844.1143891). The logits come from the decoder's own
output matrix, so CTC adds nothing to the network.

Shapes: S time steps of a sound, D width, V pieces of text.
"""

import torch
from torch import Tensor

from mmtx.embedding import Features, TokenEmbedding
from mmtx.vocabulary import Vocabulary

BLANK = 0  # class of the blank; piece i of the text tokenizer is class 1 + i


def time_steps(given: Features) -> list[Tensor]:
    """Features of sounds -> for each sound, the index (S,) of the last token of every time step, after all bands of the step."""
    places = given.places.split([rows * bands for rows, bands in given.grids])
    return [each[bands - 1::bands] for each, (_, bands) in zip(places, given.grids, strict=True)]


def ctc_scores(output: TokenEmbedding, hidden: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Normalised hidden states (S, D) -> log-probabilities (S, 1 + V), the blank first.

    The output row of `<pad>`, which no answer contains, serves as that of the blank.
    """
    table, text = output.matrix(plain=True), vocabulary.range("text")
    rows = torch.cat([table[vocabulary.pad:vocabulary.pad + 1], table[text.start:text.stop]])
    with torch.autocast(hidden.device.type, enabled=False):
        return (hidden.to(rows.dtype) @ rows.T).float().log_softmax(-1)
