"""Reading over http and https, with time limits, clear errors, and connections to allowed addresses only.

A host name is resolved once, and its addresses are checked and then connected to, so that DNS rebinding, a name that
resolves differently after the check, cannot bypass the check.
"""

import contextlib
import http.client
import io
import os
import re
import socket
import ssl
import threading
import time
import zlib
from base64 import b64encode
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from functools import lru_cache, partial
from typing import Any
from urllib.parse import quote, unquote, urljoin, urlsplit

from mmtx.data.trust import PORTS, Base, after_redirect, is_public, is_valid_url, origin, scheme_of

CONNECT = 5.0        # seconds to resolve a host, and to connect to it
IDLE = 10.0          # seconds without a byte
TOTAL = 40.0         # seconds for a medium, including all retries
SLOWEST = 2**14      # bytes per second that earn back time, so that a large source may take longer than TOTAL
RETRIES = 3          # of transient failures: a busy server, a lost connection
PAUSE = 0.5          # seconds before the first retry, doubled before each further one
LONGEST_PAUSE = 10.0  # seconds that a server may ask for
REDIRECTS = 5
SKIP = 2**20         # bytes up to which a seek forward reads on rather than sending a new request
KEPT = 8             # connections that a thread keeps open
QUICK = getattr(socket, "TCP_QUICKACK", None)

STATUS = {
    400: "bad request", 401: "authentication required", 402: "payment required", 403: "permission denied",
    404: "no such file", 405: "method not allowed", 407: "proxy authentication required", 408: "no answer in time",
    410: "no longer available", 416: "no such byte range", 429: "too many requests", 451: "not available here",
    500: "server error", 502: "server error", 503: "the server is busy", 504: "no answer in time",
}
TRANSIENT = {408, 425, 429, 500, 502, 503, 504}


class Failure(Exception):
    """A failure, described without any URL; `transient` if a retry may help, after `pause` seconds."""

    def __init__(self, message: str, transient: bool = False, pause: float | None = None):
        super().__init__(message)
        self.transient, self.pause = transient, pause


def status_message(status: int) -> str:
    """An HTTP status in words: "HTTP 403 (permission denied)"."""
    return f"HTTP {status} ({STATUS.get(status) or ('request failed' if status < 500 else 'server error')})"


def read(url: str, limit: int, base: Base | None = None) -> bytes:
    """All bytes of a URL, at most `limit` + 1. `base`: what rows may reach; None for what the user wrote.

    Raises Failure.
    """
    budget = Budget()
    with budget.running():
        while True:
            try:
                with contextlib.closing(open_response(url, base, None, None, budget.end)) as answer:
                    if answer.total is not None and answer.total > limit:
                        raise Failure(f"more than {limit} bytes, the most for one medium")
                    return answer.read(limit + 1)
            except Failure as failure:
                budget.wait(failure)


class Stream(io.RawIOBase):
    """The bytes `start` to `stop` of a URL.

    If the server has byte ranges, the stream can seek, and resumes after a lost connection; if not (`ranged` is false), all
    bytes come in order. Time counts only while waiting for the server, not while the reader is busy. Raises Failure.
    """

    answer: "Response | None" = None  # the current one
    version: tuple[str | None, str | None, int | None] | None = None  # that of the first answer

    def __init__(self, url: str, base: Base | None = None, start: int = 0, stop: int | None = None):
        super().__init__()
        self.url, self.base, self.position, self.stop = url, base, start, stop
        self.budget = Budget()
        self._retried(self._open)
        self.ranged, self.size, self.version = self.answer.ranged, self.answer.total, self.answer.version
        self.private = self.answer.private
        if not self.ranged:
            self.position, self.stop = 0, None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self.ranged

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        target = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size or 0}[whence]
        if target != self.position and not self.ranged:
            raise io.UnsupportedOperation("the server has no byte ranges")
        if self.answer is not None and 0 < target - self.position <= SKIP:
            while self.position < target and self.readinto(bytearray(min(2**16, target - self.position))):
                pass
        if self.position != target:
            self._drop()
            self.position = target
        return target

    def readinto(self, buffer) -> int:
        ends = [end - self.position for end in (self.stop, self.size if self.ranged else None) if end is not None]
        room = max(0, min([len(buffer), *ends]))
        count = self._retried(self._read, memoryview(buffer)[:room]) if room else 0
        self.position += count
        self.budget.earn(count)
        return count

    def close(self) -> None:
        self._drop()
        super().close()

    def _read(self, buffer: memoryview) -> int:
        if self.answer is None:
            self._open()
        self.answer.wire.deadline = self.budget.end
        try:
            if count := self.answer.readinto(buffer):
                return count
            if not self.ranged:
                return 0
            if self.position == self.opened:
                raise Failure("sent another byte range than requested")
            self._drop()  # some servers give large ranges in pieces
            return self._read(buffer)
        except Failure as failure:
            self._drop()
            # Resume only if the version can show that it is still the same file.
            failure.transient &= self.ranged and self.version[:2] != (None, None)
            raise

    def _open(self) -> None:
        answer = open_response(self.url, self.base, self.position, self.stop, self.budget.end)
        if self.version is not None and (answer.version != self.version or not answer.ranged):
            answer.close()
            raise Failure("changed while it was read")
        self.answer, self.opened = answer, self.position

    def _drop(self) -> None:
        if self.answer is not None:
            self.answer.close()
            self.answer = None

    def _retried(self, run, *arguments):
        with self.budget.running():
            while True:
                try:
                    return run(*arguments)
                except Failure as failure:
                    self.budget.wait(failure)


class Budget:
    """The time that may be spent on a server, and how often it may fail."""

    def __init__(self):
        self.seconds, self.end, self.failed, self.since = TOTAL, 0.0, 0, 0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """A context in which the clock runs, until `end` at the latest."""
        self.end = time.monotonic() + self.seconds
        try:
            yield
        finally:
            self.seconds = max(0.0, self.end - time.monotonic())

    def earn(self, count: int) -> None:
        """Earn back time for received bytes, so that a large source can be read to its end, but not at a trickle."""
        self.seconds = min(TOTAL, self.seconds + count / SLOWEST)
        self.since += count
        if self.since > SKIP:
            self.failed = self.since = 0

    def wait(self, failure: Failure) -> None:
        """Sleep before the next attempt, or raise the failure if a retry would not help or is not allowed."""
        pause = PAUSE * 2**self.failed if failure.pause is None else failure.pause
        self.failed, self.since = self.failed + 1, 0
        if not failure.transient or self.failed > RETRIES or pause > min(LONGEST_PAUSE, self.end - time.monotonic()):
            raise failure
        time.sleep(pause)


class Response:
    """A successful response to a request, with its body still to be read."""

    private = False  # whether the requested URL, before redirects, is at a private address

    def __init__(self, wire: "Wire", response: http.client.HTTPResponse, ranged: bool, total: int | None):
        """`ranged`: whether it is the requested range. `total`: length of the whole file, if known."""
        self.wire, self.response, self.ranged, self.total = wire, response, ranged, total
        self.version = (response.getheader("ETag"), response.getheader("Last-Modified"), total)
        self.encoded = encoding_of(response)
        self.unpacked = zlib.decompressobj(47) if self.encoded else None  # gzip or zlib, by its header

    def readinto(self, buffer: memoryview) -> int:
        """Read some bytes of the body into the buffer; 0 at its end. Raises Failure if it was truncated."""
        if self.unpacked is None:
            return self._raw(buffer)
        while not self.unpacked.eof:
            packed = self.unpacked.unconsumed_tail
            if not packed:
                piece = bytearray(2**14)
                packed = piece[:self._raw(memoryview(piece))]
            try:
                data = self.unpacked.decompress(packed, len(buffer))
            except zlib.error:
                raise Failure("its compressed transfer is damaged") from None
            if data:
                buffer[:len(data)] = data
                return len(data)
            if not packed:
                raise Failure("cut short, its compressed transfer has no end", transient=True)
        return 0

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
        (keep_connection if done else Wire.close)(self.wire)

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


def encoding_of(response: http.client.HTTPResponse) -> bool:
    """Whether a body is compressed for transfer. Raises Failure for a compression that is not supported."""
    encoding = (response.getheader("Content-Encoding") or "identity").strip().lower()
    if encoding not in ("identity", "", "gzip", "x-gzip", "deflate"):
        raise Failure(f"its transfer is compressed with {encoding[:20]!r}, expected none or gzip")
    return encoding not in ("identity", "")


def open_response(url: str, base: Base | None, start: int | None, stop: int | None, deadline: float) -> Response:
    """Request bytes `start` to `stop` of a URL (None: all of it), following redirects. Raises Failure."""
    asked, allowed, secret, private = url, base, None, None
    for _ in range(REDIRECTS + 1):
        if not is_valid_url(url):
            raise Failure("not a valid URL")
        scheme, host, port = origin(url)
        secret = credentials(url) or secret
        headers = {"User-Agent": "mmtx", "Accept": "*/*", "Accept-Encoding": "identity", **(secret or {})}
        if start is not None:
            headers["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
        wire, response = send_request(url, scheme, host, port, headers, allowed, deadline)
        private = wire.private if private is None else private
        try:
            place = response.getheader("Location")
            if response.status not in (301, 302, 303, 307, 308) or place is None:
                answer = check_response(wire, response, start)
                if answer is not None:
                    answer.private = private
                    return answer
                start = stop = None
                wire.close()
                continue
            target = join_url(url, place)
            allowed = after_redirect(base, asked, private)
            refusal = allowed.refusal(target) if scheme_of(target) in PORTS else "found another scheme, expected https"
            if refusal:
                raise Failure(f"redirected: {refusal}")
        except Failure:
            wire.close()
            raise
        wire.close()
        # Credentials for one server are sent to no other.
        secret = secret if origin(target) == (scheme, host, port) else None
        url = target
    raise Failure(f"redirected more than {REDIRECTS} times")


def join_url(url: str, place: str) -> str:
    try:
        return urljoin(url, place)
    except ValueError:
        raise Failure("redirected to an invalid URL") from None


def credentials(url: str) -> dict[str, str] | None:
    """The Authorization header for the user name and password in a URL; None without them."""
    parts = urlsplit(url)
    if parts.username is None:
        return None
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {"Authorization": "Basic " + b64encode(pair.encode()).decode()}


def check_response(wire: "Wire", response: http.client.HTTPResponse, start: int | None) -> Response | None:
    """The answer; None if the whole must be requested, since the server does not handle ranges correctly."""
    total = response.length
    if response.status == 206 and start is not None:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", (response.getheader("Content-Range") or "").strip())
        if found and int(found[1]) == start and found[2] != "*" and not encoding_of(response):
            return Response(wire, response, True, int(found[2]))
        if start == 0:
            return None
        raise Failure("sent another byte range than requested")
    if response.status == 416 and start == 0:
        return None
    if response.status in (200, 203):
        return Response(wire, response, False, None if encoding_of(response) else total)
    raise Failure(status_message(response.status), response.status in TRANSIENT, retry_after(response.getheader("Retry-After")))


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


def send_request(url: str, scheme: str, host: str, port: int, headers: dict[str, str], base: Base | None,
             deadline: float) -> tuple["Wire", http.client.HTTPResponse]:
    """Send one request, over a kept or a new connection, and read the head of the response."""
    parts = urlsplit(url)
    name = f"[{host}]" if ":" in host else ascii_host(host)
    target = quoted(without_dots(parts.path)) + (f"?{quoted(parts.query)}" if parts.query else "")
    lines = [f"GET {target} HTTP/1.1", f"Host: {name}" + ("" if port == PORTS[scheme] else f":{port}"),
             *(f"{field}: {value}" for field, value in headers.items()), "", ""]
    request = "\r\n".join(lines).encode("ascii")
    while True:
        wire = take_connection(scheme, host, port)
        if wire is not None and base is not None and base.address_refusal(url, wire.address):
            wire.close()
            wire = None
        used = wire is not None
        wire = wire or connect(url, scheme, host, port, base, deadline)
        wire.deadline = deadline
        try:
            wire.send(request)
            response = http.client.HTTPResponse(wire, method="GET")  # type: ignore[arg-type]  # it only uses `makefile` of a socket
            try:
                response.begin()
            except http.client.RemoteDisconnected:
                raise Failure("the connection was lost", transient=True) from None
            except (http.client.HTTPException, ValueError):
                raise Failure("not a valid HTTP answer") from None
            return wire, response
        except Failure:
            wire.close()
            if not used:  # a kept one may have been closed or broken in the meantime
                raise


def quoted(text: str) -> str:
    """A path or query for the request: percent-encoded where needed, keeping what already is."""
    return re.sub(r"%(?![0-9A-Fa-f]{2})", "%25", quote(text, safe="%/:@!$&'()*+,;=~?[]"))


def without_dots(path: str) -> str:
    """A path with "." and ".." resolved, as servers expect it."""
    kept: list[str] = []
    *folders, last = path.removeprefix("/").split("/")
    for name in folders:
        if name == "..":
            del kept[-1:]
        elif name != ".":
            kept.append(name)
    if last == "..":
        del kept[-1:]
    return "/" + "/".join([*kept, "" if last in (".", "..") else last])


def ascii_host(host: str) -> str:
    try:
        return host if host.isascii() else host.encode("idna").decode()
    except UnicodeError:
        raise Failure("not a host name") from None


# -- Connections ---------------------------------------------------------------------------------------------


class Wire:
    """A connection that `http.client.HTTPResponse` reads from, each byte before the `deadline`."""

    def __init__(self, connection: socket.socket, address: str, place: tuple[str, str, int]):
        self.socket, self.address, self.place, self.pid = connection, address, place, os.getpid()
        self.private = not is_public(address)
        self.deadline = 0.0

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Incoming(self), 2**16)

    def send(self, data: bytes) -> None:
        self._call(self.socket.sendall, data)

    def receive(self, buffer) -> int:
        if QUICK is not None:  # else servers that send head and body separately wait 40 ms in between
            with contextlib.suppress(OSError):
                self.socket.setsockopt(socket.IPPROTO_TCP, QUICK, 1)
        return self._call(self.socket.recv_into, buffer)

    def _call(self, run, argument):
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise Failure(f"no complete response within {TOTAL:g} s")
        self.socket.settimeout(min(IDLE, left))
        try:
            return run(argument)
        except TimeoutError:
            if left <= IDLE:
                raise Failure(f"no complete response within {TOTAL:g} s") from None
            raise Failure(f"no answer within {IDLE:g} s", transient=True) from None
        except OSError:
            raise Failure("the connection was lost", transient=True) from None

    def close(self) -> None:
        self.socket.close()

    __del__ = close  # of connections still kept when their thread or the program ends


class _Incoming(io.RawIOBase):
    def __init__(self, wire: Wire):
        super().__init__()
        self.wire = wire

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        return self.wire.receive(buffer)


_open = threading.local()  # connections of a thread by scheme, host and port


def keep_connection(wire: Wire) -> None:
    """Leave a connection open for the next request of this thread."""
    wires = _open.__dict__.setdefault("wires", {})
    if (old := wires.pop(wire.place, None)) is not None:
        old.close()
    wires[wire.place] = wire
    while len(wires) > KEPT:
        wires.pop(next(iter(wires))).close()


def take_connection(*place) -> Wire | None:
    """The open connection to a place, if this thread of this process has one."""
    wire = _open.__dict__.get("wires", {}).pop(place, None)
    return wire if wire is None or wire.pid == os.getpid() else None


def connect(url: str, scheme: str, host: str, port: int, base: Base | None, deadline: float) -> Wire:
    """Connect to the first address of a host that is allowed and answers."""
    failure = Failure("no such host")
    for family, place in addresses(host, port, min(CONNECT, deadline - time.monotonic())):
        refusal = base and base.address_refusal(url, place[0])
        if refusal:
            failure = Failure(refusal)
            continue
        connection = socket.socket(family, socket.SOCK_STREAM)
        try:
            connection.settimeout(max(0.001, min(CONNECT, deadline - time.monotonic())))
            connection.connect(place)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if scheme == "https":
                connection = tls().wrap_socket(connection, server_hostname=ascii_host(host))
            return Wire(connection, place[0], (scheme, host, port))
        except TimeoutError:
            failure = Failure(f"no connection within {CONNECT:g} s", transient=True)
        except ConnectionRefusedError:
            failure = Failure("the connection was refused")
        except ssl.SSLCertVerificationError as error:
            reason = error.verify_message.split(", ")[0].split(" for ")[0]
            failure = Failure(f"its certificate is not valid ({reason})")
        except ssl.SSLError as error:
            failure = Failure(f"no TLS connection ({(error.reason or 'unknown').lower().replace('_', ' ')})")
        except ConnectionError:
            failure = Failure("the connection was lost", transient=True)
        except OSError as error:
            failure = Failure(f"no connection ({error.strerror or type(error).__name__})")
        connection.close()
    raise failure


def addresses(host: str, port: int, seconds: float) -> list[tuple[int, tuple]]:
    """Resolve a host name to address families and addresses."""
    try:
        found = in_time(seconds, socket.getaddrinfo, ascii_host(host), port, 0, socket.SOCK_STREAM)
    except TimeoutError:
        raise Failure(f"its host was not found within {CONNECT:g} s", transient=True) from None
    except (OSError, ValueError) as error:
        raise Failure("no such host", getattr(error, "errno", None) == socket.EAI_AGAIN) from None
    return [(family, place) for family, _, _, _, place in found]


def in_time(seconds: float, run: Callable[..., Any], *arguments: Any) -> Any:
    """Call `run`, which has no timeout of its own. Raises TimeoutError if it takes too long, leaving it to run on in its thread."""
    found: list[Callable[[], Any]] = []

    def work() -> None:
        try:
            result = run(*arguments)
            found.append(lambda: result)
        except BaseException as error:
            found.append(partial(_raise, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(max(0.0, seconds))
    if not found:
        raise TimeoutError
    return found[0]()


def _raise(error: BaseException) -> None:
    raise error


@lru_cache
def tls() -> ssl.SSLContext:
    return ssl.create_default_context()
