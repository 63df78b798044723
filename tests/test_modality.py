"""The registry of modalities and what it must not change: ids, files and legal ids of text, pictures and sounds."""

import hashlib

import numpy as np
import pytest
import torch

from mmtx.errors import InputError
from mmtx.grammar import Grammar
from mmtx.modality.base import MediaTokenizer, load_tokenizer
from mmtx.modality.registry import MODALITIES
from mmtx.modality.text import TextTokenizer
from mmtx.shipped_files import shipped
from mmtx.vocabulary import Vocabulary

# Recorded before modalities were described in one place: (fingerprint, all files) of the shipped tokenizers.
TOKENIZERS = {"text": ("2ddafbca02cce51c", "2358492acc20ad71"), "image": ("0fa8ea1912c7e99d", "700d87aebb8c55af"), "audio": ("ac90e568e04ef48e", "bf7ed20159999231"),
              "audio-fine": ("d07927f5c78e0d6a", "9ee99f106ebc77fc")}
# The same of vocabularies: vocabulary.json, the numbers of modalities, and what the grammar allows on a walk.
VOCABULARIES = {
    "text": ("dc04da0496646571", "bb7d7384cf0ad942", "c1d48272b2bc664e"),
    "text image": ("86f2ae7d103128f2", "43e5af4c58be0b7b", "eb92531f83741537"),
    "text audio": ("c1a93215fd02f543", "5e3a59f9bfda146b", "75bd825c8c84d677"),
    "text audio image": ("eb904f5e8ee64745", "afa66c399f835db2", "c818560b9ae5b9f9"),
    "text image audio": ("303d51b00fc45f3b", "7f1ef16d212da6da", "830c4fad8c458a57"),
}


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


@pytest.fixture(scope="module")
def shipped_tokenizers():
    return {kind: load_tokenizer(shipped(f"tokenizers/{kind}")) for kind in TOKENIZERS}


def walk(vocabulary: Vocabulary) -> str:
    """All that the grammar allows, and what closes, on a long walk through every kind of answer."""
    grammar, seen, v = Grammar(vocabulary), hashlib.sha256(), vocabulary
    small = [*range(v.height(1), v.height(4)), *range(v.width(1), v.width(4))]
    for out in ("text", "any", "document", *vocabulary.kinds[1:]):
        state = grammar.start(2, out)
        for step in range(150):
            allowed = grammar.allowed(state, grammar.reach(out))
            seen.update(np.packbits(allowed.numpy()).tobytes() + np.packbits(grammar.closing(allowed).numpy()).tobytes())
            ids = []
            for row, may in enumerate(map(np.flatnonzero, allowed.numpy())):
                going = may[~np.isin(may, [v.end, v.eos])] if step < 120 else may
                tags, few = going[v.modalities[going] == 0], going[np.isin(going, small)]
                chosen = next((some for some in (few, tags if (step + row) % 5 else going, going) if len(some)), may)
                ids.append(int(chosen[(7919 * step + 31 * row) % len(chosen)]))
            state = grammar.advance(state, torch.tensor(ids))
            seen.update(np.array(ids, np.int64).tobytes())
    return seen.hexdigest()[:16]


def test_tokenizers_that_ship_have_the_fingerprints_and_files_that_they_had(shipped_tokenizers):
    for kind, tokenizer in shipped_tokenizers.items():
        files = sorted(tokenizer.files().items())
        assert (tokenizer.fingerprint[:16], digest(*(name.encode() + data for name, data in files))) == TOKENIZERS[kind]


@pytest.mark.parametrize("kinds", VOCABULARIES)
def test_ids_and_legal_ids_are_those_that_they_were(shipped_tokenizers, kinds):
    v = Vocabulary.build({kind: shipped_tokenizers[kind] for kind in kinds.split()})
    assert (digest(v.to_json()), digest(v.modalities.tobytes()), walk(v)) == VOCABULARIES[kinds]


def test_vocabularies_that_ship_are_written_as_they_are():
    for model in ("demos/starter", "demos/generate", "demos/prose", "demos/speech"):
        path = shipped(model) / "vocabulary.json"
        assert Vocabulary.load(path).to_json() == path.read_bytes()


def test_tokenizers_and_vocabularies_lie_in_the_home_of_the_user(tokenizers, vocabulary, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for kind, tokenizer in tokenizers.items():
        tokenizer.save(f"~/{kind}")
        assert load_tokenizer(f"~/{kind}").fingerprint == type(tokenizer).from_folder(f"~/{kind}").fingerprint == tokenizer.fingerprint
    assert TextTokenizer.from_file("~/text/tokenizer.model").size == tokenizers["text"].size
    vocabulary.save("~/vocabulary.json")
    assert Vocabulary.load("~/vocabulary.json").to_json() == (tmp_path / "vocabulary.json").read_bytes() == vocabulary.to_json()
    with pytest.raises(InputError, match="~nobody-of-this-name/text: found ~nobody-of-this-name, the home of no user here"):
        load_tokenizer("~nobody-of-this-name/text")


def test_every_class_that_is_registered_keeps_the_contract():
    assert list(MODALITIES) == ["text", "image", "audio"]
    for kind, modality in MODALITIES.items():
        for word in modality.tokenizers:
            cls = modality.tokenizer(word)
            assert not cls.__abstractmethods__ and cls.kind == kind
            assert issubclass(cls, MediaTokenizer) == (kind != "text")
        for name in ("read", "show", "picture", "controls", "sniff"):
            assert modality.get(name) is None or callable(modality.get(name)), (kind, name)


def test_every_medium_says_before_it_is_encoded_how_many_codes_it_has(tokenizers):
    random = np.random.default_rng(0)
    for kind, data in (("image", random.integers(0, 256, (20, 30, 3)).astype(np.uint8)), ("audio", random.normal(size=5000))):
        tokenizer = tokenizers[kind]
        medium = MODALITIES[kind].get("read")(tokenizer, data, kind)
        (encoding,) = tokenizer.embed_batch([medium])
        assert encoding.codes.shape == tokenizer.grid(medium) and encoding.features.shape[2] == tokenizer.feature_width
        assert (tokenizer.bands is None) == (MODALITIES[kind].layout == "grid")
        assert np.array_equal(tokenizer.encode(medium), encoding.codes) and encoding.codes.max() < np.prod(tokenizer.levels)
