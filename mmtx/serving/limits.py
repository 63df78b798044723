"""Limits of a server, the middleware that enforces them, and the error responses of requests that are refused.

Key, origin, number of requests, and size and time of a body are checked before the body is parsed. A request whose caller has gone
is cancelled, whatever it waits for.
"""

import asyncio
import hmac
import logging
import re
import reprlib
import time
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from uvicorn.protocols.http.h11_impl import H11Protocol  # httptools does not limit the size of headers

from mmtx.errors import InputError, one_line

MIB = 2 ** 20
PUBLIC_PATHS = ("/", "/health")  # paths that need no key
LOOPBACK = ("127.0.0.1", "localhost", "::1")
OWN_HOST = re.compile(rf"({'|'.join(re.escape(f'[{name}]' if ':' in name else name) for name in LOOPBACK)})(:\d*)?", re.IGNORECASE)
UNREAD = 5  # seconds after its deadline until an answer is dropped that its caller does not read, and that so cannot be ended
GONE = 499  # status counted if a caller disconnects before the answer begins, as in nginx
EXPECTED_BY_TYPE = {"model_type": "a JSON object", "model_attributes_type": "a JSON object", "value_error": "a file",
                    "union_tag_not_found": "a JSON object with its type"}  # pydantic and FastAPI speak of Python here
DEADLINE: ContextVar[float] = ContextVar("DEADLINE")  # of the current request, in the event loop's time
ERROR_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


@dataclass(frozen=True)
class Limits:
    """Limits of a request, and of concurrent requests; `requests` times `megabytes` bounds the memory of bodies.

    `megabytes` (MiB) of its body, `pixels` of each picture, `seconds` of each sound, `tokens` of its prompt and answer together,
    `timeout` seconds until its answer is complete.
    """

    requests: int = 64
    megabytes: int = 16
    pixels: int = 25_000_000
    seconds: float = 60.0
    tokens: int = 4096
    timeout: float = 120.0


class Refused(HTTPException):
    """An error response in the form of OpenAI's API."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None,
                 headers: Mapping[str, str] | None = None):
        again = {"Retry-After": "1"} if status in (429, 503) else {}  # seconds
        super().__init__(status, message, {"Connection": "close", **again, **(headers or {})})  # the rest of a body may still arrive
        kind = ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": one_line(message), "type": kind, "param": param, "code": code}}


def as_refused(error: Exception) -> Refused:
    """The response to an error: full detail if it is the caller's mistake, none if it is the server's."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, InputError):
        return Refused(400, str(error), "invalid_value")
    if isinstance(error, RequestValidationError):
        return _validation_error(max(error.errors(), key=lambda one: len(one["loc"])))  # of the alternatives, the closest
    if isinstance(error, HTTPException):
        message = f"body: not JSON, {error.__cause__}" if error.__cause__ else error.detail  # FastAPI leaves the reason out
        return Refused(error.status_code, message, headers=error.headers)
    logging.getLogger("mmtx").error("a request failed", exc_info=error)
    return Refused(500, "internal server error; see the log of the server")


def _validation_error(error: Mapping[str, Any]) -> Refused:
    """An error of pydantic about a field, reworded."""
    kind, message, (_, *places) = error["type"], error["msg"], error["loc"]  # `loc` begins with "body"
    if kind == "json_invalid":
        return Refused(400, f"body: not JSON, {error['ctx']['error']} at character {places[0]}", kind)
    # For an item of a message, `loc` also has its type, which is the name of its field, too.
    where = "".join(f"[{place}]" if isinstance(place, int) else f".{place}" for place, before in zip(places, (None, *places))
                    if place != before or isinstance(place, int)).removeprefix(".") or "body"
    if kind == "missing":
        message = "found none, expected one"
    elif kind == "extra_forbidden":
        message = "found a field that this server does not support, expected none of this name"
    elif kind == "union_tag_invalid":
        where += ".type"
        message = f"found {error['ctx']['tag']!r:.40}, expected one of {error['ctx']['expected_tags']}"
    else:
        expected = EXPECTED_BY_TYPE.get(kind) or message.removeprefix("Input should be ")
        message = f"found {reprlib.repr(error['input'])}{': ' if expected == message else ', expected '}{expected}"
    return Refused(400, f"{where}: {message}", kind, where[:200])


@asynccontextmanager
async def in_time(deadline: float) -> AsyncIterator[None]:
    """Awaits in this context must end by `deadline`, in the event loop's time. Raises Refused, 504, if they do not."""
    try:
        async with asyncio.timeout_at(deadline):
            yield
    except TimeoutError:
        raise Refused(504, "the answer was not ready in time", "timeout") from None


class TimedHeaders(H11Protocol):
    """A connection that is closed unless headers arrive within `timeout_keep_alive` seconds of its start or of the last response.

    uvicorn itself does not time the first headers, and stops the timer of others at their first byte.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def data_received(self, data: bytes) -> None:
        self.conn.receive_data(data)
        self.handle_events()  # which stops the timer when headers are complete


class LimitsMiddleware:
    """ASGI middleware that admits requests while there is room, reads their bodies, and turns errors into responses.

    It cancels requests whose caller has gone. With `loopback`, the Host header must name this machine. Pages of `origins` may send
    whatever those of this server may.
    """

    def __init__(self, app, limits: Limits, key: str | None, loopback: bool, metrics, origins: Collection[str] = ()):
        self.app, self.limits, self.loopback, self.metrics, self.origins = app, limits, loopback, metrics, origins
        self.expected = key.encode() if key else None
        self.places = asyncio.Semaphore(limits.requests)

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        begin, status = time.monotonic(), GONE
        scope = {**scope, "method": "GET" if scope["method"] == "HEAD" else scope["method"]}  # uvicorn omits its body

        async def noted(message):
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            with suppress(ClientDisconnect):
                await self._admit(Request(scope, receive), noted)
        except Exception as error:
            refused = as_refused(error)
            if status == GONE:  # an answer that has begun can only be cut short
                await JSONResponse(refused.body, refused.status_code, refused.headers)(scope, receive, noted)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self.metrics.responses.labels(route, str(status)).inc()
            self.metrics.duration.labels(route).observe(time.monotonic() - begin)

    async def _admit(self, request: Request, send) -> None:
        scope, headers = request.scope, request.headers
        host, (scheme, _, given) = headers.get("host", ""), headers.get("authorization", "").partition(" ")
        if self.loopback and not OWN_HOST.fullmatch(host):  # against DNS rebinding by pages of other sites
            raise Refused(400, f"Host: found {host[:100]!r}, expected localhost or 127.0.0.1; without --host, this server "
                          "accepts requests from its own machine only", "invalid_host")
        if self.expected and scope["path"] not in PUBLIC_PATHS and not (
                scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self.expected)):
            raise Refused(401, "Authorization: expected \"Bearer KEY\" with the key of this server", "invalid_api_key")
        if request.method != "POST":
            return await self.app(scope, request.receive, send)
        self._normalize_content_type(request)
        if self.places.locked():
            raise Refused(429, f"found {self.limits.requests} requests in progress, the limit of this server; try again later",
                          "queue_full")
        async with self.places:
            with self.metrics.in_progress.track_inprogress():
                await self._answer(request, await self._read_body(request), send)

    def _normalize_content_type(self, request: Request) -> None:
        """Treat any body but a multipart form as JSON, since `curl -d` labels JSON as a URL-encoded form.

        Without a preflight, browsers let pages of other origins, named in `Origin`, send anything that is not labelled JSON.
        """
        headers, scope = request.headers, request.scope
        kind, origin = headers.get("content-type", "").partition(";")[0].strip().lower(), headers.get("origin")
        if kind == "application/json":
            return
        own = origin is None or headers.get("sec-fetch-site") == "same-origin" or origin.partition("://")[2] == headers.get("host")
        if not (own or self.expected or {"*", origin} & {*self.origins}):  # a foreign page does not know the key
            raise Refused(403, f"Origin: found {origin!r:.100}, a page elsewhere, which may send only Content-Type: application/json",
                          "invalid_origin")
        if kind != "multipart/form-data":
            others = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
            scope["headers"] = [*others, (b"content-type", b"application/json")]

    async def _read_body(self, request: Request) -> bytes:
        body, most = bytearray(), self.limits.megabytes * MIB
        content_length = int(request.headers.get("content-length", 0))  # uvicorn has checked that it is a number
        try:
            async with asyncio.timeout(self.limits.timeout):
                pieces = request.stream()
                while max(content_length, len(body)) <= most:
                    if (piece := await anext(pieces, None)) is None:
                        return bytes(body)
                    body += piece
        except TimeoutError:
            raise Refused(408, f"the request did not arrive within {self.limits.timeout:g} s", "timeout") from None
        raise Refused(413, f"the request is larger than {self.limits.megabytes} MiB", "request_too_large")

    async def _answer(self, request: Request, body: bytes, send) -> None:
        """Run the application with a body that has been read; cancel it if the caller disconnects."""
        left = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay():
            return left.pop() if left else await asyncio.Future()  # nothing more comes

        async def watch():
            while (await request.receive())["type"] != "http.disconnect":
                pass
            answer.cancel()

        loop = asyncio.get_running_loop()
        DEADLINE.set(loop.time() + self.limits.timeout)
        answer, watcher = asyncio.ensure_future(self.app(request.scope, replay, send)), asyncio.ensure_future(watch())
        timer = loop.call_at(DEADLINE.get() + UNREAD, answer.cancel)
        try:
            with suppress(asyncio.CancelledError):
                await answer
        finally:
            watcher.cancel()
            timer.cancel()
