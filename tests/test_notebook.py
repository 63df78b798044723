"""The notebook runs from its first cell to its last, in a kernel of its own; what it fine-tunes has learned."""

import re
from pathlib import Path

import pytest

import mmtx
from mmtx.shipped_files import shipped

NOTEBOOK = Path(__file__).parents[1] / "demos" / "tour.ipynb"


def test_the_notebook_is_stored_without_outputs():
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_notebook_runs(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    monkeypatch.setenv("MMTX_TOUR_STEPS", "40")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    told = ["".join(output.get("text", "") for output in cell.outputs) for cell in notebook.cells if cell.cell_type == "code"]
    shown = [sum("image/png" in output.get("data", {}) for output in cell.outputs) for cell in notebook.cells if cell.cell_type == "code"]
    assert shown == [0, 1, 1, 1, 2, 0]
    captions = mmtx.load(device="cpu").caption([shipped("demos/examples") / name for name in ("penguin.webp", "piano.ogg")])
    assert captions[0] == "penguin" and told[1].startswith(f"{captions}\n") and told[1].replace("|", "").rstrip().endswith("\npenguin")
    assert "'<image>'" in told[2]
    after = dict(re.findall(r"^(\w+)\.\w+ +before: .*? after: (.+)$", told[5], re.M))
    assert after == {"cat": "Minka", "penguin": "Frido", "apple": "lunch", "piano": "our piano", "trumpet": "the neighbour"}
