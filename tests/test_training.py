"""`mmtx fit` for real on a handful of starter samples: what a run leaves, resuming, the loss, and users' mistakes."""

import copy
import csv
import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import lightning
import pytest
import torch
import yaml
from lightning import Trainer
from PIL import Image
from torch.utils.data import DataLoader

import mmtx
from mmtx.cli import main
from mmtx.config import DecoderConfig
from mmtx.data.augment import ImageAugmentation
from mmtx.data.collection import DataSource, read_source
from mmtx.data.output import lock_folder
from mmtx.data.packing import PackedBatches
from mmtx.data.sources import scan
from mmtx.data.tokens import to_documents
from mmtx.errors import InputError
from mmtx.modality.autoencoder import NetworkConfig
from mmtx.modality.base import load_tokenizer
from mmtx.modality.image import ImageConfig
from mmtx.modality.text import TextTokenizer
from mmtx.training import checkpoint
from mmtx.training.adapters import LoRA
from mmtx.training.callbacks import EMAWeightAveraging, ShowSamples
from mmtx.training.checkpoint import AtomicCheckpointIO
from mmtx.training.codec import ImageCodecModule
from mmtx.training.codec_data import CodecData
from mmtx.training.decoder import DecoderModule, LossWeights
from mmtx.training.decoder_data import DecoderData, TokenizerFolders
from mmtx.training.fit_cli import TRAINER as TRAINER_DEFAULTS
from mmtx.training.optimizer import OptimizerConfig
from mmtx.training.run import command_line
from mmtx.training.text import TextModule

STARTER = Path(__file__).parents[1] / "demos" / "data" / "starter"
IMAGES, SOUNDS = str(STARTER / "images-train-004.tar.gz"), str(STARTER / "sounds-train-001.tar.gz")
FEW = [{"paths": [IMAGES], "limit": 6}, {"paths": [SOUNDS], "limit": 4}]
NETWORK = {"width": 16, "heads": 1, "encoder_depth": 1, "decoder_depth": 1, "levels": [4, 3, 3]}
TRAINER = {"accelerator": "cpu", "max_steps": 2, "val_check_interval": 2, "check_val_every_n_epoch": None,
           "log_every_n_steps": 1, "enable_progress_bar": False, "gradient_clip_val": 1.0}
DECODER = {"width": 32, "depth": 1, "heads": 2, "kv_heads": 1, "head_dim": 16, "mlp_dim": 32}


def section(class_path: str, **arguments) -> dict:
    return {"class_path": f"mmtx.training.{class_path}", "init_args": arguments}


def fit(output: Path, model: dict, data: dict, trainer: dict = TRAINER, more: tuple[str, ...] = ()) -> Path:
    """Run `mmtx fit` with a config of these sections -> the folder of the model that it writes."""
    config = {"output": str(output), "seed_everything": 0, "save_every": 2, "samples": 4,
              "model": model, "data": data, "trainer": trainer}
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(path), *more])
    return output / "model"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def folders(root):
    """Tokenizers of each kind, trained for two steps."""
    codec = {"train": FEW, "validation": FEW, "batch_size": 4}
    return {
        "text": fit(root / "text", section("text.TextModule", size=300), section("text.TextData", train=FEW),
                    {"accelerator": "cpu", "max_epochs": 1, "log_every_n_steps": 1, "enable_progress_bar": False}),
        "image": fit(root / "image",
                     section("codec.ImageCodecModule", tokenizer={"patch": 16, "side": 32, "network": NETWORK}),
                     section("codec_data.CodecData", image_augmentation={}, **codec)),
        "audio": fit(root / "audio",
                     section("codec.AudioCodecModule", tokenizer={"mels": 16, "patch_mels": 16, "patch_frames": 4,
                                                                  "window": 512, "chunk": 16, "network": NETWORK}),
                     section("codec_data.CodecData", audio_augmentation={}, **codec)),
    }


@pytest.fixture(scope="module")
def decoder_data(folders):
    tokenizers = {kind: str(folder) for kind, folder in folders.items()}
    return section("decoder_data.DecoderData", tokenizers=tokenizers, train=FEW, validation=FEW, tokens_per_batch=256, max_seq_len=255,
                   image_augmentation={}, audio_augmentation={})


DECODER_MODULE = section("decoder.DecoderModule", decoder=DECODER, continuous_inputs=True)


@pytest.fixture(scope="module")
def run(root, decoder_data):
    """A decoder trained for two steps: its run folder."""
    return fit(root / "decoder", DECODER_MODULE, decoder_data).parent


# -- What a run leaves behind --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text", "image", "audio"])
def test_fit_writes_a_tokenizer_that_loads(folders, kind):
    tokenizer = load_tokenizer(folders[kind])
    assert tokenizer.kind == kind
    if kind == "text":
        assert 257 < tokenizer.size <= 300
    else:
        assert tokenizer.levels == (4, 3, 3)
        assert (folders[kind].parent / "samples" / "step-000002.png").is_file()


def test_fit_changes_the_codec(folders):
    # Two steps are few, but a run that trains nothing leaves the weights where the seed put them.
    from mmtx.modality.image import ImageTokenizer

    trained = load_tokenizer(folders["image"])
    torch.manual_seed(0)
    fresh = ImageTokenizer(trained.config)
    moved = [not torch.equal(a, b) for a, b in zip(trained.parameters(), fresh.parameters(), strict=True)]
    assert all(moved)


def test_fit_writes_a_model_that_captions(run):
    model = mmtx.load(run / "model", device="cpu")
    sample = next(scan(IMAGES))
    picture = next(part for turn in sample.turns for part in turn.parts)
    path = run.parent / "picture.webp"
    path.write_bytes(picture.source.read())
    assert isinstance(model.caption(str(path), max_new_tokens=4), str)
    assert "train/loss" in (run / "metrics" / "metrics.csv").read_text()
    lines = (run / "samples" / "step-000002.txt").read_text().splitlines()
    assert lines[0].split() == ["predicted", "true"]
    assert len(lines) - 1 == 4
    assert not list(run.glob(".model*"))


def test_the_saved_config_repeats_the_run(root, run):
    again = root / "again"
    main(["fit", "--config", str(run / "metrics" / "config.yaml"), "--output", str(again)])
    name = "model/model.safetensors"
    assert (again / name).read_bytes() == (run / name).read_bytes()


def test_a_run_starts_from_a_finished_model(root, run, decoder_data):
    module = changed(DECODER_MODULE, "init_args.init_from", str(run / "model"))
    module = changed(module, "init_args.optimizer", {"learning_rate": 1e-9})
    retrained = fit(root / "image2", section("codec.ImageCodecModule", tokenizer={"patch": 16, "side": 32, "network": NETWORK}),
                    section("codec_data.CodecData", train=FEW, validation=FEW, batch_size=4), {**TRAINER, "max_steps": 1})
    data = changed(decoder_data, "init_args.tokenizers.image", str(retrained))
    before, after = mmtx.load(run / "model", "cpu"), mmtx.load(fit(root / "started", module, data), "cpu")
    assert before.tokenizers["image"].fingerprint != after.tokenizers["image"].fingerprint
    for one, two in zip(before.decoder.parameters(), after.decoder.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)


@pytest.mark.parametrize("change, told", [
    ({"model": ("decoder.mlp_dim", 80)}, ["init_from", "found mlp_dim 32", "expected 80"]),
    ({"data": ("tokenizers.text", str(STARTER.parents[2] / "tokenizers" / "text"))}, ["init_from", "vocabulary_size"]),
    ({"model": ("init_from", "no/such/folder")}, ["no/such/folder", "no such folder"]),
])
def test_what_does_not_fit_is_no_start(change, told, run, decoder_data, tmp_path, capsys):
    parts = {"model": changed(DECODER_MODULE, "init_args.init_from", str(run / "model")), "data": decoder_data}
    for part, (path, value) in change.items():
        parts[part] = changed(parts[part], f"init_args.{path}", value)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path / "run", parts["model"], parts["data"])
    check_mistake(stop, capsys, told)


@pytest.mark.parametrize("option", ["init_from", "encoders_from", "image_encoder"])
def test_a_folder_that_is_no_start_is_told_before_the_data_are_read(option, decoder_data, tmp_path, capsys):
    module = changed(DECODER_MODULE, "init_args", {**DECODER_MODULE["init_args"], "continuous_inputs": True, "train_encoder": True,
                                                   option: "no/such/folder"})
    data = changed(decoder_data, "init_args.train", [{"paths": ["no-such-file.jsonl"]}])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path / "run", module, data)
    check_mistake(stop, capsys, [f"model.init_args.{option}: ", "no/such/folder", "no such folder"])


def test_a_run_that_goes_on_without_what_it_began_with_says_why(run, decoder_data, tmp_path, capsys):
    begun = shutil.copytree(run / "model", tmp_path / "begun")
    module = changed(DECODER_MODULE, "init_args.init_from", str(begun))
    steps = {**TRAINER, "max_steps": 3, "limit_val_batches": 0}
    fit(tmp_path / "run", module, decoder_data, steps)
    shutil.rmtree(begun)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path / "run", module, decoder_data, steps, ("--ckpt_path", "last"))
    check_mistake(stop, capsys, [f"model.init_args.init_from: {begun}: no such folder", "; a resumed run needs it as well"])


def test_a_text_tokenizer_of_the_same_size_but_other_pieces_is_no_start(run, decoder_data, tmp_path, capsys):
    other = TextTokenizer.train(["pack my box with five dozen liquor jugs, then judge vexing fop quiz blitz"] * 9, 300)
    assert other.size == mmtx.load(run / "model", "cpu").tokenizers["text"].size
    other.save(tmp_path / "text")
    data = changed(decoder_data, "init_args.tokenizers.text", str(tmp_path / "text"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path / "run", changed(DECODER_MODULE, "init_args.init_from", str(run / "model")), data)
    check_mistake(stop, capsys, ["init_from", "text tokenizer of fingerprint", "tokenizers.text"])


def test_a_resumed_run_is_the_run_that_was_interrupted(root, decoder_data, monkeypatch):
    steps = {**TRAINER, "max_steps": 6, "accumulate_grad_batches": 2, "limit_val_batches": 0}
    whole = fit(root / "whole", DECODER_MODULE, decoder_data, steps)
    step, calls = DecoderModule.training_step, []

    def crash(self, batch, index):
        calls.append(index)
        if len(calls) == 8:  # in the fourth optimizer step, after a checkpoint at the second
            raise RuntimeError("power cut")
        return step(self, batch, index)

    with monkeypatch.context() as patched:
        patched.setattr(DecoderModule, "training_step", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            fit(root / "broken", DECODER_MODULE, decoder_data, steps)
    assert not (root / "broken" / "model").exists()
    look, read = checkpoint.damage, []
    monkeypatch.setattr(checkpoint, "damage", lambda path: read.append(path.name) or look(path))
    resumed = fit(root / "broken", DECODER_MODULE, decoder_data, steps, ("--ckpt_path", "last"))
    assert read == ["step-000000002.ckpt"]  # its checksum is compared, once
    expected, found = (mmtx.load(folder, device="cpu").decoder.state_dict() for folder in (whole, resumed))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_run_that_begins_anew_where_another_was_says_so(root, decoder_data, capfd):
    steps = {**TRAINER, "max_steps": 3, "limit_val_batches": 0}
    fit(root / "anew", DECODER_MODULE, decoder_data, steps, ("--ckpt_path", "last"))
    assert "anew/checkpoints: found no checkpoint to resume from, so training starts from the beginning" in capfd.readouterr().err
    fit(root / "anew", DECODER_MODULE, decoder_data, steps)
    told = capfd.readouterr().err
    assert "replaces the run that was at step-000000002; --ckpt_path last would resume it" in told
    fit(root / "anew", DECODER_MODULE, decoder_data, steps, ("--ckpt_path", "last"))
    assert "anew and" not in capfd.readouterr().err
    shutil.rmtree(root / "anew" / "checkpoints")
    fit(root / "anew", DECODER_MODULE, decoder_data, steps)
    assert "starts from the beginning and replaces the existing model" in capfd.readouterr().err


SLURM = {"NTASKS": "1", "NTASKS_PER_NODE": "1", "JOB_NAME": "train", "JOB_ID": "42", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}


def test_a_job_of_a_cluster_that_is_about_to_end_is_requeued_and_goes_on(root, decoder_data, monkeypatch, tmp_path, capfd):
    steps = {**TRAINER, "max_steps": 4, "limit_val_batches": 0}
    whole = fit(root / "at-home", DECODER_MODULE, decoder_data, steps)
    for name, value in ({f"SLURM_{name}": value for name, value in SLURM.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho $* >> {tmp_path}/asked\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    step = DecoderModule.training_step
    with monkeypatch.context() as patched:
        patched.setattr(DecoderModule, "training_step",
                        lambda self, batch, index: (index == 2 and signal.raise_signal(signal.SIGUSR1), step(self, batch, index))[1])
        with pytest.raises(SystemExit) as stop:
            fit(root / "cluster", DECODER_MODULE, decoder_data, steps)
    assert stop.value.code == 128 + signal.SIGUSR1 and (tmp_path / "asked").read_text() == "requeue 42\n"
    assert "mmtx: job 42 is requeued; it goes on if its command has --ckpt_path last" in capfd.readouterr().err
    assert [path.name for path in (root / "cluster").rglob("*.ckpt")] and not list((root / "cluster").glob("*.ckpt"))
    resumed = fit(root / "cluster", DECODER_MODULE, decoder_data, steps, ("--ckpt_path", "last"))
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    (root / "cluster" / "hpc_ckpt_1.ckpt").write_bytes(b"which Lightning would load there, whatever it is told")
    fit(root / "cluster", DECODER_MODULE, decoder_data, steps)
    assert "starts from the beginning" in capfd.readouterr().err


# -- Validate, test, predict ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(root, run):
    return ["--config", str(root / "decoder.yaml")]  # of `run`


def files(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def figures(capsys, *arguments: str) -> dict[str, float]:
    """The table that a command prints."""
    capsys.readouterr()
    main(list(arguments))
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    return {name.strip(): float(value) for _, name, value, _ in rows}


def measured(run: Path) -> dict[str, float]:
    """The figures of a run's last validation."""
    with open(run / "metrics" / "metrics.csv", newline="") as file:
        last = [row for row in csv.DictReader(file) if row.get("val/loss")][-1]
    return {name: float(value) for name, value in last.items() if name.startswith("val/") and value}


def test_validate_prints_what_the_run_measured_and_writes_nothing(run, config, capsys):
    before = files(run)
    found = figures(capsys, "validate", *config)
    assert len(found) >= 3 and found == pytest.approx(measured(run), rel=1e-6)
    assert files(run) == before


def test_validate_takes_the_average_that_was_saved_and_that_of_a_checkpoint(root, decoder_data, capsys):
    trainer = {**TRAINER, "max_steps": 4}
    folder = fit(root / "averaged", DECODER_MODULE, decoder_data, trainer, ("--ema", "0.5")).parent
    config = ["--config", str(root / "averaged.yaml"), "--ema", "0.5"]
    assert figures(capsys, "validate", *config) == pytest.approx(measured(folder), rel=1e-6)
    # Of a checkpoint, also from another folder, and with other data and steps than it was made with.
    path = folder / "checkpoints" / "step-000000002.ckpt"
    other = figures(capsys, "validate", *config, "--ckpt_path", str(path), "--output", str(root / "nowhere"),
                    "--trainer.max_steps", "9", "--data.tokens_per_batch", "300")
    assert figures(capsys, "validate", *config, "--ckpt_path", "last") == pytest.approx(other, rel=1e-5)
    with open(folder / "metrics" / "metrics.csv", newline="") as file:
        first = [row for row in csv.DictReader(file) if row.get("val/loss")][0]
    assert other["val/loss"] == pytest.approx(float(first["val/loss"]), rel=1e-5)
    assert not (root / "nowhere").exists()


def test_test_is_the_validation_of_other_samples(run, config, capsys):
    expected = {name.replace("val/", "test/"): value for name, value in figures(capsys, "validate", *config).items()}
    assert figures(capsys, "test", *config, "--data.test", json.dumps(FEW)) == pytest.approx(expected, rel=1e-6)
    fewer = figures(capsys, "test", *config, "--data.test", json.dumps(FEW[:1]))
    assert fewer.keys() == expected.keys() and fewer != pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_codecs_are_validated_and_tested(folders, kind, root, capsys):
    config = ["--config", str(root / f"{kind}.yaml")]
    expected = measured(folders[kind].parent)
    before = files(folders[kind].parent)
    found = figures(capsys, "validate", *config)
    assert len(found) >= 4 and found == pytest.approx(expected, rel=1e-5)
    tested = figures(capsys, "test", *config, "--data.test", json.dumps(FEW))
    assert tested == pytest.approx({name.replace("val/", "test/"): value for name, value in expected.items()}, rel=1e-5)
    assert files(folders[kind].parent) == before


def test_predict_writes_what_the_model_says(run, config, capsys):
    before = files(run)
    main(["predict", *config])
    path = run / "predictions.jsonl"
    assert f"{path}: 10 captions" in capsys.readouterr().out
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    model, samples = mmtx.load(run / "model", "cpu"), [s for source in FEW for s in read_source(DataSource(**source))]
    documents = to_documents(samples, model.tokenizers)
    assert rows == [{"where": sample.where, "predicted": caption, "true": sample.caption}
                    for sample, caption in zip(samples, model.caption_documents(documents), strict=True)]
    assert {name: state for name, state in files(run).items() if name != path} == before
    path.unlink()


def test_without_a_model_of_its_own_a_run_is_what_it_starts_from(run, config, root, capsys):
    found = figures(capsys, "validate", *config, "--output", str(root / "unmade"), "--model.init_from", str(run / "model"))
    assert found == pytest.approx(measured(run), rel=1e-6)
    main(["validate", *config, "--output", str(root / "unmade"), "--model.init_from", str(run / "model")])
    assert f"weights of {run}/model, with which the run begins: {root}/unmade has no model yet" in capsys.readouterr().err
    main(["validate", *config])
    assert f"weights of {run}/model\n" in capsys.readouterr().err


HELD_OUT_MISTAKES = {
    "no model": ("validate", ["--output", "unmade"], ["output: unmade/model", "no such folder", "--ckpt_path"]),
    "no checkpoint": ("validate", ["--ckpt_path", "no.ckpt"], ["ckpt_path: no.ckpt", "no such file"]),
    "no last checkpoint": ("test", ["--ckpt_path", "last", "--output", "unmade"], ["unmade/checkpoints: no checkpoint"]),
    "no test data": ("test", [], ["data.test: found none"]),
    "another size": ("validate", ["--model.decoder.width", "64"], ["run/model: found width 32", "expected 64"]),
    "another size than the checkpoint": ("validate", ["--ckpt_path", "MADE", "--model.decoder.width", "64"],
                                         ["model.init_args.decoder.width: found 32, expected 64"]),
    "a checkpoint of others": ("validate", ["--ckpt_path", __file__], ["test_training.py", "not a checkpoint of mmtx"]),
    "several processes": ("predict", ["--trainer.devices", "2"], ["trainer.devices: found 2", "expected 1"]),
    "sharded": ("validate", ["--trainer.strategy", "sharded"], ["trainer.strategy", "sharded"]),
    "nothing to caption": ("predict", ["--data.validation", json.dumps([{**FEW[0], "task": "generate"}])],
                           ["data.validation", "no samples that a caption answers"]),
    "another folder": ("validate", ["--trainer.default_root_dir", "elsewhere"],
                       ["trainer.default_root_dir: found elsewhere", "--output"]),
}


@pytest.mark.parametrize("name", HELD_OUT_MISTAKES)
def test_mistakes_of_held_out_commands_end_in_one_line(name, run, config, tmp_path, monkeypatch, capsys):
    word, given, told = HELD_OUT_MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(run)
    made = str(run / "checkpoints" / "made.ckpt")
    given = [made if value == "MADE" else value for value in given]
    if made in given:
        io = AtomicCheckpointIO()
        io.record = command_line([*config, "--output", "run"], run=False).record()
        io.save_checkpoint({"state_dict": {}, "epoch": 0, "global_step": 1, "loops": {}, "callbacks": {}, "optimizer_states": [],
                            "lr_schedulers": [], "pytorch-lightning_version": lightning.__version__}, made)
    before = files(run)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([word, *config, "--output", "run", *given])
    check_mistake(stop, capsys, told)
    assert files(run) == before


def test_other_tokenizers_than_the_models_are_refused(run, config, folders, root, capsys):
    other = fit(root / "image3", section("codec.ImageCodecModule", tokenizer={"patch": 16, "side": 32, "network": NETWORK}),
                section("codec_data.CodecData", train=FEW, validation=FEW, batch_size=4), {**TRAINER, "max_steps": 1})
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["validate", *config, "--data.tokenizers.image", str(other)])
    check_mistake(stop, capsys, ["decoder/model: found an image tokenizer of fingerprint", "tokenizers.image"])


@pytest.mark.parametrize("word, kind, told", [
    ("validate", "text", ["TextModule", "no validation_step"]), ("predict", "image", ["ImageCodecModule", "no predict_step"])])
def test_what_a_module_cannot_do_is_said(word, kind, told, folders, root, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([word, "--config", str(root / f"{kind}.yaml")])
    check_mistake(stop, capsys, told)


def test_sigterm_ends_a_validation(config, monkeypatch):
    monkeypatch.setattr(DecoderModule, "validation_step", lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as stop:
        main(["validate", *config])
    assert stop.value.code == 143


def test_only_predict_waits_for_its_turn(run, config, capsys):
    with lock_folder(run, "output"):
        assert figures(capsys, "validate", *config)
        with pytest.raises(SystemExit) as stop:
            main(["predict", *config])
    check_mistake(stop, capsys, ["output", "is being written by process"])


# -- Without a data module -----------------------------------------------------------------------------------


def plain(folders, two_texts, **more) -> tuple[DecoderModule, Trainer, DataLoader]:
    tokenizers = TokenizerFolders(str(folders["text"]))
    data = DecoderData(tokenizers, [DataSource([two_texts])], [DataSource([two_texts])], tokens_per_batch=255, max_seq_len=255)
    data.setup("fit")
    loader = DataLoader(PackedBatches(data.train_documents, data.vocabulary, 255, steps=3), batch_size=None)
    module = DecoderModule(DecoderConfig(**DECODER), **more)
    return module, Trainer(accelerator="cpu", max_steps=3, logger=False, enable_checkpointing=False,
                           enable_progress_bar=False, enable_model_summary=False), loader


def test_a_decoder_trains_on_a_plain_loader(folders, two_texts, tmp_path):
    module, trainer, loader = plain(folders, two_texts, tokenizers=TokenizerFolders(str(folders["text"])))
    trainer.fit(module, loader)
    assert trainer.global_step == 3
    module.save(tmp_path / "model")
    assert isinstance(mmtx.load(tmp_path / "model", "cpu").generate("red", max_new_tokens=3), str)


def test_a_plain_loader_needs_tokenizers_of_the_module(folders, two_texts):
    module, trainer, loader = plain(folders, two_texts)
    with pytest.raises(InputError, match="model.init_args.tokenizers: found none"):
        trainer.fit(module, loader)


def test_tokenizers_of_module_and_data_are_the_same(folders, decoder_data, tmp_path, capsys):
    module = changed(DECODER_MODULE, "init_args.tokenizers", {"text": str(folders["text"])})
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path / "run", module, decoder_data)
    check_mistake(stop, capsys, ["model.init_args.tokenizers: found others (text)", "(text, image, audio)"])


# -- Without a trainer ---------------------------------------------------------------------------------------


class ByAdamW(DecoderModule):
    """Notes the loss of each step: the mean over its targets of what is minimised."""

    def configure_optimizers(self):
        self.found = []
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def training_step(self, batch, index):
        total = super().training_step(batch, index)
        self.found.append(float(total.detach() / self._weights()[batch.modality].sum()))
        return total


def own_loop(module: DecoderModule, data: DecoderData) -> list[float]:
    """Train as a plain loop does -> the loss of each step."""
    optimizer, found = torch.optim.AdamW(module.parameters(), lr=1e-3), []
    for batch in data.train_dataloader():
        loss = module.loss(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("options", [
    {"continuous_inputs": True}, {"continuous_inputs": True, "train_encoder": True, "loss_weights": LossWeights(text=2.0)}],
    ids=["features", "encoders"])
def test_a_loop_of_ones_own_has_the_losses_of_a_trainer(options, folders, tmp_path):
    folders, sources = TokenizerFolders(**{kind: str(folder) for kind, folder in folders.items()}), [DataSource(**s) for s in FEW]
    plain = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
             "enable_model_summary": False}
    made = lambda: DecoderData(folders, sources, sources, tokens_per_batch=128, max_seq_len=127, image_augmentation=ImageAugmentation())
    module, data = ByAdamW(DecoderConfig(**DECODER), **options), made()
    data.attach(module, steps=5)
    twin, trainer = copy.deepcopy(module), Trainer(max_steps=5, **plain)
    twin.own_data = None
    found = own_loop(module, data)
    trainer.fit(twin, made())
    assert found == pytest.approx(twin.found, rel=1e-5) and len(found) == 5 and found[0] > found[-1]
    # Elsewhere the loss is what validation logs.
    (figures,) = trainer.validate(twin, made(), verbose=False)
    module.eval()
    with torch.no_grad():
        losses = [(float(module.loss(batch)), float(module._weights()[batch.modality].sum())) for batch in data.val_dataloader()]
    assert len(losses) > 1
    assert sum(loss * weight for loss, weight in losses) / sum(weight for _, weight in losses) == pytest.approx(
        figures["val/loss"], rel=1e-4)
    # A checkpoint of the trainer answers without it.
    trainer.save_checkpoint(tmp_path / "twin.ckpt")
    given = {"decoder": DecoderConfig(**DECODER), "weights_only": True, **options}
    loaded = DecoderModule.load_from_checkpoint(tmp_path / "twin.ckpt", tokenizers=folders, **given)
    media = [Image.new("RGB", (32, 32), colour) for colour in ("red", "white")]
    assert loaded.model().caption(media, max_new_tokens=4) == twin.model().caption(media, max_new_tokens=4)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), twin.parameters(), strict=True))
    with pytest.raises(InputError, match="tokenizers: found none, expected folders of tokenizers"):
        DecoderModule.load_from_checkpoint(tmp_path / "twin.ckpt", **given)


def test_what_is_asked_of_a_module_too_early_is_told(tmp_path):
    module = DecoderModule(DecoderConfig(**DECODER))
    for early in (module.model, lambda: module.loss(None), lambda: module.save(tmp_path / "model")):
        with pytest.raises(InputError, match=r"DecoderModule: found no decoder yet, expected Trainer\(...\).fit\(model, data\) or data.attach"):
            early()
    with pytest.raises(InputError, match="TextModule: found no tokenizer yet"):
        TextModule(300).save(tmp_path / "model")
    sources = [DataSource(**FEW[0])]
    for data in (DecoderData(TokenizerFolders("tokenizers/text"), sources, sources), CodecData(sources, sources)):
        for early in (data.train_dataloader, data.val_dataloader, data.test_dataloader):
            with pytest.raises(InputError, match=f"{type(data).__name__}: found no trainer, expected"):
                early()


def test_a_module_trains_on_data_of_its_own_tokenizers_alone(folders):
    sources = [DataSource(**FEW[0])]
    made = lambda *kinds: DecoderData({kind: folders[kind] for kind in kinds}, sources, sources, max_seq_len=255)
    module = DecoderModule(DecoderConfig(**DECODER))
    made("text", "image").attach(module, steps=1)
    made("text", "image").attach(module, steps=1)
    with pytest.raises(InputError, match=r"tokenizers: found others \(text, image\) than those of the data \(text, image, audio\)"):
        made("text", "image", "audio").attach(module, steps=1)


def test_a_compiled_decoder_is_saved_as_any(folders, tmp_path):
    module = DecoderModule(DecoderConfig(**DECODER), init_from=None)
    data = DecoderData(TokenizerFolders(str(folders["text"]), image=str(folders["image"])), [DataSource(**FEW[0])], [DataSource(**FEW[0])])
    data.attach(module, steps=1)
    module.save(tmp_path / "plain")
    module.decoder = torch.compile(module.decoder, backend="eager")
    assert own_loop(module, data)[0] > 1
    module.save(tmp_path / "model")
    mmtx.load(tmp_path / "model", "cpu")
    lora = DecoderModule(DecoderConfig(**DECODER), lora=LoRA(), init_from=str(tmp_path / "plain"))
    data.attach(lora, steps=1)
    lora.decoder.blocks[0] = torch.compile(lora.decoder.blocks[0], backend="eager")
    lora.save(tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == (tmp_path / "plain" / "model.safetensors").read_bytes()


def test_a_codec_trains_in_a_loop_of_ones_own():
    data = CodecData([DataSource(**FEW[0])], [DataSource(**FEW[0])], batch_size=4)
    with pytest.raises(InputError, match=r"CodecData: found no trainer, expected .* data.attach\(model, steps=...\)"):
        data.setup("fit")
    module = ImageCodecModule(ImageConfig(patch=16, side=32, network=NetworkConfig(**NETWORK)))
    data.attach(module, steps=3, rank=1, world=2)
    batches = [batch for loader in (data.train_dataloader(), data.val_dataloader()) for batch in loader]
    assert [tuple(batch.media.shape) for batch in batches] == [(4, 3, 32, 32)] * 3 + [(2, 3, 32, 32)]
    assert module.loss(batches[0].media, module.tokenizer(batches[0].media).output).isfinite()


@pytest.mark.parametrize(("options", "told"), [
    ({"steps": 0}, "steps: found 0"), ({"steps": 1.5}, "steps: found 1.5"),
    ({"steps": 1, "rank": 2, "world": 2}, "rank: found 2, expected 0 or more, and 1 at most")])
def test_a_loop_that_is_none_is_told(options, told, folders):
    sources = [DataSource(**FEW[0])]
    data = DecoderData(TokenizerFolders(str(folders["text"])), sources, sources)
    with pytest.raises(InputError, match=told):
        data.attach(DecoderModule(DecoderConfig(**DECODER)), **options)


# -- Visible defaults ----------------------------------------------------------------------------------------


def printed(capsys, *arguments: str) -> dict:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--print_config"])
    assert stop.value.code in (0, None)
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("word", ["fit", "validate"])
def test_defaults_of_the_trainer_are_printed(word, run, config, capsys, root):
    shown = printed(capsys, word, "--output", "run", "--model", "TextModule", "--data", "TextData")["trainer"]
    assert {name: shown[name] for name in TRAINER_DEFAULTS if name != "callbacks"} == {
        name: value for name, value in TRAINER_DEFAULTS.items() if name != "callbacks"}
    assert [entry["class_path"].rpartition(".")[2] for entry in shown["callbacks"]] == ["LearningRateMonitor", "Telemetry"]


def test_the_trainer_is_made_of_what_is_printed(config, run, tmp_path):
    values = yaml.safe_load(Path(config[1]).read_text())
    for name in ("check_val_every_n_epoch", "gradient_clip_val", "log_every_n_steps", "val_check_interval"):
        values["trainer"].pop(name)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    build = lambda *more: command_line(
        ["--config", str(tmp_path / "c.yaml"), "--output", str(tmp_path / "run"), *more], run=False).trainer
    trainer = build()
    assert (trainer.gradient_clip_val, trainer.log_every_n_steps) == (1.0, 20)
    assert (trainer.check_val_every_n_epoch, trainer.val_check_interval) == (1, 1.0)  # once, when the run ends
    trainer = build("--trainer.val_check_interval", "7")
    assert (trainer.check_val_every_n_epoch, trainer.val_check_interval) == (None, 7)
    names = [type(callback).__name__ for callback in trainer.callbacks]
    assert names[:2] == ["LearningRateMonitor", "Telemetry"] and "SaveModel" in names and "Checkpoints" in names
    names = [type(callback).__name__ for callback in build("--trainer.callbacks", "null").callbacks]
    assert "Telemetry" not in names and "Checkpoints" in names


# -- The loss ------------------------------------------------------------------------------------------------


LONG = "red circles and blue squares " * 3


@pytest.fixture
def two_texts(tmp_path):
    """A manifest of two documents of very different length."""
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a", LONG)))
    return str(path)


def gradients(folders, manifest: str, tokens: int, accumulate: int) -> tuple[dict, list, DecoderModule]:
    """Gradients of one optimizer step over the manifest that changes no weight, its batches, and the module."""
    source = DataSource([manifest])
    data = DecoderData(TokenizerFolders(str(folders["text"])), [source], [source], tokens_per_batch=tokens, max_seq_len=255)
    batches = []

    class Noting(DecoderModule):
        def training_step(self, batch, index):
            batches.append(batch)
            return super().training_step(batch, index)

    module = Noting(DecoderConfig(**DECODER), OptimizerConfig(learning_rate=0.0), z_loss=0.1)
    trainer = Trainer(accelerator="cpu", max_steps=1, accumulate_grad_batches=accumulate, limit_val_batches=0,
                      logger=False, enable_checkpointing=False, enable_progress_bar=False,
                      enable_model_summary=False, use_distributed_sampler=False)
    torch.manual_seed(0)
    trainer.fit(module, data)
    return {name: parameter.grad for name, parameter in module.named_parameters()}, batches, module


def test_accumulated_gradients_equal_those_of_one_large_batch(folders, two_texts):
    large, (together,), module = gradients(folders, two_texts, tokens=255, accumulate=1)
    # The long document alone, with <bos> or <eos>, fills a batch: the short one gets its own.
    longest = len(load_tokenizer(folders["text"]).encode(LONG)) + 1
    small, apart, _ = gradients(folders, two_texts, tokens=longest, accumulate=2)
    few, many = sorted(len(batch.targets) for batch in apart)
    assert few + many == len(together.targets) and 4 * few < many
    # By hand: the mean over all targets.
    scores = module.decoder.logits(module.decoder(together.ids, together.positions, together.packing))
    scores = scores.flatten(0, 1)[together.supervised]
    loss, log_sum = torch.nn.functional.cross_entropy(scores, together.targets), scores.logsumexp(-1)
    parameters = dict(module.named_parameters())
    by_hand = torch.autograd.grad(loss + 0.1 * log_sum.square().mean(), list(parameters.values()))
    for (name, expected), gradient in zip(large.items(), by_hand, strict=True):
        for found in (small[name], gradient):
            error = (found - expected).norm() / expected.norm()
            assert error < 1e-5, (name, float(error))


# -- Users' mistakes -----------------------------------------------------------------------------------------


def changed(values: dict, path: str, value) -> dict:
    """A copy of nested `values` with one entry replaced: changed(data, "init_args.tokens_per_batch", 3)."""
    values = copy.deepcopy(values)
    *route, last = path.split(".")
    inner = values
    for name in route:
        inner = inner[name]
    inner[last] = value
    return values


MISTAKES = {
    "missing data file": ("data", "train", [{"paths": ["nothing.jsonl"]}], ["nothing.jsonl", "no such file"]),
    "no match": ("data", "train", [{"paths": ["no-*.tar"]}], ["no-*.tar", "no file matches"]),
    "no held-out data": ("data", "validation", [{"paths": ["nothing.jsonl"]}], ["nothing.jsonl", "no such file"]),
    "wrong field of a source": ("data", "train", [{"path": ["a.jsonl"]}], ["data.train", "'path'"]),
    "unknown value of select": ("data", "train", [{"paths": [IMAGES], "select": {"colour": ["red"]}}],
                                ["'colour'", "caption"]),
    "wrong type": ("data", "tokens_per_batch", "many", ["data.tokens_per_batch", "found many", "expected int"]),
    "unknown option": ("data", "token", 3, ["data", "'token'"]),
    "batch too small": ("data", "tokens_per_batch", 8, ["tokens", "found 8", "expected at least"]),
    "context too small": ("data", "max_seq_len", 2, ["rows cannot be used", "max_seq_len + 1 = 3"]),
    "no tokenizer": ("data", "tokenizers", {"text": "no/such/folder"}, ["no/such/folder", "no such folder"]),
    "wrong tokenizer": ("data", "tokenizers", {"text": "IMAGE"}, ["tokenizers.text", "for image"]),
    "medium without tokenizer": ("data", "tokenizers", {"text": "TEXT"}, ["found image", "no image tokenizer"]),
    "wrong size": ("model", "decoder", {**DECODER, "heads": 3, "kv_heads": 2}, ["heads", "found 3", "kv_heads=2"]),
    "wrong choice": ("trainer", "precision", "17", ["trainer.precision", "found 17", "bf16-mixed"]),
    "no steps": ("trainer", "max_steps", -1, ["trainer.max_steps", "found -1"]),
    "no such device": ("trainer", "accelerator", "abacus", ["trainer", "abacus"]),
    "devices of another machine": ("trainer", "devices", [0, 1], ["trainer: `devices`", "int > 0"]),
    "spawned processes": ("trainer", "strategy", "ddp_spawn", ['trainer.strategy: found one that spawns', '"ddp"']),
    "forked processes": ("trainer", "strategy", {"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": {
        "start_method": "fork"}}, ["trainer.strategy: found one that spawns or forks its processes"]),
    "no value": ("data", "tokens_per_batch", None, ["data.tokens_per_batch: found None, expected int"]),
    "no value of a model": ("model", "z_loss", None, ["model.z_loss: found None, expected float"]),
    "no value within": ("model", "optimizer", {"betas": None}, ["model.optimizer.betas: found None, expected tuple"]),
    "no options": ("model", "optimizer", None, ["model.optimizer: found None, expected its options, or no such key"]),
    "no value for the trainer": ("trainer", "max_steps", None, ["trainer.max_steps: found None, expected int"]),
    "no weights of losses": ("model", "loss_weights", None, ["model.loss_weights: found None"]),
}


MISTAKES |= {
    "part of the batches": ("trainer", "limit_train_batches", 1, ["trainer.limit_train_batches: found 1,", "trainer.max_steps"]),
    "no batches": ("trainer", "limit_train_batches", 0.0, ["trainer.limit_train_batches: found 0.0,"]),
    "one batch again and again": ("trainer", "overfit_batches", 1, ["trainer.overfit_batches: found 1,", "limit of a source"]),
    "epochs": ("trainer", "max_epochs", 3, ["trainer.max_epochs: found 3,", "trainer.max_steps"]),
    "no epochs": ("trainer", "max_epochs", 0, ["trainer.max_epochs: found 0,"]),
    "rare validation": ("trainer", "check_val_every_n_epoch", 1, ["trainer.val_check_interval: found 9", "at most 2"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_in_one_line_before_training(name, folders, decoder_data, tmp_path, capsys):
    where, key, value, told = MISTAKES[name]
    if value == {"text": "IMAGE"}:
        value = {"text": str(folders["image"])}
    if value == {"text": "TEXT"}:
        value = {"text": str(folders["text"])}
    parts = {"model": DECODER_MODULE, "data": decoder_data, "trainer": TRAINER}
    parts[where] = changed(parts[where], key if where == "trainer" else f"init_args.{key}", value)
    if name == "rare validation":
        parts["trainer"]["val_check_interval"] = 9
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path / "run", parts["model"], parts["data"], parts["trainer"])
    check_mistake(stop, capsys, told)
    assert not (tmp_path / "run" / "model").exists()
    assert not (tmp_path / "run" / "checkpoints").exists()


def check_mistake(stop, capsys, told: list[str]) -> None:
    assert stop.value.code == 2
    errors = capsys.readouterr().err
    lines = [line for line in errors.splitlines() if line.startswith("mmtx: error: ")]
    assert len(lines) == 1 and lines[0] == errors.splitlines()[-1]
    assert "Traceback" not in errors and "usage:" not in errors
    assert all(word in lines[0] for word in told), lines[0]
    assert len(lines[0]) < 700


def test_a_run_that_trains_nothing_ends_in_one_line(decoder_data, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path / "run", DECODER_MODULE, decoder_data, {**TRAINER, "max_time": "00:00:00:00"})
    check_mistake(stop, capsys, ["trainer: found no step trained", "trainer.max_time"])


def test_a_run_that_ends_early_or_is_never_validated_says_so(decoder_data, tmp_path, capsys):
    stopping = {"class_path": "lightning.pytorch.callbacks.EarlyStopping",
                "init_args": {"monitor": "val/loss", "patience": 1, "min_delta": 9.0}}
    fit(tmp_path / "early", DECODER_MODULE, decoder_data, {**TRAINER, "max_steps": 9, "val_check_interval": 1, "callbacks": [stopping]})
    assert "training ended at step 2 of 9, by trainer.max_time or a callback" in capsys.readouterr().err
    assert (tmp_path / "early" / "model").is_dir()
    fit(tmp_path / "rare", DECODER_MODULE, decoder_data, {**TRAINER, "val_check_interval": 5})
    told = capsys.readouterr().err
    assert "trainer.val_check_interval: found 5, more than the 2 batches of the run" in told and "ended at step" not in told


def test_a_text_tokenizer_takes_one_step_whatever_the_trainer_is_told(tmp_path, capsys):
    text = section("text.TextModule", size=300), section("text.TextData", train=FEW)
    trainer = {"accelerator": "cpu", "max_epochs": 0, "max_steps": 0, "enable_progress_bar": False}
    assert load_tokenizer(fit(tmp_path / "run", *text, trainer)).kind == "text"
    assert "returned `None`" not in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path / "two", *text, {**trainer, "devices": 2})
    check_mistake(stop, capsys, ["trainer.devices: found 2 processes, expected 1 for a text tokenizer"])


@pytest.mark.parametrize("option", ["model.optimizer.muon_lr", "data.tokenizers.image", "model.image_encoder", "data.train.limit"])
def test_null_on_the_command_line_takes_a_value_away(option, decoder_data, tmp_path):
    model = changed(DECODER_MODULE, "init_args.optimizer", {"muon_lr": 0.01})
    model["init_args"]["image_encoder"] = None
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(
        {"output": str(tmp_path), "model": model, "data": decoder_data, "trainer": TRAINER}))
    built = command_line(["--config", str(tmp_path / "c.yaml"), f"--{option}", "null"], run=False).config
    section, _, rest = option.partition(".")
    values = built[section]["init_args"]
    *route, last = rest.split(".")
    for name in route:
        values = values[name]
    assert (values[-1] if isinstance(values, list) else values)[last] is None


@pytest.mark.parametrize(("option", "least"), [("samples", 0), ("save_every", 1), ("max_skipped", 1)])
def test_options_of_a_run_are_counts(option, least, decoder_data, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path / "run", DECODER_MODULE, decoder_data, more=(f"--{option}", str(least - 1)))
    check_mistake(stop, capsys, [f"{option}: found {least - 1}, expected {least} or more"])


def test_a_rehearsal_leaves_the_run_before_it_as_it_was(decoder_data, tmp_path):
    output = tmp_path / "run"
    fit(output, DECODER_MODULE, decoder_data, {**TRAINER, "max_steps": 1, "val_check_interval": 1})
    before = files(output)
    rehearsal = {**TRAINER, "fast_dev_run": 5, "accumulate_grad_batches": 2}  # validated and, at save_every 2, saved otherwise
    fit(output, DECODER_MODULE, decoder_data, rehearsal)
    assert files(output) == before and output / "model" / "config.json" in before


@pytest.mark.parametrize("samples", [0, 2])
def test_a_new_run_keeps_no_samples_and_no_figures_of_the_run_before_it(samples, decoder_data, tmp_path):
    output = tmp_path / "run"
    (output / "samples").mkdir(parents=True)
    for name in ("step-000001.png", "step-000009.txt", "step-1000000-03.ogg", "step-mine.png"):
        (output / "samples" / name).write_bytes(b"of before")
    (output / "evaluation.txt").write_text("of the model before")
    fit(output, DECODER_MODULE, decoder_data, {**TRAINER, "max_steps": 1, "val_check_interval": 1}, ("--samples", str(samples)))
    left = {path.name for path in (output / "samples").iterdir() if path.read_bytes() == b"of before"}
    assert left == {"step-mine.png"} and not (output / "evaluation.txt").exists()


def test_a_resumed_run_keeps_the_samples_up_to_its_first_step(tmp_path):
    trainer = SimpleNamespace(is_global_zero=True, global_step=2)
    (tmp_path / "samples").mkdir()
    for step in (1, 2, 3, 1000000):
        (tmp_path / "samples" / f"step-{step:06d}.txt").touch()
    ShowSamples(tmp_path).on_train_start(trainer, None)
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {"step-000001.txt", "step-000002.txt"}


def test_nothing_is_logged_every_0_steps(decoder_data, tmp_path):
    fit(tmp_path / "run", DECODER_MODULE, decoder_data, {**TRAINER, "log_every_n_steps": 0, "enable_progress_bar": True})
    names = (tmp_path / "run" / "metrics" / "metrics.csv").read_text().splitlines()[0]
    assert "val/" in names and "train/" not in names


def test_a_run_shows_no_samples_when_told_so(decoder_data, tmp_path):
    fit(tmp_path / "run", DECODER_MODULE, decoder_data, more=("--samples", "0"))
    assert (tmp_path / "run" / "model").is_dir() and not (tmp_path / "run" / "samples").exists()


def average_over_steps(module, decay, steps):
    """Run the callback over steps that each add 1 to `moving`; the module then holds the average."""
    averaging, trainer = EMAWeightAveraging(decay, use_buffers=False), SimpleNamespace(is_last_batch=False, global_step=0)
    averaging.setup(trainer, module, "fit")
    for trainer.global_step in range(1, steps + 1):
        module.moving.data += 1
        averaging.on_train_batch_end(trainer, module, None, None, 0)
    averaging.on_train_end(trainer, module)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_an_average_of_weights_leaves_frozen_ones_as_they_are(dtype):
    """As a refined codec needs for its fingerprint, and 4-bit weights, which are bytes."""
    frozen = torch.arange(256).to(dtype) if dtype == torch.uint8 else torch.rand(4096, generator=torch.Generator().manual_seed(0)).to(dtype)
    module = lightning.LightningModule()
    module.frozen, module.moving = torch.nn.Parameter(frozen.clone(), requires_grad=False), torch.nn.Parameter(torch.zeros(3))
    average_over_steps(module, 0.9, 3)
    assert torch.equal(module.frozen, frozen)
    assert torch.allclose(module.moving, torch.full((3,), (0.81 * 1 + 0.9 * 2 + 3) / (0.81 + 0.9 + 1)))


@pytest.mark.parametrize("decay", [0.999, 1 - 1e-12])
def test_an_average_of_a_short_run_is_not_that_of_its_first_step(decay):
    module = lightning.LightningModule()
    module.moving = torch.nn.Parameter(torch.zeros(3))
    average_over_steps(module, decay, 100)
    counts = [decay ** (100 - step) for step in range(1, 101)]
    assert torch.allclose(module.moving, torch.full((3,), sum(step * count for step, count in enumerate(counts, 1)) / sum(counts)))


def test_samples_are_those_with_a_caption_wherever_they_stand(decoder_data, tmp_path):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    picture, text = [{"type": "image", "image": "a.png"}], "a red circle"
    rows = [{"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
            for asked, answer in 4 * [(text, picture), (picture, text)]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = changed(decoder_data, "init_args.validation", [{"paths": [str(tmp_path / "a.jsonl")]}])
    fit(tmp_path / "run", DECODER_MODULE, data)
    assert (tmp_path / "run" / "samples" / "step-000002.txt").read_text().count("'a red circle'") == 4


def test_an_empty_manifest_ends_in_one_line(decoder_data, tmp_path, capsys):
    (tmp_path / "empty.jsonl").touch()
    data = changed(decoder_data, "init_args.train", [{"paths": [str(tmp_path / "empty.jsonl")]}])
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path / "run", DECODER_MODULE, data)
    check_mistake(stop, capsys, ["empty.jsonl", "no samples"])


def test_samples_without_an_answer_end_in_one_line(decoder_data, tmp_path, capsys):
    (tmp_path / "asked.jsonl").write_text('{"messages": [{"role": "user", "content": "a red circle"}]}\n')
    data = changed(decoder_data, "init_args.train", [{"paths": [str(tmp_path / "asked.jsonl")]}])
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path / "run", DECODER_MODULE, data)
    check_mistake(stop, capsys, ["asked.jsonl row 1", "nothing to learn"])


def test_an_output_that_cannot_be_written_ends_in_one_line(decoder_data, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(
        {"output": str(tmp_path / "file" / "run"), "model": DECODER_MODULE, "data": decoder_data, "trainer": TRAINER}))
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(tmp_path / "config.yaml")])
    check_mistake(stop, capsys, ["output", "file/run", "cannot be written"])


@pytest.mark.parametrize("arguments, told", [
    (["--config", "nothing.yaml"], ["nothing.yaml", "no such"]),
    ([], ["required", "output", "data", "model"]),
    (["--nothing", "3"], ["--nothing"]),
])
def test_mistakes_on_the_command_line_end_in_one_line(arguments, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["fit", *arguments])
    check_mistake(stop, capsys, told)
