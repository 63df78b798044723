"""EfficientNets as encoders of pictures: what they compute, which patch has which feature, and how decoders begin with one."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import fresh
import pytest
import runs
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from test_training import figures, measured
from torchvision.ops.misc import Conv2dNormActivation

import mmtx
from mmtx.config import CodeRange, DecoderConfig, EfficientNetConfig, EncoderConfig, Stage
from mmtx.errors import InputError
from mmtx.modality.efficientnet import EfficientNetEncoder, InvertedBottleneck, SameConv2d
from mmtx.modality.encoder import build_encoder
from mmtx.modality.pretrained_encoder import read_image_encoder
from mmtx.model import Decoder
from mmtx.pipeline import Model
from mmtx.training.decoder import DecoderModule
from mmtx.training.optimizer import OptimizerConfig

STAGES = ((8, 1, 3, 1, 1), (8, 2, 3, 2, 2), (12, 2, 5, 2, 2), (16, 1, 3, 2, 2), (20, 1, 5, 1, 2), (24, 2, 5, 2, 2))
NAMES = ("channels", "blocks", "kernel", "stride", "expansion")
ENCODER = {"kind": "efficientnet", "stem": 8, "stages": [dict(zip(NAMES, stage)) for stage in STAGES]}


def config(side: int = 8) -> EfficientNetConfig:
    return EfficientNetConfig(8, tuple(Stage(*stage) for stage in STAGES), 3 * side ** 2)


def random_encoder(side: int = 8) -> EfficientNetEncoder:
    torch.manual_seed(0)
    return EfficientNetEncoder(config(side)).eval()


def patches_of(picture: torch.Tensor, side: int) -> torch.Tensor:
    """A picture (3, H, W) -> its patches, row by row, each pixel's three colours together."""
    rows = picture.unfold(1, side, side).unfold(2, side, side)           # (3, h, w, side, side)
    return rows.permute(1, 2, 3, 4, 0).reshape(-1, 3 * side ** 2)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A pretrained encoder."""
    made = tmp_path / "encoder"
    made.mkdir()
    save_file({name: value.half() for name, value in random_encoder().state_dict().items()}, made / "model.safetensors")
    (made / "config.json").write_text(json.dumps(ENCODER))
    return made


@pytest.mark.parametrize("side, scale, strides_seen", [(2, 8, 16), (4, 4, 16), (8, 2, 16), (16, 1, 16), (32, 1, 32)])
def test_every_patch_has_a_place_of_its_own(side, scale, strides_seen):
    sizes = config(side)
    assert (sizes.scale, sizes.scale * sizes.side) == (scale, strides_seen)
    assert sizes.width == (24 if side == 32 else 20 + 24)
    assert random_encoder(side).features(torch.zeros(1, 3, 6 * side, 4 * side)).shape == (1, sizes.width, 6, 4)


def test_features_lie_where_their_patches_do():
    """What is shown 4 rows lower and 8 columns further right has its features 4 rows lower and 8 columns further right."""
    encoder, seen, picture = random_encoder(), [], torch.randn(3, 32, 48)
    for top, left in ((16, 12), (20, 20)):
        canvas = torch.zeros(3, 8 * 48, 8 * 40)
        canvas[:, 8 * top:8 * top + 32, 8 * left:8 * left + 48] = picture
        with torch.no_grad():
            features = encoder(patches_of(canvas, 8), [(48, 40)]).view(48, 40, -1)
        seen.append(features[top - 4:top + 8, left - 2:left + 8])
    assert (seen[0][4:8, 2:8].std((0, 1)) > 0).all()
    coarse = features[..., 20:]  # a place of the last stage is two patches a side
    assert torch.equal(coarse[::2], coarse[1::2]) and torch.equal(coarse[:, ::2], coarse[:, 1::2])
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-5)


def test_pictures_of_all_sizes_are_alike_in_any_company():
    encoder = random_encoder()
    grids = [(8, 8), (5, 7), (8, 8), (1, 1), (3, 12), (1, 9), (64, 40)]
    parts = [torch.randn(rows * columns, 192) for rows, columns in grids]
    with torch.no_grad():
        together = encoder(torch.cat(parts), grids).split([len(part) for part in parts])
        for part, grid, found in zip(parts, grids, together):
            torch.testing.assert_close(found, encoder(part, [grid]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows, columns", [(5, 8), (2, 9), (1, 5)])
def test_a_last_stage_of_four_patches_a_side_is_spread_over_four(rows, columns):
    sizes = EfficientNetConfig(8, (*config().stages, Stage(28, 1, 3, 2, 2)), 192)
    torch.manual_seed(0)
    encoder = EfficientNetEncoder(sizes).eval()
    with torch.no_grad():
        coarse = encoder(torch.randn(rows * columns, 192), [(rows, columns)]).view(rows, columns, -1)[..., 20:]
    for place, values in enumerate(coarse.flatten(0, 1)):
        row, column = divmod(place, columns)
        assert torch.equal(values, coarse[row // 4 * 4, column // 4 * 4])
    assert columns <= 4 or not torch.equal(coarse[0, 0], coarse[0, 4])


def test_blocks_are_those_of_torchvision_with_norms_folded():
    """An inverted bottleneck of torchvision's layers with batch norms, and ours with what the script folds of them."""
    spec = importlib.util.spec_from_file_location("build_image_encoder", runs.STARTER.parent / "build_image_encoder.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    torch.manual_seed(0)
    norm = lambda channels: torch.nn.BatchNorm2d(channels, eps=script.NORM_EPS)
    layers = torch.nn.Sequential(
        Conv2dNormActivation(8, 16, 1, norm_layer=norm, activation_layer=torch.nn.ReLU6),
        Conv2dNormActivation(16, 16, 5, groups=16, norm_layer=norm, activation_layer=torch.nn.ReLU6),
        Conv2dNormActivation(16, 8, 1, norm_layer=norm, activation_layer=None)).eval()
    for name, value in layers.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5 if "running_var" in name or name.endswith("1.weight") else torch.randn_like(value))
    block = InvertedBottleneck(8, Stage(8, 1, 5, 1, 2), 1)
    weights = layers.state_dict()
    for number, part in enumerate(("expand", "mix", "project")):
        weight, bias = script.folded(weights, f"{number}.0", f"{number}.1")
        getattr(block, part).load_state_dict({"weight": weight, "bias": bias})
    x = torch.randn(2, 8, 9, 9)
    torch.testing.assert_close(block(x), x + layers(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side, kernel, before, behind", [(8, 3, 0, 1), (8, 5, 1, 2), (9, 3, 1, 1), (9, 5, 2, 2)])
def test_strided_convolutions_are_padded_as_in_tensorflow(side, kernel, before, behind):
    """SAME of https://www.tensorflow.org/api_docs/python/tf/nn: what is missing is shared, the odd one behind."""
    layer = SameConv2d(2, 3, kernel, stride=2)
    x = torch.randn(1, 2, side, side)
    expected = F.conv2d(F.pad(x, (before, behind, before, behind)), layer.weight, layer.bias, stride=2)
    assert torch.equal(layer(x), expected) and expected.shape[-1] == -(-side // 2)


def test_depthwise_convolutions_are_in_float32_in_mixed_precision_on_a_cpu():
    """Where they are faster; all other convolutions are in bfloat16."""
    x, (depthwise, dense) = torch.randn(2, 8, 9, 9), (SameConv2d(8, 8, 3, 2, groups=groups) for groups in (8, 1))
    found = []
    for mixed in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            y, other = depthwise(x), dense(x)
        found.append((y, *torch.autograd.grad(y.square().sum(), depthwise.parameters())))
    assert other.dtype == torch.bfloat16
    assert all(left.dtype == torch.float32 and torch.equal(left, right) for left, right in zip(*found, strict=True))


def test_what_is_no_encoder_is_one_clear_error(folder, tmp_path):
    unfit = "image_encoder: .*config.json does not fit tokenizers.image: encoders: "
    with pytest.raises(InputError, match=unfit + r"patch: found 243, expected 3 \* side\*\*2 of patches whose side is a power of 2"):
        read_image_encoder(folder, 3 * 81)
    with pytest.raises(InputError, match=unfit + r"stages: found places of \[2, 4, 8, 16, 16, 32\] pixels, expected 64 among them"):
        read_image_encoder(folder, 3 * 64 ** 2)
    with pytest.raises(InputError, match='config.json: found no "kind": "efficientnet"'):
        read_image_encoder(runs.STARTER.parents[1] / "starter", 192)
    with pytest.raises(InputError, match="no such file"):
        read_image_encoder(tmp_path / "nowhere", 192)
    with pytest.raises(InputError, match="encoders: stages: stride: found 3"):
        EfficientNetConfig(8, ({**ENCODER["stages"][0], "stride": 3},), 192)
    with pytest.raises(InputError, match="image_encoder: found one with train_encoder: false"):
        DecoderModule(DecoderConfig(), image_encoder=str(folder))
    (folder / "config.json").write_text(json.dumps({**ENCODER, "depth": 3}))
    with pytest.raises(InputError, match="unknown field 'depth', expected stem, stages"):
        read_image_encoder(folder, 192)
    (folder / "config.json").write_text(json.dumps({**ENCODER, "stem": 16}))
    with pytest.raises(InputError, match="model.safetensors: does not fit config.json: tensor 'stages.0.0.mix.bias'"):
        read_image_encoder(folder, 192)
    # What is larger than its file is not made.
    (folder / "config.json").write_text(json.dumps({**ENCODER, "stages": [{**stage, "channels": 2**14, "blocks": 40, "expansion": 16}
                                                                           for stage in ENCODER["stages"]]}))
    with pytest.raises(InputError, match="model.safetensors: does not fit config.json"):
        read_image_encoder(folder, 192)
    (folder / "config.json").write_text(json.dumps({**ENCODER, "stages": [{**stage, "blocks": 256} for stage in ENCODER["stages"]]}))
    with pytest.raises(InputError, match="encoders: blocks of all stages: found 1536"):
        read_image_encoder(folder, 192)


def test_a_mean_with_a_model_that_saw_otherwise_has_the_encoder_of_the_first(tokenizers, vocabulary, tmp_path):
    levels = {kind: vocabulary.levels(kind) for kind in ("image", "audio")}
    made = {}
    for name, encoder in (("new", config()), ("old", tokenizers["image"].encoder_config)):
        sizes = DecoderConfig(
            vocabulary.size, 32, 1, 2, 2, 16, 64, features={"image": encoder.width}, encoders={"image": encoder},
            composed=tuple(CodeRange(vocabulary.range(kind).start, each) for kind, each in levels.items()))
        made[name] = Model(Decoder(sizes, build_encoder), vocabulary, tokenizers)
        made[name].save(tmp_path / name)
    done = fresh.script(runs.STARTER.parents[1] / "average.py", "new", "new", "old", "--output", "mean", cwd=tmp_path, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    new, old, mean = (model.decoder.state_dict() for model in (*made.values(), mmtx.load(tmp_path / "mean", "cpu")))
    for name, weight in mean.items():
        own = name.startswith(("encoders.image.", "projections.image."))
        torch.testing.assert_close(weight, new[name] if own else (2 * new[name] + old[name]) / 3)


@pytest.mark.parametrize("encoder", [config(), EncoderConfig(192, 32, 2, 1, 8)])
def test_the_encoder_of_pictures_has_a_learning_rate_of_its_own(encoder):
    """All of it, matrices of its blocks too, and nothing else."""
    module = DecoderModule(DecoderConfig(), OptimizerConfig(1e-2, 3e-2, warmup_steps=0), continuous_inputs=True, train_encoder=True,
                           image_encoder_lr=1e-4)
    module.decoder = Decoder(DecoderConfig(300, 32, 1, 2, 2, 16, 64, features={"image": encoder.width}, encoders={"image": encoder}),
                             build_encoder)
    module.trainer = SimpleNamespace(max_steps=10, precision="32-true")
    groups = module.configure_optimizers()["optimizer"].param_groups
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    slow = {*map(id, module.decoder.encoders.parameters())}
    assert rates.keys() == {*map(id, module.decoder.parameters())}
    assert {key for key, rate in rates.items() if rate == 1e-4} == slow and {*rates.values()} == {1e-2, 3e-2, 1e-4}
    for value in (-1e-3, float("nan")):
        with pytest.raises(InputError, match="image_encoder_lr: found"):
            DecoderModule(DecoderConfig(), continuous_inputs=True, train_encoder=True, image_encoder_lr=value)
    with pytest.raises(InputError, match="image_encoder_lr: found one with train_encoder: false"):
        DecoderModule(DecoderConfig(), image_encoder_lr=1e-4)


@pytest.mark.slow
def test_a_decoder_begins_with_it_and_keeps_what_else_it_has_learnt(folder, tmp_path, capsys):
    """From nothing, from a finished model whose own encoder it replaces, and on from that without being told again."""
    run = runs.prepare(tmp_path, steps=3)
    run["data"]["init_args"]["num_workers"] = 0
    options = run["model"]["init_args"]
    options |= {"continuous_inputs": True, "train_encoder": True, "optimizer": {"learning_rate": 0.0, "weight_decay": 0.0}}
    assert runs.fit(run, tmp_path / "first") == [0], (tmp_path / "first.log").read_text()
    first = mmtx.load(tmp_path / "first" / "model", "cpu").decoder
    options["image_encoder"] = str(folder)
    assert runs.fit(run, tmp_path / "new") == [0], (tmp_path / "new.log").read_text()
    options["init_from"] = str(tmp_path / "first" / "model")
    assert runs.fit(run, tmp_path / "second") == [0], (tmp_path / "second.log").read_text()
    second = mmtx.load(tmp_path / "second" / "model", "cpu").decoder
    pretrained = {f"image.{name}": value for name, value in read_image_encoder(folder, 768).weights.items()}
    for decoder in (mmtx.load(tmp_path / "new" / "model", "cpu").decoder, second):
        assert isinstance(decoder.config.encoders["image"], EfficientNetConfig) and isinstance(decoder.config.encoders["audio"], EncoderConfig)
        found = decoder.encoders.state_dict()
        assert all(torch.allclose(found[name], value, atol=1e-6) for name, value in pretrained.items())
    replaced = ("encoders.image.", "projections.image.")
    kept = {name: value for name, value in first.state_dict().items() if not name.startswith(replaced)}
    assert all(torch.allclose(second.state_dict()[name], value, atol=1e-6) for name, value in kept.items())
    assert second.projections["image"].weight.shape == (32, 44)
    # Whoever trains on has its encoders, with adapters too, and one of another model may be taken over.
    del options["image_encoder"]
    options["init_from"] = str(tmp_path / "second" / "model")
    assert runs.fit(run, tmp_path / "third") == [0], (tmp_path / "third.log").read_text()
    third = mmtx.load(tmp_path / "third" / "model", "cpu").decoder
    assert all(torch.allclose(third.state_dict()[name], value, atol=1e-6) for name, value in second.state_dict().items())
    options["lora"] = {"rank": 2}
    assert runs.fit(run, tmp_path / "adapted") == [0], (tmp_path / "adapted.log").read_text()
    del options["lora"], options["init_from"]
    options["encoders_from"] = str(tmp_path / "second" / "model")
    assert runs.fit(run, tmp_path / "fourth") == [0], (tmp_path / "fourth.log").read_text()
    fourth = mmtx.load(tmp_path / "fourth" / "model", "cpu").decoder
    assert all(torch.allclose(fourth.encoders.state_dict()[name], value, atol=1e-6) for name, value in pretrained.items())
    # That of pictures may come from elsewhere than the others.
    options["image_encoder"] = str(folder)
    options["encoders_from"] = str(tmp_path / "first" / "model")
    assert runs.fit(run, tmp_path / "both") == [0], (tmp_path / "both.log").read_text()
    both = mmtx.load(tmp_path / "both" / "model", "cpu").decoder.encoders.state_dict()
    theirs = {name: value for name, value in first.encoders.state_dict().items() if name.startswith("audio.")}
    assert all(torch.allclose(both[name], value, atol=1e-6) for name, value in {**pretrained, **theirs}.items())
    # A finished model that has one may be named, too: a decoder as wide has its projection along, another begins with one of its own.
    del options["encoders_from"]
    seer = mmtx.load(tmp_path / "second" / "model", "cpu")
    for parameter in (*seer.decoder.encoders["image"].parameters(), *seer.decoder.projections["image"].parameters()):
        parameter.data += 0.1
    seer.save(tmp_path / "seer")
    options |= {"image_encoder": str(tmp_path / "seer"), "init_from": str(tmp_path / "first" / "model")}
    assert runs.fit(run, tmp_path / "grafted") == [0], (tmp_path / "grafted.log").read_text()
    grafted = mmtx.load(tmp_path / "grafted" / "model", "cpu").decoder.state_dict()
    theirs = {name: value for name, value in seer.decoder.state_dict().items() if name.startswith(replaced)}
    assert all(torch.allclose(grafted[name], value, atol=1e-6) for name, value in {**kept, **theirs}.items())
    del options["init_from"]
    options["decoder"] |= {"width": 64}
    assert runs.fit(run, tmp_path / "wide") == [0], (tmp_path / "wide.log").read_text()
    wide = mmtx.load(tmp_path / "wide" / "model", "cpu").decoder.state_dict()
    assert all(torch.allclose(wide[name], value, atol=1e-6) for name, value in theirs.items() if name.startswith("encoders"))
    options["decoder"] |= {"width": 32}
    # And it trains along.
    options |= {"image_encoder": str(folder), "optimizer": {"learning_rate": 1e-2}}
    assert runs.fit(run, tmp_path / "trained") == [0], (tmp_path / "trained.log").read_text()
    trained = mmtx.load(tmp_path / "trained" / "model", "cpu").decoder.encoders.state_dict()
    assert all(not torch.equal(trained[name], value) for name, value in pretrained.items() if name.endswith("weight"))
    # A finished run is what it is, whatever became of what it began with.
    for gone in (folder, tmp_path / "first" / "model", tmp_path / "second" / "model"):
        (gone / "config.json").unlink()
    for name in ("trained", "both", "third", "fourth"):
        assert figures(capsys, "validate", "--config", str(tmp_path / f"{name}.yaml")) == pytest.approx(measured(tmp_path / name), rel=1e-5)
