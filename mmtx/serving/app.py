"""The routes of `mmtx serve`, after OpenAI's API reference: what is asked, as jobs; what is answered, as JSON, events or sound."""

import asyncio
import base64
import io
import json
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
from mmtx.sequence import prompt
from mmtx.serving import messages as api
from mmtx.serving.batches import Batches, Job
from mmtx.serving.limits import Door, Limits, Refused, as_refused
from mmtx.serving.sounds import KINDS, encoded, in_thread

LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")
READERS = 2  # threads that read media and make them
SAMPLED = {"temperature", "top_p", "top_k", "seed"}  # what a body says of Sampling


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


class Service:
    """A model with the threads that answer for it, while the application lives."""

    batches: Batches

    def __init__(self, model: Model, name: str, limits: Limits):
        self.model, self.name, self.limits, self.metrics = model, name, limits, Metrics()
        self.readers = ThreadPoolExecutor(READERS, "readers", one_thread)
        self.speakers = ThreadPoolExecutor(limits.requests, "speakers", one_thread)  # each waits for the codes of one sound
        self.began = int(time.time())

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self.batches = Batches(self.model, self.metrics.rows.observe)
        self.metrics.running.set_function(lambda: self.batches.running)
        yield
        await self.batches.close()
        for threads in (self.readers, self.speakers):
            await asyncio.to_thread(threads.shutdown)

    async def read(self, work: Callable[..., Any], *given: Any) -> Any:
        """Run something in a thread of the readers, while batches wait a moment for what comes of it."""
        self.batches.coming += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.readers, work, *given)
        finally:
            self.batches.coming -= 1

    def embed(self, document: Document) -> np.ndarray:
        (encoded,) = self.model.encode_documents([document], codes=False)
        return self.model.embed_prompt(prompt(encoded, self.model.vocabulary))

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


class Writing:
    """An answer on its way: its ids, and its text as far as no character is cut. With `top`, also how likely each id was, beside so
    many others."""

    def __init__(self, service: Service, document: Document, body: api.SamplingBody, out: str = "text", size=None, live: bool = False,
                 top: int | None = None):
        self.service, self.top, self.length = service, top, service.model.prompt_length(document)
        self.ids: list[int] = []
        self.scores: list[Any] = []
        self.shown, self.reason = 0, "length"
        room = service.limits.tokens - self.length
        if room < (body.most or 1):
            raise Refused(400, f"{self.length} tokens of prompt and {body.most or 1} of answer, expected up to "
                          f"{service.limits.tokens} in all", "context_length_exceeded")
        sampling = Sampling.of(**body.model_dump(include=SAMPLED), max_new_tokens=min(256, room) if body.most is None else body.most)
        self.job = Job(document, self.length, out, sampling, size, time.monotonic() + service.limits.timeout,
                       live or top is not None, top is not None)

    async def steps(self) -> AsyncIterator[int]:
        """Each id as it comes, <end> left out."""
        v, tokens = self.service.model.vocabulary, self.service.metrics.tokens
        tokens.labels("read").inc(self.length)
        async for ident, scores in self.service.batches.answer(self.job):
            tokens.labels("written").inc()
            self.ids.append(ident)
            if ident in (v.end, v.eos):
                self.reason = "stop" if len(self.ids) <= self.job.sampling.max_new_tokens else "length"
                continue
            if scores is not None:
                self.scores.append(self._logprob(ident, scores))
            yield ident

    async def whole(self) -> list[int]:
        return [ident async for ident in self.steps()]

    async def pieces(self) -> AsyncIterator[tuple[str, str | None, list]]:
        """Text as it comes, why it ended (None before that), and the scores of its ids."""
        ids, told = [], 0
        async for ident in self.steps():
            ids.append(ident)
            text = self.service.text(ids)
            if text[self.shown:] and not text.endswith("\ufffd"):  # a character of several bytes waits until it is whole
                yield text[self.shown:], None, self.scores[told:]
                self.shown, told = len(text), len(self.scores)
        yield self.service.text(ids)[self.shown:], self.reason, self.scores[told:]

    def _logprob(self, ident: int, scores: torch.Tensor) -> dict:
        v = self.service.model.vocabulary
        allowed = torch.full_like(scores, -torch.inf)
        allowed[v.range("text").start:v.range("text").stop], allowed[v.end] = 0, 0
        shares = (scores + allowed).log_softmax(0)
        best = shares.topk(min(self.top, len(shares)))
        told = lambda one, value: {"token": self.service.text([one]), "logprob": max(float(value), -9999.0),
                                   "bytes": self.service.bytes(one)}
        return {**told(ident, shares[ident]), "top_logprobs": [told(int(one), value) for value, one in zip(*best)]}

    def usage(self, read: str = "prompt_tokens", written: str = "completion_tokens") -> dict:
        return {read: self.length, written: len(self.ids), "total_tokens": self.length + len(self.ids)}


def make_app(model: Model, name: str, limits: Limits = Limits(), key: str | None = None, loopback: bool = True) -> FastAPI:
    """The application (ASGI), which speaks for one model."""
    service = Service(model, name, limits)

    async def refused(request: Request, error: Exception) -> JSONResponse:
        return as_refused(error).response

    app = FastAPI(title="mmtx", lifespan=service.lifespan, docs_url=None, redoc_url=None, openapi_url=None,
                  exception_handlers={RequestValidationError: refused, HTTPException: refused})  # the door answers all others
    app.state.service = service
    if loopback:  # or a page elsewhere could speak to it through a name that leads here
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "["])
    app.add_middleware(Door, limits=limits, key=key, metrics=service.metrics)

    def check(asked_for: str) -> None:
        if asked_for != name:
            raise Refused(404, f"model: found {asked_for[:100]!r}, expected {name!r}", "model_not_found", "model")

    async def answer(writing: Writing, body: api.WriteBody, kind: str, choice: Callable[[str, str | None, list | None], dict]):
        """What was written, as one object or as events; `choice` says it in the form of a route."""
        head = {"id": f"{kind[:4]}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": name}

        async def events() -> AsyncIterator[str]:
            event = lambda value: f"data: {json.dumps(value)}\n\n"
            try:
                async for text, reason, scores in writing.pieces():
                    yield event({**head, "choices": [choice(text, reason, scores or None)]})
                if body.stream_options and body.stream_options.include_usage:
                    yield event({**head, "choices": [], "usage": writing.usage()})
                yield "data: [DONE]\n\n"
            except Exception as error:  # the status has been sent
                yield event(as_refused(error).body)

        if body.stream:
            return StreamingResponse(events(), media_type="text/event-stream")
        text = service.text(await writing.whole())
        return {**head, "choices": [choice(text, writing.reason, writing.scores if writing.top is not None else None)],
                "usage": writing.usage()}

    async def made(body: api.SamplingBody, words: Sequence[api.Item], where: str, out: str, **more: Any) -> Writing:
        check(body.model)
        parts = await service.read(api.read_parts, model, words, limits, where)
        return Writing(service, Document((Turn("user", parts),)), body, out, **more)

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
    async def chat(body: api.ChatBody):
        check(body.model)
        document = await service.read(api.read_document, model, body.messages, limits)
        writing = Writing(service, document, body, live=body.stream, top=(body.top_logprobs or 0) if body.logprobs else None)
        kind, key = ("chat.completion.chunk", "delta") if body.stream else ("chat.completion", "message")
        return await answer(writing, body, kind, lambda text, reason, scores: {
            "index": 0, key: {"role": "assistant", "content": text}, "finish_reason": reason,
            "logprobs": None if scores is None else {"content": scores, "refusal": None}})

    @app.post("/v1/completions")
    async def completions(body: api.CompletionBody):
        check(body.model)
        parts = await service.read(api.read_parts, model, body.prompt, limits, "prompt")
        writing = Writing(service, Document((Turn(None, parts),)), body, "document", live=body.stream)
        return await answer(writing, body, "text_completion", lambda text, reason, scores: {
            "index": 0, "text": text, "finish_reason": reason, "logprobs": None})

    @app.post("/v1/embeddings")
    async def embeddings(body: api.EmbeddingsBody) -> dict:
        check(body.model)
        data, count = [], 0
        for number, content in enumerate(body.input):
            parts = await service.read(api.read_parts, model, content, limits, f"input[{number}]")
            document = Document((Turn("user", parts),))
            if (count := count + model.prompt_length(document)) > limits.tokens:
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
        part = await service.read(api.read_part, model, Audio(await file.read()), limits, "file")
        writing = Writing(service, Document((Turn("user", (part,)),)), api.SamplingBody(model=name, temperature=temperature))
        text = service.text(await writing.whole())
        return PlainTextResponse(text) if response_format == "text" else {"text": text}

    @app.post("/v1/images/generations")
    async def images(body: api.ImagesBody) -> dict:
        size = None if body.size == "auto" else tuple(map(int, reversed(body.size.split("x"))))
        writing = await made(body, body.prompt, "prompt", "image", size=size)
        v, file = model.vocabulary, io.BytesIO()
        (picture,) = await service.read(model.detokenize, [v.bos, *await writing.whole(), v.eos])
        picture.save(file, "PNG")
        return {"created": int(time.time()), "data": [{"b64_json": base64.b64encode(file.getvalue()).decode()}],
                "usage": writing.usage("input_tokens", "output_tokens")}

    @app.post("/v1/audio/speech")
    async def speech(body: api.SpeechBody) -> Response:
        writing = await made(body, body.input, "input", "audio", live=True)
        pieces = in_thread(service.speakers, writing.steps(), lambda ids: encoded(
            model.stream_sound(ids), body.response_format), lambda: service.batches.drop(writing.job))
        first = await anext(pieces)  # what goes wrong until then is told with a status

        async def sound() -> AsyncIterator[bytes]:
            yield first
            async for piece in pieces:
                yield piece

        return StreamingResponse(sound(), media_type=KINDS[body.response_format])

    return app


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
