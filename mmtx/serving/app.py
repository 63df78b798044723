"""The routes of `mmtx serve`, after OpenAI's API reference: what is asked, as jobs; what is answered, as JSON or events."""

import asyncio
import base64
import io
import json
import logging
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

import numpy as np
import torch
from fastapi import FastAPI, Form, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from mmtx.ambient import one_thread
from mmtx.document import Document, Turn
from mmtx.errors import InputError
from mmtx.inference.sampling import Sampling
from mmtx.pipeline import Audio, Model
from mmtx.sequence import Prompt, prompt
from mmtx.serving.batches import Batches, Job
from mmtx.serving.limits import Door, Limits, Refused
from mmtx.serving.messages import (
    ChatBody,
    CompletionBody,
    EmbeddingsBody,
    ImagesBody,
    SamplingBody,
    SpeechBody,
    WriteBody,
    read_document,
    read_part,
    read_parts,
)

LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")
READERS = 2  # threads that read media and make them
SOUNDS = {"mp3": ("MP3", None, "audio/mpeg"), "wav": ("WAV", "PCM_16", "audio/wav"), "flac": ("FLAC", None, "audio/flac"),
          "opus": ("OGG", "OPUS", "audio/ogg")}


class Metrics:
    """What /metrics tells."""

    def __init__(self):
        self.registry = CollectorRegistry()
        made = {"registry": self.registry}
        self.inside = Gauge("mmtx_requests_inside", "requests that are in the house", **made)
        self.running = Gauge("mmtx_prompts_running", "prompts that are being answered", **made)
        self.answers = Counter("mmtx_answers", "answers by route and status", ["route", "status"], **made)
        self.seconds = Histogram("mmtx_seconds", "from a request's body to the end of its answer", ["route"], **made)
        self.tokens = Counter("mmtx_tokens", "ids that were read and written", ["what"], **made)
        self.rows = Histogram("mmtx_batch_rows", "prompts that were answered together", buckets=(1, 2, 4, 8, 16, 32), **made)


class Writing:
    """An answer on its way: its ids, and its text as far as no character is cut."""

    def __init__(self, service: "Service", document: Document, body: SamplingBody, out: str = "text", size=None,
                 top: int | None = None):
        self.service, self.top = service, top
        self.ids: list[int] = []
        self.scores: list[Any] = []
        self.shown, self.reason, self.length = 0, "length", service.model.prompt_length(document)
        limits = service.limits
        room = limits.tokens - self.length
        wished = getattr(body, "max_completion_tokens", None) or getattr(body, "max_tokens", None)
        if room < (wished or 1):
            raise Refused(400, f"{self.length} tokens of prompt and {wished or 1} of answer, expected up to {limits.tokens} "
                          "in all", "context_length_exceeded")
        chosen = {"max_new_tokens": min(256, room) if wished is None else wished, "temperature": body.temperature,
                  "top_p": body.top_p, "top_k": body.top_k, "seed": body.seed}
        scored = top is not None
        self.job = Job(document, self.length, out, Sampling.of(**chosen), size, time.monotonic() + limits.timeout,
                       live=scored or getattr(body, "stream", False), scored=scored)

    async def steps(self) -> AsyncIterator[int]:
        """Each id as it comes, <end> left out. What ends early gives its place to others."""
        v = self.service.model.vocabulary
        self.service.batches.submit(self.job)
        try:
            while True:
                for item in await self.job.queue.get():
                    if item is None:
                        return
                    if isinstance(item, Exception):
                        raise item
                    ident, scores = item
                    self.ids.append(ident)
                    if ident in (v.end, v.eos):
                        self.reason = "stop" if len(self.ids) <= self.job.sampling.max_new_tokens else "length"
                        continue
                    if scores is not None:
                        self.scores.append(self._logprob(ident, scores))
                    yield ident
        finally:
            self.job.dropped = True
            self.service.metrics.tokens.labels("read").inc(self.length)
            self.service.metrics.tokens.labels("written").inc(len(self.ids))

    async def whole(self) -> list[int]:
        return [ident async for ident in self.steps()]

    def piece(self, ids: Sequence[int], last: bool = False) -> str:
        """What `ids` say beyond what was shown; a character of several bytes waits until it is whole."""
        text = self.service.text(ids)
        if text.endswith("\ufffd") and not last:
            return ""
        new, self.shown = text[self.shown:], max(self.shown, len(text))
        return new

    def _logprob(self, ident: int, scores: torch.Tensor) -> dict:
        v = self.service.model.vocabulary
        allowed = torch.full_like(scores, -torch.inf)
        allowed[v.range("text").start:v.range("text").stop], allowed[v.end] = 0, 0
        shares = (scores + allowed).log_softmax(0)
        best = shares.topk(min(self.top, len(shares)))
        told = lambda one, value: {"token": self.service.text([one]), "logprob": max(float(value), -9999.0),
                                   "bytes": self.service.bytes(one)}
        return {**told(ident, shares[ident]), "top_logprobs": [told(int(one), value) for value, one in zip(*best)]}

    @property
    def usage(self) -> dict:
        read, wrote = self.length, len(self.ids)
        return {"prompt_tokens": read, "completion_tokens": wrote, "total_tokens": read + wrote}


class Service:
    """A model with the threads that answer for it."""

    def __init__(self, model: Model, name: str, limits: Limits):
        self.model, self.name, self.limits, self.metrics = model, name, limits, Metrics()
        self.batches = Batches(model, self.metrics.rows.observe)
        self.metrics.running.set_function(lambda: self.batches.running)
        self.readers = ThreadPoolExecutor(READERS, initializer=one_thread)
        self.began = int(time.time())

    async def read(self, work: Callable[..., Any], *given: Any) -> Any:
        """Run something in a thread of the readers, while batches wait a moment for what comes of it."""
        self.batches.coming += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.readers, work, *given)
        finally:
            self.batches.coming -= 1

    def prompt(self, document: Document) -> Prompt:
        return prompt(document, self.model.vocabulary)

    def embed(self, document: Document) -> np.ndarray:
        return self.model.embed_prompt(self.prompt(*self.model.encode_documents([document])))

    def text(self, ids: Sequence[int]) -> str:
        """The text among ids."""
        texts = self.model.vocabulary.range("text")
        return self.model.tokenizers["text"].decode([ident - texts.start for ident in ids if ident in texts])

    def bytes(self, ident: int) -> list[int]:
        """The bytes that a piece of text stands for, possibly part of a character."""
        texts = self.model.vocabulary.range("text")
        tokenizer: Any = self.model.tokenizers["text"]
        piece = tokenizer.piece(ident - texts.start) if ident in texts else ""
        return [int(piece[3:5], 16)] if piece.startswith("<0x") and len(piece) == 6 else list(self.text([ident]).encode())

    def media(self, ids: Sequence[int]) -> Any:
        v = self.model.vocabulary
        return self.model.detokenize([v.bos, *ids, v.eos])[0]


def make_app(model: Model, name: str, limits: Limits = Limits(), key: str | None = None, loopback: bool = True) -> FastAPI:
    """The application (ASGI), which speaks for one model."""
    service = Service(model, name, limits)

    @asynccontextmanager
    async def lifespan(app):
        yield
        await asyncio.to_thread(service.batches.close)
        service.readers.shutdown()

    app = FastAPI(title="mmtx", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service
    if loopback:  # or a page elsewhere could speak to it through a name that leads here
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "["])
    app.add_middleware(Door, limits=limits, key=key, metrics=service.metrics)

    @app.exception_handler(Refused)
    @app.exception_handler(InputError)
    @app.exception_handler(RequestValidationError)
    @app.exception_handler(HTTPException)
    @app.exception_handler(Exception)
    async def refused(request: Request, error: Exception) -> JSONResponse:
        refusal = as_refused(error)
        return JSONResponse(refusal.body, refusal.status, refusal.headers)

    def check(asked_for: str) -> None:
        if asked_for != name:
            raise Refused(404, f"model: found {asked_for[:100]!r}, expected {name!r}", "model_not_found", "model")

    def answer(writing: Writing, body: WriteBody, kind: str, choice: Callable[[str, str | None, list | None], dict]):
        """What was written, as one object or as events; `choice` says it in the form of a route."""
        head = {"id": f"{kind[:4]}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": name}

        async def whole() -> dict:
            ids = await writing.whole()
            scores = writing.scores if writing.top is not None else None
            return {**head, "choices": [choice(service.text(ids), writing.reason, scores)], "usage": writing.usage}

        async def events() -> AsyncIterator[str]:
            event = lambda value: f"data: {json.dumps(value)}\n\n"
            ids, told = [], 0
            try:
                async for ident in writing.steps():
                    ids.append(ident)
                    if piece := writing.piece(ids):
                        yield event({**head, "choices": [choice(piece, None, writing.scores[told:] or None)]})
                        told = len(writing.scores)
                yield event({**head, "choices": [choice(writing.piece(ids, True), writing.reason, writing.scores[told:] or None)]})
                if body.stream_options and body.stream_options.include_usage:
                    yield event({**head, "choices": [], "usage": writing.usage})
                yield "data: [DONE]\n\n"
            except Exception as error:  # the status has been sent
                yield event(as_refused(error).body)

        return StreamingResponse(events(), media_type="text/event-stream") if body.stream else whole()

    async def finished(response):
        return response if isinstance(response, Response) else await response

    @app.get("/health")
    async def health() -> dict:
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(generate_latest(service.metrics.registry))

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [await one_model(name)]}

    @app.get("/v1/models/{asked_for}")
    async def one_model(asked_for: str) -> dict:
        check(asked_for)
        return {"id": name, "object": "model", "created": service.began, "owned_by": "mmtx"}

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody):
        check(body.model)
        document = await service.read(read_document, model, body.messages, limits)
        writing = Writing(service, document, body, top=(body.top_logprobs or 0) if body.logprobs else None)
        streamed = body.stream

        def choice(text: str, reason: str | None, scores: list | None) -> dict:
            return {"index": 0, "delta" if streamed else "message": {"role": "assistant", "content": text},
                    "finish_reason": reason, "logprobs": None if scores is None else {"content": scores, "refusal": None}}

        return await finished(answer(writing, body, "chat.completion.chunk" if streamed else "chat.completion", choice))

    @app.post("/v1/completions")
    async def completions(body: CompletionBody):
        check(body.model)
        parts = await service.read(read_parts, model, body.prompt, limits, "prompt")
        writing = Writing(service, Document((Turn(None, parts),)), body, "document")
        return await finished(answer(writing, body, "text_completion", lambda text, reason, scores: {
            "index": 0, "text": text, "finish_reason": reason, "logprobs": None}))

    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingsBody) -> dict:
        check(body.model)
        one = isinstance(body.input, str) or not body.input or not isinstance(body.input[0], (str, list))
        data, count = [], 0
        for number, content in enumerate([body.input] if one else body.input):
            parts = await service.read(read_parts, model, content, limits, f"input[{number}]")
            document = Document((Turn("user", parts),))
            count += model.prompt_length(document)
            if count > limits.tokens:
                raise Refused(400, f"{count} tokens, expected up to {limits.tokens} in all", "context_length_exceeded")
            vector = await service.read(service.embed, document)
            shown = base64.b64encode(vector.tobytes()).decode() if body.encoding_format == "base64" else vector.tolist()
            data.append({"object": "embedding", "index": number, "embedding": shown})
        return {"object": "list", "data": data, "model": name, "usage": {"prompt_tokens": count, "total_tokens": count}}

    @app.post("/v1/audio/transcriptions")
    async def transcriptions(file: UploadFile, model_name: Annotated[str, Form(alias="model")],
                             temperature: Annotated[float, Form()] = 0.0,
                             response_format: Annotated[Literal["json", "text"], Form()] = "json"):
        check(model_name)
        part = await service.read(read_part, model, Audio(await file.read()), limits, "file")
        writing = Writing(service, Document((Turn("user", (part,)),)), SamplingBody(model=name, temperature=temperature))
        text = service.text(await writing.whole())
        return PlainTextResponse(text) if response_format == "text" else {"text": text}

    @app.post("/v1/images/generations")
    async def images(body: ImagesBody) -> dict:
        size = None
        if body.size != "auto":
            width, height = map(int, body.size.split("x"))
            size = height, width
        made, writing = await draw(body, body.prompt, "image", size)
        file = io.BytesIO()
        made.save(file, "PNG")
        usage = {"input_tokens": writing.usage["prompt_tokens"], "output_tokens": writing.usage["completion_tokens"],
                 "total_tokens": writing.usage["total_tokens"]}
        return {"created": int(time.time()), "data": [{"b64_json": base64.b64encode(file.getvalue()).decode()}], "usage": usage}

    @app.post("/v1/audio/speech")
    async def speech(body: SpeechBody) -> Response:
        import soundfile

        sound, _ = await draw(body, body.input, "audio")
        format, subtype, kind = SOUNDS[body.response_format]
        file = io.BytesIO()
        await service.read(lambda: soundfile.write(file, sound.samples, sound.rate, format=format, subtype=subtype))
        return Response(file.getvalue(), media_type=kind)

    async def draw(body: SamplingBody, words: str, out: str, size: tuple[int, int] | None = None) -> tuple[Any, Writing]:
        check(body.model)
        parts = await service.read(read_parts, model, words, limits, "prompt" if out == "image" else "input")
        writing = Writing(service, Document((Turn("user", parts),)), body, out, size)
        return await service.read(service.media, await writing.whole()), writing

    return app


def as_refused(error: Exception) -> Refused:
    """What the caller is told of an error: all of a mistake of his own, nothing of one of ours."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, InputError):
        return Refused(400, str(error), "invalid_value")
    if isinstance(error, RequestValidationError):
        first = max(error.errors(), key=lambda one: len(one["loc"]))  # of several that it could be, the nearest
        where = ".".join(str(place) for place in first["loc"] if place != "body") or "body"
        return Refused(400, f"{where}: {first['msg']}", first["type"], where[:200])
    if isinstance(error, HTTPException):
        return Refused(error.status_code, str(error.detail))
    logging.getLogger("mmtx").error("a request failed", exc_info=error)
    return Refused(500, "the server failed; its log says why")


def serve(model: Model, name: str, host: str, port: int, limits: Limits, key: str | None,
          page: Callable[[FastAPI], None] | None = None) -> None:
    """Answer until SIGINT or SIGTERM; `page` adds one for people."""
    import uvicorn

    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=1024)
    except OSError as error:
        raise InputError(f"{host}:{port}: cannot be listened at ({error.strerror})") from None
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # or the body of an answer waits 40 ms for word of its head
    app = make_app(model, name, limits, key, host in LOOPBACK)
    if page:
        page(app)
    print(f"{name} answers at http://{host}:{listener.getsockname()[1]}/{'' if page else 'v1'}", flush=True)
    config = uvicorn.Config(app, log_level="warning", timeout_keep_alive=30, timeout_graceful_shutdown=10, server_header=False,
                            limit_concurrency=8 * limits.requests)
    uvicorn.Server(config).run(sockets=[listener])
