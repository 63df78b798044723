"""Files and URLs are read to their end or refused as what they are, within bounds; real servers on loopback that misbehave."""

import contextlib
import gzip
import io
import json
import os
import pickle
import random
import socket
import ssl
import subprocess
import sys
import tarfile
import threading
import time
import traceback
import types
import zlib
from pathlib import Path

import fsspec
import pytest
from PIL import Image
from servers import serving

from mmtx.cli import main
from mmtx.data import connection, response, retry, storage
from mmtx.data.collection import DataSource, read_source
from mmtx.data.sources import read as read_samples
from mmtx.data.sources import scan
from mmtx.data.storage import FileSource, display, download, folder_of, join, open_binary, read, recorded, scrub
from mmtx.data.trust import Base
from mmtx.errors import InputError, escape

DATA = random.Random(0).randbytes(300_000)


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Limits that a loaded machine keeps, which tests of them make shorter, quick repeats, and a cache of the test's own."""
    for module, name, value in ((connection, "CONNECT", 5.0), (connection, "IDLE", 5.0), (retry, "TOTAL", 20.0), (retry, "PAUSE", 0.01),
                                (retry, "LONGEST_PAUSE", 0.5)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setenv("MMTX_CACHE", str(tmp_path / "cache"))
    yield
    while connection.pool.waiting:
        connection.pool.waiting.popitem()[1].close()


@pytest.fixture
def server():
    with serving({}) as server:
        yield server


def refused(url: str, run=read) -> str:
    """The message for a URL that cannot be read: one short line that begins with the URL as it is shown."""
    with pytest.raises(InputError) as caught:
        run(url)
    message = str(caught.value)
    assert message.startswith(f"{display(url)}: ") and "\n" not in message and len(message) < 250
    # Nothing leads to an error of the back end, whose text may hold the URL.
    assert caught.value.__cause__ is None
    assert "secret" not in "".join(traceback.format_exception(caught.value))
    return message.removeprefix(f"{display(url)}: ")


def stream(url: str) -> bytes:
    """All that a source is read to, in small pieces."""
    with open_binary(url) as file:
        return b"".join(iter(lambda: file.read(7000), b""))


def both(request):
    request.ranged(DATA, 'ETag: "1"')


# -- To the end ----------------------------------------------------------------------------------------------


def test_whatever_way_a_server_sends_it_is_read_to_the_end(server):
    packed = gzip.compress(DATA)
    pieces = [DATA[i:i + 9000] for i in range(0, len(DATA), 9000)]

    def until_closed(request):
        request.send(b"HTTP/1.0 200 OK\r\n\r\n" + DATA)
        return "end"

    def slowly(request):
        request.chunked(piece for piece in pieces if not time.sleep(0.005))

    server.routes |= {
        "/length": lambda request: request.answer(DATA), "/ranges": both, "/closed": until_closed, "/slow": slowly,
        "/chunks": lambda request: request.chunked(pieces), "/bytes": lambda request: request.chunked([DATA[:1], DATA[1:]]),
        "/packed": lambda request: request.answer(packed, "200 OK", "Content-Encoding: gzip"),
        "/packed-chunks": lambda request: request.chunked([packed[:100], packed[100:]], "Content-Encoding: gzip"),
        "/packed-twice": lambda request: request.answer(gzip.compress(DATA[:9]) + gzip.compress(DATA[9:]), "200 OK", "Content-Encoding: gzip"),
        "/packed-padded": lambda request: request.answer(packed + bytes(9), "200 OK", "Content-Encoding: gzip"),
        "/deflated": lambda request: request.answer(zlib.compress(DATA), "200 OK", "Content-Encoding: deflate"),
        "/continued": lambda request: (request.send("HTTP/1.1 100 Continue\r\n\r\n"), request.answer(DATA)),
        "/packed-range": lambda request: request.answer(packed, "206 Partial Content", f"Content-Range: bytes 0-{len(packed) - 1}/"
                         f"{len(packed)}", "Content-Encoding: gzip") if "range" in request.headers else request.answer(DATA),
    }
    for path in list(server.routes):
        assert read(server.address + path) == DATA, path
        assert stream(server.address + path) == DATA, path
    assert read(server.address.replace("http", "HTTP") + "/length?a=b") == DATA
    assert server.paths()[-1] == "/length?a=b"


def test_nothing_at_all_is_read_as_nothing(server):
    server.routes |= {"/ranges": lambda request: request.ranged(b""), "/none": lambda request: request.answer(b"")}
    for path in server.routes:
        assert read(server.address + path) == stream(server.address + path) == b""


def test_what_is_cut_short_is_refused(server):
    packed = gzip.compress(DATA)

    def lost(body, *fields):
        def route(request):
            request.answer(body, "200 OK", *fields, length=len(DATA))
            return "end"
        return route

    def half_chunks(request):
        request.chunked([DATA[:1000], DATA[1000:5000]], whole=False)
        return "end"

    def half_chunk(request):
        request.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffff\r\nabc")
        return "end"

    def half_packed(request):
        request.chunked([packed[:1000]], "Content-Encoding: gzip")

    def half_member(request):
        request.chunked([gzip.compress(DATA[:1000]), packed[:1000]], "Content-Encoding: gzip")

    server.routes |= {"/a": lost(DATA[:-1]), "/b": lost(b""), "/c": half_chunks, "/d": half_chunk, "/e": half_packed, "/f": half_member}
    for path in server.routes:
        for run in (read, stream):
            assert refused(server.address + path, run).startswith("cut short"), path
    assert refused(server.address + "/a") == "cut short, 1 bytes are missing"


class Dribble(fsspec.AbstractFileSystem):
    """A back end that gives as much as it likes, and less than it said where the name is "short"."""

    protocol = "dribble"

    def _open(self, path, mode="rb", **options):
        file = Pieces(DATA[:-10] if path.endswith("short") else DATA)
        file.size = len(DATA)
        return file


class Pieces(io.BytesIO):
    def read(self, size=-1):
        return super().read(size if 0 <= size < 1000 else 1000)

    def readinto(self, buffer):
        return super().readinto(memoryview(buffer)[:1000])


def test_short_reads_of_any_back_end(monkeypatch):
    fsspec.register_implementation("dribble", Dribble, clobber=True)
    assert read("dribble://x") == DATA and stream("dribble://x") == DATA
    assert FileSource("dribble://x", 5000, 20_000).read() == DATA[5000:25_000]
    with pytest.raises(InputError, match=f"^dribble://short: cut short, found {len(DATA) - 10} of {len(DATA)} bytes$"):
        read("dribble://short")


def test_rows_and_members_behind_chunks(server):
    rows = "".join(json.dumps({"text": f"row {n} " + "x" * 200}) + "\n" for n in range(900)).encode()
    server.routes |= {"/m.jsonl": lambda request: request.chunked([rows[i:i + 5000] for i in range(0, len(rows), 5000)])}
    assert len(read_samples(server.address + "/m.jsonl", max_bad=0)) == 900


# -- Within bounds -------------------------------------------------------------------------------------------


def test_the_limit_holds_while_reading(server, monkeypatch, tmp_path):
    monkeypatch.setattr(storage, "MAX_BYTES", 100_000)
    sent = []

    def endless(request):
        request.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while not request.stopped.is_set():
            request.send(b"%x\r\n%s\r\n" % (len(DATA), DATA))
            sent.append(len(DATA))

    bomb = gzip.compress(bytes(2**25))
    server.routes |= {"/a": lambda request: request.answer(DATA), "/b": endless, "/ok": lambda request: request.answer(DATA[:100_000]),
                      "/said": lambda request: (request.answer(length=10**12), request.wait()),
                      "/c": lambda request: request.answer(bomb, "200 OK", "Content-Encoding: gzip")}
    for path in ("/a", "/b", "/c", "/said"):
        with pytest.raises(InputError, match=f"^{server.address}{path}: more than 100000 bytes, the most for one medium$"):
            FileSource(server.address + path).read()
    assert sum(sent) < 2**26
    assert FileSource(server.address + "/ok").read() == DATA[:100_000]
    with pytest.raises(InputError, match="more than 100000 bytes"):
        FileSource("data:;base64," + "A" * 200_000).read()


def test_layers_that_copy_whole_files_first_are_left_out(server, monkeypatch, tmp_path):
    monkeypatch.setattr(storage, "MAX_BYTES", 100_000)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    rows = json.dumps({"image": "a.png", "text": "x"}).encode()
    server.routes |= {"/a.png": lambda request: request.answer(DATA), "/m.jsonl": lambda request: request.answer(rows)}
    for layer in ("simplecache::", "filecache::", "blockcache::", "SimpleCache::filecache::"):
        with pytest.raises(InputError, match="more than 100000 bytes"):
            FileSource(f"{layer}{server.address}/a.png").read()
        (sample,) = read_samples(f"{layer}{server.address}/m.jsonl")
        with pytest.raises(InputError, match="more than 100000 bytes"):
            sample.turns[0].parts[0].source.read()
    assert not list((tmp_path / "scratch").rglob("*"))


@pytest.mark.parametrize("route", ["silent", "after the head", "in the body", "trickling head", "trickling body", "trickling chunks"])
def test_a_server_that_does_not_go_on_is_left_in_time(server, monkeypatch, route):
    monkeypatch.setattr(retry, "SLOWEST", 10_000)
    monkeypatch.setattr(connection, "IDLE", 0.3)
    monkeypatch.setattr(retry, "TOTAL", 0.9)

    def answer(request):
        if route == "silent":
            request.wait()
        elif route == "trickling head":
            for letter in "HTTP/1.1 200 OK\r\nX-A: " + "a" * 1000:
                request.send(letter)
                request.stopped.wait(0.05)
        else:
            chunks = route == "trickling chunks"
            request.send("HTTP/1.1 200 OK\r\n" + ("Transfer-Encoding: chunked" if chunks else "Content-Length: 100000") + "\r\n\r\n")
            if route == "in the body":
                request.send(DATA[:1000])
            if route in ("in the body", "after the head"):
                request.wait()
            while not request.stopped.wait(0.05):
                request.send("1\r\na\r\n" if chunks else "a")
        return "end"

    server.routes["/a"] = answer
    began = time.monotonic()
    for run in (read, stream):
        message = refused(server.address + "/a", run)
        assert message in ("no answer within 0.3 s", "no complete response within 0.9 s"), message
    assert time.monotonic() - began < 10  # far above 2 * TOTAL and far below what the server would take
    # Retries where they may help: a server that says nothing may be a busy one.
    assert len(server.asked) > 2 if route == "silent" else True


def test_time_of_the_reader_does_not_count(server, monkeypatch):
    monkeypatch.setattr(retry, "TOTAL", 0.5)
    server.routes["/a"] = lambda request: request.answer(DATA)
    with open_binary(server.address + "/a") as file:
        whole = file.read(100)
        time.sleep(0.7)
        assert whole + file.read() == DATA


def test_a_large_source_may_take_longer_than_one_medium(server, monkeypatch):
    monkeypatch.setattr(retry, "SLOWEST", 10_000)
    monkeypatch.setattr(retry, "TOTAL", 0.6)
    server.routes["/a"] = lambda request: request.chunked(DATA[i:i + 30_000] for i in range(0, len(DATA), 30_000)
                                                          if not time.sleep(0.1))
    assert stream(server.address + "/a") == DATA
    assert refused(server.address + "/a").startswith("no complete response within 0.6 s")


class Stuck(fsspec.AbstractFileSystem):
    protocol = "stuck"

    def _open(self, path, mode="rb", **options):
        time.sleep(5)


def test_a_back_end_that_does_not_go_on_is_left_in_time(monkeypatch):
    fsspec.register_implementation("stuck", Stuck, clobber=True)
    monkeypatch.setattr(retry, "TOTAL", 0.2)
    assert refused("stuck://me:secret@x") == "no complete response within 0.2 s"


@pytest.mark.parametrize(("error", "told"), [
    (FileNotFoundError("secret"), "no such file"), (PermissionError(13, "secret"), "permission denied"),
    (TimeoutError("secret"), "no answer in time"), (ImportError("Install s3fs"), "cannot be read (Install s3fs)"),
    (ValueError("secret"), "cannot be read (ValueError)"), (OSError(5, "Input/output error"), "cannot be read (Input/output error)"),
    (types.new_class("Answered", (Exception,), {}, lambda body: body.update(status=403))("secret"), "HTTP 403 (permission denied)"),
    (types.new_class("Coded", (Exception,), {}, lambda body: body.update(code=429))("secret"), "HTTP 429 (too many requests)"),
    (types.new_class("Responded", (Exception,), {}, lambda body: body.update(response=types.SimpleNamespace(status_code=503)))("secret"),
     "HTTP 503 (the server is busy)"),
])
def test_errors_of_back_ends_are_told_as_what_they_are(monkeypatch, error, told):
    fsspec.register_implementation("stuck", Stuck, clobber=True)

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(Stuck, "_open", fail)
    assert refused("stuck://me:secret@x") == told


def test_pieces_that_come_in_time_do_not_go_on_for_ever(server, monkeypatch):
    monkeypatch.setattr(retry, "SLOWEST", 10**9)
    monkeypatch.setattr(retry, "TOTAL", 0.5)
    server.routes["/a"] = lambda request: request.chunked(DATA[:70_000] for _ in range(50) if not request.stopped.wait(0.1))
    assert refused(server.address + "/a", stream) == "no complete response within 0.5 s"


# -- What servers answer -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "words", "times"), [
    (400, "bad request", 1), (401, "authentication required", 1), (403, "permission denied", 1),
    (404, "no such file", 1), (405, "method not allowed", 1), (410, "no longer available", 1), (416, "no such byte range", 1),
    (418, "request failed", 1), (451, "not available here", 1), (429, "too many requests", 4), (500, "server error", 4),
    (502, "server error", 4), (503, "the server is busy", 4), (504, "no answer in time", 4), (599, "server error", 1),
])
def test_a_status_is_told_as_what_it_is(server, status, words, times):
    server.routes["/secret/a.png"] = lambda request: request.answer(b"nothing", f"{status} Whatever")
    server.routes["/a.png"] = server.routes["/secret/a.png"]
    url = server.address.replace("//", "//me:secret@") + "/a.png?token=secret"
    for run in (read, stream):
        assert refused(url, run) == f"HTTP {status} ({words})"
    assert len(server.asked) == 2 * times + (status == 416)  # of which ranges may be the cause
    assert f"{server.address}/a.png" == display(url)


def test_what_passes_is_tried_again(server):
    told = []

    def recovers(request):
        told.append(time.monotonic())
        if len(told) < 3:
            request.answer(b"", "503 Service Unavailable", *([f"Retry-After: {wait}"] if wait else []))
        else:
            request.answer(DATA)

    def drops(request):
        told.append(0)
        if len(told) < 3:
            request.answer(DATA[:1000], length=len(DATA))
            return "end"
        request.answer(DATA)

    wait = None
    server.routes |= {"/a": recovers, "/b": drops}
    assert read(server.address + "/a") == DATA
    told.clear()
    wait = "0"
    assert stream(server.address + "/a") == DATA
    told.clear()
    assert read(server.address + "/b") == DATA and len(told) == 3
    told.clear()
    wait = "3600"  # more than is waited for
    assert refused(server.address + "/a") == "HTTP 503 (the server is busy)" and len(told) == 1
    assert response.retry_after("7") == 7 and response.retry_after("soon") is None and response.retry_after(None) is None
    assert response.retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0 and response.retry_after("-1") is None
    assert response.retry_after("9" * 40) is None


def test_a_lost_connection_is_gone_on_with_where_ranges_allow_it(server):
    tags = iter(['ETag: "1"'] * 3 + ['ETag: "2"'] * 9)

    def halves(request):
        first = int(request.headers["range"].removeprefix("bytes=").partition("-")[0])
        part, tag = DATA[first:first + 120_000], next(tags)
        request.answer(part, "206 Partial Content", f"Content-Range: bytes {first}-{len(DATA) - 1}/{len(DATA)}", tag,
                       length=len(DATA) - first)
        return "end"

    def in_pieces(request):
        first = int(request.headers["range"].removeprefix("bytes=").partition("-")[0])
        part = DATA[first:first + 120_000]
        request.answer(part, "206 Partial Content", f"Content-Range: bytes {first}-{first + len(part) - 1}/{len(DATA)}", 'ETag: "1"')

    server.routes |= {"/a": halves, "/b": in_pieces}
    assert stream(server.address + "/b") == DATA
    server.asked.clear()
    assert stream(server.address + "/a") == DATA
    assert [request.headers["range"] for request in server.asked] == ["bytes=0-", "bytes=120000-", "bytes=240000-"]
    tags = iter(['ETag: "1"', 'ETag: "2"'])
    assert refused(server.address + "/a", stream) == "changed while it was read"


def test_answers_that_are_none(server):
    def says(text):
        def route(request):
            request.send(text)
            return "end"
        return route

    length = f"Content-Length: {len(DATA)}"
    server.routes |= {
        "/lost": says(""), "/ssh": says("SSH-2.0-OpenSSH\r\n"), "/head": says("HTTP/1.1 200 OK\r\n" + "X: y\r\n" * 200 + "\r\n"),
        "/chunk": says("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nnot hex\r\n"), "/no-body": says("HTTP/1.1 204 No Content\r\n\r\n"),
        "/status": says("HTTP/1.1 abc\r\n\r\n"), "/line": says("HTTP/1.1 200 OK\r\nX: " + "y" * 70_000 + "\r\n\r\n"),
        "/br": lambda request: request.answer(DATA, "200 OK", "Content-Encoding: br"),
        "/damaged": lambda request: request.answer(b"no gzip", "200 OK", "Content-Encoding: gzip"),
        "/other": lambda request: request.answer(DATA[:9], "206 Partial Content", f"Content-Range: bytes 5-13/{len(DATA)}"),
        "/304": lambda request: request.answer(b"", "304 Not Modified"), "/nowhere": lambda request: request.answer(b"", "302 Found"),
    }
    expected = {"/lost": "the connection was lost", "/ssh": "not a valid HTTP answer", "/head": "not a valid HTTP answer",
                "/chunk": "cut short, the connection was lost", "/no-body": "HTTP 204 (request failed)", "/status": "not a valid HTTP answer",
                "/line": "not a valid HTTP answer", "/br": "its transfer is compressed with 'br', expected none or gzip",
                "/damaged": "its compressed transfer is damaged", "/other": "HTTP 206 (request failed)",
                "/304": "HTTP 304 (request failed)", "/nowhere": "HTTP 302 (request failed)"}
    assert {path: refused(server.address + path) for path in expected} == expected, length


def test_servers_that_are_not_there(server, monkeypatch):
    monkeypatch.setattr(connection, "CONNECT", 1.0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"
        assert refused(closed + "/a?secret") == "the connection was refused"  # bound, but not listened to
    monkeypatch.setattr(retry, "RETRIES", 0)
    assert "host" in refused("http://no-such-host.invalid/a?secret")
    with socket.create_server(("127.0.0.1", 0)) as plain:
        def greet():
            connection, _ = plain.accept()
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            connection.recv(9)
        threading.Thread(target=greet, daemon=True).start()
        assert refused(f"https://127.0.0.1:{plain.getsockname()[1]}/a").startswith("no TLS connection (")
    for url in ("http://", "http:///a", "https://h:port/a", "http://[::1/a", "http://a b/c", "http://h\0/a", f"http://{'a' * 70}.b/"):
        refused(url)
    with socket.socket() as full:  # a listener that accepts nothing
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        with contextlib.ExitStack() as stack:
            for _ in range(3):
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(full.getsockname())
            assert refused(f"http://127.0.0.1:{full.getsockname()[1]}/a") == "no connection within 1 s"


def test_a_certificate_that_is_not_valid(tmp_path):
    made = subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", tmp_path / "key", "-out", tmp_path / "cert",
                           "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"], capture_output=True)
    if made.returncode:
        pytest.skip("needs openssl")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    with serving({"/a": lambda request: request.answer(DATA)}) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        url = server.address.replace("http://127.0.0.1", "https://localhost") + "/a"
        assert refused(url) == "its certificate is not valid (self-signed certificate)"
        trusting = ssl.create_default_context(cafile=str(tmp_path / "cert"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(connection, "tls", lambda: trusting)
            assert read(url) == DATA and stream(url) == DATA
            assert refused(url.replace("localhost", "127.0.0.1")).startswith("its certificate is not valid (IP address mismatch")


# -- Redirects, names and passwords --------------------------------------------------------------------------


def to(place, status="302 Found"):
    return lambda request: request.answer(b"", status, f"Location: {place}")


def test_redirects_are_followed_on_the_server_itself(server):
    server.routes |= {"/a": to("/b?x=1", "301 Moved"), "/b": to("sub/c", "307 Temporary Redirect"), "/sub/c": both, "/loop": to("/loop"),
                      "/file": to("file:///etc/passwd"), "/ftp": to("ftp://h/a"), "/data": to("data:,x"), "/bad": to("http://[")}
    assert read(server.address + "/a") == stream(server.address + "/a") == DATA
    assert server.paths()[:3] == ["/a", "/b?x=1", "/sub/c"]
    assert refused(server.address + "/loop") == "redirected more than 5 times"
    for path in ("/file", "/ftp", "/data"):
        assert refused(server.address + path) == "redirected: found another scheme, expected https"
    refused(server.address + "/bad")


def test_redirects_to_private_addresses_are_not_followed(server):
    with serving({"/a": both}) as other:
        port = other.server_address[1]
        for host in ("127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]"):
            server.routes["/a"] = to(f"http://{host}:{port}/a")
            # A name is looked up, and its address refused.
            told = "found a private address, expected a public one"
            assert refused(server.address + "/a") == (told if host == "localhost" else f"redirected: {told}")
        assert not other.asked
        server.routes["/a"] = to(other.address + "/a")
        assert read(server.address + "/a", base=Base(trusted=True)) == DATA


def test_a_password_is_told_to_its_server_alone(server):
    with serving({"/a": both}) as other:
        server.routes |= {"/a": to("/b"), "/b": to(other.address + "/a")}
        url = server.address.replace("//", "//me:p%40ss@") + "/a"
        assert read(url, base=Base(trusted=True)) == DATA
        assert [request.headers.get("authorization") for request in (*server.asked, *other.asked)] == [
            "Basic bWU6cEBzcw==", "Basic bWU6cEBzcw==", None]


def test_names_are_sent_as_servers_expect_them(server):
    server.routes |= dict.fromkeys(("/a%20b.png", "/%C3%BC.png", "/50%25.png", "/a+b&c=d.png", "/a%2Fb"), both)
    for name in ("a b.png", "a%20b.png", "ü.png", "%C3%BC.png", "50%.png", "a+b&c=d.png", "a%2Fb#part", "a b.png?x=ü&y= "):
        assert read(f"{server.address}/{name}") == DATA, name
    assert server.paths()[-1] == "/a%20b.png?x=%C3%BC&y=%20"


# -- Connections, forks and threads --------------------------------------------------------------------------


def test_a_connection_is_used_again_also_after_a_fork(server):
    server.routes["/a"] = lambda request: request.answer(DATA[:5])
    opened = []
    get_request = server.get_request
    server.get_request = lambda: (opened.append(0), get_request())[1]
    for _ in range(3):
        assert read(server.address + "/a") == DATA[:5]
    assert len(opened) == 1
    child = os.fork()
    if not child:
        os._exit(read(server.address + "/a") != DATA[:5])
    assert os.waitpid(child, 0)[1] == 0
    assert read(server.address + "/a") == DATA[:5] and len(opened) == 2


def test_a_connection_that_its_server_closed_meanwhile(server):
    def once(request):
        request.answer(DATA[:5])
        return "end"

    server.routes["/a"] = once
    for _ in range(3):
        assert read(server.address + "/a") == DATA[:5]
        time.sleep(0.02)


# -- Tars ----------------------------------------------------------------------------------------------------


def tar(count=5, mode="w"):
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode=mode) as shard:
        for number in range(count):
            for name, data in ((f"{number}.png", DATA[number * 1000:number * 1000 + 900]), (f"{number}.txt", b"x")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                shard.addfile(info, io.BytesIO(data))
    return held.getvalue()


def bytes_of(samples):
    return [sample.turns[0].parts[0].source.read() for sample in samples]


MEMBERS = [DATA[number * 1000:number * 1000 + 900] for number in range(5)]


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz"])
@pytest.mark.parametrize("fields", [["Last-Modified: now"], []])
def test_a_tar_of_a_server_without_ranges(server, name, fields, tmp_path):
    packed = tar(mode="w:gz" if name.endswith("gz") else "w")
    server.routes[f"/{name}"] = lambda request: request.answer(packed, "200 OK", *fields)
    samples = read_samples(f"{server.address}/{name}?token=secret")
    asked = len(server.asked)
    assert bytes_of(pickle.loads(pickle.dumps(samples))) == MEMBERS
    assert len({path.name for path in (tmp_path / "cache").iterdir()}) == 1
    assert asked == 1
    # Copied once, and again when it changes.
    assert bytes_of(read_samples(f"{server.address}/{name}?token=secret")) == MEMBERS
    assert "secret" not in " ".join(map(str, tmp_path.rglob("*")))


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz"])
def test_a_tar_of_a_server_that_tells_no_length(server, name):
    packed = tar(mode="w:gz" if name.endswith("gz") else "w")
    server.routes[f"/{name}"] = lambda request: request.chunked([packed[:100], packed[100:]])
    samples = read_samples(f"{server.address}/{name}")
    assert bytes_of(samples) == MEMBERS
    packed = tar(2, "w:gz" if name.endswith("gz") else "w")
    assert bytes_of(samples) == MEMBERS  # of the copy that was listed
    assert bytes_of(read_samples(f"{server.address}/{name}")) == MEMBERS[:2]


def test_a_tar_of_a_server_with_ranges_is_read_in_place(server, tmp_path):
    packed = tar(400)
    server.routes["/x.tar"] = lambda request: request.ranged(packed, 'ETag: "1"')
    samples = read_samples(server.address + "/x.tar")
    assert len(samples) == 400 and bytes_of(samples[:5]) == MEMBERS
    assert server.asked[-1].headers["range"] == f"bytes={samples[4].turns[0].parts[0].source.offset}-" + str(
        samples[4].turns[0].parts[0].source.offset + 899)
    assert not (tmp_path / "cache").exists()
    packed = packed[:1000]
    with pytest.raises(InputError, match="HTTP 416 .no such byte range.|cut short|found"):
        samples[300].turns[0].parts[0].source.read()


def test_a_copy_that_cannot_be_written_is_told(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MMTX_CACHE", str(tmp_path / "file"))
    server.routes["/x.tar"] = lambda request: request.answer(tar())
    with pytest.raises(InputError, match="file/[0-9a-f]{32}: cannot be written"):
        read_samples(server.address + "/x.tar")


def test_a_copy_appears_whole_or_not_at_all(server, tmp_path):
    server.routes["/a"] = lambda request: (request.answer(DATA[:-1], length=len(DATA)), "end")[1]
    with pytest.raises(InputError, match="cut short"):
        download(server.address + "/a", tmp_path / "copies" / "a")
    assert not list((tmp_path / "copies").iterdir())


# -- Rows of strangers ---------------------------------------------------------------------------------------


def rows(*values):
    return "".join(json.dumps({"image": value, "text": "x"}) + "\n" for value in values).encode()


def test_rows_of_a_url_read_what_lies_below_it_alone(server, tmp_path):
    (tmp_path / "own.png").write_bytes(b"own")
    with serving({"/a.png": both}) as other:
        names = ["a.png", "sub/a.png", f"{server.address}/set/a.png", "data:image/png;base64,QQ==",
                 str(tmp_path / "own.png"), "../a.png", "%2e%2e/a.png", f"{server.address}/a.png", f"{other.address}/a.png",
                 f"reference://k::{server.address}/refs.json", f"simplecache::{server.address}/set/a.png", f"file://{tmp_path}/own.png",
                 f"https://127.0.0.1:{other.server_address[1]}/a.png", "s3://bucket/a.png"]
        server.routes |= dict.fromkeys(("/a.png", "/set/a.png", "/set/sub/a.png"), both)
        server.routes["/set/m.jsonl"] = lambda request: request.answer(rows(*names))
        url = server.address + "/set/m.jsonl"
        found = list(scan(url))
        assert bytes_of(found[:4]) == [DATA, DATA, DATA, b"A"]
        assert all(isinstance(row, InputError) for row in found[4:])
        assert all(f"{url} row {number}: field 'image' names " in str(row) for number, row in enumerate(found[4:], 5))
        assert not other.asked and "/refs.json" not in server.paths() and "/a.png" not in server.paths()
        # The user's word for it.
        found = list(scan(url, trusted=True))
        assert bytes_of(found[4:6]) == [b"own", DATA] and bytes_of(found[7:9]) == [DATA, DATA]
        assert all(isinstance(row, InputError) and "scheme" in str(row) for row in found[9:12])


def test_the_option_that_messages_name(server, tmp_path, tiny_model, capsys):
    picture = io.BytesIO()
    Image.new("RGB", (16, 16)).save(picture, "PNG")
    (tmp_path / "own.png").write_bytes(picture.getvalue())
    server.routes["/m.jsonl"] = lambda request: request.answer(rows(str(tmp_path / "own.png")))
    url, folders = server.address + "/m.jsonl", [str(tmp_path / kind) for kind in tiny_model.tokenizers]
    tiny_model.save(tmp_path / "model")
    for folder, tokenizer in zip(folders, tiny_model.tokenizers.values()):
        tokenizer.save(folder)
    config = {"model": {"init_args": {}}, "data": {"init_args": {"tokenizers": dict(zip(tiny_model.tokenizers, folders)), "validation": [],
                                                               "train": [{"paths": [url]}]}}}
    config["data"]["init_args"]["validation"] = config["data"]["init_args"]["train"]
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    of_config = ["--config", str(tmp_path / "config.yaml")]
    model = ["--model", str(tmp_path / "model"), "--device", "cpu"]
    for number, command in enumerate((["inspect", url, *model], ["evaluate", url, *model], ["evaluate", *of_config, *model],
                                      ["prepare", url, "--tokenizers", *folders, "--num_workers", "1"], ["prepare", *of_config, "--num_workers", "1"])):
        output = ["--output", str(tmp_path / str(number))] if command[0] == "prepare" else []
        with pytest.raises(SystemExit):
            main([*command, *output])
        assert "(`trusted: true` or --trusted allows it)" in capsys.readouterr().err
        main([*command, *(["--output", str(tmp_path / f"trusted-{number}")] if output else []), "--trusted"])
    with pytest.raises(InputError, match="found a local path in a source at a URL"):
        read_source(DataSource([url]))
    assert len(read_source(DataSource([url], trusted=True))) == 1


def test_a_redirect_is_no_way_out_for_rows(server, tmp_path):
    with serving({"/a.png": both}) as other:
        server.routes |= {"/set/m.jsonl": lambda request: request.answer(rows("in.png", "up.png", "out.png")), "/set/a.png": both,
                          "/a.png": both, "/set/in.png": to("a.png"), "/set/up.png": to("/a.png"), "/set/out.png": to(other.address + "/a.png")}
        inside, *outside = read_samples(server.address + "/set/m.jsonl")
        assert bytes_of([inside]) == [DATA]
        for sample in outside:
            with pytest.raises(InputError, match="png: redirected: found another address than its source's"):
                bytes_of([sample])
        assert not other.asked and "/a.png" not in server.paths()
        assert bytes_of(read_samples(server.address + "/set/m.jsonl", trusted=True)) == [DATA] * 3


def test_a_name_that_stands_for_a_private_address(server, monkeypatch):
    """The address is checked that is connected to: a name may change its meaning after the check."""
    answers, look_up = ["93.184.216.34", "127.0.0.1"], socket.getaddrinfo

    def changing(host, port, *rest, **options):
        if host != "data.example":
            return look_up(host, port, *rest, **options)
        return look_up(answers.pop(0), port, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", changing)
    port = server.server_address[1]
    server.routes["/set/a.png"] = both
    public, url = Base(f"http://data.example:{port}/set"), f"http://data.example:{port}/set/a.png"
    assert connection.addresses("data.example", port, 1)[0][1][0] == "93.184.216.34"
    with pytest.raises(InputError, match="set/a.png: found a private address, expected a public one .*--trusted"):
        FileSource(url, base=public).read()
    assert not server.asked
    answers = ["127.0.0.1"] * 3
    assert FileSource(url, base=Base(public.folder, private=True)).read() == DATA
    # Nor is a connection that is open already a way around it.
    with pytest.raises(InputError, match="found a private address"):
        FileSource(url, base=public).read()
    monkeypatch.setattr("mmtx.data.connection.is_public", lambda address: True)
    assert FileSource(url, base=Base(trusted=True)).read() == DATA


def test_a_manifest_that_is_kept_elsewhere(server, monkeypatch):
    """It is the address of the user that says what is below it, not the one that it redirects to."""
    with serving({"/m.jsonl": lambda request: request.answer(rows("a.png"))}) as other:
        server.routes |= {"/set/m.jsonl": to(other.address + "/m.jsonl"), "/set/a.png": both}
        monkeypatch.setattr("mmtx.data.trust.is_public", lambda address: True)  # else the redirect is refused
        assert bytes_of(read_samples(server.address + "/set/m.jsonl")) == [DATA]


def test_a_pipe_or_a_device_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (str(tmp_path / "pipe.png"), "/dev/zero"):
        with pytest.raises(InputError, match="found a pipe, a socket or a device, expected a file"):
            read(path)


def test_bytes_behind_an_answer_are_not_the_next_one(server):
    server.routes["/a"] = lambda request: (request.answer(DATA[:5]), time.sleep(0.02), request.send("more"))
    for _ in range(3):
        assert read(server.address + "/a") == DATA[:5]


def test_a_manifest_of_the_users_own_server(server):
    server.routes |= {"/m.jsonl": lambda request: request.answer(rows("a.png")), "/a.png": both}
    (sample,) = read_samples(server.address + "/m.jsonl")
    assert sample.turns[0].parts[0].source.base == Base(server.address, private=True)


def test_a_local_manifest_names_any_file_and_no_formatting_url(tmp_path, server):
    server.routes["/a.png"] = both
    (tmp_path / "a.png").write_bytes(b"A")
    (tmp_path / "sub").mkdir()
    names = ["../a.png", str(tmp_path / "a.png"), server.address + "/a.png", f"reference://k::{server.address}/refs.json",
             f"REFERENCE://k::{server.address}/refs.json", f" reference://k::{server.address}/refs.json", f"file://{tmp_path}/a.png",
             f"simplecache::{server.address}/a.png", "http://169.254.169.254/a.png", "github://o:r@/a.png", f"s3://b/a::reference://{tmp_path}"]
    (tmp_path / "sub" / "m.jsonl").write_bytes(rows(*names))
    found = list(scan(str(tmp_path / "sub" / "m.jsonl")))
    assert bytes_of(found[:3]) == [b"A", b"A", DATA]
    assert all(isinstance(row, InputError) for row in found[3:]) and "/refs.json" not in server.paths()


# -- Names that are shown ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "shown"), [
    ("https://me:secret@host/a/x.tar?signature=secret", "https://host/a/x.tar"), ("https://h/x.tar#secret", "https://h/x.tar"),
    ("https://secret@h:80/x", "https://h:80/x"), ("https://me%3Asecret%40h/x", "https://..."), ("https://me:se/cret@h/x", "https://..."),
    ("https://me:se?cret@h/x", "https://..."), ("https://me:se#cret@h/x", "https://..."), ("https://12:34?secret@h/x", "https://..."),
    ("https://me:p@secret@h/x", "https://h/x"), ("s3://KEY:sec/ret@bucket/x", "s3://..."), ("s3://KEY:secret@bucket/x", "s3://bucket/x"),
    ("https://h/x;jsessionid=secret/y.png", "https://h/x/y.png"), ("https://h:80/x/@me.png", "https://h:80/x/@me.png"),
    ("http://[::1]:80/x?secret", "http://[::1]:80/x"), ("HTTPS://me:secret@H/x?y", "HTTPS://H/x"),
    ("https://b.s3.amazonaws.com/x.tar?X-Amz-Signature=secret&X-Amz-Credential=secret", "https://b.s3.amazonaws.com/x.tar"),
    ("reference://k::http://me:secret@h/refs.json?secret", "reference://k::http://h/refs.json"),
    ("zip://a.txt::simplecache::https://me:secret@h/x.zip?secret", "zip://a.txt::simplecache::https://h/x.zip"),
    ("https://h/x?to=a::https://secret/", "https://h/x"), ("simplecache::s3://me:secret@b/x", "simplecache::s3://b/x"),
    ("data:image/png;base64,secret", "data:image/png;base64"), ("data:secret!", "data:"), ("DATA:,secret", "DATA:"),
    ("C:\\data\\what?.png", "C:\\data\\what?.png"), ("what?.tar", "what?.tar"), ("/data/a@b:c#1.png", "/data/a@b:c#1.png"),
    ("ü/猫/🐈‍⬛ a.png", "ü/猫/🐈‍⬛ a.png"), ("a\x1b[31m\r\nb\t", "a\\x1b[31m\\r\\nb\\t"), ("a\u202egnp.exe", "a\\u202egnp.exe"),
    ("a\u2028b\x85\x7f\ufeff", "a\\u2028b\\x85\\x7f\\ufeff"), ("b\udcffad.png", "b\\xffad.png"), ("\ud800", "\\ud800"),
    ("https://h/a\n\x1b]0;x\x07", "https://h/a\\n\\x1b]0;x\\x07"), ("a" * 300 + ".png", "a" * 100 + "..." + "a" * 93 + ".png"),
])
def test_a_path_is_shown_without_secrets_on_one_line(path, shown):
    assert display(path) == shown
    assert "secret" not in scrub(f"cannot open '{path}', really") or "://" not in path
    assert display(shown) == shown or shown.lower().startswith("data:")
    if shown == path:
        assert recorded(path) == path


def test_a_path_in_files_tells_sources_apart_without_their_secrets():
    one, other = recorded("https://h/x?token=secret"), recorded("https://h/x?token=other")
    assert one.startswith("https://h/x (sha256 ") and one != other and "secret" not in one
    assert recorded("a" * 1000) == "a" * 1000 and recorded("https://h/x") == "https://h/x"


def test_texts_of_others_are_shown_without_secrets():
    text = "Invalid URL 'https://me:secret@h/x?token=secret', see <s3://k:secret@b/y> or data:image/png;base64," + "A" * 60
    assert scrub(text) == "Invalid URL 'https://h/x', see <s3://b/y> or data:image/png;base64"
    assert scrub("no address: here") == "no address: here" and escape("a\x00b") == "a\\x00b"


def test_a_url_without_a_path_is_its_own_folder():
    """Its rows are those of a URL still, which name no local files."""
    assert folder_of("http://m.jsonl") == "http://m.jsonl" and folder_of("http://h/m.jsonl?x") == "http://h"
    assert folder_of("/a/m.jsonl") == "/a" and folder_of("m.jsonl") == "" and Base(folder_of("s3://m.jsonl")).remote


def test_a_file_of_a_folder_with_a_signature():
    assert join("https://h/prep/?sig=secret", "x") == "https://h/prep/x?sig=secret" and join("/a/b/", "x") == "/a/b/x"
    assert join("what?", "x") == "what?/x"


def test_local_files_that_cannot_be_read(tmp_path):
    for path, told in ((tmp_path, "cannot be read (Is a directory)"), (tmp_path / "gone", "no such file"),
                       ("a\0b", "cannot be read (embedded null byte)"), (tmp_path / ("a" * 300), "cannot be read (File name too long)")):
        with pytest.raises(InputError) as caught:
            read(str(path))
        found = str(caught.value).replace("stat: embedded null character in path", "embedded null byte")  # Python 3.13's words
        assert found == f"{display(str(path))}: {told}"


def test_a_fault_of_the_reader_is_not_told_as_one_of_the_file(server):
    server.routes["/a"] = both
    for path in (server.address + "/a", __file__):
        with pytest.raises(ZeroDivisionError), open_binary(path):
            raise ZeroDivisionError
        with pytest.raises(OSError, match="of mine"), open_binary(path):
            raise OSError("of mine")


def test_reading_local_files_loads_no_client():
    code = ("import sys; from mmtx.data.storage import read; read(sys.argv[1]); "
            "sys.exit(bool({'fsspec', 'ssl', 'http.client', 'mmtx.data.web'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code, __file__], cwd=Path(__file__).parents[1]).returncode == 0
