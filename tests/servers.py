"""Web servers on loopback that do what real ones do, well or badly; for tests."""

import contextlib
import socketserver
import threading
from collections.abc import Callable, Iterator

STOP = 20  # seconds after which a server that shall not answer gives up


class Request:
    """What was asked for, and how to answer it byte by byte."""

    def __init__(self, connection, head: str, stopped: threading.Event):
        line, *fields = head.split("\r\n")
        self.method, self.path, _ = line.split(" ")
        self.headers = {name.lower(): value.strip() for name, _, value in (field.partition(":") for field in fields if field)}
        self.connection, self.stopped = connection, stopped

    def send(self, text: str | bytes) -> None:
        self.connection.sendall(text.encode("latin-1") if isinstance(text, str) else text)

    def answer(self, body: bytes = b"", status: str = "200 OK", *fields: str, length: int | None = None) -> None:
        """A whole answer; `length` is what it says that it has."""
        head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}", *fields]
        self.send("\r\n".join(head) + "\r\n\r\n")
        self.send(body)

    def ranged(self, data: bytes, *fields: str) -> None:
        """What was asked for of `data`, as a server with byte ranges answers."""
        if "range" not in self.headers:
            return self.answer(data, "200 OK", "Accept-Ranges: bytes", *fields)
        first, last = self.headers["range"].removeprefix("bytes=").split("-")
        first, last = int(first), min(len(data) - 1, int(last or len(data)))
        if first >= len(data):
            return self.answer(b"", "416 Range Not Satisfiable", f"Content-Range: bytes */{len(data)}")
        part = f"Content-Range: bytes {first}-{last}/{len(data)}"
        return self.answer(data[first:last + 1], "206 Partial Content", part, *fields)

    def chunked(self, pieces, *fields: str, whole: bool = True) -> None:
        self.send("\r\n".join(["HTTP/1.1 200 OK", "Transfer-Encoding: chunked", *fields]) + "\r\n\r\n")
        for piece in pieces:
            self.send(b"%x\r\n%s\r\n" % (len(piece), piece))
        if whole:
            self.send("0\r\n\r\n")

    def wait(self) -> None:
        """Say nothing until the test is over."""
        self.stopped.wait(STOP)


class Server(socketserver.ThreadingTCPServer):
    """`routes` by path without its query; what was asked is in `asked`."""

    daemon_threads, allow_reuse_address = True, True

    def __init__(self, routes: dict[str, Callable[[Request], None]]):
        self.routes, self.asked, self.stopped = routes, [], threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"

    def paths(self) -> list[str]:
        return [request.path for request in self.asked]


class Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                head = b""
                while not head.endswith(b"\r\n\r\n"):
                    line = self.rfile.readline(2**16)
                    if not line:
                        return
                    head += line
                request = Request(self.connection, head.decode("latin-1").strip(), self.server.stopped)
                self.server.asked.append(request)
                route = self.server.routes.get(request.path.split("?")[0])
                if route is None:
                    request.answer(b"", "404 Not Found")
                elif route(request) == "end":
                    return


@contextlib.contextmanager
def serving(routes: dict[str, Callable[[Request], None]]) -> Iterator[Server]:
    with Server(routes) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        try:
            yield server
        finally:
            server.stopped.set()
            server.shutdown()
