"""Requests over http and https, and the redirects that they follow, which lead nowhere that rows may not go."""

import contextlib
import http.client
import re
from base64 import b64encode
from urllib.parse import quote, unquote, urljoin, urlsplit

from mmtx.data.connection import Connection, ascii_host, connect, pool
from mmtx.data.response import Response, check_response
from mmtx.data.retry import Budget, Failure
from mmtx.data.trust import Base, after_redirect
from mmtx.data.urls import PORTS, is_valid_url, origin, scheme_of

REDIRECTS = 5


def open_response(url: str, base: Base | None, budget: Budget, start: int | None = None, stop: int | None = None) -> Response:
    """Request bytes `start` to `stop` of a URL (None: all of it), following redirects. Raises Failure."""
    asked, allowed, secret, private = url, base, None, None
    for _ in range(REDIRECTS + 1):
        if not is_valid_url(url):
            raise Failure("not a valid URL")
        secret = credentials(url) or secret
        headers = {"User-Agent": "mmtx", "Accept": "*/*", "Accept-Encoding": "identity", **(secret or {})}
        if start is not None:
            headers["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
        connection, response = send_request(url, headers, allowed, budget)
        with contextlib.ExitStack() as unless_answered:
            unless_answered.callback(connection.close)
            private = connection.private if private is None else private
            place = response.getheader("Location")
            if response.status not in (301, 302, 303, 307, 308) or place is None:
                if (answer := check_response(connection, response, start)) is not None:
                    unless_answered.pop_all()
                    answer.private = private
                    return answer
                start = stop = None
                continue
            target = join_url(url, place)
            allowed = after_redirect(base, asked, private)
            refusal = allowed.refusal(target) if scheme_of(target) in PORTS else "found another scheme, expected https"
            if refusal:
                raise Failure(f"redirected: {refusal}")
        # Credentials for one server are sent to no other.
        secret = secret if origin(target) == origin(url) else None
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


def send_request(url: str, headers: dict[str, str], base: Base | None,
                 budget: Budget) -> tuple[Connection, http.client.HTTPResponse]:
    """Send one request, over a kept or a new connection, and read the head of the response."""
    request, place = encode_request(url, headers), origin(url)
    while True:
        connection = pool.take(place)
        if connection is not None and base is not None and base.address_refusal(url, connection.address):
            connection.close()
            connection = None
        used = connection is not None
        connection = connection or connect(url, base, budget)
        connection.budget = budget
        try:
            connection.send(request)
            response = http.client.HTTPResponse(connection, method="GET")  # type: ignore[arg-type]  # it only uses `makefile` of a socket
            try:
                response.begin()
            except http.client.RemoteDisconnected:
                raise Failure("the connection was lost", transient=True) from None
            except (http.client.HTTPException, ValueError):
                raise Failure("not a valid HTTP answer") from None
            return connection, response
        except Failure:
            connection.close()
            if not used:  # a kept one may have been closed or broken in the meantime
                raise


def encode_request(url: str, headers: dict[str, str]) -> bytes:
    """The bytes of a GET request."""
    parts, (scheme, host, port) = urlsplit(url), origin(url)
    name = f"[{host}]" if ":" in host else ascii_host(host)
    target = quoted(without_dots(parts.path)) + (f"?{quoted(parts.query)}" if parts.query else "")
    lines = [f"GET {target} HTTP/1.1", f"Host: {name}" + ("" if port == PORTS[scheme] else f":{port}"),
             *(f"{field}: {value}" for field, value in headers.items()), "", ""]
    return "\r\n".join(lines).encode("ascii")


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
