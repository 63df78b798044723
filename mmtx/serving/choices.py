"""The choices of an answer: their text as it comes, cut at stop sequences, and the log-probabilities of their tokens.

Shapes: T tokens, V vocabulary.
"""

from codecs import getincrementaldecoder
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from mmtx.ambient import neutral
from mmtx.document import Document
from mmtx.grammar import GrammarState
from mmtx.pipeline import Model
from mmtx.sequence import prompt
from mmtx.serving.stops import begun_stop, find_stop

ROWS = 64  # positions of a prompt whose logits are held at a time
Scored = list[tuple[int, dict[str, Any]]]  # log-probabilities of tokens, each with the length of the text before it


class Piece(NamedTuple):
    """The next piece of the text of a choice, by its number; the last one has the finish reason."""

    choice: int
    text: str
    scored: Scored
    finish_reason: str | None = None


class Choice:
    """One choice as it comes: the ids generated so far, <end> included, and their text, in pieces if it is streamed."""

    def __init__(self, model: Model, number: int, out: str, stream: bool, stops: Sequence[str], top: int):
        self.model, self.number, self.out, self.stream, self.stops, self.top = model, number, out, stream, stops, top
        self.ids: list[int] = []
        self.finish_reason: str | None = None
        self._text, self._begin, self._shown = "", 0, 0            # where generated text begins, and what is not shown yet
        self._scored: Scored = []                                  # of tokens not shown yet
        self._decoder = getincrementaldecoder("utf-8")("replace")  # holds back incomplete characters
        self._state: GrammarState | None = None                    # before the next token, if log-probabilities are wanted

    def echo(self, ids: Sequence[int], scores: Sequence[dict | None]) -> None:
        """Begin with a prompt, which may have stop sequences."""
        for ident, score in zip(ids, scores, strict=True):
            self._append(ident, score)
        self._begin = len(self._text)

    def add(self, ident: int, logits: Tensor | None) -> None:
        """Add an id that was generated, with its logits (V,) if log-probabilities are wanted.

        As in OpenAI's API, <end> has none in a chat, and <eos> has one in a plain document.
        """
        self.ids.append(ident)
        score, grammar = None, self.model.grammar
        if logits is not None and (self.out == "document" or not self._ends(ident)):
            state = self._state or grammar.start(1, self.out)
            (score,) = token_scores(self.model, [ident], logits[None], grammar.allowed(state, len(logits))[0], self.top)
            self._state = grammar.advance(state, torch.tensor([ident]))
        self._append(ident, score)

    def _append(self, ident: int, score: dict | None) -> None:
        if score is not None:
            self._scored.append((len(self._text), score))
        self._text += self._decoder.decode(piece_bytes(self.model, ident))

    def piece(self, over: bool) -> Piece:
        """What may be shown by now of the text, which ends before a stop sequence; `over` if no more ids come."""
        own = self._text[self._begin:]
        cut = find_stop(own, self.stops)
        if cut is not None:
            clear, self.finish_reason = self._begin + cut, "stop"
        elif over:
            self._text += self._decoder.decode(b"", final=True)
            clear, self.finish_reason = len(self._text), "stop" if self.ids and self._ends(self.ids[-1]) else "length"
        else:
            clear = len(self._text) - begun_stop(own, self.stops) if self.stream else 0
        now = [each for each in self._scored if each[0] < clear or over and cut is None]
        text, self._shown, self._scored = self._text[self._shown:clear], clear, self._scored[len(now):]
        return Piece(self.number, text, now, self.finish_reason)

    def _ends(self, ident: int) -> bool:
        return ident in (self.model.vocabulary.end, self.model.vocabulary.eos)


@neutral()
def read_prompt(model: Model, document: Document, top_logprobs: int | None) -> tuple[list[int], Sequence[dict | None]]:
    """The ids of a plain text after <bos>, and their log-probabilities, if they are wanted."""
    bos, *ids = prompt(document, model.vocabulary).ids.tolist()
    if top_logprobs is None:
        return ids, [None] * len(ids)
    device, grammar, scores = model.decoder.embedding.weight.device, model.grammar, []
    allowed = grammar.allowed(grammar.start(1, "document"))[0]
    with torch.inference_mode():
        given = torch.tensor([[bos, *ids]], device=device)
        hidden = model.decoder(given, torch.arange(given.shape[1], device=device)[None])[0]
        for first in range(0, len(ids), ROWS):
            logits = model.decoder.logits(hidden[first:first + ROWS])[:, :len(allowed)]
            scores += token_scores(model, ids[first:first + ROWS], logits, allowed, top_logprobs)
    return ids, scores


def token_scores(model: Model, ids: Sequence[int], logits: Tensor, allowed: Tensor, top: int) -> list[dict]:
    """Log-probabilities of ids (T,) among those that are allowed (V,), at temperature 1, and those of the `top` best each."""
    shares = logits[:len(ids)].float().cpu().masked_fill(~allowed, -torch.inf).log_softmax(-1)
    best = shares.topk(min(top, shares.shape[1])).indices.tolist()

    def entry(row: int, ident: int) -> dict:
        data = piece_bytes(model, ident)
        name = data.decode(errors="replace") or model.vocabulary.name(ident)
        return {"token": name, "logprob": max(float(shares[row, ident]), -9999.0), "bytes": list(data)}

    return [{**entry(row, ident), "top_logprobs": [entry(row, other) for other in best[row]]} for row, ident in enumerate(ids)]


def completion_logprobs(scored: Scored) -> dict:
    """Log-probabilities in the form of `/v1/completions`; among tokens of the same text, the best one counts."""
    by_token = lambda entries: {entry["token"]: entry["logprob"] for entry in entries}
    return {"tokens": [entry["token"] for _, entry in scored], "token_logprobs": [entry["logprob"] for _, entry in scored],
            "top_logprobs": [by_token([entry, *reversed(entry["top_logprobs"])]) for _, entry in scored],
            "text_offset": [begin for begin, _ in scored]}


def piece_bytes(model: Model, ident: int) -> bytes:
    """The bytes of a piece of text, possibly part of a character; none for other ids."""
    texts = model.vocabulary.range("text")
    return cast(Any, model.tokenizers["text"]).piece_bytes(ident - texts.start) if ident in texts else b""
