"""Classification: the labels are the only answers, and have the probabilities that the network gives them."""

import numpy as np
import pytest
import torch
from test_interop import media, save_model  # noqa: F401

import mmtx
from mmtx.captioning import classify_files
from mmtx.document import Document, Turn
from mmtx.inference import classification
from mmtx.inference.classification import label_ends, log_probabilities
from mmtx.interop.convert import convert
from mmtx.loss import next_token_loss
from mmtx.sequence import gather_features, render
from mmtx.shipped_files import shipped

PIANO = "demos/examples/piano.ogg"
KEYS = "bright acoustic piano"


@pytest.fixture(scope="module")
def starter():
    return mmtx.load(device="cpu")


def scores_after(model, ids):
    """Logits (V,) of the network after some ids, those that cannot come next in text at -inf."""
    given = torch.tensor(ids)[None]
    with torch.inference_mode():
        logits = model.decoder.logits(model.decoder(given, torch.arange(given.shape[1])[None]))[0, -1]
    return logits.masked_fill(~model.grammar.allowed(model.grammar.start(1, "text"))[0], -torch.inf)


@pytest.fixture(params=["ours", "llama scaled", "qwen2", "qwen3"])
def model(request, tiny_model, tmp_path):
    if request.param == "ours":
        return tiny_model
    save_model(tmp_path, request.param)
    return convert(tmp_path, request.getfixturevalue("media"))


def test_log_probabilities_are_those_of_the_network(model):
    asked = model.processor.prompt("a red")
    answers = [model.tokenizers["text"].encode(text) for text in ("circle", "a blue square", "a", "a blue", "violin, D sharp 5")]
    ends = torch.tensor([model.vocabulary.end, *answers[0][:1]])
    found = log_probabilities(model.decoder, model.grammar, asked, answers, ends)
    for answer, value in zip(answers, found.tolist(), strict=True):
        before = [*asked.ids.tolist()]
        total = 0.0
        for ident in answer:
            total += float(scores_after(model, before).log_softmax(0)[ident])
            before.append(ident)
        assert value == pytest.approx(total + float(scores_after(model, before).log_softmax(0)[ends].logsumexp(0)), abs=1e-3)


def test_the_likelihood_of_an_answer_is_that_of_its_ids_and_the_end(starter):
    picture, sound = (mark(shipped(f"demos/examples/{name}")) for mark, name in ((mmtx.Image, "cat.webp"), (mmtx.Audio, "piano.ogg")))
    found = starter.log_likelihood([picture], ["cat", "dog", "cat"])
    assert found[0] == found[2] > found[1] and starter.log_likelihood("x", []) == []
    [part] = starter.log_likelihood([sound], [KEYS])  # its captions go on with the note
    for medium, answer, value in ((picture, "cat", found[0]), (picture, "dog", found[1]), (sound, KEYS, part)):
        [asked] = starter.processor.questions([medium])
        stream = render(Document((*asked.turns, Turn("assistant", tuple(starter.encode_parts([answer]))))), starter.vocabulary)
        ids, trained = torch.from_numpy(stream.ids).long(), torch.from_numpy(stream.loss_mask[1:])
        with torch.inference_mode():
            features = gather_features([(0, stream.spans)])
            hidden = starter.decoder(ids[None, :-1], torch.arange(len(ids) - 1)[None], features=features)[0][trained]
            loss = next_token_loss(starter.decoder.embedding, hidden, ids[1:][trained], plain=int(trained.sum())).loss
        assert 0 <= value + float(loss.sum()) < 0.01  # training also spares a little for tags that no answer in text has
    with pytest.raises(mmtx.InputError, match="answer 2 of 2: found '', expected text"):
        starter.log_likelihood("x", ["a", ""])
    with pytest.raises(mmtx.InputError, match="answers: found str, expected a list of answers"):
        starter.log_likelihood("x", "cat")


def test_all_answers_share_a_probability_of_one(tiny_model):
    """Answers begin with one of the text ids, or are empty."""
    v, asked = tiny_model.vocabulary, tiny_model.processor.prompt("a red")
    text = list(v.range("text"))
    found = log_probabilities(tiny_model.decoder, tiny_model.grammar, asked, [[ident] for ident in text], torch.tensor([v.end, *text]))
    empty = scores_after(tiny_model, asked.ids.tolist()).softmax(0)[v.end]
    assert empty > 1e-3 and float(found.exp().sum() + empty) == pytest.approx(1, abs=1e-4)


def test_few_labels_at_a_time_give_the_same(starter, monkeypatch):
    labels = ["violin", KEYS, "trumpet, C 4", "cat", "double bass"]
    whole = starter.classify(shipped(PIANO), labels)
    monkeypatch.setattr(classification, "NODES", 1)
    assert starter.classify(shipped(PIANO), labels) == pytest.approx(whole, abs=1e-5)


def test_the_most_likely_label_comes_first(starter):
    files = [shipped(f"demos/examples/{name}") for name in ("cat.webp", "piano.ogg")]
    labels = ["cat", "dog", KEYS, "violin"]
    picture, sound = starter.classify(files, labels)
    assert next(iter(picture)) == "cat" and next(iter(sound)) == KEYS
    for found in (picture, sound):
        assert set(found) == set(labels) and list(found.values()) == sorted(found.values(), reverse=True)
        assert sum(found.values()) == pytest.approx(1, abs=1e-5)
    assert starter.classify(files[0], reversed(labels)) == pytest.approx(picture, abs=1e-5)
    assert starter.classify([], labels) == []


def test_a_label_may_be_the_beginning_of_an_answer_up_to_a_mark(starter):
    """The model answers "bright acoustic piano, F 3", of which the instrument is a label; a part of a word is not."""
    found = starter.classify(shipped(PIANO), [KEYS, "bright", "violin"])
    assert found[KEYS] > 0.99
    text, v = starter.tokenizers["text"], starter.vocabulary
    marks = {text.decode([ident]).strip() for ident in label_ends(text, v)[1:].tolist()}
    assert "," in marks and not {"'", "-", "s"} & marks


def test_a_question_is_asked(starter):
    kinds = ["food drink", "objects", "animals nature", "travel places"]
    cat = shipped("demos/examples/cat.webp")
    asked = starter.classify(cat, kinds, question="What kind of thing is it?")
    assert asked["animals nature"] > 0.9 > starter.classify(cat, kinds)["animals nature"]


def test_numbers_in_8_and_16_bits_agree(starter):
    labels = ["cat", "dog", "mouse", "horse", KEYS]
    cat = shipped("demos/examples/cat.webp")
    expected = starter.classify(cat, labels)
    for other in (mmtx.load(device="cpu", load_in_8bit=True), mmtx.load(device="cpu", dtype="bfloat16")):
        assert other.classify(cat, labels) == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(("labels", "told"), [
    (["cat"], "candidate_labels: found 1, expected two or more"),
    ([], "candidate_labels: found 0, expected two or more"),
    ("cat", "candidate_labels: found str, expected a list of candidate_labels"),
    (None, "candidate_labels: found NoneType, expected a list of candidate_labels"),
    (["cat", 3], "candidate_label 2 of 2: found int, expected text"),
    (["cat", ""], "candidate_label 2 of 2: found '', expected text"),
    (["cat", "dog", "cat"], "candidate_label 3 of 3: found 'cat', expected another than label 1"),
])
def test_labels_that_are_no_set_of_answers_are_refused(tiny_model, labels, told):
    with pytest.raises(mmtx.InputError) as error:
        tiny_model.classify(np.zeros((8, 8, 3), np.uint8), labels)
    assert str(error.value) == told


def test_bad_files_do_not_affect_the_others(starter, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    found = list(classify_files(starter, [str(bad), str(shipped("demos/examples/cat.webp"))], ["cat", "dog"], top=2))
    assert found[0].error is not None and found[1].caption.startswith(("1.000 cat", "0.9")) and ", 0.0" in found[1].caption


def test_the_answer_that_is_generated_is_the_best_label(starter):
    """Greedy captions of several media, given as the labels: each is the most likely one of its own medium."""
    files = sorted(shipped("demos/examples").glob("*.*"))
    files = [file for file in files if file.suffix in (".webp", ".ogg")]
    captions = starter.caption(files)
    labels = [*dict.fromkeys(captions)]
    assert len(labels) > 3
    assert [next(iter(found)) for found in starter.classify(files, labels)] == captions
