"""Matrices that are laid out beforehand: the products that they give, who reads them, and what there is without them."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mmtx.config import DecoderConfig
from mmtx.inference import packed
from mmtx.inference.packed import PackedMatrix, PackedSwiGLU, has_operators
from mmtx.inference.torch_engine import TorchEngine
from mmtx.inference.weights import MANY, Layer, Weights, add_product, multiply
from mmtx.model import Decoder
from mmtx.sequence import Prompt

SIZES = {"width": 24, "depth": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp_dim": 40}
onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs a torch with oneDNN")


def random_decoder(**config) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(44, **{**SIZES, **config}))
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    return decoder.eval().requires_grad_(False)


@onednn
@pytest.mark.parametrize("count", [1, 2, 16, 100])
@pytest.mark.parametrize(("inputs", "outputs"), [(24, 40), (192, 576), (37, 5), (1, 1)])
def test_products_are_those_of_the_matrix(count, inputs, outputs):
    torch.manual_seed(0)
    matrix, x, other = torch.randn(inputs, outputs) / inputs ** 0.5, torch.randn(count, inputs), torch.randn(count, outputs)
    made, expected = PackedMatrix.of(matrix), x.double() @ matrix.double()
    close = lambda found, right: torch.testing.assert_close(found, right.float(), rtol=1e-4, atol=1e-4)
    close(made.product(x), expected)
    close(made.silu(x), F.silu(expected))
    close(made.product_times(x, other), expected * other)
    close(made.product_plus(x, other), expected + other)
    out = torch.full((count, outputs), 5.0)
    multiply(x, made, out)
    close(out, expected)
    add_product(out, x, made)
    close(out, 2 * expected)
    gates = torch.randn(inputs, 2 * outputs) / inputs ** 0.5
    gate, up = (x.double() @ gates.double()).chunk(2, 1)
    close(PackedSwiGLU.of(gates)(x), F.silu(gate) * up)


@onednn
@pytest.mark.parametrize("layout", ["rows", "columns", "part"])
def test_however_a_matrix_lies_its_copy_is_the_same(layout):
    matrix, x = torch.randn(24, 40), torch.randn(3, 24)
    given = {"rows": matrix, "columns": matrix.T.contiguous().T, "part": torch.cat([matrix, matrix], 1)[:, 40:]}[layout]
    made = PackedMatrix.of(given)
    given += 1                                                               # of a copy nothing changes
    torch.testing.assert_close(made.product(x), x @ (given - 1), rtol=1e-4, atol=1e-4)


@onednn
@pytest.mark.parametrize("shape", [{}, {"qk_norm": False, "qkv_bias": True}], ids=str)
@pytest.mark.parametrize(("lengths", "together"), [((70, 1, 40), 300), ((90,), 64)])    # the one prompt is read in pieces
def test_scores_are_those_of_full_passes(shape, lengths, together, monkeypatch):
    monkeypatch.setattr("mmtx.inference.torch_engine.TOKENS", together)
    decoder, rows = random_decoder(**shape), [torch.arange(length + 6) % 40 for length in lengths]
    weights, read = Weights.of(decoder, fixed=True), []
    for name in ("project", "finish"):
        of = getattr(Layer, name)
        monkeypatch.setattr(Layer, name, lambda layer, *given, of=of: read.append(type(layer.qkv)) or of(layer, *given))
    engine = TorchEngine(decoder, weights)
    engine.prefill([Prompt(row[:length].numpy()) for row, length in zip(rows, lengths, strict=True)])
    for new in range(6):
        for row, length, found in zip(rows, lengths, engine.scores(), strict=True):
            ids = row[:length + new]
            expected = decoder.logits(decoder(ids[None], torch.arange(len(ids))[None]))[0, -1]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        engine.step(torch.stack([row[length + new] for row, length in zip(rows, lengths, strict=True)]))
    assert set(read) == {PackedMatrix}


@onednn
def test_only_what_stays_and_pays_is_laid_out_twice(monkeypatch):
    decoder = random_decoder()
    fixed, small = Weights.of(decoder, fixed=True), Weights.of(decoder, fixed=True, load_in_8bit=True)
    assert fixed.layers_for(MANY - 1) is fixed.layers and fixed.layers_for(MANY) is fixed.batch_layers is fixed.packed
    assert fixed.step_layers is fixed.layers                                 # one row reads what lies as it did
    assert small.layers_for(MANY) is small.packed and small.batch_layers is small.step_layers
    assert Weights.of(decoder).packed is None                                # its values may change
    assert Weights.of(random_decoder().half(), fixed=True).packed is None
    fast = bool(torch.cpu.get_capabilities().get("avx512_bf16"))            # elsewhere oneDNN makes float32 of it in each product
    assert (Weights.of(random_decoder().bfloat16(), fixed=True).packed is not None) is fast
    assert Weights.of(random_decoder().to("meta"), fixed=True).packed is None
    numbers = sum(parameter.numel() for name, parameter in decoder.named_parameters()
                  if name.startswith("blocks") and parameter.dim() == 2)
    for room, expected in ((4 * numbers, True), (4 * numbers - 1, False)):
        monkeypatch.setattr("mmtx.inference.weights.LARGEST", room)
        assert (Weights.of(decoder, fixed=True).packed is not None) is expected


def gone(*_):
    raise AttributeError("no such operator")


def wrong(x, *given):
    return x.new_zeros(len(x), 2)


@pytest.mark.parametrize("other", [gone, wrong, lambda *_: None])
def test_without_the_operators_torch_multiplies(other, monkeypatch):
    decoder, found = random_decoder(), []
    for broken in (False, True):
        has_operators.cache_clear()
        if broken:
            monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", other)
            assert not has_operators()
        weights = Weights.of(decoder, fixed=True)
        assert not broken or weights.packed is None
        engine = TorchEngine(decoder, weights)
        engine.prefill([Prompt(np.arange(40)), Prompt(np.arange(30))])
        engine.step(torch.tensor([3, 4]))
        found.append(engine.scores())
    has_operators.cache_clear()
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)
    assert packed.LARGEST > 2 ** 27                                          # a decoder of 30 million numbers is laid out
