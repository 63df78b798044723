"""Manifests, folders and shards become samples; every bad input is one InputError that names its place."""

import base64
import gzip
import io
import json
import pickle
import random
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

import mmtx
from mmtx.captioning import caption_files, find_media
from mmtx.data.collection import DataSource, read_source
from mmtx.data.media import load_audio
from mmtx.data.patterns import expand
from mmtx.data.sample import Text, kind_of
from mmtx.data.selection import Selection
from mmtx.data.skip_counter import SkipCounter
from mmtx.data.sources import read, scan
from mmtx.data.storage import FileSource, MemorySource, display
from mmtx.errors import InputError
from mmtx.shipped_files import find_shipped

STARTER = Path(__file__).parents[1] / "demos" / "data" / "starter"


def manifest(folder, *rows, name="data.jsonl"):
    """Write rows (objects or raw lines) beside a.png and a.wav, which these tests never decode."""
    (folder / "a.png").write_bytes(b"picture")
    (folder / "a.wav").write_bytes(b"sound")
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def shard(path, members):
    """Write a tar, gzipped by its name, from pairs of member name and bytes."""
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def members(count, size=600):
    """`count` pairs of a picture and its caption; each picture's bytes are different and do not compress."""
    for index in range(count):
        yield f"{index:03}.png", random.Random(index).randbytes(size)
        yield f"{index:03}.json", json.dumps({"caption": f"caption {index}", "style": index % 2}).encode()


# Manifests.


def test_short_rows(tmp_path):
    rows = [
        {"image": "a.png", "text": "a cat", "id": 7, "style": "flat", "licence": None},
        {"audio": str(tmp_path / "a.wav"), "text": "a horn"},
        {"text": " once upon\n"},
    ]
    picture, sound, document = scan(manifest(tmp_path, *rows))
    assert [(turn.role, len(turn.parts)) for turn in picture.turns] == [("user", 1), ("assistant", 1)]
    medium = picture.turns[0].parts[0]
    assert (medium.kind, medium.source.read()) == ("image", b"picture")
    assert picture.turns[1].parts == (Text("a cat"),)
    assert (picture.key, picture.metadata, picture.caption) == ("7", {"style": "flat"}, "a cat")
    assert sound.turns[0].parts[0].kind == "audio" and sound.turns[0].parts[0].source.read() == b"sound"
    assert [(turn.role, turn.parts) for turn in document.turns] == [(None, (Text(" once upon\n"),))]
    assert document.key == "3" and document.where == f"{tmp_path}/data.jsonl row 3"


def test_chat_rows(tmp_path):
    inline = "data:image/png;base64," + base64.b64encode(b"inline").decode()
    content = [
        {"type": "text", "text": "What is"},
        {"type": "image", "image": "a.png"},
        {"type": "image_url", "image_url": {"url": inline}},
        {"type": "audio", "audio": "a.wav"},
    ]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": content},
        {"role": "assistant", "content": "A cat."},
    ]
    (sample,) = scan(manifest(tmp_path, {"messages": messages, "level": 3}))
    assert [turn.role for turn in sample.turns] == ["user", "user", "assistant"]
    parts = sample.turns[1].parts
    assert parts[0] == Text("What is")
    assert [part.kind for part in parts[1:]] == ["image", "image", "audio"]
    assert [part.source.read() for part in parts[1:]] == [b"picture", b"inline", b"sound"]
    assert "base64," not in parts[2].name
    assert sample.caption == "A cat." and sample.metadata == {"level": 3}


def test_blank_lines_keep_row_numbers(tmp_path):
    (sample,) = scan(manifest(tmp_path, "", "  ", {"text": "x"}))
    assert sample.where.endswith("row 3")


def chat(content, role="user"):
    return {"messages": [{"role": role, "content": content}]}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{not json", ["row 2", "not JSON"]),
        ("[" * 100_000, ["row 2", "not JSON"]),
        ("[1, 2]", ["row 2", "[1, 2]", "object"]),
        ({}, ["row 2", "'text'"]),
        ({"text": 5}, ["'text'", "5"]),
        ({"text": [0] * 10_000}, ["'text'", "[0, 0"]),
        ({"text": " \n"}, ["'text'", "expected text"]),
        ('{"text": "\\ud800"}', ["'text'", "surrogate"]),
        ({"image": "a.png"}, ["'caption' or 'text'"]),
        ({"caption": "x"}, ["'text'", "caption"]),
        ({"image": "b.png", "text": "x"}, ["'image'", "b.png", "no such file"]),
        ({"image": "", "text": "x"}, ["'image'", "is empty"]),
        ({"image": {"bytes": "x"}, "text": "x"}, ["'image'", "path"]),
        ({"image": "a\0.png", "text": "x"}, ["'image'", "no such file"]),
        ({"image": "a.wav", "text": "x"}, ["'image'", "a.wav", "a file of kind image"]),
        ({"audio": "a.png", "text": "x"}, ["'audio'", "a.png", "a file of kind audio"]),
        ({"text": "x", "id": [1]}, ["key", "[1]"]),
        ({"text": "x", "id": 1.5}, ["key", "1.5", "a whole number"]),
        ({"messages": []}, ["'messages'", "[]"]),
        ({"messages": "hi"}, ["'messages'", "hi"]),
        ({"messages": ["hi"]}, ["messages[0]", "hi"]),
        (chat("hi") | {"text": "a"}, ["'messages'", "text"]),
        (chat("hi", role="tool"), ["messages[0]", "'tool'", "assistant"]),
        (chat("hi", role=["user"]), ["messages[0]", "['user']"]),
        (chat(""), ["messages[0].content", "''"]),
        (chat([]), ["messages[0].content", "[]"]),
        (chat(["hi"]), ["messages[0].content[0].type", "None"]),
        (chat([{"type": "video", "video": "a.mp4"}]), ["content[0].type", "'video'"]),
        (chat([{"type": "text"}]), ["content[0].text", "None"]),
        (chat([{"type": "image", "image": "b.png"}]), ["content[0].image", "no such file"]),
        (chat([{"type": "image_url", "image_url": {}}]), ["content[0].image_url", "path"]),
    ],
)
def test_bad_rows_name_file_row_and_field(tmp_path, row, words):
    path = manifest(tmp_path, {"text": "good"}, row, {"text": "good"})
    good, error, after = scan(path)
    assert isinstance(error, InputError)
    message = str(error)
    assert f"{path} row 2" in message and "\n" not in message and len(message) < 600
    for word in words:
        assert word in message
    assert after.where.endswith("row 3")


def test_bytes_that_are_no_utf8(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "with BOM"}\r\n{"text": "\xff"}\n')
    good, error = scan(str(path))
    assert good.caption == "with BOM"
    assert "row 2" in str(error) and "UTF-8" in str(error)


@pytest.mark.parametrize(("name", "between"), [("data.csv", b","), ("data.tsv", b"\t")])
def test_a_row_of_a_table_that_is_no_utf8_is_one_bad_row(tmp_path, name, between):
    """As programs for tables write one who had Latin-1 in the clipboard; the rows behind it are read."""
    path = tmp_path / name
    rows = [b"key", b"text"], [b"1", b"caf\xc3\xa9"], [b"2", b"caf\xe9"], [b"3", b"th\xe9", b"x"], [b"4", b"tea"]
    path.write_bytes(b"\n".join(map(between.join, rows)) + b"\n")
    first, second, third, last = scan(str(path))
    assert (first.caption, last.caption) == ("caf\u00e9", "tea")
    assert str(second) == f"{path} row 2: the column 'text' is not UTF-8 text, expected a table saved as UTF-8"
    assert str(third).startswith(f"{path} row 3: ")
    path.write_bytes(between.join((b"key", b"t\xe9xt")) + b"\n" + between.join((b"1", b"x")) + b"\n")
    with pytest.raises(InputError, match="found the header .* is not UTF-8"):
        list(scan(str(path)))


# Reading many.


def test_read_skips_the_allowed_share_and_reports(tmp_path):
    path = manifest(tmp_path, *[{"text": str(n)} for n in range(9)], {"image": "gone.png", "text": "x"})
    told = []
    assert len(read([path], max_bad=0.1, report=told.append)) == 9
    assert len(told) == 1 and "1 of 10" in told[0] and "row 10" in told[0]
    with pytest.raises(InputError, match=r"1 of 10 rows.*row 10.*gone.png"):
        read([path], max_bad=0.09)
    with pytest.raises(InputError, match="1 of 10 rows"):
        read(path)


def test_skip_counter_keeps_only_the_first_errors():
    counter = SkipCounter(0.5, 2000)
    for index in range(1000):
        counter.skip(InputError(f"error {index}"))
    counter.check()
    counter.rows = 1999
    with pytest.raises(InputError, match="1000 of 1999 rows.*error 2 ") as caught:
        counter.check()
    assert "error 3" not in str(caught.value)
    for limit in (-0.1, 1.5, float("nan")):
        with pytest.raises(InputError, match="max_bad"):
            SkipCounter(limit)


def test_nothing_left_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no sample is left of 1 rows"):
        read(manifest(tmp_path, "{"), max_bad=1)
    with pytest.raises(InputError, match="no samples in it"):
        read(manifest(tmp_path, ""))
    with pytest.raises(InputError, match="no data source"):
        read([])


def test_select(tmp_path):
    path = shard(tmp_path / "x.tar", members(6))
    assert [s.key for s in read(path, select={"style": [1]})] == ["001", "003", "005"]
    both = {"caption": ["caption 2", "caption 3"], "style": [0]}
    assert [s.key for s in read(path, select=both)] == ["002"]
    with pytest.raises(InputError, match="'colour'.*style"):
        read(path, select={"colour": [1]})
    with pytest.raises(InputError, match="'style' has 1"):
        read(path, select={"style": 1})
    with pytest.raises(InputError, match="x.tar: no sample is left of 6 rows: found 0, 1 in the field 'style', expected one of"):
        read(path, select={"style": [9]})
    for value in ("1", True, 1.5):  # a text is no number, and true is not 1
        with pytest.raises(InputError, match="no sample is left"):
            read(path, select={"style": [value]})
    assert len(read(path, select={"style": [1.0]})) == 3
    # `mmtx prepare` asks sample by sample.
    assert [Selection({"style": [value]}).has(read(path)[1]) for value in (1, 1.0, "1", True)] == [True, True, False, False]


@pytest.mark.parametrize("name", ["gone.jsonl", "gone.tar", "gone.tar.gz", "gone", "gone.zip"])
def test_missing_source(tmp_path, name):
    with pytest.raises(InputError, match=f"{name}: no such file"):
        read(str(tmp_path / name))


def test_unknown_source(tmp_path):
    (tmp_path / "x.xlsx").write_text("a,b")
    with pytest.raises(InputError, match="x.xlsx: unknown kind.*jsonl.*json.*csv.*tsv.*tar.gz"):
        read(tmp_path / "x.xlsx")
    with pytest.raises(InputError, match="no file matches"):
        read(f"{tmp_path}/*.jsonl")


def test_tables_of_the_package_datasets_are_told_how_to_read(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "a" / "b").mkdir(parents=True)
    parquet.write_table(pyarrow.table({"text": ["said"]}), tmp_path / "a" / "b" / "x.parquet")
    with pytest.raises(InputError, match=f"x.parquet: unknown kind of data.*; hf://{tmp_path}/a/b reads .parquet") as failure:
        read(tmp_path / "a" / "b" / "x.parquet")
    with pytest.raises(InputError, match=f"a: no samples in it; hf://{tmp_path}/a reads .parquet"):
        read(tmp_path / "a")
    pytest.importorskip("datasets")
    told = str(failure.value).split("; ")[1].split(" ")[0]
    assert [sample.caption for sample in read(told)] == ["said"]


@pytest.mark.parametrize("name, stands_for", [
    ("x-{000..003}.tar", ["x-000.tar", "x-001.tar", "x-002.tar", "x-003.tar"]),
    ("x{8..10}", ["x8", "x9", "x10"]), ("x{08..10}", ["x08", "x09", "x10"]), ("x{2..0}", ["x2", "x1", "x0"]),
    ("{a,b}/{c,}d", ["a/cd", "a/d", "b/cd", "b/d"]), ("{a,b{1..2}}", ["a", "b1", "b2"]),
    ("s3://x/{0..1}.tar", ["s3://x/0.tar", "s3://x/1.tar"]), ("{a}{}{..}{a..b}", ["{a}{}{..}{a..b}"]),
    ('data:application/jsonl,{"text": "a, b"}', ['data:application/jsonl,{"text": "a, b"}'])])
def test_braces_are_those_of_the_shell(name, stands_for):
    """WebDataset names its shards so, and a shell expands them neither in quotes nor in a configuration."""
    assert expand(name) == stands_for


def test_shards_named_with_braces(tmp_path):
    for number in range(4):
        shard(tmp_path / f"x-{number:03}.tar", [(f"{number}.png", b"x"), (f"{number}.txt", b"x")])
    assert [sample.key for sample in read(f"{tmp_path}/x-{{002..001}}.tar")] == ["2", "1"]
    assert [sample.key for sample in read(f"{tmp_path}/x-00{{3,[01]}}.tar")] == ["3", "0", "1"]
    with pytest.raises(InputError, match="x-004.tar: no such file"):
        read(f"{tmp_path}/x-{{003..005}}.tar")
    (tmp_path / "x-{0..1}.tar").symlink_to(tmp_path / "x-003.tar")
    assert [sample.key for sample in read(f"{tmp_path}/x-{{0..1}}.tar")] == ["3"]  # a file of this very name is meant
    with pytest.raises(InputError, match="found braces for more than 1,000,000 names"):
        read("{0..999999}{0..999999}.tar")


# Shards and folders.


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.tgz"])
def test_shard(tmp_path, name):
    rest = [("ab/v1.5.mp3", b"mp3"), ("ab/v1.5.txt", "\ufeff höse\n".encode()), ("README.md", b"no sample")]
    hidden = [("._000.png", b"resource fork"), ("003.png", b"far"), ("000.cls", b"3")]
    path = shard(tmp_path / name, [*members(3), *rest, *hidden, ("003.txt", b"apart")])
    samples = read(path)
    assert [s.key for s in samples] == ["000", "001", "002", "ab/v1.5", "003"]
    media = [s.turns[0].parts[0] for s in samples]
    wanted = [random.Random(n).randbytes(600) for n in range(3)] + [b"mp3", b"far"]
    assert [m.source.read() for m in media] == wanted
    assert [m.kind for m in media] == ["image"] * 3 + ["audio", "image"]
    assert all(isinstance(m.source, FileSource if name == "x.tar" else MemorySource) for m in media)
    assert samples[1].metadata == {"style": 1} and samples[1].caption == "caption 1"
    assert samples[3].caption == "höse"
    assert samples[0].where == f"{path} member 000" and media[0].name == f"{path} member 000.png"
    assert pickle.loads(pickle.dumps(samples)) == samples
    assert sorted(p.name for p in tmp_path.iterdir()) == [name]  # nothing was extracted


def test_what_is_hidden_is_no_sample(tmp_path):
    """Nor is what lies in a hidden folder, as Jupyter and file managers make them."""
    names = ["a/x.png", "a/.ipynb_checkpoints/x.png", ".Trash/y.png", "./b/z.png"]
    both = [(name, b"x") for name in names] + [(name[:-3] + "txt", b"said") for name in names]
    for name, content in both:
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(content)
    assert sorted(sample.key for sample in read(str(tmp_path / "folder"))) == ["a/x", "b/z"]
    assert sorted(sample.key.removeprefix("./") for sample in read(shard(tmp_path / "x.tar", both))) == ["a/x", "b/z"]
    found = [*find_media(tmp_path / "folder")]
    assert found == [str(tmp_path / "folder" / name) for name in ("a/x.png", "b/z.png")]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "y.png").write_bytes(b"x")
    (tmp_path / "folder" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "folder" / "b" / "gone.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "folder" / "b" / "gone.txt").symlink_to(tmp_path / "nothing")
    found = [*find_media(tmp_path / "folder")]
    assert [str(each) for each in found] == [
        str(tmp_path / "folder" / "a/x.png"), f"{tmp_path}/folder/b/gone.png: cannot be read (No such file or directory)",
        str(tmp_path / "folder" / "b/z.png"), str(tmp_path / "folder" / "linked/y.png")]
    (error,) = find_media("")
    assert str(error) == "found an empty name, expected a file or folder"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([("k.png", b"x")], ["k.png alone", "k.txt or .json"]),
        ([("k.png", b"x"), ("k.json", b'{"label": 3}')], ["'caption' or 'text'", "['label']"]),
        ([("k.json", b'{"caption": "x"}')], ["none", "one picture or sound"]),
        ([("k.png", b"x"), ("k.jpg", b"x"), ("k.txt", b"x")], ["expected one picture", "k.png", "k.jpg"]),
        ([("k.png", b"x"), ("k.json", b"{")], ["k.json", "not JSON"]),
        ([("k.png", b"x"), ("k.json", b'{"caption": 3}')], ["'caption'", "3"]),
        ([("k.png", b"x"), ("k.txt", b"\xff")], ["k.txt", "UTF-8"]),
        ([("k.png", b"x"), ("k.txt", b" ")], ["'caption'", "expected text"]),
    ],
)
def test_bad_samples_in_shards_and_folders(tmp_path, files, words):
    good = [("z.png", b"x"), ("z.txt", b"z")]
    rows = list(scan(shard(tmp_path / "x.tar", [*files, *good])))
    for word in [f"{tmp_path}/x.tar member k", *words]:
        assert word in str(rows[0])
    assert rows[1].key == "z" and len(rows) == 2
    if files[0][0] != "k.json":  # a text without a medium is no sample in a folder
        for name, data in [*files, *good]:
            (tmp_path / name).write_bytes(data)
        (tmp_path / "x.tar").unlink()
        error, sample = scan(str(tmp_path))
        assert words[0] in str(error) and f"{tmp_path}/k" in str(error) and sample.key == "z"


def test_the_name_of_a_folder_is_the_caption(tmp_path, monkeypatch):
    files = [("train/cats/1.PNG", b"x"), ("train/dogs/2.png", b"y"), ("train/dogs/old dogs/3.jpg", b"z"), ("train/dogs/3.json", b'{"id": 7}'),
             ("train/dogs/3.webp", b"w")]
    for name, data in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    fields = {"text": "folder"}
    expected = ["cats", "dogs", "dogs", "old dogs"]
    assert [one.caption for one in read(str(tmp_path / "train"), fields=fields)] == expected
    assert sorted(one.caption for one in read(shard(tmp_path / "x.tar", files), fields=fields)) == expected
    monkeypatch.chdir(tmp_path / "train" / "cats")  # a class alone, as a source
    assert [one.caption for one in read([".", str(tmp_path / "train" / "dogs") + "/"], fields=fields)] == expected
    (error, *_) = scan(str(tmp_path / "train"))
    assert "1.PNG alone" in str(error) and "fields with text: folder" in str(error)
    (error, *_) = scan(shard(tmp_path / "flat.tar", [("1.png", b"x")]), fields=fields)
    assert "flat.tar member 1: field 'text' is '', expected text" in str(error)
    # A field of this name beside the medium comes first, and without `fields` it is metadata like any other.
    (tmp_path / "train" / "dogs" / "3.json").write_text('{"folder": "wolves"}')
    assert read(str(tmp_path / "train"), fields=fields)[1].caption == "dogs"
    assert read(str(tmp_path / "train"), fields=fields)[2].caption == "wolves"


def test_json_fields_win_over_txt(tmp_path):
    files = [("k.png", b"x"), ("k.txt", b"from txt"), ("k.json", b'{"text": "from json", "caption": null}')]
    assert read(shard(tmp_path / "x.tar", files))[0].caption == "from json"
    files[-1] = ("k.json", b'{"style": 4}')
    (sample,) = read(shard(tmp_path / "x.tar", files))
    assert sample.caption == "from txt" and sample.metadata == {"style": 4}


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_a_shard_cut_short_is_an_error(tmp_path, name, share):
    path = Path(shard(tmp_path / name, members(60)))
    data = path.read_bytes()
    for cut in {int(len(data) * share), int(len(data) * share) // 512 * 512 + 100}:
        path.write_bytes(data[:cut])
        with pytest.raises(InputError, match=name):
            read(str(path))


def test_a_damaged_shard_is_an_error(tmp_path):
    path = Path(shard(tmp_path / "x.tar", members(4)))
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        header = tar.getmember("002.png").offset
    data[header : header + 4] = b"\xff\xff\xff\xff"  # tarfile itself takes this for the end
    path.write_bytes(data)
    with pytest.raises(InputError, match=f"damaged or cut short at byte {header}"):
        read(str(path))
    packed = tmp_path / "y.tar.gz"
    packed.write_bytes(gzip.compress(bytes(data)))
    with pytest.raises(InputError, match="damaged"):
        read(str(packed))
    whole = bytearray(Path(shard(packed, members(4))).read_bytes())
    whole[-6] ^= 1  # the checksum
    packed.write_bytes(whole)
    with pytest.raises(InputError, match="y.tar.gz: not a whole gzipped tar"):
        read(str(packed))
    for name in ("z.tar", "z.tar.gz"):
        (tmp_path / name).write_bytes(b"neither a tar nor gzipped " * 100)
        with pytest.raises(InputError, match=f"{name}: not a whole"):
            read(str(tmp_path / name))


def test_members_that_are_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr("mmtx.data.webdataset.MAX_BYTES", 500)
    monkeypatch.setattr("mmtx.data.storage.MAX_BYTES", 500)
    with pytest.raises(InputError, match="000.png: 600 bytes, at most 500"):
        read(shard(tmp_path / "x.tar.gz", members(1)))
    (tmp_path / "big.png").write_bytes(bytes(501))
    with pytest.raises(InputError, match="big.png: more than 500"):
        FileSource(str(tmp_path / "big.png")).read()


def test_a_shard_that_shrinks_after_reading(tmp_path):
    path = Path(shard(tmp_path / "x.tar", members(3)))
    sample = read(str(path))[-1]
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(InputError, match="x.tar: found 0 bytes at byte .* expected 600"):
        sample.turns[0].parts[0].source.read()


def test_folder(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("b.png", "deep/er/c.WAV", "a.jpeg", ".hidden.png", "README.txt"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "a.txt").write_text("an a\n")
    (tmp_path / "b.json").write_text('{"text": "a b", "style": "flat"}')
    (tmp_path / "deep" / "er" / "c.txt").write_text("a c")
    samples = read(str(tmp_path))
    assert [(s.key, s.caption) for s in samples] == [("a", "an a"), ("b", "a b"), ("deep/er/c", "a c")]
    assert [s.turns[0].parts[0].kind for s in samples] == ["image", "image", "audio"]
    assert samples[2].turns[0].parts[0].source.read() == b"deep/er/c.WAV"
    assert samples[1].metadata == {"style": "flat"}
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: no samples in it"):
        read(str(tmp_path / "empty"))


def test_the_home_of_a_source(tmp_path, monkeypatch):
    """A shell expands ~ neither in quotes nor in a configuration."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    assert expand("~/a.jsonl") == expand("~/*.jsonl") == [str(tmp_path / "a.jsonl")]
    (sample,) = read_source(DataSource(["~/a.jsonl"]))
    assert (sample.caption, sample.where) == ("a", f"{tmp_path}/a.jsonl row 1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~").mkdir()
    (tmp_path / "~" / "b.jsonl").write_text('{"text": "b"}\n')
    assert expand("~/b.jsonl") == ["~/b.jsonl"]  # a file of this very name is meant
    with pytest.raises(InputError, match="~nobody-here"):
        expand("~nobody-here/a.jsonl")


def test_glob_and_urls(tmp_path):
    import fsspec

    for index in range(3):
        shard(tmp_path / f"part-{2 - index}.tar", [(f"{index}.png", b"x"), (f"{index}.txt", b"x")])
    assert [s.key for s in read(f"{tmp_path}/part-*.tar")] == ["2", "1", "0"]
    files = fsspec.filesystem("memory")
    files.pipe("/mmtx/m.jsonl", b'{"image": "sub/a.png", "text": "x"}\n')
    files.pipe("/mmtx/sub/a.png", b"remote")
    for index in range(2):
        files.pipe(f"/mmtx/{index}.tar", (tmp_path / f"part-{index}.tar").read_bytes())
    (sample,) = read("memory://mmtx/m.jsonl")
    assert sample.turns[0].parts[0].source.read() == b"remote"
    samples = read("memory://mmtx/*.tar")
    assert [s.key for s in samples] == ["2", "1"]
    assert [s.turns[0].parts[0].source.read() for s in samples] == [b"x", b"x"]
    for source in ("memory://mmtx/gone.tar", "nosuchprotocol://x.tar", "memory://mmtx/*.csv"):
        with pytest.raises(InputError):
            read(source)


def test_urls_are_shown_without_secrets():
    assert display("https://me:secret@host/a/x.tar?signature=abc") == "https://host/a/x.tar"
    assert display("what?.tar") == "what?.tar"


@pytest.mark.parametrize(
    ("pattern", "count", "kind"),
    [("images-train-*", 8481, "image"), ("sounds-test-*", 345, "audio"), ("speech-train-000", 463, "audio")],
)
def test_starter_data(pattern, count, kind):
    samples = read(f"{STARTER}/{pattern}.tar.gz", max_bad=0)
    assert len(samples) == count
    assert len({s.key for s in samples}) == count
    assert {s.turns[0].parts[0].kind for s in samples} == {kind}
    assert {kind_of("", s.turns[0].parts[0].source.read()) for s in samples} == {kind}


def test_sources_import_neither_torch_nor_numpy():
    code = "import sys, mmtx.data.sources; sys.exit(bool({'torch', 'numpy', 'fsspec'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


def test_the_media_of_rows_are_found_without_texts_and_cut(tmp_path):
    model = mmtx.load(device="cpu")
    rate = model.tokenizers["audio"].rate
    notes = [load_audio(str(find_shipped(f"demos/examples/{name}.ogg")), rate, seconds=1) for name in ("trumpet", "piano")]
    mmtx.Sound(np.concatenate(notes), rate).save(tmp_path / "long.wav")
    shutil.copy(find_shipped("demos/examples/cat.webp"), tmp_path / "cat.webp")
    (tmp_path / "rows.csv").write_text("file,from,to\nlong.wav,0,1\nmissing.wav,0,1\nlong.wav,1,2\n")
    names = {"audio": "file", "offset": "from", "end": "to"}
    found = [*find_media([tmp_path / "rows.csv", tmp_path / "cat.webp"], fields=names)]
    assert isinstance(found[1], InputError) and "rows.csv row 2: field 'audio' names" in str(found[1])
    answered = [*caption_files(model, found)]
    first, second = model.caption([mmtx.Audio(note) for note in notes])
    assert first != second and [row.caption for row in answered] == [first, None, second, "cat"]
    assert [row.name.rpartition("/")[2] for row in answered] == ["long.wav (1.0 s from 0.0 s)", "rows.csv row 2",
                                                                 "long.wav (1.0 s from 1.0 s)", "cat.webp"]


@pytest.mark.parametrize("row, message", [
    ({"text": "a"}, "row 1: found no medium, expected audio"), ({"image": "cat.webp"}, "row 1: found no medium, expected audio")])
def test_a_row_without_the_kind_that_is_asked_for_is_named(row, message, tmp_path):
    shutil.copy(find_shipped("demos/examples/cat.webp"), tmp_path / "cat.webp")
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    (error,) = find_media(tmp_path / "rows.jsonl", "audio")
    assert isinstance(error, InputError) and message in str(error)
    with pytest.raises(InputError, match="fields: found 'file', expected one of image"):
        [*find_media(tmp_path / "rows.jsonl", fields={"file": "audio"})]
