"""What a server takes from its callers, the door that keeps it (key, number of requests, size and time of a body), and what those are
told who are refused.

All is decided before a byte is understood. A request whose caller has gone is ended, whatever it waits for.
"""

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from mmtx.errors import InputError, one_line

MB = 2 ** 20
OPEN = ("/", "/health")  # paths that need no key
GONE = 499  # what is counted where a caller went before the answer began, as nginx has it
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


@dataclass(frozen=True)
class Limits:
    """The most that one request may have, and how many may be in the house; memory is bounded by `requests` times `megabytes`.

    `megabytes` of its body, `pixels` of each picture, `seconds` of each sound, `tokens` of its prompt and answer together,
    `timeout` seconds until its answer is whole.
    """

    requests: int = 64
    megabytes: int = 16
    pixels: int = 25_000_000
    seconds: float = 60.0
    tokens: int = 4096
    timeout: float = 120.0


class Refused(HTTPException):
    """An answer other than the one that was asked for, in the form of OpenAI's API."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None):
        again = {"Retry-After": "1"} if status in (429, 503) else {}  # seconds
        super().__init__(status, message, {"Connection": "close"} | again)  # on which the rest of a body may be under way
        kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": one_line(message), "type": kind, "param": param, "code": code}}


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
        return Refused(error.status_code, error.detail)
    logging.getLogger("mmtx").error("a request failed", exc_info=error)
    return Refused(500, "the server failed; its log says why")


@asynccontextmanager
async def in_time(deadline: float) -> AsyncIterator[None]:
    """What is awaited inside must be there at `deadline`, of the loop's time. Raises Refused, 504, where it is not."""
    try:
        async with asyncio.timeout_at(deadline):
            yield
    except TimeoutError:
        raise Refused(504, "the answer was not ready in time", "timeout") from None


class Door:
    """Lets requests in as long as there is room, reads their bodies whole, ends those whose caller has gone, and answers what went
    wrong behind it (ASGI)."""

    def __init__(self, app, limits: Limits, key: str | None, metrics):
        self.app, self.limits, self.metrics = app, limits, metrics
        self.expected = f"Bearer {key}".encode() if key else None
        self.places = asyncio.Semaphore(limits.requests)

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        begin, status = time.monotonic(), GONE

        async def noted(message):
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            with suppress(ClientDisconnect):
                await self._let_in(Request(scope, receive), noted)
        except Exception as error:
            refused = as_refused(error)
            if status == GONE:  # an answer that has begun can only break off
                await JSONResponse(refused.body, refused.status_code, refused.headers)(scope, receive, noted)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self.metrics.answers.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(time.monotonic() - begin)

    async def _let_in(self, request: Request, send) -> None:
        given = request.headers.get("authorization", "").encode()
        if self.expected and request.url.path not in OPEN and not hmac.compare_digest(given, self.expected):
            raise Refused(401, "Authorization: expected \"Bearer KEY\" with the key of this server", "invalid_api_key")
        if request.method != "POST":
            return await self.app(request.scope, request.receive, send)
        if self.places.locked():
            raise Refused(429, f"{self.limits.requests} requests are waiting, all that this server takes: come again", "queue_full")
        async with self.places:
            with self.metrics.inside.track_inprogress():
                await self._answer(request, await self._body(request), send)

    async def _body(self, request: Request) -> bytes:
        body, most = bytearray(), self.limits.megabytes * MB
        told = int(request.headers.get("content-length", 0))  # the server library has seen that it is a number
        try:
            async with asyncio.timeout(self.limits.timeout):
                pieces = request.stream()
                while max(told, len(body)) <= most:
                    if (piece := await anext(pieces, None)) is None:
                        return bytes(body)
                    body += piece
        except TimeoutError:
            raise Refused(408, f"the request did not arrive within {self.limits.timeout:g} s", "timeout") from None
        raise Refused(413, f"the request is larger than {self.limits.megabytes} MB", "request_too_large")

    async def _answer(self, request: Request, body: bytes, send) -> None:
        """Run the application with a body that is there; cancel it when the caller goes."""
        left = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay():
            return left.pop() if left else await asyncio.Future()  # nothing more comes

        async def watch():
            while (await request.receive())["type"] != "http.disconnect":
                pass
            answer.cancel()

        answer, watcher = asyncio.ensure_future(self.app(request.scope, replay, send)), asyncio.ensure_future(watch())
        try:
            with suppress(asyncio.CancelledError):
                await answer
        finally:
            watcher.cancel()
