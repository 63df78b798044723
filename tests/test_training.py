"""`mmtx fit` for real on a handful of starter samples: what a run leaves, resuming, the loss, and users' mistakes."""

import copy
import json
from pathlib import Path

import pytest
import torch
import yaml
from lightning import Trainer

import mmtx
from mmtx.cli import main
from mmtx.data.collection import DataSource
from mmtx.data.sources import open_source
from mmtx.modality.base import load_tokenizer
from mmtx.modality.text import TextTokenizer
from mmtx.model import DecoderConfig
from mmtx.training.decoder import DecoderData, DecoderModule, TokenizerFolders
from mmtx.training.optimizer import OptimizerConfig

STARTER = Path(__file__).parents[1] / "demos" / "data" / "starter"
IMAGES, SOUNDS = str(STARTER / "images-train-004.tar.gz"), str(STARTER / "sounds-train-001.tar.gz")
FEW = [{"paths": [IMAGES], "limit": 6}, {"paths": [SOUNDS], "limit": 4}]
NETWORK = {"width": 16, "heads": 1, "encoder_depth": 1, "decoder_depth": 1, "levels": [4, 3, 3]}
TRAINER = {"accelerator": "cpu", "max_steps": 2, "val_check_interval": 2, "check_val_every_n_epoch": None,
           "log_every_n_steps": 1, "enable_progress_bar": False, "gradient_clip_val": 1.0}
DECODER = {"width": 32, "depth": 1, "heads": 2, "kv_heads": 1, "head_width": 16, "hidden": 32}


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
    codec = {"train": FEW, "validation": FEW, "batch": 4}
    return {
        "text": fit(root / "text", section("text.TextModule", size=300), section("text.TextData", train=FEW),
                    {"accelerator": "cpu", "max_epochs": 1, "log_every_n_steps": 1, "enable_progress_bar": False}),
        "image": fit(root / "image",
                     section("codec.ImageCodecModule", tokenizer={"patch": 16, "side": 32, "network": NETWORK}),
                     section("codec.CodecData", image_augmentation={}, **codec)),
        "audio": fit(root / "audio",
                     section("codec.AudioCodecModule", tokenizer={"mels": 16, "patch_mels": 16, "patch_frames": 4,
                                                                  "window": 512, "chunk": 16, "network": NETWORK}),
                     section("codec.CodecData", audio_augmentation={}, **codec)),
    }


@pytest.fixture(scope="module")
def decoder_data(folders):
    tokenizers = {kind: str(folder) for kind, folder in folders.items()}
    return section("decoder.DecoderData", tokenizers=tokenizers, train=FEW, validation=FEW, tokens=256, context=255,
                   image_augmentation={}, audio_augmentation={})


DECODER_MODULE = section("decoder.DecoderModule", decoder=DECODER, continuous=True)


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
    sample = next(open_source(IMAGES))
    picture = next(part for turn in sample.turns for part in turn.parts)
    path = run.parent / "picture.webp"
    path.write_bytes(picture.source.read())
    assert isinstance(model.caption(str(path), max_new_tokens=4), str)
    assert "train/loss" in (run / "metrics" / "metrics.csv").read_text()
    lines = (run / "samples" / "step-000002.txt").read_text().splitlines()
    assert lines[0].split() == ["predicted", "true"]
    assert 4 <= len(lines) - 1 <= 10
    assert not list(run.glob(".model*"))


def test_the_saved_config_repeats_the_run(root, run):
    again = root / "again"
    main(["fit", "--config", str(run / "metrics" / "config.yaml"), "--output", str(again)])
    name = "model/model.safetensors"
    assert (again / name).read_bytes() == (run / name).read_bytes()


def test_a_run_starts_from_a_finished_model(root, run, decoder_data):
    module = changed(DECODER_MODULE, "init_args.start", str(run / "model"))
    module = changed(module, "init_args.optimizer", {"learning_rate": 1e-9})
    retrained = fit(root / "image2", section("codec.ImageCodecModule", tokenizer={"patch": 16, "side": 32, "network": NETWORK}),
                    section("codec.CodecData", train=FEW, validation=FEW, batch=4), {**TRAINER, "max_steps": 1})
    data = changed(decoder_data, "init_args.tokenizers.image", str(retrained))
    before, after = mmtx.load(run / "model", "cpu"), mmtx.load(fit(root / "started", module, data), "cpu")
    assert before.tokenizers["image"].fingerprint != after.tokenizers["image"].fingerprint
    for one, two in zip(before.decoder.parameters(), after.decoder.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)


@pytest.mark.parametrize("change, told", [
    ({"model": ("decoder.hidden", 80)}, ["start", "found hidden 32", "expected 80"]),
    ({"data": ("tokenizers.text", str(STARTER.parents[2] / "tokenizers" / "text"))}, ["start", "vocabulary_size"]),
    ({"model": ("start", "no/such/folder")}, ["no/such/folder", "no such folder"]),
])
def test_what_does_not_fit_is_no_start(change, told, run, decoder_data, tmp_path, capsys):
    parts = {"model": changed(DECODER_MODULE, "init_args.start", str(run / "model")), "data": decoder_data}
    for part, (path, value) in change.items():
        parts[part] = changed(parts[part], f"init_args.{path}", value)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path / "run", parts["model"], parts["data"])
    check_mistake(stop, capsys, told)


def test_a_text_tokenizer_of_the_same_size_but_other_pieces_is_no_start(run, decoder_data, tmp_path, capsys):
    other = TextTokenizer.train(["pack my box with five dozen liquor jugs, then judge vexing fop quiz blitz"] * 9, 300)
    assert other.size == mmtx.load(run / "model", "cpu").tokenizers["text"].size
    other.save(tmp_path / "text")
    data = changed(decoder_data, "init_args.tokenizers.text", str(tmp_path / "text"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path / "run", changed(DECODER_MODULE, "init_args.start", str(run / "model")), data)
    check_mistake(stop, capsys, ["start", "text tokenizer of fingerprint", "tokenizers.text"])


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
    resumed = fit(root / "broken", DECODER_MODULE, decoder_data, steps, ("--ckpt_path", "last"))
    expected, found = (mmtx.load(folder, device="cpu").decoder.state_dict() for folder in (whole, resumed))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


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
    data = DecoderData(TokenizerFolders(str(folders["text"])), [source], [source], tokens=tokens, context=255)
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
    for (name, expected), by_hand in zip(large.items(), by_hand, strict=True):
        for found in (small[name], by_hand):
            error = (found - expected).norm() / expected.norm()
            assert error < 1e-5, (name, float(error))


# -- Users' mistakes -----------------------------------------------------------------------------------------


def changed(values: dict, path: str, value) -> dict:
    """A copy of nested `values` with one entry replaced: changed(data, "init_args.tokens", 3)."""
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
    "wrong type": ("data", "tokens", "many", ["data.tokens", "found many", "expected int"]),
    "unknown option": ("data", "token", 3, ["data", "'token'"]),
    "batch too small": ("data", "tokens", 8, ["tokens", "found 8", "expected at least"]),
    "context too small": ("data", "context", 2, ["rows cannot be used", "context + 1 = 3"]),
    "no tokenizer": ("data", "tokenizers", {"text": "no/such/folder"}, ["no/such/folder", "no such folder"]),
    "wrong tokenizer": ("data", "tokenizers", {"text": "IMAGE"}, ["tokenizers.text", "for image"]),
    "medium without tokenizer": ("data", "tokenizers", {"text": "TEXT"}, ["found image", "no image tokenizer"]),
    "wrong size": ("model", "decoder", {**DECODER, "heads": 3, "kv_heads": 2}, ["heads", "found 3", "kv_heads=2"]),
    "wrong choice": ("trainer", "precision", "17", ["trainer.precision", "found 17", "bf16-mixed"]),
    "no steps": ("trainer", "max_steps", -1, ["trainer.max_steps", "found -1"]),
    "no such device": ("trainer", "accelerator", "abacus", ["trainer", "abacus"]),
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


@pytest.mark.parametrize(("option", "least"), [("samples", 0), ("save_every", 1), ("max_skipped", 1)])
def test_options_of_a_run_are_counts(option, least, decoder_data, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path / "run", DECODER_MODULE, decoder_data, more=(f"--{option}", str(least - 1)))
    check_mistake(stop, capsys, [f"{option}: found {least - 1}, expected {least} or more"])


def test_a_run_shows_no_samples_when_told_so(decoder_data, tmp_path):
    fit(tmp_path / "run", DECODER_MODULE, decoder_data, more=("--samples", "0"))
    assert (tmp_path / "run" / "model").is_dir() and not (tmp_path / "run" / "samples").exists()


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
