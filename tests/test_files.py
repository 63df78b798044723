"""Saves: what is not ours stays, and after a kill or a failure at any step the old or the new folder is there, whole."""

import errno
import os
import re
import shutil
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import mmtx
from mmtx import atomic_folder
from mmtx.atomic_folder import replace_folder
from mmtx.errors import InputError
from mmtx.files import read_bytes
from mmtx.json_files import read_json
from mmtx.modality.base import load_tokenizer
from mmtx.modality.text import TextTokenizer
from mmtx.saved_folder import check_target
from mmtx.shipped_files import find_shipped

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pair():
    """Two text tokenizers."""
    return TextTokenizer.train(["a red circle"], 280), TextTokenizer.train(["trumpet, C 4"], 280)


def content(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
            for path in sorted(folder.rglob("*"))}


# -- What may be replaced ------------------------------------------------------------------------------------


def foreign_file(folder: Path) -> str:
    (folder / "notes.txt").write_text("mine")
    return "notes.txt"


def foreign_folder(folder: Path) -> str:
    (folder / "thesis").mkdir()
    (folder / "thesis" / "chapter1.tex").write_text("mine")
    return "thesis"


def foreign_within(folder: Path) -> str:
    (folder / "text" / ".hidden").write_text("mine")
    return "text/.hidden"


def foreign_deep(folder: Path) -> str:
    (folder / "text" / "text").mkdir()
    return "text/text"


def foreign_link(folder: Path) -> str:
    target = folder.parent / "weights"
    target.write_text("mine")
    (folder / "vocoder.safetensors").symlink_to(target)
    return "vocoder.safetensors"


def foreign_config(folder: Path) -> str:
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return "config.json"


def no_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    shutil.rmtree(folder / "audio")
    return "image"


@pytest.mark.parametrize("change", [foreign_file, foreign_folder, foreign_within, foreign_deep, foreign_link,
                                    foreign_config, no_config])
def test_what_mmtx_did_not_write_stays_and_is_named(tiny_model, tmp_path, change):
    folder = tmp_path / "project"
    tiny_model.save(folder)
    named = change(folder)
    before = content(tmp_path)
    with pytest.raises(InputError, match=f"project: holds '{named}', which mmtx did not write"):
        tiny_model.save(folder)
    assert content(tmp_path) == before


def test_a_folder_of_something_else_stays(tiny_model, tmp_path):
    folder = tmp_path / "project"
    (folder / "thesis").mkdir(parents=True)
    (folder / "thesis" / "chapter1.tex").write_text("mine")
    before = content(tmp_path)
    for save in (tiny_model.save, tiny_model.tokenizers["text"].save):
        with pytest.raises(InputError, match="project: holds 'thesis'"):
            save(folder)
    assert content(tmp_path) == before


def test_targets_that_cannot_be_folders(pair, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "here").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path / "here")
    for name, told in ((".", "is the current folder"), ("..", "is the current folder or holds it"), ("", "no name of a folder"),
                       ("/", "holds it"), ("../file", "found a file"), ("../file/", "found a file"), ("../loop", "no folder"),
                       ("../pipe", "no folder"), ("../file/model", "cannot be written"), ("a\0b", "no name of a folder"),
                       ("x" * 300, "cannot be written"), ("x" * 250, "cannot be written"), ("y/" * 3000, "cannot be written"),
                       ("/proc/model", "cannot be written"), ("~nobody-of-this-name/model", "the home of no user here")):
        with pytest.raises(InputError, match=told) as error:
            pair[0].save(name)
        assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "here", "loop", "pipe"]
    assert (tmp_path / "file").read_text() == "mine" and not list((tmp_path / "here").iterdir())


def test_targets_that_can(pair, tmp_path, monkeypatch):
    old, new = pair
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling").symlink_to("behind")
    for name, where in (("empty", "empty"), ("a/b/c/", "a/b/c"), ("~/m", "home/m"), ("dangling", "behind"), ("empty/../e", "e"),
                        ("line\nbreak", "line\nbreak"), (os.fsdecode(b"no utf-8 \xff"), os.fsdecode(b"no utf-8 \xff"))):
        for tokenizer in (old, new):
            tokenizer.save(name)
            assert load_tokenizer(tmp_path / where).fingerprint == tokenizer.fingerprint
        assert load_tokenizer(find_shipped(name)).fingerprint == new.fingerprint
    assert (tmp_path / "dangling").is_symlink()
    assert not list(tmp_path.rglob(".*"))


def test_a_link_stays_and_its_folder_is_replaced(pair, tmp_path):
    old, new = pair
    old.save(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    new.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and load_tokenizer(tmp_path / "real").fingerprint == new.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


@pytest.mark.parametrize("dance", [False, True])
@pytest.mark.parametrize("mode", [0o700, 0o2775, 0o555])
def test_the_rights_of_a_folder_stay(pair, tmp_path, monkeypatch, mode, dance):
    if dance:
        monkeypatch.setattr(atomic_folder, "exchange", no_exchange)
    folder = tmp_path / "model"
    folder.mkdir()
    for tokenizer in pair:
        folder.chmod(mode)
        tokenizer.save(folder)
        assert stat.S_IMODE(folder.stat().st_mode) == mode
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def no_exchange(one, other):
    raise OSError(errno.EINVAL, "not on this file system")


def test_a_file_that_comes_while_a_model_is_saved_stays(pair, tmp_path):
    old, new = pair
    folder = tmp_path / "model"
    old.save(folder)

    def items():
        (folder / "notes.txt").write_text("mine")
        yield from new.files().items()

    for _ in range(2):
        with pytest.raises(InputError, match="model: holds 'notes.txt', which mmtx did not write"):
            replace_folder(folder, items())
        assert load_tokenizer(folder).fingerprint == old.fingerprint and (folder / "notes.txt").read_text() == "mine"
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_run_is_refused_before_it_begins(tmp_path):
    from mmtx.training.callbacks import SaveModel

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="model: holds 'mine.txt'"):
        SaveModel(tmp_path).setup(None, None, "fit")
    assert check_target(tmp_path / "other" / "model") == tmp_path / "other" / "model"


# -- Kills and failures --------------------------------------------------------------------------------------

# A child that ends at its n-th call of what changes the disk; n = 0 counts them. It forks nothing and loads no torch.
CHILD = textwrap.dedent("""
    import errno, os, signal, sys
    from pathlib import Path
    from mmtx import atomic_folder
    target, source, dance, first = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "True", int(sys.argv[4])
    items = [(str(p.relative_to(source)), p.read_bytes()) for p in sorted(source.rglob("*")) if p.is_file()]
    calls = 0
    def killing(call, *after):
        def run(*arguments, **options):
            global calls
            calls += 1
            if calls == first:
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*arguments, **options)
            calls += 1
            if calls == first:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        return run
    def refuse(one, other):
        raise OSError(errno.ENOSYS, "no such call")
    for name in ("fsync", "rename", "mkdir", "chmod", "rmdir", "unlink"):
        setattr(os, name, killing(getattr(os, name)))
    atomic_folder.exchange = refuse if dance else killing(atomic_folder.exchange)
    atomic_folder.replace_folder(target, items)
    print(calls)
""")


def child(target: Path, source: Path, dance: bool, n: int) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", CHILD, str(target), str(source), str(dance), str(n)], cwd=ROOT, timeout=60,
                          capture_output=True, text=True)


@pytest.mark.parametrize("dance", [False, True], ids=["exchange", "two renames"])
def test_a_kill_at_any_step_leaves_the_old_or_the_new(pair, tmp_path, dance):
    old, new = pair
    new.save(tmp_path / "new")
    folder = tmp_path / "place" / "model"
    bystander = tmp_path / "place" / ".model.notes"  # looks a bit like ours
    bystander.parent.mkdir()
    bystander.mkdir()
    old.save(folder)
    steps = int(child(folder, tmp_path / "new", dance, 0).stdout)
    assert steps > 20
    seen = []
    for n in range(1, steps + 1):
        old.save(folder)  # which also removes what the kill before it left
        assert sorted(path.name for path in folder.parent.iterdir()) == [".model.notes", "model"]
        assert child(folder, tmp_path / "new", dance, n).returncode == -9
        seen.append((folder.exists(), load_tokenizer(folder).fingerprint))
        assert folder.exists()
    found = [fingerprint for _, fingerprint in seen]
    assert found == sorted(found, key=[old.fingerprint, new.fingerprint].index)  # first the old, then the new
    assert set(found) == {old.fingerprint, new.fingerprint}
    assert all(there for there, _ in seen) != dance  # between two renames there was none, and loading put it back


def test_a_kill_between_two_renames_of_a_model(tiny_model, tmp_path):
    tiny_model.save(tmp_path / "model")
    tiny_model.save(tmp_path / "other")
    os.rename(tmp_path / "model", tmp_path / ".model.0123abcd.old")
    (tmp_path / "other").rename(tmp_path / ".model.0123abcd")
    assert mmtx.load(tmp_path / "model", device="cpu").vocabulary == tiny_model.vocabulary
    tiny_model.save(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("dance", [False, True], ids=["exchange", "two renames"])
def test_a_failure_of_any_step_leaves_the_old_or_the_new(pair, tmp_path, monkeypatch, dance):
    old, new = pair
    folder = tmp_path / "model"
    steps, failing = 0, 0

    def failing_call(call):
        def run(*arguments, **options):
            nonlocal steps
            steps += 1
            if steps == failing:
                raise OSError(errno.EIO, "Input/output error")
            return call(*arguments, **options)
        return run

    for name in ("fsync", "rename", "mkdir", "open"):
        monkeypatch.setattr(os, name, failing_call(getattr(os, name)))
    monkeypatch.setattr(atomic_folder, "exchange", no_exchange if dance else failing_call(atomic_folder.exchange))
    old.save(folder)
    new.save(folder)
    steps = 0
    old.save(folder)
    total, refused = steps, 0
    for n in range(1, total + 1):
        failing = 0
        old.save(folder)
        steps, failing = 0, n
        try:
            new.save(folder)
        except InputError as error:
            assert re.search(r"model(/config.json)?: cannot be (written|read) \(Input/output error\)", str(error)), error
            refused += 1
        failing = 0
        assert load_tokenizer(folder).fingerprint in (old.fingerprint, new.fingerprint)
        assert [path.name for path in tmp_path.iterdir()] == ["model"] or n == total
    assert refused >= 6


def test_all_is_on_the_disk_before_the_names_change(pair, tmp_path, monkeypatch):
    done, sync, swap = [], os.fsync, atomic_folder.exchange
    pair[0].save(tmp_path / "model")
    monkeypatch.setattr(os, "fsync", lambda file: (sync(file), done.append(os.fstat(file).st_ino)))
    monkeypatch.setattr(atomic_folder, "exchange", lambda one, other: (done.append("swap"), swap(one, other)))
    pair[1].save(tmp_path / "model")
    folder = tmp_path / "model"
    inodes = [path.stat().st_ino for path in (*folder.iterdir(), folder)]
    assert sorted(done[:len(inodes)]) == sorted(inodes) and done[len(inodes):] == ["swap", tmp_path.stat().st_ino]


def test_the_folder_of_a_living_save_is_not_cleared(pair, tmp_path):
    old, new = pair
    folder = tmp_path / "model"

    def items():
        yield from list(new.files().items())[:1]
        old.save(folder)  # another process saves while this one writes
        yield from list(new.files().items())[1:]

    replace_folder(folder, items())
    assert load_tokenizer(folder).fingerprint == new.fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_only_what_is_certainly_ours_is_cleared(pair, tmp_path):
    for name in (".model.0123abcd", ".model.4567abcd.old", ".model.89ab0123"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("half")
    (tmp_path / ".model.89ab0123" / "mine.txt").write_text("mine")
    (tmp_path / ".other.0123abcd").mkdir()
    (tmp_path / ".model.fedc0123").symlink_to(".other.0123abcd")
    pair[0].save(tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model.89ab0123", ".model.fedc0123", ".other.0123abcd", "model"]


def test_a_full_disk_is_one_line_and_the_old_model_stays(tiny_model, tmp_path):
    resource = pytest.importorskip("resource")
    tiny_model.save(tmp_path / "model")
    before = content(tmp_path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        with pytest.raises(InputError, match="model: cannot be written \\(File too large"):
            tiny_model.save(tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert content(tmp_path) == before


# -- Reading -------------------------------------------------------------------------------------------------


def test_only_regular_files_of_bounded_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    for path, told in ((tmp_path / "config.json", "a pipe or device"), (Path("/dev/zero"), "a pipe or device"),
                       (tmp_path, "a folder"), (tmp_path / "no", "no such file"), (tmp_path / "a\0b", "cannot be read")):
        with pytest.raises(InputError, match=told):
            read_json(path)
    with pytest.raises(InputError, match="a pipe or device"):
        load_tokenizer(tmp_path)
    (tmp_path / "large").write_bytes(bytes(11))
    assert read_bytes(tmp_path / "large", 11) == bytes(11)
    with pytest.raises(InputError, match="large: found 11 bytes, expected at most 10"):
        read_bytes(tmp_path / "large", 10)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": 1, "a": 2}', "1" * 5000, "\xff", "", "{", "nul"])
def test_json_that_is_none_is_one_line(tmp_path, text):
    (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match="x.json: not readable as JSON") as error:
        read_json(tmp_path / "x.json")
    assert "\n" not in str(error.value) and len(str(error.value).replace(str(tmp_path), "")) < 200
