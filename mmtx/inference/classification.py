"""Classification: the probability of each of some labels as the answer to a prompt, as generation at temperature 1 draws it.

Shapes: N labels, E ids that may end them, T nodes of a tree.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mmtx.errors import InputError
from mmtx.grammar import Grammar
from mmtx.inference.torch_engine import TorchEngine
from mmtx.inference.weights import Weights
from mmtx.modality.base import Tokenizer
from mmtx.model import Decoder
from mmtx.sequence import Prompt
from mmtx.vocabulary import Vocabulary

NODES = 2048             # most ids of labels in one pass, unless a single label has more
SCORES = 2 ** 26         # and most scores: 256 MiB
MARKS = set(",.;:!?()")  # after which a label is complete; a word may go on after other marks, such as - and '


def label_ends(tokenizer: Tokenizer, vocabulary: Vocabulary) -> Tensor:
    """Ids after which a label is complete (E,): <end>, and those of text that is only `MARKS`."""
    said = {ident: tokenizer.decode([ident]).strip() for ident in vocabulary.range("text")}
    return torch.tensor([vocabulary.end, *(ident for ident, text in said.items() if text and set(text) <= MARKS)])


@dataclass(frozen=True)
class Labels:
    """Texts that are the only possible answers."""

    texts: Sequence[str]
    ids: Sequence[Sequence[int]]
    ends: Tensor                     # (E,), as `label_ends` finds them

    @classmethod
    def of(cls, texts: Sequence[str], tokenizer: Tokenizer, ends: Tensor) -> "Labels":
        """Raises InputError for a text without ids, for two with the same ids, and for fewer than two."""
        ids = [list(tokenizer.encode(text)) for text in texts]
        for number, (text, found) in enumerate(zip(texts, ids, strict=True)):
            if not found or (first := ids.index(found)) < number:
                wanted = f"another than label {first + 1}" if found else "text"
                raise InputError(f"candidate_label {number + 1} of {len(texts)}: found {text!r:.40}, expected {wanted}")
        if len(texts) < 2:
            raise InputError(f"candidate_labels: found {len(texts)}, expected two or more")
        return cls(texts, ids, ends)

    def probabilities(self, decoder: Decoder, grammar: Grammar, prompt: Prompt, weights: Weights | None = None) -> dict[str, float]:
        """Each text with its probability, given that the answer is one of them; the most likely first."""
        shares = log_probabilities(decoder, grammar, prompt, self.ids, self.ends, weights).softmax(-1)
        return {self.texts[place]: float(shares[place]) for place in shares.argsort(descending=True, stable=True).tolist()}


class Tree(NamedTuple):
    """The ids of several answers (N), each beginning that they share once: T nodes below the prompt, parents before children."""

    ids: Tensor        # (T,)
    parents: Tensor    # (T,): 0 for the prompt, 1 for the first node
    depths: Tensor     # (T,): 0 for children of the prompt
    branches: Tensor   # (T, T) bool: the ancestors of each node, and itself
    last: Tensor       # (N,): the last node of each answer, counted like parents

    @classmethod
    def of(cls, answers: Sequence[Sequence[int]]) -> "Tree":
        places: dict[tuple[int, ...], int] = {(): 0}
        for answer in answers:
            for length in range(1, len(answer) + 1):
                places.setdefault(tuple(answer[:length]), len(places))
        nodes = [*places][1:]
        parents = [places[node[:-1]] for node in nodes]
        branches = torch.eye(len(nodes), dtype=torch.bool)
        for node, parent in enumerate(parents):
            if parent:
                branches[node] |= branches[parent - 1]
        last = torch.tensor([places[tuple(answer)] for answer in answers])
        return cls(torch.tensor([node[-1] for node in nodes]), torch.tensor(parents), torch.tensor([len(node) - 1 for node in nodes]),
                   branches, last)


def log_probabilities(decoder: Decoder, grammar: Grammar, prompt: Prompt, answers: Sequence[Sequence[int]], ends: Tensor,
                      weights: Weights | None = None) -> Tensor:
    """Natural logarithms of the probability of each answer in text (N,), float32 on the CPU.

    `answers` are ids, at least one each, followed by one of the `ends` (E,). The prompt is computed once, and all answers in one
    pass as branches of a tree (https://arxiv.org/abs/2305.09781), or in a few if they are many.
    """
    with torch.inference_mode():
        engine, longest = TorchEngine(decoder, weights or Weights.of(decoder)), max(map(len, answers))
        engine.prefill([prompt], room=longest)
        size = max(1, min(NODES, SCORES // grammar.reach("text")) // longest)
        return torch.cat([_in_one_pass(engine, grammar, Tree.of(answers[first:first + size]), ends)
                          for first in range(0, len(answers), size)])


def _in_one_pass(engine: TorchEngine, grammar: Grammar, tree: Tree, ends: Tensor) -> Tensor:
    """`log_probabilities` of the answers in a tree, to the prompt in the only row of an engine."""
    device = engine.hidden.device
    ids, parents, depths, branches, last = (each.to(device) for each in tree)
    allowed = grammar.allowed(grammar.start(1, "text", device), grammar.reach("text"))  # the same at every node
    hidden = torch.cat([engine.hidden, engine.branch(ids, depths, branches)])
    scores = engine.weights.scores(hidden, allowed.shape[1]).float().masked_fill_(~allowed, -torch.inf).log_softmax(-1)
    above = torch.where(branches, scores[parents, ids], 0).sum(1)
    return (above[last - 1] + scores[last][:, ends.to(device)].logsumexp(-1)).cpu()
