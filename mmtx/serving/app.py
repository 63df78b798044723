"""The routes of `mmtx serve`, after OpenAI's API reference: requests become jobs, answers become JSON, events or sound."""

import asyncio
import base64
import io
import json
import socket
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from functools import partial
from types import MappingProxyType
from typing import Annotated, Any, cast

import numpy as np
import uvicorn
from fastapi import Depends, FastAPI, Form, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, Response, StreamingResponse
from PIL.Image import Image
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from mmtx.ambient import one_thread
from mmtx.data.media import Sampled
from mmtx.document import Document, Turn
from mmtx.errors import InputError
from mmtx.inference.sampling import Sampling
from mmtx.medium import Audio
from mmtx.pipeline import Model
from mmtx.sequence import prompt
from mmtx.serving import messages as api
from mmtx.serving.batches import BatchScheduler, Job
from mmtx.serving.choices import Choice, Piece, Scored, completion_logprobs, read_prompt
from mmtx.serving.limits import DEADLINE, Limits, LimitsMiddleware, Refused, TimedHeaders, as_refused, in_time
from mmtx.serving.sounds import MEDIA_TYPES, encoded, in_thread
from mmtx.subtitles import Transcript, srt, vtt
from mmtx.vocabulary import MAX_SIDE

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


class Server:
    """The models that are served, by name, and what they share, for the lifetime of the application.

    `learned` names the routes, by their last word, that a model was trained for; others are refused rather than answered with noise.
    """

    def __init__(self, models: Mapping[str, Model], limits: Limits, learned: Mapping[str, Collection[str]]):
        self.limits, self.metrics, self.learned = limits, Metrics(), learned
        self.media_threads = ThreadPoolExecutor(MEDIA_THREADS, "media", one_thread)
        self.speech_threads = ThreadPoolExecutor(limits.requests, "speech", one_thread)  # each waits for the codes of one sound
        self.services = {name: Service(self, name, model) for name, model in models.items()}
        self.created = int(time.time())

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        services = self.services.values()
        for service in services:
            service.batches = BatchScheduler(service.model, self.metrics.batch_size.observe)
        self.metrics.running.set_function(lambda: sum(len(service.batches.running) for service in services))
        yield
        for service in services:
            await service.batches.close()
        for threads in (self.media_threads, self.speech_threads):
            await asyncio.to_thread(threads.shutdown)

    def find(self, model: str, route: str | None = None) -> "Service":
        """The model that a request asks for. Raises Refused if it is not served, or was not trained for the route."""
        if model not in self.services:
            raise Refused(404, f"model: found {model[:100]!r}, expected {_either(self.services)}", "model_not_found", "model")
        able = [name for name in self.services if route is None or route in self.learned.get(name, (route,))]
        if model not in able:
            raise Refused(400, f"model: found {model!r}, which was not trained for this route, expected "
                          f"{_either(able) or 'another route: no other model is served here'}", "invalid_value", "model")
        return self.services[model]


def _either(names: Iterable[str]) -> str:
    return " or ".join(map(repr, names))


class Service:
    """A model that is served."""

    batches: BatchScheduler

    def __init__(self, server: Server, name: str, model: Model):
        self.server, self.name, self.model, self.limits, self.metrics = server, name, model, server.limits, server.metrics

    async def read(self, work: Callable[..., Any], *given: Any) -> Any:
        """Run `work` in a reader thread; meanwhile batches wait a moment for the job that may come of it."""
        self.batches.arriving += 1
        try:
            return await self.run(self.server.media_threads, work, *given)
        finally:
            self.batches.arriving -= 1

    async def run(self, threads: Executor, work: Callable[..., Any], *given: Any) -> Any:
        """Run `work` in a thread. If the caller leaves, it runs to its end if it has started, and never starts if it has not."""
        async with in_time(self.deadline()):
            return await asyncio.get_running_loop().run_in_executor(threads, work, *given)

    def deadline(self) -> float:
        """The deadline of the current request, in the event loop's time."""
        return DEADLINE.get()

    def picture_length(self, size: tuple[int, int] | None) -> int:
        """Tokens of an answer that is a picture of this height and width, or the tokenizer's; 1 if the model chooses the size."""
        if not (prefix := self.model.processor.size_prefix("image", size)):
            return 1
        state: Any = self.model.grammar.start(1, "image", prefix=prefix)
        return len(prefix) + int(state.remaining) + 2  # the picture's closing tag, and <end>

    def picture_size(self, asked: str) -> tuple[int, int] | None:
        """Height and width of "WIDTHxHEIGHT"; None for "auto". Raises Refused if the model cannot draw a picture of this size."""
        self.model.processor.check_kind("image")
        width, _, height = asked.partition("x")
        if not height:
            return None
        edges, patch = (int(height), int(width)), self.model.processor.image_config.patch
        if any(edge % patch or not patch <= edge <= MAX_SIDE * patch for edge in edges):
            raise Refused(400, f"size: found {asked!r}, expected width and height as multiples of {patch}, from {patch} to "
                          f"{MAX_SIDE * patch}", "invalid_value", "size")
        return edges

    def embed(self, document: Document) -> np.ndarray:
        (encoded,) = self.model.encode_documents([document], codes=False)
        return self.model.embed_prompt(prompt(encoded, self.model.vocabulary))


class Answer:
    """The answer to a request, in progress: `n` choices for each document."""

    def __init__(self, service: Service, documents: Sequence[Document], body: api.SamplingBody, out: str = "text",
                 size: tuple[int, int] | None = None, stream: bool = False, top_logprobs: int | None = None,
                 stops: Sequence[str] = (), echo: bool = False):
        """With `top_logprobs`, pieces have log-probabilities, also of as many other tokens; with `echo`, the prompt comes first."""
        self.service, self.documents, self.top_logprobs, self.echo = service, documents, top_logprobs, echo
        n, asked, most = body.n, body.max_tokens, service.limits.tokens
        if (count := n * len(documents)) > api.MAX_CHOICES:
            raise Refused(400, f"n: found {count} choices of all prompts, expected up to {api.MAX_CHOICES}", "invalid_value", "n")
        lengths = [service.model.prompt_length(document) for document in documents]
        self.n, self.length, given = n, sum(lengths), n * sum(lengths)  # usage counts a prompt once
        room = (most - given) // count
        least = max(1 if asked is None else asked, service.picture_length(size) if out == "image" else 0)  # a picture is never cut
        if room < least:
            several = f" for {count} choices" if count > 1 else ""
            raise Refused(400, f"{given} tokens of prompt and {count * least} of answer{several}, expected up to {most} in all",
                          "context_length_exceeded")
        sampling = Sampling.of(**body.model_dump(include=SAMPLED), max_new_tokens=asked or min(256, room) or 1)
        live, queue = stream or bool(stops) or top_logprobs is not None, asyncio.Queue[Any]()
        self.choices = [Choice(service.model, number, out, stream, stops, top_logprobs or 0) for number in range(count)]
        self.jobs = [Job(documents[number // n], lengths[number // n], out, sampling, size, service.deadline(), queue, number, live,
                         top_logprobs is not None) for number in range(0 if asked == 0 else count)]

    async def steps(self) -> AsyncGenerator[tuple[Choice, list[int] | None], None]:
        """A choice with its new ids, which it has got, or with None at its end."""
        tokens = self.service.metrics.tokens
        tokens.labels("prompt").inc(self.length)
        async with aclosing(self.service.batches.answer(self.jobs)) as answer:
            async for number, new in answer:
                choice = self.choices[number]
                if choice.finish_reason:  # a stop sequence came first
                    continue
                for ident, logits in new or ():
                    choice.add(ident, logits)
                tokens.labels("generated").inc(len(new or ()))
                yield choice, None if new is None else [ident for ident, _ in new]
        for choice in self.choices[len(self.jobs):]:  # if no tokens are asked for
            yield choice, None

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Pieces of the text of all choices, as they come."""
        for number, document in enumerate(self.documents if self.echo else ()):
            told = await self.service.read(read_prompt, self.service.model, document, self.top_logprobs)
            for choice in self.choices[number * self.n:(number + 1) * self.n]:
                choice.echo(*told)
        async with aclosing(self.steps()) as steps:
            async for choice, new in steps:
                piece = choice.piece(over=new is None)
                if piece.finish_reason and new:
                    self.service.batches.cancel([self.jobs[choice.number]])
                if piece.text or piece.finish_reason:
                    yield piece

    def usage(self, read: str = "prompt_tokens", written: str = "completion_tokens") -> dict:
        count = sum(len(choice.ids) for choice in self.choices)
        return {read: self.length, written: count, "total_tokens": self.length + count}


def make_app(models: Mapping[str, Model], limits: Limits = Limits(), key: str | None = None, loopback: bool = True,
             learned: Mapping[str, Collection[str]] = MappingProxyType({}), origins: Sequence[str] = ()) -> FastAPI:
    """The ASGI application, which serves models by name; `learned` as in `Server`, `origins` are those of pages that may call it."""
    server = Server(models, limits, learned)

    async def reraise(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException) and error.status_code == 404 and not isinstance(error, Refused):
            raise Refused(404, f"found {request.url.path[:100]!r}, which is no route of this server, expected one such as "
                          "/v1/chat/completions; for most clients the base URL ends in /v1", "unknown_url")
        raise error

    app = FastAPI(title="mmtx", lifespan=server.lifespan, docs_url=None, redoc_url=None, openapi_url=None,
                  exception_handlers={RequestValidationError: reraise, HTTPException: reraise})
    app.state.server = server
    app.add_middleware(LimitsMiddleware, limits=limits, key=key, loopback=loopback, metrics=server.metrics, origins=origins)
    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])

    async def read(service: Service, content: Sequence[api.Item], where: str, role: str | None = "user") -> Document:
        return Document((Turn(role, await service.read(api.read_parts, service.model, content, limits, where)),))

    async def written(answer: Answer, body: api.TextBody, kind: str, text_of: Callable[[str, bool], dict],
                      logprobs_of: Callable[[Scored], dict]) -> Any:
        """Text as one object or as events, in the form of a route; `text_of` also gets whether a piece is the first of its choice."""
        head = {"id": f"{kind[:4]}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": body.model}

        def shown(piece: Piece, first: bool = True) -> dict:
            scored = answer.top_logprobs is not None and (piece.scored or not body.stream)
            return {"index": piece.choice, **text_of(piece.text, first), "finish_reason": piece.finish_reason,
                    "logprobs": logprobs_of(piece.scored) if scored else None}

        async def events() -> AsyncIterator[str]:
            event, begun = lambda value: f"data: {json.dumps({**head, **value})}\n\n", set()
            try:
                async for piece in answer.pieces():
                    yield event({"choices": [shown(piece, piece.choice not in begun)]})
                    begun.add(piece.choice)
                if body.stream_options and body.stream_options.include_usage:
                    yield event({"choices": [], "usage": answer.usage()})
                yield "data: [DONE]\n\n"
            except Exception as error:  # the status has been sent
                yield f"data: {json.dumps(as_refused(error).body)}\n\n"

        if body.stream_options and not body.stream:
            raise Refused(400, "stream_options: found without stream, expected stream: true", "invalid_value", "stream_options")
        if body.stream:
            return StreamingResponse(events(), headers=UNBUFFERED, media_type="text/event-stream")
        pieces = sorted([piece async for piece in answer.pieces()])  # one for each choice
        return {**head, "choices": [shown(piece) for piece in pieces], "usage": answer.usage()}

    @app.get("/health")
    async def health() -> dict:
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(generate_latest(server.metrics.registry))

    @app.get("/v1/models")
    async def list_models() -> dict:
        return {"object": "list", "data": [await retrieve_model(name) for name in models]}

    @app.get("/v1/models/{asked_for:path}")  # a name may have a slash; /metrics shows this path
    async def retrieve_model(asked_for: str) -> dict:
        return {"id": server.find(asked_for).name, "object": "model", "created": server.created, "owned_by": "mmtx"}

    @app.post("/v1/chat/completions")
    async def chat(body: api.ChatBody):
        service = server.find(body.model, "chat")
        if body.top_logprobs and not body.logprobs:
            raise Refused(400, "top_logprobs: found without logprobs, expected logprobs: true", "invalid_value", "top_logprobs")
        document = await service.read(api.read_document, service.model, body.messages, limits)
        answer = Answer(service, [document], body, stream=body.stream, stops=body.stop,
                        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None)
        kind, key = ("chat.completion.chunk", "delta") if body.stream else ("chat.completion", "message")
        role = lambda first: {"role": "assistant"} if first else {}  # clients concatenate the fields of a stream
        return await written(answer, body, kind, lambda text, first: {key: {**role(first), "content": text}},
                             lambda scored: {"content": [entry for _, entry in scored], "refusal": None})

    @app.post("/v1/completions")
    async def completions(body: api.CompletionBody):
        service = server.find(body.model, "completions")
        if body.best_of not in (None, body.n):
            raise Refused(400, f"best_of: found {body.best_of}, expected n, {body.n}", "invalid_value", "best_of")
        documents = [await read(service, content, f"prompt[{number}]", None) for number, content in enumerate(body.prompt)]
        answer = Answer(service, documents, body, "document", stream=body.stream, top_logprobs=body.logprobs, stops=body.stop,
                        echo=body.echo)
        return await written(answer, body, "text_completion", lambda text, _: {"text": text}, completion_logprobs)

    @app.post("/v1/embeddings")
    async def embeddings(body: api.EmbeddingsBody) -> dict:
        service, data, count = server.find(body.model, "embeddings"), [], 0
        for number, content in enumerate(body.input):
            document = await read(service, content, f"input[{number}]")
            if (count := count + service.model.prompt_length(document)) > limits.tokens:
                raise Refused(400, f"{count} tokens, expected up to {limits.tokens} in all", "context_length_exceeded")
            vector = await service.read(service.embed, document)
            shown = base64.b64encode(vector.tobytes()).decode() if body.encoding_format == "base64" else vector.tolist()
            data.append({"object": "embedding", "index": number, "embedding": shown})
        return {"object": "list", "data": data, "model": body.model, "usage": {"prompt_tokens": count, "total_tokens": count}}

    async def form(request: Request) -> None:
        if not request.headers["content-type"].lower().startswith("multipart/form-data"):
            raise Refused(415, "Content-Type: expected multipart/form-data, with the sound as `file`", "invalid_content_type")

    @app.post("/v1/audio/transcriptions", dependencies=[Depends(form)])
    async def transcriptions(body: Annotated[api.TranscriptionBody, Form()]):
        service = server.find(body.model, "transcriptions")
        model = service.model
        part = await service.read(api.read_part, model, Audio(await body.file.read()), limits, "file")
        duration = len(part.data) / cast(Sampled, model.tokenizers["audio"]).rate
        greedy = not Sampling.of(**body.model_dump(include=SAMPLED)).temperature  # many clients send the default, 0
        if model.transcribes and greedy and body.max_tokens is None:
            # In pieces, so that no prompt is as long as the sound.
            transcript: Transcript = await service.read(partial(model.transcribe, return_timestamps=True), part)
        else:
            answer = Answer(service, [Document((Turn("user", (part,)),))], body)
            text = "".join([piece.text async for piece in answer.pieces()])
            transcript = {"text": text, "chunks": [{"timestamp": (0.0, duration), "text": text}]}
        return _transcription(transcript, body.response_format, duration)

    @app.post("/v1/images/generations")
    async def images(body: api.ImagesBody) -> dict:
        service = server.find(body.model, "images")
        document, model, v = await read(service, body.prompt, "prompt"), service.model, service.model.vocabulary
        answer = Answer(service, [document], body, "image", service.picture_size(body.size))
        async for _ in answer.steps():
            pass
        pictures = [await service.read(model.detokenize, [v.bos, *choice.ids[:-1], v.eos]) for choice in answer.choices]
        return {"created": int(time.time()), "data": [{"b64_json": _png(picture)} for (picture,) in pictures],
                "usage": answer.usage("input_tokens", "output_tokens")}

    @app.post("/v1/audio/speech")
    async def speech(body: api.SpeechBody) -> Response:
        service = server.find(body.model, "speech")
        answer = Answer(service, [await read(service, body.input, "input")], body, "audio", stream=True)
        codes = (ident async for _, new in answer.steps() for ident in new or ())
        pieces = in_thread(server.speech_threads, codes, lambda ids: encoded(
            service.model.stream_sound(ids), body.response_format), lambda: service.batches.cancel(answer.jobs))
        first = await anext(pieces)  # errors until then are reported with a status

        async def sound() -> AsyncIterator[bytes]:
            yield first
            async for piece in pieces:
                yield piece

        return StreamingResponse(sound(), headers=UNBUFFERED, media_type=MEDIA_TYPES[body.response_format])

    return app


def _transcription(transcript: Transcript, form: str, duration: float) -> Response | dict:
    """A transcript of a sound of `duration` seconds as one of OpenAI's response formats."""
    text, chunks = transcript["text"], transcript["chunks"]
    if form == "json":
        return {"text": text}
    if form == "verbose_json":
        segments = [{"id": number, "start": chunk["timestamp"][0], "end": chunk["timestamp"][1], "text": chunk["text"]}
                    for number, chunk in enumerate(chunks)]
        return {"task": "transcribe", "duration": round(duration, 3), "text": text, "segments": segments}
    return PlainTextResponse({"text": text, "srt": srt(chunks), "vtt": vtt(chunks)}[form])


def _png(picture: Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def serve(app: FastAPI, host: str, port: int) -> None:
    """Serve until SIGINT or SIGTERM."""
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=1024)
    except OSError as error:
        raise InputError(f"{host}:{port}: cannot listen on this address ({error.strerror})") from None
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # or the body waits 40 ms for an ACK of the headers
    server, shown = app.state.server, f"[{host}]" if ":" in host else host
    path = "" if any(getattr(route, "path", None) == "/" for route in app.routes) else "v1"
    says = f"{', '.join(server.services)} {'answers' if len(server.services) == 1 else 'answer'}"
    print(f"{says} at http://{shown}:{listener.getsockname()[1]}/{path}", flush=True)
    config = uvicorn.Config(app, log_level="warning", timeout_keep_alive=30, timeout_graceful_shutdown=10, server_header=False,
                            limit_concurrency=8 * server.limits.requests, http=TimedHeaders)
    uvicorn.Server(config).run(sockets=[listener])
