"""The page of `mmtx demo`, and its routes in addition to OpenAI's.

They give the attention of each word of an answer and the most similar training samples, transcribe speech, and generate, complete and
continue pictures and sounds.
"""

import base64
import json
import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import FastAPI
from fastapi.responses import HTMLResponse
from PIL import Image
from pydantic import Field

from mmtx.ambient import one_thread
from mmtx.attention import MediaSpan, attention_maps
from mmtx.data.sample import kind_of
from mmtx.data.storage import read
from mmtx.document import Document, Turn
from mmtx.errors import InputError
from mmtx.medium import ReadMedium
from mmtx.pipeline import Model
from mmtx.sequence import prompt
from mmtx.serving import messages as api
from mmtx.serving.limits import Refused
from mmtx.serving.nearest import NearestNeighbours, data_url

MAX_TOKENS = 1024            # tokens whose attention is computed: its size is the square of that, for each head
MAX_EXAMPLE_BYTES = 2 ** 20  # bytes of an example, which is embedded in the page
PAGE = Path(__file__).with_name("page.html")
# Nothing is loaded from other sites, and no other page may embed this one.
HEADERS = {"Referrer-Policy": "no-referrer", "Content-Security-Policy": (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; media-src data:; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'")}


class AttentionBody(api.ChatBody):
    answer: str
    layer: int | None = None
    rollout: bool = False


class NearestBody(api.RequestBody):
    content: api.Content


class TranscribeBody(api.RequestBody):
    sound: api.AudioItem


class MakeBody(api.SamplingBody):
    """A picture or sound from a text or, with `begin`, its continuation: a picture's below its `kept` share, a sound's at its end."""

    out: Literal["image", "audio"]
    content: api.TextContent = []
    begin: Annotated[api.ImageItem | api.AudioItem, Field(discriminator="type")] | None = None
    kept: float = Field(0.5, ge=0, le=1)
    seconds: float = Field(2.0, gt=0, le=10)


def add_page(app: FastAPI, maker: Model | None = None, transcriber: Model | None = None, examples: Sequence[str] = (),
             nearest: NearestNeighbours | None = None) -> None:
    """Put the page at the root of a server.

    `maker` generates pictures and sounds, and `transcriber` transcribes speech; by default the server's model does, if it can.
    `examples` are files to try. `nearest` is an index of training samples, which starts to read them. Raises InputError if an example
    cannot be read.
    """
    server = app.state.server
    service = next(iter(server.services.values()))
    model, limits, v = service.model, service.limits, service.model.vocabulary
    maker = maker or model
    transcriber = transcriber or (model if model.transcribes else None)
    media = lambda model: [kind for kind in model.vocabulary.kinds if kind in ("image", "audio")]
    settings = json.dumps({"kinds": media(model), "makes": media(maker), "transcribes": transcriber is not None,
                           "nearest": nearest is not None,
                           "examples": [example for example in map(_example, examples) if example["kind"] in media(model)]})
    text = PAGE.read_text(encoding="utf-8").replace("{{settings}}", settings.replace("<", "\\u003c"))
    text = text.replace("{{name}}", escape(service.name))
    generator = ThreadPoolExecutor(1, "generator", one_thread)
    if nearest:
        threading.Thread(target=nearest.read).start()

    @app.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(text, headers=HEADERS)

    @app.post("/demo/attention")
    async def attention(body: AttentionBody) -> dict:
        server.find(body.model)
        return await service.read(_attention, body)

    @app.post("/demo/nearest")
    async def nearest_samples(body: NearestBody) -> dict:
        server.find(body.model)
        if nearest is None:
            raise Refused(404, "this server was started without training samples (--train)")
        return await service.read(_nearest, body)

    @app.post("/demo/transcribe")
    async def transcribe(body: TranscribeBody) -> dict:
        server.find(body.model)
        return await service.read(_transcribe, body)

    @app.post("/demo/make")
    async def make(body: MakeBody) -> dict:
        server.find(body.model)
        return await service.run(generator, _make, body)

    def _attention(body: AttentionBody) -> dict:
        (document,) = model.encode_documents([api.read_document(model, body.messages, limits)])
        asked, ids = prompt(document, v), model.tokenizers["text"].encode(body.answer)
        if (count := len(asked.ids) + len(ids)) > MAX_TOKENS:
            raise InputError(f"{count} tokens, expected up to {MAX_TOKENS} for attention maps")
        found = attention_maps(model.decoder, v, model.tokenizers, asked, ids)
        heat = lambda word, medium: medium.upright(found.heat(word, medium, body.layer, rollout=body.rollout)).tolist()
        return {"words": [word.text for word in found.words], "layers": list(range(len(found.weights))),
                "media": [{"kind": medium.kind, "shown": data_url(_picture(medium)),
                           "heat": [heat(word, medium) for word in found.words]} for medium in found.media]}

    def _nearest(body: NearestBody) -> dict:
        parts = api.read_parts(model, body.content, limits, "content")
        (document,) = model.encode_documents([Document((Turn("user", parts),))])
        return {"read": len(nearest.samples), "of": len(nearest.found.samples),
                "samples": [{"caption": one.sample.caption, "alike": one.similarity, "kind": one.medium.kind, "shown": one.preview()}
                            for one in nearest.find(document)]}

    def _transcribe(body: TranscribeBody) -> dict:
        if transcriber is None:
            raise Refused(404, "this server was started without a model that transcribes (--transcribe_model)")
        return {"text": transcriber.transcribe(api.read_item(transcriber, body.sound, limits, "sound"))}

    def _make(body: MakeBody) -> dict:
        if body.out not in media(maker):
            raise InputError(f"out: found {body.out}, which this model cannot generate")
        parts, begin = api.read_parts(maker, body.content, limits, "content"), None
        if body.begin is not None:
            begin = api.read_item(maker, body.begin, limits, "begin")
            if not isinstance(begin, ReadMedium) or begin.kind != body.out:
                raise InputError(f"begin: found {begin.kind}, expected {body.out}")
            parts += (begin,)
        if not parts:
            raise InputError("content: found nothing, expected a text prompt")
        tokenizer: Any = maker.tokenizers[body.out]
        codes = math.ceil(body.seconds * tokenizer.codes_per_second) if body.out == "audio" else 0
        if (count := maker.prompt_length(Document((Turn("user", parts),))) + codes) > limits.tokens:
            raise InputError(f"{count} tokens, expected up to {limits.tokens} in all")
        words = [item.text for item in body.content]
        sampling: dict[str, Any] = body.model_dump(include={"temperature", "top_p", "top_k", "seed"})
        if begin is None:
            limit = {"max_new_tokens": codes} if codes else {}
            made = maker.generate(words, body.out, **sampling | limit)
        elif body.out == "image":
            made = maker.outpaint(begin, round(body.kept * begin.grid[0]) * tokenizer.config.patch, words, **sampling)
        else:
            made = maker.continue_audio(begin, body.seconds, words, **sampling)
        return {"kind": body.out, "shown": data_url(made)}


def _example(name: str) -> dict:
    data, path = read(name), Path(name)
    kind = kind_of(name, data[:64])
    if len(data) > MAX_EXAMPLE_BYTES:
        raise InputError(f"{name}: found {len(data)} bytes, expected an example of up to {MAX_EXAMPLE_BYTES}")
    return {"name": path.stem, "kind": kind, "type": f"{kind}/{path.suffix[1:].lower()}", "data": base64.b64encode(data).decode()}


def _picture(medium: MediaSpan) -> Image.Image:
    """A picture of a medium: its codes decoded, or blank if they are not."""
    cells = np.zeros(medium.grid) if medium.shown is None else medium.shown
    if cells.ndim == 2:
        cells = np.interp(cells, (cells.min(), cells.max() + 1e-6), (0, 255))[::-1]
    return Image.fromarray(cells.astype(np.uint8))
