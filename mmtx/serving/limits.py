"""What a server takes from its callers, and the door that keeps it: key, number of requests, size and time of a body.

All is decided before a byte is understood. A request whose caller has gone is ended, whatever it waits for.
"""

import asyncio
import hmac
import time
from dataclasses import dataclass

from starlette.responses import JSONResponse

from mmtx.errors import one_line

MB = 2 ** 20
RETRY = 1  # seconds after which one who was refused may ask again
OPEN = ("/", "/health")  # paths that need no key
GONE = 499  # what is counted where a caller went before the answer began, as nginx has it


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


class Refused(Exception):
    """An answer other than the one that was asked for, in the form of OpenAI's API."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, one_line(message), code, param

    @property
    def body(self) -> dict:
        kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(RETRY)} if self.status in (429, 503) else {}


class Door:
    """Lets requests in as long as there is room, reads their bodies whole, and ends those whose caller has gone (ASGI)."""

    def __init__(self, app, limits: Limits, key: str | None, metrics):
        self.app, self.limits, self.key, self.metrics, self.inside = app, limits, key, metrics, 0

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers, metrics, begin, status = dict(scope["headers"]), self.metrics, time.monotonic(), GONE

        async def noted(message):
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            given = headers.get(b"authorization", b"")
            if self.key and scope["path"] not in OPEN and not hmac.compare_digest(given, f"Bearer {self.key}".encode()):
                raise Refused(401, "Authorization: expected \"Bearer KEY\" with the key of this server", "invalid_api_key")
            if scope["method"] != "POST":
                return await self.app(scope, receive, noted)
            if self.inside >= self.limits.requests:
                raise Refused(429, f"{self.inside} requests are waiting, all that this server takes: come again", "queue_full")
            self.inside += 1
            metrics.inside.set(self.inside)
            try:
                await self._answer(scope, receive, noted, await self._body(headers, receive))
            finally:
                self.inside -= 1
                metrics.inside.set(self.inside)
        except Refused as refused:
            await JSONResponse(refused.body, refused.status, {**refused.headers, "Connection": "close"})(scope, receive, noted)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            metrics.answers.labels(route, str(status)).inc()
            metrics.seconds.labels(route).observe(time.monotonic() - begin)

    async def _body(self, headers: dict[bytes, bytes], receive) -> bytes:
        most, body = self.limits.megabytes * MB, bytearray()
        large = Refused(413, f"the request is larger than {self.limits.megabytes} MB", "request_too_large")
        if (length := headers.get(b"content-length", b"")).isdigit() and int(length) > most:
            raise large
        try:
            async with asyncio.timeout(self.limits.timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refused(400, "the request broke off")
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise large
                    if not message.get("more_body"):
                        return bytes(body)
        except TimeoutError:
            raise Refused(408, f"the request did not arrive within {self.limits.timeout:g} s", "timeout") from None

    async def _answer(self, scope, receive, send, body: bytes) -> None:
        """Run the application with a body that is there; cancel it when the caller goes."""
        left = [{"type": "http.request", "body": body, "more_body": False}]
        gone = asyncio.Event()

        async def replay():
            if left:
                return left.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def watch():
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

        tasks = [asyncio.ensure_future(self.app(scope, replay, send)), asyncio.ensure_future(watch())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            answered, _ = await asyncio.gather(*tasks, return_exceptions=True)
        if isinstance(answered, Exception):
            raise answered
