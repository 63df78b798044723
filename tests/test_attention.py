"""What the model attends to: equal to the attentions of transformers, and on the right cells of the right media."""

import copy
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from test_model import qwen3

import mmtx
from mmtx import attention
from mmtx.attention import AttentionMaps, attention_weights
from mmtx.config import DecoderConfig, RopeScaling
from mmtx.model import Decoder, rotary_embedding
from mmtx.pipeline import Model
from mmtx.shipped_files import shipped

PICTURE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
TONE = (0.7 * np.sin(np.arange(3000) * 0.2)).astype(np.float32)
PARTS = [mmtx.Image(PICTURE), "a red circle", mmtx.Audio(TONE)]


@pytest.fixture(scope="module")
def lively(tiny_model):
    """Weights that attend here and there."""
    decoder = copy.deepcopy(tiny_model.decoder)
    torch.manual_seed(0)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return Model(decoder.requires_grad_(False), tiny_model.vocabulary, tiny_model.tokenizers)


@pytest.fixture(scope="module")
def with_features(tiny_model):
    """A decoder that reads features in place of codes."""
    features = {kind: tiny_model.tokenizers[kind].feature_width for kind in ("image", "audio")}
    torch.manual_seed(1)
    decoder = Decoder(DecoderConfig(**{**vars(tiny_model.decoder.config), "features": features}))
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return Model(decoder.requires_grad_(False), tiny_model.vocabulary, tiny_model.tokenizers)


def theirs(decoder: Decoder, **given) -> torch.Tensor:
    """The attentions of transformers (L, H, T, T)."""
    model = qwen3(decoder)
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        return torch.cat(model(**given, output_attentions=True).attentions)


def test_weights_are_those_of_transformers(lively):
    found = lively.attention(PARTS, "a blue square")
    ids = [*lively.processor.prompt(PARTS).ids.tolist(), *lively.tokenizers["text"].encode("a blue square")]
    expected = theirs(lively.decoder, input_ids=torch.tensor([ids]))
    assert found.weights.shape == expected.shape == (2, 4, len(ids), len(ids))
    torch.testing.assert_close(found.weights, expected, atol=1e-5, rtol=0)
    assert expected.std(-1).max() > 0.1  # they differ from place to place


def test_weights_over_features_are_those_of_transformers(with_features):
    asked = with_features.processor.prompt(PARTS)
    found = with_features.attention(PARTS, "violin")
    ids = torch.tensor([[*asked.ids.tolist(), *with_features.tokenizers["text"].encode("violin")]])
    inputs = with_features.decoder.embed(ids, attention.gather_features([(0, asked.spans)]))
    torch.testing.assert_close(found.weights, theirs(with_features.decoder, inputs_embeds=inputs), atol=1e-5, rtol=0)
    plain = theirs(with_features.decoder, input_ids=ids)
    assert (found.weights - plain).abs().max() > 1e-2


def test_the_answer_is_the_models_own_unless_it_is_given(lively):
    found = lively.attention(PARTS)
    assert "".join(word.text for word in found.words) == lively.generate(PARTS)
    given = lively.attention(PARTS, "trumpet, C 4")
    assert [word.text for word in given.words] == ["trumpet,", " C", " 4"]
    assert [place for word in given.words for place in word.places] == list(
        range(len(lively.processor.prompt(PARTS).ids), given.weights.shape[-1]))


def test_media_lie_where_their_codes_are(lively):
    found = lively.attention(PARTS, "a")
    ids, v = lively.processor.prompt(PARTS).ids, lively.vocabulary
    picture, sound = found.media
    assert (picture.kind, picture.grid) == ("image", (2, 2)) and sound.kind == "audio" and sound.grid[1] == v.bands("audio")
    for medium in found.media:
        assert all(v.kind(int(ids[place])) == medium.kind for place in medium.places)
        assert len(medium.places) == np.prod(medium.grid)
    assert sum(v.kind(int(ident)) in ("image", "audio") for ident in ids) == sum(len(medium.places) for medium in found.media)
    assert np.array_equal(picture.shown, lively.detokenize([v.bos, *ids[2:2 + 8], v.eos])[0])


def test_maps_lie_on_the_medium_also_where_its_codes_are_not_read():
    """The shipped model reads patches: its answers need no codes, and the picture under a map does."""
    model, picture = mmtx.load(device="cpu"), shipped("demos/examples") / "cat.webp"
    assert "image" in model.decoder.config.encoders
    (shown,) = model.detokenize(model.tokenize([picture]))
    (medium,) = model.attention([picture], "cat").media
    assert np.array_equal(medium.shown, shown) and np.asarray(shown).std() > 20


def test_a_heat_map_has_each_weight_in_its_cell(lively):
    real = lively.attention([mmtx.Audio(TONE)], "a b")
    (sound,), word = real.media, real.words[-1]
    weights = torch.zeros_like(real.weights)
    steps, bands = sound.grid
    for number, place in enumerate(sound.places):
        weights[1, 2, word.places[0] - 1, place] = number
    found = AttentionMaps(weights, real.labels, real.words, real.media)
    expected = np.arange(steps * bands).reshape(steps, bands) / len(word.places)
    assert np.allclose(found.heat(word, sound, layer=1, head=2), expected)
    assert np.allclose(found.heat(word, sound, layer=1), expected / 4)
    assert np.allclose(found.heat(word, sound), expected / 8)
    assert not found.heat(word, sound, layer=0).any()


def test_rollout_is_the_product_of_the_layers(lively):
    found = lively.attention(PARTS, "a blue square")
    first, second = (0.5 * layer.mean(0).double() + 0.5 * torch.eye(layer.shape[-1]) for layer in found.weights)
    torch.testing.assert_close(found.rollout().double(), second @ first, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.rollout().sum(-1), torch.ones(len(first)), atol=1e-5, rtol=0)
    assert not found.rollout().triu(1).any()


@pytest.mark.parametrize("parts", [PARTS, ["a red circle"]])
@pytest.mark.parametrize("options", [{}, {"layer": 1, "head": 0}, {"rollout": True}])
def test_a_plot_is_a_picture(lively, tmp_path, parts, options):
    pytest.importorskip("matplotlib")
    lively.attention(parts, "costs $5 or $6, a blue square").plot(tmp_path / "a.png", **options)
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    assert min(pixels.shape[:2]) > 100 and pixels.std() > 10


def test_maps_are_kept_in_sets_and_plotted_in_the_home_of_the_user(lively, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    found, again = (lively.attention(PARTS, "a red circle") for _ in range(2))
    assert found == found and found != again and len({found, again}) == 2
    found.plot("~/plot.png")
    found.plot(file := io.BytesIO())
    assert (tmp_path / "plot.png").is_file() and file.getvalue()


def test_a_plot_of_some_places_has_their_weights(lively, tmp_path):
    pytest.importorskip("matplotlib")
    found, chosen = lively.attention("a red circle", "a blue square"), [2, 4, 5, 7]
    labels = tuple(found.labels[place] for place in chosen)
    AttentionMaps(found.weights[:, :, chosen][..., chosen], labels, (), ()).plot(tmp_path / "expected.png", head=1)
    found.plot(tmp_path / "some.png", head=1, places=chosen)
    assert np.array_equal(*(np.asarray(Image.open(tmp_path / name)) for name in ("expected.png", "some.png")))


def test_mistakes_are_told(lively, tmp_path, monkeypatch):
    found = lively.attention("a", "a b")
    for options, told in (({"layer": 2}, "layer: found 2, expected 0 to 1"), ({"head": -1}, "head: found -1, expected 0 to 3")):
        with pytest.raises(mmtx.InputError, match=told):
            found.rows(**options)
    for value in ("x", 1.0, float("nan"), [0], None):
        for name in ("layer", "head") if value is not None else ():
            with pytest.raises(mmtx.InputError, match=f"{name}: found .*, expected 0 to"):
                found.rows(**{name: value})
    pytest.importorskip("matplotlib")
    with pytest.raises(mmtx.InputError, match=r"a\.nothing: cannot be written"):
        found.plot(tmp_path / "a.nothing")
    for path in (None, 5, ["a.png"]):
        with pytest.raises(mmtx.InputError, match=f"path: found {type(path).__name__}, expected the name of a file"):
            found.plot(path)
    monkeypatch.setattr(attention, "MAX_WEIGHTS", 100)
    with pytest.raises(mmtx.InputError, match="attention: found 6 tokens"):
        attention_weights(lively.decoder, torch.arange(6))


@pytest.mark.parametrize("places, told", [
    ([999], r"places: found 999, expected 0 to \d+"), ([2, -1], "places: found -1"), ([], r"places: found \[\], expected whole numbers"),
    ([1.0], r"places: found \[1\.0\], expected whole numbers"), (["a"], "places: found"), ("12", "places: found '12'"), (5, "places: found 5"),
    ([None], "places: found"), (torch.tensor(1), "places: found"),
])
@pytest.mark.parametrize("parts", ["a red circle", PARTS])
def test_places_that_are_none_are_told(lively, tmp_path, places, told, parts):
    pytest.importorskip("matplotlib")
    with pytest.raises(mmtx.InputError, match=told):
        lively.attention(parts, "a blue square").plot(tmp_path / "a.png", places=places)
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("places", [np.array([2, 4]), torch.tensor([2, 4]), (2, 4), range(2, 5, 2), (place for place in [2, 4])])
def test_places_may_come_in_any_form(lively, tmp_path, places):
    pytest.importorskip("matplotlib")
    found = lively.attention("a red circle", "a blue square")
    found.plot(tmp_path / "a.png", places=[2, 4])
    found.plot(tmp_path / "b.png", places=places)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_plot_of_some_places_has_their_weights_also_if_there_are_media(lively, tmp_path):
    pytest.importorskip("matplotlib")
    found = lively.attention(PARTS, "a blue square")
    found.plot(tmp_path / "places.png", places=[1, 3])
    found.plot(tmp_path / "media.png")
    replace(found, media=()).plot(tmp_path / "table.png", places=[1, 3])
    places, media, table = ((tmp_path / f"{name}.png").read_bytes() for name in ("places", "media", "table"))
    assert places == table != media


def test_a_heat_map_of_nothing_is_told(lively):
    found = lively.attention(PARTS, "a b")
    word, medium = found.words[0], found.media[0]
    for given, told in (((0, medium), "word: found 0, expected one of `words`"), (("a", medium), "word: found 'a'"),
                        ((word, 0), "medium: found 0, expected one of `media`"), ((word, word), "medium: found Word"),
                        ((word._replace(places=(999,)), medium), "word: found 998, expected 0 to"),
                        ((word._replace(places=(0,)), medium), "word: found -1, expected 0 to"),
                        ((word._replace(places=()), medium), r"word: found \[\], expected whole numbers"),
                        ((word, medium._replace(places=range(900, 904))), "medium: found 900, expected 0 to")):
        with pytest.raises(mmtx.InputError, match=told):
            found.heat(*given)


def test_weights_of_other_families_are_those_that_their_blocks_use():
    torch.manual_seed(0)
    config = DecoderConfig(64, width=32, depth=1, heads=4, kv_heads=2, head_dim=16, mlp_dim=64, qk_norm=False, qkv_bias=True,
                           rope_theta=100.0, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 16))
    decoder, ids = Decoder(config), torch.randint(64, (40,))
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    (block,), positions = decoder.blocks, torch.arange(40)[None]
    with torch.no_grad():
        x = block.attention_norm(decoder.embed(ids[None]))
        angles = rotary_embedding(positions, 16, 100.0, config.rope_scaling)
        value = block.attention.heads(x, angles)[2].repeat_interleave(2, 2)[0]                      # (T, H, K)
        (shares,) = attention_weights(decoder, ids)
        found = block.attention.out(torch.einsum("hqt,thk->qhk", shares, value).flatten(1))
        assert torch.allclose(found, block.attention(x, angles)[0], atol=1e-5)
