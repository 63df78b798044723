"""Files of models, tokenizers and shards that are damaged or hostile: right, or refused in one short line that says where."""

import copy
import inspect
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import fuzz_files
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

import mmtx
import mmtx.weights
from mmtx import config
from mmtx.data.collection import DataSource
from mmtx.data.prepared import tensors
from mmtx.errors import InputError
from mmtx.modality.audio import AudioConfig, AudioTokenizer
from mmtx.modality.autoencoder import NetworkConfig
from mmtx.modality.base import load_tokenizer
from mmtx.modality.encoder import build_encoder
from mmtx.modality.image import ImageConfig, ImageTokenizer
from mmtx.modality.registry import Modality, register
from mmtx.modality.text import TextTokenizer, read_pieces
from mmtx.modality.vocoder import VocoderConfig
from mmtx.model import Decoder
from mmtx.schema import build, typed
from mmtx.training.adapters import LoRA
from mmtx.training.codec import CodecModule, ImageCodecModule
from mmtx.training.codec_data import CodecData
from mmtx.training.ctc import CTCConfig
from mmtx.training.decoder import DecoderModule, LossWeights
from mmtx.training.decoder_data import DecoderData, TokenizerFolders
from mmtx.training.discriminator import AdversarialConfig
from mmtx.training.optimizer import OptimizerConfig
from mmtx.vocabulary import Vocabulary
from mmtx.weights import DTYPES, load_module, to_bytes

STARTER = Path(__file__).parents[1] / "demos" / "starter"


def told(error: pytest.ExceptionInfo, folder: Path) -> str:
    """A message without the folder's name; it is one short line."""
    text = str(error.value).replace(str(folder), "")
    assert "\n" not in text and len(text) <= 300, text
    return text


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of each target of the fuzzer."""
    folder = tmp_path_factory.mktemp("made")
    for name, target in fuzz_files.TARGETS.items():
        target.make(folder / name)
    return folder


@pytest.fixture
def fresh(made, tmp_path):
    """A copy of one of them."""
    def copied(name: str) -> Path:
        tensors.cache_clear()
        return Path(shutil.copytree(made / name, tmp_path / name))
    return copied


@pytest.mark.parametrize("name", fuzz_files.TARGETS)
@pytest.mark.filterwarnings("ignore:At least one mel filterbank")
def test_damaged_files_are_refused_or_right(name, tmp_path):
    found = fuzz_files.fuzz(name, tmp_path / name, 60 if name in ("model", "audio") else 150)
    assert not [outcome for outcome in found if outcome.startswith("!")], found
    assert found["refused"] > 0.7 * sum(found.values())


def test_shipped_folders_load_as_they_are():
    assert mmtx.load(STARTER, device="cpu").tokenizers.keys() == {"text", "image", "audio"}
    for kind in ("text", "image", "audio"):
        load_tokenizer(STARTER.parents[1] / "tokenizers" / kind)


# -- Values --------------------------------------------------------------------------------------------------


@dataclass
class Inner:
    size: int


@dataclass
class Outer:
    whole: int = 1
    real: float = 1.0
    flag: bool = True
    word: str = "a"
    choice: Literal["x", "y"] = "x"
    some: int | None = None
    row: tuple[int, ...] = ()
    inner: Inner | None = None
    rest: dict[str, int] | None = None


WHOLE = {"whole": 1, "real": 1.0, "flag": True, "word": "a", "choice": "x", "some": None, "row": [], "inner": None, "rest": None}


@pytest.mark.parametrize("change, right", [
    ({"whole": 3}, 3), ({"real": 2}, 2), ({"real": -0.5}, -0.5), ({"some": 4}, 4), ({"row": [1, 2]}, (1, 2)),
    ({"inner": {"size": 5}}, Inner(5)), ({"rest": {"a": 1}}, {"a": 1}), ({"choice": "y"}, "y"),
])
def test_right_values_are_kept(change, right):
    found = build(Outer, {**WHOLE, **change}, "x.json")
    assert getattr(found, next(iter(change))) == right and type(getattr(found, next(iter(change)))) is type(right)


@pytest.mark.parametrize("change", [
    {"whole": True}, {"whole": 1.0}, {"whole": "1"}, {"whole": None}, {"whole": 2**63}, {"whole": [1]}, {"real": True},
    {"real": float("nan")}, {"real": float("inf")}, {"real": 10**400}, {"real": "1"}, {"flag": 1}, {"flag": "true"},
    {"word": 1}, {"word": None}, {"choice": "z"}, {"choice": ["x"]}, {"some": 1.5}, {"row": 3}, {"row": [1, "2"]},
    {"row": {"0": 1}}, {"row": [[1]]}, {"inner": []}, {"inner": {"size": "5"}}, {"inner": {}}, {"inner": {"size": 1, "more": 2}},
    {"rest": {"a": "1"}}, {"rest": [1]}, {"more\x1b": 1},
])
def test_wrong_values_are_named(change):
    with pytest.raises(InputError, match=f"x.json: .*{next(iter(change))[:4]}") as error:
        build(Outer, {**WHOLE, **change}, "x.json")
    assert len(str(error.value)) < 300 and str(error.value).isprintable()


def test_fields_that_are_missing_are_named():
    with pytest.raises(InputError, match="x.json: found no field 'a.flag'"):
        build(Outer, {name: value for name, value in WHOLE.items() if name != "flag"}, "x.json", "a")
    assert build(Outer, {name: value for name, value in WHOLE.items() if name != "flag"}, "x.json", optional=("flag",)).flag
    for value in (None, [], 3, "x"):
        with pytest.raises(InputError, match="x.json: found .*expected an object"):
            build(Outer, value, "x.json")


def leaves(value: Any, at: tuple = ()) -> list[tuple]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, inner in items for path in (leaves(inner, (*at, key)) or [(*at, key)])]


ABSURD = (10**9, 2**62, 10**30, -1, "x", None, [], {}, float("nan"), True)


@pytest.mark.parametrize("name", ["config.json", "vocabulary.json", "image/config.json", "audio/config.json"])
@pytest.mark.filterwarnings("ignore:At least one mel filterbank")
def test_no_value_of_a_config_builds_more_than_its_file(fresh, name, monkeypatch):
    folder = fresh("model")
    path = folder / name
    right, largest = json.loads(path.read_text()), 0
    for factory in ("empty", "zeros", "full", "randn", "ones"):
        def spy(*sizes, real=getattr(torch, factory), **options):
            nonlocal largest
            largest = max(largest, (made := real(*sizes, **options)).numel())
            return made
        monkeypatch.setattr(torch.nn.modules.linear.torch, factory, spy)
    for at in leaves(right):
        for value in ABSURD:
            wrong = inside = copy.deepcopy(right)
            for key in at[:-1]:
                inside = inside[key]
            if inside[at[-1]] is value:
                continue
            inside[at[-1]] = value
            path.write_text(json.dumps(wrong))
            if at[-1] == "rope_theta" and value == 10**9 or at[-1] in ("side", "bands", "levels", "features", "vocoder") and value is None:
                continue  # right by itself; the fingerprint is another test's
            with pytest.raises(InputError) as error:
                mmtx.load(folder, device="cpu")
            told(error, folder)
    assert largest < 2**22


@pytest.mark.parametrize("name, field, value", [
    ("config.json", "mlp_dim", 2**20), ("config.json", "depth", 2**12),
])
def test_a_network_larger_than_its_file_is_not_begun(fresh, name, field, value):
    folder = fresh("model")
    values = json.loads((folder / name).read_text())
    values.get("decoder", values)[field] = value
    (folder / name).write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"model.safetensors: does not fit config.json: found \d+ tensors of \d+ numbers, "
                                         "expected more"):
        mmtx.load(folder, device="cpu")


# -- Weights -------------------------------------------------------------------------------------------------


def rewritten(path: Path, edit: Callable[[dict], Any], digest: bool = False) -> None:
    weights = safetensors.torch.load_file(path)
    edit(weights)
    path.write_bytes(to_bytes(weights) if digest else safetensors.torch.save(weights))


@pytest.mark.parametrize("edit, message", [
    (lambda w: w["norm.weight"].fill_(float("nan")), "tensor 'norm.weight' holds values that are not finite"),
    (lambda w: w["embedding.weight"][3].fill_(float("-inf")), "tensor 'embedding.weight' holds values that are not finite"),
    (lambda w: w.update({"norm.weight": w["norm.weight"].double() * 1e300}), "'norm.weight' holds values that are not finite"),
    (lambda w: w.pop("norm.weight"), "does not fit config.json: found no tensor 'norm.weight', expected one"),
    (lambda w: w.update(extra=torch.zeros(2)), "does not fit config.json: found a tensor 'extra', expected none"),
    (lambda w: w.update({"norm.weight": torch.ones(17)}), r"tensor 'norm.weight' is F32 '\(17,\)', expected floats \(16,\)"),
    (lambda w: w.update({"norm.weight": torch.ones(16, dtype=torch.int32)}), "tensor 'norm.weight' is I32 .*expected torch.float32"),
    (lambda w: w.clear(), "found 0 tensors of 0 numbers|found no tensor"),
])
def test_weights_that_do_not_fit_are_named(fresh, edit, message):
    folder = fresh("model")
    rewritten(folder / "model.safetensors", edit)
    with pytest.raises(InputError, match=f"model.safetensors: .*{message}") as error:
        mmtx.load(folder, device="cpu")
    told(error, folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_of_every_size_load_as_float32(fresh, dtype):
    folder = fresh("model")
    right = mmtx.load(folder, device="cpu").decoder.norm.weight
    rewritten(folder / "model.safetensors", lambda w: w.update({name: value.to(dtype) for name, value in w.items()}), digest=True)
    found = mmtx.load(folder, device="cpu").decoder.norm.weight
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, right.to(dtype).float())


def test_files_are_those_of_safetensors_whatever_their_types():
    weights = {f"{name}.ä\"{number}": torch.arange(6, dtype=torch.float32).reshape(size).to(dtype) for number, (name, dtype, size) in
               enumerate((name, dtype, size) for name in "ba" for dtype in DTYPES for size in ((2, 3), (6,), (3, 2, 1)))}
    weights |= {"none": torch.empty(0, 4), "one": torch.tensor(2.0), "turned": torch.arange(6.0).reshape(2, 3).T}
    library = {name: tensor.contiguous() for name, tensor in weights.items()}
    found = to_bytes(weights)
    described = json.loads(found[8:8 + int.from_bytes(found[:8], "little")])
    assert found == safetensors.torch.save(library, described["__metadata__"])


@pytest.mark.parametrize("piece", [8, 24, 2**24])
def test_weights_are_read_piece_by_piece_in_the_type_of_the_network(fresh, piece, monkeypatch):
    folder = fresh("model")
    expected = mmtx.load(folder, device="cpu").decoder
    monkeypatch.setattr(mmtx.weights, "PIECE", piece)
    seen = []

    def loaded(module, name):
        seen.append(name)
        assert all(tensor.is_meta for other, tensor in module.state_dict().items() if other not in seen)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = load_module(lambda: Decoder(expected.config, build_encoder), folder / "model.safetensors", loaded)
    finally:
        torch.set_default_dtype(default)
    assert seen == sorted(found.state_dict()) and {tensor.dtype for tensor in found.state_dict().values()} == {torch.bfloat16}
    assert all(torch.equal(tensor.bfloat16(), found.state_dict()[name]) for name, tensor in expected.state_dict().items())
    assert all(parameter.requires_grad for parameter in found.parameters())


@pytest.mark.parametrize("name", ["model.safetensors", "image/model.safetensors", "audio/model.safetensors",
                                  "audio/vocoder.safetensors"])
def test_one_bit_of_any_weight_is_noticed(fresh, name):
    folder = fresh("model")
    data = bytearray((folder / name).read_bytes())
    data[-3] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(InputError, match=f"{name}: its checksum does not fit: it has changed since it was written"):
        mmtx.load(folder, device="cpu")


def header(path: Path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


@pytest.mark.parametrize("edit", [
    lambda h: h["norm.weight"].update(data_offsets=[0, 2**40]),
    lambda h: h["norm.weight"].update(data_offsets=[64, 0]),
    lambda h: h["norm.weight"].update(data_offsets=[-64, 0]),
    lambda h: h["norm.weight"].update(data_offsets=[0, 64, 128]),
    lambda h: h["norm.weight"].update(shape=[2**62, 4]),
    lambda h: h["norm.weight"].update(shape="16"),
    lambda h: h["norm.weight"].update(dtype="F7"),
    lambda h: h["norm.weight"].update(dtype=["F32"]),
    lambda h: h.update({"norm.weight": None}),
    lambda h: h.update({"again": h["norm.weight"]}),
    lambda h: h.update({"__metadata__": [1]}),
])
def test_headers_that_lie_are_refused(fresh, edit):
    folder = fresh("model")
    path = folder / "model.safetensors"
    values, data = header(path)
    edit(values)
    text = json.dumps(values).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    with pytest.raises(InputError, match="model.safetensors: ") as error:
        mmtx.load(folder, device="cpu")
    told(error, folder)


@pytest.mark.parametrize("data", [b"", b"\0" * 9, b"\xff" * 8 + b"{}", b"PK\x03\x04" * 9, b"\x80\x02ccollections\n", b"\2" + bytes(7) + b"[]"])
def test_files_that_are_no_safetensors_are_refused(fresh, data):
    folder = fresh("model")
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(InputError, match="model.safetensors: not a safetensors file") as error:
        mmtx.load(folder, device="cpu")
    told(error, folder)


def test_a_pickle_is_refused_by_name(fresh):
    folder = fresh("model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="model.safetensors: no such file; found pytorch_model.bin, a pickle"):
        mmtx.load(folder, device="cpu")


def test_loading_draws_no_random_numbers(fresh):
    folder = fresh("model")
    before = torch.get_rng_state()
    mmtx.load(folder, device="cpu")
    assert torch.equal(before, torch.get_rng_state())


# -- Folders that are something else -------------------------------------------------------------------------


def test_folders_that_hold_a_model_elsewhere(fresh, tmp_path):
    folder = fresh("model")
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    folder.rename(run / "model")
    (run / "step-1.ckpt").write_bytes(b"")
    for path, message in ((run, f"did you mean {run}/model"), (run / "checkpoints", f"did you mean {run}/model"),
                          (run / "step-1.ckpt", "found a file, expected the folder of a model"),
                          (run / "model" / "text", "found a tokenizer, expected a model"),
                          (run / "a\0b", "no such folder")):
        with pytest.raises(InputError, match=re.escape(message)) as error:
            mmtx.load(path, device="cpu")
        told(error, tmp_path)
    with pytest.raises(InputError, match=re.escape(f"found a model, expected a tokenizer, as in {run}/model/text")):
        load_tokenizer(run / "model")


# -- Text ----------------------------------------------------------------------------------------------------


def test_pieces_are_those_of_the_library():
    tokenizer = TextTokenizer.train(["a red circle", "東京 é"], 300)
    model, pieces = tokenizer._model, read_pieces(tokenizer.model_proto, "x")
    assert [piece.text for piece in pieces] == [model.id_to_piece(i) for i in range(model.vocab_size())]
    assert [piece.type == 6 for piece in pieces] == [model.is_byte(i) for i in range(model.vocab_size())]
    assert [piece.type == 2 for piece in pieces] == [model.is_unknown(i) for i in range(model.vocab_size())]


def piece(text: bytes, score: bytes = bytes(4), kind: int = 1) -> bytes:
    inner = b"\n" + bytes([len(text)]) + text + b"\x15" + score + b"\x18" + bytes([kind])
    return b"\n" + bytes([len(inner)]) + inner


@pytest.mark.parametrize("more", [
    piece(b"\xff\xfe"), piece(b""), piece(b"a\0"), piece(b"zz", b"\0\0\xc0\x7f"), piece(b"zz", b"\0\0\x80\x7f"),
    piece(b"zz", kind=9), piece(b"<0xZZ>", kind=6), piece(b"<0x41>", kind=6), piece(b"<unk>", kind=2), b"\n\xff\xff\xff\xff\x0f",
    b"\n\x05ab", b"\xff" * 12, b"\x0b", b"\x08\x01", b"\x1a\x7f",
], ids=repr)
def test_pieces_that_are_none_are_one_line(more, tmp_path):
    good = TextTokenizer.train(["a red circle"], 280).model_proto
    with pytest.raises(InputError, match="x.model: not a SentencePiece model|x.model: found") as error:
        TextTokenizer(good + more, "x.model")
    told(error, tmp_path)


# -- Prepared ------------------------------------------------------------------------------------------------


def shard_of(folder: Path, edit: Callable[[dict], Any], name: str = "shard-00000.safetensors") -> None:
    """A shard with other tensors and the digest of the old ones."""
    values, _ = header(folder / name)
    made = safetensors.numpy.load_file(folder / name)
    edit(made)
    (folder / name).write_bytes(safetensors.numpy.save(made, values.get("__metadata__")))


def whole(folder: Path) -> None:
    """Make the sizes in the index those of the files."""
    index = safetensors.numpy.load_file(folder / "index.safetensors")
    index["sizes"] = np.array([path.stat().st_size for path in sorted(folder.glob("shard-*"))], np.uint64)
    (folder / "index.safetensors").write_bytes(safetensors.numpy.save(index))


@pytest.mark.parametrize("edit, message", [
    (lambda m: m["ids"].__setitem__(5, 7), "its checksum does not fit"),
    (lambda m: m["features.image"].__setitem__((0, 0), 7), "its checksum does not fit"),
    (lambda m: m["names"].__setitem__(0, 7), "its checksum does not fit"),
    (lambda m: m["ids"].__setitem__(5, 60_000), "found id 60000, expected less than"),
    (lambda m: m["ends.ids"].__setitem__(1, 3), "its documents are not as long as index.safetensors says"),
    (lambda m: m["ends.ids"].__setitem__(1, 2**63), "'ends.ids' are not the offsets"),
    (lambda m: m["ends.names"].__setitem__(-1, 2**40), "'ends.names' are not the offsets"),
    (lambda m: m["ends.image"].__setitem__(1, 3), r"found \d+ features of image, expected one for each"),
    (lambda m: m["numbers"].__setitem__(0, 9), "its documents have other numbers"),
    (lambda m: m.update({"features.image": m["features.image"][:, :8].copy()}), "'features.image' is float16 .*expected float16"),
    (lambda m: m.update(ids=m["ids"].astype(np.uint8)), "'ids' is uint8 .*expected uint16 or uint32"),
    (lambda m: m.pop("names"), "found the tensors"),
])
def test_shards_that_changed_are_named(fresh, edit, message):
    folder = fresh("prepared")
    shard_of(folder, edit)
    whole(folder)
    with pytest.raises(InputError, match=f"prepared/shard-00000.safetensors: .*{message}") as error:
        fuzz_files.read_prepared(folder)
    told(error, folder.parent)


def test_shards_that_changed_places_are_refused(fresh):
    folder = fresh("prepared")
    (folder / "shard-00000.safetensors").rename(folder / "x")
    (folder / "shard-00001.safetensors").rename(folder / "shard-00000.safetensors")
    (folder / "x").rename(folder / "shard-00001.safetensors")
    whole(folder)
    with pytest.raises(InputError, match="prepared: found shards of the checksum .* changed or replaced"):
        fuzz_files.read_prepared(folder)


@pytest.mark.parametrize("edit, message", [
    (lambda i: i["starts"].__setitem__(1, 100), "'starts' are not the offsets"),
    (lambda i: i["starts"].__setitem__(-1, 2**63), "'starts' are not the offsets"),
    (lambda i: i["lengths"].__setitem__(0, 0), "expected .*and 1 or more"),
    (lambda i: i["lengths"].__setitem__(0, 5), r"found \d+ tokens, expected \d+"),
    (lambda i: i["numbers"].__setitem__(0, 5), "'numbers' of samples do not ascend"),
    (lambda i: i["numbers"].__setitem__(-1, 2**32 - 1), "'numbers' of samples do not ascend, or are not all below"),
    (lambda i: i.update(starts=i["starts"][:-1].copy()), "'starts' is uint64 .*expected"),
    (lambda i: i.update(lengths=i["lengths"].astype(np.float16)), "'lengths' is float16"),
    (lambda i: i.pop("sizes"), "found the tensors .lengths, numbers, starts"),
])
def test_an_index_that_does_not_fit_is_named(fresh, edit, message):
    folder = fresh("prepared")
    shard_of(folder, edit, "index.safetensors")
    with pytest.raises(InputError, match=f"prepared/index.safetensors: .*{message}") as error:
        fuzz_files.read_prepared(folder)
    told(error, folder.parent)


@pytest.mark.parametrize("name, value, message", [
    ("format", True, "format 1"), ("samples", "9", "'samples' is '9'"), ("samples", -1, "samples: found -1"),
    ("documents", 10**15, "documents: found"), ("shards", 10**9, "'starts'"), ("media", [], "'media' is list"),
    ("features", {"image": "16"}, "'features.image' is '16'"), ("exchanges", 1, "'exchanges' is 1"), ("sha256", None, "'sha256'"),
    ("vocabulary", {}, "field 'vocabulary': found no field 'format'"),
])
def test_facts_that_are_none_are_named(fresh, name, value, message):
    folder = fresh("prepared")
    facts = json.loads((folder / "prepared.json").read_text())
    (folder / "prepared.json").write_text(json.dumps({**facts, name: value}))
    with pytest.raises(InputError, match=f"prepared/.*{message}") as error:
        fuzz_files.read_prepared(folder)
    told(error, folder.parent)


def test_a_shard_is_compared_once(fresh, monkeypatch):
    import mmtx.data.prepared as module

    folder, counted = fresh("prepared"), []
    real = module.digest
    monkeypatch.setattr(module, "digest", lambda made: (counted.append(1), real(made))[1])
    fuzz_files.read_prepared(folder)
    assert len(counted) == 2 * 3  # three shards, two sources


# -- Arguments of programs -----------------------------------------------------------------------------------

SMALL = ImageConfig(patch=8, side=16, network=NetworkConfig(width=16, heads=1, encoder_depth=0, decoder_depth=0, levels=(4, 4)))
SOURCES = [DataSource("x")]
# Functions and classes of the Python API, each with arguments that it takes.
CALLS: dict[Callable, dict[str, Any]] = {
    config.DecoderConfig: {}, config.RopeScaling: {"factor": 2.0}, config.CodeRange: {"start": 0, "levels": (2,)},
    config.EncoderConfig: {"patch": 12, "width": 16, "heads": 1, "depth": 1, "chunk": 4}, ImageConfig: {}, AudioConfig: {}, NetworkConfig: {},
    VocoderConfig: {}, OptimizerConfig: {}, LoRA: {}, LossWeights: {}, CTCConfig: {"blocks": 1}, AdversarialConfig: {},
    DataSource: {"paths": ["x"]}, TokenizerFolders: {"text": "x"}, Modality: {"kind": "smell", "layout": "grid", "tokenizers": {}},
    DecoderData: {"tokenizers": TokenizerFolders("tokenizers/text"), "train": SOURCES, "validation": SOURCES},
    CodecData: {"train": SOURCES, "validation": SOURCES}, DecoderModule: {"decoder": config.DecoderConfig()},
    ImageCodecModule: {"tokenizer": SMALL}, CodecModule: {"tokenizer": ImageTokenizer(SMALL)}, ImageTokenizer: {"config": SMALL}, AudioTokenizer: {}, ImageTokenizer(SMALL).at: {"side": 16},
    TextTokenizer.train: {"texts": ["a b"], "size": 300}, load_tokenizer: {"folder": "tokenizers/text"}, register: {}, mmtx.load_plugin: {},
    Vocabulary.load: {"path": STARTER / "vocabulary.json"}, mmtx.Model: {"decoder": None, "vocabulary": None, "tokenizers": {}},
    mmtx.Medium: {"kind": "image", "data": 1}, mmtx.read: {"path": "x"},
}
OTHERS = (None, 3, -1, 3.5, float("nan"), 10**400, True, "x", b"x", {}, {"x": 1}, [], ["x"], (1, 2), object(), np.zeros(3), torch.zeros(2, 2), int)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__qualname__)
def test_an_argument_of_another_type_is_one_line(call):
    refused = 0
    for name in inspect.signature(call).parameters.keys() - {"args", "options"}:
        for other in OTHERS:
            try:
                call(**{**CALLS[call], name: other})
            except InputError as error:
                refused += 1
                assert "\n" not in str(error) and "expected" in str(error) or "cannot" in str(error) or "no such" in str(error), error
    assert refused > 8


def test_an_argument_is_named_with_what_was_expected():
    for call, told in (
        (lambda: ImageTokenizer(SMALL).at("x"), "ImageTokenizer.at: side: found 'x', expected a whole number or None"),
        (lambda: config.DecoderConfig(width=3.5), "DecoderConfig: width: found 3.5, expected a whole number"),
        (lambda: NetworkConfig(levels=["8"]), "NetworkConfig: levels[0]: found '8', expected a whole number"),
        (lambda: DecoderData({"imagee": "x"}, [], []), "DecoderData: tokenizers: missing a required argument: 'text', expected text"),
        (lambda: TokenizerFolders("x", image=3), "TokenizerFolders: image: found 3, expected a string or None"),
        (lambda: DecoderModule("small"), "DecoderModule: decoder: found 'small', expected DecoderConfig"),
        (lambda: TextTokenizer.train("a b", 300), "TextTokenizer.train: texts: found 'a b', expected Iterable"),
        (lambda: load_tokenizer(3), "load_tokenizer: folder: found 3, expected a string or a path"),
    ):
        with pytest.raises(InputError, match=f"^{re.escape(told)}"):
            call()


def test_what_stands_for_another_type_becomes_it(tmp_path):
    made = config.DecoderConfig(7, np.int64(96), rope_theta=np.float32(2), composed=[{"start": 1, "levels": [2, 3]}],
                                features={"image": np.uint8(8)}, encoders={"image": {"patch": 12, "width": 8, "heads": 1, "depth": 1, "chunk": 4}})
    assert made == config.DecoderConfig(7, 96, rope_theta=2.0, composed=(config.CodeRange(1, (2, 3)),), features={"image": 8},
                                        encoders={"image": config.EncoderConfig(12, 8, 1, 1, 4)})
    assert [type(value) for value in (made.width, made.rope_theta, made.features["image"], made.composed)] == [int, float, int, tuple]
    assert TokenizerFolders(tmp_path).text == str(tmp_path)
    assert DecoderModule({"width": 32, "heads": 1, "kv_heads": 1}).config.width == 32
    given = {kind: str(Path(__file__).parents[1] / "tokenizers" / kind) for kind in ("text", "image")}
    assert [*DecoderData(given, [], []).tokenizers] == ["text", "image"]


def test_a_checked_function_keeps_its_signature_and_the_errors_of_python():
    @typed
    def named(a: int, *rest: int, b: str | Path = "c", **more: int) -> tuple:
        """Documented."""
        return a, rest, b, more

    assert named(1, 2, b=Path("x"), d="not checked") == (1, (2,), "x", {"d": "not checked"})
    assert (named.__name__, named.__doc__, str(inspect.signature(named))[:8]) == ("named", "Documented.", "(a: int,")
    with pytest.raises(TypeError, match=r"named\(\) missing 1 required positional argument: 'a'"):
        named()
    with pytest.raises(TypeError, match=r"__init__\(\) got an unexpected keyword argument 'widht'"):
        config.DecoderConfig(widht=3)
