"""A resumed run must find the data that it began with: by what they say and show, not by where and when they were written."""

import os
import shutil
import struct
import wave
from pathlib import Path

import numpy as np
import pytest
import runs
from PIL import Image

from mmtx.data.collection import DataSource
from mmtx.data.corpus import Content
from mmtx.data.prepare import prepare
from mmtx.errors import InputError
from mmtx.modality.base import load_tokenizer
from mmtx.training.checkpoint import compare, newest


def picture(path: Path, seed: int) -> None:
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)


def sound(path: Path, seed: int) -> None:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", None))
        noise = np.random.default_rng(seed).integers(-9000, 9000, 4000)
        file.writeframes(struct.pack("<4000h", *noise))


def make(folder: Path) -> None:
    for name in ("train", "held-out"):
        (folder / name).mkdir(parents=True)
        for number in range(4):
            picture(folder / name / f"{number}.png", number)
            (folder / name / f"{number}.txt").write_text(f"item {number}")
        sound(folder / name / "tone.wav", 9)
        (folder / name / "tone.txt").write_text("a tone")


def of(config: dict, folder: Path, **data) -> dict:
    train, validation = ([{"paths": [str(folder / name)]}] for name in ("train", "held-out"))
    return {**config, "data": {**config["data"], "init_args": {
        **config["data"]["init_args"], "train": train, "validation": validation, "num_workers": 0, **data}}}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("content")


@pytest.fixture(scope="module")
def config(root):
    return runs.prepare(root, steps=4)


@pytest.fixture(scope="module")
def begun(root, config):
    """A checkpoint of a run on `root/data`."""
    make(root / "data")
    assert runs.fit(of(config, root / "data"), root / "begun") == [0], (root / "begun.log").read_text()
    return newest(root / "begun" / "checkpoints")


def swap(folder: Path) -> None:
    os.rename(folder / "0.png", folder / "x")
    os.rename(folder / "1.png", folder / "0.png")
    os.rename(folder / "x", folder / "1.png")


CHANGES = {
    "swapped pictures": (lambda f: swap(f / "train"), "data.train: 2 of 5 samples differ", "train/0"),
    "a digit of a caption": (lambda f: (f / "train" / "2.txt").write_text("item 7"), "data.train: 1 of 5 samples differ",
                             "train/2"),
    "another picture": (lambda f: picture(f / "train" / "3.png", 77), "data.train: 1 of 5 samples differ", "train/3"),
    "another sound": (lambda f: sound(f / "train" / "tone.wav", 10), "data.train: 1 of 5 samples differ", "train/tone"),
    "a held-out picture": (lambda f: picture(f / "held-out" / "0.png", 77), "data.validation: 1 of 5 samples differ",
                           "held-out/0"),
    "a sample fewer": (lambda f: (f / "train" / "3.png").unlink(), "data.train: found 4 samples, not the 5 of", "train/tone"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_data_are_refused_by_name(root, config, begun, change):
    alter, told, name = CHANGES[change]
    folder = root / change / "data"
    shutil.copytree(root / "data", folder)
    alter(folder)
    if change == "a sample fewer":
        (folder / "train" / "3.txt").unlink()
    output = root / change / "run"
    assert runs.fit(of(config, folder), output, "--ckpt_path", str(begun)) == [2]
    (line,) = [line for line in output.with_suffix(".log").read_text().splitlines() if line.startswith("mmtx: error")]
    assert told in line and name in line and "the run to be resumed" in line, line
    assert not (output / "model").exists()


def test_the_same_data_elsewhere_and_touched_are_accepted(root, config, begun):
    folder = root / "moved" / "and" / "copied"
    shutil.copytree(root / "data", folder, copy_function=shutil.copyfile)
    for path in folder.rglob("*.*"):
        os.utime(path, (1, 1))
    moved = of(config, folder)
    (folder / "as_it_is.py").write_text("def alone(sample): return [sample]\n")
    moved["data"]["init_args"]["train"][0]["variants"] = f"{folder / 'as_it_is.py'}:alone"  # what it makes is compared
    moved["data"]["init_args"]["validation"][0]["reader"] = "captions.py:names"  # of `mmtx evaluate` alone
    assert runs.fit(moved, root / "moved" / "run", "--ckpt_path", str(begun)) == [0]
    assert runs.results(root / "moved" / "run")[1] == runs.results(root / "begun")[1]


def test_other_shards_are_refused_by_their_digest(root, config, begun):
    tokenizers = {kind: load_tokenizer(root / kind) for kind in ("text", "image", "audio")}
    plain = {"image_augmentation": None, "audio_augmentation": None}
    for name, seed in (("a", 3), ("b", 4)):
        folder = root / "shards" / name
        make(folder / "media")
        picture(folder / "media" / "train" / "3.png", seed)
        prepare(DataSource([str(folder / "media" / "train")]), tokenizers, folder / "train")
        prepare(DataSource([str(folder / "media" / "held-out")]), tokenizers, folder / "held-out")
    output = root / "shards" / "run"
    assert runs.fit(of(config, root / "shards" / "a", **plain), output) == [0], output.with_suffix(".log").read_text()
    path = str(newest(output / "checkpoints"))
    assert runs.fit(of(config, root / "shards" / "b", **plain), root / "shards" / "other", "--ckpt_path", path) == [2]
    told = (root / "shards" / "other.log").read_text()
    assert f"data.train: 1 of 1 samples differ from the run to be resumed, first {root}/shards/b/train" in told


def test_a_codec_run_compares_its_media(root, config):
    folder = root / "codec"
    make(folder)
    codec = {**config, "ema": None, "samples": 0, "model": {"class_path": "mmtx.training.codec.ImageCodecModule", "init_args": {
        "tokenizer": {"patch": 16, "side": 32, "network": {"width": 16, "heads": 1, "encoder_depth": 1, "decoder_depth": 1,
                                                           "levels": [4, 3, 3]}}}}}
    data = {"train": [{"paths": [str(folder / "train")]}], "validation": [{"paths": [str(folder / "held-out")]}], "batch_size": 2}
    codec["data"] = {"class_path": "mmtx.training.codec_data.CodecData", "init_args": data}
    assert runs.fit(codec, folder / "run") == [0], (folder / "run.log").read_text()
    path = str(newest(folder / "run" / "checkpoints"))
    assert runs.fit(codec, folder / "again", "--ckpt_path", path) == [0], (folder / "again.log").read_text()
    swap(folder / "train")
    assert runs.fit(codec, folder / "other", "--ckpt_path", path) == [2]
    assert "data.train: 2 of 4 samples differ" in (folder / "other.log").read_text()


def test_every_place_is_compared():
    import torch

    digests = np.arange(5)
    content = Content(digests, "row {}".format)
    compare("data.train", [content], [torch.tensor(digests)])
    for place in range(5):
        other = torch.tensor(digests)
        other[place] += 2**40
        with pytest.raises(InputError, match=f"1 of 5 samples differ .*first row {place};"):
            compare("data.train", [content], [other])
    with pytest.raises(InputError, match="found 5 samples, not the 6 .*last ones are missing"):
        compare("data.train", [content], [torch.arange(6)])
    with pytest.raises(InputError, match="found 1 kinds of sources, expected 2"):
        compare("data.train", [content], [torch.arange(5)] * 2)
