"""A fourth modality from a file outside of the package: trained, saved, loaded and used by the same commands."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml

from mmtx.commands.media import write_media
from mmtx.data.sample import Media
from mmtx.data.storage import MemorySource
from mmtx.data.tokens import load_media
from mmtx.errors import InputError
from mmtx.modality.registry import MODALITIES, Modality

ROOT = Path(__file__).parents[1]
PLUGIN = ROOT / "demos" / "motion.py"
CLASSES = ("still", "shaking")
# Runs all commands in one process, for most of the time of each goes to imports, and says how each ended.
SCRIPT = """
import contextlib, io, json, sys, torch
from mmtx.cli import main
torch.set_num_threads(1)
told = []
for arguments in json.load(sys.stdin):
    sys.argv = ["mmtx", *arguments]
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as stop:
            status = stop.code or 0
    told.append((status, out.getvalue(), err.getvalue()))
print("TOLD", json.dumps(told))
"""


class Told(NamedTuple):
    status: int
    out: str
    err: str


def run(folder: Path, *commands: list) -> list[Told]:
    """What each command line printed, all in one process that begins without any plugin."""
    words = json.dumps([[str(word) for word in command] for command in commands])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", SCRIPT], input=words, cwd=folder, env=environment, capture_output=True, text=True,
                          timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return [Told(*told) for told in json.loads(done.stdout.split("TOLD ")[1])]


def write_series(folder: Path, count: int, seed: int) -> None:
    """Series of two classes that differ in strength, with captions beside them."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for number in range(count):
        name = CLASSES[number % 2]
        series = random.normal(scale=8.0 if name == "shaking" else 0.1, size=(6, 40 + number % 3))
        np.save(folder / f"{number:02}.npy", series.astype(np.float32))
        (folder / f"{number:02}.txt").write_text(name)


def small(name: str, steps: int, **data) -> dict:
    """A shipped configuration with smaller networks and few steps."""
    config = yaml.safe_load((ROOT / "configs" / "motion" / name).read_text())
    config["data"]["init_args"] |= data
    config["model"]["init_args"]["optimizer"]["warmup_steps"] = 5
    config["trainer"] |= {"max_steps": steps, "val_check_interval": steps, "accelerator": "cpu", "enable_progress_bar": False, "logger": False}
    return config


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with data, the YAMLs of the demo for them, and a finished tokenizer and decoder."""
    folder = tmp_path_factory.mktemp("motion")
    for part, count in (("train", 16), ("test", 8)):
        write_series(folder / "data" / part, count, len(part))
    train, test = ({"paths": [str(folder / "data" / part)]} for part in ("train", "test"))
    pictures = {"paths": [str(ROOT / "demos/data/starter/images-train-004.tar.gz")], "limit": 4}
    tokenizer = small("tokenizer.yaml", 30, train=[train], validation=[test])
    tokenizer["model"]["init_args"]["tokenizer"]["init_args"]["config"] |= {"chunk": 4, "network": {
        "width": 16, "heads": 1, "encoder_depth": 1, "decoder_depth": 1, "levels": [4, 3]}}
    decoder = small("decoder.yaml", 120, train=[train, pictures], validation=[test], num_workers=1)
    decoder["model"]["init_args"]["decoder"] |= {"width": 48, "depth": 1, "heads": 2, "kv_heads": 2, "head_dim": 16, "mlp_dim": 64}
    decoder["data"]["init_args"]["tokenizers"] = {
        "text": str(ROOT / "tokenizers/text"), "image": str(ROOT / "tokenizers/image"), "motion": "runs/motion/tokenizer/model"}
    for name, config in (("tokenizer", tokenizer), ("decoder", decoder)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**config, "save_every": 60, "samples": 2}))
    plugin = ["--plugin", PLUGIN]
    told = run(folder, ["fit", *plugin, "--config", "tokenizer.yaml", "--trusted_only", "true"],
               ["--plugin", PLUGIN, "fit", "--config", "decoder.yaml"])
    assert [each.status for each in told] == [0, 0], told
    return folder


def model(work: Path) -> Path:
    return work / "runs/motion/decoder/model"


def test_the_demo_is_one_short_file_that_needs_nothing_but_mmtx():
    text = PLUGIN.read_text()
    assert len(text.splitlines()) < 150 and "aeon" not in [line.split()[1] for line in text.splitlines() if line.startswith("import")]


@pytest.mark.slow
def test_a_model_folder_holds_the_modality_and_its_tags_in_free_slots(work):
    entries = json.loads((model(work) / "vocabulary.json").read_text())["modalities"]
    assert [entry["kind"] for entry in entries] == ["text", "image", "motion"]
    assert entries[2]["tags"] == [254, 255] and entries[2]["bands"] == 2 and entries[2]["levels"] == [4, 3]
    assert "tags" not in entries[0] and "tags" not in entries[1]
    assert sorted(path.name for path in (model(work) / "motion").iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((model(work) / "config.json").read_text())["decoder"]
    assert config["features"]["motion"] == 16 and "motion.py" not in (model(work) / "config.json").read_text()


@pytest.mark.slow
def test_the_same_commands_caption_evaluate_prepare_and_generate(work):
    plugin, used = ["--plugin", PLUGIN], ["--model", model(work)]
    caption, several, evaluate, inspect, prepare, generate, further = run(
        work,
        ["caption", *plugin, *used, "data/test/00.npy"],
        ["caption", *used, "data/test"],  # the plugin is there already in this process
        ["evaluate", *used, "data/test", "--train", "data/train", "--show", "2"],
        ["inspect", *used, "data/test"],
        ["prepare", "--tokenizers", ROOT / "tokenizers/text", "runs/motion/tokenizer/model", "--output", "prepared", "--num_workers", "2",
         "--features", "data/train"],
        ["generate", *used, "--out", "motion", "--file", "made.npy", "--max_new_tokens", "9", "shaking"],
        ["generate", *used, "--max_new_tokens", "4", work / "data/test/01.npy"],
    )
    assert caption == Told(0, "still\n", "")
    assert [line.split("\t")[1] for line in several.out.splitlines()] == [*CLASSES] * 4
    figures = next(line for line in evaluate.out.splitlines() if line.startswith("exact caption"))
    assert figures.split()[2:3] == ["1.000"] and figures.split()[5] == "1.000" and figures.split()[-1] == "8"
    assert "<motion>" in inspect.out and "</motion>" in inspect.out and inspect.out.startswith("special, text, image, audio, motion;")
    assert "prepared: 16 documents" in prepare.out and f"mmtx fit --plugin {PLUGIN} --config" in prepare.out
    facts = json.loads((work / "prepared" / "prepared.json").read_text())
    assert facts["features"] == {"motion": 16} and facts["media"]["motion"] == 6 * 8 * 2 + 10 * 9 * 2  # 40, or 41 and 42 samples
    assert generate.status == 0
    made = np.load(work / "made.npy")
    assert made.shape[0] == 6 and made.shape[1] % 5 == 0 and np.isfinite(made).all()
    assert further.status == 0


@pytest.mark.slow
def test_a_run_that_is_resumed_goes_on_and_is_validated(work):
    """What the fixture left, at a checkpoint before its end."""
    checkpoint = work / "runs/motion/decoder/checkpoints"
    (early,) = [path for path in checkpoint.iterdir() if "60" in path.name and path.suffix == ".ckpt"]
    resumed, validated = run(work, ["fit", "--plugin", PLUGIN, "--config", "decoder.yaml", "--output", "again", "--ckpt_path", early],
                             ["validate", "--config", "decoder.yaml"])
    assert (resumed.status, validated.status) == (0, 0), (resumed, validated)
    for name in ("motion/model.safetensors", "vocabulary.json", "model.safetensors"):
        assert (work / "again/model" / name).read_bytes() == (model(work) / name).read_bytes()
    assert "val/loss_text" in validated.out


@pytest.mark.slow
def test_what_needs_the_plugin_says_so_in_one_line(work):
    loading, tokenizer, fitting = run(
        work,
        ["caption", "--model", model(work), "data/test/00.npy"],
        ["prepare", "--tokenizers", ROOT / "tokenizers/text", "runs/motion/tokenizer/model", "--output", "no", "data/train"],
        ["fit", "--config", "tokenizer.yaml"],
    )
    for told, words in ((loading, "found the modality 'motion', which is none of text, image, audio; expected --plugin FILE"),
                        (tokenizer, "field 'kind' is 'motion', expected 'text' or"), (fitting, "motion")):
        assert told.status == 2 and words in told.err and told.err.count("\n") == 1, told


@pytest.mark.slow
def test_a_model_with_codes_alone_names_the_missing_plugin_too(work, tmp_path):
    from mmtx.vocabulary import Vocabulary

    with pytest.raises(InputError, match="vocabulary.json: found the modality 'motion', .*--plugin FILE"):
        Vocabulary.load(model(work) / "vocabulary.json")


STUB = """
from mmtx.modality.base import MediaTokenizer
from mmtx.modality.registry import Modality, register
class Stub(MediaTokenizer):
    kind = {kind!r}
    size = 4
    device = None
    decode = files = from_folder = grid = embed_batch = len
{more}
register(Modality({kind!r}, {layout!r}, {{{word!r}: Stub}}, read={read}, extensions=({extension!r},){facts}))
"""


def stub(**changes) -> str:
    return STUB.format(**{"kind": "smell", "layout": "steps", "word": "smell", "read": "len", "extension": ".smell", "more": "", "facts": "", **changes})


BAD = [
    ("broken.py", "x = 1\ny = 1 / 0\n", "broken.py: cannot be imported (ZeroDivisionError in line 2: division by zero)"),
    ("syntax.py", "def :\n", "syntax.py: cannot be imported (SyntaxError"),
    ("lost.py", "import no_such_package\n", "cannot be imported (ModuleNotFoundError in line 1: No module named 'no_such_package')"),
    ("nothing.py", "x = 1\n", "nothing.py: registered no modality, expected a call of mmtx.modality.registry.register"),
    ("taken.py", stub(kind="image"), "taken.py: modality 'image': there already, expected another kind than text, image, audio"),
    ("suffix.py", stub(extension=".png"), "modality 'smell': found '.png' in extensions, which 'image' already uses"),
    ("dotless.py", stub(extension="smell"), "modality 'smell': found the extension 'smell', expected one in lower case with its dot"),
    ("upper.py", stub(extension=".SML"), "modality 'smell': found the extension '.SML', expected one in lower case with its dot"),
    ("captions.py", stub(extension=".json"), "modality 'smell': found the extension '.json', which captions have, expected another"),
    ("letters.py", stub(facts=", fields=('scent')"), "Modality: fields: found 'scent', expected a list of strings"),
    ("worded.py", stub(word="audio"), "modality 'smell': found 'audio' in tokenizers, which 'audio' already uses"),
    ("lacking.py", stub(more="    grid = MediaTokenizer.grid\n    files = MediaTokenizer.files"), "tokenizer 'smell': Stub lacks files, grid"),
    ("unread.py", stub(read="None"), "modality 'smell': found read None, expected a function"),
    ("laid.py", stub(layout="ring"), "Modality: layout: found 'ring', expected one of 'pieces', 'grid', 'steps'"),
    ("named.py", stub(kind="any"), "modality: found the kind 'any', expected a lower-case word other than special, any"),
    ("json.py", stub(), "json.py: found another module of the name 'json', expected a name of its own"),
    ("no-name.py", stub(), "no-name.py: found the name 'no-name', expected letters, digits and underscores, so that Python can import it"),
]


@pytest.fixture(scope="module")
def bad_plugins(tmp_path_factory) -> dict[str, Told]:
    folder = tmp_path_factory.mktemp("plugins")
    (folder / "bad").mkdir()
    for name, text, _ in BAD:
        (folder / "bad" / name).write_text(text)
    return dict(zip([name for name, _, _ in BAD], run(folder, *(["tokenize", "--plugin", f"bad/{name}", "a"] for name, _, _ in BAD))))


@pytest.mark.parametrize("name, text, words", BAD, ids=[name for name, _, _ in BAD])
def test_a_plugin_that_cannot_be_used_is_told_in_one_line(bad_plugins, name, text, words):
    told = bad_plugins[name]
    assert told.status == 2 and told.err.count("\n") == 1 and told.err.startswith(f"mmtx: error: plugin bad/{name}: "), told
    assert words in told.err


@pytest.mark.parametrize("error, told", [(ValueError("no\nheader"), "row 1: x.smell: ValueError: no header"),
                                         (InputError("x.smell: empty"), "x.smell: empty")])
def test_a_file_that_a_plugin_cannot_read_is_named(monkeypatch, error, told):
    def read(*_):
        raise error

    monkeypatch.setitem(MODALITIES, "smell", Modality("smell", "steps", {"smell": "no:Stub"}, read=read))
    with pytest.raises(InputError, match=f"^{told}$"):
        load_media(Media("smell", "row 1: x.smell", MemorySource(b"x")), {"smell": None})


def test_a_plugin_lies_in_the_home_of_the_user(tmp_path):
    (tmp_path / "scents_at_home.py").write_text(stub())
    code = "import mmtx; mmtx.load_plugin('~/scents_at_home.py'); from mmtx.modality.registry import MODALITIES; assert 'smell' in MODALITIES"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "HOME": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_plugin_that_is_not_there_and_one_without_a_name(tmp_path):
    missing, unnamed, after = run(tmp_path, ["tokenize", "--plugin", "no.py", "a"], ["tokenize", "a", "--plugin"],
                                  ["tokenize", "--", "--plugin"])
    assert missing.err == "mmtx: error: plugin no.py: found no such Python file, expected NAME.py\n"
    assert unnamed.err == "mmtx: error: argument --plugin: expected one argument (see mmtx --help)\n"
    assert after.status == 0 and after.out.split()[0] == "1025"


def test_an_array_is_written_as_npy_and_as_nothing_else(tmp_path):
    """A generated series in a file of the modality's own format was one of NumPy's, which the modality does not read."""
    for name in ("made.npy", "made"):
        write_media(np.arange(3), tmp_path / name)
        assert np.load(tmp_path / name).tolist() == [0, 1, 2]
    with pytest.raises(InputError, match=r"made.csv: found the extension '.csv', expected .npy, as an array is written"):
        write_media(np.arange(3), tmp_path / "made.csv")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["made", "made.npy"]


def test_grids_of_a_plugin_and_two_plugins_share_the_vocabulary(tmp_path):
    """Two further modalities, one of them a grid: ids, tags, streams and the grammar, which need no code of theirs."""
    (tmp_path / "smell.py").write_text(stub(layout="grid"))
    (tmp_path / "touch.py").write_text(stub(kind="touch", word="touch", extension=".touch", more="    bands = 2"))
    script = """
import numpy as np, torch
from mmtx import load_plugin
load_plugin("smell.py"), load_plugin("touch.py"), load_plugin("touch.py")
from mmtx.document import Document, MediaPart, TextPart, Turn
from mmtx.grammar import Grammar
from mmtx.sequence import code_follows, parse, render
from mmtx.vocabulary import Entry, Vocabulary
v = Vocabulary.of({"format": 1, "slots": 256, "modalities": [
    {"kind": "text", "start": 0, "size": 9, "fingerprint": "0" * 64, "levels": None, "bands": None},
    {"kind": "smell", "start": 265, "size": 4, "fingerprint": "1" * 64, "levels": None, "bands": None, "tags": [254, 255]},
    {"kind": "touch", "start": 269, "size": 6, "fingerprint": "2" * 64, "levels": [3, 2], "bands": 2, "tags": [252, 253]},
]}, "here")
parts = (TextPart([1, 2]), MediaPart("smell", [[0, 1, 2], [3, 0, 1]]), MediaPart("touch", [[0, 5], [1, 2]]))
document = Document((Turn("user", parts), Turn("assistant", (TextPart([3]),))))
ids = render(document, v).ids
assert parse(ids, v) == document
assert [v.name(i) for i in (v.opening("smell"), v.closing("touch"))] == ["<smell>", "</touch>"] and v.opening("smell") == 9 + 254
assert ids[4:7].tolist() == [v.opening("smell"), v.height(2), v.width(3)]
assert v.modality_names == ("special", "text", "image", "audio", "smell", "touch") and v.modality_of(265) == 4
assert [int(i) for i in np.flatnonzero(code_follows(ids, v))] == [6, 7, 8, 9, 10, 11, 12, 14, 15, 16, 17, 18]
grammar = Grammar(v)
state = grammar.start(2, ["smell", "touch"])
for step in ([v.opening("smell"), v.opening("touch")], [v.height(1), 269], [v.width(2), 270], [265, 271], [266, 272]):
    assert grammar.allowed(state)[[0, 1], step].all()
    state = grammar.advance(state, torch.tensor(step))
allowed = grammar.allowed(state)
assert allowed[0].nonzero().flatten().tolist() == [v.closing("smell")]
assert allowed[1].nonzero().flatten().tolist() == [v.closing("touch"), *range(269, 275)]
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True)
    assert done.stdout == "fine\n", done.stderr
