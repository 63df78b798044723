"""The command line on a saved tiny model: what each command prints, and one line for each mistake of a user."""

import base64
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from PIL import Image

import mmtx
from mmtx.cli import main
from mmtx.errors import InputError, escape

RATE = 16_000


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    """A model, media, and a manifest over them."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_model.save(folder / "model")
    (folder / "media").mkdir()
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "media" / f"{name}.png")
    soundfile.write(folder / "media" / "c.wav", 0.5 * random.standard_normal(4000).clip(-1, 1), RATE)
    rows = [{"image": "media/a.png", "text": "a red circle"}, {"image": "media/b.png", "text": "a blue square"},
            {"audio": "media/c.wav", "text": "trumpet"}]
    (folder / "pictures.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    (folder / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "text.txt").write_text("a red circle")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def run(folder, capsys, monkeypatch):
    """Run a command with the tiny model on the CPU -> what it printed."""
    monkeypatch.chdir(folder)

    def run(*arguments: str) -> str:
        main([*arguments, "--model", "model", "--device", "cpu"])
        return capsys.readouterr().out

    return run


@pytest.fixture
def model(folder):
    return mmtx.load(folder / "model", device="cpu")


# -- What commands print -------------------------------------------------------------------------------------


def test_caption_of_one_file_is_the_caption(run, model, folder):
    assert run("caption", "media/a.png", "--max_new_tokens", "4") == (
        escape(model.caption(folder / "media" / "a.png", max_new_tokens=4)) + "\n")


def test_caption_of_a_folder_names_each_file(run, model, folder):
    told = run("caption", "media", "--max_new_tokens", "4", "--temperature", "1", "--seed", "2")
    names = ["media/a.png", "media/b.png", "media/c.wav"]
    captions = model.caption([folder / name for name in names], max_new_tokens=4, temperature=1.0, seed=2)
    assert told == "".join(f"{name}\t{escape(caption)}\n" for name, caption in zip(names, captions, strict=True))


def test_generate_writes_text(run, model):
    options = ("--temperature", "1", "--seed", "3", "--max_new_tokens", "9", "--top_k", "50", "--top_p", "0.9")
    expected = model.generate("what is it?", temperature=1.0, seed=3, max_new_tokens=9, top_k=50, top_p=0.9)
    assert run("generate", "what is it?", *options) == escape(expected, keep="\n\t") + "\n"


def test_generate_takes_parts_in_order(run, model, folder):
    expected = model.generate(["what is", folder / "media" / "a.png"], max_new_tokens=9, temperature=1.0, seed=1)
    assert run("generate", "what is", "media/a.png", "--max_new_tokens", "9", "--temperature", "1", "--seed",
               "1") == escape(expected, keep="\n\t") + "\n"


def test_generate_writes_a_picture_and_a_sound(run, folder, tmp_path):
    picture, sound = tmp_path / "out.png", tmp_path / "out.wav"
    assert run("generate", "a red circle", "--out", "image", "--file", str(picture)) == f"{picture}\n"
    assert Image.open(picture).size == (16, 16)
    run("generate", "a red circle", "--out", "audio", "--file", str(sound), "--max_new_tokens", "6")
    assert soundfile.info(sound).samplerate == RATE


@pytest.mark.slow
def test_a_picture_is_drawn_by_the_model_for_it_where_none_is_named(tmp_path, capsys):
    for name, model in (("default", ()), ("named", ("--model", "demos/generate"))):
        assert main(["generate", "red apple", "--out", "image", "--file", str(tmp_path / f"{name}.png"), "--device", "cpu", *model]) in (0, None)
    capsys.readouterr()
    default, named = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("default", "named"))
    assert default.std() > 10 and np.array_equal(default, named)


@pytest.mark.slow
def test_a_document_goes_on_with_what_the_model_for_it_has_learnt(capsys):
    def answer(*options):
        assert main(["generate", "She was very well", "--out", "document", "--max_new_tokens", "12", "--device", "cpu", *options]) in (0, None)
        return capsys.readouterr().out

    assert answer() == answer("--model", "demos/prose") != answer("--model", "demos/starter")
    assert len(answer().split()) > 2


def test_a_document_is_continued_from_its_beginning(run, model):
    expected = model.generate("a red", out="document", max_new_tokens=8)
    assert run("generate", "a red", "--out", "document", "--max_new_tokens", "8") == "".join(
        piece if isinstance(piece, str) else f"<{type(piece).__name__}>" for piece in expected) + "\n"


def test_generate_completes_a_picture(run, model, tmp_path):
    file, sampling = tmp_path / "out.png", {"temperature": 1.0, "seed": 4, "guidance_scale": 2.0}
    options = ("--out", "image", "--file", str(file), "--begin", "media/a.png", "--temperature", "1", "--seed", "4",
               "--guidance_scale", "2")
    for rows, words in ((None, ()), (8, ("a red circle",)), (16, ())):
        run("generate", *words, *options, *(() if rows is None else ("--rows", str(rows))))
        expected = model.outpaint("media/a.png", rows, list(words), **sampling)
        assert np.array_equal(np.asarray(Image.open(file)), np.asarray(expected))


def test_generate_goes_on_with_a_sound(run, model, tmp_path):
    file = tmp_path / "out.wav"
    run("generate", "trumpet", "--out", "audio", "--file", str(file), "--begin", "media/c.wav", "--seconds", "0.2",
        "--temperature", "1", "--seed", "4")
    samples, rate = soundfile.read(file)
    expected = model.continue_audio("media/c.wav", 0.2, "trumpet", temperature=1.0, seed=4)
    assert rate == RATE and len(samples) == len(expected.samples) > 4000
    assert np.abs(samples - expected.samples.clip(-1, 1)).max() < 1e-3


def test_tokenize_prints_the_ids(run, model, folder):
    ids = [int(word) for word in run("tokenize", "a red circle", "media/a.png").split()]
    assert ids == model.tokenize(["a red circle", folder / "media" / "a.png"])


def test_inspect_shows_which_ids_train(run, model):
    lines = run("inspect", "all.jsonl", "--rows", "2").splitlines()
    assert [line for line in lines if line.startswith("all.jsonl")] == [
        next(line for line in lines if line.startswith(f"all.jsonl row {row}: ")) for row in (1, 2)]
    words = lines[lines.index(next(line for line in lines if line.startswith("all.jsonl row 1"))) + 1].split(" ")
    pieces = [model.tokenizers["text"].piece(i) for i in model.tokenizers["text"].encode("a red circle")]
    # Of the picture nothing trains, of the answer everything behind its tag.
    assert words[:5] == ["<bos>", "<user>", "<image>", "<h:2>", "<w:2>"]
    assert words[-len(pieces) - 3:] == ["<assistant>", *(f"{piece}*" for piece in pieces), "<end>*", "<eos>"]
    assert not any(word.endswith("*") for word in words[:-len(pieces) - 2])
    count = len(pieces) + 1
    assert f"{len(words)} ids, {count} trained" in "\n".join(lines)


def test_inspect_reads_fields_of_other_names(run, folder):
    row = {"img": "media/a.png", "label": "a red circle", "text": "not this"}
    (folder / "named.jsonl").write_text(json.dumps(row) + "\n")
    told = run("inspect", "named.jsonl", "--fields", "image=img", "caption=label", "text=")
    assert told.splitlines()[-1] == run("inspect", "pictures.jsonl").splitlines()[-1]


def test_inspect_colours_on_demand(run, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\033[90m<bos>\033[0m" in run("inspect", "pictures.jsonl")


def test_evaluate_compares_with_the_truth_and_the_control(run):
    out = run("evaluate", "pictures.jsonl", "--train", "pictures.jsonl", "--show", "2", "--per_class")
    assert "pictures.jsonl: 2 samples" in out
    assert "a red circle" in out and "a blue square" in out
    row = next(line.split() for line in out.splitlines() if line.startswith("exact caption"))
    assert "right, mean over 2 values: 0.000" in out
    # The control has seen these very pictures: it is always right, which the untrained model is not.
    assert (row[2], row[5], row[-1]) == ("0.000", "1.000", "2")


def test_evaluate_takes_its_data_from_a_config(run, folder):
    source = {"paths": ["pictures.jsonl"]}
    turned = {**source, "task": "generate"}  # trains pictures, so there is no caption to compare
    held_out = [{**source, "limit": 1}, source, turned]
    data = {"tokenizers": {"text": "text"}, "train": [source, turned], "validation": held_out}
    config = {"data": {"init_args": data}, "model": {"init_args": {}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    out = run("evaluate", "--config", "config.yaml", "--show", "0")
    assert "pictures.jsonl: 1 samples" in out and out.count("pictures.jsonl: 2 samples") == 1


def test_evaluate_chooses_among_the_captions_of_the_source(run, model, folder):
    out = run("evaluate", "pictures.jsonl", "--closed_set", "--show", "2")
    labels = ["a red circle", "a blue square"]
    best = [max(found, key=found.get) for found in model.classify(["media/a.png", "media/b.png"], labels)]
    row = next(line.split() for line in out.splitlines() if line.startswith("exact caption"))
    assert row[2] == f"{np.mean([said == label for said, label in zip(best, labels, strict=True)]):.3f}"
    assert set(best) <= set(labels) and out.count("a red circle") + out.count("a blue square") == 4


def test_classify_prints_labels_with_their_probabilities(run, model, folder):
    labels = ["a red circle", "a blue square", "trumpet"]
    told = run("classify", "media", "--candidate_labels", *labels, "--top", "2", "--question", "what is it?")
    names = ["media/a.png", "media/b.png", "media/c.wav"]
    found = model.classify([folder / name for name in names], labels, "what is it?")
    best = [", ".join(f"{share:.3f} {label}" for label, share in [*one.items()][:2]) for one in found]
    assert told == "".join(f"{name}\t{text}\n" for name, text in zip(names, best, strict=True))
    assert run("classify", "media/a.png", "--candidate_labels", *labels).count(",") == 0


@pytest.mark.parametrize("arguments", [["--help"], ["caption", "--help"], ["evaluate", "--help"]])
def test_help_succeeds(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("usage: mmtx")


# -- Mistakes ------------------------------------------------------------------------------------------------

MISTAKES = [
    ("generate x --file y.txt", ["--file: found --out text, which is printed"]),
    ("generate x --rows 3", ["--rows: found without --begin or with --out text, expected --begin and --out image"]),
    ("generate x --out image --file y.png --seconds 3", ["--seconds: found without --begin or with --out image, expected --begin and --out audio"]),
    ("generate x --out image --file picture --max_new_tokens 1", ["picture: found no extension, expected one such as .png"]),
    ("", ["required", "COMMAND"]),
    ("paint", ["paint", "caption"]),
    ("caption", ["required", "files"]),
    ("caption nothing.png", ["nothing.png", "no such file"]),
    ("caption empty", ["empty", "no pictures or sounds"]),
    ("caption text.txt", ["text.txt", "neither a picture nor a sound"]),
    ("caption broken.png", ["broken.png", "not a whole picture"]),
    ("caption media/a.png --model nothing", ["nothing", "no such folder"]),
    ("caption media/a.png --model empty", ["empty/config.json", "no such file"]),
    ("caption media/a.png --device abacus", ["device", "abacus"]),
    ("caption media/a.png --device cuda:99", ["device", "cuda:99"]),
    ("caption media/a.png --temperature hot", ["--temperature", "hot"]),
    ("caption media/a.png --temperature -1", ["temperature", "-1.0"]),
    ("caption media/a.png --top_k 0", ["--top_k", "'0'", "1 or more"]),
    ("caption media/a.png --max_new_tokens 0", ["--max_new_tokens", "'0'"]),
    ("caption media/a.png --colour red", ["--colour red"]),
    ("generate", ["required", "parts"]),
    ("generate a --out image", ["--file", "image"]),
    ("generate a --out video", ["video", "image"]),
    ("generate --begin media/a.png", ["--begin", "--out text"]),
    ("generate --begin media/a.png --out image", ["--file", "image"]),
    ("generate --begin media/c.wav --out image --file out.png", ["found audio, expected image"]),
    ("generate --begin nothing.png --out image --file out.png", ["nothing.png", "no such file"]),
    ("generate --begin media/a.png --rows 3 --out image --file out.png", ["rows: found 3", "multiple of 8"]),
    ("generate --begin media/c.wav --seconds 0 --out audio --file out.wav", ["seconds: found 0"]),
    ("generate a --guidance_scale -1", ["guidance_scale: found -1"]),
    ("generate a --out image --file nowhere/out.png", ["nowhere/out.png", "cannot be written"]),
    (f"generate a --out image --file {'n' * 300}.png", ["cannot be written", "File name too long"]),
    ("generate a --out image --file out.abc", ["out.abc", "cannot be written"]),
    ("generate a --out audio --file out.abc --max_new_tokens 2", ["out.abc", "cannot be written"]),
    ("generate a nothing.png", ["nothing.png", "no such file"]),
    ("tokenize nothing.wav", ["nothing.wav", "no such file"]),
    ("detokenize 3 x", ["ids: found 'x', expected whole numbers"]),
    (f"detokenize {'9' * 5000}", ["ids: found '9999", "expected whole numbers"]),
    ("tokenize broken.png", ["broken.png", "not a whole picture"]),
    ("inspect nothing.jsonl", ["nothing.jsonl", "no such file"]),
    ("inspect empty", ["empty", "no samples"]),
    ("inspect text.txt", ["text.txt", "unknown kind of data"]),
    ("inspect all.jsonl --rows many", ["--rows", "many"]),
    ("inspect all.jsonl --rows -1", ["--rows", "-1", "1 or more"]),
    ("inspect all.jsonl --rows 1.5", ["--rows", "1.5", "whole number"]),
    ("caption media/a.png --seed -1", ["--seed", "-1"]),
    ("caption media/a.png --seed 18446744073709551616", ["--seed", "18446744073709551616", "from 0 to 18446744073709551615"]),
    ("evaluate pictures.jsonl --show -1", ["--show", "-1", "0 or more"]),
    ("generate --begin media/c.wav --seconds 1e9 --out audio --file out.wav", ["seconds", "1000000000"]),
    ("generate --begin media/c.wav --seconds nan --out audio --file out.wav", ["seconds", "nan"]),
    ("generate --begin media/a.png --rows -8 --out image --file out.png", ["--rows", "-8"]),
    ("prepare pictures.jsonl --output out --num_workers 0", ["--num_workers", "'0'"]),
    ("prepare pictures.jsonl --output out --rows -1", ["--rows", "-1"]),
    ("inspect all.jsonl --fields image", ["--fields", "'image'", "FIELD=NAME"]),
    ("evaluate --config nothing.yaml --fields image=x", ["--fields", "--config"]),
    ("evaluate --config nothing.yaml --follow_links", ["--follow_links: found with --config"]),
    ("evaluate --config nothing.yaml --train pictures.jsonl", ["--train: found with --config"]),
    ("evaluate pictures.jsonl --config nothing.yaml", ["found both sources and --config"]),
    ("evaluate --config configs/starter/generate.yaml", ["generate.yaml: found no source to caption in data.validation"]),
    ("evaluate", ["held-out", "--config"]),
    ("evaluate nothing.jsonl", ["nothing.jsonl", "no such file"]),
    ("evaluate --config nothing.yaml", ["nothing.yaml", "no such folder or file"]),
    ("evaluate --config nothing.yaml --reader a.py:b", ["--reader", "--config"]),
    ("evaluate pictures.jsonl --reader nothing.py:b", ["nothing.py", "no such"]),
    ("evaluate --config text.txt", ["text.txt", "not the configuration of a decoder"]),
    ("evaluate pictures.jsonl --train nothing.jsonl", ["nothing.jsonl", "no such file"]),
]


@pytest.mark.parametrize("line, told", MISTAKES, ids=[line or "nothing" for line, _ in MISTAKES])
def test_a_mistake_ends_in_one_line_and_status_2(line, told, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    arguments = line.split()
    if arguments and "--model" not in arguments:
        arguments += ["--model", "model"]
    if arguments and "--device" not in arguments:
        arguments += ["--device", "cpu"]
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.err.startswith("mmtx: error: ") and captured.err.count("\n") == 1
    assert all(word in captured.err for word in told), captured.err
    assert captured.out == ""


def test_a_mistake_in_a_config_of_evaluate_is_told(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for data in ({}, {"init_args": {"train": []}}, {"init_args": {"train": [{"path": "a"}], "validation": []}}):
        (folder / "bad.yaml").write_text(yaml.safe_dump({"data": data}))
        with pytest.raises(SystemExit) as stop:
            main(["evaluate", "--config", "bad.yaml", "--model", "model", "--device", "cpu"])
        assert stop.value.code == 2
        assert capsys.readouterr().err.startswith("mmtx: error: bad.yaml: not the configuration of a decoder")


# -- Many files, and names and terminals of all kinds ---------------------------------------------------------


def command(*arguments: str | bytes, **options) -> subprocess.CompletedProcess:
    """`mmtx ARGUMENTS` in a process of its own, on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    return subprocess.run([sys.executable, "-m", "mmtx", *arguments], capture_output=True, timeout=120, env=environment,
                          **options)


def test_one_bad_file_of_many_is_named_and_the_others_are_captioned(folder, model, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    files = ["media/a.png", "broken.png", "media", "nothing.wav", "text.txt", "empty", "media/b.png"]
    with pytest.raises(SystemExit) as stop:
        main(["caption", *files, "--model", "model", "--device", "cpu", "--max_new_tokens", "3"])
    captured = capsys.readouterr()
    names = ["media/a.png", "media/a.png", "media/b.png", "media/c.wav", "media/b.png"]
    captions = [model.caption(folder / name, max_new_tokens=3) for name in names]
    assert captured.out == "".join(f"{name}\t{escape(caption)}\n" for name, caption in zip(names, captions, strict=True))
    errors = captured.err.splitlines()
    assert [line.split(": ")[2] for line in errors] == ["broken.png", "nothing.wav", "text.txt", "empty"]
    assert all(line.startswith("mmtx: error: ") for line in errors)
    assert stop.value.code == 1


def test_where_no_file_can_be_captioned_the_status_is_2(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as stop:
        main(["caption", "broken.png", "nothing.png", "--model", "model", "--device", "cpu"])
    captured = capsys.readouterr()
    assert (stop.value.code, captured.out, captured.err.count("\n")) == (2, "", 2)


def test_a_wrong_option_is_told_once_and_not_of_each_file(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as stop:
        main(["caption", "media", "--model", "model", "--device", "cpu", "--temperature", "-1"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_every_group_of_files_is_captioned_once(folder, model, monkeypatch):
    """Whatever the groups that are asked for together, and wherever in them the bad ones lie."""
    from mmtx import captioning

    good, bad = str(folder / "media" / "a.png"), str(folder / "broken.png")
    sampled = {"max_new_tokens": 2, "temperature": 1.0, "seed": 5}
    truth = model.caption([good] * 8, **sampled)  # of each place, whatever is at the others
    assert len(set(truth)) > 1
    for together in (1, 2, 3, 7):
        monkeypatch.setattr(captioning, "FILES_PER_CALL", together)
        for pattern in ("", "b", "g", "gbg", "bbgbb", "ggggg", "gggbggg", "bgggggb", "gmgmmg"):
            files = [{"g": good, "b": bad, "m": InputError("x.png: no such file")}[letter] for letter in pattern]
            found = list(captioning.caption_files(model, files, **sampled))
            assert [item.name for item in found] == ["x.png" if isinstance(file, InputError) else file for file in files]
            assert [item.caption for item in found] == [truth[i] if letter == "g" else None for i, letter in enumerate(pattern)]
            assert [item.error is None for item in found] == [letter == "g" for letter in pattern]


@pytest.mark.parametrize("call, told", [
    (lambda model: mmtx.caption_files(model, "a.png"), "files: found str, expected a list of files"),
    (lambda model: mmtx.caption_files(model, Path("a.png")), "files: found .*Path"),
    (lambda model: mmtx.caption_files(model, None), "files: found NoneType"),
    (lambda model: mmtx.find_media(None), "names: found NoneType, expected a list of names"),
    (lambda model: mmtx.find_media(5), "names: found int"), (lambda model: mmtx.find_media(b"a.png"), "names: found bytes"),
    (lambda model: mmtx.find_media("a.png", "video"), "kind: found 'video', expected one of image, audio"),
    (lambda model: mmtx.find_media("a.png", 5), "kind: found 5"),
])
def test_files_that_are_no_list_are_told(model, call, told):
    with pytest.raises(InputError, match=told):
        list(call(model))


@pytest.mark.parametrize("encoding", ["utf-8:strict", "ascii", "latin-1", "cp1252"])
def test_names_of_any_bytes_and_terminals_of_any_encoding(encoding, folder, tmp_path):
    """Linux allows names that are no UTF-8, and old archives have them; a terminal may lack letters of a name."""
    picture = (folder / "media" / "a.png").read_bytes()
    for name in (b"caf\xe9.png", "\u6f22.png".encode(), b"line\nbreak.png", b"red\x1b[31m.png"):
        (tmp_path / os.fsdecode(name)).write_bytes(picture)
    (tmp_path / os.fsdecode(b"bad\xff.png")).write_bytes(picture[:60])
    done = command("caption", os.fsencode(tmp_path), "--model", str(folder / "model"), "--max_new_tokens", "1",
                   env={"PYTHONIOENCODING": encoding})
    out, err = done.stdout.decode(encoding.split(":")[0]), done.stderr.decode(encoding.split(":")[0])
    assert done.returncode == 1 and err.count("\n") == 1 and "bad\\xff.png" in err
    lines = out.splitlines()
    assert len(lines) == 4 and "\x1b" not in out
    letter = "\u6f22" if encoding.startswith("utf") else "\\u6f22"
    names = sorted(line.split("\t")[0].rsplit("/", 1)[1] for line in lines)
    assert names == sorted(["caf\\xe9.png", f"{letter}.png", "line\\nbreak.png", "red\\x1b[31m.png"])


def test_a_reader_that_has_gone_is_no_error(folder):
    for arguments in (["inspect", "all.jsonl", "--rows", "3"], ["tokenize", "a red circle " * 9_000]):
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run([sys.executable, "-m", "mmtx", *arguments, "--model", "model"], stdout=writer,
                              stderr=subprocess.PIPE, cwd=folder, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
        os.close(writer)
        assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no device that is always full")
def test_a_full_standard_output_is_one_line(folder):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "mmtx", "inspect", "all.jsonl", "--model", "model"], stdout=full,
                              stderr=subprocess.PIPE, cwd=folder, timeout=120)
    assert done.returncode == 2
    assert done.stderr == b"mmtx: error: standard output: cannot be written (No space left on device)\n"


def test_debug_shows_where_a_mistake_was_found(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    told = []
    for debug in ("", "1"):
        monkeypatch.setenv("MMTX_DEBUG", debug)
        with pytest.raises(SystemExit) as stop:
            main(["caption", "broken.png", "--model", "model", "--device", "cpu"])
        assert stop.value.code == 2
        told.append(capsys.readouterr().err)
    plain, debug = told
    assert plain.count("\n") == 1 and debug.endswith(plain)
    assert "Traceback" in debug and "load_image" in debug and "PIL" in debug


def test_ctrl_c_ends_in_one_line_and_status_130(folder):
    """In a command that waits for a server, so that there is time to press it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        address = f"http://127.0.0.1:{server.getsockname()[1]}/rows.jsonl"
        process = subprocess.Popen([sys.executable, "-m", "mmtx", "inspect", address, "--model", "model"], cwd=folder,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            asking, _ = server.accept()
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
            asking.close()
        finally:
            process.kill()
    assert (process.returncode, out, err) == (130, b"", b"mmtx: interrupted\n")


# -- Words that are text, and files that are written whole ----------------------------------------------------


@pytest.mark.parametrize("text", ["see https://example.org for more", "a://b c", "data: what is it?", "data:", "x" * 300,
                                  "a\nred\ncircle", "/" * 5000, "say :// twice"])
def test_words_that_name_no_file_are_text(run, model, text):
    assert [int(word) for word in run("tokenize", text).split()] == model.tokenize(text)


def test_a_word_that_is_a_url_is_a_medium(run):
    with pytest.raises(SystemExit):
        run("tokenize", "file:///nothing/here.png")
    picture = base64.b64encode((Path("media") / "a.png").read_bytes()).decode()
    assert run("tokenize", f"data:image/png;base64,{picture}") == run("tokenize", "media/a.png")


def test_what_cannot_be_written_whole_leaves_nothing(run, tmp_path, capsys):
    target = tmp_path / "small" / "out.png"
    target.parent.mkdir()
    target.write_bytes(b"what was there")

    before, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, limits[1]))
    try:
        with pytest.raises(SystemExit) as stop:
            run("generate", "a red circle", "--out", "image", "--file", str(target))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert stop.value.code == 2 and "cannot be written" in capsys.readouterr().err
    assert [path.name for path in target.parent.iterdir()] == ["out.png"]
    assert target.read_bytes() == b"what was there"
