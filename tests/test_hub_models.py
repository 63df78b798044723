"""Models to and from the Hugging Face hub. The hub is a server on loopback (tests/hub_server.py) that speaks as much of the real
one's HTTP interface as huggingface_hub and datasets ask for; they are the real libraries, in processes of their own, as a user has them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hub_server import commit_of, hub
from PIL import Image
from test_interop import save_model

from mmtx.data.collection import DataSource
from mmtx.data.prepare import prepare
from mmtx.errors import InputError
from mmtx.pipeline import load

pytest.importorskip("huggingface_hub")
ROOT = Path(__file__).parents[1]
START = "import json, numpy as np, torch, mmtx; torch.set_num_threads(1); from mmtx import InputError\n"
ASK = "print(json.dumps([model.generate('hello', max_new_tokens=6), model.tokenize([mmtx.Image(np.full((16, 16, 3), 99, np.uint8))])]))"


def run(server, home, code, *arguments, fails=False, **environment):
    """What a program prints whose libraries take `server` for the hub and keep files in `home`."""
    given = {**os.environ, "HF_ENDPOINT": server.address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
             "HF_TOKEN": "own", "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", **environment}
    command = [sys.executable, "-c", START + code, *map(str, arguments)] if code else [sys.executable, "-m", "mmtx", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=given, timeout=120)
    assert (done.returncode != 0) == fails, done.stderr
    return done.stderr if fails else done.stdout


@pytest.fixture
def server():
    with hub() as server:
        server.token = "own"
        yield server


def test_a_model_is_sent_and_fetched_and_answers_as_before(server, tiny_model, tmp_path):
    tiny_model.save(tmp_path / "model")
    push = f"model = mmtx.load({str(tmp_path / 'model')!r}, 'cpu'); print(model.push_to_hub('user/tiny')); {ASK}"
    url, here = run(server, tmp_path / "home", push).splitlines()
    assert url == f"{server.address}/user/tiny"
    files = server.repositories["models/user/tiny"]
    written = {str(path.relative_to(tmp_path / "model")): path.read_bytes() for path in (tmp_path / "model").rglob("*") if path.is_file()}
    assert {name: data for name, data in files.items() if name != "README.md"} == written
    card = files["README.md"].decode()
    assert "library_name: mmtx\npipeline_tag: any-to-any" in card and 'mmtx.load("user/tiny")' in card
    size = sum(parameter.numel() for parameter in tiny_model.decoder.parameters())
    assert f"text, image and audio: {size:,} parameters" in card and f"| image | {tiny_model.tokenizers['image'].size:,} |" in card

    there = run(server, tmp_path / "other", f"model = mmtx.load('user/tiny', 'cpu'); {ASK}").strip()
    assert there == here and len(json.loads(there)[1]) > 4
    files["pickle.bin"], asked = b"\x80", len(server.asked)
    named = run(server, tmp_path / "other", "", "tokenize", "hello", "--model", f"user/tiny@{commit_of(files)}", "--device", "cpu")
    assert named.split() == list(map(str, tiny_model.tokenize("hello")))
    assert len(server.asked) > asked and not any("pickle" in path for path in server.asked)
    # Once fetched, it is there without a hub.
    assert run(server, tmp_path / "other", f"model = mmtx.load('user/tiny', 'cpu'); {ASK}", HF_HUB_OFFLINE="1").strip() == here


def test_a_card_is_renewed_unless_it_is_the_users_own(server, tiny_model, tmp_path):
    tiny_model.save(tmp_path / "model")
    own, ours = b"My own words.", b"<!-- written by mmtx: a later push writes it anew, unless this line is taken away -->\nold"
    for name, card in (("own", own), ("ours", ours)):
        server.repositories[f"models/user/{name}"] = {"README.md": card}
    run(server, tmp_path / "home", f"""
model = mmtx.load({str(tmp_path / 'model')!r}, 'cpu')
for name in ("user/own", "user/ours"):
    model.push_to_hub(name)""")
    assert server.repositories["models/user/own"]["README.md"] == own and "model.safetensors" in server.repositories["models/user/own"]
    assert b"# ours" in server.repositories["models/user/ours"]["README.md"]


def test_what_fails_is_told_in_one_line(server, tiny_model, tmp_path):
    server.repositories["models/user/tiny"] = {"config.json": b"{}"}
    tiny_model.save(tmp_path / "model")
    code = f"""
for name in ("user/none", "user/tiny@v9", "user/tiny"):
    try:
        mmtx.load(name)
    except InputError as error:
        print(error)
try:
    mmtx.load({str(tmp_path / "model")!r}, "cpu").push_to_hub("user/tiny")
except InputError as error:
    print(error)
"""
    said = run(server, tmp_path / "home", code, HF_TOKEN="other").splitlines()
    assert len(said) == 4
    for line, words in zip(said, (["user/none: no such folder here, and not fetched from the hub (RepositoryNotFoundError: 404"],
                                  ["user/tiny@v9: no such folder here", "RevisionNotFoundError"], ["config.json: not a model of mmtx"],
                                  ["user/tiny: not sent to the hub (", "401"])):
        assert all(word in line for word in words), line
    said = run(server, tmp_path / "home", "", "tokenize", "hello", "--model", "user/none", fails=True, HF_ENDPOINT="http://127.0.0.1:9")
    assert said.startswith("mmtx: error: user/none: no such folder here, and not fetched from the hub (") and said.count("\n") == 1
    with pytest.raises(InputError, match="push_to_hub: found the name 'tiny', expected one like user/model"):
        tiny_model.push_to_hub("tiny")
    with pytest.raises(InputError, match="no/such/folder: no such folder or file, neither here nor"):
        load("no/such/folder")


@pytest.mark.slow
def test_a_pretrained_model_is_converted_from_the_hub(server, tmp_path):
    save_model(tmp_path / "in", "qwen3")
    files = {path.name: path.read_bytes() for path in (tmp_path / "in").iterdir()}
    server.repositories["models/user/qwen"] = {**files, "pytorch_model.bin": b"\x80"}
    told = run(server, tmp_path / "home", "", "convert", "--from", "user/qwen", "--output", tmp_path / "there")
    assert "turns by its chat template" in told
    run(server, tmp_path / "home", "", "convert", "--from", tmp_path / "in", "--output", tmp_path / "here")
    for name in ("config.json", "model.safetensors", "vocabulary.json", "text/config.json"):
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    assert not any("pytorch_model" in path for path in server.asked)


@pytest.mark.slow
def test_a_data_set_of_the_hub_with_fields_of_other_names(server, tiny_model, tokenizers, tmp_path):
    datasets = pytest.importorskip("datasets")
    import pyarrow
    import soundfile

    pictures = [Image.fromarray(np.full((24, 24, 3), shade, np.uint8)) for shade in (40, 200)]
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
    soundfile.write(tmp_path / "note.wav", np.sin(np.arange(4000) / 9).astype(np.float32), 16000)
    media = [{"bytes": (tmp_path / name).read_bytes(), "path": None} for name in ("0.png", "1.png", "note.wav")]
    kinds = datasets.Features({"img": datasets.Image(), "sound": datasets.Audio(decode=False), "label": datasets.Value("string")})
    rows = {"img": [*media[:2], None], "sound": [None, None, media[2]], "label": ["dark", "bright", "a note"]}
    table = pyarrow.Table.from_pydict(rows, schema=kinds.arrow_schema)
    datasets.Dataset(datasets.table.InMemoryTable(table)).to_parquet(tmp_path / "train.parquet")
    server.repositories["datasets/user/set"] = {"data/train-00000-of-00001.parquet": (tmp_path / "train.parquet").read_bytes(), "README.md": b"# set\n"}
    tiny_model.save(tmp_path / "model")
    fields = {"image": "img", "audio": "sound", "text": "label"}
    config = {"paths": ["hf://user/set:train"], "fields": fields}
    code = """
import sys
from mmtx.data.collection import DataSource
from mmtx.data.prepare import prepare
tokenizers = mmtx.load(sys.argv[1], "cpu").tokenizers
prepare(DataSource(**json.loads(sys.argv[2])), tokenizers, sys.argv[3], num_workers=1)
"""
    run(server, tmp_path / "home", code, tmp_path / "model", json.dumps(config), tmp_path / "there")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [
        {"img": "0.png", "label": "dark"}, {"img": "1.png", "label": "bright"}, {"sound": "note.wav", "label": "a note"}]))
    prepare(DataSource([str(tmp_path / "rows.jsonl")], fields=fields), tokenizers, tmp_path / "here", num_workers=1)
    found, expected = (safetensors.numpy.load_file(tmp_path / name / "shard-00000.safetensors") for name in ("there", "here"))
    assert len(found["ids"]) > 30 and all(np.array_equal(found[name], expected[name]) for name in found if "names" not in name)
    assert any("/resolve/" in path and "parquet" in path for path in server.asked)
