"""Image and audio tokenizers with random weights: sizes, lengths, independence of pieces, files."""

import json
import shutil

import numpy as np
import pytest
import torch

from mmtx.errors import InputError
from mmtx.modality.audio import AudioConfig, AudioTokenizer
from mmtx.modality.autoencoder import NetworkConfig
from mmtx.modality.base import load_tokenizer
from mmtx.modality.image import ImageConfig, ImageTokenizer, join, to_float
from mmtx.modality.vocoder import PITCHES

NETWORK = NetworkConfig(width=16, heads=1, encoder_depth=1, decoder_depth=1, levels=(8, 5, 5))


def picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def noise(samples: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(samples, generator=torch.Generator().manual_seed(seed)) * 0.2


def image_tokenizer(side=16, fit="pad", patch=4, seed=0) -> ImageTokenizer:
    torch.manual_seed(seed)
    return ImageTokenizer(ImageConfig(patch=patch, side=side, fit=fit, network=NETWORK)).eval()


def audio_tokenizer(seed=0, **config) -> AudioTokenizer:
    torch.manual_seed(seed)
    sizes = {"mels": 16, "patch_mels": 8, "window": 512, "chunk": 4, **config}
    return AudioTokenizer(AudioConfig(network=NETWORK, **sizes)).eval()


# -- Pictures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "fit", "size", "grid"),
    [
        (16, "pad", (40, 9), (4, 4)),
        (16, "crop", (40, 9), (4, 4)),
        (16, "resize", (16, 16), (4, 4)),
        (16, "resize", (40, 21), (4, 2)),  # 16 x 8.4
        (16, "resize", (9, 40), (1, 4)),
        (16, "resize", (2000, 1), (4, 1)),  # never less than one patch
        (None, "pad", (20, 12), (5, 3)),
        (None, "pad", (21, 15), (5, 4)),  # 5.25 and 3.75 patches
        (None, "pad", (1, 1), (1, 1)),
        (None, "pad", (256, 8), (64, 2)),
        (None, "pad", (512, 64), (64, 8)),  # more than 64 patches: scaled down
        (None, "pad", (3, 900), (1, 64)),
        (16, "pad", (1, 300), (4, 4)),
        (16, "crop", (1, 300), (4, 4)),
    ],
)
def test_picture_sizes(side, fit, size, grid):
    tokenizer = image_tokenizer(side, fit)
    codes = tokenizer.encode(picture(*size))
    assert codes.shape == grid and codes.dtype == np.int64
    assert codes.min() >= 0 and codes.max() < tokenizer.size == 200
    decoded = tokenizer.decode(codes)
    assert decoded.shape == (3, 4 * grid[0], 4 * grid[1]) and decoded.dtype == torch.uint8


def test_pad_keeps_the_whole_picture_in_the_middle_of_white():
    original = picture(5, 8) // 2
    fitted = image_tokenizer(8).fit(original)
    assert torch.equal(fitted[:, 2:7], original)  # 3 rows too few: 2 above, 1 below
    assert (fitted[:, :2] == 255).all() and (fitted[:, 7:] == 255).all()
    fitted = image_tokenizer(8).fit(original.transpose(1, 2))
    assert torch.equal(fitted[:, :, 2:7], original.transpose(1, 2))


def test_crop_keeps_the_middle():
    original = picture(8, 13)
    assert torch.equal(image_tokenizer(8, "crop").fit(original), original[:, :, 2:10])
    assert torch.equal(image_tokenizer(8, "crop").fit(original.transpose(1, 2)), original.transpose(1, 2)[:, 2:10])


def test_crop_of_a_thread_needs_no_memory_for_what_is_cut_off():
    # Scaled to a short side of 256 before the cut this would be 256 x 25.6 million pixels.
    fitted = image_tokenizer(256, "crop").fit(torch.full((3, 1, 100_000), 7, dtype=torch.uint8))
    assert fitted.shape == (3, 256, 256) and (fitted == 7).all()


@pytest.mark.parametrize(("side", "fit"), [(16, "pad"), (16, "crop"), (16, "resize"), (None, "pad")])
def test_fit_changes_nothing_the_second_time(side, fit):
    tokenizer = image_tokenizer(side, fit)
    for size in ((37, 21), (300, 7), (4, 400)):
        once = tokenizer.fit(picture(*size))
        assert torch.equal(tokenizer.fit(once), once)


def test_a_picture_in_a_batch_of_mixed_sizes_gets_the_codes_it_gets_alone():
    tokenizer = image_tokenizer(None)
    pictures = [picture(8, 8, 1), picture(4, 16, 2), picture(8, 8, 3)]
    together = tokenizer.encode_batch(pictures)
    for alone, codes in zip(map(tokenizer.encode, pictures), together, strict=True):
        assert np.array_equal(alone, codes)


def test_patches_are_where_their_codes_are():
    tokenizer = image_tokenizer(None)
    pixels = to_float(picture(8, 12))
    grid = tokenizer._to_grid(pixels)
    assert grid.shape == (2, 3, 48)
    assert torch.equal(grid[1, 2], pixels[:, 4:8, 8:12].permute(1, 2, 0).flatten())
    assert torch.equal(tokenizer._to_pixels(grid), pixels)


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9, 15, 16, 17, 64])
def test_windows_keep_every_patch_once_and_away_from_their_edges(chunk, length):
    tokenizer = ImageTokenizer(ImageConfig(patch=4, chunk=chunk, side=None, network=NETWORK))
    windows = tokenizer.windows(length, 2)
    grid = torch.arange(length * 2).view(length, 2)
    assert torch.equal(join(windows, [grid[window.seen] for window in windows]), grid)
    counted = torch.zeros_like(grid)
    for window in windows:
        counted[window.kept] += 1
        seen, kept = window.seen[0], window.kept[0]
        assert seen.stop - seen.start == min(chunk, length)
        margin = 1 if chunk > 2 else 0
        assert kept.start == 0 or kept.start - seen.start >= margin
        assert kept.stop == length or seen.stop - kept.stop >= margin
    assert (counted == 1).all()


def test_a_large_picture_is_coded_window_by_window():
    tokenizer = image_tokenizer(None)
    for parameter in tokenizer.network.parameters():  # fresh attention is too weak to change a code
        torch.nn.init.normal_(parameter, std=0.3)
    large = picture(11 * 4, 4 * 4)  # chunks of 8 patches: rows 0 to 7 and 3 to 10, the cut lies at 5
    encoding = tokenizer.embed_batch([large])[0]
    top, bottom = tokenizer.embed_batch([large[:, :8 * 4], large[:, 3 * 4:]])
    assert np.array_equal(encoding.codes, np.concatenate([top.codes[:5], bottom.codes[2:]]))
    assert torch.allclose(encoding.features, torch.cat([top.features[:5], bottom.features[2:]]), atol=1e-4)
    decoded = tokenizer.decode(encoding.codes)
    top, bottom = tokenizer.decode(encoding.codes[:8]), tokenizer.decode(encoding.codes[3:])
    assert torch.equal(decoded, torch.cat([top[:, :20], bottom[:, 8:]], 1))


def test_a_tokenizer_at_another_size_shares_the_network_and_not_the_fingerprint(tmp_path):
    tokenizer = image_tokenizer(16)
    free, wide = tokenizer.at(None), tokenizer.at(128, "resize")
    assert free.network is wide.network is tokenizer.network and not free.training
    assert free.encode(picture(20, 12)).shape == (5, 3) and wide.encode(picture(20, 40)).shape == (16, 32)
    assert np.array_equal(free.encode(picture(16, 16)), tokenizer.encode(picture(16, 16)))
    assert len({tokenizer.fingerprint, free.fingerprint, wide.fingerprint}) == 3
    assert tokenizer.at(16).fingerprint == tokenizer.fingerprint
    wide.save(tmp_path / "wide")
    assert load_tokenizer(tmp_path / "wide").fingerprint == wide.fingerprint
    with pytest.raises(InputError, match="side: found 260"):
        tokenizer.at(260)


def test_forward_is_encode_then_decode():
    tokenizer = image_tokenizer()
    original = picture(16, 16)
    with torch.no_grad():
        output, codes = tokenizer(to_float(original)[None])
    assert np.array_equal(codes[0].numpy(), tokenizer.encode(original))
    pixels = ((output[0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(pixels, tokenizer.decode(codes[0].numpy()))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"patch": 0}, "patch: found 0"),
        ({"patch": 8, "side": 60}, "side: found 60, expected a multiple of patch=8"),
        ({"patch": 8, "side": 520}, "side: found 520.* up to 512"),
        ({"side": 0}, "side: found 0"),
        ({"fit": "stretch"}, "fit: found 'stretch'"),
    ],
)
def test_image_config_is_checked(config, message):
    with pytest.raises(InputError, match=message):
        ImageConfig(**config)


@pytest.mark.parametrize(("width", "heads"), [(30, 2), (16, 3), (16, 0)])
def test_network_config_is_checked(width, heads):
    with pytest.raises(InputError, match="network.(width|heads): found"):
        NetworkConfig(width=width, heads=heads)


# -- Sounds --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 100, 255, 256, 511, 512, 513, 2048, 2049, 7001])
def test_sounds_of_any_length(samples):
    tokenizer = audio_tokenizer()
    codes = tokenizer.encode(noise(samples))
    steps = -(-samples // 512)  # 2 frames of 256 samples
    assert codes.shape == (steps, 2) and codes.dtype == np.int64
    assert codes.min() >= 0 and codes.max() < tokenizer.size
    sound = tokenizer.decode(codes)
    assert sound.shape == (steps * 512,) and sound.isfinite().all() and sound.abs().max() <= 1


def test_a_sound_in_a_batch_gets_the_codes_it_gets_alone():
    tokenizer = audio_tokenizer()
    sounds = [noise(n, seed=n) for n in (300, 5000, 2048, 1)]
    together = tokenizer.encode_batch(sounds)
    for alone, codes in zip(map(tokenizer.encode, sounds), together, strict=True):
        assert np.array_equal(alone, codes)


def test_codes_of_a_chunk_do_not_depend_on_what_follows():
    tokenizer = audio_tokenizer()
    for parameter in tokenizer.network.encoder.parameters():  # fresh attention is too weak to change a code
        torch.nn.init.normal_(parameter, std=0.5)
    chunk = 4 * 512
    first, second = noise(3 * chunk, 1), noise(3 * chunk, 2)
    # The last frame is centred one hop before the end of the chunk and sees half a window beyond that.
    seen = chunk - 256 + 256
    mixed = torch.cat([first[:seen], second[seen:]])
    left, right = tokenizer.encode(first), tokenizer.encode(mixed)
    assert np.array_equal(left[:4], right[:4])
    assert not np.array_equal(left[4:8], right[4:8])
    assert np.array_equal(tokenizer.encode(first[:seen]), left[:4])


def test_decoding_in_chunks_is_decoding_each_chunk():
    tokenizer = audio_tokenizer()
    codes = np.random.default_rng(0).integers(0, tokenizer.size, (11, 2))
    whole = tokenizer.decode_spectrogram(codes)
    parts = [tokenizer.decode_spectrogram(codes[i:i + 4]) for i in (0, 4, 8)]
    assert whole.shape == (22, 16)
    assert torch.allclose(whole, torch.cat(parts), atol=1e-5)


def test_spectrogram_patches_are_where_their_codes_are():
    tokenizer = audio_tokenizer()
    mel = torch.arange(6 * 16).float().view(6, 16)
    grid = tokenizer._to_grid(mel)
    assert grid.shape == (3, 2, 16)
    assert torch.equal(grid[2, 1], mel[4:6, 8:16].flatten())
    assert torch.equal(tokenizer._to_mel(grid), mel)


def test_every_patch_says_the_pitch_of_its_time_step():
    tokenizer = AudioTokenizer(AudioConfig(mels=16, patch_mels=8, pitch=True, network=NETWORK))
    columns = torch.arange(6.0 * (16 + PITCHES)).view(6, 16 + PITCHES)
    grid = tokenizer._to_grid(columns)
    assert grid.shape == (3, 2, 16 + PITCHES)
    assert torch.equal(grid[2, 1, :16], columns[4:6, 8:16].flatten())
    assert torch.equal(grid[2, 0, 16:], columns[4:6, 16:].mean(0)) and torch.equal(grid[2, 0, 16:], grid[2, 1, 16:])
    back = tokenizer._to_mel(grid)
    assert torch.equal(back[:, :16], columns[:, :16])
    assert torch.equal(back[4, 16:], columns[4:6, 16:].mean(0)) and torch.equal(back[4, 16:], back[5, 16:])


def test_without_pitch_config_and_fingerprint_are_those_from_before_it(tmp_path):
    audio_tokenizer().save(tmp_path / "old")
    assert "pitch" not in json.loads((tmp_path / "old" / "config.json").read_text())
    made = AudioTokenizer(AudioConfig(mels=16, patch_mels=8, pitch=True, network=NETWORK))
    made.save(tmp_path / "new")
    loaded = load_tokenizer(tmp_path / "new")
    assert loaded.config.pitch and loaded.fingerprint == made.fingerprint
    assert not load_tokenizer(tmp_path / "old").config.pitch


def test_frames_are_centred_on_their_hop():
    tokenizer = audio_tokenizer()
    click = torch.zeros(4096)
    click[5 * 256] = 1.0
    mel = tokenizer.spectrogram(click).amax(-1)
    assert int(mel.argmax()) == 5
    silent = [i for i in range(len(mel)) if abs(i - 5) > 1]
    assert (mel[silent] == mel[0]).all() and mel[5] > mel[0] + 1


def test_spectrogram_of_a_full_scale_tone_is_in_range_and_silence_is_the_floor():
    tokenizer = AudioTokenizer(AudioConfig(network=NETWORK))
    time = torch.arange(16_000) / 16_000
    mel = tokenizer.spectrogram(0.7 * torch.sin(2 * torch.pi * 440 * time))
    assert mel.shape == (64, 80)
    silence = tokenizer.spectrogram(torch.zeros(16_000))
    assert silence.unique().numel() == 1 and mel.min() >= silence.min()
    assert 2.5 < mel.max() < 4
    assert tokenizer.decibels(mel.max() - silence.min()) > 60


def test_griffin_lim_keeps_the_pitch():
    tokenizer = AudioTokenizer(AudioConfig(network=NETWORK))
    time = torch.arange(16_000) / 16_000
    for pitch in (440, 1760):
        sound = tokenizer.waveform(tokenizer.spectrogram(0.7 * torch.sin(2 * torch.pi * pitch * time)))
        found = int(torch.fft.rfft(sound[:16_000]).abs().argmax())  # bins of 1 Hz
        assert found == pytest.approx(pitch, rel=0.05)  # less than a semitone; mel bands are as wide there
        assert sound[2000:14_000].square().mean().sqrt() == pytest.approx(0.7 / 2 ** 0.5, rel=0.4)


def test_griffin_lim_gives_the_same_sound_twice_and_leaves_the_seed_alone():
    tokenizer = audio_tokenizer()
    mel = tokenizer.spectrogram(noise(2048))
    torch.manual_seed(5)
    first, drawn = tokenizer.waveform(mel), torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    assert torch.equal(first, tokenizer.waveform(mel))


def test_decoded_sound_never_leaves_the_range():
    tokenizer = audio_tokenizer()
    torch.nn.init.constant_(tokenizer.network.to_patch.bias, 5.0)  # e ** 5.5: far over full scale
    sound = tokenizer.decode(np.zeros((4, 2), np.int64))
    assert sound.abs().max() == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"mels": 80, "patch_mels": 33}, "mels: found 80, expected a multiple of patch_mels=33"),
        ({"rate": 8_000}, "low, high: found 0.0, 8000.0, expected 0 <= low < high <= rate / 2 = 4000"),
        ({"low": 500.0, "high": 400.0}, "low, high: found 500.0, 400.0"),
        ({"window": 128}, "window: found 128, expected .* hop=256"),
        ({"window": 1023}, "window: found 1023, expected an even number"),
        ({"hop": 0}, "hop: found 0"),
        ({"chunk": 0}, "chunk: found 0"),
        ({"patch_frames": 0}, "patch_frames: found 0"),
        ({"patch_mels": 0}, "patch_mels: found 0"),
    ],
)
def test_audio_config_is_checked(config, message):
    with pytest.raises(InputError, match=message):
        AudioConfig(**config)


# -- Both ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["image", "audio"])
def codec(request):
    return image_tokenizer() if request.param == "image" else audio_tokenizer()


def medium(codec):
    return picture(20, 30) if codec.kind == "image" else noise(5000)


def test_save_and_load_keep_codes_and_fingerprint(codec, tmp_path):
    codec.save(tmp_path / "codec")
    loaded = load_tokenizer(tmp_path / "codec")
    assert type(loaded) is type(codec) and loaded.config == codec.config and not loaded.training
    assert loaded.fingerprint == codec.fingerprint
    codes = codec.encode(medium(codec))
    assert np.array_equal(loaded.encode(medium(codec)), codes)
    assert torch.equal(loaded.decode(codes), codec.decode(codes))
    assert [path.name for path in tmp_path.iterdir()] == ["codec"]  # nothing is left beside it


def test_the_weights_that_codes_depend_on_make_the_fingerprint(codec):
    before, changing = codec.fingerprint, set()
    for name, parameter in codec.network.named_parameters():
        old = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[-1] += 1e-3
        if codec.fingerprint != before:
            changing.add(name.split(".")[0])
        with torch.no_grad():
            parameter.copy_(old)
    assert changing == {"embed", "encoder", "encoder_norm", "to_latent"}
    assert codec.fingerprint == before


def test_config_changes_the_fingerprint():
    assert image_tokenizer(16, "pad").fingerprint != image_tokenizer(16, "crop").fingerprint
    assert audio_tokenizer(chunk=4).fingerprint != audio_tokenizer(chunk=8).fingerprint


def test_codes_out_of_range_are_refused(codec):
    for code in (-1, codec.size):
        with pytest.raises(InputError, match=f"{codec.kind} codes: found .*expected 0..199"):
            codec.decode(np.array([[0, code], [0, 0]]))


@pytest.mark.parametrize("codes, told", [
    (np.zeros((0, 2), int), r"found shape \(0, 2\), expected \(.*\) with at least one code"), (np.zeros(3, int), r"found shape \(3,\)"),
    (np.zeros((1, 2, 2), int), r"found shape \(1, 2, 2\)"), (np.array([[0.5, 1]]), "found float64, expected whole numbers"),
    (np.zeros((2, 2), bool), "found bool, expected whole numbers")])
def test_codes_of_another_shape_or_type_are_refused(codec, codes, told):
    with pytest.raises(InputError, match=f"{codec.kind} codes: {told}"):
        codec.decode(codes)
    if codec.bands:
        with pytest.raises(InputError, match=rf"found shape \(2, 3\), expected \(t, {codec.bands}\)"):
            codec.decode(np.zeros((2, 3), int))


@pytest.mark.parametrize("medium", [torch.rand(3, 20, 20), torch.zeros(20, 20, 3, dtype=torch.uint8), torch.zeros(1, 20, 20, dtype=torch.uint8),
                                    torch.zeros(3, 0, 20, dtype=torch.uint8), np.zeros((3, 20, 20), np.uint8), torch.zeros(2, 100),
                                    torch.zeros(100, dtype=torch.float64), torch.zeros(100, dtype=torch.int16), np.zeros(100, np.float32), None,
                                    torch.full((100,), torch.nan), torch.full((100,), torch.inf)])
def test_media_of_another_shape_or_type_are_refused(codec, medium):
    """A picture of floats from 0 to 1 would be taken for a black one."""
    with pytest.raises(InputError, match=f"{codec.kind}: found .*, expected a tensor .*, as mmtx.data.media.load_{codec.kind} returns it"):
        codec.encode(medium)


@pytest.mark.parametrize("damage", ["no weights", "cut weights", "other sizes", "unknown field", "no json", "no kind"])
def test_broken_folder(codec, damage, tmp_path):
    folder = tmp_path / "codec"
    codec.save(folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    values = json.loads(config.read_text())
    if damage == "no weights":
        weights.unlink()
    elif damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "other sizes":
        values["network"]["width"] = 32
    elif damage == "unknown field":
        values["colour"] = 3
    elif damage == "no kind":
        del values["kind"]
    config.write_text("{" if damage == "no json" else json.dumps(values))
    with pytest.raises(InputError, match="codec") as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)
    shutil.rmtree(folder)
    with pytest.raises(InputError, match="no such file"):
        load_tokenizer(folder)


def test_a_failed_save_leaves_the_old_folder(codec, tmp_path, monkeypatch):
    codec.save(tmp_path / "codec")
    before = codec.fingerprint
    monkeypatch.setattr(codec, "files", lambda: {"config.json": b"{}", "model.safetensors": None})
    with pytest.raises(TypeError):
        codec.save(tmp_path / "codec")
    assert load_tokenizer(tmp_path / "codec").fingerprint == before
    assert [path.name for path in tmp_path.iterdir()] == ["codec"]


def test_levels_make_the_size(codec):
    assert codec.levels == (8, 5, 5) and codec.size == 200


@pytest.mark.parametrize(("window", "hop", "steps"), [(1024, 256, 1), (1024, 100, 1), (1024, 1, 3), (512, 256, 1), (66, 64, 1)])
def test_the_shortest_sounds_are_heard_without_a_vocoder(window, hop, steps):
    """Also where they are shorter than half a window."""
    torch.manual_seed(0)
    config = AudioConfig(window=window, hop=hop, mels=16, patch_mels=8, chunk=8, network=NetworkConfig(
        width=16, heads=1, encoder_depth=1, decoder_depth=1, levels=(4, 3)))
    tokenizer = AudioTokenizer(config).eval()
    samples = tokenizer.decode(np.zeros((steps, tokenizer.bands), np.int64))
    assert samples.shape == (steps * config.patch_frames * hop,) and bool(samples.isfinite().all())
