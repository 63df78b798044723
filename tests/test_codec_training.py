"""Training of the codecs on real pictures and sounds: health in every validation, the discriminator, what it leaves alone."""

import json
import math
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from lightning import Trainer
from PIL import Image

from mmtx.cli import main
from mmtx.data.collection import DataSource, read_source
from mmtx.errors import InputError
from mmtx.modality.audio import AudioConfig
from mmtx.modality.autoencoder import NetworkConfig
from mmtx.modality.fsq import FSQ
from mmtx.modality.image import ImageConfig
from mmtx.modality.vocoder import PITCHES
from mmtx.training.codec import AudioCodecModule, CodebookUsage, ImageCodecModule, picture_quality
from mmtx.training.codec_data import CodecBatches, CodecData
from mmtx.training.discriminator import AdversarialConfig, Discriminator, Perceptual, PerceptualConfig, adaptive_weight
from mmtx.training.optimizer import OptimizerConfig

STARTER = Path(__file__).parents[1] / "demos" / "data" / "starter"
FEW = [DataSource([str(STARTER / "images-train-004.tar.gz")], limit=6),
       DataSource([str(STARTER / "sounds-train-001.tar.gz")], limit=4)]
NETWORK = NetworkConfig(width=16, heads=1, encoder_depth=1, decoder_depth=1, levels=(8, 5, 5))
IMAGE = ImageConfig(patch=8, side=32, network=NETWORK)
AUDIO = AudioConfig(mels=16, patch_mels=8, patch_frames=4, window=512, chunk=16, network=NETWORK)
SMALL = AdversarialConfig(start_step=2, width=8, depth=2)
JUDGE = "tests.test_codec_training.judge"


class Judge(torch.nn.Sequential):
    """A network of two layers; what a user may have."""

    def __init__(self):
        super().__init__(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 8, 3))


def judge() -> torch.nn.Module:
    """The same weights each time, as a trained network has."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return Judge()


PERCEPTUAL = PerceptualConfig(JUDGE, ["0", "2"], weight=0.5)


@pytest.fixture(scope="module", autouse=True)
def importable():
    """The judge is named by its import path, as a user's is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1]))
        yield


def module(kind: str, learning_rate=1e-3, **more):
    torch.manual_seed(0)
    optimizer = OptimizerConfig(learning_rate=learning_rate, muon_lr=learning_rate)
    made, config = (ImageCodecModule, IMAGE) if kind == "image" else (AudioCodecModule, AUDIO)
    return made(config, optimizer, **more)


def train(module, steps=2, sources=FEW) -> dict[str, float]:
    """Train with clipping and one validation -> what was logged last."""
    trainer = Trainer(accelerator="cpu", max_steps=steps, val_check_interval=steps, check_val_every_n_epoch=None,
                      gradient_clip_val=0.01, num_sanity_val_steps=0, logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False)
    trainer.fit(module, CodecData(sources, sources, batch_size=4, multi_size_prob=0.5))
    return {name: float(value) for name, value in trainer.logged_metrics.items()}


def pictures(count=4, side=32, seed=0) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_a_batch_is_a_function_of_seed_number_and_rank():
    media = [torch.full((1,), float(n)) for n in range(50)]

    def batch(k=0, seed=0, rank=0, weights=torch.ones(50)):
        batches = CodecBatches(media, collate, batch_size=8, seed=seed, steps=4, rank=rank, world=2, weights=weights)
        return batches[k].media.flatten().tolist()

    def collate(chosen, generator):
        return torch.stack(chosen) + torch.rand(len(chosen), 1, generator=generator) / 2  # as augmentation would

    first = batch()
    assert batch() == first
    others = [batch(k=1), batch(seed=1), batch(rank=1)]
    assert all(set(map(int, other)) != set(map(int, first)) for other in others)
    assert not {value % 1 for value in first} & {value % 1 for other in others for value in other}
    # Held-out media come once, in order, by turns.
    order = [[int(value) for value in batch(k, rank=rank, weights=None)] for k in range(3) for rank in range(2)]
    assert [n for part in order for n in part] == list(range(48))


# -- Health --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["image", "audio"])
@pytest.mark.parametrize("collapsed", [True, False])
def test_a_collapse_is_told_with_advice_and_health_is_not(kind, collapsed, capsys):
    codec = module(kind, learning_rate=0.0)
    if collapsed:
        torch.nn.init.zeros_(codec.tokenizer.network.to_latent.weight)
        torch.nn.init.zeros_(codec.tokenizer.network.to_latent.bias)
    else:  # fresh attention hardly tells patches apart
        torch.nn.init.normal_(codec.tokenizer.network.embed.weight, std=0.3)
    figures = train(codec)
    told = [line for line in capsys.readouterr().err.splitlines() if "collapse" in line]
    if not collapsed:
        assert not told and figures["val/perplexity"] > 3
        return
    assert len(told) == 1
    for word in (f"step 2: {kind} codes", "1 of 200 in use", "perplexity 1.0", "(1, 1, 1) of (8, 5, 5)",
                 "optimizer.learning_rate", "tokenizer.network.levels"):
        assert word in told[0]
    assert figures["val/perplexity"] == pytest.approx(1) and figures["val/dead_codes"] == pytest.approx(199 / 200)


@pytest.mark.parametrize(("kind", "names"), [("image", {"psnr_db", "ssim"}), ("audio", {"mel_error_db"})])
def test_every_validation_logs_health(kind, names):
    figures = train(module(kind))
    assert {f"val/{name}" for name in names | {"loss", "perplexity", "dead_codes"}} <= set(figures)


def test_usage_by_hand():
    levels = (3, 2)
    codes = FSQ(levels).to_codes(torch.tensor([[-1.0, -1.0], [0.0, -1.0], [0.0, -1.0], [-1.0, 1.0]]))
    usage = CodebookUsage.of(torch.bincount(codes, minlength=6), levels)
    assert usage.levels == (2, 2)  # the third level of the first digit never came
    assert usage.dead == pytest.approx(3 / 6)
    assert usage.perplexity == pytest.approx(2 ** 1.5)  # shares 1/2, 1/4, 1/4
    # Two codes beside the most common one, as often: one bit of the two that four patches can carry.
    assert usage.carried == pytest.approx(0.5)


def test_usage_of_a_code_of_one_digit():
    assert CodebookUsage.of(torch.tensor([3, 0, 1, 2, 0, 4, 5, 0]), (8,)).levels == (5,)


def test_silence_alone_is_no_collapse():
    counts = torch.ones(200)
    counts[17] = 10_000
    assert CodebookUsage.of(counts, (8, 5, 5)).carried > 0.99


def test_picture_quality_by_hand():
    media = pictures()
    output = media.clone()
    output[0] = (media[0] * 0.9).clamp(-1, 1)
    output[1, 0, 0, 0] = 7.0  # beyond what a picture can show
    figures = picture_quality(media, output)
    error = (output.clamp(-1, 1) - media).square().mean((1, 2, 3)) / 4
    expected = torch.where(error > 0, -10 * error.log10(), 100.0)
    assert figures["psnr_db"] == pytest.approx(float(expected.mean()), rel=1e-4)
    assert picture_quality(media, media)["ssim"] == pytest.approx(1)
    assert picture_quality(media, pictures(seed=1))["ssim"] < 0.1
    assert set(picture_quality(media[..., :8, :8], media[..., :8, :8])) == {"psnr_db"}


# -- The perceptual term -------------------------------------------------------------------------------------


def test_distance_in_features():
    perceptual = Perceptual(PERCEPTUAL)
    media = pictures()
    near = media + 0.05 * torch.randn(media.shape, generator=torch.Generator().manual_seed(1))
    assert perceptual(media, media) == 0
    assert 0 < perceptual(near, media) < perceptual(pictures(seed=1), media)
    # By hand, with the pixels that the network was trained with.
    network = judge()
    pixels = [((x + 1) / 2 - torch.tensor(PERCEPTUAL.mean)[:, None, None]) / torch.tensor(PERCEPTUAL.std)[:, None, None]
              for x in (near, media)]
    layers = [[torch.nn.functional.normalize(f, dim=1) for f in (network[0](x), network(x))] for x in pixels]
    expected = sum(((a - b) ** 2).sum(1).mean() for a, b in zip(*layers, strict=True)) / 2
    assert float(perceptual(near, media)) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_weights_come_from_a_file(tmp_path):
    weights = {name: tensor + 1 for name, tensor in judge().state_dict().items()}
    safetensors.torch.save_file(weights, tmp_path / "judge.safetensors")
    torch.save(weights, tmp_path / "judge.pt")
    for name in ("judge.safetensors", "judge.pt"):
        config = PerceptualConfig("tests.test_codec_training.Judge", ["0"], weights=str(tmp_path / name))
        found = Perceptual(config).network.state_dict()
        assert torch.equal(found["0.weight"], weights["0.weight"])


@pytest.mark.parametrize("network", ["torchvision.models.squeezenet1_1", "tests.test_codec_training.Judge"])
def test_random_weights_are_refused(network):
    with pytest.raises(InputError, match="perceptual.weights: found none, .* random weights; expected a file"):
        Perceptual(PerceptualConfig(network, ["0"]))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"network": "no.such.thing"}, "perceptual.network: no.such.thing cannot be made"),
        ({"network": "pathlib.Path"}, "perceptual.network: pathlib.Path gives .*Path, expected a torch.nn.Module"),
        ({"layers": ["relu9"]}, "perceptual.layers: found 'relu9', expected layers of .*: .*0"),
        ({"layers": []}, "perceptual.layers: found ''"),
        ({"weights": "nothing.pt"}, "perceptual.weights: nothing.pt: not weights"),
        ({"arguments": {"size": 3}}, "perceptual.network: .* cannot be made .*size"),
    ],
)
def test_mistakes_are_told(values, message):
    with pytest.raises(InputError, match=message):
        Perceptual(PerceptualConfig(**{"network": JUDGE, "layers": ["0"], **values}))


def test_the_network_is_neither_trained_nor_saved():
    codec = module("image", perceptual=PERCEPTUAL)
    before = {name: tensor.clone() for name, tensor in codec.perceptual.network.state_dict().items()}
    train(codec)
    assert all(torch.equal(tensor, before[name]) for name, tensor in codec.perceptual.network.state_dict().items())
    assert set(codec.state_dict()) == set(module("image").state_dict())


# -- The adversarial term ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (2, 16), (32, 32), (33, 7), (64, 64)])
@pytest.mark.parametrize("depth", [1, 3])
def test_a_critic_scores_pictures_of_any_size(size, depth):
    scores = Discriminator(3, AdversarialConfig(width=4, depth=depth))(torch.zeros(2, 3, *size))
    assert scores.shape[:2] == (2, 1) and min(scores.shape[2:]) >= 1


def test_codec_and_critic_learn_from_their_own_part_only():
    discriminator = Discriminator(3, SMALL)
    media, output = pictures(), pictures(seed=1).requires_grad_()
    parameters = list(discriminator.parameters())
    assert not any(torch.autograd.grad(discriminator.generator_loss(output), parameters, allow_unused=True))
    assert torch.autograd.grad(discriminator.generator_loss(output), output)[0].abs().sum() > 0
    mistake = discriminator.discriminator_loss(output, media)
    assert torch.autograd.grad(mistake, output, allow_unused=True, retain_graph=True) == (None,)
    assert all(gradient.abs().sum() > 0 for gradient in torch.autograd.grad(mistake, parameters[:2]))


def test_hinge_loss_by_hand():
    class Mean(Discriminator):
        def forward(self, pictures):
            return pictures.mean((1, 2, 3))

    discriminator = Mean(3, SMALL)
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.25])
    spread = torch.ones(2, 3, 4, 4)
    mistake = discriminator.discriminator_loss(spread * fake[:, None, None, None], spread * real[:, None, None, None])
    assert mistake == pytest.approx(((0 + 0.5) / 2 + (0 + 1.25) / 2) / 2)
    assert discriminator.generator_loss(spread * fake[:, None, None, None]) == pytest.approx(2.75 / 2)


def test_a_critic_learns_to_tell_reconstructions():
    torch.manual_seed(0)
    discriminator, media = Discriminator(3, SMALL), pictures()
    blurred = torch.nn.functional.avg_pool2d(media, 5, 1, 2)
    optimizer = torch.optim.Adam(discriminator.parameters(), 3e-3)
    first = float(discriminator.discriminator_loss(blurred, media))
    for _ in range(60):
        optimizer.zero_grad()
        discriminator.discriminator_loss(blurred, media).backward()
        optimizer.step()
    assert discriminator.discriminator_loss(blurred, media) < 0.2 * first
    assert discriminator.generator_loss(blurred) > discriminator.generator_loss(media)


def test_balance_gives_the_norm_of_the_rest():
    output = pictures().requires_grad_()
    rest, term = output.square().mean(), output[:, :, ::2].pow(3).sum()
    scaled = adaptive_weight(term, rest, output) * term
    norms = [torch.autograd.grad(loss, output)[0].norm() for loss in (rest, scaled)]
    assert norms[0] == pytest.approx(float(norms[1]), rel=1e-4)


@pytest.mark.parametrize(("kind", "terms"), [("image", {"perceptual": PERCEPTUAL}), ("image", {"adversarial": SMALL}),
                                             ("audio", {"adversarial": SMALL})])
def test_each_term_changes_what_the_codec_learns(kind, terms):
    plain, other = module(kind), module(kind, **terms)
    train(plain, 3), train(other, 3)
    for (name, a), b in zip(plain.tokenizer.named_parameters(), other.tokenizer.parameters(), strict=True):
        assert not torch.equal(a, b), name


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_before_its_start_a_critic_changes_nothing(kind):
    plain, later = module(kind), module(kind, adversarial=AdversarialConfig(start_step=3, width=8, depth=2))
    fresh = {name: tensor.clone() for name, tensor in later.discriminator.state_dict().items()}
    train(plain, 3), train(later, 3)
    assert all(map(torch.equal, plain.tokenizer.state_dict().values(), later.tokenizer.state_dict().values()))
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in later.discriminator.state_dict().items())


@pytest.mark.parametrize(("values", "message"), [({"width": 0}, "adversarial.width: found 0"),
                                                 ({"depth": 0}, "adversarial.depth"), ({"start_step": -1}, "start_step"),
                                                 ({"weight": -1.0}, "adversarial.weight: found -1.0"),
                                                 ({"learning_rate": -1.0}, "adversarial.learning_rate: found -1.0")])
def test_adversarial_config_is_checked(values, message):
    with pytest.raises(InputError, match=message):
        AdversarialConfig(**values)


# -- Data ----------------------------------------------------------------------------------------------------


def without_captions(folder: Path, form: str) -> Path:
    """Three pictures as a source that has no captions, beside what makes no difference to a codec."""
    there = folder / "pictures"
    there.mkdir()
    for number in range(3):
        Image.new("RGB", (40, 30), (80 * number, 0, 0)).save(there / f"{number}.png")
    (there / "0.json").write_text('{"caption": " ", "width": 40}')
    (there / "1.txt").write_text("")
    rows = [{"image": f"pictures/{number}.png", "label": number} for number in range(3)]
    if form == "folder":
        (there / "metadata.csv").write_text("file_name,label\n0.png,7\n")
        return there
    if form == "tar":
        with tarfile.open(folder / "all.tar", "w") as tar:
            tar.add(there, "")
        return folder / "all.tar"
    if form == "dataset":
        datasets = pytest.importorskip("datasets")
        kinds = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        rows = [{**row, "image": str(folder / row["image"])} for row in rows]
        datasets.Dataset.from_list(rows, features=kinds).save_to_disk(folder / "saved")
        return folder / "saved"
    lines = {"jsonl": [json.dumps({**row, "text": ""} if row["label"] else row) for row in rows],
             "csv": ["image,caption", *(f"{row['image']}," for row in rows)]}[form]
    (folder / f"rows.{form}").write_text("\n".join(lines))
    return folder / f"rows.{form}"


@pytest.mark.parametrize("form", ["folder", "tar", "jsonl", "csv", "dataset"])
def test_a_codec_needs_no_captions(tmp_path, form, capfd):
    source = str(without_captions(tmp_path, form))
    assert math.isfinite(train(module("image"), steps=1, sources=[DataSource([source])])["train/loss"])
    assert "skipped" not in capfd.readouterr().err
    with pytest.raises(InputError, match="3 of 3 rows cannot be used" if form != "folder" else "metadata.csv and no captions|3 of 3"):
        read_source(DataSource([source]))


# -- mmtx fit ------------------------------------------------------------------------------------------------


def fit(output: Path, *more: str) -> bytes:
    """Six steps with both terms -> the weights of the tokenizer."""
    sources = [{"paths": list(source.paths), "limit": source.limit} for source in FEW[:1]]
    network = {"width": 16, "heads": 1, "encoder_depth": 1, "decoder_depth": 1, "levels": [8, 5, 5]}
    config = {
        "output": str(output), "seed_everything": 0, "save_every": 2, "samples": 4, "ema": 0.9,
        "model": {"class_path": "mmtx.training.codec.ImageCodecModule", "init_args": {
            "tokenizer": {"patch": 8, "side": 32, "network": network},
            "perceptual": {"network": JUDGE, "layers": ["0"]},
            "adversarial": {"start_step": 2, "width": 8, "depth": 2, "learning_rate": 1e-3}}},
        "data": {"class_path": "mmtx.training.codec_data.CodecData", "init_args": {
            "train": sources, "validation": sources, "batch_size": 4, "multi_size_prob": 0.5, "image_augmentation": {}}},
        "trainer": {"accelerator": "cpu", "max_steps": 6, "val_check_interval": 6, "check_val_every_n_epoch": None,
                    "log_every_n_steps": 1, "enable_progress_bar": False, "gradient_clip_val": 1.0},
    }
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(path), *more])
    return (output / "model" / "model.safetensors").read_bytes()


def test_a_resumed_run_with_a_critic_is_the_run_that_was_interrupted(tmp_path, monkeypatch):
    whole = fit(tmp_path / "whole")
    metrics = (tmp_path / "whole" / "metrics" / "metrics.csv").read_text()
    assert all(name in metrics for name in ("train/perceptual", "train/adversarial", "train/discriminator", "val/ssim"))
    assert (tmp_path / "whole" / "samples" / "step-000006.png").is_file()
    step, calls = ImageCodecModule.training_step, []

    def crash(self, batch, index):
        calls.append(index)
        if len(calls) == 6:  # after a checkpoint at the fourth step, in which the discriminator has learned
            raise RuntimeError("power cut")
        return step(self, batch, index)

    with monkeypatch.context() as patched:
        patched.setattr(ImageCodecModule, "training_step", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            fit(tmp_path / "broken")
    assert fit(tmp_path / "broken", "--ckpt_path", "last") == whole
    assert (tmp_path / "broken" / "metrics" / "metrics.csv").read_text() == metrics


# -- Refining ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_refining_trains_the_way_back_and_leaves_the_codes(kind, tmp_path):
    first = module(kind)
    first.save(tmp_path / "first")
    before = {name: value.clone() for name, value in first.tokenizer.state_dict().items()}
    second = module(kind, learning_rate=1e-2, refine=str(tmp_path / "first"))
    train(second)
    changed = {name.split(".")[1] for name, value in second.tokenizer.state_dict().items()
               if not torch.equal(before[name], value)}
    assert changed == {"from_latent", "decoder", "decoder_norm", "to_patch"}
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_a_codec_goes_on_from_a_finished_one_and_all_of_it_is_trained(kind, tmp_path):
    first = module(kind)
    train(first)
    first.save(tmp_path / "first")
    second = module(kind, learning_rate=1e-2, init_from=str(tmp_path / "first"))
    before = {name: value.clone() for name, value in second.tokenizer.state_dict().items()}
    assert all(torch.equal(value, before[name]) for name, value in first.tokenizer.state_dict().items())
    train(second)
    changed = {name.split(".")[1] for name, value in second.tokenizer.state_dict().items() if not torch.equal(before[name], value)}
    assert {"embed", "encoder", "to_latent", "decoder", "to_patch"} <= changed
    assert second.tokenizer.fingerprint != first.tokenizer.fingerprint
    other = "audio" if kind == "image" else "image"
    with pytest.raises(InputError, match=f"init_from: found a tokenizer for {kind}, expected one for {other}"):
        module(other, init_from=str(tmp_path / "first"))


def test_a_codec_grows_from_a_finished_one_and_learns_the_pitch(tmp_path):
    first = module("audio")
    first.save(tmp_path / "first")
    second = AudioCodecModule(replace(AUDIO, pitch=True), OptimizerConfig(learning_rate=1e-2), init_from=str(tmp_path / "first"))
    time = torch.arange(8192) / 16_000
    sound = 0.3 * torch.sin(2 * torch.pi * 440 * time)
    old, new = (m.tokenizer(m.tokenizer.spectrogram(sound[None])) for m in (first, second))
    assert torch.equal(old.codes, new.codes) and torch.allclose(old.output, new.output[..., :16], atol=1e-6)
    assert new.output[..., 16:].abs().max() == 0
    assert train(second)["val/wrong_pitch"] <= 1
    grown = second.tokenizer.network
    assert grown.embed.weight[:, 32:].abs().max() > 0 and grown.to_patch.weight[32:].abs().max() > 0


def test_what_is_larger_or_of_another_network_is_no_start(tmp_path):
    AudioCodecModule(replace(AUDIO, pitch=True)).save(tmp_path / "large")
    with pytest.raises(InputError, match=r"init_from: embed.weight has the shape \[16, 393\], expected \[16, 32\]"):
        module("audio", init_from=str(tmp_path / "large"))


def test_pitch_loss_of_the_codec_by_hand():
    codec = AudioCodecModule(replace(AUDIO, pitch=True), l1_weight=0.0, pitch_weight=2.0)
    media, output = torch.zeros(1, 4, 16 + PITCHES), torch.zeros(1, 4, 16 + PITCHES)
    media[0, 1, 16 + 100] = media[0, 2, 16 + 200] = 100.0   # a clear pitch in two frames of four
    output[0, 1, 16 + 100] = output[0, 2, 16 + 210] = 3.0
    output[..., :16] = 0.5
    rest = math.log(math.exp(3) + PITCHES - 1)
    assert abs(float(codec.loss(media, output)) - (0.25 + 2.0 * (rest - 3 + rest) / 2)) < 1e-4
    assert codec._pitch(media, output)[1:] == (1, 2)
    assert torch.equal(codec.shown(media), media[..., :16])


def test_weights_of_terms_are_in_range():
    with pytest.raises(InputError, match="model.l1_weight: found -1.0, expected 0 or more"):
        ImageCodecModule(l1_weight=-1.0)
    with pytest.raises(InputError, match="model.pitch_weight: found -1.0, expected 0 or more"):
        AudioCodecModule(pitch_weight=-1.0)
    with pytest.raises(InputError, match="perceptual.weight: found -1.0, expected 0 or more"):
        PerceptualConfig("torchvision.models.vgg16", [], weight=-1.0)


def test_what_is_refined_starts_from_nothing_else(tmp_path):
    for seed, name in enumerate(("one", "other")):
        torch.manual_seed(seed)
        AudioCodecModule(AUDIO).save(tmp_path / name)
    with pytest.raises(InputError, match="refine: found .*one with init_from .*other, .*expected one of them"):
        module("audio", refine=str(tmp_path / "one"), init_from=str(tmp_path / "other"))


def test_what_does_not_fit_cannot_be_refined(tmp_path):
    module("image").save(tmp_path / "image")
    with pytest.raises(InputError, match="refine: .*image holds a tokenizer for image .*expected audio"):
        module("audio", refine=str(tmp_path / "image"))
