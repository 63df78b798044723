"""Responses of servers: what a status says, and a body that is read to its end or known to be cut short."""

import http.client
import re
import time
import zlib
from email.utils import parsedate_to_datetime

from mmtx.data.connection import Connection, pool
from mmtx.data.retry import Failure

STATUS = {
    400: "bad request", 401: "authentication required", 402: "payment required", 403: "permission denied",
    404: "no such file", 405: "method not allowed", 407: "proxy authentication required", 408: "no answer in time",
    410: "no longer available", 416: "no such byte range", 429: "too many requests", 451: "not available here",
    500: "server error", 502: "server error", 503: "the server is busy", 504: "no answer in time",
}
TRANSIENT = {408, 425, 429, 500, 502, 503, 504}


def status_message(status: int) -> str:
    """An HTTP status in words: "HTTP 403 (permission denied)"."""
    return f"HTTP {status} ({STATUS.get(status) or ('request failed' if status < 500 else 'server error')})"


class Response:
    """A successful response to a request, with its body still to be read."""

    private = False  # whether the requested URL, before redirects, is at a private address

    def __init__(self, connection: Connection, response: http.client.HTTPResponse, ranged: bool, total: int | None):
        """`ranged`: whether it is the requested range. `total`: length of the whole file, if known."""
        self.connection, self.response, self.ranged, self.total = connection, response, ranged, total
        self.version = (response.getheader("ETag"), response.getheader("Last-Modified"), total)
        self.unpacked = zlib.decompressobj(47) if is_compressed(response) else None  # gzip or zlib, by its header

    def readinto(self, buffer: memoryview) -> int:
        """Read some bytes of the body into the buffer; 0 at its end. Raises Failure if it was truncated."""
        if self.unpacked is None:
            return self._raw(buffer)
        while True:
            packed = self.unpacked.unconsumed_tail or self.unpacked.unused_data
            if not packed:
                piece = bytearray(2**14)
                packed = piece[:self._raw(memoryview(piece))]
            if self.unpacked.eof:
                if packed[:1] != b"\x1f":  # the end or padding, not another member
                    return 0
                self.unpacked = zlib.decompressobj(47)
            try:
                data = self.unpacked.decompress(packed, len(buffer))
            except zlib.error:
                raise Failure("its compressed transfer is damaged") from None
            if data:
                buffer[:len(data)] = data
                return len(data)
            if not packed:
                raise Failure("cut short, its compressed transfer has no end", transient=True)

    def read(self, most: int) -> bytes:
        """The body, at most `most` bytes of it."""
        pieces, left = [], most
        while left:
            piece = bytearray(min(left, 2**20 if self.total is None else max(1, min(2**20, self.total))))
            count = self.readinto(memoryview(piece))
            if not count:
                break
            pieces.append(piece[:count])
            left -= count
        return b"".join(pieces)

    def close(self) -> None:
        """Close, but keep the connection for the next request if the body was read to its end."""
        done = self.response.isclosed() and not self.response.will_close
        self.response.close()
        (pool.put if done else Connection.close)(self.connection)

    def _raw(self, buffer: memoryview) -> int:
        try:
            count = self.response.readinto(buffer)
        except http.client.IncompleteRead:
            raise Failure("cut short, the connection was lost", transient=True) from None
        except (http.client.HTTPException, ValueError):
            raise Failure("not a valid HTTP answer") from None
        if not count and self.response.length:
            raise Failure(f"cut short, {self.response.length} bytes are missing", transient=True)
        return count


def check_response(connection: Connection, response: http.client.HTTPResponse, start: int | None) -> Response | None:
    """The answer; None if the whole must be requested, since the server does not handle ranges correctly."""
    total = response.length
    if response.status == 206 and start is not None:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", (response.getheader("Content-Range") or "").strip())
        if found and int(found[1]) == start and found[2] != "*" and not is_compressed(response):
            return Response(connection, response, True, int(found[2]))
        if start == 0:
            return None
        raise Failure("sent another byte range than requested")
    if response.status == 416 and start == 0:
        return None
    if response.status in (200, 203):
        return Response(connection, response, False, None if is_compressed(response) else total)
    raise Failure(status_message(response.status), response.status in TRANSIENT, retry_after(response.getheader("Retry-After")))


def is_compressed(response: http.client.HTTPResponse) -> bool:
    """Whether a body is compressed for transfer. Raises Failure for a compression that is not supported."""
    encoding = (response.getheader("Content-Encoding") or "identity").strip().lower()
    if encoding not in ("identity", "", "gzip", "x-gzip", "deflate"):
        raise Failure(f"its transfer is compressed with {encoding[:20]!r}, expected none or gzip")
    return encoding not in ("identity", "")


def retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, as a number or a date."""
    if value is None:
        return None
    if re.fullmatch(r"\d{1,9}", value.strip()):
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None
