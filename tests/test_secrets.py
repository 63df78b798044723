"""Passwords, tokens and signatures of URLs are in nothing that any command prints or writes."""

import base64
import contextlib
import importlib.util
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from PIL import Image
from servers import serving

from mmtx.cli import main

MARK = "s3cr3tMARK"
DEMO = Path(__file__).parents[1] / "demos" / "caption.py"


def picture(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def sound() -> bytes:
    file = io.BytesIO()
    soundfile.write(file, 0.5 * np.random.default_rng(0).standard_normal(4000).clip(-1, 1), 16_000, format="WAV")
    return file.getvalue()


def shard(mode: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as tar:
        for number in range(3):
            for name, data in ((f"{number}.png", picture(number)), (f"{number}.txt", b"a red circle")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


@pytest.fixture(scope="module")
def files():
    """What lies on the server, by path."""
    return {"/a.png": picture(0), "/b.png": picture(1), "/c.wav": sound(), "/broken.png": b"\x89PNG\r\n\x1a\n and no more",
            "/x.tar": shard("w"), "/x.tar.gz": shard("w:gz"), "/broken.tar": b"no tar" * 999, "/broken.jsonl": b"{\n"}


@pytest.fixture
def secret(files):
    """A function from a path to its URL on a server that wants a password, with a token and a signature in it too."""
    def with_password(answer):
        def route(request):
            if request.headers.get("authorization") != "Basic " + base64.b64encode(f"me:{MARK}".encode()).decode():
                return request.answer(b"", "401 Unauthorized")
            return answer(request)
        return route

    def moved(request):
        request.answer(b"", "302 Found", f"Location: http://me:{MARK}@127.0.0.2:9/a?X-Amz-Signature={MARK}")

    with serving({path: with_password(lambda request, data=data: request.answer(data)) for path, data in files.items()}) as server:
        def url(path: str) -> str:
            address = server.address.replace("//", f"//me:{MARK}@")
            return f"{address}{path}?token={MARK}&X-Amz-Signature={MARK}#{MARK}"

        rows = [{"image": "a.png", "text": "a red circle"}, {"image": url("/b.png"), "text": "a blue square"},
                {"audio": "c.wav", "text": "trumpet"}, {"image": url("/gone.png"), "text": "nothing"}]
        refused = [{"image": name, "text": "x"} for name in (
            f"reference://k::{url('/refs.json')}", f"https://me:{MARK}@127.0.0.1/a.png?{MARK}", f"s3://KEY:{MARK}@bucket/a.png", url("/broken.png"),
            f"data:image/png;base64,{MARK}", url("/c.wav"))]
        server.routes["/m.jsonl"] = with_password(lambda request: request.answer(lines(rows)))
        server.routes["/good.jsonl"] = with_password(lambda request: request.answer(lines(rows[:3])))
        server.routes["/refused.jsonl"] = with_password(lambda request: request.answer(lines(refused)))
        server.routes["/forbidden.png"] = lambda request: request.answer(b"", "403 Forbidden")
        server.routes["/moved.png"] = moved
        yield url


def lines(rows: list) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def written(folder: Path) -> str:
    """Names and contents of all files in a folder."""
    return "\n".join(f"{path}\n{path.read_bytes().decode('latin-1') if path.is_file() else ''}" for path in folder.rglob("*"))


@pytest.fixture
def run(tiny_model, tmp_path, capfd, monkeypatch):
    """Run a command in an empty folder with a cache in it -> status, and what it printed, after looking for the mark."""
    monkeypatch.setenv("MMTX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("mmtx.data.retry.PAUSE", 0.01)
    tiny_model.save(tmp_path / "model")
    for kind, tokenizer in tiny_model.tokenizers.items():
        tokenizer.save(tmp_path / kind)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, command=main) -> tuple[int, str]:
        status = 0
        try:
            command(list(arguments))
        except SystemExit as stop:
            status = stop.code or 0
        said = "".join(capfd.readouterr())
        for text in (said, written(tmp_path)):
            assert MARK not in text, text[max(0, text.index(MARK) - 500):text.index(MARK) + 50]
            assert base64.b64encode(MARK.encode()).decode()[:-4] not in text
        return status, said

    return run


MODEL = ("--model", "model", "--device", "cpu")
BAD = ("/gone.png", "/forbidden.png", "/broken.png", "/moved.png")


def test_commands_that_read_media(run, secret):
    good = [secret(path) for path in ("/a.png", "/b.png", "/c.wav")]
    status, said = run("caption", *good, "--max_new_tokens", "2", *MODEL)
    assert status == 0 and said.count("http://127.0.0.1:") == 3
    assert run("tokenize", "a", *good, *MODEL)[0] == 0
    assert run("generate", "a", good[0], "--max_new_tokens", "2", *MODEL)[0] == 0
    for path in BAD:
        for command in (("caption",), ("tokenize", "a"), ("generate", "a")):
            status, said = run(*command, secret(path), *MODEL)
            assert status == 2 and said.count("\n") == 1 and f"{path}: " in said, said
    status, said = run("generate", "a", "--out", "image", "--file", "x.png", "--begin", secret("/gone.png"), *MODEL)
    assert status == 2 and "/gone.png: HTTP 404 (no such file)" in said


def test_inspect_and_evaluate(run, secret):
    for source in ("/good.jsonl", "/x.tar", "/x.tar.gz"):
        status, said = run("inspect", secret(source), "--rows", "9", *MODEL)
        assert status == 0 and source in said
        assert run("evaluate", secret(source), "--train", secret(source), *MODEL)[0] == 0 or source == "/good.jsonl"
    for source in ("/gone.jsonl", "/gone.tar", "/broken.tar", "/broken.jsonl", "/m.jsonl", "/refused.jsonl", "/what.zip", "/*.tar", "/prepared",
                   "/a b.tar.gz"):
        for command in ("inspect", "evaluate"):
            status, said = run(command, secret(source), *(("--rows", "9") if command == "inspect" else ()), *MODEL)
            assert status == 2 and "mmtx: error: " in said and "http://127.0.0.1:" in said or source == "/m.jsonl", said


def test_prepare(run, secret, tmp_path):
    tokenizers = ("--tokenizers", "text", "image", "audio", "--num_workers", "1", "--max_bad", "1")
    for number, source in enumerate(("/m.jsonl", "/x.tar", "/x.tar.gz")):
        assert run("prepare", secret(source), "--output", str(number), *tokenizers)[0] == 0
        assert run("prepare", secret(source), "--output", str(number), *tokenizers)[0] == 0
    plan = json.loads((tmp_path / "0" / "plan.json").read_text())
    assert plan["sources"][0].endswith(")") and "/m.jsonl (sha256 " in plan["sources"][0]
    assert json.loads((tmp_path / "0" / "prepared.json").read_text())["skipped"] == 1
    status, said = run("prepare", secret("/x.tar").replace("token=", "other="), "--output", "1", *tokenizers)
    assert status == 2 and "was begun with sources" in said
    for source in ("/refused.jsonl", "/gone.tar", "/broken.tar"):
        assert run("prepare", secret(source), "--output", "none", *tokenizers)[0] == 2
    config = {"model": {"init_args": {}}, "data": {"init_args": {"tokenizers": {}, "validation": [], "train": [{"paths": [secret("/x.tar")]}]}}}
    text = yaml.safe_dump(config)
    for broken in (text + f"\n  - [{secret('/a')}", text.replace("paths", "path"), text.replace("validation: []", f"validation: {secret('/a')}")):
        with contextlib.ExitStack() as stack:
            path = tmp_path / "config.yaml"
            path.write_text(broken)
            stack.callback(path.unlink)
            with pytest.raises(SystemExit):
                main(["prepare", "--config", str(path), "--output", "none"])
        assert run("caption", "gone.png", *MODEL)[0] == 2  # looks at what was printed


def test_the_demo(run, secret, tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    arguments = [secret(path) for path in ("/a.png", "/c.wav", *BAD)]
    monkeypatch.setattr("sys.argv", ["caption.py", *arguments, "--model", "model", "--page", "page.html"])
    status, said = run(command=lambda _: demo.main())
    assert status == 1 and said.count("/a.png") == 1
    assert all(f"{path}: " in (tmp_path / "page.html").read_text() for path in BAD)


@pytest.mark.slow
def test_fit(secret, tmp_path, monkeypatch):
    import runs

    monkeypatch.setenv("MMTX_CACHE", str(tmp_path / "cache"))
    config = runs.prepare(tmp_path / "parts", steps=40)
    data = config["data"]["init_args"]
    data |= {"train": [{"paths": [secret("/m.jsonl")]}, {"paths": [secret("/x.tar")]}], "validation": [{"paths": [secret("/x.tar.gz")]}],
             "max_bad": 0.5}
    processes = runs.start(config, tmp_path / "run")
    runs.wait_for(lambda: runs.latest(tmp_path / "run") >= 2, processes)
    assert runs.kill(processes), (tmp_path / "run.log").read_text()
    kept = tmp_path / "kept"
    shutil.copytree(tmp_path / "run" / "checkpoints", kept)
    assert runs.fit(config, tmp_path / "run", "--ckpt_path", "last") == [0], (tmp_path / "run.log").read_text()
    (saved,) = (tmp_path / "run").rglob("config.yaml")
    assert yaml.safe_load(saved.read_text())["data"]["init_args"]["train"][1]["paths"][0].endswith("/x.tar")
    # Another token leads to the same data, and these are what a resumed run compares.
    data["validation"] = [{"paths": [secret("/x.tar.gz").replace("token=", "other=")]}]
    assert runs.fit(config, tmp_path / "run", "--ckpt_path", str(next(kept.glob("step-*.ckpt")))) == [0]
    data["train"] = [{"paths": [secret("/refused.jsonl")]}]
    assert runs.fit(config, tmp_path / "refused") == [2]
    data["train"] = [{"paths": secret("/x.tar"), "limit": "many"}]
    assert runs.fit(config, tmp_path / "wrong") == [2]
    for given in ("run", "refused", "wrong"):
        (tmp_path / f"{given}.yaml").unlink()  # what the user wrote
    found = written(tmp_path)
    assert MARK not in found, found[max(0, found.index(MARK) - 500):found.index(MARK) + 50]
