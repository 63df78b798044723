"""Connections to servers, at allowed addresses only, which a thread keeps open for its next request.

A host name is resolved once, and its addresses are checked and then connected to, so that DNS rebinding, a name that
resolves differently after the check, cannot bypass the check.
"""

import contextlib
import io
import os
import socket
import ssl
import threading
from functools import lru_cache

from mmtx.data.ip_addresses import is_public
from mmtx.data.retry import Budget, Failure, in_time, out_of_time
from mmtx.data.trust import Base
from mmtx.data.urls import Origin, origin

CONNECT = 5.0  # seconds to resolve a host, and to connect to it
IDLE = 10.0    # seconds without a byte
KEPT = 8       # connections that a thread keeps open
QUICK = getattr(socket, "TCP_QUICKACK", None)


class Connection:
    """A connection that `http.client.HTTPResponse` reads from, each byte within the `budget`."""

    def __init__(self, connected: socket.socket, address: str, place: Origin, budget: Budget):
        self.socket, self.address, self.place, self.budget, self.pid = connected, address, place, budget, os.getpid()
        self.private = not is_public(address)

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
        left = self.budget.left
        if left <= 0:
            raise Failure(out_of_time())
        self.socket.settimeout(min(IDLE, left))
        try:
            return run(argument)
        except TimeoutError:
            if left <= IDLE:
                raise Failure(out_of_time()) from None
            raise Failure(f"no answer within {IDLE:g} s", transient=True) from None
        except OSError:
            raise Failure("the connection was lost", transient=True) from None

    def close(self) -> None:
        self.socket.close()

    __del__ = close  # of connections still kept when their thread or the program ends


class _Incoming(io.RawIOBase):
    def __init__(self, connection: Connection):
        super().__init__()
        self.connection = connection

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        return self.connection.receive(buffer)


class Pool(threading.local):
    """The connections of a thread that wait for its next request."""

    def __init__(self):
        self.waiting: dict[Origin, Connection] = {}

    def put(self, connection: Connection) -> None:
        if (old := self.waiting.pop(connection.place, None)) is not None:
            old.close()
        self.waiting[connection.place] = connection
        while len(self.waiting) > KEPT:
            self.waiting.pop(next(iter(self.waiting))).close()

    def take(self, place: Origin) -> Connection | None:
        """The connection to a place, if this thread of this process has one."""
        found = self.waiting.pop(place, None)
        return found if found is None or found.pid == os.getpid() else None


pool = Pool()


def connect(url: str, base: Base | None, budget: Budget) -> Connection:
    """Connect to the first address of a URL's host that is allowed and answers."""
    scheme, host, port = place = origin(url)
    failure = Failure("no such host")
    for family, address in addresses(host, port, min(CONNECT, budget.left)):
        refusal = base and base.address_refusal(url, address[0])
        if refusal:
            failure = Failure(refusal)
            continue
        connected = socket.socket(family, socket.SOCK_STREAM)
        try:
            connected.settimeout(max(0.001, min(CONNECT, budget.left)))
            connected.connect(address)
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if scheme == "https":
                connected = tls().wrap_socket(connected, server_hostname=ascii_host(host))
            return Connection(connected, address[0], place, budget)
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
        connected.close()
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


def ascii_host(host: str) -> str:
    try:
        return host if host.isascii() else host.encode("idna").decode()
    except UnicodeError:
        raise Failure("not a host name") from None


@lru_cache
def tls() -> ssl.SSLContext:
    return ssl.create_default_context()
