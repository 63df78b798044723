"""A hub on loopback: as much of the Hugging Face hub's HTTP interface as huggingface_hub and datasets ask for; for tests."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TYPES = ("models", "datasets")


class Hub(ThreadingHTTPServer):
    """Files of repositories by "models/user/name" or "datasets/user/name"; what was asked is in `asked`."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.blobs: dict[str, bytes] = {}  # uploaded, not yet of a commit
        self.asked: list[str] = []
        self.token: str | None = None  # what writers must show
        self.address = f"http://127.0.0.1:{self.server_address[1]}"


def commit_of(files: dict[str, bytes]) -> str:
    """Changes with every content, as the id of a commit does."""
    return hashlib.sha1(repr(sorted((name, hashlib.sha1(data).hexdigest()) for name, data in files.items())).encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, value=None, status: int = 200, data: bytes | None = None, **fields) -> None:
        data = json.dumps(value).encode() if data is None else data
        self.send_response(status)
        for name, field in {"Content-Length": len(data), "Content-Type": "application/json", **fields}.items():
            self.send_header(name.replace("_", "-"), str(field))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def fail(self, status: int, code: str) -> None:
        self.answer({"error": code}, status, X_Error_Code=code)

    def do(self) -> None:
        path, hub, body = unquote(urlsplit(self.path).path), self.server, self.body()
        hub.asked.append(f"{self.command} {path}")
        if self.command in ("POST", "PUT") and hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}" \
                and "/blob/" not in path and "paths-info" not in path:
            return self.fail(401, "RepoNotFound")
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('type', 'model')}s/{asked['organization']}/{asked['name']}"
            exists = name in hub.repositories
            hub.repositories.setdefault(name, {})
            return self.answer({"url": f"{hub.address}/{asked['organization']}/{asked['name']}", "name": name}, 409 if exists else 200)
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if found := re.fullmatch(r"/blob/(\w+)", path):
            hub.blobs[found[1]] = body
            return self.answer({})
        if found := re.fullmatch(r"/(\w+)/([\w.-]+)\.git/info/lfs/objects/batch", path):
            objects = [{**entry, "actions": {"upload": {"href": f"{hub.address}/blob/{entry['oid']}"}}} for entry in json.loads(body)["objects"]]
            return self.answer({"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"/(datasets/)?([\w-]+/[\w.-]+)/resolve/([\w.-]+)/(.+)", path):
            return self.file(f"{'datasets' if found[1] else 'models'}/{found[2]}", found[3], found[4])
        if not (found := re.fullmatch(r"/api/(models|datasets)/([\w-]+/[\w.-]+)(/.*)?", path)):
            return self.fail(404, "EntryNotFound")
        return self.repository(f"{found[1]}/{found[2]}", found[3] or "", body)

    do_GET = do_HEAD = do_POST = do_PUT = do

    def repository(self, name: str, rest: str, body: bytes) -> None:
        hub = self.server
        if (files := hub.repositories.get(name)) is None:
            return self.fail(404, "RepoNotFound")
        commit, (_, what, revision, below) = commit_of(files), (rest.split("/", 3) + [""] * 4)[:4]
        if revision not in ("", "main", commit):
            return self.fail(404, "RevisionNotFound")
        if what in ("", "revision"):
            return self.answer({"id": name.partition("/")[2], "sha": commit, "private": False, "tags": [], "downloads": 0,
                                "siblings": [{"rfilename": file} for file in files]})
        if what == "preupload":
            return self.answer({"files": [{"path": file["path"], "uploadMode": "lfs" if fnmatch(file["path"], "*.safetensors") else "regular",
                                           "shouldIgnore": False} for file in json.loads(body)["files"]]})
        if what == "commit":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    files[line["value"]["path"]] = hub.blobs.pop(line["value"]["oid"])
            return self.answer({"commitUrl": f"{hub.address}/{name}/commit/{commit_of(files)}", "commitOid": commit_of(files)})
        if what == "tree":
            return self.answer([self.entry(files, file) for file in sorted(self.below(files, below, "recursive=True" in self.path or "recursive=true" in self.path))])
        if what == "paths-info":
            asked = json.loads(body)["paths"] if body.startswith(b"{") else [unquote(pair[6:]) for pair in body.decode().split("&") if pair.startswith("paths=")]
            folders = {file.rpartition("/")[0] for file in files}
            return self.answer([self.entry(files, file) for file in asked if file in files or file in folders])
        return self.fail(404, "EntryNotFound")

    @staticmethod
    def below(files: dict[str, bytes], folder: str, recursive: bool) -> set[str]:
        inside = {file for file in files if not folder or file.startswith(folder.rstrip("/") + "/")}
        folders = {file.rpartition("/")[0] for file in inside if "/" in file} - {folder.rstrip("/")}
        return inside | folders if recursive else {entry for entry in inside | folders if "/" not in entry[len(folder):].strip("/")}

    @staticmethod
    def entry(files: dict[str, bytes], name: str) -> dict:
        data = files.get(name)
        oid = hashlib.sha1(name.encode() if data is None else data).hexdigest()
        return {"type": "directory", "oid": oid, "size": 0, "path": name} if data is None else \
            {"type": "file", "oid": oid, "size": len(data), "path": name}

    def file(self, name: str, revision: str, path: str) -> None:
        if (files := self.server.repositories.get(name)) is None:
            return self.fail(404, "RepoNotFound")
        if path not in files:
            return self.fail(404, "EntryNotFound")
        data = files[path]
        first, last = 0, len(data) - 1
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(found[1]), min(int(found[2] or last), last)
        fields = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X_Repo_Commit": commit_of(files), "Accept_Ranges": "bytes"}
        if found:
            fields["Content_Range"] = f"bytes {first}-{last}/{len(data)}"
        self.answer(status=206 if found else 200, data=data[first:last + 1], **fields)


@contextlib.contextmanager
def hub() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
