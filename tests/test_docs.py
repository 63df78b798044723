"""Every command and every block of Python in the README and the docs runs as printed: trainings with fewer steps, evaluations on
fewer samples.

A block behind a comment `<!-- not run: why -->` is left out; its commands, and those in configs, docstrings and the Makefile, are
parsed. Blocks of a page run in their order in one folder that looks like a checkout; blocks of Python of a page share their names.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from conftest import Codes

from mmtx.cli import TRAINING, _parser
from mmtx.document import Document, MediaPart, TextPart, Turn
from mmtx.errors import InputError
from mmtx.sequence import parse, render
from mmtx.training import run as training
from mmtx.vocabulary import Vocabulary

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
DOCUMENTED = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "Makefile", *(
    path for folder in ("benchmarks", "configs", "demos", "tokenizers") for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".md", ".yaml", ".py"))]
PARTS = {"text": TextPart, "image": partial(MediaPart, "image"), "audio": partial(MediaPart, "audio")}
CHECKOUT = ("benchmarks", "configs", "demos", "tokenizers", "docs", "Makefile", "constraints.txt")
SHORT = "--trainer.max_steps 2 --trainer.val_check_interval 2 --samples 2"  # what a training in the docs is made shorter by
# Runs each line, the text of a block, in the same names and says that it is done.
INTERPRETER = """def run(names):
    import json, sys
    for block in sys.stdin:
        exec(json.loads(block), names)
        print("\\n\\0", flush=True)
run(globals())
"""


class Block(NamedTuple):
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    """The blocks of a page that are to run."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"^(?P<skip><!-- not run: .+? -->\n+)?```(?P<language>sh|python)\n(?P<text>.*?)^```$", text, re.M | re.S)
    return [Block(language, block) for skip, language, block in found if not skip]


def shortened(commands: str, folder: Path) -> str:
    """Shell commands, those that train with few steps, those that evaluate on few samples."""
    commands = commands.replace("\\\n", " ")
    lines = []
    for line in commands.splitlines():
        if line.startswith("mmtx fit") and "/text.yaml" not in line:
            line = f"{line.split('#')[0]} {SHORT}"
        lines.append(re.sub(r"^(mmtx evaluate )(\S+\.tar\.gz)", lambda found: found[1] + first_samples(found[2], folder), line))
    return "\n".join(lines)


def first_samples(shard: str, folder: Path) -> str:
    """The name of a shard in `folder` with the first samples of another."""
    few = folder / f"few-{Path(shard).stem}"
    with tarfile.open(ROOT / shard) as tar, tarfile.open(few, "w") as made:
        for member in [tar.next() for _ in range(32)]:
            made.addfile(member, tar.extractfile(member))
    return few.name


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.relative_to(ROOT).as_posix())
@pytest.mark.timeout(900)
def test_a_page_runs_as_printed(page, tmp_path):
    for name in CHECKOUT:
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
    told = tmp_path / "stderr"
    with told.open("w") as errors, subprocess.Popen([sys.executable, "-c", INTERPRETER], cwd=tmp_path, env=environment, text=True,
                                                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors) as python:
        for block in blocks(page):
            if block.language == "sh":
                command = ["bash", "-euo", "pipefail", "-c", shortened(block.text, tmp_path)]
                done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
                assert done.returncode == 0, f"{block.text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
                continue
            python.stdin.write(json.dumps(block.text) + "\n")
            python.stdin.flush()
            if "\0\n" not in python.stdout:  # reads up to it, or to the end
                pytest.fail(f"{block.text}\n{told.read_text()[-2000:]}")
    assert python.returncode == 0, told.read_text()[-2000:]


def commands(begin: str) -> dict[str, Path]:
    """Command lines that begin with `begin`, of code, comments and docstrings, and those in prose that name a path -> their file."""
    found = {}
    for path in DOCUMENTED:
        text = path.read_text(encoding="utf-8").replace("$(MMTX)", "mmtx").replace("$(VENV)/bin/", "")
        text = re.sub(r"\\+\n\s*", " ", re.sub(r"\$\(\w+\)", "", text))
        for prose, line in re.findall(
                rf"`({begin}(?=[^\n`]*/)[^\n`]*)`|^[#\s]*(?:[A-Z_]+=\S+ )*({begin}[^\n'#]*(?:'[^']*'[^\n'#]*)*)", text, re.M):
            found[prose or line] = path
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_documented_commands_of_mmtx_parse(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    lines = commands(r"mmtx [a-z]+ (?=[^\n`]*--)")
    assert len(lines) > 60
    for line, path in lines.items():
        words = shlex.split(line)[1:]
        if "--plugin" in words:  # tests/test_plugin.py runs them, in processes of their own
            continue
        if words[0] == "fit" and {word for word in words if word.startswith("--")} <= {"--config", "--output"}:
            continue  # tests/test_configs.py builds what they do
        try:
            if words[0] in TRAINING:
                with pytest.raises(SystemExit):
                    training.main(words[0], [*words[1:], "--print_config"])
            else:
                _parser().parse_args(words)
        except InputError as error:
            pytest.fail(f"{path.relative_to(ROOT)}: {line}\n{error}")
        capsys.readouterr()


def test_documented_options_of_scripts_exist():
    lines = commands(r"python \S+\.py ?")
    assert len(lines) > 60
    for line, path in lines.items():
        script, *words = shlex.split(line)[1:]
        file = next((folder / script for folder in (ROOT, path.parent) if (folder / script).exists()), None)
        assert file, f"{path.relative_to(ROOT)}: {script}"
        known = file.read_text(encoding="utf-8")
        missing = [word for word in words if word.startswith("--") and f'"{word}"' not in known]
        assert not missing, f"{path.relative_to(ROOT)}: {line}"


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not target.startswith(("http", "mailto")):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_is_a_front_page():
    assert (ROOT / "README.md").stat().st_size <= 9000


def test_vectors_of_the_stream_format():
    """What docs/stream.md says of the ids, by numbers that are written down."""
    vectors = json.loads((ROOT / "docs" / "stream-vectors.json").read_text(encoding="utf-8"))
    sizes = vectors["vocabulary"]
    vocabulary = Vocabulary.build({
        "text": Codes("text", (sizes["text"],)), "image": Codes("image", tuple(sizes["image"]["levels"])),
        "audio": Codes("audio", tuple(sizes["audio"]["levels"]))})
    for vector in vectors["documents"]:
        document = Document(tuple(
            Turn(turn["role"], tuple(PARTS[part["kind"]](np.array(part["codes"])) for part in turn["parts"]))
            for turn in vector["turns"]))
        rendered = render(document, vocabulary)
        assert rendered.ids.tolist() == vector["ids"], vector["name"]
        assert rendered.loss_mask.astype(int).tolist() == vector["loss_mask"], vector["name"]
        assert parse(vector["ids"], vocabulary) == document
