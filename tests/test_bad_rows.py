"""Rows that cannot be used: one count for all commands and all stages of each."""

import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from mmtx.cli import main
from mmtx.data.collection import DataSource, read_sources
from mmtx.data.corpus import read_corpus
from mmtx.data.prepare import prepare
from mmtx.errors import InputError
from mmtx.report import report
from mmtx.training.codec import CodecModule
from mmtx.training.codec_data import CodecData

ROWS = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twenty rows: one is no JSON, and of each style the picture of one is damaged."""
    folder = tmp_path_factory.mktemp("rows")
    lines = []
    for number in range(ROWS):
        picture = io.BytesIO()
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (16, 16, 3), np.uint8)).save(picture, "PNG")
        (folder / f"{number}.png").write_bytes(b"damaged" if number in (7, 12) else picture.getvalue())
        row = {"image": f"{number}.png", "text": "a red circle", "style": "ab"[number % 2]}
        lines.append("{" if number == 3 else json.dumps(row))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def decoder(source, limit, model, folder):
    return len(read_corpus([source], model.tokenizers, model.vocabulary, max_seq_len=200, max_bad=limit))


def codec(source, limit, model, folder):
    data = CodecData([source], [source], max_bad=limit)
    data.attach(CodecModule(model.tokenizers["image"]), steps=1)
    return len(data.train_media)


def prepared(source, limit, model, folder):
    return prepare(source, model.tokenizers, folder, max_bad=limit)["documents"]


def decoder_of_prepared(source, limit, model, folder):
    prepare(source, model.tokenizers, folder, max_bad=1.0)
    return decoder(DataSource([str(folder)]), limit, model, folder)


def evaluate(source, limit, model, folder):
    (section,) = report(model, [source], [source], show=0, max_bad=limit)
    return int(re.search(r"(\d+) samples", section)[1])


COMMANDS = [decoder, codec, prepared, decoder_of_prepared, evaluate]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("select", "bad", "left"), [(None, 3, 17), ({"style": ["b"]}, 2, 8), ({"style": ["a"]}, 2, 9)])
def test_all_commands_count_alike(command, select, bad, left, folder, tiny_model, tmp_path):
    # Style b is odd: the damaged rows of a source are the row that is no JSON and those of the selected style.
    source = DataSource([str(folder / "rows.jsonl")], select)
    assert command(source, bad / ROWS, tiny_model, tmp_path / "one") == left
    # Each stage alone would be within the limit.
    with pytest.raises(InputError, match=f"{bad} of {ROWS} rows cannot be used; first: .*rows.jsonl row 4.*may be bad, which max_bad sets"):
        command(source, bad / ROWS - 0.001, tiny_model, tmp_path / "two")


def test_each_source_has_a_count_of_its_own(folder, tiny_model, tmp_path):
    (tmp_path / "good.jsonl").write_text('{"text": "a blue square"}\n' * 100)
    sources = [DataSource([str(folder / "rows.jsonl")]), DataSource([str(tmp_path / "good.jsonl")])]
    for some in (sources, sources[::-1]):
        with pytest.raises(InputError, match="3 of 20 rows"):
            read_corpus(some, tiny_model.tokenizers, tiny_model.vocabulary, max_seq_len=200, max_bad=0.1)
    corpus = read_corpus(sources, tiny_model.tokenizers, tiny_model.vocabulary, max_seq_len=200, max_bad=0.15)
    assert len(corpus) == 117


def test_a_row_counts_once_and_is_left_out_whole(folder, tiny_model, tmp_path):
    pictures = [{"type": "image", "image": str(folder / f"{number}.png")} for number in (7, 12, 1)]
    row = {"messages": [{"role": "user", "content": pictures}, {"role": "assistant", "content": "two of three"}]}
    good = [{"image": str(folder / "0.png"), "text": "a"}] * 3
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (row, *good)))
    source = DataSource([str(tmp_path / "rows.jsonl")])
    assert codec(source, 0.25, tiny_model, None) == 3 == decoder(source, 0.25, tiny_model, None)


def test_what_is_skipped_is_told_in_one_line(folder, tiny_model, capsys):
    read_corpus([DataSource([str(folder / "rows.jsonl")])], tiny_model.tokenizers, tiny_model.vocabulary, max_seq_len=200, max_bad=1)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r"skipped: 3 of 20 rows cannot be used; first: .*row 4: .*row 8: .*row 13: ", line)


def test_a_limit_that_keeps_few_rows_leaves_the_count_alone(folder):
    found = read_sources([DataSource([str(folder / "rows.jsonl")], limit=2)], 0.05)
    assert len(found.samples) == 2 and found.counters[0].rows == ROWS and found.counters[0].count == 1


def test_commands_say_it_in_the_same_way(folder, tiny_model, tmp_path, capsys):
    tiny_model.save(tmp_path / "model")
    for kind, tokenizer in tiny_model.tokenizers.items():
        tokenizer.save(tmp_path / kind)
    model, rows = ["--model", str(tmp_path / "model"), "--device", "cpu"], str(folder / "rows.jsonl")
    folders = [str(tmp_path / kind) for kind in tiny_model.tokenizers]
    commands = {
        "evaluate": ["evaluate", rows, "--show", "0", *model],
        "prepare": ["prepare", rows, "--num_workers", "1", "--output", str(tmp_path / "out"), "--tokenizers", *folders],
    }
    for command in commands.values():
        with pytest.raises(SystemExit):
            main(command)
        assert "of 20 rows cannot be used" in capsys.readouterr().err
        main([*command, "--max_bad", "0.15"])
        assert "17 samples" in (out := capsys.readouterr().out) or "17 documents" in out


def test_inspect_shows_what_can_be_used_and_tells_of_the_rest(folder, tiny_model, tmp_path, capsys):
    tiny_model.save(tmp_path / "model")
    model = ["--model", str(tmp_path / "model"), "--device", "cpu"]
    main(["inspect", str(folder / "rows.jsonl"), "--rows", "7", *model])
    found = capsys.readouterr()
    assert re.findall(r"row (\d+): \d+ ids", found.out) == ["1", "2", "3", "5", "6", "7", "9"]
    assert found.err.startswith("skipped: 2 of 9 rows cannot be used; first: ") and "row 4" in found.err
    (tmp_path / "bad.jsonl").write_text("{\n")
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path / "bad.jsonl"), *model])
    assert "no sample can be used: 1 of 1 rows" in capsys.readouterr().err
