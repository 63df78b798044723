"""MobileNets as encoders of sounds: what they compute, which patch has which feature, and how decoders begin with one."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import save_file

import mmtx
from mmtx.config import DecoderConfig, EncoderConfig, MobileNetConfig, SeparableLayer
from mmtx.errors import InputError
from mmtx.modality.audio import AudioConfig, AudioTokenizer
from mmtx.modality.encoder import PATCH_DROPOUT, SoundEncoder
from mmtx.modality.mobilenet import CHUNK, OFFSET, MobileNet, band_places
from mmtx.modality.pretrained_encoder import read_audio_encoder
from mmtx.training.decoder import DecoderModule
from mmtx.training.initial_decoder import pretrained_encoder

SHAPE = {"mels": 16, "low": 125.0, "high": 7500.0, "stem": 4,
         "layers": [{"channels": channels, "stride": stride} for channels, stride in ((6, 1), (8, 2), (10, 1), (12, 2))],
         "outputs": [1, 3]}
AUDIO = AudioConfig(mels=20, patch_mels=10, window=512)
PATCHES = EncoderConfig(20, 16, 1, 1, 8)


def config() -> MobileNetConfig:
    layers = tuple(SeparableLayer(**layer) for layer in SHAPE["layers"])
    return MobileNetConfig(16, 125.0, 7500.0, 4, layers, (1, 3), PATCHES, 2, 10, 0.0, 8000.0)


def random_encoder() -> SoundEncoder:
    torch.manual_seed(0)
    encoder = SoundEncoder(config()).eval()
    for weights, mean in ((encoder.network.gain, 3.0), (encoder.network.scale, 1.0), (encoder.network.shift, 0.0)):
        torch.nn.init.normal_(weights, mean)
    return encoder


def write(folder: Path, **values) -> Path:
    """The folder of a pretrained network."""
    folder.mkdir(exist_ok=True)
    network = random_encoder().network.state_dict()
    save_file({name: value.half() for name, value in network.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"kind": "mobilenet", **SHAPE, **values}))
    return folder


def patches(steps: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(steps * 2, 20, generator=torch.Generator().manual_seed(seed)) / 2


def test_features_are_those_of_plain_convolutions():
    """Computed by hand for one sound: TensorFlow's padding, ReLU after each convolution, means over the bands of a patch."""
    network, given = random_encoder().network, patches(7)
    mel = rearrange(given, "(t b) (f m) -> (t f) (b m)", t=7, f=2)
    x = network.spectrogram(mel[None])[:, None]                                                   # 14 frames of 16 bands

    def convolve(x, layer, stride, groups):
        missing = [max(0, (math.ceil(side / stride) - 1) * stride + 3 - side) for side in x.shape[:1:-1]]
        padding = [pad for each in missing for pad in (each // 2, each - each // 2)]
        return F.relu(F.conv2d(F.pad(x, padding), layer.weight, layer.bias, stride, groups=groups))

    x, found = convolve(x, network.stem, 2, 1), []
    for layer, sizes in zip(network.layers, config().layers):
        x = convolve(x, layer.mix, sizes.stride, x.shape[1])
        x = F.relu(F.conv2d(x, layer.project.weight, layer.project.bias))
        found.append(x)
    at = {1: [0, 0, 1, 1, 2, 2, 3], 3: [0, 0, 0, 0, 1, 1, 1]}                          # patches of two frames, strides of 4 and 8
    expected = []
    for index, places in at.items():
        expected.append(rearrange(found[index][0, :, places], "c t (b n) -> t b c n", b=2).mean(-1))
    with torch.no_grad():
        expected = torch.cat(expected, -1).flatten(0, 1) * network.scale + network.shift
        torch.testing.assert_close(network(given, [(7, 2)]), expected, rtol=1e-4, atol=1e-5)


def test_a_tone_is_in_the_band_around_its_frequency():
    """The spectrogram that the network sees has HTK's bands, whatever the tokenizer's are."""
    tokenizer = AudioTokenizer(AudioConfig(mels=80, window=1024))
    layers = tuple(SeparableLayer(**layer) for layer in SHAPE["layers"])
    network = MobileNet(MobileNetConfig(64, 125.0, 7500.0, 4, layers, (1, 3), EncoderConfig(80, 16, 1, 1, 8), 2, 40, 0.0, 8000.0))
    htk = lambda hertz: 2595 * math.log10(1 + hertz / 700)
    for hertz in (300, 700, 1500, 3000, 6000):
        tone = torch.sin(2 * math.pi * hertz * torch.arange(16_000) / 16_000) / 2
        seen = network.spectrogram(tokenizer.log_mel(tone)[None])[0]
        expected = (htk(hertz) - htk(125)) / (htk(7500) - htk(125)) * 65 - 1
        assert abs(seen[5:-5].mean(0).argmax() - expected) <= 1.5, hertz
    silent = network.spectrogram(tokenizer.log_mel(torch.zeros(16_000))[None])
    torch.testing.assert_close(silent, torch.full_like(silent, math.log(OFFSET)), rtol=0, atol=1e-3)
    places = band_places(64, 125.0, 7500.0, 80, 0.0, 8000.0)
    assert (places.diff() > 0).all() and places[0] >= 0 and places[-1] <= 79


def test_sounds_are_alike_in_any_company_and_longer_ones_in_pieces():
    encoder, grids = random_encoder(), [(5, 2), (8, 2), (5, 2), (1, 2), (2 * CHUNK + 40, 2)]
    given = [patches(steps, seed) for seed, (steps, _) in enumerate(grids)]
    with torch.no_grad():
        together = encoder(torch.cat(given), grids).split([len(each) for each in given])
        for each, grid, found in zip(given, grids, together):
            torch.testing.assert_close(found, encoder(each, [grid]), rtol=1e-4, atol=1e-5)
        pieces = [encoder.network(part, [(len(part) // 2, 2)]) for part in given[-1].split(2 * CHUNK)]
    torch.testing.assert_close(together[-1][:, 16:], torch.cat(pieces), rtol=1e-4, atol=1e-5)


def test_in_training_sounds_go_without_the_patch_encoder_at_times():
    """About so many as planned, always the same ones, whole; never when a model answers."""
    encoder, grids = random_encoder(), [(6, 2)] * 400
    given = torch.cat([patches(6, seed) for seed in range(400)])
    with torch.no_grad():
        plain, found, again = encoder(given, grids), encoder.train()(given, grids), encoder(given, grids)
    assert torch.equal(found, again) and torch.equal(found[:, 16:], plain[:, 16:])
    left_out = (found[:, :16] == 0).all(-1).view(400, 12)
    assert torch.equal(left_out.all(-1), left_out.any(-1))
    assert abs(left_out[:, 0].float().mean() - PATCH_DROPOUT) < 0.1
    torch.testing.assert_close(found[:, :16][~left_out.flatten()], plain[:, :16][~left_out.flatten()])


def test_what_is_no_encoder_of_sounds_is_one_clear_error(tmp_path):
    folder = write(tmp_path / "network")
    made = read_audio_encoder(folder, PATCHES, AUDIO)
    assert (made.config, made.config.width, made.config.patch) == (config(), 16 + 8 + 12, 20)
    assert {*made.weights} == {f"network.{name}" for name in random_encoder().network.state_dict()}
    with pytest.raises(InputError, match="found bands of 125 to 7500 Hz, expected no more than the spectrograms .* 0 to 4000 Hz"):
        read_audio_encoder(folder, PATCHES, replace(AUDIO, high=4000.0))
    for values, told in ({"outputs": [3, 1]}, r"outputs: found \[3, 1\]"), ({"outputs": [1]}, "that end with 3"), ({"mels": 0}, "mels: found 0"), \
            ({"low": 8000.0}, "high: found 7500.0"), ({"depth": 2}, "unknown field 'depth'"), ({"kind": "efficientnet"}, 'no "kind": "mobilenet"'):
        with pytest.raises(InputError, match=told):
            read_audio_encoder(write(folder, **values), PATCHES, AUDIO)
    with pytest.raises(InputError, match="model.safetensors: does not fit config.json"):
        read_audio_encoder(write(folder, stem=8), PATCHES, AUDIO)
    with pytest.raises(InputError, match=r"patches: found patches of 20 numbers, expected 3 \* 10 or more"):
        replace(config(), patch_frames=3)
    for name, value in (("audio_encoder", str(folder)), ("audio_encoder_lr", 1e-4)):
        with pytest.raises(InputError, match=f"{name}: found one with train_encoder: false"):
            DecoderModule(DecoderConfig(), **{name: value})


@pytest.mark.slow
def test_a_decoder_begins_with_it_and_answers_as_before(tmp_path):
    """From nothing; from a model without, whose answers do not change at first; and on from that without being told again."""
    folder, run = write(tmp_path / "network"), runs.prepare(tmp_path, steps=2)
    run["data"]["init_args"]["num_workers"] = 0
    options = run["model"]["init_args"]
    options |= {"continuous_inputs": True, "train_encoder": True, "optimizer": {"learning_rate": 0.0, "weight_decay": 0.0}}
    sound = np.sin(np.arange(8000) / 9).astype(np.float32) / 2

    def fit(name: str):
        assert runs.fit(run, tmp_path / name) == [0], (tmp_path / f"{name}.log").read_text()
        return mmtx.load(tmp_path / name / "model", "cpu")

    first = fit("first")
    options["audio_encoder"] = str(folder)
    new = fit("new")
    options["init_from"] = str(tmp_path / "first" / "model")
    second = fit("second")
    assert "joins the audio encoder of init_from" in (tmp_path / "second.log").read_text()
    network = {f"audio.{name}": value for name, value in read_audio_encoder(
        folder, first.decoder.config.encoders["audio"], first.tokenizers["audio"].config).weights.items()}
    for model in (new, second):
        found = model.decoder.encoders.state_dict()
        assert all(torch.allclose(found[name], value, atol=1e-6) for name, value in network.items())
        assert model.decoder.projections["audio"].weight.shape == (32, 16 + 8 + 12)
    codec = first.tokenizers["audio"].network.state_dict()
    own = new.decoder.encoders["audio"].patches
    assert all(torch.allclose(weight, codec[name], atol=1e-6) for name, weight in own.state_dict().items())
    texts = ["trumpet, C 4", "violin, D sharp 5"]
    before, after = (model.log_likelihood([mmtx.Sound(sound, 16_000)], texts) for model in (first, second))
    np.testing.assert_allclose(after, before, rtol=1e-4)
    assert not np.allclose(new.log_likelihood([mmtx.Sound(sound, 16_000)], texts), before, rtol=1e-4)
    projected = second.decoder.projections["audio"].weight
    assert not projected[:, 16:].any() and projected[:, :16].any()
    # Whoever trains on has it; another may take it over from there, and it has a learning rate of its own.
    del options["audio_encoder"]
    options["init_from"] = str(tmp_path / "new" / "model")
    options["audio_encoder_lr"] = 1e-2
    third = fit("third")
    start, moved = new.decoder.state_dict(), third.decoder.state_dict()
    changed = {name for name in start if not torch.allclose(start[name], moved[name], atol=1e-6)}
    assert changed and all(name.startswith("encoders.audio.network.") for name in changed)
    del options["init_from"], options["audio_encoder_lr"]
    options["audio_encoder"] = str(tmp_path / "third" / "model")
    fourth = fit("fourth").decoder.encoders.state_dict()
    assert all(torch.allclose(fourth[name], value, atol=1e-6) for name, value in third.decoder.encoders.state_dict().items()
               if name.startswith("audio."))
    # From a model of another audio tokenizer it takes the network alone.
    other = AudioTokenizer(replace(first.tokenizers["audio"].config, patch_frames=2))
    taken = pretrained_encoder(str(tmp_path / "third" / "model"), "audio", other)
    assert (taken.config.patches, taken.config.patch_frames) == (other.encoder_config, 2)
    assert {f"encoders.audio.{name}" for name in taken.weights} == {name for name in start if name.startswith("encoders.audio.network.")}
    assert all(torch.equal(weight, moved[f"encoders.audio.{name}"]) for name, weight in taken.weights.items())
    with pytest.raises(InputError, match="found bands of 125 to 7500 Hz"):
        pretrained_encoder(str(tmp_path / "third" / "model"), "audio", AudioTokenizer(replace(other.config, high=4000.0)))
    # It may merge its features, too.
    options |= {"audio_encoder": str(folder), "init_from": str(tmp_path / "first" / "model"), "merge_size": {"audio": (2, 1)}}
    merged = fit("merged").decoder.projections["audio"].weight.view(32, 2, 16 + 8 + 12)
    torch.testing.assert_close(merged[..., :16].sum(1), first.decoder.projections["audio"].weight, rtol=1e-3, atol=1e-4)
    assert not merged[..., 16:].any()
    options["audio_encoder"] = str(runs.STARTER)
    assert runs.fit(run, tmp_path / "none") == [2]
    assert "or an encoder of sounds alone" in (tmp_path / "none.log").read_text()
