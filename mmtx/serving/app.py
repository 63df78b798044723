"""The routes of `mmtx serve`, after OpenAI's API reference: requests become jobs, answers become JSON, events or sound."""

import asyncio
import base64
import io
import json
import socket
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any, cast

import numpy as np
import torch
from fastapi import Depends, FastAPI, Form, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException

from mmtx.ambient import one_thread
from mmtx.document import Document, Turn
from mmtx.errors import InputError
from mmtx.inference.sampling import Sampling
from mmtx.medium import Audio
from mmtx.pipeline import Model
from mmtx.sequence import prompt
from mmtx.serving import messages as api
from mmtx.serving.batches import BatchScheduler, Job
from mmtx.serving.limits import DEADLINE, LOOPBACK, Limits, LimitsMiddleware, Refused, as_refused, in_time
from mmtx.serving.sounds import MEDIA_TYPES, encoded, in_thread
from mmtx.serving.stops import begun_stop, find_stop
from mmtx.vocabulary import MAX_SIDE

if TYPE_CHECKING:
    from mmtx.modality.pretrained_text import PretrainedText
    from mmtx.modality.text import TextTokenizer

MEDIA_THREADS = 2  # threads that decode and encode media
SAMPLED = {"temperature", "top_p", "top_k", "seed"}  # fields of Sampling in a body
UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # else a proxy such as nginx holds a stream back


class Metrics:
    """The metrics that /metrics reports."""

    def __init__(self):
        self.registry = CollectorRegistry()
        made = {"registry": self.registry}
        self.in_progress = Gauge("mmtx_requests_in_progress", "requests that are being read, queued or answered", **made)
        self.running = Gauge("mmtx_prompts_running", "prompts that are being decoded", **made)
        self.responses = Counter("mmtx_responses", "responses by route and status", ["route", "status"], **made)
        self.duration = Histogram("mmtx_request_duration_seconds", "from its body to the end of the response", ["route"], **made)
        self.tokens = Counter("mmtx_tokens", "tokens of prompts, and generated ones", ["kind"], **made)
        self.batch_size = Histogram("mmtx_batch_size", "prompts that were decoded together", buckets=(1, 2, 4, 8, 16, 32), **made)


class Service:
    """A model with the threads that serve it, for the lifetime of the application."""

    batches: BatchScheduler

    def __init__(self, model: Model, name: str, limits: Limits):
        self.model, self.name, self.limits, self.metrics = model, name, limits, Metrics()
        self.media_threads = ThreadPoolExecutor(MEDIA_THREADS, "media", one_thread)
        self.speech_threads = ThreadPoolExecutor(limits.requests, "speech", one_thread)  # each waits for the codes of one sound
        self.created = int(time.time())

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self.batches = BatchScheduler(self.model, self.metrics.batch_size.observe)
        self.metrics.running.set_function(lambda: len(self.batches.running))
        yield
        await self.batches.close()
        for threads in (self.media_threads, self.speech_threads):
            await asyncio.to_thread(threads.shutdown)

    async def read(self, work: Callable[..., Any], *given: Any) -> Any:
        """Run `work` in a reader thread; meanwhile batches wait a moment for the job that may come of it."""
        self.batches.arriving += 1
        try:
            return await self.run(self.media_threads, work, *given)
        finally:
            self.batches.arriving -= 1

    async def run(self, threads: Executor, work: Callable[..., Any], *given: Any) -> Any:
        """Run `work` in a thread. If the caller leaves, it runs to its end if it has started, and never starts if it has not."""
        async with in_time(self.deadline()):
            return await asyncio.get_running_loop().run_in_executor(threads, work, *given)

    def check(self, model: str) -> None:
        """Raises Refused if a request asks for another model."""
        if model != self.name:
            raise Refused(404, f"model: found {model[:100]!r}, expected {self.name!r}", "model_not_found", "model")

    def deadline(self) -> float:
        """The deadline of the current request, in the event loop's time."""
        return DEADLINE.get()

    def picture_length(self, size: tuple[int, int] | None) -> int:
        """Tokens of an answer that is a picture of this height and width, or the tokenizer's; 1 if the model chooses the size."""
        v, prefix = self.model.vocabulary, self.model._size_prefix("image", size)
        if not prefix:
            return 1
        rows, columns = prefix[1] - v.height(1) + 1, prefix[2] - v.width(1) + 1
        return len(prefix) + rows * columns + 2  # the picture's closing tag, and <end>

    def picture_size(self, asked: str) -> tuple[int, int] | None:
        """Height and width of "WIDTHxHEIGHT"; None for "auto". Raises Refused if the model cannot draw a picture of this size."""
        self.model._check_kind("image")
        width, _, height = asked.partition("x")
        if not height:
            return None
        edges, patch = (int(height), int(width)), self.model._image_config.patch
        if any(edge % patch or not patch <= edge <= MAX_SIDE * patch for edge in edges):
            raise Refused(400, f"size: found {asked!r}, expected width and height as multiples of {patch}, from {patch} to "
                          f"{MAX_SIDE * patch}", "invalid_value", "size")
        return edges

    def embed(self, document: Document) -> np.ndarray:
        (encoded,) = self.model.encode_documents([document], codes=False)
        return self.model.embed_prompt(prompt(encoded, self.model.vocabulary))


class Answer:
    """An answer in progress, with its ids so far; with `top_logprobs`, also the log-probability of each id and of so many others."""

    def __init__(self, service: Service, document: Document, body: api.SamplingBody, out: str = "text",
                 size: tuple[int, int] | None = None, stream: bool = False, top_logprobs: int | None = None,
                 stops: Sequence[str] = ()):
        self.service, self.top_logprobs, self.stops = service, top_logprobs, stops
        self.length = service.model.prompt_length(document)
        self.ids: list[int] = []  # written so far, <end> included
        self.text_ids = service.model.vocabulary.range("text")
        room = service.limits.tokens - self.length
        least = max(body.max_tokens or 1, service.picture_length(size) if out == "image" else 1)  # a picture is never cut
        if room < least:
            raise Refused(400, f"{self.length} tokens of prompt and {least} of answer, expected up to {service.limits.tokens} in all",
                          "context_length_exceeded")
        sampling = Sampling.of(**body.model_dump(include=SAMPLED), max_new_tokens=body.max_tokens or min(256, room))
        self.job = Job(document, self.length, out, sampling, size, service.deadline(),
                       stream or bool(stops) or top_logprobs is not None, top_logprobs is not None)

    async def steps(self) -> AsyncGenerator[list[tuple[int, torch.Tensor | None]], None]:
        """New ids with their scores, as they come, without <end>."""
        v, tokens = self.service.model.vocabulary, self.service.metrics.tokens
        tokens.labels("prompt").inc(self.length)
        async with aclosing(self.service.batches.answer(self.job)) as answer:
            async for new in answer:
                tokens.labels("generated").inc(len(new))
                self.ids += [ident for ident, _ in new]
                yield [(ident, scores) for ident, scores in new if ident not in (v.end, v.eos)]

    async def codes(self) -> AsyncIterator[int]:
        async for new in self.steps():
            for ident, _ in new:
                yield ident

    async def pieces(self) -> AsyncIterator[tuple[str, list[dict], str | None]]:
        """Pieces of text as they come, the log-probabilities of their ids and, in the last, the finish reason."""
        text, shown, cut = "", 0, None
        scored: list[tuple[int, dict]] = []  # of ids not shown yet, each with the length of the text before it
        async with aclosing(self.steps()) as steps:
            async for new in steps:
                scored += [(len(text), self._scored(ident, scores)) for ident, scores in new if scores is not None]
                text = self.text(self.ids).rstrip("\ufffd")  # hold back incomplete characters
                if (cut := find_stop(text, self.stops)) is not None:
                    break
                clear = len(text) - begun_stop(text, self.stops)
                if self.job.stream and clear > shown:
                    yield text[shown:clear], [entry for begin, entry in scored if begin < clear], None
                    shown, scored = clear, [(begin, entry) for begin, entry in scored if begin >= clear]
        v, text = self.service.model.vocabulary, self.text(self.ids)
        reason = "length" if cut is None and self.ids[-1] not in (v.end, v.eos) else "stop"
        yield text[shown:cut], [entry for begin, entry in scored if cut is None or begin < cut], reason

    def text(self, ids: Sequence[int]) -> str:
        """The text among ids."""
        return self.service.model.tokenizers["text"].decode([ident - self.text_ids.start for ident in ids if ident in self.text_ids])

    def usage(self, read: str = "prompt_tokens", written: str = "completion_tokens") -> dict:
        return {read: self.length, written: len(self.ids), "total_tokens": self.length + len(self.ids)}

    def _scored(self, ident: int, scores: torch.Tensor) -> dict:
        """Log-probability of an id among all that the grammar allows, at temperature 1, and those of the best of these."""
        grammar = self.service.model.grammar
        allowed = grammar.allowed(grammar.start(1, "text"), len(scores))[0]
        shares = scores.float().masked_fill(~allowed, -torch.inf).log_softmax(0)
        best = shares.topk(min(self.top_logprobs or 0, len(shares))).indices.tolist()
        entries = [{"token": self.text([one]), "logprob": max(float(shares[one]), -9999.0), "bytes": self._bytes(one)}
                   for one in (ident, *best)]
        return {**entries[0], "top_logprobs": entries[1:]}

    def _bytes(self, ident: int) -> list[int]:
        """The bytes of a piece of text, possibly part of a character; none for other ids."""
        tokenizer = cast("TextTokenizer | PretrainedText", self.service.model.tokenizers["text"])
        return list(tokenizer.piece_bytes(ident - self.text_ids.start)) if ident in self.text_ids else []


def make_app(model: Model, name: str, limits: Limits = Limits(), key: str | None = None, loopback: bool = True) -> FastAPI:
    """The ASGI application, which serves one model."""
    service = Service(model, name, limits)

    async def reraise(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException) and error.status_code == 404 and not isinstance(error, Refused):
            raise Refused(404, f"found {request.url.path[:100]!r}, which is no route of this server, expected one such as "
                          "/v1/chat/completions; for most clients the base URL ends in /v1", "unknown_url")
        raise error

    app = FastAPI(title="mmtx", lifespan=service.lifespan, docs_url=None, redoc_url=None, openapi_url=None,
                  exception_handlers={RequestValidationError: reraise, HTTPException: reraise})
    app.state.service = service
    app.add_middleware(LimitsMiddleware, limits=limits, key=key, loopback=loopback, metrics=service.metrics)

    async def read(body: api.RequestBody, content: Sequence[api.Item], where: str, role: str | None = "user") -> Document:
        service.check(body.model)
        return Document((Turn(role, await service.read(api.read_parts, model, content, limits, where)),))

    async def written(answer: Answer, body: api.TextBody, kind: str, choice: Callable[[str, bool], dict]) -> Any:
        """Text as one object or as events; `choice(text, first)` puts a piece in the form of a route."""
        head = {"id": f"{kind[:4]}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": name}

        def shown(text: str, scored: list[dict] | None, reason: str | None, first: bool = True) -> dict:
            logprobs = None if scored is None else {"content": scored, "refusal": None}
            return {**head, "choices": [{"index": 0, **choice(text, first), "finish_reason": reason, "logprobs": logprobs}]}

        async def events() -> AsyncIterator[str]:
            event, first = lambda value: f"data: {json.dumps(value)}\n\n", True
            try:
                async for text, scored, reason in answer.pieces():
                    yield event(shown(text, scored or None, reason, first))
                    first = False
                if body.stream_options and body.stream_options.include_usage:
                    yield event({**head, "choices": [], "usage": answer.usage()})
                yield "data: [DONE]\n\n"
            except Exception as error:  # the status has been sent
                yield event(as_refused(error).body)

        if body.stream_options and not body.stream:
            raise Refused(400, "stream_options: found without stream, expected stream: true", "invalid_value", "stream_options")
        if body.stream:
            return StreamingResponse(events(), headers=UNBUFFERED, media_type="text/event-stream")
        pieces = [piece async for piece in answer.pieces()]
        scored = [one for _, some, _ in pieces for one in some] if answer.top_logprobs is not None else None
        return {**shown("".join(text for text, *_ in pieces), scored, pieces[-1][2]), "usage": answer.usage()}

    @app.get("/health")
    async def health() -> dict:
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(generate_latest(service.metrics.registry))

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [await retrieve_model(name)]}

    @app.get("/v1/models/{asked_for:path}")  # a name may have a slash; /metrics shows this path
    async def retrieve_model(asked_for: str) -> dict:
        service.check(asked_for)
        return {"id": name, "object": "model", "created": service.created, "owned_by": "mmtx"}

    @app.post("/v1/chat/completions")
    async def chat(body: api.ChatBody):
        service.check(body.model)
        if body.top_logprobs and not body.logprobs:
            raise Refused(400, "top_logprobs: found without logprobs, expected logprobs: true", "invalid_value", "top_logprobs")
        document = await service.read(api.read_document, model, body.messages, limits)
        answer = Answer(service, document, body, stream=body.stream, stops=body.stop,
                        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None)
        kind, key = ("chat.completion.chunk", "delta") if body.stream else ("chat.completion", "message")
        role = lambda first: {"role": "assistant"} if first else {}  # clients concatenate the fields of a stream
        return await written(answer, body, kind, lambda text, first: {key: {**role(first), "content": text}})

    @app.post("/v1/completions")
    async def completions(body: api.CompletionBody):
        document = await read(body, body.prompt, "prompt", None)
        answer = Answer(service, document, body, "document", stream=body.stream, stops=body.stop)
        return await written(answer, body, "text_completion", lambda text, first: {"text": text})

    @app.post("/v1/embeddings")
    async def embeddings(body: api.EmbeddingsBody) -> dict:
        data, count = [], 0
        for number, content in enumerate(body.input):
            document = await read(body, content, f"input[{number}]")
            if (count := count + model.prompt_length(document)) > limits.tokens:
                raise Refused(400, f"{count} tokens, expected up to {limits.tokens} in all", "context_length_exceeded")
            vector = await service.read(service.embed, document)
            shown = base64.b64encode(vector.tobytes()).decode() if body.encoding_format == "base64" else vector.tolist()
            data.append({"object": "embedding", "index": number, "embedding": shown})
        return {"object": "list", "data": data, "model": name, "usage": {"prompt_tokens": count, "total_tokens": count}}

    async def form(request: Request) -> None:
        if not request.headers["content-type"].lower().startswith("multipart/form-data"):
            raise Refused(415, "Content-Type: expected multipart/form-data, with the sound as `file`", "invalid_content_type")

    @app.post("/v1/audio/transcriptions", dependencies=[Depends(form)])
    async def transcriptions(body: Annotated[api.TranscriptionBody, Form()]):
        service.check(body.model)
        part = await service.read(api.read_part, model, Audio(await body.file.read()), limits, "file")
        greedy = not Sampling.of(**body.model_dump(include=SAMPLED)).temperature  # many clients send the default, 0
        if model.transcribes and greedy and body.max_tokens is None:
            text = await service.read(model.transcribe, part)  # in pieces, so that no prompt is as long as the sound
        else:
            answer = Answer(service, Document((Turn("user", (part,)),)), body)
            text = "".join([text async for text, *_ in answer.pieces()])
        return PlainTextResponse(text) if body.response_format == "text" else {"text": text}

    @app.post("/v1/images/generations")
    async def images(body: api.ImagesBody) -> dict:
        answer = Answer(service, await read(body, body.prompt, "prompt"), body, "image", service.picture_size(body.size))
        v, file = model.vocabulary, io.BytesIO()
        (picture,) = await service.read(model.detokenize, [v.bos, *[ident async for ident in answer.codes()], v.eos])
        picture.save(file, "PNG")
        return {"created": int(time.time()), "data": [{"b64_json": base64.b64encode(file.getvalue()).decode()}],
                "usage": answer.usage("input_tokens", "output_tokens")}

    @app.post("/v1/audio/speech")
    async def speech(body: api.SpeechBody) -> Response:
        answer = Answer(service, await read(body, body.input, "input"), body, "audio", stream=True)
        pieces = in_thread(service.speech_threads, answer.codes(), lambda ids: encoded(
            model.stream_sound(ids), body.response_format), lambda: service.batches.cancel(answer.job))
        first = await anext(pieces)  # errors until then are reported with a status

        async def sound() -> AsyncIterator[bytes]:
            yield first
            async for piece in pieces:
                yield piece

        return StreamingResponse(sound(), headers=UNBUFFERED, media_type=MEDIA_TYPES[body.response_format])

    return app


def serve(model: Model, name: str, host: str, port: int, limits: Limits, key: str | None,
          page: Callable[[FastAPI], None] | None = None) -> None:
    """Serve until SIGINT or SIGTERM; `page` adds the web page of `mmtx demo`."""
    import uvicorn

    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=1024)
    except OSError as error:
        raise InputError(f"{host}:{port}: cannot listen on this address ({error.strerror})") from None
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # or the body waits 40 ms for an ACK of the headers
    app = make_app(model, name, limits, key, host in LOOPBACK)
    if page:
        page(app)
    shown = f"[{host}]" if ":" in host else host
    print(f"{name} answers at http://{shown}:{listener.getsockname()[1]}/{'' if page else 'v1'}", flush=True)
    config = uvicorn.Config(app, log_level="warning", timeout_keep_alive=30, timeout_graceful_shutdown=10, server_header=False,
                            limit_concurrency=8 * limits.requests, http="h11")  # httptools does not limit the size of headers
    uvicorn.Server(config).run(sockets=[listener])
