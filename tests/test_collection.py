"""Sources turned round for generation, and captions dropped for guidance: what such samples train."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from mmtx.data.augment import AudioAugmentation, ImageAugmentation
from mmtx.data.collection import DataSource, read_source
from mmtx.data.documents import Documents
from mmtx.data.packing import PackedBatches
from mmtx.data.sample import Media, SampleTurn, Text
from mmtx.data.storage import MemorySource
from mmtx.data.tokens import Augmentation, to_documents
from mmtx.errors import InputError
from mmtx.sequence import parse

STARTER = Path(__file__).parents[1] / "demos" / "data" / "starter"
SHARDS = {"image": "images-test-unseen-emoji.tar.gz", "audio": "sounds-test-unseen-notes.tar.gz"}
VIEWS = 40
AUGMENTATION = Augmentation(ImageAugmentation(), AudioAugmentation())


def source(kind: str, **options) -> DataSource:
    return DataSource([str(STARTER / SHARDS[kind])], limit=3, **options)


@pytest.fixture(scope="module")
def samples():
    """Three pictures and three notes: as they are, and turned round."""
    return {task: [sample for kind in SHARDS for sample in read_source(source(kind, task=task))]
            for task in ("caption", "generate")}


@pytest.fixture(scope="module")
def stores(samples, tokenizers, vocabulary):
    """Samples turned round, with a share of captions dropped and without."""
    given = {drop: [replace(sample, cond_drop_prob=drop) for sample in samples["generate"]] for drop in (0.0, 0.3)}
    return {drop: Documents(some, tokenizers, vocabulary, max_seq_len=512, augmentation=AUGMENTATION)
            for drop, some in given.items()}


def test_a_source_with_swapped_turns_asks_by_text_and_trains_the_medium(samples, stores, tokenizers, vocabulary):
    v = vocabulary
    rendered = stores[0.0].render([(number, 0) for number in range(6)])
    for sample, captioned, (ids, trained, spans) in zip(samples["generate"], samples["caption"], rendered, strict=True):
        assert sample.caption == captioned.caption
        question, answer = parse(ids, v).turns
        assert (question.role, answer.role) == ("user", "assistant")
        (text,), (medium,) = question.parts, answer.parts
        assert tokenizers["text"].decode(text.ids.tolist()) == captioned.caption
        assert medium.kind == captioned.turns[0].parts[0].kind
        opened = v.image if medium.kind == "image" else v.audio
        place = ids.tolist().index(opened)
        assert ids[place - 1] == v.assistant and ids[-2] == v.end
        assert np.flatnonzero(trained).tolist() == list(range(place, len(ids) - 1))
        assert not spans  # of what is generated no feature is ever seen


def test_what_is_to_be_made_is_learnt_as_it_is(samples, stores, tokenizers):
    plain = to_documents(samples["generate"], tokenizers)
    views = stores[0.0].render([(number, view) for number in range(6) for view in range(4)])
    assert [parse(view.ids, stores[0.0].vocabulary) for view in views] == [document for document in plain for _ in range(4)]


def test_both_directions_hold_the_same_parts(samples, tokenizers):
    forward, back = (to_documents(samples[task], tokenizers) for task in ("caption", "generate"))
    for one, other in zip(forward, back, strict=True):
        assert [turn.parts for turn in one.turns] == [turn.parts for turn in reversed(other.turns)]


def test_dropped_views_leave_the_user_turn_empty_and_all_else_as_it_was(stores, vocabulary):
    v, chosen = vocabulary, list(product(range(6), range(VIEWS)))
    whole, some = (stores[drop].render(chosen) for drop in (0.0, 0.3))
    dropped = 0
    for one, other in zip(whole, some, strict=True):
        if len(one.ids) == len(other.ids):
            assert np.array_equal(one.ids, other.ids)
            continue
        dropped += 1
        place = one.ids.tolist().index(v.assistant)
        assert other.ids.tolist() == [v.bos, v.user, v.end, *one.ids[place:]]
        assert other.ids[other.loss_mask].tolist() == one.ids[one.loss_mask].tolist()
    assert dropped / len(chosen) == pytest.approx(0.3, abs=0.1)  # three standard errors are 0.09


def test_what_is_dropped_depends_on_sample_and_view_alone(stores):
    def lengths(chosen):
        return [len(rendered.ids) for rendered in stores[0.3].render(chosen)]

    first, second = [(1, view) for view in range(20)], [(2, view) for view in range(20)]
    mixed = [pair for both in zip(second, reversed(first)) for pair in both]
    assert lengths(mixed) == [n for both in zip(lengths(second), reversed(lengths(first))) for n in both]
    kept = [[n == max(some) for n in some] for some in (lengths(first), lengths(second))]
    assert kept[0] != kept[1]


def test_batches_with_dropped_captions_lose_no_target(stores, vocabulary):
    batches = PackedBatches(stores[0.3], vocabulary, 512, repeats=[5] * 6)
    targets = np.concatenate([batches[k].targets for k in range(len(batches))])
    expected = [r.ids[r.loss_mask] for r in stores[0.3].render(list(product(range(6), range(5))))]
    assert sorted(targets.tolist()) == sorted(np.concatenate(expected).tolist())


def test_everything_dropped_leaves_nothing_in_user_turns(samples, tokenizers, vocabulary):
    # Captions trained without their medium: also with features there is then nothing to see.
    some = [replace(sample, cond_drop_prob=1.0) for sample in samples["caption"]]
    for rendered in Documents(some, tokenizers, vocabulary, max_seq_len=512).render([(n, 0) for n in range(6)]):
        question, answer = parse(rendered.ids, vocabulary).turns
        assert not question.parts and [part.kind for part in answer.parts] == ["text"] and not rendered.spans


def test_a_source_tells_its_drop_to_its_samples():
    assert {sample.cond_drop_prob for sample in read_source(source("image", cond_drop_prob=0.25))} == {0.25}


@pytest.mark.parametrize("row, found", [
    ({"text": "a red circle"}, "plain"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                   {"role": "user", "content": "c"}]}, "user, assistant, user"),
    ({"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}, "assistant, user"),
])
def test_only_one_question_with_one_answer_can_be_with_swapped_turns(row, found, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match=f"rows.jsonl row 1: found turns {found}, expected user, assistant"):
        read_source(DataSource([str(path)], task="generate"))


@pytest.mark.parametrize("field, value, told", [
    ("task", "draw", "task: found 'draw', expected one of 'caption', 'generate'"),
    ("cond_drop_prob", -0.1, "cond_drop_prob: found -0.1, expected a share from 0 to 1"), ("cond_drop_prob", 1.1, "cond_drop_prob: found 1.1"),
    ("cond_drop_prob", float("nan"), "cond_drop_prob: found nan"),
])
def test_a_source_names_a_wrong_value(field, value, told):
    with pytest.raises(InputError, match=told):
        DataSource(["a.jsonl"], **{field: value})


@pytest.mark.parametrize("turns, told", [
    (["a cat"], "gave the turn 'a cat', expected an mmtx.data.sample.SampleTurn"),
    (None, "gave the turns None, expected a tuple of mmtx.data.sample.SampleTurn"),
    ([SampleTurn("bot", (Text("a cat"),))], "gave a turn of role 'bot', expected 'user', 'assistant' or None"),
    ([SampleTurn("assistant", "a cat")], "gave the parts 'a cat', expected a tuple of mmtx.data.sample.Text and Media"),
    ([SampleTurn("assistant", None)], "gave the parts None, expected a tuple of mmtx.data.sample.Text and Media"),
    ([SampleTurn("assistant", ("a cat",))], "gave the part 'a cat', expected an mmtx.data.sample.Text, Media or Codes"),
    ([SampleTurn("assistant", (Text(" "),))], "gave the text ' ', expected text that is not blank"),
    ([SampleTurn("assistant", (Text(7),))], "gave the text 7, expected text that is not blank"),
    ([SampleTurn("user", (Media("smell", "x", MemorySource(b""), speed=2),))], "gave a medium of kind 'smell', expected one of image, audio"),
])
def test_what_variants_make_is_looked_at(turns, told, tmp_path, monkeypatch):
    """A mistake of the function's is told by its name and by the row, whatever of the sample it is in."""
    function = f"made_{tmp_path.name.rstrip('_')}"
    monkeypatch.setattr("mmtx.data.variants.import_function", lambda *_: lambda sample: [replace(sample, turns=turns)])
    with pytest.raises(InputError) as error:
        read_source(source("image", variants=f"{function}.py:made"))
    assert str(error.value).startswith(f"variants {function}.py:made: ") and told in str(error.value), error.value
