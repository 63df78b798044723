"""Prepared shards: batches like those of the media, the same bytes after kills and from any number of processes."""

import contextlib
import functools
import http.server
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import tarfile
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
import yaml
from tqdm import tqdm

from mmtx.cli import main
from mmtx.data.augment import AudioAugmentation, ImageAugmentation
from mmtx.data.collection import DataSource
from mmtx.data.corpus import read_corpus
from mmtx.data.packing import PackedBatches
from mmtx.data.prepare import prepare
from mmtx.data.prepared import download, tensors
from mmtx.data.sources import read
from mmtx.data.tokens import Augmentation
from mmtx.errors import InputError
from mmtx.modality.text import TextTokenizer
from mmtx.vocabulary import Vocabulary

STARTER = Path(__file__).parents[1] / "demos" / "data" / "starter"
CHOSEN = {"pictures": ("images-train-004", 20), "notes": ("sounds-train-001", 8), "speech": ("speech-train-000", 3)}
BROKEN = b"\x89PNG\r\n\x1a\n and no more"


def unpacked(folder: Path) -> None:
    """The first samples of some starter shards as folders of media with captions beside."""
    for name, (shard, count) in CHOSEN.items():
        (folder / name).mkdir()
        with tarfile.open(STARTER / f"{shard}.tar.gz") as tar:
            names = [member.name for member in tar if member.isfile()]
            keys = list(dict.fromkeys(os.path.splitext(member)[0] for member in names))[:count]
            for member in names:
                if os.path.splitext(member)[0] in keys:
                    (folder / name / os.path.basename(member)).write_bytes(tar.extractfile(member).read())


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """A folder of pictures with a broken one, a WebDataset shard of notes, and a manifest of speech, texts and chats."""
    folder = tmp_path_factory.mktemp("media")
    unpacked(folder)
    (folder / "pictures" / "broken.png").write_bytes(BROKEN)
    (folder / "pictures" / "broken.txt").write_text("not to be seen")
    with tarfile.open(folder / "notes.tar", "w") as tar:
        for path in sorted((folder / "notes").iterdir()):
            tar.add(path, path.name)
    pictures, voices = sorted((folder / "pictures").glob("*.webp")), sorted((folder / "speech").glob("*.ogg"))
    rows = [{"audio": str(path), "text": f"sentence {n}"} for n, path in enumerate(voices)]
    rows += [{"text": f"a text of its own, number {n}"} for n in range(5)]
    content = [{"type": "text", "text": "Which"}, {"type": "image", "image": str(pictures[0])},
               {"type": "audio", "audio": str(voices[0])}, {"type": "image", "image": str(pictures[1])}]
    answer = [{"type": "text", "text": "this:"}, {"type": "image", "image": str(pictures[2])}]
    rows.append({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def folders(tokenizers, tmp_path_factory):
    """Folder of each tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for kind, tokenizer in tokenizers.items():
        tokenizer.save(folder / kind)
    return [str(folder / kind) for kind in tokenizers]


@pytest.fixture(scope="module")
def whole(media, tokenizers, tmp_path_factory):
    """The pictures, the notes and the manifest, each prepared with features in shards of 7 rows."""
    folder = tmp_path_factory.mktemp("whole")
    for name in ("pictures", "notes.tar", "rows.jsonl"):
        prepare(DataSource([str(media / name)]), tokenizers, folder / name, features=True, rows=7, max_bad=0.1)
    return folder


def corpus(tokenizers, vocabulary, *sources: DataSource, **options):
    return read_corpus(sources, tokenizers, vocabulary, **{"max_seq_len": 1000, "max_bad": 0.1, **options})


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same(left, right) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


# -- The same as media ---------------------------------------------------------------------------------------

OPTIONS = [{"repeat": 2}, {"cond_drop_prob": 0.4, "limit": 5}, {}, {"task": "generate", "cond_drop_prob": 0.3}]
NAMES = ["pictures", "notes.tar", "rows.jsonl", "notes.tar"]


@pytest.mark.parametrize("prepared", [(0, 1, 2, 3), (1, 3)], ids=["all", "some"])
def test_batches_are_those_of_the_media(media, whole, tokenizers, vocabulary, prepared):
    raw = [DataSource([str(media / name)], **options) for name, options in zip(NAMES, OPTIONS)]
    mixed = [DataSource([str((whole if i in prepared else media) / name)], **options)
             for i, (name, options) in enumerate(zip(NAMES, OPTIONS))]
    expected, found = (corpus(tokenizers, vocabulary, *sources, seed=5) for sources in (raw, mixed))
    assert len(expected) == len(found) == 20 + 5 + 9 + 8
    assert [found.where(n) for n in range(len(found))] == [expected.where(n) for n in range(len(expected))]
    one, other = (PackedBatches(some, vocabulary, 2500, repeats=some.repeats, seed=5, steps=9) for some in (expected, found))
    kinds, user = set(), set()
    for k in range(9):
        assert same(one[k], other[k])
        kinds |= set(one[k].modality.tolist())
        user |= set(one[k].features)
    assert kinds == {0, 1, 2, 3} and user == {"image", "audio"}
    assert len(one.first) > 2  # more than an epoch


def test_rows_that_cannot_be_read_have_no_number(tokenizers, vocabulary, tmp_path):
    chats = [{"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}]} for n in range(9)]
    (tmp_path / "chats.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in [*chats[:2], {"text": 1}, *chats[2:]]))
    prepare(DataSource([str(tmp_path / "chats.jsonl")]), tokenizers, tmp_path / "a", rows=4, max_bad=0.1)
    for options in ({"limit": 4}, {"cond_drop_prob": 0.5}):
        expected, found = (corpus(tokenizers, vocabulary, DataSource([str(tmp_path / name)], **options), seed=5)
                           for name in ("chats.jsonl", "a"))
        assert [found.where(n) for n in range(len(found))] == [expected.where(n) for n in range(len(expected))]
        views = [(n, view) for n in range(len(found)) for view in range(3)]
        assert all(map(np.array_equal, *([rendered.ids for rendered in some.render(views)] for some in (expected, found))))


def test_what_is_stored_is_small_and_mapped(whole, tokenizers, vocabulary):
    shard = tensors(whole / "pictures" / "shard-00001.safetensors")
    assert all(isinstance(values, np.memmap) for values in shard.values())
    assert (shard["ids"].dtype, shard["features.image"].dtype) == (np.uint16, np.float16)
    assert vocabulary.size <= 2 ** 16 and len(shard["features.image"]) == 7 * 4 and len(shard["ends.ids"]) == 8
    assert isinstance(corpus(tokenizers, vocabulary, DataSource([str(whole / "pictures")])).lengths, np.memmap)
    facts = json.loads((whole / "pictures" / "prepared.json").read_text())
    assert (facts["documents"], facts["rows"], facts["skipped"], facts["shards"]) == (20, 21, 1, 3)
    assert "broken.png" in facts["errors"][0]


def test_a_vocabulary_beyond_16_bits(media, tokenizers, tmp_path):
    from mmtx.modality.autoencoder import NetworkConfig
    from mmtx.modality.image import ImageConfig, ImageTokenizer

    torch.manual_seed(0)
    network = NetworkConfig(width=32, heads=2, encoder_depth=1, decoder_depth=1, levels=(17, 17, 17, 16))
    some = {"text": tokenizers["text"], "image": ImageTokenizer(ImageConfig(patch=8, side=16, network=network)).eval()}
    prepare(DataSource([str(media / "pictures")]), some, tmp_path / "large", max_bad=0.1)
    shard = tensors(tmp_path / "large" / "shard-00000.safetensors")
    assert shard["ids"].dtype == np.uint32 and shard["ids"].max() > 2 ** 16
    vocabulary, sources = Vocabulary.build(some), [DataSource([str(media / "pictures")]), DataSource([str(tmp_path / "large")])]
    batches = [PackedBatches(corpus(some, vocabulary, source), vocabulary, 600)[0] for source in sources]
    assert torch.equal(batches[0].ids, batches[1].ids) and not batches[1].features


# -- Kills and processes -------------------------------------------------------------------------------------


def start(folders: list[str], output: Path, *more: str) -> runs.Program:
    """The command in a group of its own; what it prints goes to OUTPUT.log."""
    arguments = [*more, "--tokenizers", *folders, "--output", str(output), "--features", "--max_bad", "0.1"]
    return runs.Program(["prepare", *arguments], Path(f"{output}.log"))


def ended(group: int) -> bool:
    """Whether all processes of a group end within 20 s."""
    for _ in range(400):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def killed_and_finished(folders: list[str], root: Path, sources: list[str], shards: int, kills: int, chance,
                        *more: str) -> tuple[list[Path], list[int]]:
    """Folders that were finished by the same command after kills, `kills` in all, and finished shards at each kill.

    A kill comes when a number of shards is finished that is uniform from those that the process finds to all.
    """
    def finished() -> int:
        return len(list(outputs[-1].glob("shard-*.safetensors")))

    outputs, partial = [], []
    while len(partial) < kills:
        outputs.append(root / f"run-{len(outputs)}")
        while True:
            least = chance.randint(finished(), shards) if len(partial) < kills else shards
            process = start(folders, outputs[-1], *sources, *more)
            while process.poll() is None and finished() < least:
                time.sleep(0.0005)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(chance.uniform(0, 0.005) if least < shards else 60)
            if process.poll() is not None:
                assert process.returncode == 0, outputs[-1].with_suffix(".log").read_text()
                break
            process.kill()
            process.wait()
            assert ended(process.pid)  # no worker outlives it
            partial.append(finished())
    return outputs, partial


@pytest.fixture(scope="module")
def sources(media):
    return [str(media / name) for name in ("pictures", "notes.tar", "rows.jsonl")]


@pytest.fixture(scope="module")
def undisturbed(sources, folders, tmp_path_factory):
    """All of the media in shards of one row, as a process writes them that nothing disturbs."""
    output = tmp_path_factory.mktemp("undisturbed") / "one"
    assert start(folders, output, *sources, "--rows", "1", "--num_workers", "1").wait(200) == 0, Path(f"{output}.log").read_text()
    return content(output)


@pytest.mark.slow
def test_kills_lose_and_double_nothing(sources, undisturbed, folders, tmp_path):
    assert len(undisturbed) == 3 + 38 and not any(name.endswith(".part") for name in undisturbed)
    outputs, partial = killed_and_finished(folders, tmp_path, sources, 38, 5, random.Random(0), "--rows", "1",
                                           "--num_workers", "2")
    assert all(content(output) == undisturbed for output in outputs)
    assert len(set(partial) - {38}) >= 2, partial


def test_parts_joined_are_one_run(media, tokenizers, tmp_path):
    """Every part is a folder that knows nothing of the others; one was damaged, and another never ran."""
    source, options = DataSource([str(media / "pictures"), str(media / "notes.tar")]), {"features": True, "rows": 3, "max_bad": 0.5}
    prepare(source, tokenizers, tmp_path / "one", **options)
    expected, output = content(tmp_path / "one"), tmp_path / "many"
    shards = sorted(name for name in expected if name.startswith("shard-"))
    assert len(shards) >= 6
    for k in (3, 1):
        facts = prepare(source, tokenizers, output, part=(k, 4), **options)
        folder = output / f"part-{k}-of-4"
        assert facts["shards"] == len(shards[k - 1::4])
        assert content(folder) == {name: expected[name] for name in ("plan.json", *shards[k - 1::4])}
        assert [path.name for path in output.iterdir() if not path.name.startswith("part-")] == []
    made = folder / shards[0]
    before = made.stat().st_ino
    assert prepare(source, tokenizers, output, part=(1, 4), **options) == {"shards": len(shards[0::4]), "rows": facts["rows"]}
    assert made.stat().st_ino == before  # what is there is not made again
    (output / "part-3-of-4" / shards[2]).write_bytes(expected[shards[2]][:-1])
    prepare(source, tokenizers, output, part=(2, 9), **options)  # another number of parts: its shards are the same
    facts = prepare(source, tokenizers, output, **options)
    assert content(output) == expected and facts["shards"] == len(shards)
    assert (output / shards[0]).stat().st_ino == before
    with pytest.raises(InputError, match="many: is already complete, expected no --part, or another --output"):
        prepare(source, tokenizers, output, part=(1, 4), **options)


def test_parts_of_something_else_are_refused(tokenizers, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": f"line {n}"}) for n in range(10)))
    source, output = DataSource([str(rows)]), tmp_path / "a"
    prepare(source, tokenizers, output, rows=2, part=(1, 2))
    with pytest.raises(InputError, match="part-1-of-2: was begun with rows 2, found 3; expected the same"):
        prepare(source, tokenizers, output, rows=3)
    with pytest.raises(InputError, match="part-1-of-2: was begun with rows 2, found 3; expected the same"):
        prepare(source, tokenizers, output, rows=3, part=(1, 2))
    with pytest.raises(InputError, match="part-1-of-2: was begun with rows 2, found 3; expected the same"):
        prepare(source, tokenizers, output, rows=3, part=(2, 2))  # it was told when both were joined
    assert not (output / "part-2-of-2").exists()
    rows.write_text(rows.read_text().replace("line 4", "line four"))
    with pytest.raises(InputError, match="shard-00002.safetensors: the sources changed since it was written"):
        prepare(source, tokenizers, output, rows=2)
    prepare(source, tokenizers, tmp_path / "b", rows=2, part=(2, 2))
    rows.write_text("\n".join(rows.read_text().split("\n")[:4]))
    with pytest.raises(InputError, match="shard-00003.safetensors: the sources have no rows for it"):
        prepare(source, tokenizers, tmp_path / "b", rows=2, part=(2, 2))


@pytest.mark.parametrize("part", [(2, 2), (6, 6)], ids=["2 of 2", "6 of 6"])
def test_a_part_of_more_rows_than_there_are_is_refused(part, tokenizers, tmp_path):
    """Whichever of the shards of the rows that are gone are there: here not the first of them."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": f"line {n}"}) for n in range(12)))
    prepare(DataSource([str(rows)]), tokenizers, tmp_path / "a", rows=2, part=part)
    rows.write_text("\n".join(rows.read_text().split("\n")[:4]))
    with pytest.raises(InputError, match=r"shard-0000[35].safetensors: the sources have no rows for it"):
        prepare(DataSource([str(rows)]), tokenizers, tmp_path / "a", rows=2)
    assert not (tmp_path / "a" / "prepared.json").exists()


def test_a_join_that_is_killed_forgets_no_plan(tokenizers, tmp_path, monkeypatch):
    """What a part was made with is known until its shards are where the plan of all is."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": f"line {n}"}) for n in range(4)))
    source, output = DataSource([str(rows)]), tmp_path / "a"
    prepare(source, tokenizers, output, rows=2, part=(1, 1))

    class Killed(BaseException):
        pass

    replace = os.replace

    def kill(path, target):
        if Path(path).name.startswith("shard-"):
            raise Killed
        replace(path, target)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(os, "replace", kill)
        prepare(source, tokenizers, output, rows=2)
    with pytest.raises(InputError, match="was begun with tokenizers text"):
        prepare(source, {"text": TextTokenizer.train(["other texts altogether"], 280)}, output, rows=2)


@pytest.mark.parametrize("word", ["0/8", "9/8", "3", "3/", "a/b", "-1/2", "1/2/3", "1 /2", "٣/٨"])
def test_a_part_that_is_none_is_refused(word):
    with pytest.raises(SystemExit) as stop:
        main(["prepare", "x", "--output", "y", f"--part={word}"])
    assert stop.value.code == 2


def test_a_second_tokenizer_of_a_kind_is_refused(folders, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["prepare", "x.jsonl", "--output", str(tmp_path / "a"), "--tokenizers", *folders, folders[0]])
    assert f"error: {folders[0]}: found a second text tokenizer, expected one of each kind" in capsys.readouterr().err


@pytest.mark.slow
def test_parts_that_are_killed_lose_and_double_nothing(sources, undisturbed, folders, tmp_path):
    """Three parts, each killed when it has made a shard and started again beside the others, then joined by a run that is killed."""
    output, killed = tmp_path / "many", 0
    begin = lambda k: start(folders, output, *sources, "--rows", "1", "--num_workers", "1", "--part", f"{k}/3")
    running = {}
    for k in (1, 2, 3):
        process = begin(k)
        while process.poll() is None and not list(output.glob(f"part-{k}-of-3/shard-*.safetensors")):
            time.sleep(0.001)
        if process.poll() is None:
            process.kill()
            killed += 1
        process.wait()
        assert ended(process.pid)
        running[k] = begin(k)
    assert [process.wait(200) for process in running.values()] == [0, 0, 0], output.with_suffix(".log").read_text()
    assert killed >= 2
    process = start(folders, output, *sources, "--rows", "1")
    while process.poll() is None and not (output / "shard-00000.safetensors").exists():
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert ended(process.pid)
    process = start(folders, output, *sources, "--rows", "1")
    assert process.wait(200) == 0, output.with_suffix(".log").read_text()
    assert content(output) == undisturbed


def test_a_folder_that_is_prepared_anew_is_read_anew(tokenizers, vocabulary, tmp_path):
    """As in a notebook: a process must not keep the shards of the folder that was there before."""
    for texts in (["a", "b c d"], ["e", "f", "a much longer text"]):
        (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        prepare(DataSource([str(tmp_path / "x.jsonl")]), tokenizers, tmp_path / "out")
        found = read_corpus([DataSource([str(tmp_path / "out")])], tokenizers, vocabulary, max_seq_len=100)
        raw = read_corpus([DataSource([str(tmp_path / "x.jsonl")])], tokenizers, vocabulary, max_seq_len=100)
        views = [(number, 0) for number in range(len(texts))]
        assert [one.ids.tolist() for one in found.render(views)] == [one.ids.tolist() for one in raw.render(views)]
        shutil.rmtree(tmp_path / "out")


def test_a_damaged_shard_is_written_again(media, tokenizers, tmp_path):
    source = DataSource([str(media / "notes.tar")])
    prepare(source, tokenizers, tmp_path / "a", features=True, rows=3)
    expected = content(tmp_path / "a")
    middle = tmp_path / "a" / "shard-00001.safetensors"
    for damage in (lambda data: data[:-1], lambda data: data[:-9] + b"\0" + data[-8:], lambda data: b""):
        middle.write_bytes(damage(expected[middle.name]))
        assert content(tmp_path / "a") != expected
        untouched = (tmp_path / "a" / "shard-00000.safetensors").stat().st_ino
        prepare(source, tokenizers, tmp_path / "a", features=True, rows=3)
        assert content(tmp_path / "a") == expected
        assert untouched == (tmp_path / "a" / "shard-00000.safetensors").stat().st_ino


def test_shards_are_not_mapped_all_at_once(media, tokenizers, tmp_path, monkeypatch):
    import mmtx.data.prepare as module

    seen = []

    class Spy:
        @staticmethod
        def __wrapped__(path: Path) -> dict[str, np.ndarray]:
            assert not any(values() is not None for shard in seen[:-1] for values in shard)
            found = tensors.__wrapped__(path)
            seen.append([weakref.ref(values) for values in found.values()])
            return found

    monkeypatch.setattr(module, "tensors", Spy)
    prepare(DataSource([str(media / "notes.tar")]), tokenizers, tmp_path / "a", features=True, rows=2)
    assert len(seen) == 4


# -- What is refused -----------------------------------------------------------------------------------------


def test_another_tokenizer_is_refused_by_name(media, whole, tokenizers, tmp_path):
    other = {**tokenizers, "text": TextTokenizer.train(["a green triangle", "flute, A 4"], 300)}
    with pytest.raises(InputError, match="rows.jsonl: prepared with the text tokenizer .*, found .*same one"):
        corpus(other, Vocabulary.build(other), DataSource([str(whole / "rows.jsonl")]))
    without = {kind: tokenizers[kind] for kind in ("text", "audio")}
    with pytest.raises(InputError, match="prepared with the image tokenizer .*, found none"):
        corpus(without, Vocabulary.build(without), DataSource([str(whole / "rows.jsonl")]))
    prepare(DataSource([str(media / "notes.tar")]), without, tmp_path / "a")
    with pytest.raises(InputError, match="its audio ids begin at .* same tokenizers of all kinds"):
        corpus(tokenizers, Vocabulary.build(tokenizers), DataSource([str(tmp_path / "a")]))
    with pytest.raises(InputError, match="a: was begun with tokenizers text .*, found text .*; expected the same"):
        prepare(DataSource([str(media / "notes.tar")]), tokenizers, tmp_path / "a")


def test_changed_sources_are_refused(tokenizers, tmp_path):
    rows = [json.dumps({"text": f"line {n}"}) for n in range(10)]
    path = tmp_path / "rows.jsonl"

    def write(*lines: str) -> None:
        path.write_text("\n".join(lines))

    def again(**options) -> None:
        prepare(DataSource([str(path)]), tokenizers, tmp_path / "a", **{"rows": 4, **options})

    write(*rows)
    again()
    expected = content(tmp_path / "a")
    for changed in ([*rows[:5], '{"text": "another"}', *rows[6:]], rows[1:], rows[:-1], rows[:8], [*rows, rows[0]]):
        write(*changed)
        with pytest.raises(InputError, match=r"shard-0000[0-2].safetensors: the sources .*changed since it was written"):
            again()
    write(*rows)
    again(num_workers=2, max_bad=0.5)
    assert content(tmp_path / "a") == expected
    for options, told in (({"rows": 5}, "rows 4, found 5"), ({"features": True}, "features False, found True")):
        with pytest.raises(InputError, match=f"was begun with {told}; expected the same, or another --output"):
            again(**options)


def test_a_picture_that_changed_is_refused(media, tokenizers, tmp_path):
    shutil.copytree(media / "notes", tmp_path / "notes")
    prepare(DataSource([str(tmp_path / "notes")]), tokenizers, tmp_path / "a")
    sound = next((tmp_path / "notes").glob("*.ogg"))
    sound.write_bytes(sound.read_bytes() + b"\0")
    with pytest.raises(InputError, match="the sources changed since it was written"):
        prepare(DataSource([str(tmp_path / "notes")]), tokenizers, tmp_path / "a")


def test_folders_that_cannot_be_trained_on(whole, tokenizers, vocabulary, tmp_path):
    shutil.copytree(whole / "rows.jsonl", tmp_path / "a")
    source, shard = DataSource([str(tmp_path / "a")]), tmp_path / "a" / "shard-00001.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(InputError, match=f"shard-00001.safetensors: found {len(data) - 1}, expected {len(data)} bytes"):
        corpus(tokenizers, vocabulary, source)
    shard.unlink()
    with pytest.raises(InputError, match="shard-00001.safetensors: found no such file"):
        corpus(tokenizers, vocabulary, source)
    (tmp_path / "a" / "prepared.json").write_text('{"format": 2}')
    with pytest.raises(InputError, match="expected a prepared folder of format 1"):
        corpus(tokenizers, vocabulary, source)
    (tmp_path / "a" / "prepared.json").unlink()
    with pytest.raises(InputError, match="a: found an unfinished prepared folder, expected a complete one"):
        corpus(tokenizers, vocabulary, source)
    with pytest.raises(InputError, match="a: found shards of `mmtx prepare`, .*expected pictures, sounds or texts"):
        read(str(tmp_path / "a"))


@pytest.mark.parametrize("name, fields, options, told", [
    ("pictures", {}, {"augmentation": Augmentation(image=ImageAugmentation())}, "image_augmentation: .*expected null"),
    ("rows.jsonl", {}, {"augmentation": Augmentation(audio=AudioAugmentation())}, "audio_augmentation: .*expected null"),
    ("pictures", {"select": {"key": ["a"]}}, {}, "select: .*pictures is prepared"),
    ("pictures", {"split": [0, 0.5]}, {}, "split: .*pictures is prepared"),
    ("rows.jsonl", {"task": "generate"}, {}, "task: .*not one question with one answer"),
    ("rows.jsonl", {}, {"max_seq_len": 40}, r"of 9 rows cannot be used; first: .*rows.jsonl row 1: found .* max_seq_len \+ 1 = 41"),
])
def test_what_prepared_documents_cannot_do(whole, tokenizers, vocabulary, name, fields, options, told):
    with pytest.raises(InputError, match=told):
        corpus(tokenizers, vocabulary, DataSource([str(whole / name)], **fields), **options)
    # Of a kind that is not in it, augmentation changes nothing.
    corpus(tokenizers, vocabulary, DataSource([str(whole / "pictures")]), augmentation=Augmentation(audio=AudioAugmentation()))


def test_long_documents_are_left_out(media, whole, tokenizers, vocabulary):
    sources = DataSource([str(media / "rows.jsonl")]), DataSource([str(whole / "rows.jsonl")], cond_drop_prob=0.5)
    expected, found = (corpus(tokenizers, vocabulary, source, max_seq_len=200, max_bad=0.9) for source in sources)
    assert 0 < len(found) < 9 and [found.where(n) for n in range(len(found))] == [s.where for s in expected.samples]
    assert np.array_equal(found.parts[0].numbers, expected.parts[0].numbers)


def test_features_are_asked_for_by_name(media, whole, tokenizers, vocabulary, tmp_path):
    prepare(DataSource([str(media / "notes.tar")]), tokenizers, tmp_path / "a")
    source = DataSource([str(tmp_path / "a")])
    with pytest.raises(InputError, match="without features of audio.*continuous_inputs: true.*mmtx prepare --features"):
        corpus(tokenizers, vocabulary, source, features=True)
    assert not corpus(tokenizers, vocabulary, source).render([(0, 0)])[0].spans
    assert corpus(tokenizers, vocabulary, DataSource([str(whole / "notes.tar")]), features=True).render([(0, 0)])[0].spans


def test_bad_rows_are_skipped_up_to_the_limit(media, tokenizers, tmp_path):
    source = DataSource([str(media / "pictures")])
    with pytest.raises(InputError, match="1 of 21 rows cannot be used; first: .*broken.png.*at most 4.000%"):
        prepare(source, tokenizers, tmp_path / "a", max_bad=0.04)
    assert not (tmp_path / "a" / "prepared.json").exists()
    assert prepare(source, tokenizers, tmp_path / "a", max_bad=0.05)["documents"] == 20


def test_outputs_that_cannot_be_written(media, tokenizers, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for name, told in (("file", "file cannot be written \\(File exists"), ("full", "full: holds other files")):
        with pytest.raises(InputError, match=told):
            prepare(DataSource([str(media / "notes.tar")]), tokenizers, tmp_path / name)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]


def test_paths_of_a_source_are_of_one_kind(media, whole, tokenizers, vocabulary):
    notes = [str(folder / "notes.tar") for folder in (media, whole)]
    with pytest.raises(InputError, match="paths: found .*notes.tar, which is prepared, beside media"):
        corpus(tokenizers, vocabulary, DataSource(notes))
    with pytest.raises(InputError, match="limit: found 2 prepared folders"):
        corpus(tokenizers, vocabulary, DataSource([str(whole / "n*"), str(whole / "p*")], limit=3))
    assert len(corpus(tokenizers, vocabulary, DataSource([str(whole / "*")]))) == 20 + 8 + 9


# -- Afar ----------------------------------------------------------------------------------------------------


@pytest.fixture
def server(whole):
    """The prepared folders over HTTP: their address, and the files that were asked for."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            if self.command == "GET":
                asked.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=whole))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


def test_shards_afar_are_fetched_when_they_are_needed(server, whole, tokenizers, vocabulary, tmp_path, monkeypatch):
    pytest.importorskip("aiohttp")
    monkeypatch.setenv("MMTX_CACHE", str(tmp_path))
    address, asked = server
    near = corpus(tokenizers, vocabulary, DataSource([str(whole / "pictures")]))
    far = corpus(tokenizers, vocabulary, DataSource([f"{address}/pictures"], cond_drop_prob=0.2))
    assert not [path for path in asked if "shard-" in path]
    assert np.array_equal(far.render([(8, 0)])[0].ids, near.render([(8, 0)])[0].ids)
    assert {path for path in asked if "shard-" in path} == {"/pictures/shard-00001.safetensors"}
    far.render([(7, 0), (9, 1)])
    again = corpus(tokenizers, vocabulary, DataSource([f"{address}/pictures/"]))
    one, other = (PackedBatches(some, vocabulary, 200) for some in (near, again))
    assert all(same(one[k], other[k]) for k in range(len(one)))
    assert all(asked.count(f"/pictures/shard-0000{n}.safetensors") == 1 for n in range(3))
    with pytest.raises(InputError, match="http://127.0.0.1:.*/nothing/prepared.json: "):
        corpus(tokenizers, vocabulary, DataSource([f"{address}/nothing"]))


def test_a_shard_afar_that_was_cut_short_is_refused(whole, tokenizers, vocabulary, tmp_path, monkeypatch):
    import fsspec

    monkeypatch.setenv("MMTX_CACHE", str(tmp_path))
    files = fsspec.filesystem("memory")
    for name, data in content(whole / "pictures").items():
        files.pipe(f"/mmtx-prepared/{name}", data[:-1] if name.startswith("shard-00001") else data)
    far = corpus(tokenizers, vocabulary, DataSource(["memory://mmtx-prepared"]))
    far.render([(0, 0)])
    with pytest.raises(InputError, match="memory://mmtx-prepared/shard-00001.safetensors: found .*, expected .* bytes"):
        far.render([(8, 0)])
    files.pipe("/mmtx-prepared/shard-00001.safetensors", content(whole / "pictures")["shard-00001.safetensors"])
    far.render([(8, 0)])


def test_a_cache_without_room_is_named(whole, tmp_path):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(InputError, match=f"{tmp_path}/cache/index: cannot be written \\(File too large"):
            download(f"file://{whole}/rows.jsonl/index.safetensors", tmp_path / "cache" / "index")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "cache").iterdir())


# -- The command, and training -------------------------------------------------------------------------------


def test_the_command_says_how_far_it_is_and_how_to_train(media, folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mmtx.data.prepare.tqdm", functools.partial(tqdm, disable=False))
    source = {"paths": [str(media / "notes.tar")], "select": {"instrument": ["nothing"]}}
    config = {"model": {"init_args": {"continuous_inputs": True, "train_encoder": True, "image_encoder": "a"}}, "data": {"init_args": {
        "tokenizers": dict(zip(("text", "image", "audio"), folders)), "validation": [], "train": [
            {"paths": [str(media / "notes.tar")], "repeat": 3}, {"paths": [str(media / "notes.tar")], "task": "generate"},
            {"paths": [str(media / "rows.jsonl")], "limit": 2},
            {"paths": [str(media / "notes.tar")], "select": {"soundfont": ["fluid", "timgm"]}, "cond_drop_prob": 0.1}]}}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    main(["prepare", "--config", str(path), "--output", str(tmp_path / "a"), "--num_workers", "1"])
    out, error = capsys.readouterr()
    lines = out.splitlines()
    assert re.search(r"prepare: 9\.00 rows \[.* [\d.]+ rows/s, shards=1, skipped=0\]", error), error
    assert [line.split(",")[0] for line in lines[:-1]] == [f"{tmp_path}/a/0: 8 documents", f"{tmp_path}/a/1: 9 documents",
                                                          f"{tmp_path}/a/2: 8 documents"]
    assert "features.audio" in tensors(tmp_path / "a" / "0" / "shard-00000.safetensors")
    assert lines[-1].endswith("null --model.train_encoder false --model.image_encoder null")
    train = yaml.safe_load(lines[-1].split("'")[1])
    assert train == [{"paths": [f"{tmp_path}/a/0"], "repeat": 3}, {"paths": [f"{tmp_path}/a/0"], "task": "generate"},
                     {"paths": [f"{tmp_path}/a/1"], "limit": 2},
                     {"paths": [f"{tmp_path}/a/2"], "select": None, "cond_drop_prob": 0.1}]
    config["data"]["init_args"]["train"] = [source]
    path.write_text(yaml.safe_dump(config))
    for arguments, told in (
        (["--config", str(path)], "notes.tar: no sample is left"),
        ([str(media / "notes.tar")], "b: holds other files"),
        ([], "found neither sources nor --config"),
        (["a.jsonl", "--config", str(path)], "found both sources and --config"),
        (["nothing.jsonl"], "nothing.jsonl: no such file"),
        (["nothing.tar"], "nothing.tar: no such file"),  # the folder of the mistake before is no other's
        ([str(media / "notes.tar"), "--num_workers", "0"], "num_workers: found '0'"),
        ([str(media / "notes.tar"), "--rows", "0"], "rows: found '0'"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["prepare", *arguments, "--output", str(tmp_path / ("b" if "b: " in told or "left" in told else "c"))])
        error = capsys.readouterr().err.splitlines()[-1]
        assert stop.value.code == 2 and error.startswith("mmtx: error: ") and told in error, error


@pytest.mark.parametrize("more", [["--tokenizers", "nothing"], ["--features"], ["--follow_links"]], ids=lambda more: more[0])
def test_what_a_config_says_itself_is_refused_beside_it(more, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["prepare", "--config", "nothing.yaml", "--output", "a", *more])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"mmtx: error: {more[0]}: found with --config, expected it in nothing.yaml\n"


def test_the_line_to_train_can_be_pasted_into_a_shell(media, folders, tmp_path, capsys):
    folder = tmp_path / "it's a run; $HOME"
    folder.mkdir()
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump({"model": {"init_args": {}}, "data": {"init_args": {
        "tokenizers": dict(zip(("text", "image", "audio"), folders)), "validation": [],
        "train": [{"paths": [str(media / "notes.tar")]}]}}}))
    main(["prepare", "--config", str(config), "--output", str(folder / "shards"), "--num_workers", "1"])
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert words[:5] == ["mmtx", "fit", "--config", str(config), "--data.train"]
    assert yaml.safe_load(words[5]) == [{"paths": [str(folder / "shards" / "0")]}] and words[6] == "--data.image_augmentation"


@pytest.mark.slow
def test_training_from_shards_is_training_from_media(tmp_path):
    config = runs.prepare(tmp_path, steps=6)
    data = config["data"]["init_args"]
    config["model"]["init_args"]["continuous_inputs"] = True
    data["image_augmentation"] = data["audio_augmentation"] = None
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    assert runs.fit(config, tmp_path / "media") == [0], (tmp_path / "media.log").read_text()
    main(["prepare", "--config", str(path), "--output", str(tmp_path / "shards"), "--rows", "300"])
    data["train"] = [{**source, "paths": [str(tmp_path / "shards" / str(n))]} for n, source in enumerate(data["train"])]
    assert runs.fit(config, tmp_path / "prepared") == [0], (tmp_path / "prepared.log").read_text()
    assert runs.results(tmp_path / "prepared") == runs.results(tmp_path / "media")
