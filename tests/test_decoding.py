"""Decoding with a cache against full passes of the decoder: any lengths, any order of rows, any shape of the network."""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from mmtx.decoding import ROOM, Weights, prefill, step
from mmtx.model import CodeRange, Decoder, DecoderConfig
from mmtx.row import FEW_ROWS, SHORT, Row, Screen, lay_out

SIZES = {"width": 24, "depth": 2, "heads": 4, "kv_heads": 2, "head_width": 8, "hidden": 32}
COMPOSED = (CodeRange(10, (4, 3, 2)), CodeRange(34, (5, 2)))  # of 44 ids, 10 have rows of their own
SHAPES = [{}, {"composed": COMPOSED}, {"composed": COMPOSED, "tied": False}, {"kv_heads": 4}, {"kv_heads": 1},
          {"depth": 1}, {"norm_eps": 1e-1}, {"rope_theta": 50.0}]
onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs a torch with oneDNN")
LENGTHS = (9, 1, 4, 17)
NEW = 8


def random_decoder(**config) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(44, **{**SIZES, **config}))
    for parameter in decoder.parameters():  # norms too: at 1 a mix-up of two of them would not show
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    return decoder.eval().requires_grad_(False)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def rows() -> list[torch.Tensor]:
    """Prompts of LENGTHS ids, and NEW ids behind each."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 44, (length + NEW,), generator=generator) for length in LENGTHS]


def full(decoder: Decoder, ids: torch.Tensor) -> torch.Tensor:
    """Scores (V,) behind the last of some ids."""
    return decoder.logits(decoder(ids[None], torch.arange(len(ids))[None]))[0, -1]


def begin(decoder: Decoder, rows: list[torch.Tensor], room: int = ROOM):
    lengths = torch.tensor([len(row) - NEW for row in rows])
    ids = torch.full((len(rows), int(lengths.max())), 43)
    for row, length, given in zip(ids, lengths, rows, strict=True):
        row[:length] = given[:length]
    weights = Weights.of(decoder)
    return weights, *prefill(weights, decoder.embed(ids), lengths, room)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("together", [1, 3, 4], ids="{} rows together".format)
def test_scores_are_those_of_full_passes(rows, shape, together, monkeypatch):
    monkeypatch.setattr("mmtx.decoding.TOKENS", together * max(LENGTHS))
    decoder = random_decoder(**shape)
    weights, hidden, cache = begin(decoder, rows)
    for new in range(NEW):
        scores = weights.scores(hidden)
        assert scores.std() > 0.1
        for row, length, found in zip(rows, LENGTHS, scores, strict=True):
            assert torch.allclose(found, full(decoder, row[:length + new]), atol=1e-4)
        ids = torch.stack([row[length + new] for row, length in zip(rows, LENGTHS, strict=True)])
        hidden = step(weights, decoder.embedding(ids), cache)


@pytest.mark.parametrize("first", [1, 10, 11, 44])
@pytest.mark.parametrize("tied", [True, False])
def test_scores_of_the_first_ids_are_those_of_all(rows, first, tied):
    decoder = random_decoder(composed=COMPOSED, tied=tied)
    weights, hidden, _ = begin(decoder, rows)
    scores = weights.scores(hidden, first)
    assert scores.shape[1] in (first, 44)
    assert torch.allclose(scores[:, :first], decoder.logits(hidden)[:, :first], atol=1e-5)


@pytest.mark.parametrize("kept", [[0, 2], [3], [1, 2, 3], [0, 1, 2, 3]])
def test_rows_that_are_kept_go_on_as_before(rows, kept):
    decoder = random_decoder()
    weights, hidden, cache = begin(decoder, rows)
    step(weights, decoder.embedding(torch.stack([row[length] for row, length in zip(rows, LENGTHS)])), cache)
    cache, left = cache.keep(torch.tensor(kept)), [(rows[i], LENGTHS[i]) for i in kept]
    for new in range(1, NEW):
        hidden = step(weights, decoder.embedding(torch.stack([row[length + new] for row, length in left])), cache)
        for (row, length), found in zip(left, weights.scores(hidden), strict=True):
            assert torch.allclose(found, full(decoder, row[:length + new + 1]), atol=1e-4)


@pytest.fixture(scope="module")
def expected(rows):
    """Hidden states (NEW, D) behind each new id of each row, by full passes of a decoder alone."""
    decoder = random_decoder()
    return [decoder(row[None], torch.arange(len(row))[None])[0, length:] for row, length in zip(rows, LENGTHS, strict=True)]


@pytest.mark.parametrize("moment", range(NEW))
@pytest.mark.parametrize("engine", [step, Row], ids=["torch", "one row"])
def test_rows_that_are_left_at_any_moment_go_on_as_in_full_passes(rows, expected, moment, engine):
    decoder = random_decoder()
    subsets = [list(kept) for count in (1, 2, 3) for kept in itertools.combinations(range(4), count)]
    for first in subsets:
        # Later, of those that are left, each alone.
        for later, last in [(NEW, first)] if len(first) == 1 else [(moment + 2, [row]) for row in first]:
            weights, _, cache = begin(decoder, rows)
            left, alone = list(range(4)), None
            for new in range(NEW):
                for when, kept in ((moment, first), (later, last)):
                    if new == when:
                        cache.keep(torch.tensor([left.index(row) for row in kept]))
                        left = kept
                if engine is Row and len(left) == 1 and alone is None:
                    alone = Row(weights, cache)
                inputs = decoder.embedding(torch.stack([rows[row][LENGTHS[row] + new] for row in left]))
                hidden = step(weights, inputs, cache) if alone is None else alone.step(inputs)
                for row, found in zip(left, hidden, strict=True):
                    assert (found - expected[row][new]).abs().max() < 1e-5


@pytest.mark.parametrize("room", [0, 1, 3])
@pytest.mark.parametrize("kept", [[0, 1, 2, 3], [0, 2], [0]])
def test_a_cache_grows_when_it_is_full(rows, room, kept):
    decoder = random_decoder()
    weights, _, cache = begin(decoder, rows, room)
    cache.keep(torch.tensor(kept))
    alone = Row(weights, cache) if len(kept) == 1 else None
    for new in range(60):
        ids = torch.full((len(kept),), 7)
        hidden = alone.step(decoder.embedding(ids)) if alone else step(weights, decoder.embedding(ids), cache)
        if new % 20 == 19 or new < 5:
            for place, found in zip(kept, weights.scores(hidden), strict=True):
                expected = full(decoder, torch.cat([rows[place][:LENGTHS[place]], torch.full((new + 1,), 7)]))
                assert torch.allclose(found, expected, atol=1e-4)
    taken = LENGTHS[0] + 60 if alone else max(LENGTHS) + 60
    assert cache.used == taken and taken <= cache.capacity < 2 * taken
    assert {tensor.shape[2] for tensor in (*cache.keys, *cache.values)} == {cache.capacity} == {len(cache.cos)}


def test_bfloat16_follows_the_decoder(rows):
    decoder = random_decoder().bfloat16()
    weights, hidden, cache = begin(decoder, rows)
    hidden = step(weights, decoder.embedding(torch.stack([row[length] for row, length in zip(rows, LENGTHS)])), cache)
    scores = weights.scores(hidden).float()
    expected = torch.stack([full(decoder, row[:length + 1]) for row, length in zip(rows, LENGTHS)]).float()
    assert hidden.dtype == torch.bfloat16
    assert (scores - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("laid_out", [False, True])
@pytest.mark.parametrize("short", [0, SHORT])
def test_a_row_alone_is_decoded_as_by_full_passes(rows, shape, laid_out, short, threads, monkeypatch):
    monkeypatch.setattr("mmtx.row.SHORT", short)
    decoder = random_decoder(**shape)
    if laid_out:
        lay_out(decoder)
    for row, length in zip(rows, LENGTHS, strict=True):
        weights, _, cache = begin(decoder, [row])
        assert Row.takes(weights, cache)
        alone = Row(weights, cache)
        for new in range(NEW):
            inputs = decoder.embedding(row[length + new:length + new + 1])
            before = inputs.clone()
            (scores,) = weights.scores(alone.step(inputs))
            assert torch.allclose(scores, full(decoder, row[:length + new + 1]), atol=1e-4)
            assert torch.equal(inputs, before)


@pytest.mark.parametrize("kept", range(len(LENGTHS)))
def test_a_row_that_is_left_of_a_batch_goes_on_alone(rows, kept):
    decoder, row, length = random_decoder(), rows[kept], LENGTHS[kept]
    weights, _, cache = begin(decoder, rows)
    step(weights, decoder.embedding(torch.stack([row[length] for row, length in zip(rows, LENGTHS)])), cache)
    alone = Row(weights, cache.keep(torch.tensor([kept])))
    for new in range(1, NEW):
        (scores,) = weights.scores(alone.step(decoder.embedding(row[length + new:length + new + 1])))
        assert torch.allclose(scores, full(decoder, row[:length + new + 1]), atol=1e-4)


def test_laying_out_changes_how_matrices_lie_and_no_value():
    decoder, other = random_decoder(), random_decoder()
    lay_out(decoder)
    for (name, a), b in zip(decoder.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.stride(0) == 1 or a.shape[0] <= a.shape[-1] or not name.startswith("blocks")
    assert decoder.blocks[0].feed_forward.gate_up.weight.stride() == (1, 2 * SIZES["hidden"])


def test_large_activations_overflow_to_what_full_passes_give(rows):
    decoder, row = random_decoder(), rows[0]
    for block in decoder.blocks:
        block.feed_forward.gate_up.weight *= 1e3
    weights, _, cache = begin(decoder, [row])
    hidden = Row(weights, cache).step(decoder.embedding(row[LENGTHS[0]:LENGTHS[0] + 1]))
    assert torch.allclose(weights.scores(hidden)[0], full(decoder, row[:LENGTHS[0] + 1]), atol=1e-3)


def difficult_rows(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """An output matrix (R, D) and hidden states (B, D)."""
    generator = torch.Generator().manual_seed(0)
    table, hidden = (torch.randn(n, 40, generator=generator) for n in (600, 50))
    if kind == "of all sizes":
        table *= torch.logspace(-4, 4, 600)[:, None]
    elif kind == "one outlier each":
        table[:, 7] *= 100
        hidden[:, 3] *= 100
    elif kind == "nearly equal":
        table = table[:1] + 1e-4 * table
    elif kind == "equal":
        table = table[:1].expand(600, -1)
    elif kind == "zero":
        table[::2], hidden[::2] = 0, 0
    return table, hidden


@onednn
@pytest.mark.parametrize("kind", ["random", "of all sizes", "one outlier each", "nearly equal", "equal", "zero"])
def test_a_screen_keeps_the_best_row(kind):
    table, hidden = difficult_rows(kind)
    forbidden = np.where(np.arange(600) % 3 == 1, np.float32(-np.inf), np.float32(0))
    screen, left = Screen.of(table), []
    for h in hidden:
        few = screen.candidates(h.numpy(), forbidden)
        scores = (table.double() @ h.double()).numpy() + forbidden
        assert np.isfinite(scores[few]).all()
        assert scores[few].max() == scores.max()
        left.append(len(few))
    if kind == "random":
        assert np.mean(left) < 10     # of 400


@onednn
def test_a_screen_says_how_far_its_scores_may_be_wrong():
    table, _ = difficult_rows("random")
    table[:300] = table[:300].sign()      # 8 bits keep these as they are
    screen, scale = Screen.of(table), table.abs().amax(1, keepdim=True) / 127
    lack = table - (table / scale).round() * scale
    # Hidden states for which all errors of a row add up: those of its codes, or those of the codes of the state.
    first = torch.arange(40) == 0         # whole numbers up to 63 need no rounding
    worst = [torch.where(first, 63 * torch.where(lack[300:] < 0, -1, 1), (124 * lack[300:] / scale[300:]).round()),
             torch.where(first, 63.0, 0.4) * table[:300]]
    for states, rows in zip(worst, (range(300, 600), range(300)), strict=True):
        for h, row in zip(states, rows, strict=True):
            scores, bound = screen.scores(h.numpy())
            wrong = np.abs((table.double() @ h.double()).numpy() - scores)
            assert (wrong <= bound).all()
            assert wrong[row] > 0.4 * bound[row]


LARGEST = """
import numpy as np, torch
from mmtx.row import Screen

for sign in (1, -1):
    scores, bound = Screen.of(torch.full((64, 40), 2.0)).scores(np.full(40, sign * 3, np.float32))
    assert (np.abs(scores - sign * 240) <= bound).all(), (scores, bound)
"""


@onednn
@pytest.mark.parametrize("instructions", ["AVX2", "AVX512_CORE", "DEFAULT"])
def test_a_screen_is_right_on_processors_that_add_products_in_16_bits(instructions):
    subprocess.run([sys.executable, "-c", LARGEST], env={**os.environ, "ONEDNN_MAX_CPU_ISA": instructions}, check=True)


def test_the_best_id_is_the_same_with_and_without_a_screen():
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(FEW_ROWS + 100, **SIZES)).requires_grad_(False)
    allowed = torch.rand(1, FEW_ROWS + 90) < 0.5
    weights = Weights.of(decoder, fixed=True)
    prompt = torch.arange(3)[None]
    hidden, cache = prefill(weights, decoder.embed(prompt), torch.tensor([3]), 8)
    screened, plain = Row(weights, cache), Row(Weights.of(decoder), cache)
    for hidden in torch.randn(20, 1, SIZES["width"]):
        expected = weights.scores(hidden)[:, :FEW_ROWS + 90].masked_fill(~allowed, -torch.inf).argmax(1)
        assert screened.best(hidden, allowed).equal(expected)
        assert plain.best(hidden, allowed).equal(expected)
    assert list(weights.screens) == ([FEW_ROWS + 90] if Screen.pays() else [])
