"""Encoders that a decoder trains along: as the codec's at first, alike in any company, and saved with the decoder."""

import json
from dataclasses import replace

import numpy as np
import pytest
import runs
import torch

import mmtx
from mmtx.config import CodeRange, DecoderConfig, EncoderConfig
from mmtx.data.collection import DataSource, read_sources
from mmtx.data.documents import Documents
from mmtx.data.packing import PackedBatches
from mmtx.data.prepare import prepare
from mmtx.data.tokens import Augmentation, encode_samples, load_sample, to_documents
from mmtx.errors import InputError
from mmtx.inference.sampling import Sampling
from mmtx.modality.base import load_tokenizer
from mmtx.modality.encoder import GridEncoder, build_encoder
from mmtx.model import Decoder
from mmtx.pipeline import Model
from mmtx.sequence import gather_features, render
from mmtx.training.decoder import DecoderModule
from mmtx.vocabulary import Vocabulary

KINDS = ("image", "audio")
SHORT = Sampling(max_new_tokens=8)


def media(kind: str) -> list[torch.Tensor]:
    """Pictures and sounds of several sizes, some larger than what the encoder sees at once."""
    generator = torch.Generator().manual_seed(0)
    if kind == "image":
        return [torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8) for size in ((16, 16), (24, 16), (16, 16), (80, 72))]
    return [torch.randn(samples, generator=generator) / 4 for samples in (500, 4000, 3800, 4000, 20_000)]


def copy_of(codec) -> GridEncoder:
    encoder = GridEncoder(codec.encoder_config)
    weights = codec.network.state_dict()
    encoder.load_state_dict({name: weights[name] for name in encoder.state_dict()})
    return encoder


def decoder(tokenizers, vocabulary, encoders: bool) -> Decoder:
    """A random decoder that takes features, or that makes them itself."""
    codecs = {kind: tokenizers[kind] for kind in KINDS}
    config = DecoderConfig(
        vocabulary.size, width=32, depth=2, heads=4, kv_heads=2, head_dim=16, mlp_dim=64,
        composed=tuple(CodeRange(vocabulary.range(kind).start, vocabulary.levels(kind)) for kind in KINDS),
        features={kind: codec.feature_width for kind, codec in codecs.items()},
        encoders={kind: codec.encoder_config for kind, codec in codecs.items()} if encoders else {})
    torch.manual_seed(0)
    made = Decoder(config, build_encoder)
    if encoders:
        made.load_state_dict({**made.state_dict(), **decoder(tokenizers, vocabulary, False).state_dict(),
                              **{f"encoders.{kind}.{name}": value for kind in KINDS
                                 for name, value in copy_of(codecs[kind]).state_dict().items()}})
    return made.eval()


@pytest.fixture(scope="module")
def samples():
    return read_sources([DataSource(source["paths"], limit=5) for source in runs.FEW], 0.0).samples


@pytest.fixture(scope="module")
def model(tokenizers, vocabulary):
    return Model(decoder(tokenizers, vocabulary, True), vocabulary, tokenizers).to("cpu")


def test_a_decoder_with_encoders_is_told_what_makes_them():
    with pytest.raises(TypeError, match="build_encoder"):
        Decoder(DecoderConfig(300, features={"image": 32}, encoders={"image": EncoderConfig(192, 32, 2, 1, 8)}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_makes_the_features_of_the_codec_of_its_patches(kind, tokenizers):
    codec = tokenizers[kind].at(None) if kind == "image" else tokenizers[kind]
    whole = [medium for medium in media(kind) if kind == "image" or len(medium) < 16_000]  # sounds of a chunk
    features, patches = codec.embed_batch(whole), codec.embed_batch(whole, True)
    assert all(np.array_equal(a.codes, b.codes) for a, b in zip(features, patches, strict=True))
    grids = [encoding.codes.shape for encoding in patches]
    found = copy_of(codec)(torch.cat([encoding.features.flatten(0, 1) for encoding in patches]).float(), grids)
    expected = torch.cat([encoding.features.flatten(0, 1) for encoding in features]).float()
    assert torch.allclose(found, expected, atol=0.02)  # both were rounded to float16
    assert expected.std() > 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_a_grid_is_encoded_alone_as_among_others(kind, tokenizers):
    codec = tokenizers[kind].at(None) if kind == "image" else tokenizers[kind]
    encoder = copy_of(codec)
    encodings = codec.embed_batch(media(kind), True)
    assert max(max(encoding.codes.shape) for encoding in encodings) > encoder.chunk
    values = [encoding.features.flatten(0, 1).float() for encoding in encodings]
    grids = [encoding.codes.shape for encoding in encodings]
    together = encoder(torch.cat(values), grids).split([len(value) for value in values])
    for value, grid, found in zip(values, grids, together, strict=True):
        assert torch.allclose(encoder(value, [grid]), found, atol=1e-5)


def test_a_decoder_begins_as_one_that_takes_features(samples, tokenizers, vocabulary):
    with_encoders, without = (decoder(tokenizers, vocabulary, encoders) for encoders in (True, False))
    hidden = []
    for made, patches in ((with_encoders, KINDS), (without, ())):
        documents = Documents(samples, tokenizers, vocabulary, max_seq_len=255, patches=patches)
        batch = PackedBatches(documents, vocabulary, 2048, shuffle=False)[0]
        assert {kind: len(given.grids) for kind, given in batch.features.items()} == {"image": 5, "audio": 5}
        hidden.append(made(batch.ids, batch.positions, batch.packing, batch.features))
    assert torch.allclose(*hidden, atol=0.02)
    batch = batch._replace(features={})  # codes alone are something else
    assert not torch.allclose(without(batch.ids, batch.positions, batch.packing), hidden[1], atol=0.1)


def test_codes_that_a_decoder_does_not_read_are_not_made(samples, tokenizers, vocabulary, model):
    said = [replace(samples[0], turns=tuple(replace(turn, role=None) for turn in samples[0].turns))]  # a plain document: codes train
    given, ran = [*samples, *said], []
    media, seeds = [load_sample(sample, tokenizers) for sample in given], [0] * len(given)
    made = [encode_samples(given, media, tokenizers, Augmentation(), seeds, KINDS, codes) for codes in (True, False)]
    for (number, whole), blank in zip(enumerate(made[0]), made[1], strict=True):
        codes, none = (document.turns[0].parts[0].codes for document in (whole, blank))
        assert codes.any() and codes.shape == none.shape and none.any() == (number == len(samples))
        assert number < len(samples) or np.array_equal(codes, none)
        (ids, _, spans), (others, _, same) = render(whole, vocabulary), render(blank, vocabulary)
        inputs = [model.decoder.embed(torch.from_numpy(stream)[None].long(), gather_features([(0, found)]))
                  for stream, found in ((ids, spans), (others, same))]
        assert torch.equal(*inputs)
    handles = [tokenizers[kind].network.encoder_norm.register_forward_hook(lambda *_: ran.append(1)) for kind in KINDS]
    batch = PackedBatches(Documents(samples, tokenizers, vocabulary, max_seq_len=255, patches=KINDS), vocabulary, 2048)[0]
    picture = mmtx.Image(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    model.caption(picture, max_new_tokens=2)
    asked = [picture, "what is it?"]
    assert "".join(model.stream(asked, max_new_tokens=2)) == model.generate(asked, max_new_tokens=2)
    assert model.embed(picture).any()
    assert len(batch.features) == 2 and not ran
    # Who asks for the ids gets them, and the answer to a prompt with them is the same.
    ids = model.tokenize(asked, format="chat")
    assert ran and any(ident in vocabulary.range("image") and ident > vocabulary.range("image").start for ident in ids)
    for handle in handles:
        handle.remove()
    first, second = (model._answer([model.processor.prompt(asked, codes)], "text", Sampling.of(max_new_tokens=8))
                     for codes in (False, True))
    assert first == second


def test_captions_are_those_of_each_medium_alone_and_of_a_saved_model(model, samples, tmp_path):
    model.save(tmp_path / "model")
    loaded = mmtx.load(tmp_path / "model", "cpu")
    config = json.loads((tmp_path / "model" / "config.json").read_text())["decoder"]
    assert config["encoders"]["image"] == {"patch": 192, "width": 32, "heads": 2, "depth": 1, "chunk": 8}
    documents = to_documents(samples, model.tokenizers, patches=model.decoder.config.encoders)
    captions = model.caption_documents(documents, SHORT)
    assert len(set(captions)) > 1
    assert [model.caption_documents([document], SHORT)[0] for document in documents] == captions
    assert loaded.caption_documents(documents, SHORT) == captions
    # Through files, as users give them.
    paths = []
    for n, sample in enumerate(samples):
        part = sample.turns[0].parts[0]
        paths.append(tmp_path / f"{n}.{'webp' if part.kind == 'image' else 'ogg'}")
        paths[-1].write_bytes(part.source.read())
    assert loaded.caption([str(path) for path in paths], max_new_tokens=8) == captions
    assert loaded.caption(str(paths[0]), max_new_tokens=8) == captions[0]


def test_models_without_encoders_are_as_they_were(tiny_model, tmp_path):
    tiny_model.save(tmp_path / "model")
    assert "encoders" not in json.loads((tmp_path / "model" / "config.json").read_text())["decoder"]
    assert mmtx.load(tmp_path / "model", "cpu").decoder.config.encoders == {}


def test_encoders_that_fit_nothing_are_refused(model, tmp_path):
    with pytest.raises(InputError, match="encoders.image: found width 32, expected features of that width"):
        DecoderConfig(300, features={"image": 8}, encoders={"image": EncoderConfig(192, 32, 2, 1, 8)})
    with pytest.raises(InputError, match="encoders: width: found 30 with 4 heads"):
        EncoderConfig(192, 30, 4, 1, 8)
    with pytest.raises(InputError, match="train_encoder: found true with continuous_inputs: false"):
        DecoderModule(DecoderConfig(), train_encoder=True)
    model.save(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config["decoder"]["encoders"]["image"]["patch"] = 12
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match="takes patches of image of 12 values, but its tokenizer gives 192"):
        mmtx.load(tmp_path / "model")
    text = {"text": model.tokenizers["text"]}
    vocabulary = Vocabulary.build(text)
    Model(Decoder(DecoderConfig(vocabulary.size, width=32, depth=1)), vocabulary, text).save(tmp_path / "model")
    hears = {"features": {"audio": 32}, "encoders": {"audio": config["decoder"]["encoders"]["audio"]}}
    path.write_text(json.dumps({**(config := json.loads(path.read_text())), "decoder": config["decoder"] | hears}))
    with pytest.raises(InputError, match="the decoder has an encoder for audio, but its vocabulary has no audio ids"):
        mmtx.load(tmp_path / "model")


@pytest.mark.slow
def test_training_goes_on_from_a_model_of_frozen_features(tmp_path):
    config = runs.prepare(tmp_path, steps=2)
    config["data"]["init_args"]["num_workers"] = 0
    options = config["model"]["init_args"]
    options["continuous_inputs"] = True
    assert runs.fit(config, tmp_path / "first") == [0], (tmp_path / "first.log").read_text()
    options |= {"train_encoder": True, "init_from": str(tmp_path / "first" / "model"),
                "optimizer": {"learning_rate": 0.0, "weight_decay": 0.0}}
    assert runs.fit(config, tmp_path / "second") == [0], (tmp_path / "second.log").read_text()
    first, second = (mmtx.load(tmp_path / name / "model", "cpu") for name in ("first", "second"))
    own = {f"encoders.{kind}.{name}": value for kind in KINDS for name, value in copy_of(first.tokenizers[kind]).state_dict().items()}
    expected = {**first.decoder.state_dict(), **own}
    assert set(expected) == set(second.decoder.state_dict())
    # The step of a learning rate of 0 still rounds.
    assert all(torch.allclose(value, expected[name], rtol=0, atol=1e-6) for name, value in second.decoder.state_dict().items())
    # With another codec, were it of the same sizes, the features would mean something else.
    other = first.tokenizers["image"]
    with torch.no_grad():
        next(other.network.parameters()).add_(0.1)
    other.save(tmp_path / "other")
    config["data"]["init_args"]["tokenizers"]["image"] = str(tmp_path / "other")
    assert runs.fit(config, tmp_path / "refused") != [0]
    assert "init_from: found an image tokenizer of fingerprint" in (told := (tmp_path / "refused.log").read_text())
    assert "Traceback" not in told


@pytest.mark.slow
def test_training_changes_the_encoders_and_no_tokenizer(tmp_path):
    config = runs.prepare(tmp_path, steps=3)
    config["data"]["init_args"]["num_workers"] = 0
    config["model"]["init_args"] |= {"continuous_inputs": True, "train_encoder": True}
    assert runs.fit(config, tmp_path / "run") == [0], (tmp_path / "run.log").read_text()
    trained = mmtx.load(tmp_path / "run" / "model", "cpu")
    for kind in KINDS:
        tokenizer = load_tokenizer(tmp_path / kind)
        assert trained.tokenizers[kind].fingerprint == tokenizer.fingerprint
        before = copy_of(tokenizer).state_dict()
        assert all(not torch.equal(value, before[name]) for name, value in trained.decoder.encoders[kind].state_dict().items())
    losses = (tmp_path / "run" / "metrics" / "metrics.csv").read_text()
    assert "val/loss" in losses and "nan" not in losses
    # What is prepared has no patches.
    loaded = {kind: load_tokenizer(tmp_path / kind) for kind in ("text", *KINDS)}
    prepare(DataSource(**runs.FEW[0]), loaded, tmp_path / "shards", features=True)
    config["data"]["init_args"]["train"] = [{"paths": [str(tmp_path / "shards")]}]
    config["data"]["init_args"] |= {"image_augmentation": None}
    assert runs.fit(config, tmp_path / "refused") != [0]
    told = (tmp_path / "refused.log").read_text()
    assert "stores no patches of image; the decoder takes them (train_encoder: true)" in told and "Traceback" not in told
