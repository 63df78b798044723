"""Hugging Face datasets as sources: rows like those of a manifest, pictures and sounds read by mmtx."""

import json
from pathlib import Path

import pytest
from servers import serving

from mmtx.data import hub
from mmtx.data.collection import DataSource
from mmtx.data.prepare import prepare
from mmtx.data.sample import Text
from mmtx.data.sources import read, scan
from mmtx.data.tokens import to_documents
from mmtx.data.trust import Base
from mmtx.errors import InputError

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
STARTER = Path(__file__).parents[1] / "demos" / "data" / "starter"


@pytest.fixture(scope="module")
def pictures():
    """Samples of the starter data: two pictures and a note."""
    return [*read(str(STARTER / "images-test-unseen-style.tar.gz"))[:2], read(str(STARTER / "sounds-test-unseen-notes.tar.gz"))[0]]


def stored(rows, kinds):
    """A dataset of rows as they are stored: encoding sounds, even encoded ones, would take torchcodec and FFmpeg."""
    table = pyarrow.Table.from_pydict(rows, schema=kinds.arrow_schema)
    return datasets.Dataset(datasets.table.InMemoryTable(table))


@pytest.fixture(scope="module")
def folder(pictures, tmp_path_factory):
    """`saved` by `save_to_disk`, `parquet` for `load_dataset`, `splits`: two splits on the disk."""
    folder = tmp_path_factory.mktemp("hub")
    media = [sample.turns[0].parts[0].source.read() for sample in pictures]
    (folder / "b.webp").write_bytes(media[1])
    rows = {
        "image": [{"bytes": media[0], "path": None}, {"bytes": None, "path": str(folder / "b.webp")}, None],
        "audio": [None, None, {"bytes": media[2], "path": "note.ogg"}],
        "caption": [sample.caption for sample in pictures], "style": ["flat", "round", None],
    }
    kinds = datasets.Features({"image": datasets.Image(), "audio": datasets.Audio(decode=False),
                               "caption": datasets.Value("string"), "style": datasets.Value("string")})
    dataset = stored(rows, kinds)
    dataset.save_to_disk(folder / "saved")
    (folder / "parquet").mkdir()
    dataset.to_parquet(folder / "parquet" / "train-00000.parquet")
    datasets.DatasetDict({"train": dataset, "test": dataset.select([2])}).save_to_disk(folder / "splits")
    return folder


def test_columns_are_fields_of_a_manifest(folder, pictures, tokenizers, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    for source in (str(folder / "saved"), f"hf://{folder / 'parquet'}", f"hf://{folder / 'parquet'}:train",
                   str(folder / "splits" / "train")):
        samples = read(source)
        assert [sample.turns[1].parts for sample in samples] == [(Text(sample.caption),) for sample in pictures]
        assert [sample.metadata for sample in samples] == [{"style": "flat"}, {"style": "round"}, {}]
        assert [s.turns[0].parts[0].kind for s in samples] == ["image", "image", "audio"]
        assert [s.turns[0].parts[0].source.read() for s in samples] == [s.turns[0].parts[0].source.read() for s in pictures]
        assert samples[1].where == f"{source} row 2"
    assert to_documents(samples, tokenizers) == to_documents(pictures, tokenizers)
    assert [sample.key for sample in read(str(folder / "saved"), select={"style": ["round"]})] == ["2"]


@pytest.mark.parametrize("format", [{"type": "torch"}, {"type": "numpy"}, {"type": "pandas"}, {"type": "arrow"},
                                    {"type": "torch", "columns": ["image", "id"]}, {"columns": ["id"]}])
def test_the_format_that_a_dataset_was_saved_with_does_not_matter(tmp_path, pictures, format):
    """`save_to_disk` also saves what `set_format` asked for: tensors in place of numbers, or only some columns."""
    cell = {"bytes": pictures[0].turns[0].parts[0].source.read(), "path": None}
    kinds = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string"), "id": datasets.Value("int64"),
                               "fold": datasets.Value("int64")})
    dataset = stored({"image": [cell], "caption": ["a"], "id": [7], "fold": [1]}, kinds)
    dataset.with_format(**format).save_to_disk(tmp_path / "saved")
    (sample,) = read(str(tmp_path / "saved"), select={"fold": [1]})
    assert (sample.key, sample.caption, sample.metadata) == ("7", "a", {"fold": 1})
    assert sample.turns[0].parts[0].source.read() == cell["bytes"]


def test_a_dataset_can_be_prepared(folder, pictures, tokenizers, tmp_path):
    facts = prepare(DataSource([str(folder / "saved")]), tokenizers, tmp_path / "a", rows=2, num_workers=2)
    assert (facts["documents"], facts["shards"]) == (3, 2)
    datasets.load_from_disk(str(folder / "saved")).select([1, 0, 2]).save_to_disk(tmp_path / "other")
    plan = json.loads((tmp_path / "a" / "plan.json").read_text())
    (tmp_path / "a" / "plan.json").write_text(json.dumps({**plan, "sources": [str(tmp_path / "other")]}))
    with pytest.raises(InputError, match=r"shard-0000\d.safetensors: the sources changed"):
        prepare(DataSource([str(tmp_path / "other")]), tokenizers, tmp_path / "a", rows=2)


def test_chats_and_plain_texts(tmp_path):
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "well met"}]
    datasets.Dataset.from_dict({"messages": [chat], "id": ["a"]}).save_to_disk(tmp_path / "chats")
    datasets.Dataset.from_dict({"text": ["one", " "]}).save_to_disk(tmp_path / "texts")
    (sample,) = read(str(tmp_path / "chats"))
    assert sample.key == "a" and [turn.role for turn in sample.turns] == ["user", "assistant"]
    good, bad = scan(str(tmp_path / "texts"))
    assert good.turns[0].parts == (Text("one"),) and "texts row 2: field 'text'" in str(bad)


@pytest.fixture
def strangers(tmp_path):
    """A data set whose pictures are what `names` say, saved on the disk; and as a loaded one."""
    kinds = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})

    def make(*names):
        rows = {"image": [{"bytes": None, "path": name} for name in names], "caption": ["x"] * len(names)}
        found = stored(rows, kinds)
        # The library itself would open what the names say, to save it.
        stored({**rows, "image": [None] * len(names)}, kinds).save_to_disk(tmp_path / "strangers")
        with pyarrow.OSFile(str(next((tmp_path / "strangers").glob("*.arrow"))), "wb") as file:
            with pyarrow.ipc.new_stream(file, found.data.schema) as writer:
                writer.write_table(found.data.table)
        return str(tmp_path / "strangers"), found

    return make


def outcomes(samples):
    """The bytes of each sample's picture, or why it cannot be read."""
    found = []
    for sample in samples:
        try:
            found.append(sample.turns[0].parts[0].source.read())
        except InputError as error:
            found.append(str(error))
    return found


def test_a_data_set_on_the_disk_names_what_a_local_manifest_may(strangers, tmp_path):
    (tmp_path / "a.png").write_bytes(b"A")
    with serving({"/a.png": lambda request: request.answer(b"B")}) as server:
        names = [str(tmp_path / "a.png"), server.address + "/a.png", f"reference://k::{server.address}/refs.json", "file:///etc/hostname",
                 f"Reference://k::{server.address}/refs.json", f"simplecache::{server.address}/a.png", "http://169.254.169.254/a.png"]
        folder, _ = strangers(*names)
        for trusted in (False, True):
            good, url, *bad = outcomes(read(folder, trusted=trusted))
            assert (good, url) == (b"A", b"B")
            assert all("column 'image' names" in text and "found the scheme" in text for text in bad[:4])
        assert "found a link-local address" in outcomes(read(folder))[-1]
        assert server.paths() == ["/a.png"] * 3


def test_a_data_set_of_the_hub_names_nothing_of_the_readers(strangers, tmp_path, monkeypatch):
    import huggingface_hub.constants

    kept = tmp_path / "hub" / "datasets--some--body" / "snapshots" / "1"
    kept.mkdir(parents=True)
    (kept / "a.png").write_bytes(b"A")
    (tmp_path / "own.png").write_bytes(b"own")
    (tmp_path / "hub" / "datasets--other--body").mkdir()
    (tmp_path / "hub" / "datasets--other--body" / "a.png").write_bytes(b"other")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", str(tmp_path / "downloads"))
    with serving({"/a.png": lambda request: request.answer(b"B")}) as server:
        names = [str(kept / "a.png"), str(tmp_path / "own.png"), str(tmp_path / "hub" / "datasets--other--body" / "a.png"),
                 f"{kept}/../../../../own.png", "own.png", server.address + "/a.png", server.address.replace("http", "https") + "/a.png",
                 f"reference://k::{server.address}/refs.json", "hf://datasets/other/body/a.png", "s3://bucket/a.png"]
        monkeypatch.setattr(datasets, "load_dataset", lambda name, split: strangers(*names)[1])
        monkeypatch.chdir(tmp_path)
        good, *bad = outcomes(read("hf://some/body"))
        assert good == b"A" and all(isinstance(text, str) and "column 'image' names" in text for text in bad)
        assert not server.asked
        assert outcomes(read("hf://some/body", trusted=True)[:6]) == [b"A", b"own", b"other", b"own", b"own", b"B"]


CARD = """---
configs:
- config_name: default
  data_files: {name}
---
"""


def test_the_card_of_a_data_set_names_what_its_rows_may(tmp_path, monkeypatch):
    """The library opens `data_files` of a README, which may be a formatting URL that sends environment variables away."""
    (tmp_path / "set").mkdir()
    (tmp_path / "own.jsonl").write_text('{"text": "own"}\n')
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    source = f"hf://{tmp_path}/set"
    with serving({"/refs.json": lambda request: request.answer(b"{}")}) as server:
        for name in (f"reference://k::{server.address}/refs.json", f"'Reference://k::{server.address}/refs.json'",
                     f"simplecache::{server.address}/refs.json", f"zip://a::{server.address}/refs.json", "file:///etc/hostname"):
            (tmp_path / "set" / "README.md").write_text(CARD.format(name=name))
            with pytest.raises(InputError, match=f"^{source}: its card names .*found the scheme"):
                read(source)
        (tmp_path / "set" / "README.md").write_text(CARD.format(name="x::memory"))
        with pytest.raises(InputError, match=f"^{source}: its card names {tmp_path}/set/x::memory: found several URLs in a row"):
            read(source)
        assert not server.asked
        (tmp_path / "set" / "README.md").write_text(CARD.format(name=tmp_path / "own.jsonl"))
        assert [sample.caption for sample in read(source)] == ["own"]  # as a local manifest may
        monkeypatch.setattr("mmtx.data.sources.hub.base_of", lambda path, trusted: Base("hf://datasets/some/body", trusted=trusted))
        with pytest.raises(InputError, match=f"its card names {tmp_path}/own.jsonl: found a local path"):
            read(source)
        assert len(read(source, trusted=True)) == 1


def test_files_of_the_hub_under_the_name_that_it_has_for_them(monkeypatch):
    asked = []
    monkeypatch.setattr(datasets.data_files, "resolve_pattern", lambda pattern, base_path, *rest: asked.append((pattern, base_path)))
    with hub._checked_files(Base("hf://datasets/body")):
        datasets.data_files.resolve_pattern("train-*.parquet", "hf://datasets/some/body@1")
        datasets.data_files.resolve_pattern("https://1.1.1.1/a.csv", "hf://datasets/some/body@1")
        for pattern, folder in (("x::github", "hf://datasets/some/body@1"), ("*", "hf://datasets/some/body@1/reference://k::http://h"),
                                ("*", "/home"), ("/etc/*", "hf://datasets/some/body@1"), ("hf://datasets/other/body/*", "hf://datasets/body@1"),
                                ("http://10.0.0.1/a.csv", "hf://datasets/body@1")):
            with pytest.raises(hub._Refused, match="its card names"):
                datasets.data_files.resolve_pattern(pattern, folder)
    assert len(asked) == 2


def test_names_in_a_column_of_texts_are_judged_alike(tmp_path, monkeypatch):
    (tmp_path / "own.png").write_bytes(b"own")
    found = datasets.Dataset.from_dict({"image": [str(tmp_path / "own.png"), "own.png"], "caption": ["x", "x"]})
    found.save_to_disk(tmp_path / "saved")
    monkeypatch.chdir(tmp_path)
    assert outcomes(read(str(tmp_path / "saved"))) == [b"own", b"own"]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: found)
    (absolute, relative) = scan("hf://some/body")
    assert "found a local path in a source at a URL" in str(absolute)
    assert relative.turns[0].parts[0].source.path == "hf://datasets/some/body/own.png"
def test_media_of_other_columns_are_read_or_refused(pictures, tokenizers, tmp_path):
    media = [sample.turns[0].parts[0].source.read() for sample in pictures]
    cell = lambda data: {"bytes": data, "path": None}
    pixels, lists = datasets.Image(), datasets.List(datasets.Image())
    chat = [{"role": "user", "content": "<image> and <image>?"}, {"role": "assistant", "content": "two"}]
    kinds = datasets.Features({"images": lists, "messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}]})
    stored({"images": [[cell(media[1]), cell(media[0])]], "messages": [chat]}, kinds).save_to_disk(tmp_path / "chats")
    (sample,) = read(str(tmp_path / "chats"))
    first, words, second, end = sample.turns[0].parts
    assert [first.source.read(), words, second.source.read(), end] == [media[1], Text(" and "), media[0], Text("?")]
    assert first.name == f"{sample.where}: images[0]" and second.name == f"{sample.where}: images[1]"
    (turn, _), = [document.turns for document in to_documents([sample], tokenizers)]
    assert [part.kind for part in turn.parts] == ["image", "text", "image", "text"]
    kinds = datasets.Features({"img": pixels, "mask": pixels, "text": datasets.Value("string")})
    stored({"img": [cell(media[0]), None], "mask": [None, cell(media[1])], "text": ["a", "b"]}, kinds).save_to_disk(tmp_path / "named")
    first, second = scan(str(tmp_path / "named"))
    assert "named row 1: field 'img' is DatasetSource" in str(first) and "named row 2: field 'mask'" in str(second)
    first, second = scan(str(tmp_path / "named"), fields={"image": "img", "mask": None})
    assert first.turns[0].parts[0].source.read() == media[0] and "named row 2: field 'img' is empty" in str(second)
    assert [one.turns[0].parts for one in scan(str(tmp_path / "named"), fields={"img": None, "mask": None})] == [(Text("a"),), (Text("b"),)]


def test_a_cell_without_its_picture_is_counted(pictures, tmp_path):
    """Columns are those of all rows: of a chat a null may say that there is no picture, of a caption that it was lost."""
    cell, said = {"bytes": pictures[0].turns[0].parts[0].source.read(), "path": None}, datasets.Value("string")
    kinds = datasets.Features({"image": datasets.Image(), "caption": said})
    stored({"image": [cell, None], "caption": ["a", "b"]}, kinds).save_to_disk(tmp_path / "captions")
    first, second = scan(str(tmp_path / "captions"))
    assert first.caption == "a" and "captions row 2: field 'image' is empty and no other has a medium" in str(second)
    datasets.Dataset.from_dict({"audio": [None, ""], "text": ["a", "b"]}, datasets.Features(
        {"audio": said, "text": said})).save_to_disk(tmp_path / "paths")
    first, second = scan(str(tmp_path / "paths"))
    assert "paths row 1: field 'audio' is empty and" in str(first) and "paths row 2: field 'audio' is empty" in str(second)
    kinds = datasets.Features({"image": datasets.Image(), "messages": [{"role": said, "content": said}]})
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "well met"}]
    stored({"image": [None], "messages": [chat]}, kinds).save_to_disk(tmp_path / "chats")
    (sample,) = scan(str(tmp_path / "chats"))
    assert [turn.parts for turn in sample.turns] == [(Text("hello"),), (Text("well met"),)]


def test_media_inside_of_other_columns(pictures, tmp_path):
    """Parts of messages may hold pictures; elsewhere they are refused rather than dropped. Neither is decoded by the library."""
    media = [sample.turns[0].parts[0].source.read() for sample in pictures]
    cell = lambda data: {"bytes": data, "path": "no.png"}
    said, pixels = datasets.Value("string"), datasets.Image()
    part = lambda text, image: {"type": "text" if text else "image", "text": text, "image": image}
    kinds = datasets.Features({"messages": datasets.List({"role": said, "content": datasets.List({"type": said, "text": said, "image": pixels})})})
    chat = [{"role": "user", "content": [part(None, cell(media[0])), part("and", None), part(None, cell(media[1]))]},
            {"role": "assistant", "content": [part("two", None)]}]
    stored({"messages": [chat]}, kinds).save_to_disk(tmp_path / "chats")
    (sample,) = read(str(tmp_path / "chats"))
    first, words, second = sample.turns[0].parts
    assert [first.source.read(), words, second.source.read()] == [media[0], Text("and"), media[1]] and sample.caption == "two"
    assert second.name == f"{sample.where}: messages[0].content[2].image"
    for name, kind in (("image", pixels), ("audio", datasets.Audio())):
        kinds = datasets.Features({"image": pixels, "more": {name: kind, "size": datasets.Value("int64")}, "text": said})
        rows = {"image": [cell(media[0])] * 2, "more": [{name: cell(media[1]), "size": 2}, {name: None, "size": 3}], "text": ["a", "b"]}
        stored(rows, kinds).save_to_disk(tmp_path / name)
        refused, good = scan(str(tmp_path / name))
        assert f"{name} row 1: field 'more.{name}' is DatasetSource" in str(refused)
        assert good.caption == "b" and good.metadata == {"more": {name: None, "size": 3}}
        assert [one.caption for one in scan(str(tmp_path / name), fields={"more": None})] == ["a", "b"]


def test_media_in_columns_without_a_type_of_media(pictures, tmp_path, monkeypatch):
    """As other programs write them: bytes, or an object of bytes and a name, which is not opened."""
    media = [sample.turns[0].parts[0].source.read() for sample in pictures]
    raw, said = datasets.Value("binary"), datasets.Value("string")
    monkeypatch.chdir(tmp_path)
    Path("a.png").write_bytes(b"another")
    kinds = datasets.Features({"image": {"bytes": raw, "path": said}, "audio": raw, "text": said})
    stored({"image": [{"bytes": media[0], "path": "a.png"}, None], "audio": [None, media[2]], "text": ["a", "b"]}, kinds).save_to_disk("saved")
    first, second = read("saved")
    assert [one.turns[0].parts[0].kind for one in (first, second)] == ["image", "audio"]
    assert [one.turns[0].parts[0].source.read() for one in (first, second)] == [media[0], media[2]]


def test_classes_are_their_names(pictures, tmp_path):
    cell = {"bytes": pictures[0].turns[0].parts[0].source.read(), "path": None}
    kinds = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    stored({"img": [cell] * 4, "label": [1, 0, None, -1]}, kinds).save_to_disk(tmp_path / "saved")
    fields = {"image": "img", "text": "label"}
    dog, cat, *unknown = scan(str(tmp_path / "saved"), fields=fields)
    assert (dog.caption, cat.caption) == ("dog", "cat") and all("field 'label' is empty or missing" in str(error) for error in unknown)


@pytest.mark.parametrize("name", [None, ""])
def test_a_cell_with_neither_bytes_nor_a_path_is_told(strangers, name):
    folder, _ = strangers(name)
    assert outcomes(read(folder)) == ["row 1, column 'image': found nothing, expected a picture or sound"]


def test_what_cannot_be_read_is_named(folder, tokenizers, tmp_path):
    for source, told in ((str(folder / "splits"), "found the splits train, test, expected the name of one, as in .*splits/train"),
                         (f"hf://{tmp_path}/nothing", "nothing: cannot be opened as a dataset"),
                         (f"hf://{folder / 'parquet'}:gone", "parquet:gone: cannot be opened as a dataset")):
        with pytest.raises(InputError, match=told):
            read(source)
    saved = datasets.Dataset.from_dict({"image": [{"bytes": b"no picture", "path": None}], "text": ["a"]}, datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string")}))
    saved.save_to_disk(tmp_path / "broken")
    with pytest.raises(InputError, match="broken row 1: not a whole picture"):
        to_documents(read(str(tmp_path / "broken")), tokenizers)
