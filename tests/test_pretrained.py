"""Adapters for pretrained codecs, with small random configurations: their codes are those of transformers."""

import csv
import json

import numpy as np
import pytest
import torch
import yaml

transformers = pytest.importorskip("transformers")

from runs import FEW  # noqa: E402
from transformers import (  # noqa: E402
    ChameleonVQVAE,
    DacConfig,
    DacModel,
    Emu3VQVAE,
    EncodecConfig,
    EncodecModel,
    MimiConfig,
    MimiModel,
)
from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig  # noqa: E402
from transformers.models.emu3.configuration_emu3 import Emu3VQVAEConfig  # noqa: E402

import mmtx  # noqa: E402
from mmtx.cli import main  # noqa: E402
from mmtx.document import Document, MediaPart, Turn  # noqa: E402
from mmtx.errors import InputError  # noqa: E402
from mmtx.modality.base import load_tokenizer  # noqa: E402
from mmtx.modality.image import resize  # noqa: E402
from mmtx.modality.pretrained import PretrainedAudio, PretrainedImage  # noqa: E402
from mmtx.modality.text import TextTokenizer  # noqa: E402
from mmtx.sequence import render  # noqa: E402

SOUNDS, PICTURES = ("encodec", "dac", "mimi"), ("emu3", "chameleon")


def lively(network, spread=1.0):
    """Random codebooks, as wide as latents are, so that codes differ from place to place."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in network.state_dict().items():
        if name.endswith(("embed_sum", "codebook.embed", "embedding.weight", "codebook.weight")):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * spread)
    return network.eval()


def network(name: str):
    torch.manual_seed(0)
    if name == "encodec":
        return lively(EncodecModel(EncodecConfig(
            sampling_rate=800, target_bandwidths=[0.4, 1.6], num_filters=4, hidden_size=8, upsampling_ratios=[2, 2, 2],
            num_lstm_layers=1, codebook_size=16, codebook_dim=8)), spread=0.03)
    if name == "dac":
        return lively(DacModel(DacConfig(encoder_hidden_size=4, decoder_hidden_size=16, downsampling_ratios=[2, 4],
                                         n_codebooks=4, codebook_size=16, codebook_dim=4, sampling_rate=800)))
    if name == "mimi":
        return lively(MimiModel(MimiConfig(
            sampling_rate=800, num_filters=4, hidden_size=16, upsampling_ratios=[2, 2], codebook_size=16,
            codebook_dim=8, vector_quantization_hidden_dimension=8, num_quantizers=4, num_hidden_layers=1, intermediate_size=16,
            num_attention_heads=2, num_key_value_heads=2, upsample_groups=16)))
    if name == "emu3":
        return lively(Emu3VQVAE(Emu3VQVAEConfig(
            codebook_size=32, base_channels=32, channel_multiplier=[1, 1, 1], num_res_blocks=1, hidden_size=32,
            attn_resolutions=[2], temporal_downsample_factor=2)))
    return lively(ChameleonVQVAE(ChameleonVQVAEConfig(
        num_embeddings=32, embed_dim=8, latent_channels=8, resolution=32, base_channels=32,
        channel_multiplier=[1, 1, 1], num_res_blocks=1)), spread=0.01)


def picture(height=30, width=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return resize(torch.randint(0, 256, (3, 6, 9), generator=generator, dtype=torch.uint8), height, width)


def sound(samples=333, seed=0):
    return torch.randn(samples, generator=torch.Generator().manual_seed(seed)) * 0.3


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each codec as transformers saves it, and the size rules of the pictures."""
    root = tmp_path_factory.mktemp("pretrained")
    for name in (*SOUNDS, *PICTURES):
        network(name).save_pretrained(root / name)
    return root


def adapter(folders, name: str, **more):
    if name in SOUNDS:
        return PretrainedAudio.from_pretrained(folders / name, **{"codebooks": 3, **more})
    return PretrainedImage.from_pretrained(folders / name, **{"side": 32, "fit": "pad", **more})


@pytest.mark.parametrize("name", SOUNDS)
@pytest.mark.parametrize("samples", [1, 8, 16, 100, 333])
def test_sounds_of_any_length(folders, name, samples):
    tokenizer = adapter(folders, name)
    codes = tokenizer.encode(sound(samples))
    assert codes.shape == tokenizer.grid(sound(samples)) == (-(-samples // tokenizer.hop), 3)
    assert codes.dtype == np.int64 and tokenizer.size == 48 and tokenizer.bands == 3 and tokenizer.levels is None
    assert all((codes[:, band] // 16 == band).all() for band in range(3))
    decoded = tokenizer.decode(codes)
    assert decoded.shape == (len(codes) * tokenizer.hop,) and decoded.isfinite().all() and decoded.abs().max() <= 1


@pytest.mark.parametrize("name", SOUNDS)
def test_codes_and_sound_are_those_of_transformers(folders, name):
    tokenizer, original, waveform = adapter(folders, name, codebooks=4), network(name), sound(320)
    with torch.no_grad():
        found = original.encode(waveform[None, None], **({"bandwidth": 1.6} if name == "encodec" else {})).audio_codes
        found = found[0] if name == "encodec" else found
        heard = (original.decode(found[None], [None]) if name == "encodec" else original.decode(audio_codes=found))
    codes = tokenizer.encode(waveform)
    assert len(np.unique(codes)) > 8
    assert np.array_equal(codes % 16, found[0].T.numpy())
    heard = heard.audio_values.flatten().clamp(-1, 1)
    decoded = tokenizer.decode(codes)
    assert heard.abs().max() > 1e-4
    assert torch.allclose(decoded[:len(heard)], heard[:len(decoded)], atol=1e-5)
    # Fewer codebooks are the first ones.
    assert np.array_equal(adapter(folders, name, codebooks=2).encode(waveform), codes[:, :2])


def test_a_code_of_another_codebook_counts_as_its_entry(folders):
    tokenizer = adapter(folders, "dac")
    codes = tokenizer.encode(sound())
    assert torch.equal(tokenizer.decode(codes % 16), tokenizer.decode(codes))


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(folders, name):
    tokenizer = adapter(folders, name)
    codes = tokenizer.encode(picture())
    assert codes.shape == (8, 8) and codes.dtype == np.int64 and tokenizer.size == 32 and tokenizer.config.patch == 4
    assert len(np.unique(codes)) > 2
    free = adapter(folders, name, side=None)
    assert free.encode(picture(20, 40)).shape == free.grid(free.fit(picture(20, 40))) == (5, 10)


@pytest.mark.parametrize("name", PICTURES)
def test_codes_and_picture_are_those_of_transformers(folders, name):
    original, pixels = network(name), picture(32, 32)
    processor = {"emu3": (1 / 255, [0.5] * 3, [0.25] * 3), "chameleon": (0.0078, [1.0] * 3, [1.0] * 3)}[name]
    path = folders / name / "preprocessor_config.json"
    if name == "emu3":  # as the file says, and without one as transformers does
        path.write_text(json.dumps(dict(zip(("rescale_factor", "image_mean", "image_std"), processor))))
    tokenizer = adapter(folders, name)
    scale, mean, std = (torch.tensor(values).view(-1, 1, 1) for values in processor)
    batch = ((pixels * scale - mean) / std)[None]
    with torch.no_grad():
        if name == "emu3":
            found = original.encode(batch, image_sizes=torch.tensor([[32, 32]])).image_tokens[0]
            shown = (original.decode(found[None])[0] * std + mean) / scale
        else:
            found = original.encode(batch).image_tokens.view(8, 8)
    codes = tokenizer.encode(pixels)
    assert np.array_equal(codes, found.numpy())
    if name == "emu3":
        assert torch.equal(tokenizer.decode(codes), shown.round().clamp(0, 255).to(torch.uint8))
        path.unlink()
    else:
        with pytest.raises(InputError, match="Chameleon: found no decoder"):
            tokenizer.decode(codes)


@pytest.mark.parametrize("name", [*SOUNDS, *PICTURES])
def test_save_and_load_keep_codes_and_fingerprint(folders, name, tmp_path):
    tokenizer = adapter(folders, name)
    tokenizer.save(tmp_path / "codec")
    loaded = load_tokenizer(tmp_path / "codec")
    assert type(loaded) is type(tokenizer) and loaded.fingerprint == tokenizer.fingerprint
    medium = sound() if name in SOUNDS else picture()
    [encoding] = loaded.embed_batch([medium])
    assert np.array_equal(encoding.codes, tokenizer.encode(medium)) and encoding.features is None
    with torch.no_grad():
        next(loaded.network.parameters()).view(-1)[0] += 1e-3
    assert loaded.fingerprint != tokenizer.fingerprint
    (tmp_path / "codec" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="codec/model.safetensors: no such file"):
        load_tokenizer(tmp_path / "codec")


@pytest.mark.parametrize("edit, message", [
    (lambda c: c.update(codebooks="4"), "field 'codebooks' is '4', expected a whole number"),
    (lambda c: c.update(codebooks=10**9), "codebooks: found 1000000000, expected 1 to"),
    (lambda c: c.update(colour=1), "unknown field 'colour'"),
    (lambda c: c.pop("network"), "field 'network' does not name a codec"),
    (lambda c: c["network"].update(model_type=["dac"]), "field 'network' does not name a codec"),
    (lambda c: c["network"].update(model_type="bert"), "field 'network' does not name a codec"),
    (lambda c: c["network"].update(encoder_hidden_size=10**7), "model.safetensors: does not fit config.json"),
    (lambda c: c["network"].update(n_codebooks=10**9), "model.safetensors: does not fit config.json"),
    (lambda c: c["network"].update(downsampling_ratios="no"), "field 'network' makes no DacModel|does not fit"),
])
def test_settings_that_make_no_codec_are_named(folders, edit, message, tmp_path):
    adapter(folders, "dac").save(tmp_path / "codec")
    path = tmp_path / "codec" / "config.json"
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match=message) as error:
        load_tokenizer(tmp_path / "codec")
    assert "\n" not in str(error.value) and len(str(error.value).replace(str(tmp_path), "")) <= 300


@pytest.mark.parametrize("name", PICTURES)
def test_the_quantizer_of_a_whole_model_is_read_alone(folders, name, tmp_path):
    from safetensors.torch import save_file

    whole = {f"model.vqmodel.{key}": tensor.contiguous() for key, tensor in network(name).state_dict().items()}
    save_file({**whole, "model.layers.0.weight": torch.zeros(3)}, tmp_path / "model-00001-of-00001.safetensors")
    values = json.loads((folders / name / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": name, "vq_config": values}))
    found = PretrainedImage.from_pretrained(tmp_path, side=32)
    assert np.array_equal(found.encode(picture()), adapter(folders, name, fit="crop").encode(picture()))


@pytest.mark.parametrize(("sounds", "pictures"), [("encodec", "emu3"), ("dac", "chameleon"), ("mimi", "emu3")])
def test_a_decoder_trains_on_pretrained_codecs_and_keeps_a_copy(folders, tmp_path, sounds, pictures):
    """With three codebooks, which stand one behind another in each time step (flattened), coarse to fine, each with ids of its own."""
    texts = ["a red circle", "a blue square", "trumpet, C 4", "violin, D sharp 5"]
    TextTokenizer.train(texts, 300).save(tmp_path / "text")
    adapter(folders, pictures).save(tmp_path / "image")
    adapter(folders, sounds, codebooks=3).save(tmp_path / "audio")
    decoder = {"width": 32, "depth": 1, "heads": 2, "kv_heads": 1, "head_dim": 16, "mlp_dim": 32}
    config = {
        "output": str(tmp_path / "run"), "seed_everything": 0, "samples": 2,
        "model": {"class_path": "mmtx.training.decoder.DecoderModule",
                  "init_args": {"decoder": decoder, "continuous_inputs": True, "optimizer": {"learning_rate": 0.02, "warmup_steps": 0}}},
        "data": {"class_path": "mmtx.training.decoder_data.DecoderData", "init_args": {
            "tokenizers": {kind: str(tmp_path / kind) for kind in ("text", "image", "audio")},
            "train": FEW, "validation": FEW, "tokens_per_batch": 2048, "max_seq_len": 2047, "image_augmentation": None,
            "audio_augmentation": None}},
        "trainer": {"accelerator": "cpu", "max_steps": 6, "val_check_interval": 3, "check_val_every_n_epoch": None,
                    "log_every_n_steps": 1, "enable_progress_bar": False},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(tmp_path / "run.yaml")])
    for kind in ("image", "audio"):
        (tmp_path / kind / "model.safetensors").unlink()
    rows = list(csv.DictReader((tmp_path / "run" / "metrics" / "metrics.csv").open()))
    losses = [float(row["val/loss"]) for row in rows if row["val/loss"]]
    assert len(losses) == 2 and losses[1] < losses[0]

    model = mmtx.load(tmp_path / "run" / "model", device="cpu")
    v, audio = model.vocabulary, model.tokenizers["audio"]
    assert isinstance(model.tokenizers["image"], PretrainedImage) and v.levels("audio") is None and v.bands("audio") == 3
    assert isinstance(model.caption(picture(40, 40).permute(1, 2, 0).numpy(), max_new_tokens=2), str)
    heard = model.generate(["a red circle"], out="audio", max_new_tokens=12, temperature=1.0, seed=0)
    assert heard.rate == 800 and len(heard.samples) in {steps * audio.hop for steps in range(1, 5)}
    waveform = sound(100)
    document = Document((Turn(None, (MediaPart("audio", audio.encode(waveform)),)),))
    ids = render(document, v).ids[2:-2]  # between <bos> <audio> and </audio> <eos>
    codes = ids.reshape(-1, 3) - v.range("audio").start
    assert len(codes) == audio.grid(waveform)[0] and (codes // audio.entries == [0, 1, 2]).all()
    with torch.no_grad():  # of the original, its first three codebooks
        original = adapter(folders, sounds, codebooks=3).encode(waveform)
    assert np.array_equal(codes, original)
    assert np.array_equal(model.detokenize([v.bos, v.audio, *ids, v.audio_end, v.eos])[0].samples, audio.decode(original).numpy())


def test_mistakes_are_told(folders, tmp_path):
    with pytest.raises(InputError, match="codebooks: found 5, expected 1 to 4"):
        adapter(folders, "dac", codebooks=5)
    with pytest.raises(InputError, match="'model_type' is 'dac', expected one of chameleon_vqgan, emu3_vqgan"):
        PretrainedImage.from_pretrained(folders / "dac")
    with pytest.raises(InputError, match="config.json: no such file"):
        PretrainedAudio.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="expected one like encodec_24khz"):
        PretrainedAudio.wrap(EncodecModel(EncodecConfig(normalize=True, num_filters=4, hidden_size=8)), codebooks=1)
    tokenizer = adapter(folders, "dac")
    with pytest.raises(InputError, match="audio codes: found 0..48, expected 0..47"):
        tokenizer.decode(np.array([[0, 16, 48]]))
