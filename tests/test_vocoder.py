"""The vocoder: its sound, pitch and context; its place in an audio tokenizer's folder; coding in pieces; training."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from mmtx.cli import main
from mmtx.data.collection import DataSource, read_source
from mmtx.data.sample import Media
from mmtx.data.tokens import load_media
from mmtx.errors import InputError
from mmtx.modality.audio import AudioConfig, AudioTokenizer
from mmtx.modality.autoencoder import NetworkConfig
from mmtx.modality.base import load_tokenizer
from mmtx.modality.vocoder import CENTS, GRID, LOWEST, PITCHES, Vocoder, VocoderConfig, hertz
from mmtx.training.vocoder import pitch_loss, stft_distance, track

ROOT = Path(__file__).parents[1]
STARTER = ROOT / "demos" / "data" / "starter"
SOUNDS, SPEECH = str(STARTER / "sounds-test-unseen-notes.tar.gz"), str(STARTER / "speech-test.tar.gz")
NETWORK = NetworkConfig(width=16, heads=1, encoder_depth=1, decoder_depth=1, levels=(8, 5, 5))
SMALL = VocoderConfig(width=16, depth=2, kernel=3, expansion=2)
CHUNK = 8  # time steps


def lively(vocoder: Vocoder, seed: int = 0) -> Vocoder:
    """A vocoder whose every weight has a say in the sound: fresh ones start as an envelope and nothing else."""
    torch.manual_seed(seed)
    for parameter in vocoder.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.7 / parameter[0].numel() ** 0.5)
    return vocoder.eval()


def tokenizer(seed=0, vocoder: VocoderConfig | None = SMALL, **config) -> AudioTokenizer:
    torch.manual_seed(seed)
    sizes = {"mels": 16, "patch_mels": 8, "window": 512, "hop": 100, "chunk": CHUNK, **config}
    made = AudioTokenizer(AudioConfig(network=NETWORK, **sizes)).eval()
    for parameter in made.network.parameters():  # fresh attention is too weak to change a code
        torch.nn.init.normal_(parameter, std=0.3)
    if vocoder:
        made.vocoder = lively(made.new_vocoder(vocoder))
    return made


@pytest.fixture(scope="module")
def sounds() -> list[torch.Tensor]:
    """Two notes of 1.5 seconds and a sentence."""
    samples = read_source(DataSource([SOUNDS], limit=2)) + read_source(DataSource([SPEECH], limit=1))
    parts = [part for sample in samples for turn in sample.turns for part in turn.parts if isinstance(part, Media)]
    return [load_media(part, {"audio": tokenizer()}) for part in parts]


def pieces_of(whole, generator: np.random.Generator, longest: int) -> list:
    """Something cut along its first axis into pieces of random lengths, many of them tiny and some empty."""
    pieces, first = [], 0
    while first < len(whole):
        length = int(generator.choice([0, 1, 7, generator.integers(longest)]))
        pieces.append(whole[first:first + length])
        first += length
    return [*pieces, whole[len(whole):]]


def log_mel(frames: int, mels: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, frames, mels, generator=torch.Generator().manual_seed(seed)) - 3


# -- The network ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "hop", "window"), [(16_000, 200, 1024), (16_000, 256, 1024), (24_000, 300, 1200),
                                                     (24_000, 256, 1024), (16_000, 256, 512)])
@pytest.mark.parametrize("frames", [1, 2, 33])
def test_a_frame_gives_a_hop_of_samples(rate, hop, window, frames):
    made = tokenizer(rate=rate, hop=hop, window=window, high=rate / 2)
    mel = made.spectrogram(torch.randn(frames * hop) * 0.1)
    sound = made.waveform(mel)
    assert sound.shape == (len(mel) * hop,) and sound.isfinite().all() and sound.abs().max() > 0


def test_windows_that_do_not_overlap_are_refused():
    with pytest.raises(InputError, match=r"window: found 300, a vocoder expects at least 2 \* hop=400"):
        tokenizer(window=300, hop=200)


@pytest.mark.parametrize(("values", "message"), [({"width": 0}, "vocoder.width: found 0"), ({"depth": 0}, "depth"),
                                                 ({"kernel": 4}, "vocoder.kernel: found 4, expected an odd number")])
def test_config_is_checked(values, message):
    with pytest.raises(InputError, match=message):
        VocoderConfig(**values)


def test_the_shipped_size_is_small():
    vocoder = AudioTokenizer(AudioConfig(network=NETWORK)).new_vocoder(VocoderConfig())
    assert 4 * sum(parameter.numel() for parameter in vocoder.parameters()) <= 6e6


@pytest.mark.parametrize(("kernel", "depth", "hop"), [(3, 2, 100), (7, 3, 256), (1, 1, 200)])
def test_the_stated_context_is_enough_and_the_network_uses_what_is_in_it(kernel, depth, hop):
    vocoder = tokenizer(vocoder=VocoderConfig(width=16, depth=depth, kernel=kernel), hop=hop).vocoder
    context, middle = vocoder.context, 60
    before = log_mel(121)
    filters = vocoder.filters(before)
    reach = (depth + 1) * (kernel // 2)
    for distance, equal in ((reach, False), (reach + 1, True)):
        changed = before.clone()
        changed[:, :middle - distance + 1 - 1] = 0
        changed[:, middle + distance:] = 0
        same = torch.equal(vocoder.filters(changed).noise[:, middle], filters.noise[:, middle])
        assert same is equal or (same and not equal and reach == 0)
    # The sound of a frame, from a piece with `context` frames on either side: pitch and overlap included.
    whole = vocoder.sound(filters)
    first, last = middle - context, middle + context + 1
    piece = vocoder.sound(vocoder.filters(before[:, first:last]), first, context, whole.cycles[:, middle])
    heard = piece.waveform[0, context * hop:(context + 1) * hop]
    assert torch.allclose(heard, whole.waveform[0, middle * hop:(middle + 1) * hop], atol=1e-5)


def with_pitch(vocoder: Vocoder, frequency: float) -> Vocoder:
    """The vocoder as it is when fresh, but with a pitch for all frames, and no noise."""
    with torch.no_grad():
        for linear in (vocoder.to_pitch, vocoder.to_filters):
            linear.weight.zero_()
            linear.bias.zero_()
        place = 1200 / CENTS * np.log2(frequency / LOWEST)
        vocoder.to_pitch.bias[round(place)] = 50.0
        vocoder.to_filters.bias[-vocoder.noise.shape[1]:] = -10.0
    return vocoder


@pytest.mark.parametrize("frequency", [65.4, 261.6, 440.0, 1975.5])
def test_a_held_pitch_is_heard_and_not_the_hop(frequency):
    # A network that looks at a few frames would repeat with the hop, 80 Hz: 261.6 Hz would come out as 240.
    made = tokenizer(mels=80, patch_mels=40, window=1024, hop=200, vocoder=None)
    vocoder = with_pitch(made.new_vocoder(SMALL), frequency)
    with torch.no_grad():
        sound = vocoder(torch.full((1, 160, 80), -2.0))
    cents, clarity = track(sound[:, 4000:-4000], made.rate, 200)
    found = LOWEST * 2 ** (cents.median().item() / 1200)
    assert abs(1200 * np.log2(found / frequency)) < 20 and clarity.median() > 0.9


@pytest.mark.parametrize("frequency", [65.4, 261.6, 440.0])
def test_the_pitch_that_a_spectrogram_brings_is_heard(frequency):
    made = tokenizer(mels=80, patch_mels=40, window=1024, hop=200, pitch=True, vocoder=None)
    time = torch.arange(32_000) / 16_000
    tone = sum(torch.sin(2 * torch.pi * frequency * h * time) / h for h in range(1, 5))
    vocoder = with_pitch(made.new_vocoder(SMALL), LOWEST)
    vocoder.to_pitch.bias.data.zero_()
    spectrogram = made.to_log(made.spectrogram(0.2 * tone))
    with torch.no_grad():
        cents, clarity = track(vocoder(spectrogram[None])[:, 4000:-4000], made.rate, 200)
    found = LOWEST * 2 ** (cents.median().item() / 1200)
    assert abs(1200 * np.log2(found / frequency)) < 20 and clarity.median() > 0.9


def test_the_pitch_of_a_spectrogram_is_that_of_the_sound_and_none_in_noise():
    made = tokenizer(mels=80, patch_mels=40, window=1024, hop=200, pitch=True)
    time = torch.arange(16_000) / 16_000
    tone = 0.3 * torch.sin(2 * torch.pi * 233.1 * time)
    spectrogram = made.spectrogram(tone)
    assert spectrogram.shape == (80, 80 + PITCHES) and torch.equal(made.mel_part(spectrogram), made.log_mel(tone))
    cents = 1200 * (hertz(spectrogram[10:-10, 80:]) / 233.1).log2()
    assert cents.abs().max() < 10 and spectrogram[10:-10, 80:].amax(-1).min() > 8
    noise = torch.randn(16_000, generator=torch.Generator().manual_seed(0))
    assert made.spectrogram(noise)[:, 80:].abs().max() == made.spectrogram(torch.zeros(800))[:, 80:].abs().max() == 0


def test_fresh_filters_keep_the_envelope(sounds):
    made = tokenizer(mels=80, patch_mels=40, window=1024, hop=200, vocoder=None)
    vocoder = made.new_vocoder(VocoderConfig())
    for sound in sounds:
        mel = made.spectrogram(sound)
        with torch.no_grad():
            heard = made.spectrogram(vocoder(made.to_log(mel)[None])[0])
        silence = torch.full_like(mel, float(mel.min()))
        assert (heard - mel).abs().mean() < 0.5 * (silence - mel).abs().mean()


def test_gradients_reach_every_weight():
    vocoder = tokenizer().vocoder.train()
    filters = vocoder.filters(log_mel(20))
    loss = vocoder.sound(filters).waveform.square().sum() + filters.pitch.logsumexp(-1).sum()
    loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in vocoder.parameters())


def test_hertz_is_on_the_grid_between_bins():
    logits = torch.full((3, PITCHES), -20.0)
    logits[0, 0] = logits[1, PITCHES - 1] = 20.0
    logits[2, 100] = logits[2, 101] = 20.0
    cents = 1200 * torch.log2(hertz(logits) / LOWEST)
    between = 100.5 * CENTS
    assert cents[0].item() == pytest.approx(0, abs=0.1) and cents[1].item() == pytest.approx(9000, abs=0.1)
    assert abs(cents[2].item() - between) <= GRID / 2 + 0.1
    assert (cents / GRID - (cents / GRID).round()).abs().max() < 0.01


# -- In the tokenizer ----------------------------------------------------------------------------------------


def test_a_vocoder_is_saved_and_changes_no_fingerprint(tmp_path):
    plain = tokenizer(vocoder=None)
    plain.save(tmp_path / "plain")
    made = load_tokenizer(tmp_path / "plain")
    assert made.vocoder is None
    made.vocoder = lively(made.new_vocoder(SMALL))
    made.save(tmp_path / "both")
    assert {path.name for path in (tmp_path / "both").iterdir()} == {"config.json", "model.safetensors",
                                                                     "vocoder.safetensors"}
    loaded = load_tokenizer(tmp_path / "both")
    assert loaded.fingerprint == made.fingerprint == plain.fingerprint
    assert loaded.vocoder.config == SMALL and not loaded.vocoder.training and loaded.files() == made.files()
    codes = np.random.default_rng(0).integers(0, made.size, (20, 2))
    assert torch.equal(loaded.decode(codes), made.decode(codes))
    assert not torch.allclose(loaded.decode(codes), plain.decode(codes), atol=1e-3)


def test_the_fingerprint_still_covers_network_and_config(tmp_path):
    made = tokenizer()
    before = made.fingerprint
    assert tokenizer(chunk=CHUNK + 1).fingerprint != before
    with torch.no_grad():
        made.network.embed.weight[0, 0] += 1e-3
    assert made.fingerprint != before


def test_a_null_vocoder_and_a_folder_without_the_key_load(tmp_path):
    tokenizer(vocoder=None).save(tmp_path / "audio")
    path = tmp_path / "audio" / "config.json"
    values = json.loads(path.read_text())
    for more in ({}, {"vocoder": None}):
        path.write_text(json.dumps({**values, **more}))
        assert load_tokenizer(tmp_path / "audio").vocoder is None


@pytest.mark.parametrize("damage", ["missing", "cut", "wrong width", "unknown field"])
def test_a_damaged_vocoder_is_one_line(tmp_path, damage):
    tokenizer().save(tmp_path / "audio")
    weights, config = tmp_path / "audio" / "vocoder.safetensors", tmp_path / "audio" / "config.json"
    values = json.loads(config.read_text())
    if damage == "missing":
        weights.unlink()
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-5])
    else:
        values["vocoder"]["width" if damage == "wrong width" else "color"] = 32
    config.write_text(json.dumps(values))
    with pytest.raises(InputError, match=f"audio/{'config.json' if damage == 'unknown field' else 'vocoder.safetensors'}: ") as caught:
        load_tokenizer(tmp_path / "audio")
    assert "\n" not in str(caught.value)


# -- In pieces -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hop", "window", "pitch"), [(100, 512, False), (256, 512, False), (200, 1024, False),
                                                      (200, 1024, True)])
def test_encoding_in_pieces_is_encoding_in_one_go(sounds, hop, window, pitch):
    made = tokenizer(hop=hop, window=window, pitch=pitch)
    step, generator = hop * 2, np.random.default_rng(hop)
    lengths = [1, hop - 1, step, CHUNK * step, CHUNK * step + 1, 2 * CHUNK * step + window // 2 - hop, None]
    for sound in sounds:
        for length in lengths:
            whole = made.encode(sound[:length])
            pieces = pieces_of(sound[:length], generator, 3 * CHUNK * step)
            assert np.array_equal(np.concatenate([*made.encode_stream(iter(pieces))]), whole)


def test_an_empty_sound_in_pieces_is_that_in_one_go():
    made, nothing = tokenizer(), torch.zeros(0)
    whole = made.encode(nothing)
    for pieces in ([], [nothing], [nothing, nothing]):
        assert np.array_equal(np.concatenate([*made.encode_stream(pieces)]), whole)


def test_codes_come_as_soon_as_their_samples_are_there(sounds):
    made = tokenizer()
    seen = CHUNK * 200 + 256 - 100  # a chunk, half a window, less a hop
    heard = []

    def microphone():
        for sample in sounds[0]:
            heard.append(sample)
            yield sample[None]

    codes = next(made.encode_stream(microphone()))
    assert len(heard) == seen and np.array_equal(codes, made.encode(sounds[0])[:CHUNK])


@pytest.mark.parametrize(("seed", "pitch"), [(0, False), (1, False), (2, False), (1, True)])
def test_decoding_in_pieces_is_decoding_in_one_go(sounds, seed, pitch, monkeypatch):
    # Small passes, so that the whole, too, is decoded over borders.
    monkeypatch.setattr("mmtx.modality.vocoder.AT_ONCE", (1024, 10, 3)[seed])
    made = tokenizer(seed, pitch=pitch)
    for sound in sounds:
        codes = made.encode(sound)
        whole = made.decode(codes)
        pieces = pieces_of(codes, np.random.default_rng(seed), 3 * CHUNK)
        streamed = torch.cat([*made.decode_stream(iter(pieces))])
        assert streamed.shape == whole.shape
        assert (streamed - whole).abs().max() < 1e-5


def test_one_pass_over_everything_equals_passes_over_parts(sounds, monkeypatch):
    made = tokenizer()
    mel = torch.cat([made.to_log(made.spectrogram(sound)) for sound in sounds])
    whole = made.vocoder(mel[None])[0].detach()
    monkeypatch.setattr("mmtx.modality.vocoder.AT_ONCE", 17)
    parts = torch.cat([*made.vocoder.stream([mel])])
    assert (parts - whole).abs().max() < 1e-5 * max(1, float(whole.abs().max()))


def test_sound_comes_before_the_codes_end_and_memory_is_bounded(monkeypatch):
    made = tokenizer()
    longest, run = [], made.vocoder.filters
    monkeypatch.setattr(made.vocoder, "filters", lambda mel: (longest.append(mel.shape[1]), run(mel))[1])
    given = []

    def codes():
        for k in range(400):
            given.append(k)
            yield np.full((1, 2), k % made.size)

    stream = made.decode_stream(codes())
    next(stream)
    assert len(given) <= 3 * CHUNK + made.vocoder.context
    rest = sum(map(len, stream))
    assert rest > 390 * 200 and max(longest) <= 2 * CHUNK + 3 * made.vocoder.context


def test_nothing_in_pieces_gives_no_sound():
    assert [*tokenizer().decode_stream([])] == [*tokenizer().decode_stream([np.zeros((0, 2), np.int64)])] == []


def test_decoding_in_pieces_without_a_vocoder_says_what_is_missing():
    with pytest.raises(InputError, match="found no vocoder"):
        next(tokenizer(vocoder=None).decode_stream([np.zeros((1, 2), np.int64)]))


# -- Training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frequency", [30.0, 65.4, 262.0, 440.0, 1760.0])
@pytest.mark.parametrize(("rate", "hop"), [(16_000, 200), (24_000, 300)])
def test_the_tracker_finds_harmonic_tones(frequency, rate, hop):
    time = torch.arange(rate) / rate
    tone = sum(torch.sin(2 * torch.pi * frequency * h * time) / h for h in range(1, 5))
    cents, clarity = track(0.3 * tone[None], rate, hop)
    assert cents.shape == clarity.shape == (1, rate // hop)
    found = LOWEST * 2 ** (cents.median().item() / 1200)
    assert abs(1200 * np.log2(found / frequency)) < 10 and clarity.median() > 0.95


def test_the_tracker_is_finite_and_unsure_without_a_tone():
    noise = torch.randn(1, 16_000, generator=torch.Generator().manual_seed(0))
    for sound in (noise, torch.zeros(1, 16_000), torch.ones(1, 16_000)):
        cents, clarity = track(sound, 16_000, 200)
        assert cents.isfinite().all() and clarity.isfinite().all()
    assert track(noise, 16_000, 200)[1].median() < 0.5 and track(torch.zeros(1, 16_000), 16_000, 200)[1].max() == 0


def test_pitch_loss_is_least_at_the_true_pitch():
    cents = torch.tensor([[1010.0, 3000.0]])
    losses = []
    for shift in (0, 1, 5):
        logits = torch.zeros(1, 2, PITCHES)
        for frame, value in enumerate(cents[0]):
            logits[0, frame, round(value.item() / CENTS) + shift] = 8.0
        losses.append(float(pitch_loss(logits, cents, torch.tensor([[True, True]]))))
    assert losses[0] < losses[1] <= losses[2]
    assert pitch_loss(logits, cents, torch.tensor([[False, False]])) == 0


def test_stft_distance_against_the_formula():
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(2, 4000, generator=generator)
    assert stft_distance(true, true) == 0
    # Half the amplitude: convergence is a half, and every log magnitude is off by log 2.
    assert stft_distance(0.5 * true, true).item() == pytest.approx(0.5 + np.log(2), rel=1e-3)


def test_fit_trains_the_vocoder_and_leaves_the_codec_alone(tmp_path):
    tokenizer(vocoder=None).save(tmp_path / "codec")
    source = [{"paths": [SOUNDS], "limit": 3}, {"paths": [SPEECH], "limit": 1}]
    config = {
        "output": str(tmp_path / "run"), "seed_everything": 0, "samples": 0,
        "model": {"class_path": "mmtx.training.vocoder.VocoderModule", "init_args": {
            "tokenizer": str(tmp_path / "codec"), "vocoder": {"width": 16, "depth": 1}}},
        "data": {"class_path": "mmtx.training.vocoder.VocoderData", "init_args": {
            "train": source, "validation": source, "batch_size": 4, "steps": CHUNK, "audio_augmentation": {}}},
        "trainer": {"accelerator": "cpu", "max_steps": 2, "val_check_interval": 1, "check_val_every_n_epoch": None,
                    "log_every_n_steps": 1, "enable_progress_bar": False, "gradient_clip_val": 1.0},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(tmp_path / "config.yaml")])
    before, after = load_tokenizer(tmp_path / "codec"), load_tokenizer(tmp_path / "run" / "model")
    assert after.fingerprint == before.fingerprint
    torch.manual_seed(0)
    moved = [not torch.equal(a, b) for a, b in zip(
        after.vocoder.parameters(), before.new_vocoder(after.vocoder.config).parameters(), strict=True)]
    assert all(moved)
    header, *rows = (tmp_path / "run" / "metrics" / "metrics.csv").read_text().splitlines()
    columns = header.split(",")
    of = {name: [row.split(",")[columns.index(name)] for row in rows] for name in columns}
    fallback = {value for value in of["val/griffin_lim_stft_distance"] if value}
    assert len(fallback) == 1 and float(fallback.pop()) > 0.5
    assert len([value for value in of["val/stft_distance"] if value]) == 2


def test_a_vocoder_starts_from_a_finished_one(tmp_path):
    from mmtx.training.vocoder import VocoderModule

    tokenizer(seed=1).save(tmp_path / "finished")
    tokenizer(vocoder=None).save(tmp_path / "codec")
    module = VocoderModule(str(tmp_path / "codec"), SMALL, init_from=str(tmp_path / "finished"))
    given, taken = load_tokenizer(tmp_path / "finished").vocoder, module.tokenizer.vocoder
    assert all(torch.equal(a, b) for a, b in zip(given.parameters(), taken.parameters(), strict=True))
    with pytest.raises(InputError, match="init_from: .*codec has no vocoder"):
        VocoderModule(str(tmp_path / "codec"), SMALL, init_from=str(tmp_path / "codec"))
    with pytest.raises(InputError, match="init_from: .*finished has .*width=16.*, expected .*width=32"):
        VocoderModule(str(tmp_path / "codec"), VocoderConfig(width=32), init_from=str(tmp_path / "finished"))


def test_shares_weights_and_cuts_of_the_vocoder_are_in_range(tmp_path):
    from mmtx.training.vocoder import VocoderData, VocoderModule

    tokenizer(vocoder=None).save(tmp_path / "codec")
    for name in ("clean_prob", "mel_weight", "pitch_weight"):
        with pytest.raises(InputError, match=f"model.{name}: found -1.0, expected 0 or more"):
            VocoderModule(str(tmp_path / "codec"), SMALL, **{name: -1.0})
    data = VocoderData([], [], steps=CHUNK + 1)
    with pytest.raises(InputError, match=f"data.steps: found {CHUNK + 1}, expected 1 or more, and {CHUNK} at most"):
        data.attach(VocoderModule(str(tmp_path / "codec"), SMALL), steps=1)


def test_another_kind_of_tokenizer_is_refused():
    from mmtx.training.vocoder import VocoderModule

    with pytest.raises(InputError, match="tokenizers/text is of kind 'text', expected 'audio'"):
        VocoderModule(str(ROOT / "tokenizers" / "text"))
