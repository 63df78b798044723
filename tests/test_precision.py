"""Each precision that Lightning offers: what trains in it, validates, shows samples, saves and resumes, or is refused."""

import csv
import math

import pytest
import runs
import torch
import yaml

import mmtx
from mmtx.cli import main
from mmtx.config import CodeRange, DecoderConfig
from mmtx.loss import next_token_loss
from mmtx.model import Decoder
from mmtx.pipeline import Model

WORKING = ["32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true"]
DTYPES = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 4e-3}
NETWORK = {"width": 16, "heads": 1, "encoder_depth": 1, "decoder_depth": 1, "levels": [4, 3, 3]}
TOKENIZERS = {
    "image": ("codec.ImageCodecModule", "codec_data.CodecData", {"tokenizer": {"patch": 8, "side": 32, "network": NETWORK}}),
    "audio": ("codec.AudioCodecModule", "codec_data.CodecData", {"tokenizer": {
        "mels": 16, "patch_mels": 8, "patch_frames": 4, "window": 512, "chunk": 16, "pitch": True, "network": NETWORK}}),
    "vocoder": ("vocoder.VocoderModule", "vocoder.VocoderData", {"vocoder": {"width": 16}}),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("precision")
    config = runs.prepare(root, steps=4, val_check_interval=2)
    config["data"]["init_args"]["num_workers"] = 0
    return {**config, "root": root}


def fit(config: dict, kind: str, precision: str, output, *more: str) -> list[dict]:
    """Run `mmtx fit` -> the rows of its metrics."""
    config = {**config, "output": str(output), "trainer": {**config["trainer"], "precision": precision}}
    root = config.pop("root")
    if kind == "continuous_inputs":
        config["model"] = {**config["model"], "init_args": {**config["model"]["init_args"], "continuous_inputs": True}}
    elif kind in TOKENIZERS:
        module, data, arguments = TOKENIZERS[kind]
        if kind == "vocoder":
            arguments = {**arguments, "tokenizer": str(root / "audio")}
        sources = [runs.FEW[kind != "image"]]
        config["model"] = {"class_path": f"mmtx.training.{module}", "init_args": arguments}
        config["data"] = {"class_path": f"mmtx.training.{data}", "init_args": {
            "train": sources, "validation": sources, "batch_size": 3, **({"steps": 8} if kind == "vocoder" else {})}}
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(path), *more])
    with open(output / "metrics" / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


# Features meet weights of another type, or autocast does that for them; what is refused of a codec is refused of both.
RUNS = {"decoder": WORKING, "continuous_inputs": ["16-mixed", "bf16-true", "64-true"], "image": WORKING, "audio": WORKING[:3],
        "vocoder": [*WORKING[:3], "64-true"]}


@pytest.mark.slow
@pytest.mark.parametrize("kind, precision", [(kind, precision) for kind, some in RUNS.items() for precision in some])
def test_a_run_trains_validates_saves_and_resumes_or_is_refused(kind, precision, config, tmp_path, capsys):
    if kind in TOKENIZERS and precision in ("16-true", "bf16-true", "64-true"):
        with pytest.raises(SystemExit) as stop:
            fit(config, kind, precision, tmp_path / "run")
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert stop.value.code == 2 and last.startswith(f'mmtx: error: trainer.precision: found "{precision}", expected "32-true"')
        return
    rows = fit(config, kind, precision, tmp_path / "run")
    weights = (tmp_path / "run" / "model" / ("vocoder" if kind == "vocoder" else "model")).with_suffix(".safetensors")
    whole = weights.read_bytes()
    figures = [float(value) for row in rows for name, value in row.items() if value and name.startswith(("train/", "val/"))]
    assert len(figures) > 8 and all(map(math.isfinite, figures))
    assert float(rows[-1].get("train/skipped") or 0) == 0
    if kind in ("decoder", "continuous_inputs"):
        assert (tmp_path / "run" / "samples" / "step-000002.txt").is_file()
        model = mmtx.load(tmp_path / "run" / "model", "cpu")
        assert isinstance(model.caption(torch.zeros(3, 32, 32, dtype=torch.uint8), max_new_tokens=3), str)
        assert {parameter.dtype for parameter in model.decoder.parameters()} == {torch.float32}
    # The newest checkpoint is of the second step of four.
    again = fit(config, kind, precision, tmp_path / "run", "--ckpt_path", "last")
    assert weights.read_bytes() == whole and again == rows


@pytest.mark.parametrize("precision", ["transformer-engine", "transformer-engine-float16"])
def test_what_needs_another_package_is_refused_in_one_line(precision, config, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        fit(config, "decoder", precision, tmp_path / "run")
    assert stop.value.code == 2
    assert "mmtx: error: trainer: " in capsys.readouterr().err.strip().splitlines()[-1]


# -- The network in each type --------------------------------------------------------------------------------


def decoder(dtype: torch.dtype) -> Decoder:
    torch.manual_seed(0)
    config = DecoderConfig(100, width=32, depth=2, heads=4, kv_heads=2, head_dim=16, mlp_dim=64,
                           composed=(CodeRange(64, (4, 3, 3)),))
    made = Decoder(config).double()
    for parameter in made.parameters():
        if parameter.dim() > 1:  # so that scores are not all alike
            parameter.data.mul_(3)
    return made.to(dtype)


@pytest.mark.parametrize("length", [7, 150])  # attention in one piece, and in blocks
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_in_each_type_are_near_those_in_double(dtype, length):
    found = []
    for kind in (torch.float64, dtype):
        model = decoder(dtype).to(kind)
        ids = torch.randint(100, (1, length), generator=torch.Generator().manual_seed(1))
        hidden = model(ids, torch.arange(length)[None])
        loss = next_token_loss(model.embedding, hidden[0, :-1], ids[0, 1:], weights=torch.full((length - 1,), 0.1).double())
        assert hidden.dtype == kind and loss.loss.dtype == torch.promote_types(kind, torch.float32)
        loss.total.backward()
        assert {parameter.grad.dtype for parameter in model.parameters()} == {kind}
        found.append((float(loss.total.detach()), [parameter.grad.double() for parameter in model.parameters()]))
    (expected, true), (total, gradients) = found
    assert total == pytest.approx(expected, rel=DTYPES[dtype])
    for gradient, right in zip(gradients, true, strict=True):
        assert (gradient - right).norm() <= 3 * DTYPES[dtype] * right.norm() + 1e-9


def test_weights_of_targets_are_not_rounded_in_double():
    model = decoder(torch.float64)
    ids = torch.randint(100, (1, 9), generator=torch.Generator().manual_seed(1))
    hidden = model(ids, torch.arange(9)[None])[0, :-1]
    loss = next_token_loss(model.embedding, hidden, ids[0, 1:], weights=torch.full((8,), 0.1, dtype=torch.float64))
    assert float(loss.total.detach()) == pytest.approx(0.1 * float(loss.loss.sum()), rel=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_in_each_type_gives_the_ids_of_the_full_pass(dtype, tiny_model):
    torch.manual_seed(0)
    model = Model(Decoder(tiny_model.decoder.config).to(dtype), tiny_model.vocabulary, tiny_model.tokenizers)
    pictures = [torch.full((3, 16, 16), 80 * n, dtype=torch.uint8) for n in range(3)]
    alone = [model.caption(picture, max_new_tokens=6) for picture in pictures]
    assert model.caption(pictures, max_new_tokens=6) == alone
