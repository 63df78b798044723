"""The order of the chain, what may be imported where, and what must not be loaded before it is needed."""

import ast
import io
import keyword
import os
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHAIN = ("files", "json_files", "saved_folder", "atomic_folder", "shipped_files", "extras", "plugins", "schema", "ambient", "weights", "kernels", "varlen", "config", "embedding", "model", "modality", "vocabulary", "document", "sequence", "grammar", "data", "loss", "ctc",
         "inference", "attention", "hub", "medium", "items", "conversation", "batching", "model_folder", "processor", "streaming", "subtitles", "pipeline", "captioning", "evaluation", "report", "run_page", "scaling", "interop", "serving", "training", "commands", "cli")
ANYWHERE = ("errors",)
FILES = sorted((ROOT / "mmtx").rglob("*.py"))


def home(path: Path) -> str:
    """The link of the chain that a file belongs to: `mmtx/data/media.py` -> "data"."""
    return path.relative_to(ROOT / "mmtx").with_suffix("").parts[0]


def imported(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, at the top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
            if node.module == "mmtx":
                names |= {f"mmtx.{alias.name}" for alias in node.names}
    return names


def tree() -> list[str]:
    """The modules of mmtx as the tree in docs/architecture.md lists them: "mmtx.data.media"."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    names, folder = [], ""
    for indent, name in re.findall(r"^( +)([\w/.]+) ", text.split("```text\nmmtx/\n")[1].split("\nconfigs/")[0], re.M):
        if name.endswith("/"):
            folder = name[:-1]
        elif name.endswith(".py"):
            names.append("mmtx." + (f"{folder}." if len(indent) > 2 else "") + name[:-3])
    return names


def test_the_tree_of_the_docs_names_every_file():
    dotted = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES if not path.name.startswith("__")}
    assert sorted(tree()) == sorted(dotted)


@pytest.mark.parametrize("path", [p for p in FILES if p.parent != ROOT / "mmtx" and not p.name.startswith("__")],
                         ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_within_a_folder_only_from_above(path):
    """In the order of the tree, which is the order to read in. What a function imports, when it is called, may come later."""
    names = tree()
    folder = f"mmtx.{path.parent.name}."
    above = names[:names.index(folder + path.stem)]
    top = {node.module for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ImportFrom)}
    assert {name for name in top if name.startswith(folder)} <= set(above)


def test_every_file_has_a_place_in_the_chain():
    assert {home(path) for path in FILES} == {*CHAIN, *ANYWHERE, "__init__", "__main__"}


@pytest.mark.parametrize("path", [p for p in FILES if home(p) in CHAIN], ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_only_from_the_left(path):
    right = CHAIN[CHAIN.index(home(path)) + 1:]
    used = {name.split(".")[1] for name in imported(path) if name.startswith("mmtx.")}
    assert not used & set(right)


def test_errors_import_nothing_of_ours():
    assert imported(ROOT / "mmtx" / "errors.py") <= {"unicodedata"}


def test_the_whole_decoder_stands_in_one_file_of_at_most_250_lines():
    text = (ROOT / "mmtx" / "model.py").read_text(encoding="utf-8")
    made = [node.name for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    assert made[-6:] == ["FusedLinear", "RMSNorm", "Attention", "FeedForward", "Block", "Decoder"]
    assert len(text.splitlines()) <= 250


def test_lightning_is_imported_in_training_only():
    users = {home(path) for path in FILES for name in imported(path)
             if name.split(".")[0] in ("lightning", "pytorch_lightning", "jsonargparse")}
    assert users == {"training"}


def code_lines(path: Path, shape: bool) -> list[tuple[int, str]]:
    """Numbers and tokens of the lines that do something; as `shape` without names and values, and without what only declares them."""
    text, rows = path.read_text(encoding="utf-8"), {}
    passed = {line for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)
              or isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for line in range(node.lineno, node.end_lineno + 1)}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.NAME, tokenize.NUMBER, tokenize.STRING, tokenize.OP) and token.start[0] not in passed:
            fixed = not shape or token.type == tokenize.OP or keyword.iskeyword(token.string)
            rows.setdefault(token.start[0], []).append(token.string if fixed else tokenize.tok_name[token.type])
    return [(number, " ".join(row)) for number, row in sorted(rows.items()) if any(word[0].isalnum() for word in row)
            and not (shape and (row[1:2] == [":"] or row[:2] == ["NAME", "="] and len(row) == 3))]


@pytest.mark.parametrize("shape", [False, True], ids=["to the letter", "with other names"])
def test_no_ten_lines_are_written_twice(shape):
    first, again = {}, []
    for path in FILES:
        lines = code_lines(path, shape)
        for i in range(len(lines) - 9):
            place = first.setdefault(tuple(text for _, text in lines[i:i + 10]), (path, i, lines[i][0]))
            if place[0] != path or i - place[1] >= 10:
                again.append(f"{place[0].relative_to(ROOT)}:{place[2]} ~ {path.relative_to(ROOT)}:{lines[i][0]}")
    assert not again


@pytest.mark.parametrize("folder", ["tokenizers", "configs"])
def test_artefact_folders_hold_no_code(folder):
    # An importable `tokenizers` would shadow the Hugging Face package of that name.
    assert (ROOT / folder).is_dir()
    assert not list((ROOT / folder).rglob("*.py"))


def loaded_after(code: str) -> set[str]:
    """Top-level packages in memory after `code` ran in a new interpreter."""
    tail = "import sys; print('LOADED', *sorted({name.split('.')[0] for name in sys.modules}))"
    result = subprocess.run([sys.executable, "-c", f"{code}\n{tail}"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.splitlines()[-1].split()[1:])


def test_no_test_is_named_by_bytes(request):
    """Files that tests make may hold the time, and processes that collect at different seconds would find different tests."""
    made = [item for item in request.session.items if hasattr(item, "callspec")]
    named = [item.nodeid for item in made for value in item.callspec.params.values()
             if isinstance(value, bytes) and len(value) > 16 and repr(value)[2:12] in item.nodeid]
    assert not named


def test_import_and_help_load_nothing_heavy():
    loaded = loaded_after("""
import mmtx, mmtx.cli
assert "load" in dir(mmtx)
for arguments in (["--help"], ["caption", "--help"]):
    try:
        mmtx.cli.main(arguments)
    except SystemExit as stop:
        assert stop.code == 0
""")
    assert "mmtx" in loaded
    assert not loaded & {"torch", "torchaudio", "torchvision", "lightning", "jsonargparse", "numpy", "sentencepiece"}


@pytest.mark.parametrize(("code", "given", "count"), [
    ("import mmtx; mmtx.load", {}, "1000"),
    ("import mmtx.cli; mmtx.cli.main(['tokenize', 'a'])", {}, "1000"),
    ("import mmtx; mmtx.load", {"GOMP_SPINCOUNT": "7"}, "7"),
    ("import mmtx; mmtx.load", {"OMP_WAIT_POLICY": "PASSIVE"}, "0"),
])
def test_threads_of_torch_spin_for_a_short_while(code, given, count):
    kept = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env={**kept, **given, "OMP_DISPLAY_ENV": "VERBOSE"})
    found = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    if not found:
        pytest.skip("this torch was not built with GNU OpenMP")
    assert set(found) == {count}


def test_captions_load_no_lightning(tiny_model, tmp_path):
    tiny_model.save(tmp_path / "model")
    loaded = loaded_after(f"""
import mmtx, numpy, torch
torch.set_num_threads(1)
model = mmtx.load({str(tmp_path / "model")!r}, device="cpu")
assert isinstance(model.caption(numpy.zeros((9, 9, 3), numpy.uint8), max_new_tokens=2), str)
""")
    assert "torch" in loaded
    assert not loaded & {"lightning", "pytorch_lightning", "jsonargparse", "torchmetrics"}
