"""TextTokenizer: exact for every string, deterministic, strict about models that it cannot keep exact."""

import io
import pickle
import random

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtx.errors import InputError
from mmtx.modality.base import load_tokenizer
from mmtx.modality.text import TextTokenizer
from mmtx.vocabulary import NAMES

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "says", "12", "345", "<image>", "café", "東京", "ok"]


def corpus() -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=12)) + "\n" for _ in range(300)]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.train(corpus(), 360)


def foreign_model(**options) -> bytes:
    """A model as other projects train it."""
    model = io.BytesIO()
    defaults = dict(
        model_type="bpe", vocab_size=340, byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, add_dummy_prefix=False, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=model, **{**defaults, **options}
    )
    return model.getvalue()


@settings(deadline=None, max_examples=500)
@given(text=st.text() | st.text(alphabet=" \u2581\u2585\0\n\t<s>0xA1a"))
def test_every_string_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.size for i in ids)


@pytest.mark.parametrize(
    "text",
    ["", " ", "   leading", "trailing  ", "\u2581", " \u2581 \u2581\u2581", "\0", "a\0b", "\n\n\r\n\t", "<s>",
     "<unk>", "<0x41>", "<image>", "</s><pad>", "\u2585\u2047", "\ufeff", "\ufffd", "e\u0301 \u00e9",
     "\U0001f469\u200d\U0001f467", "\U0010ffff", *NAMES[:12]],
)  # fmt: skip
def test_hard_strings_come_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_never_emits_unknown_or_control_pieces(tokenizer):
    for text in ("<unk>", "<s>", "</s>", "\u2047", "漢", "\U0001f600"):
        for i in tokenizer.encode(text):
            assert not tokenizer._model.is_unknown(i) and not tokenizer._model.is_control(i)


def test_pieces_shorten_the_text(tokenizer):
    text = corpus()[0]
    assert len(tokenizer.encode(text)) < len(text) / 2
    assert tokenizer.size == 360


@settings(deadline=None)
@given(data=st.data())
def test_any_generated_ids_decode(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.size - 1)))
    assert isinstance(tokenizer.decode(np.array(ids, np.int64)), str)


def test_broken_bytes_become_replacement_characters(tokenizer):
    a, *_, last = tokenizer.encode("漢")
    assert tokenizer.decode([a]) == "\ufffd"
    assert tokenizer.decode([tokenizer._model.unk_id()]) == "\ufffd"
    assert tokenizer.decode([last, *tokenizer.encode("ok")]) == "\ufffdok"


def test_decode_refuses_ids_outside(tokenizer):
    for ids in ([-1], [tokenizer.size]):
        with pytest.raises(InputError, match="expected 0\\.\\.359"):
            tokenizer.decode(ids)


def test_training_is_deterministic(tokenizer):
    again = TextTokenizer.train(iter(corpus()), 360)
    assert again.model_proto == tokenizer.model_proto
    assert again.fingerprint == tokenizer.fingerprint
    assert TextTokenizer.train(corpus(), 350).fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize(
    "texts",
    [["a"], [" "], ["\n"], ["\0"], ["\u2581\u2585"], ["<unk> <0x41> <s> "] * 500, ["", "x", ""]],
)
def test_tiny_corpora(texts):
    tokenizer = TextTokenizer.train(texts, 1000)
    assert 258 <= tokenizer.size <= 1000
    assert tokenizer.decode(tokenizer.encode(" a \u2581 b  ")) == " a \u2581 b  "


@pytest.mark.parametrize("size", [258, 259, 260, 261, 262, 300])
def test_more_characters_than_room(size):
    tokenizer = TextTokenizer.train(["".join(map(chr, range(0x4E00, 0x5E00))), "aa ab"], size)
    assert tokenizer.size <= size
    assert tokenizer.decode(tokenizer.encode("aa 一丁")) == "aa 一丁"


@pytest.mark.parametrize("text", ["xyz" * 50_000, "xyz xyz \u2585", "\u2581xyz xyz", "\0xyz xyz"])
def test_no_text_is_dropped(text):
    """Long texts, and characters with a meaning for the trainer."""
    tokenizer = TextTokenizer.train([text], 300)
    assert len(tokenizer.encode("xyz")) == 1


def test_typed_space_symbol_is_not_trained_as_a_space():
    split, whole = TextTokenizer.train(["ab", "ab"], 300), TextTokenizer.train(["ab\u2581ab"], 300)
    assert split.model_proto == whole.model_proto


def test_training_is_silent(capfd):
    TextTokenizer.train(["hello world"], 1000)
    TextTokenizer.train(["hello world\0" * 9, ""], 300)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("texts", [[], [""]])
def test_no_text(texts):
    with pytest.raises(InputError, match="no text"):
        TextTokenizer.train(texts, 400)


def test_size_too_small():
    with pytest.raises(InputError, match="size: found 257, expected 258 or more"):
        TextTokenizer.train(["a"], 257)


def test_lone_surrogates_and_other_types(tokenizer):
    with pytest.raises(InputError, match="lone surrogate .* at character 2"):
        tokenizer.encode("ab\ud800")
    with pytest.raises(InputError, match="lone surrogate"):
        TextTokenizer.train(["\udfff"], 400)
    with pytest.raises(InputError, match="found bytes, expected str"):
        tokenizer.encode(b"ab")


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "text")
    loaded = load_tokenizer(tmp_path / "text")
    assert isinstance(loaded, TextTokenizer)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode("the fox") == tokenizer.encode("the fox")
    (tmp_path / "text" / "config.json").write_text('{"kind": "text", "size": 1}')
    with pytest.raises(InputError, match="config.json: found .*expected"):
        load_tokenizer(tmp_path / "text")
    (tmp_path / "text" / "tokenizer.model").unlink()
    with pytest.raises(InputError, match="tokenizer.model"):
        load_tokenizer(tmp_path / "text")


def test_pickle(tokenizer):
    assert pickle.loads(pickle.dumps(tokenizer)).encode("a \u2581") == tokenizer.encode("a \u2581")


def test_existing_model(tmp_path):
    path = tmp_path / "other.model"
    path.write_bytes(foreign_model())
    tokenizer = TextTokenizer.from_file(path)
    assert tokenizer.decode(tokenizer.encode("<s> a \u2581 b</s>")) == "<s> a \u2581 b</s>"
    assert tokenizer.decode([tokenizer._model.bos_id()]) == ""


@pytest.mark.parametrize(
    "options, message",
    [
        ({"byte_fallback": False}, "found 0 byte pieces, expected 256"),
        ({"add_dummy_prefix": True}, "add_dummy_prefix=false"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces=false"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalization_rule_name=identity"),
    ],
)
def test_existing_models_that_change_text(tmp_path, options, message):
    path = tmp_path / "other.model"
    path.write_bytes(foreign_model(**options))
    with pytest.raises(InputError, match=f"other.model.*{message}"):
        TextTokenizer.from_file(path)


@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_files_that_are_no_model(tmp_path, content):
    path = tmp_path / "other.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match="other.model") as caught:
        TextTokenizer.from_file(path)
    assert "\n" not in str(caught.value)
