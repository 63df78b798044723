"""Connectionist temporal classification (CTC): how sure a decoder is, at each time step of a sound, of what is said there.

At each step it says a piece of text or nothing (the blank); what it says in all is the pieces in order, one of each run (Graves et
al. 2006, https://doi.org/10.1145/1143844.1143891). A block asks the decoder's own output matrix, so nothing is added to the network.

Shapes: S time steps of a sound, D width, V pieces of text.
"""

import torch
from torch import Tensor

from mmtx.embedding import Features, TokenEmbedding
from mmtx.vocabulary import Vocabulary

BLANK = 0  # the number of the blank among the scores; piece i of the text tokenizer has the number 1 + i


def time_steps(given: Features) -> list[Tensor]:
    """The features of sounds -> of each the place in the stream of the last token of every time step (S,): by then all of the
    step's bands have been read.
    """
    places = given.places.split([rows * bands for rows, bands in given.grids])
    return [each[bands - 1::bands] for each, (_, bands) in zip(places, given.grids, strict=True)]


def ctc_scores(output: TokenEmbedding, hidden: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Normalised states (S, D) -> log-probabilities (S, 1 + V), of the blank first. `<pad>`, which no answer holds, stands for it."""
    table, text = output.matrix(plain=True), vocabulary.range("text")
    rows = torch.cat([table[vocabulary.pad:vocabulary.pad + 1], table[text.start:text.stop]])
    with torch.autocast(hidden.device.type, enabled=False):
        return (hidden.to(rows.dtype) @ rows.T).float().log_softmax(-1)
