"""Matrices in 8 bits a weight: the numbers that they stand for, the ids that are written with them, who may ask for them."""

import copy
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import mmtx
from mmtx.cli import main
from mmtx.config import DecoderConfig
from mmtx.data.sample import Media
from mmtx.data.sources import scan
from mmtx.data.tokens import load_media
from mmtx.document import Document, Turn
from mmtx.errors import InputError
from mmtx.inference import int8
from mmtx.inference.choose import choose_engine
from mmtx.inference.int8 import Int8Matrix, has_kernel
from mmtx.inference.torch_engine import TorchEngine
from mmtx.inference.weights import Weights, add_product, multiply
from mmtx.medium import as_medium
from mmtx.model import Decoder
from mmtx.pipeline import Model
from mmtx.sequence import Prompt

ROOT = Path(__file__).parents[1]
STARTER = ROOT / "demos" / "data" / "starter"
sys.path.insert(0, str(ROOT / "benchmarks"))
from int8_agreement import SAME, agreement  # noqa: E402

MATRICES = ("qkv", "out", "gate_up", "down")


def numbers_of(matrix: Int8Matrix) -> torch.Tensor:
    """What the codes stand for (I, O), in float32."""
    return (matrix.codes.float() * matrix.scale.float()[:, None]).T


@pytest.fixture(params=[64, 192, 20], ids="{} inputs".format)
def matrix(request):
    """(I, O) with outputs of all sizes, one of zeros."""
    torch.manual_seed(0)
    return torch.randn(request.param, 7) * torch.tensor([1.0, 1e-3, 100.0, 0.3, 0.0, 1e-6, 2.0])


@pytest.fixture(params=["operator", "fallback"])
def way(request, monkeypatch):
    if request.param == "fallback":
        monkeypatch.setattr(int8, "has_kernel", lambda: False)
    return request.param


def test_each_output_has_a_scale_and_weights_are_the_nearest_codes(matrix):
    small = Int8Matrix.of(matrix)
    largest = matrix.abs().amax(0)
    assert small.codes.dtype == torch.int8 and small.codes.abs().max() <= 127
    # A half of a code, and of the largest code what rounding the scale to 8 bits takes.
    assert ((numbers_of(small) - matrix).abs() <= largest / 127 * (0.5 + 127 * 2 ** -8) * 1.001).all()
    assert ((numbers_of(small) - matrix).abs().mean(0) <= largest / 127 * 0.35).all()


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_products_are_those_of_the_numbers(matrix, rows, way):
    torch.manual_seed(1)
    small, x = Int8Matrix.of(matrix), torch.randn(rows, len(matrix))
    expected = x.bfloat16().float() @ numbers_of(small)
    out = torch.full((rows, 7), 5.0)
    multiply(x, small, out)
    close = {"rtol": 2 ** -7, "atol": float(2 ** -7 * expected.abs().max() * 1e-2)}
    torch.testing.assert_close(out, expected, **close)
    add_product(out, x, small)
    torch.testing.assert_close(out, 2 * expected, **close)


def test_torch_has_the_operator_that_reads_8_bits():
    assert has_kernel(), f"torch {torch.__version__} has another aten._weight_int8pack_mm: mend mmtx.inference.int8.Int8Matrix.product"
    schema = str(torch.ops.aten._weight_int8pack_mm.default._schema)
    assert schema == "aten::_weight_int8pack_mm(Tensor self, Tensor mat2, Tensor scales) -> Tensor"


def random_decoder(**config) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(44, **{"width": 64, "depth": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "mlp_dim": 128, **config}))
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3 if parameter.dim() == 1 else 0.12)
    return decoder.eval().requires_grad_(False)


@pytest.mark.parametrize("config", [{}, {"qk_norm": False, "qkv_bias": True}, {"width": 24}], ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_ids_are_written_with_8_bits_and_prompts_are_read_without(config, rows, way):
    decoder = random_decoder(**config)
    small = Weights.of(decoder, load_in_8bit=True)
    numbers = [layer._replace(**{name: numbers_of(getattr(layer, name)) for name in MATRICES}) for layer in small.step_layers]
    plain = Weights.of(decoder)
    prompts = [Prompt(np.arange(length)) for length in (9, 1, 20)[:rows]]
    engine, same, other = choose_engine(decoder, small, rows), TorchEngine(decoder, small._replace(step_layers=tuple(numbers))), \
        TorchEngine(decoder, plain)
    with torch.inference_mode():
        for each in (engine, same, other):
            each.prefill(prompts)
        assert torch.equal(engine.hidden, other.hidden)
        for step in range(12):
            ids = torch.arange(rows) + step
            for each in (engine, same, other):
                each.step(ids)
            assert not torch.equal(same.hidden, other.hidden)
            torch.testing.assert_close(engine.hidden, same.hidden, rtol=0, atol=0.04 * float(same.hidden.abs().max()))


@pytest.fixture(scope="module")
def starter():
    return mmtx.load(device="cpu")


@pytest.fixture(scope="module")
def asked(starter):
    """Prompts of 16 pictures and 16 notes that the model that ships has not seen."""
    media = []
    for name in ("images-test-unseen-style", "sounds-test-unseen-notes"):
        for _, sample in zip(range(16), scan(str(STARTER / f"{name}.tar.gz")), strict=False):
            media += [part for turn in sample.turns for part in turn.parts if isinstance(part, Media)][:1]
    return [Document((Turn("user", (part,)),)) for part in starter.encode_parts(
        [as_medium(load_media(medium, starter.tokenizers)) for medium in media])]


def test_the_model_that_ships_writes_the_same_ids(starter, asked):
    for batch in (8, 1):
        same, steps = agreement(starter, asked[::1 if batch == 8 else 4], batch=batch)
        assert steps > 20 and same >= SAME * steps


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"])
def test_a_copy_has_8_bits_too(tiny_model, copied):
    for bits in (False, True):
        model = Model(copy.deepcopy(tiny_model.decoder), tiny_model.vocabulary, tiny_model.tokenizers).prepare_for_inference(bits)
        assert copied(model)._weights.in_8_bits is bits


def test_the_decoder_stays_as_it_is(tiny_model, tmp_path):
    tiny_model.save(tmp_path / "model")
    mmtx.load(tmp_path / "model", "cpu", load_in_8bit=True).save(tmp_path / "again")
    for path in (tmp_path / "model").rglob("*"):
        assert path.is_dir() or path.read_bytes() == (tmp_path / "again" / path.relative_to(tmp_path / "model")).read_bytes()


def test_another_device_than_a_cpu_is_refused(tiny_model):
    model = Model(copy.deepcopy(tiny_model.decoder).to("meta"), tiny_model.vocabulary, tiny_model.tokenizers)
    with pytest.raises(InputError, match="^load_in_8bit: found the device meta, expected cpu$"):
        model.prepare_for_inference(load_in_8bit=True)


def test_the_command_takes_8_bits(tmp_path, capsys, monkeypatch):
    loaded = []
    before = Model.prepare_for_inference
    monkeypatch.setattr(Model, "prepare_for_inference", lambda model, bits=False: loaded.append(bits) or before(model, bits))
    picture = str(ROOT / "demos" / "examples" / next(path.name for path in sorted((ROOT / "demos" / "examples").iterdir())
                                                    if path.suffix in (".png", ".jpg", ".webp")))
    main(["caption", "--device", "cpu", picture])
    plain = capsys.readouterr().out
    main(["caption", "--device", "cpu", "--load_in_8bit", picture])
    assert capsys.readouterr().out == plain and loaded == [False, True]


@pytest.mark.parametrize("option, what", [(["--load_in_8bit"], "weights"), (["--dtype", "bfloat16"], "weights"), (["--device", "cuda"], "device")],
                         ids=str)
def test_a_server_chooses_its_weights_itself(option, what, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["caption", "--server", "http://127.0.0.1:9", *option, str(ROOT / "README.md")])
    assert stop.value.code == 2
    told = capsys.readouterr().err.strip()
    assert told.endswith(f"{option[0]}: found with --server, which chooses its {what} itself") and "\n" not in told
