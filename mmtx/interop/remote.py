"""A model whose decoder runs in a llama.cpp server: media become ids here, and the server answers ids with ids.

The server has no grammar, so each request states which ids are allowed.
"""

import json
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmtx.errors import InputError
from mmtx.inference.sampling import Sampling
from mmtx.interop.export import limitations
from mmtx.medium import Media
from mmtx.modality.encoder import build_encoder
from mmtx.model import Decoder
from mmtx.model_folder import read_model
from mmtx.pipeline import Model
from mmtx.schema import shown
from mmtx.sequence import Prompt, read_chat_format
from mmtx.vocabulary import Vocabulary

TIMEOUT = 600  # seconds without data from the server
TOGETHER = 4   # concurrent requests
MOST_BYTES = 2**26  # of an answer
RANDOM_SEED = 2**32 - 1  # which the server takes for -1: another one each time


def connect(server: str, folder: str | Path | None = None) -> "RemoteModel":
    """The model of a folder whose decoder, exported with `mmtx export --to gguf`, runs in a server and is not loaded here.

    Raises InputError if the server cannot be reached, or runs a model with another number of ids.
    """
    config, vocabulary, tokenizers, _ = read_model(folder)
    with torch.device("meta"):
        decoder = Decoder(config, build_encoder)
    model = RemoteModel(decoder, vocabulary, tokenizers)
    model.server = server.rstrip("/")
    if not model.server.startswith(("http://", "https://")):
        raise InputError(f"--server: found {shown(server)}, expected the address of a server, as in http://127.0.0.1:8080")
    told = model.ask("/v1/models").get("data") or [{}]
    if (size := (told[0].get("meta") or {}).get("n_vocab")) not in (None, vocabulary.size):
        raise InputError(f"--server {model.server}: found a model of {size} ids, expected {vocabulary.size}, as the vocabulary has")
    return model


class RemoteModel(Model):
    """Captions, generates, tokenizes and detokenizes; what needs the decoder's weights or logits raises InputError."""

    server: str

    def ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The JSON object with which the server answers a request."""
        where = f"--server {self.server}"
        request = urllib.request.Request(self.server + path, None if body is None else json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                found = json.loads(answer.read(MOST_BYTES))
        except urllib.error.HTTPError as error:
            said = " ".join(error.read(2**16).decode(errors="replace").split())
            raise InputError(f"{where}: answers {error.code} ({said[:200]})") from None
        except (OSError, HTTPException) as error:
            raise InputError(f"{where}: cannot be reached ({getattr(error, 'reason', None) or error})") from None
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise InputError(f"{where}: found an answer that is no object in JSON, expected the server of llama.cpp")
        return found

    def stream(self, parts: Any, out: str = "text", size: tuple[int, int] | None = None, **sampling: Any) -> Iterator[Media]:
        """The whole answer, each medium in one piece."""
        answer = self.generate(parts, out, size, **sampling)
        yield from answer if isinstance(answer, list) else [answer]

    def _refused(self, *_: Any, **__: Any) -> Any:
        raise InputError(f"--server {self.server}: answers with ids alone; expected a model that mmtx.load gives, whose weights "
                         "are here, for scores, vectors, attention, transcripts and saving")

    embed_prompt = attention = stream_ids = transcribe_documents = classify_documents = _files = _refused

    def _answer(self, prompts: Sequence[Prompt], out: str, sampling: Sampling, prefix: Sequence[int] = (),
                first: int = 0) -> list[list[int]]:
        if sampling.guidance_scale != 1:
            raise InputError(f"guidance_scale: found {sampling.guidance_scale} with --server, expected 1: no engine has it")
        if any(span.kind in self.decoder.config.features for prompt in prompts for span in prompt.spans):
            raise InputError(f"--server: {limitations(self)[0]}")
        # If the first id is determined, the engine need not generate it.
        prefix = list(map(int, prefix)) or ([self.vocabulary.opening(out)] if out in self.vocabulary.media else [])
        allowed, count = self._legal(out, sampling, prefix)
        forbidden = [[ident, False] for ident in np.flatnonzero(~allowed).tolist()]

        def one(number: int) -> list[int]:
            body = {"prompt": [*prompts[number].ids.tolist(), *prefix], "n_predict": count, "logit_bias": forbidden,
                    "temperature": sampling.temperature, "top_k": sampling.top_k or 0, "return_tokens": True,
                    "top_p": 1.0 if sampling.top_p is None else sampling.top_p, "min_p": 0.0, "cache_prompt": True,
                    "samplers": ["top_k", "temperature", "top_p"],
                    "seed": -1 if sampling.seed is None else (sampling.seed + first + number) % RANDOM_SEED}
            ids = self.ask("/completion", body).get("tokens")
            if not isinstance(ids, list) or not all(type(ident) is int for ident in ids):
                raise InputError(f"--server {self.server}: found no ids in its answer, expected the server of llama.cpp")
            return finish([*prefix, *ids], self.vocabulary)

        with ThreadPoolExecutor(TOGETHER) as pool:
            return list(pool.map(one, range(len(prompts))))

    def _legal(self, out: str, sampling: Sampling, prefix: Sequence[int]) -> tuple[np.ndarray, int]:
        """Mask of the ids (V,) that an answer may contain anywhere after its prefix, and the number of ids to generate."""
        v = self.vocabulary
        state = self.grammar.start(1, out, prefix=torch.tensor([prefix]) if prefix else None)
        allowed = self.grammar.allowed(state)[0].numpy().copy()
        if out not in v.media:
            allowed[[v.opening(kind) for kind in v.media]] = False  # within a medium an engine does not know what is legal
            return allowed, sampling.max_new_tokens
        if v.bands(out) is None:
            if int(state.remaining) < 1:
                raise InputError(f"--server: found a tokenizer without a size of its own for {out}, expected one that has `side`")
            return allowed, int(state.remaining)
        codes = v.range(out)
        allowed[codes.start:codes.stop] = True
        allowed[[v.closing(out), v.end]] = True  # an engine stops at <end>, which follows
        return allowed, sampling.max_new_tokens


def finish(ids: Sequence[int], v: Vocabulary) -> list[int]:
    """The ids from an engine up to <end>; a medium that is left open is closed after its last complete time step."""
    ends = {v.end, v.eos, v.pad}
    ids = list(ids[:next((i for i, ident in enumerate(ids) if ident in ends), len(ids))])
    kinds = {v.opening(kind): kind for kind in v.media}
    at = next((i for i in reversed(range(len(ids))) if ids[i] in kinds), None)
    if at is None:
        return ids
    kind = kinds[ids[at]]
    closed = ids.index(v.closing(kind), at) if v.closing(kind) in ids[at:] else None
    if v.bands(kind) is None:
        return ids if closed is not None else [*ids, v.closing(kind)]
    written = (len(ids) if closed is None else closed) - at - 1
    whole = at + 1 + written - written % v.bands(kind)
    return [*ids[:whole], v.closing(kind), *(() if closed is None else ids[closed + 1:])]


def answer_in(ids: Sequence[int], v: Vocabulary) -> list[int]:
    """The last answer in a conversation (T,) or, if that is not one, all ids without <bos>."""
    tags, kept = (np.array(ids), np.ones(len(ids), bool)) if v.chat_format is None else read_chat_format(ids, v)
    turns = np.flatnonzero((tags == v.assistant) & kept)
    if not len(turns):
        return list(ids[1:] if list(ids[:1]) == [v.bos] else ids)
    behind = np.flatnonzero(kept[turns[-1] + 1:])
    return list(ids[turns[-1] + 1 + int(behind[0]):]) if len(behind) else []
