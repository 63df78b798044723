"""Prose and definitions as plain text: a part of build_starter.py.

Three of Jane Austen's novels (public domain), with a tenth of the chapters held out for testing, the beginning of a fourth novel as
another test, and definitions of things from WordNet. Rows are `{"text": ..., "source": ...}`; those of definitions have only "text".
"""
import hashlib
import json
import re
import struct
import zlib

DEB = ["wordnet-base", "r-cran-janeaustenr"]
NOVELS = ["emma", "mansfieldpark", "northangerabbey", "persuasion", "prideprejudice", "sensesensibility"]  # in file order
TRAIN, UNSEEN = {"prideprejudice": "Pride and Prejudice", "northangerabbey": "Northanger Abbey", "emma": "Emma"}, "persuasion"
UNSEEN_CHARACTERS, MOST = 120_000, 1000  # characters of the unseen novel, and of one row
THINGS = {"05", "06", "08", "13", "17", "19", "20"}  # WordNet's files of animal, artifact, body, food, object, phenomenon, plant


def read_novels(work):
    """{name: lines}: the R package stores each novel as a compressed string vector, one after another."""
    data = (work / "deb/r-cran-janeaustenr/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    novels = {}
    for name in NOVELS:
        size, = struct.unpack(">I", data[:4])
        unpacker = zlib.decompressobj()
        novels[name] = read_strings(unpacker.decompress(data[4:]))
        data = unpacker.unused_data
        assert sum(map(len, novels[name])) < size
    return novels


def read_strings(data):
    """The strings of a character vector in R's binary format, version 3: each is preceded by flags and its length."""
    at = 18 + struct.unpack(">I", data[14:18])[0]
    kind, count = struct.unpack(">II", data[at:at + 8])
    assert data[:2] == b"X\n" and kind & 255 == 16, "not a character vector of R"
    at, strings = at + 8, []
    for _ in range(count):
        size = struct.unpack(">I", data[at + 4:at + 8])[0]
        strings.append(data[at + 8:at + 8 + size].decode())
        at += 8 + size
    return strings


def chapters(lines):
    """[[paragraph, ...], ...]: without the text before the first heading, headings and emphasis marks."""
    parts = []
    for paragraph in "\n".join(line.strip() for line in lines).split("\n\n"):
        text = " ".join(paragraph.replace("_", "").split())
        if re.fullmatch(r"(?i)(chapter|volume) [\divxlc]+\.?", text):
            parts.append([])
        elif parts and text and text.lower() not in ("finis", "the end"):
            parts[-1].append(text)
    return [part for part in parts if part]


def rows_of(paragraphs, source):
    """Paragraphs -> rows of at most MOST characters: short paragraphs are joined, long ones split after a sentence."""
    rows = []
    for paragraph in paragraphs:
        for piece in re.findall(rf"(?s).{{1,{MOST}}}(?:(?<=[.!?\"]) |$)|.{{1,{MOST}}}(?: |$)", paragraph):
            if rows and len(rows[-1]) + 1 + len(piece) <= MOST:
                rows[-1] += "\n" + piece.strip()
            else:
                rows.append(piece.strip())
    return [{"text": row, "source": source} for row in rows]


def definitions(work):
    """Definitions, such as "apple: fruit with red or yellow or green skin ...", without usage examples."""
    rows = []
    for line in (work / "deb/wordnet-base/usr/share/wordnet/data.noun").read_text(encoding="latin-1").splitlines():
        head, bar, gloss = line.partition(" | ")
        fields = head.split()
        if bar and not line.startswith(" ") and fields[1] in THINGS:
            name, text = fields[4].replace("_", " "), gloss.split('; "')[0].strip()
            if re.fullmatch(r"[a-z-]+", name) and text.isascii() and '"' not in text and len(text) >= 40:
                rows.append({"text": f"{name}: {text}"})
    return rows


def is_test(text):
    return hashlib.sha256(text.encode()).digest()[0] % 20 == 0


def build_text(work, out):
    train, test, novels = [], [], read_novels(work)
    for name, title in TRAIN.items():
        for number, chapter in enumerate(chapters(novels[name]), 1):
            (test if number % 10 == 5 else train).extend(rows_of(chapter, title))
    unseen = [row for chapter in chapters(novels[UNSEEN]) for row in rows_of(chapter, "Persuasion")]
    while sum(len(row["text"]) for row in unseen) > UNSEEN_CHARACTERS:
        unseen.pop()
    known = definitions(work)
    parts = {"text-train": train + [row for row in known if not is_test(row["text"])], "text-test-chapters": test,
             "text-test-novel": unseen, "text-test-definitions": [row for row in known if is_test(row["text"])]}
    for name, rows in parts.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return {"files": {f"{name}.jsonl": len(rows) for name, rows in parts.items()},
            "bytes_of_text": {name: sum(len(row["text"].encode()) for row in rows) for name, rows in parts.items()}}
