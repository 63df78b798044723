"""Merged features: fewer tokens for the media of user turns, and all else as without."""

import json
from dataclasses import replace

import numpy as np
import pytest
import runs
import torch
from test_encoders import KINDS, SHORT, copy_of, decoder

import mmtx
from mmtx.config import DecoderConfig
from mmtx.ctc import time_steps
from mmtx.data.collection import DataSource, read_sources
from mmtx.data.corpus import read_corpus
from mmtx.data.documents import Documents
from mmtx.data.packing import PackedBatches
from mmtx.data.prepare import prepare
from mmtx.data.tokens import to_documents
from mmtx.document import Document, MediaPart, TextPart, Turn
from mmtx.errors import InputError
from mmtx.modality.encoder import build_encoder
from mmtx.model import Decoder
from mmtx.pipeline import Model
from mmtx.sequence import gather_features, parse, prompt, render
from mmtx.training.decoder import DecoderModule
from mmtx.vocabulary import Vocabulary

SIZES = {"image": (2, 2), "audio": (4, 1)}


@pytest.fixture(scope="module")
def merging(vocabulary) -> Vocabulary:
    return vocabulary.merging(SIZES)


@pytest.fixture(scope="module")
def samples():
    return read_sources([DataSource(source["paths"], limit=5) for source in runs.FEW], 0.0).samples


def merged_decoder(tokenizers, vocabulary, encoders: bool) -> Decoder:
    """A random decoder of merged features; all of its own weights are those of `decoder`, except its projections."""
    plain = decoder(tokenizers, vocabulary, encoders)
    widths = {kind: int(np.prod(vocabulary.merge(kind))) * tokenizers[kind].feature_width for kind in KINDS}
    torch.manual_seed(1)
    made = Decoder(replace(plain.config, features=widths), build_encoder)
    made.load_state_dict({name: 10 * made.state_dict()[name] if name.startswith("projections") else value
                          for name, value in plain.state_dict().items()})
    return made.eval()


@pytest.fixture(scope="module", params=[True, False])
def model(request, tokenizers, merging) -> Model:
    return Model(merged_decoder(tokenizers, merging, request.param), merging, tokenizers).to("cpu")


def medium(kind: str, h: int, w: int) -> MediaPart:
    """Codes that count up, with two features each that say where they come from."""
    place = torch.cartesian_prod(torch.arange(h), torch.arange(w)).view(h, w, 2)
    return MediaPart(kind, np.arange(h * w).reshape(h, w), place.float())


def test_a_picture_of_a_user_has_a_token_for_each_group(merging):
    v, picture = merging, medium("image", 3, 5)
    said = Document((Turn("user", (picture, TextPart([1, 2]))), Turn("assistant", (picture,))))
    ids, mask, (span,) = render(said, v)
    user, answer = parse(ids, v).turns
    assert user.parts[0].codes.tolist() == [[0, 2, 4], [10, 12, 14]]  # of each group the first
    assert answer.parts[0].codes.tolist() == picture.codes.tolist() and mask.sum() == 15 + 4 + 1
    assert span.grid == (2, 3) and span.merge == (2, 2) and span.codes.tolist() == picture.codes.tolist()
    assert v.to_local("image", ids[span.start:span.start + 6]).tolist() == [0, 2, 4, 10, 12, 14]
    # Side by side, row by row; the last row and column are repeated where a group would lack them.
    assert span.values.view(6, 4, 2).tolist() == [
        [[0, 0], [0, 1], [1, 0], [1, 1]], [[0, 2], [0, 3], [1, 2], [1, 3]], [[0, 4], [0, 4], [1, 4], [1, 4]],
        [[2, 0], [2, 1], [2, 0], [2, 1]], [[2, 2], [2, 3], [2, 2], [2, 3]], [[2, 4], [2, 4], [2, 4], [2, 4]]]
    assert len(prompt(Document((said.turns[0],)), v).ids) == 2 + (4 + 6) + 2 + 2


def test_steps_of_a_sound_are_merged_and_its_bands_are_not(merging):
    ids, _, (span,) = render(Document((Turn("user", (medium("audio", 6, 2),)),)), merging)
    assert span.grid == (2, 2)
    assert span.values.view(2, 2, 4, 2).tolist() == [
        [[[0, 0], [1, 0], [2, 0], [3, 0]], [[0, 1], [1, 1], [2, 1], [3, 1]]],
        [[[4, 0], [5, 0], [5, 0], [5, 0]], [[4, 1], [5, 1], [5, 1], [5, 1]]]]
    (steps,) = time_steps(gather_features([(0, (span,))])["audio"])
    assert steps.tolist() == [span.start + 1, span.start + 3]  # of each token step, after its bands


def test_a_plain_document_and_a_vocabulary_that_merges_nothing_are_as_before(vocabulary, merging):
    plain = Document((Turn(None, (medium("image", 4, 4),)),))
    assert render(plain, merging).ids.tolist() == render(plain, vocabulary).ids.tolist() and not render(plain, merging).spans
    assert vocabulary.merging({}) == vocabulary == merging.merging({"image": (1, 1)})
    assert b"merge" not in vocabulary.to_json()
    loaded = Vocabulary.of(json.loads(merging.to_json()), "here")
    assert loaded == merging and loaded.merge("image") == (2, 2) and loaded.merge("text") == (1, 1)
    assert loaded.size == vocabulary.size


def test_what_cannot_be_merged_is_refused(vocabulary, merging):
    for sizes, told in (({"image": (0, 2)}, r"merge_size.image: found \[0, 2\], expected 1 to 64 rows and 1 to 64 columns"),
                        ({"image": (2,)}, r"found \[2\]"), ({"audio": (2, 2)}, r"audio: found \[2, 2\], expected 1 to 64 rows and 1 c"),
                        ({"text": (2, 1)}, "text: found .* has no features"), ({"video": (2, 2)}, "found no video ids")):
        with pytest.raises(InputError, match=told):
            vocabulary.merging(sizes)
    with pytest.raises(InputError, match="image part: found codes alone in a user turn, expected features with them"):
        render(Document((Turn("user", (MediaPart("image", np.zeros((2, 2))),)),)), merging)
    with pytest.raises(InputError, match="merge_size: found one with continuous_inputs: false"):
        DecoderModule(DecoderConfig(), merge_size={"image": (2, 2)})
    damaged = json.loads(merging.to_json())
    damaged["modalities"][1]["merge"] = [2, 200]
    with pytest.raises(InputError, match=r"here: image: field 'merge': found \[2, 200\]"):
        Vocabulary.of(damaged, "here")


def test_features_of_an_encoder_are_those_of_the_whole_grid(tokenizers, merging):
    """The decoder's encoder sees single patches of the whole picture or sound, whatever is merged after it."""
    generator = torch.Generator().manual_seed(0)
    for kind, grids in (("image", ((3, 5), (4, 4), (3, 5), (1, 1))), ("audio", ((6, 2), (3, 2), (8, 2)))):
        encoder, (rows, columns) = copy_of(tokenizers[kind]), merging.merge(kind)
        patch = tokenizers[kind].encoder_config.patch
        parts = [MediaPart(kind, np.zeros(grid), torch.randn(*grid, patch, generator=generator)) for grid in grids]
        spans = [render(Document((Turn("user", (part,)),)), merging).spans for part in parts]
        found = gather_features([(100 * n, given) for n, given in enumerate(spans)])[kind].encoded(encoder)
        expected = []
        for part, (h, w) in zip(parts, grids, strict=True):
            down, across = (torch.arange(-(-side // size) * size).clamp_max(side - 1) for side, size in ((h, rows), (w, columns)))
            whole = part.features[down][:, across]
            features = encoder(whole.flatten(0, 1), [whole.shape[:2]]).view(*whole.shape[:2], -1)
            expected += [features[r:r + rows, c:c + columns].flatten() for r in range(0, len(down), rows)
                         for c in range(0, len(across), columns)]
        assert torch.allclose(found, torch.stack(expected), atol=1e-5) and found.std() > 0.5


def test_a_packed_batch_gives_the_states_of_each_document_alone(model, samples, tokenizers, merging):
    patches = tuple(model.decoder.encoders)
    documents = Documents(samples, tokenizers, merging, max_seq_len=255, patches=patches)
    batch = PackedBatches(documents, merging, 1024, shuffle=False)[0]
    hidden = model.decoder(batch.ids, batch.positions, batch.packing, batch.features)[0]
    starts = (batch.positions[0] == 0).nonzero()[:, 0].tolist()
    plain = Documents(samples, tokenizers, merging.merging({}), max_seq_len=255, patches=patches)
    assert documents.lengths.sum() < 0.5 * plain.lengths.sum()
    for start, number in zip(starts, batch.samples.tolist()):
        (ids, _, spans), = documents.render([(number, 0)])
        assert len(ids) == documents.lengths[number]
        alone = model.decoder(torch.from_numpy(ids[:-1])[None].long(), torch.arange(len(ids) - 1)[None], None,
                              gather_features([(0, spans)]))[0]
        assert torch.allclose(hidden[start:start + len(ids) - 1], alone, atol=1e-5)


def test_answers_are_those_of_a_saved_model_and_of_each_medium_alone(model, samples, tmp_path):
    model.save(tmp_path / "model")
    loaded = mmtx.load(tmp_path / "model", "cpu")
    asked = to_documents(samples, model.tokenizers, patches=model.decoder.encoders)
    captions = model.caption_documents(asked, SHORT)
    assert [model.caption_documents([one], SHORT)[0] for one in asked] == captions == loaded.caption_documents(asked, SHORT)
    vectors = [[some.embed_prompt(prompt(Document(one.turns[:1]), some.vocabulary)) for one in asked] for some in (model, loaded)]
    assert np.array_equal(*vectors) and np.ptp(vectors[0], axis=0).max() > 0.01
    picture = mmtx.Image(np.random.default_rng(0).integers(0, 256, (24, 16, 3), np.uint8))
    assert loaded.generate(picture, max_new_tokens=8) == model.generate(picture, max_new_tokens=8)
    waiting = loaded.read_medium(picture)
    assert loaded.prompt_length(Document((Turn("user", (waiting,)),))) == len(loaded.tokenize(picture, format="chat"))
    found = loaded.attention(picture, "a house")
    rows, columns = waiting.grid
    assert [part.grid for part in found.media] == [(-(-rows // 2), -(-columns // 2))]
    shown = loaded.detokenize(loaded.tokenize(picture))[0]  # the maps lie over all of its codes
    assert np.array_equal(found.media[0].shown, np.asarray(shown))


def test_a_folder_whose_parts_disagree_is_refused(model, tmp_path):
    model.save(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    whole = json.loads((tmp_path / "model" / "vocabulary.json").read_text())
    del whole["modalities"][1]["merge"]
    (tmp_path / "model" / "vocabulary.json").write_text(json.dumps(whole))
    with pytest.raises(InputError, match="takes features of image of width 128, but its .* gives 32"):
        mmtx.load(tmp_path / "model")
    whole["modalities"][1]["merge"] = [2, 2]
    (tmp_path / "model" / "vocabulary.json").write_text(json.dumps(whole))
    assert mmtx.load(tmp_path / "model").vocabulary.merge("image") == (2, 2)
    for name in ("features", "encoders"):
        config["decoder"].get(name, {}).pop("image", None)
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="the vocabulary merges features of image, but the decoder takes none"):
        mmtx.load(tmp_path / "model")


def test_prepared_shards_are_refused(samples, tokenizers, merging, tmp_path):
    prepare(DataSource(**runs.FEW[0]), tokenizers, tmp_path / "shards", features=True)
    with pytest.raises(InputError, match=r"merge_size.image: .* is prepared, with a token for each feature; expected none, or the m"):
        read_corpus([DataSource([str(tmp_path / "shards")])], tokenizers, merging, max_seq_len=255, seed=0, max_bad=0.0, features=True)


@pytest.mark.slow
def test_training_goes_on_from_a_model_without_merging(tmp_path):
    """At first, a token is the mean of what its features were alone."""
    config = runs.prepare(tmp_path, steps=2)
    config["data"]["init_args"]["num_workers"] = 0
    options = config["model"]["init_args"]
    options |= {"continuous_inputs": True, "train_encoder": True}
    assert runs.fit(config, tmp_path / "first") == [0], (tmp_path / "first.log").read_text()
    options |= {"merge_size": {"image": [2, 2], "audio": [4, 1]}, "init_from": str(tmp_path / "first" / "model"),
                "optimizer": {"learning_rate": 0.0, "weight_decay": 0.0}}
    assert runs.fit(config, tmp_path / "second") == [0], (tmp_path / "second.log").read_text()
    first, second = (mmtx.load(tmp_path / name / "model", "cpu") for name in ("first", "second"))
    assert second.vocabulary == first.vocabulary.merging(SIZES)
    for kind in KINDS:
        before, after = first.decoder.projections[kind], second.decoder.projections[kind]
        features = torch.randn(3, 4, before.in_features)
        assert torch.allclose(after(features.flatten(1)), before(features).mean(1), atol=1e-5)
    # A run from the merged model; one that merges otherwise is refused.
    options["init_from"] = str(tmp_path / "second" / "model")
    assert runs.fit(config, tmp_path / "third") == [0], (tmp_path / "third.log").read_text()
    options["merge_size"] = {"image": [4, 1], "audio": [4, 1]}
    assert runs.fit(config, tmp_path / "refused") != [0]
    told = (tmp_path / "refused.log").read_text()
    assert "init_from: found merge_size [2, 2] of image, expected [4, 1]" in told and "Traceback" not in told
