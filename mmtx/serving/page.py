"""The page of `mmtx demo`: upload, camera and microphone, words as they come with their probability, and what each of them read."""

import base64
import io
from html import escape
from pathlib import Path

import numpy as np
from fastapi import FastAPI
from fastapi.responses import HTMLResponse
from PIL import Image

from mmtx.attention import Stretch, Word, attention_maps
from mmtx.document import Document
from mmtx.errors import InputError
from mmtx.serving.messages import ChatBody, to_document

MOST = 1024  # tokens whose weights are computed: their number is the square of that, for each head
PAGE = Path(__file__).with_name("page.html")
# Nothing is loaded from elsewhere, and no other page may show this one.
POLICY = ("default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; media-src data: blob:; "
          "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'")


class AttentionBody(ChatBody):
    answer: str
    layer: int | None = None
    rollout: bool = False


def add_page(app: FastAPI) -> None:
    """Put the page at the root of a server, and what it asks beside OpenAI's routes."""
    service = app.state.service
    model = service.model
    kinds = [kind for kind in model.vocabulary.kinds if kind != "text"]
    text = PAGE.read_text(encoding="utf-8").replace("{{name}}", escape(service.name)).replace("{{kinds}}", " ".join(kinds))

    @app.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(text, headers={"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer"})

    @app.post("/demo/attention")
    async def attention(body: AttentionBody) -> dict:
        document = await service.read(to_document, model, body.messages, service.limits)
        return await service.read(_attention, document, body)

    def _attention(document: Document, body: AttentionBody) -> dict:
        asked, ids = service.prompt(document), model.tokenizers["text"].encode(body.answer)
        if (count := len(asked.ids) + len(ids)) > MOST:
            raise InputError(f"{count} tokens, expected up to {MOST} to be shown")
        found = attention_maps(model.decoder, model.vocabulary, model.tokenizers, asked, ids)

        def heat(word: Word, medium: Stretch) -> list[list[float]]:
            """Rows from the top, columns from the left: time of a sound runs to the right, low pitches lie below."""
            cells = found.heat(word, medium, body.layer, rollout=body.rollout)
            return (cells.T[::-1] if medium.kind == "audio" else cells).tolist()

        return {"words": [word.text for word in found.words], "layers": list(range(found.weights.shape[0])),
                "media": [{"kind": medium.kind, "shown": _png(medium), "heat": [heat(word, medium) for word in found.words]}
                          for medium in found.media]}


def _png(medium: Stretch) -> str:
    """What the codes of a medium tell, as a data URL."""
    pixels = medium.shown
    if pixels is None:
        pixels = np.zeros((medium.grid[1], medium.grid[0]))
    if pixels.ndim == 2:
        low, high = pixels.min(), pixels.max()
        pixels = ((pixels - low) / max(high - low, 1e-6) * 255)[::-1]
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
