"""The page of `mmtx demo`: what it asks beside OpenAI's routes. Words come with what each of them read and with the training
samples that are most alike; pictures and sounds are made, completed and continued."""

import asyncio
import base64
import json
import math
import threading
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from html import escape
from pathlib import Path
from typing import Any, Literal

import numpy as np
from fastapi import FastAPI
from fastapi.responses import HTMLResponse
from PIL import Image
from pydantic import Field

from mmtx.ambient import one_thread
from mmtx.attention import Stretch, Word, attention_maps
from mmtx.data.sample import kind_of
from mmtx.data.storage import read
from mmtx.document import Document, Turn
from mmtx.errors import InputError
from mmtx.pipeline import Model, ReadMedium, Sound
from mmtx.sequence import prompt
from mmtx.serving.limits import Refused
from mmtx.serving.messages import (
    Asking,
    AudioItem,
    ChatBody,
    Content,
    ImageItem,
    SamplingBody,
    read_document,
    read_part,
    read_parts,
    to_medium,
)
from mmtx.serving.nearest import Nearest, picture_url, shown, sound_url

MOST = 1024        # tokens whose weights are computed: their number is the square of that, for each head
LARGEST = 2 ** 20  # bytes of an example, which is part of the page
PAGE = Path(__file__).with_name("page.html")
# Nothing is loaded from elsewhere, and no other page may show this one.
POLICY = ("default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; media-src data: blob:; "
          "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'")


class AttentionBody(ChatBody):
    answer: str
    layer: int | None = None
    rollout: bool = False


class NearestBody(Asking):
    content: Content


class MakeBody(SamplingBody):
    """A picture or a sound from words or, with `begin`, what goes on with that: below its `kept` share, or behind it."""

    out: Literal["image", "audio"]
    content: Content = []
    begin: ImageItem | AudioItem | None = None
    kept: float = Field(0.5, ge=0, le=1)
    seconds: float = Field(2.0, gt=0, le=10)


def add_page(app: FastAPI, maker: Model | None = None, examples: Sequence[str] = (), nearest: Nearest | None = None) -> None:
    """Put the page at the root of a server. `maker` makes pictures and sounds, by default the server's model; `examples` are
    files to try; `nearest` knows training samples. Raises InputError where an example cannot be read."""
    service = app.state.service
    model, limits = service.model, service.limits
    maker = maker or model
    media = lambda model: [kind for kind in model.vocabulary.kinds if kind in ("image", "audio")]
    settings = json.dumps({"kinds": media(model), "makes": media(maker), "nearest": nearest is not None,
                           "examples": [example for example in map(_example, examples) if example["kind"] in media(model)]})
    text = PAGE.read_text(encoding="utf-8").replace("{{settings}}", settings.replace("<", "\\u003c"))
    text = text.replace("{{name}}", escape(service.name))
    studio, inner = ThreadPoolExecutor(1, initializer=one_thread), app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        thread = threading.Thread(target=nearest.read, daemon=True) if nearest else None
        async with inner(app):
            if thread:
                thread.start()
            yield
            if thread:
                nearest.ended = True
                await asyncio.to_thread(thread.join)
            studio.shutdown(cancel_futures=True)

    app.router.lifespan_context = lifespan

    @app.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(text, headers={"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer"})

    @app.post("/demo/attention")
    async def attention(body: AttentionBody) -> dict:
        return await service.read(_attention, await service.read(read_document, model, body.messages, limits), body)

    @app.post("/demo/nearest")
    async def alike(body: NearestBody) -> dict:
        if nearest is None:
            raise Refused(404, "this server was started without training samples (--train)")
        parts = await service.read(read_parts, model, body.content, limits, "content")
        (document,) = await service.read(model.encode_documents, [Document((Turn("user", parts),))])
        found = await service.read(nearest.find, document)
        told = [(one, *await service.read(shown, one.sample)) for one in found]
        return {"read": len(nearest.samples), "of": len(nearest.found.samples),
                "samples": [{"caption": one.sample.caption, "alike": one.alike, "kind": kind, "shown": url}
                            for one, kind, url in told]}

    @app.post("/demo/make")
    async def make(body: MakeBody) -> dict:
        try:
            async with asyncio.timeout(limits.timeout):
                return await asyncio.get_running_loop().run_in_executor(studio, _make, body)
        except TimeoutError:
            raise Refused(504, "the answer was not ready in time", "timeout") from None

    def _make(body: MakeBody) -> dict:
        if body.out not in media(maker):
            raise InputError(f"out: found {body.out}, which this model does not make")
        parts = [to_medium(item, limits, f"content[{number}]") for number, item in enumerate(body.content)
                 if getattr(item, "text", " ")]
        if not parts and body.begin is None:
            raise InputError("content: found nothing, expected words that say what is to be made")
        sampling: dict[str, Any] = {"temperature": body.temperature, "top_p": body.top_p, "top_k": body.top_k, "seed": body.seed}
        tokenizer: Any = maker.tokenizers[body.out]
        count = sum(len(maker.tokenizers["text"].encode(part)) for part in parts if isinstance(part, str))
        if body.out == "audio":
            count += (limit := math.ceil(body.seconds * tokenizer.codes_per_second))
        if body.begin is not None:
            begin = to_medium(body.begin, limits, "begin")
            part = read_part(maker, begin, limits, "begin")
            if not isinstance(part, ReadMedium) or part.kind != body.out:
                raise InputError(f"begin: found {part.kind}, expected {body.out}")
            count += math.prod(part.grid)
        if count > limits.tokens:
            raise InputError(f"{count} tokens, expected up to {limits.tokens} in all")
        if body.begin is None:
            if body.out == "audio":
                sampling["max_new_tokens"] = limit
            made = maker.generate(parts, body.out, **sampling)
        elif body.out == "image":
            made = maker.outpaint(begin, round(body.kept * part.grid[0]) * tokenizer.config.patch, parts, **sampling)
        else:
            made = maker.continue_audio(begin, body.seconds, parts, **sampling)
        return {"kind": body.out, "shown": sound_url(*made) if isinstance(made, Sound) else picture_url(made)}

    def _attention(document: Document, body: AttentionBody) -> dict:
        asked = prompt(model.encode_documents([document], codes=False)[0], model.vocabulary)
        ids = model.tokenizers["text"].encode(body.answer)
        if (count := len(asked.ids) + len(ids)) > MOST:
            raise InputError(f"{count} tokens, expected up to {MOST} to be shown")
        found = attention_maps(model.decoder, model.vocabulary, model.tokenizers, asked, ids)

        def heat(word: Word, medium: Stretch) -> list[list[float]]:
            """Rows from the top, columns from the left: time of a sound runs to the right, low pitches lie below."""
            cells = found.heat(word, medium, body.layer, rollout=body.rollout)
            return (cells.T[::-1] if medium.kind == "audio" else cells).tolist()

        return {"words": [word.text for word in found.words], "layers": list(range(found.weights.shape[0])),
                "media": [{"kind": medium.kind, "shown": picture_url(_picture(medium)),
                           "heat": [heat(word, medium) for word in found.words]} for medium in found.media]}


def _example(name: str) -> dict:
    data, path = read(name), Path(name)
    kind = kind_of(name, data[:64])
    if len(data) > LARGEST:
        raise InputError(f"{name}: found {len(data)} bytes, expected an example of up to {LARGEST}")
    return {"name": path.stem, "kind": kind, "type": f"{kind}/{path.suffix[1:].lower()}", "data": base64.b64encode(data).decode()}


def _picture(medium: Stretch) -> Image.Image:
    """What the codes of a medium tell."""
    pixels = medium.shown
    if pixels is None:
        pixels = np.zeros((medium.grid[1], medium.grid[0]))
    if pixels.ndim == 2:
        low, high = pixels.min(), pixels.max()
        pixels = ((pixels - low) / max(high - low, 1e-6) * 255)[::-1]
    return Image.fromarray(pixels.astype(np.uint8))
