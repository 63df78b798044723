"""Every figure of training, cards and benchmarks against its formula, on inputs small enough to follow."""

import importlib.util
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Trainer
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from mmtx.config import DecoderConfig
from mmtx.data.collection import DataSource
from mmtx.modality.audio import AudioConfig, AudioTokenizer
from mmtx.modality.autoencoder import NetworkConfig, Reconstruction
from mmtx.modality.image import ImageConfig
from mmtx.modality.vocoder import hertz, pitch_logits
from mmtx.training.codec import AudioCodecModule, ImageCodecModule, picture_quality
from mmtx.training.decoder import DecoderModule, LossWeights
from mmtx.training.decoder_data import DecoderData, TokenizerFolders
from mmtx.training.module import Means
from mmtx.training.vocoder import PUBLISHED, stft_distance, track

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
NETWORK = NetworkConfig(width=16, heads=1, encoder_depth=1, decoder_depth=1, levels=(4, 3, 3))
AUDIO = AudioConfig(mels=16, patch_mels=8, patch_frames=4, window=512, chunk=16, network=NETWORK)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# -- Pictures ------------------------------------------------------------------------------------------------


def ssim_by_hand(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004, of planes (H, W) in [0, 1]: a Gaussian window of 11 pixels, sigma 1.5, around each, mirrored edges."""
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    mean = lambda x: (np.lib.stride_tricks.sliding_window_view(x, (11, 11)) * window).sum((2, 3))
    a, b = (np.pad(x, 5, mode="reflect") for x in (a, b))
    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    c1, c2 = 0.01**2, 0.03**2
    return float(((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))).mean())


def test_ssim_and_psnr_are_of_intensities_from_0_to_1():
    wanted, noise = random(3, 3, 20, 23), random(3, 3, 20, 23, seed=1) - 0.5
    found = (wanted + 0.6 * noise * torch.tensor([0.1, 0.5, 1.0])[:, None, None, None]).clamp(0, 1)
    figures = picture_quality(wanted * 2 - 1, found * 2 - 1)
    by_hand = [[ssim_by_hand(f.double().numpy(), w.double().numpy()) for f, w in zip(*planes)] for planes in zip(found, wanted)]
    assert float(figures["ssim"]) == pytest.approx(np.mean(by_hand), abs=1e-6)
    decibels = [10 * math.log10(1 / float((f - w).square().mean())) for f, w in zip(found, wanted)]
    assert float(figures["psnr_db"]) == pytest.approx(np.mean(decibels), rel=1e-5)
    library = structural_similarity_index_measure(found, wanted, data_range=1.0)
    assert float(figures["ssim"]) == pytest.approx(float(library), abs=1e-6)
    library = peak_signal_noise_ratio(found, wanted, data_range=1.0, dim=(1, 2, 3), reduction="elementwise_mean")
    assert float(figures["psnr_db"]) == pytest.approx(float(library), rel=1e-5)


@pytest.mark.parametrize(("a", "b"), [(125, 130), (0, 255), (0, 0), (255, 255), (3, 250)])
def test_ssim_of_even_greys_is_its_luminance_term(a, b):
    one, other = (torch.full((1, 3, 16, 16), value / 127.5 - 1) for value in (a, b))
    x, y = a / 255, b / 255
    expected = (2 * x * y + 1e-4) / (x * x + y * y + 1e-4)
    assert float(picture_quality(one, other)["ssim"]) == pytest.approx(expected, abs=1e-6)
    psnr = 100 if a == b else 20 * math.log10(255 / abs(a - b))
    assert float(picture_quality(one, other)["psnr_db"]) == pytest.approx(psnr, rel=1e-5)


def test_loss_of_a_picture_codec_by_hand():
    module = ImageCodecModule(ImageConfig(patch=8, side=16, network=NETWORK), l1_weight=0.25)
    media, output = torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 16, 16)
    output[1] = 0.5
    assert float(module.loss(media, output)) == pytest.approx((0.25 + 0.25 * 0.5) / 2)
    sums = module.quality(media, Reconstruction(output, torch.zeros(2, 2, 2)))
    expected = {"loss": 0.375, "psnr_db": 100 + 20 * math.log10(4),
                "ssim": 1 + (2 * 0.5 * 0.75 + 1e-4) / (0.5**2 + 0.75**2 + 1e-4)}
    assert {name: float(total) for name, (total, _) in sums.items()} == {
        name: pytest.approx(value, rel=1e-6) for name, value in expected.items()}
    assert {count for _, count in sums.values()} == {2}


# -- Sounds --------------------------------------------------------------------------------------------------


def tone(pitch: float, seconds: float = 0.5, rate: int = 16_000) -> torch.Tensor:
    """Ten harmonics."""
    time = torch.arange(round(seconds * rate)) / rate
    return sum(0.2 / n * torch.sin(2 * torch.pi * n * pitch * time) for n in range(1, 11))


def test_decibels_of_mel_bands():
    tokenizer = AudioTokenizer(AUDIO)
    sound = torch.randn(8192, generator=torch.Generator().manual_seed(0))
    for ratio in (10, 2, 1.01):
        difference = tokenizer.log_mel(sound * ratio) - tokenizer.log_mel(sound)
        assert tokenizer.decibels(difference).numpy() == pytest.approx(20 * math.log10(ratio), abs=1e-3)


@pytest.mark.parametrize("pitch", [55.0, 110.0, 261.63, 440.0, 987.77, 1760.0])
def test_pitch_of_known_tones(pitch):
    frames = tone(pitch).unfold(-1, 2048, 1024)
    found = hertz(pitch_logits(frames, 16_000))
    assert (1200 * (found / pitch).log2()).abs().max() < 6  # the grid is of 5 cents
    cents, clarity = track(tone(pitch)[None], 16_000, 200)
    middle = slice(10, -10)
    assert (1200 * (hertz(pitch_logits(frames, 16_000))[0] / pitch).log2()).abs() < 6
    assert clarity[0, middle].min() > 0.9 and cents[0, middle].std() < 3


@pytest.mark.parametrize(("cents", "wrong"), [(0, 0), (40, 0), (-40, 0), (60, 1), (-60, 1), (1200, 1)])
def test_a_pitch_is_wrong_from_50_cents_on(cents, wrong):
    module = AudioCodecModule(replace(AUDIO, pitch=True))
    media, output = (torch.cat([torch.zeros(1, 4, 16), pitch_logits(tone(pitch).unfold(-1, 2048, 1500)[None, :4], 16_000)], -1)
                     for pitch in (440.0, 440.0 * 2 ** (cents / 1200)))
    found = module._pitch(media, output)
    assert (int(found.wrong), int(found.frames)) == (4 * wrong, 4)


def test_stft_distance_by_hand():
    sound, other = (torch.randn(2, 6000, generator=torch.Generator().manual_seed(n)) for n in range(2))

    def magnitudes(x, size, hop, window):
        hann = np.zeros(size)
        start = (size - window) // 2
        hann[start:start + window] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
        frames = np.lib.stride_tricks.sliding_window_view(np.pad(x, size // 2, mode="reflect"), size)[::hop]
        return np.sqrt(np.maximum(np.abs(np.fft.rfft(frames * hann)) ** 2, 1e-7))

    total = []
    for sizes in PUBLISHED:
        for found, true in zip(other.double().numpy(), sound.double().numpy()):
            found, true = magnitudes(found, *sizes), magnitudes(true, *sizes)
            total.append(np.linalg.norm(found - true) / np.linalg.norm(true) + np.abs(np.log(found / true)).mean())
    assert float(stft_distance(other, sound)) == pytest.approx(np.mean(total), rel=1e-4)
    assert stft_distance(sound, sound) == 0


# -- Losses of the decoder ---------------------------------------------------------------------------------------


def test_validation_losses_of_six_tokens_by_hand(tokenizers, tmp_path):
    tokenizers["text"].save(tmp_path / "text")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "qzkj"}) + "\n")
    sources = [DataSource([str(tmp_path / "rows.jsonl")])]
    config = DecoderConfig(width=32, depth=1, heads=2, kv_heads=1, head_dim=16, mlp_dim=32)
    module = DecoderModule(config, loss_weights=LossWeights(special=0.5, text=2.0))
    data = DecoderData(TokenizerFolders(str(tmp_path / "text")), sources, sources, tokens_per_batch=64, max_seq_len=64)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                      enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0)
    trainer.validate(module, data, verbose=False)
    v, ids = data.vocabulary, data.validation_documents.render([(0, 0)])[0].ids
    assert len(ids) == 6 and [v.kind(int(n)) for n in ids] == ["special", *["text"] * 4, "special"]
    with torch.no_grad():
        given = torch.tensor(ids[None], dtype=torch.long)
        scores = module.decoder.logits(module.decoder(given, torch.arange(6)[None]))[0]
    losses = [float(scores[n].logsumexp(0) - scores[n, ids[n + 1]]) for n in range(5)]
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert found == {
        "val/loss_text": pytest.approx(np.mean(losses[:4]), rel=1e-5), "val/loss_special": pytest.approx(losses[4], rel=1e-5),
        "val/loss": pytest.approx((2 * sum(losses[:4]) + 0.5 * losses[4]) / (2 * 4 + 0.5), rel=1e-5)}


def test_means_are_of_sums_and_leave_out_what_was_never_counted():
    means = Means()
    means.add("a", torch.tensor(6.0), torch.tensor(3))
    means.add("a", 1.0, 1)
    means.add("b", 0.0, 0)
    assert means.compute() == {"a": 7 / 4}


# -- Benchmarks --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def benchmark():
    """A script of benchmarks/ by name."""
    def load(name):
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield load
    for name in ("audio_quality", "image_quality"):
        sys.modules.pop(name, None)


def test_character_error_rate(benchmark):
    rate = benchmark("audio_quality").character_error_rate
    # kitten -> sitting: 3 of 7 characters; "Hello, World!" is right; nothing heard: 4 of 4.
    assert rate([("kitten", "sitting")]) == pytest.approx(3 / 7)
    assert rate([("hello world", "Hello, World!")]) == 0
    assert rate([("kitten", "sitting"), ("", "four"), ("hello", "hello")]) == pytest.approx((3 + 4 + 0) / (7 + 4 + 5))


def test_cents_of_notes(benchmark):
    audio = benchmark("audio_quality")
    assert audio.cents(880.0, 440.0) == pytest.approx(1200) and audio.cents(None, 440.0) is None
    assert [audio.near(cents) for cents in (0.0, 50.0, -50.0, 51.0, None)] == [True, True, True, False, False]


def test_quality_of_pictures_is_the_mean_over_pictures(benchmark, tokenizers):
    image, tokenizer = benchmark("image_quality"), tokenizers["image"]
    pictures = [(random(3, 16, 16, seed=n) * 255).to(torch.uint8) for n in range(3)]
    figures, codes = image.quality(tokenizer, pictures)
    pairs = [[(x.float() / 255).double().numpy() for x in (picture, tokenizer.decode(item))]
             for picture, item in zip(pictures, codes, strict=True)]
    assert figures["psnr_db"] == pytest.approx(np.mean([-10 * np.log10(((a - b) ** 2).mean()) for a, b in pairs]), rel=1e-4)
    assert figures["ssim"] == pytest.approx(
        np.mean([np.mean([ssim_by_hand(p, q) for p, q in zip(a, b)]) for a, b in pairs]), abs=1e-4)


def test_ranks_and_distances_of_what_was_generated(benchmark):
    generated = benchmark("generated")
    pictures = [np.random.default_rng(n).integers(0, 256, (3, generated.SIDE, generated.SIDE), np.uint8) for n in range(6)]
    names, mean = list("abcdef"), 0.0
    gallery = generated.Gallery(pictures, names, mean)
    ranks = gallery.ranks([pictures[2], pictures[2], pictures[5]], ["c", "a", "f"])
    looks = [generated.look(picture) for picture in pictures]
    cosine = [float(looks[2] @ x / np.linalg.norm(looks[2]) / np.linalg.norm(x)) for x in looks]
    assert ranks.tolist() == [1, 1 + sum(c > cosine[0] for c in cosine), 1]
    far = generated.distances("picture", pictures[:2], pictures[1:], [pictures[3]], lambda p: p.ravel() / 255)
    rms = [[np.sqrt(((a / 255 - b / 255) ** 2).mean()) for b in pictures[1:]] for a in pictures]
    assert far["picture: nearest to made"]["50 %"] == pytest.approx((min(rms[0]) + 0) / 2, abs=1e-4)
    second = [sorted(row)[1] for row in rms[1:]]
    assert far["picture: nearest to training"]["50 %"] == pytest.approx(np.median(second), abs=1e-4)
    assert generated.spread(list(range(10)), 4) == [0, 2, 5, 7] and generated.share(np.array([True, False]))["value"] == 0.5
