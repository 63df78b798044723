"""Tars and folders: all that lies in them is read, counted or refused by name, within bounds of memory, and nothing else is."""

import gzip
import io
import json
import os
import random
import socket
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from mmtx.data import tar_files, webdataset
from mmtx.data.collection import DataSource, read_source
from mmtx.data.folder import MAX_CAPTION
from mmtx.data.sources import read, scan
from mmtx.errors import InputError

ROOT = Path(__file__).parents[1]


def member(name, data=b"", kind=tarfile.REGTYPE, target="", **pax):
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname, info.pax_headers = len(data), kind, target, pax
    return info, data


def tar_of(*members, format=tarfile.PAX_FORMAT, end=10240):
    """A tar with blocks of zeros up to a multiple of `end`."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    data = file.getvalue().rstrip(b"\0")
    data += bytes(-len(data) % 512) + bytes(1024)
    return data + bytes(-len(data) % end)


def pair(key, data=b"picture", extension="png"):
    return member(f"{key}.{extension}", data), member(f"{key}.txt", f"caption {key}".encode())


def found_in(path, data=None, **options):
    """What `scan` finds: (key, bytes of the medium, caption) of samples, errors as text."""
    if data is not None:
        Path(path).write_bytes(data)
    return [str(row) if isinstance(row, InputError) else (row.key, row.turns[0].parts[0].source.read(), row.caption)
            for row in scan(str(path), **options)]


def sample_of(key, data=b"picture"):
    return key, data, f"caption {key}"


# What follows the first end.


@pytest.mark.parametrize("end", [512, 10240, 2**20])
def test_joined_tars(tmp_path, end):
    both = tar_of(*pair("a"), end=end) + tar_of(*pair("b", b"other"), end=end)
    expected = [sample_of("a"), sample_of("b", b"other")]
    assert found_in(tmp_path / "x.tar", both) == expected
    assert found_in(tmp_path / "x.tar.gz", gzip.compress(both)) == expected
    assert found_in(tmp_path / "y.tgz", gzip.compress(both[:700]) + gzip.compress(both[700:])) == expected
    assert found_in(tmp_path / "z.tar.gz", b"".join(gzip.compress(tar_of(*pair(key), end=end)) for key in "ab")
                    + bytes(100)) == [sample_of("a"), sample_of("b")]


def test_joined_tars_of_the_same_keys_are_samples_of_their_own(tmp_path):
    both = tar_of(*pair("a")) + tar_of(*pair("a", b"other"))
    assert found_in(tmp_path / "x.tar", both) == [sample_of("a"), sample_of("a", b"other")]


@pytest.mark.parametrize("behind", [b"garbage", b"garbage" * 200, tar_of(*pair("b"))[:700], tar_of(*pair("b"))[:512], b"\0" * 99 + b"x"])
def test_what_follows_the_end_and_is_no_tar_is_refused(tmp_path, behind):
    whole = tar_of(*pair("a"))
    for name, data in (("x.tar", whole + behind), ("x.tar.gz", gzip.compress(whole + behind))):
        with pytest.raises(InputError, match=f"{name}: damaged or cut short"):
            found_in(tmp_path / name, data)
    with pytest.raises(InputError, match="y.tar.gz: not a whole gzipped tar"):
        found_in(tmp_path / "y.tar.gz", gzip.compress(whole) + b"garbage")


def test_a_last_block_that_is_not_whole_but_zero_is_an_end(tmp_path):
    data = tar_of(*pair("a"), end=512)[:-1024]
    assert found_in(tmp_path / "x.tar", data + bytes(1024 + 100)) == [sample_of("a")]
    assert found_in(tmp_path / "x.tar", data + bytes(100)) == [sample_of("a")]
    with pytest.raises(InputError, match="cut short"):
        found_in(tmp_path / "x.tar", data)


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz"])
def test_the_content_says_whether_it_is_compressed(tmp_path, name):
    data = tar_of(*pair("a"))
    assert found_in(tmp_path / name, data) == found_in(tmp_path / name, gzip.compress(data)) == [sample_of("a")]
    for start, kind in ((b"\xfd7zXZ\0", "xz"), (b"\x28\xb5\x2f\xfd", "Zstandard"), (b"BZh9", "bzip2"), (b"PK\x03\x04", "a zip archive")):
        with pytest.raises(InputError, match=f"{name}: not a whole tar, plain or gzipped: found {kind}"):
            found_in(tmp_path / name, start + data[len(start):])
    for first in ("a", "BZh", "PAR1"):  # names, not beginnings of other files
        data = tar_of(member(first, b"unread"), *pair("b"))
        assert found_in(tmp_path / name, data) == found_in(tmp_path / name, gzip.compress(data)) == [sample_of("b")]
    with pytest.raises(InputError, match="x.tar.zst: unknown kind of data.*tar.gz"):
        found_in(tmp_path / "x.tar.zst", data)


# Members that are no plain files.


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_any_length_and_letters(tmp_path, format):
    long = "deep/" * 18 + "k" * 60 if format == tarfile.USTAR_FORMAT else "höse/" * 60 + "k" * 300
    keys = [long, "./here", "/etc/absolute", "../../up", "v1.5-001"]
    data = tar_of(*(info for key in keys for info in pair(key)), format=format)
    assert [row[0] for row in found_in(tmp_path / "x.tar", data)] == keys
    assert found_in(tmp_path / "x.tar", data) == found_in(tmp_path / "x.tar.gz", gzip.compress(data))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.tar", "x.tar.gz"]


@pytest.mark.parametrize("kind, told", [
    (tarfile.SYMTYPE, "a symbolic link"), (tarfile.LNKTYPE, "a link to another member"), (tarfile.FIFOTYPE, "a named pipe"),
    (tarfile.CHRTYPE, "a device"), (tarfile.BLKTYPE, "a device"), (b"Q", "a member of the unknown type b'Q'"),
])
def test_links_and_other_things_are_counted(tmp_path, kind, told):
    for wrong in ("b.png", "b.txt"):
        other = "b.txt" if wrong == "b.png" else "b.png"
        data = tar_of(*pair("a"), member(wrong, kind=kind, target="/etc/passwd"), member(other, b"x"), *pair("c"))
        a, b, c = found_in(tmp_path / "x.tar", data)
        assert (a, c) == (sample_of("a"), sample_of("c"))
        assert b == f"{tmp_path}/x.tar member {wrong}: found {told}, expected a file"


def gnu_sparse(name, real, holes, data, extended=0):
    """A member as old GNU tar stores files with holes, with `extended` more blocks of the list of its parts."""
    head = bytearray(tar_of(member(name, data))[:512])
    head[156:157], head[257:265] = b"S", b"ustar  \0"
    for place, value in enumerate(value for part in holes for value in part):
        head[386 + 12 * place:398 + 12 * place] = b"%011o\0" % value
    head[482], head[483:495] = bool(extended), b"%011o\0" % real
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    more = b"".join(bytes(504) + bytes([n < extended - 1]) + bytes(7) for n in range(extended))
    return bytes(head) + more + data + bytes(-len(data) % 512)


@pytest.mark.parametrize("extended", [0, 1, 3])
def test_members_with_holes_are_refused_and_the_next_is_read(tmp_path, extended):
    hole = gnu_sparse("h.png", 4 * 2**30, [(0, 300)], b"z" * 300, extended)
    data = tar_of(*pair("a"), end=512)[:-1024] + hole + tar_of(member("h.txt", b"h"), *pair("b"))
    for name, packed in (("x.tar", data), ("x.tar.gz", gzip.compress(data))):
        a, h, b = found_in(tmp_path / name, packed)
        assert (a, b) == (sample_of("a"), sample_of("b"))
        assert h == f"{tmp_path}/{name} member h.png: found a file stored with holes (tar --sparse), expected a file"


@pytest.mark.parametrize("records", [
    {"GNU.sparse.size": "4294967296", "GNU.sparse.numblocks": "1", "GNU.sparse.offset": "0", "GNU.sparse.numbytes": "7"},
    {"GNU.sparse.size": "4294967296", "GNU.sparse.map": "0,7", "GNU.sparse.numblocks": "1", "GNU.sparse.name": "h.png"},
    {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "4294967296", "GNU.sparse.name": "h.png"},
], ids=["0.0", "0.1", "1.0"])
def test_holes_in_pax_headers(tmp_path, records):
    name = "GNUSparseFile.0/h.png" if "GNU.sparse.name" in records else "h.png"
    data = tar_of(*pair("a"), member(name, b"1\n0\n7\npicture", **records), member("h.txt", b"h"), *pair("b"))
    a, h, b = found_in(tmp_path / "x.tar", data)
    assert (a, b) == (sample_of("a"), sample_of("b")) and "member h.png: found a file stored with holes" in h


@pytest.mark.parametrize("options", [["--format=gnu"], *(["--format=pax", f"--sparse-version={v}"] for v in ("0.0", "0.1", "1.0"))])
def test_holes_as_gnu_tar_writes_them(tmp_path, options):
    with open(tmp_path / "h.wav", "wb") as file:
        for place in range(60):  # more parts than a header has room for
            file.seek(place * 65536)
            file.write(b"x")
    for name in ("h.txt", "a.png", "a.txt"):
        (tmp_path / name).write_bytes(b"caption a")
    tar = ["tar", *options, "--sparse", "-cf", "x.tar", "h.wav", "h.txt", "a.png", "a.txt"]
    try:
        done = subprocess.run(tar, cwd=tmp_path, capture_output=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("no tar")
    if done.returncode or (tmp_path / "x.tar").stat().st_size > 2**20:
        pytest.skip("no GNU tar, or a file system without holes")
    h, a = found_in(tmp_path / "x.tar")
    assert "member h.wav: found a file stored with holes" in h and a == sample_of("a", b"caption a")


def test_the_same_member_twice_is_counted(tmp_path):
    data = tar_of(*pair("a"), member("a.txt", b"again"), *pair("b"), member("b.png", b"again"), *pair("c"))
    a, b, c = found_in(tmp_path / "x.tar", data)
    assert "member a: found a.png, a.txt, a.txt, expected one of each" in a
    assert "member b: found b.png, b.png, expected one picture or sound" in b and c == sample_of("c")


def test_pax_records_and_global_headers(tmp_path):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "of all"}) as tar:
        for info, data in pair("a" * 200):
            info.pax_headers = {"mtime": "1.5", "SCHILY.xattr.user.x": "line\nbreak"}
            tar.addfile(info, io.BytesIO(data))
    assert found_in(tmp_path / "x.tar", file.getvalue()) == [sample_of("a" * 200)]


# Bounds.


def header(name, size, kind=b"0", raw=None):
    info = tarfile.TarInfo(name)
    info.size, info.type = 0, kind
    head = bytearray(info.tobuf(tarfile.GNU_FORMAT)[:512])
    head[124:136] = raw or b"%011o\0" % size
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


HUGE = struct.pack(">B3xQ", 0x80, 2**62)  # base 256
NEGATIVE = b"\xff" * 12


@pytest.mark.parametrize("head", [header("b.png", 0, raw=HUGE), header("b.bin", 0, raw=HUGE), header("b.png", 0, raw=NEGATIVE),
                                  header("b.bin", 0, raw=NEGATIVE), header("b.png", 2**32), header("b.png", 0, raw=b"no number!!\0"),
                                  header("b.txt", 0, b"L", HUGE), header("b.txt", 2**31, b"L"), header("b.txt", 2**31, b"x"),
                                  header("b.txt", 0, b"g", NEGATIVE), header("b", 0, b"x", HUGE), header("b", 3, b"x") + b"9 x" + bytes(509),
                                  header("b", 5, b"L") + b"long\0".ljust(512, b"\0"),
                                  header("b", 15, b"x") + b"15 size=999999\n".ljust(512, b"\0") + header("b.png", 1),
                                  header("b", 12, b"x") + b"12 size=-99\n".ljust(512, b"\0") + header("b.png", 1)])
@pytest.mark.parametrize("packed", [False, True])
def test_absurd_sizes_are_one_line(tmp_path, head, packed):
    data = tar_of(*pair("a"), end=512)[:-1024] + head + bytes(1024)
    with pytest.raises(InputError, match=r"x.tar: (damaged or cut short|.* bytes of a header at byte 2048)") as caught:
        found_in(tmp_path / "x.tar", gzip.compress(data) if packed else data)
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


def test_memory_of_what_tars_claim(tmp_path):
    """Names, lists, captions and holes of gigabytes, in a process that may have 1 GB."""
    text, zeros = gzip.compress(b"a" * 2**20), gzip.compress(bytes(2**20))
    caption = [gzip.compress(header("a.txt", 300 * 2**20)), text * 300, gzip.compress(tar_of(member("a.png", b"x")))]
    (tmp_path / "captions.tar.gz").write_bytes(b"".join(caption))
    for name, kind in (("name", b"L"), ("records", b"x"), ("all", b"g")):
        (tmp_path / f"{name}.tar.gz").write_bytes(gzip.compress(header("n", 2**31, kind)) + text * 300)
    (tmp_path / "holes.tar").write_bytes(gnu_sparse("h.png", 4 * 2**30, [(0, 7)], b"picture") + tar_of(member("h.txt", b"h")))
    (tmp_path / "zeros.tar.gz").write_bytes(gzip.compress(tar_of(*pair("a"))) + zeros * 100)
    code = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
from mmtx.data.sources import scan
from mmtx.errors import InputError
for path in sys.argv[1:]:
    try:
        print(*(str(row) for row in scan(path)), sep="\\n")
    except InputError as error:
        print(error)
"""
    names = ["captions.tar.gz", "name.tar.gz", "records.tar.gz", "all.tar.gz", "holes.tar", "zeros.tar.gz"]
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=tmp_path, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any("captions.tar.gz" in line and "unpacks to more than 100 times its size" in line for line in lines), lines
    assert sum("2147483648 bytes of a header at byte 0" in line for line in lines) == 3
    assert any("holes.tar member h.png: found a file stored with holes" in line for line in lines)
    assert any("zeros.tar.gz: more than 67108864 zero bytes" in line for line in lines), lines


def test_captions_are_bounded(tmp_path):
    for name, long in (("a.txt", b"x" * (MAX_CAPTION + 1)), ("a.json", b'{"caption": "' + b"x" * MAX_CAPTION + b'"}')):
        data = tar_of(member("a.png", b"x"), member(name, long), *pair("b"))
        for tar, packed in (("x.tar", data), ("x.tar.gz", gzip.compress(data))):
            a, b = found_in(tmp_path / tar, packed)
            assert a == f"{tmp_path}/{tar} member {name}: found {len(long)} bytes, expected at most {MAX_CAPTION} for a caption and its fields"
            assert b == sample_of("b")
        (tmp_path / "f").mkdir(exist_ok=True)
        (tmp_path / "f" / "a.png").write_bytes(b"x")
        (tmp_path / "f" / name).write_bytes(long)
        (error,) = found_in(tmp_path / "f")
        assert error.startswith(f"{tmp_path}/f/{name}: found {len(long)} bytes")
        (tmp_path / "f" / name).unlink()


def test_what_a_shard_holds_in_memory_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(webdataset, "MAX_HELD", 3000)
    noise = [random.Random(n).randbytes(1000) for n in range(4)]
    data = tar_of(*(info for n in range(4) for info in pair(n, noise[n])))
    assert len(found_in(tmp_path / "x.tar", data)) == 4  # its media stay on the disk
    with pytest.raises(InputError, match="x.tar.gz: more than 3000 bytes in memory, expected a plain .tar"):
        found_in(tmp_path / "x.tar.gz", gzip.compress(data))


def test_what_a_shard_unpacks_to_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_files, "MAX_RATIO_FREE", 2**20)
    data = tar_of(*pair("a"), member("unread.bin", bytes(5 * 2**20) + b"x"))
    with pytest.raises(InputError, match="x.tar.gz: unpacks to more than 100 times its size"):
        found_in(tmp_path / "x.tar.gz", gzip.compress(data))
    assert found_in(tmp_path / "x.tar", data) == [sample_of("a")]


def test_members_that_are_too_large_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(webdataset, "MAX_BYTES", 500)
    data = tar_of(*pair("a", b"x" * 501), *pair("b"))
    for name, packed in (("x.tar", data), ("x.tar.gz", gzip.compress(data))):
        assert found_in(tmp_path / name, packed) == [f"{tmp_path}/{name} member a.png: 501 bytes, at most 500", sample_of("b")]


def test_mutated_tars_end_in_rows_or_one_line(tmp_path):
    seeds = [tar_of(*pair("a"), *pair("b" * 200), format=format) for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
    seeds.append(gnu_sparse("h.png", 2**32, [(0, 300)], b"z" * 300, 2) + seeds[0])
    for n in range(300):
        chance = random.Random(n)
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.choice((1, 1, 2, 8))):
            place = chance.randrange(len(data))
            data[place:place + chance.choice((0, 1, 1, 4, 512))] = chance.randbytes(chance.choice((0, 1, 1, 4, 512)))
        path = tmp_path / "x.tar"
        path.write_bytes(gzip.compress(bytes(data), 1) if n % 5 == 0 else bytes(data))
        try:
            for row in scan(str(path)):
                if not isinstance(row, InputError):
                    row.turns[0].parts[0].source.read()
        except InputError as error:
            assert "x.tar" in str(error) and len(str(error)) < 1000


# Folders.


def write(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"caption {path.stem}".encode() if name.endswith("txt") else b"picture")


UNREADABLE = ("b.psd", "c.jxl", "d.wma", "e.mp4", "f.svg", "g.MOV", "h.cr2")


def test_media_that_are_not_read_are_counted_in_folders_as_in_tars(tmp_path):
    folder = tmp_path / "data"
    write(folder, "a.png", "a.txt", *UNREADABLE, *(name.split(".")[0] + ".txt" for name in UNREADABLE[:-1]))
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
    for found, place in ((found_in(folder), f"{folder}/"), (found_in(tmp_path / "x.tar"), f"{tmp_path}/x.tar member ")):
        assert found[0] == sample_of("a")
        assert [error.partition(", which")[0] for error in found[1:]] == [
            f"{place}{name.split('.')[0]}: found {name}" for name in UNREADABLE]
        assert all("is not read, expected one of .webp, .png" in error for error in found[1:])


def test_two_media_of_one_key_are_counted(tmp_path):
    for n, (one, other) in enumerate([("x.png", "x.wav"), ("x.png", "x.jpg"), ("x.PNG", "x.png"), ("x.png", "x.mp4"), ("x.png", "x.psd")]):
        write(tmp_path / str(n), one, other, "x.txt")
        (error,) = found_in(tmp_path / str(n))
        assert error == f"{tmp_path}/{n}/x: found {', '.join(sorted((one, other)))}, expected one picture or sound"
    write(tmp_path / "texts", "x.png", "x.txt", "x.TXT")
    assert "expected one of each" in found_in(tmp_path / "texts")[0]
    write(tmp_path / "case", "X.PNG", "X.TXT")
    assert found_in(tmp_path / "case") == [("X", b"picture", "picture")]


def test_captions_without_a_medium_are_told(tmp_path, capsys):
    write(tmp_path, "a.png", "a.txt", "README.txt", "lost.txt", "sub/x.json")
    told = []
    assert [sample.key for sample in read(str(tmp_path), report=told.append)] == ["a"]
    assert told == [f"{tmp_path}: left out 3 .txt and .json files without a picture or sound of their name; first: README.txt"]
    read_source(DataSource([str(tmp_path)]))
    assert told[0] in capsys.readouterr().err


def test_sources_inside_of_a_folder_are_told(tmp_path, capsys):
    write(tmp_path, "a.png", "a.txt", "b.tar", "sub/c.TAR.GZ", "d.jsonl", "sub/e.csv", "metadata.csv", ".hidden.tar", ".sub/f.tar")
    told = []
    assert [sample.key for sample in read(str(tmp_path), report=told.append)] == ["a"]
    assert told == [f"{tmp_path}: left out 5 tables and tars, which are sources of their own; first: b.tar"]
    read_source(DataSource([str(tmp_path)]))
    assert told[0] in capsys.readouterr().err


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_a_folder_with_a_manifest_in_it_says_so(tmp_path, name):
    write(tmp_path, "train/a.png")
    (tmp_path / name).write_text('{"file_name": "train/a.png", "text": "caption a"}' if name.endswith("jsonl")
                                 else "file_name,text\ntrain/a.png,caption a\n")
    with pytest.raises(InputError, match=f"found {name} and no captions beside the media, expected {tmp_path}/{name} as the source"):
        found_in(tmp_path)
    assert found_in(tmp_path / name) == [("1", b"picture", "caption a")]
    write(tmp_path, "train/a.txt")
    assert found_in(tmp_path) == [("train/a", b"picture", "caption a")]


def test_links_that_stay_inside_are_read(tmp_path):
    folder = tmp_path / "data"
    write(folder, "a.png", "a.txt", "store/b.png", "store/b.txt")
    os.symlink("store/b.png", folder / "c.png")
    os.symlink("store/b.txt", folder / "c.txt")
    os.symlink("store", folder / "again")      # read where it is
    os.symlink("..", folder / "store" / "up")  # a loop
    os.symlink(folder, tmp_path / "link")      # what the user names is the source itself
    expected = [sample_of("a"), ("c", b"picture", "caption b"), ("store/b", b"picture", "caption b")]
    assert found_in(folder) == found_in(tmp_path / "link") == found_in(folder, follow_links=True) == expected


def test_links_that_lead_outside_are_refused_by_name(tmp_path):
    folder = tmp_path / "data"
    write(folder, "a.png", "a.txt", "b.png")
    write(tmp_path / "mine", "m.png", "m.txt", "secret.txt")
    os.symlink("/proc/self/environ", folder / "b.txt")
    os.symlink(tmp_path / "mine" / "secret.txt", folder / "alone.txt")
    os.symlink(tmp_path / "mine" / "m.png", folder / "c.png")
    os.symlink(tmp_path / "mine", folder / "linked")
    os.symlink("nothing", folder / "d.png")
    os.symlink("e.png", folder / "e.png")
    found = found_in(folder)
    assert found[1] == f"{folder}/alone.txt: found a link to {tmp_path}/mine/secret.txt, which is outside the source; " \
                       "expected a link to a file inside it, or follow_links: true if you trust the link"
    assert [f if isinstance(f, tuple) else f.split(": ")[0] for f in found] == [
        sample_of("a"), f"{folder}/alone.txt", f"{folder}/b.txt", f"{folder}/c.png", f"{folder}/d.png", f"{folder}/e.png", f"{folder}/linked"]
    assert "/environ, which is outside" in found[2] and "cannot be read" in found[4] and "cannot be read" in found[5]
    os.unlink(folder / "b.txt")
    write(folder, "b.txt")
    source = DataSource([str(folder)], follow_links=True)
    os.symlink(tmp_path, tmp_path / "mine" / "round")  # a loop that leads through the source
    with pytest.raises(InputError, match="d.png"):
        read_source(source, max_bad=0.1)
    assert [sample.key for sample in read_source(source, max_bad=0.9)][:3] == ["a", "b", "linked/m"]


def test_a_sibling_whose_name_begins_alike_is_outside(tmp_path):
    write(tmp_path / "data", "a.png")
    write(tmp_path / "data2", "a.txt")
    os.symlink(tmp_path / "data2" / "a.txt", tmp_path / "data" / "a.txt")
    assert "data2/a.txt, which is outside" in found_in(tmp_path / "data")[0]


def test_special_files_are_never_opened(tmp_path):
    write(tmp_path, "a.png", "a.txt", "p.png", "q.txt", "x.png/inside.png", "x.png/inside.txt")
    os.mkfifo(tmp_path / "p.txt")
    os.mkfifo(tmp_path / "q.png")
    os.mkfifo(tmp_path / "manifest.jsonl")
    os.symlink("q.png", tmp_path / "r.png")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(tmp_path)  # the path of a socket is short
        server.bind("s.png")
        os.chdir(here)
        (tmp_path / "rows.jsonl").write_text('{"image": "q.png", "text": "a"}\n{"text": "b"}\n')
        code = """
import sys
from mmtx.data.sources import scan
from mmtx.data.storage import FileSource
from mmtx.errors import InputError
for path in (".", "rows.jsonl", "manifest.jsonl", "q.png"):
    try:
        print(*(row if isinstance(row, InputError) else row.key for row in ([FileSource(path).read()] if path == "q.png" else scan(path))),
              sep="\\n")
    except InputError as error:
        print(error)
"""
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60,
                              env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "a", "./p.txt: found a named pipe, expected a file", "./q.png: found a named pipe, expected a file",
        "./r.png: found a named pipe, expected a file", "./s.png: found a socket, expected a file", "x.png/inside",
        "rows.jsonl row 1: field 'image' names q.png: no such file", "2",
        "manifest.jsonl: found a pipe, a socket or a device, expected a file", "q.png: found a pipe, a socket or a device, expected a file"]


def test_folders_that_cannot_be_read_are_counted(tmp_path):
    write(tmp_path, "a.png", "a.txt", "b/c.png", "b/c.txt")
    (tmp_path / "b").chmod(0)
    try:
        if os.access(tmp_path / "b", os.R_OK):  # root: a path that is too long cannot be read either
            (tmp_path / "b").chmod(0o700)
            code = "import os\nos.chdir('b')\nfor _ in range(30):\n    os.mkdir('d' * 200); os.chdir('d' * 200)"
            subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=60)
            *found, error = found_in(tmp_path)
            assert found == [sample_of("a"), ("b/c", b"picture", "caption c")]
        else:
            found, error = found_in(tmp_path)
            assert found == sample_of("a")
        assert error.startswith(f"{tmp_path}/b") and "a folder that cannot be read" in error
    finally:
        (tmp_path / "b").chmod(0o700)


# JSON beside a medium.


def test_chats_and_media_in_the_json_beside_a_medium(tmp_path):
    chat = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a"}]
    rows = {"a": {"conversations": chat}, "b": {"caption": "b", "url": "https://x.org/b.png", "width": 3, "messages": chat},
            "c": {"caption": "c", "audio": "c.wav"}, "d": {"conversations": [{"from": "human", "value": "<image><image>"}]},
            "e": {"caption": "e", "images": ["e.png", "f.png"]},
            "f": {"messages": [{"role": "user", "content": [{"type": "image", "image": "/etc/x.png"}]}]}}
    data = tar_of(*(info for key, row in rows.items() for info in (member(f"{key}.png", b"x"), member(f"{key}.json", json.dumps(row).encode()))))
    (tmp_path / "x.tar").write_bytes(data)
    a, b, *errors = scan(str(tmp_path / "x.tar"))
    assert [(turn.role, [getattr(part, "text", "medium") for part in turn.parts]) for turn in a.turns] == [
        ("user", ["medium", "What?"]), ("assistant", ["a"])]
    assert b.caption == "b" and b.metadata == {"url": "https://x.org/b.png", "width": 3, "messages": chat}
    for error, words in zip(errors, ("member c: field 'audio'", "member d: found 2 <image> placeholders for 1 media", "member e: field 'images'",
                                     "member f: field 'messages[0].content[0].image' is '/etc/x.png', expected no medium other than"), strict=True):
        assert words in str(error)
