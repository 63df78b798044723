"""Engines against full passes of the decoder: any lengths, any order of rows, any shape of the network."""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from mmtx.config import CodeRange, DecoderConfig, RopeScaling
from mmtx.inference.cached_attention import THREADS
from mmtx.inference.choose import choose_engine
from mmtx.inference.graph_engine import GraphEngine
from mmtx.inference.int8 import Int8Matrix
from mmtx.inference.packed import TYPES, PackedMatrix, has_operators
from mmtx.inference.reference import ReferenceEngine
from mmtx.inference.row import SHORT, RowEngine, prepack_weights
from mmtx.inference.screen import FEW_ROWS, Screen
from mmtx.inference.torch_engine import ROOM, TorchEngine
from mmtx.inference.weights import Weights
from mmtx.model import Decoder
from mmtx.sequence import Prompt

SIZES = {"width": 24, "depth": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp_dim": 32}
COMPOSED = (CodeRange(10, (4, 3, 2)), CodeRange(34, (5, 2)))  # of 44 ids, 10 have rows of their own
SHAPES = [{}, {"composed": COMPOSED}, {"composed": COMPOSED, "tied": False}, {"kv_heads": 4}, {"kv_heads": 1},
          {"depth": 1}, {"norm_eps": 1e-1}, {"rope_theta": 50.0}, {"qk_norm": False}, {"qk_norm": False, "qkv_bias": True},
          {"rope_scaling": RopeScaling(4.0, 1.0, 3.0, 16), "rope_theta": 50.0}]
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


@pytest.fixture
def bfloat16(monkeypatch):
    """Matrices of it are packed also where the processor has no instructions for them."""
    monkeypatch.setitem(TYPES, torch.bfloat16, ())
    has_operators.cache_clear()
    yield
    has_operators.cache_clear()


@pytest.fixture(scope="module")
def rows() -> list[torch.Tensor]:
    """Prompts of LENGTHS ids, and NEW ids behind each."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 44, (length + NEW,), generator=generator) for length in LENGTHS]


def full(decoder: Decoder, ids: torch.Tensor) -> torch.Tensor:
    """Scores (V,) behind the last of some ids."""
    return decoder.logits(decoder(ids[None], torch.arange(len(ids))[None]))[0, -1]


def asked(rows: list[torch.Tensor]) -> list[Prompt]:
    return [Prompt(row[:len(row) - NEW].numpy()) for row in rows]


def begin(decoder: Decoder, rows: list[torch.Tensor], make=TorchEngine, room: int = ROOM):
    engine = make(decoder, Weights.of(decoder))
    engine.prefill(asked(rows), room)
    return engine


def next_ids(rows: list[torch.Tensor], new: int) -> torch.Tensor:
    return torch.stack([row[len(row) - NEW + new] for row in rows])


ENGINES = {
    "torch": lambda decoder, rows: TorchEngine(decoder, Weights.of(decoder)),
    "chosen": lambda decoder, rows: choose_engine(decoder, None, rows),  # on a CPU that of one row where one is left
    "reference": lambda decoder, rows: ReferenceEngine(decoder),
    "static": lambda decoder, rows: GraphEngine(decoder, Weights.of(decoder)),  # what a GPU has, without its graphs
}
each_engine = pytest.mark.parametrize("make", ENGINES.values(), ids=ENGINES)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("together", [0.3, 1, 3, 4], ids="{} rows together".format)  # of a long prompt a part at a time
@pytest.mark.parametrize("most", [0, THREADS], ids=["torch", "NumPy"])
def test_scores_are_those_of_full_passes(rows, shape, together, most, monkeypatch):
    monkeypatch.setattr("mmtx.inference.torch_engine.TOKENS", int(together * max(LENGTHS)))
    monkeypatch.setattr("mmtx.inference.cached_attention.THREADS", most)
    decoder = random_decoder(**shape)
    engine = begin(decoder, rows)
    for new in range(NEW):
        scores = engine.scores()
        assert scores.std() > 0.1
        for row, length, found in zip(rows, LENGTHS, scores, strict=True):
            assert torch.allclose(found, full(decoder, row[:length + new]), atol=1e-4)
        engine.step(next_ids(rows, new))


@pytest.mark.parametrize("first", [1, 10, 11, 20, 44])
@pytest.mark.parametrize("tied", [True, False])
@each_engine
def test_scores_of_the_first_ids_are_those_of_all(rows, first, tied, make):
    decoder = random_decoder(composed=COMPOSED, tied=tied)
    engine = make(decoder, 4)
    engine.prefill(asked(rows))
    scores = engine.scores(first)
    assert scores.shape == (len(rows), first)
    assert torch.allclose(scores, engine.scores()[:, :first], atol=1e-5)
    for row, found in zip(rows, engine.scores(), strict=True):
        assert torch.allclose(found, full(decoder, row[:len(row) - NEW]), atol=1e-4)


@pytest.fixture(scope="module")
def expected(rows):
    """Hidden states (NEW, D) behind each new id of each row, by full passes of a decoder alone."""
    decoder = random_decoder()
    return [decoder(row[None], torch.arange(len(row))[None])[0, length:] for row, length in zip(rows, LENGTHS, strict=True)]


@pytest.mark.parametrize(("name", "moment"), [("reference", 3), *itertools.product(("torch", "chosen"), range(NEW)), ("static", 3)])
def test_rows_that_are_left_at_any_moment_go_on_as_in_full_passes(rows, expected, name, moment):
    decoder = random_decoder()
    subsets = [list(kept) for count in (1, 2, 3, 4) for kept in itertools.combinations(range(4), count)]
    for first in subsets:
        # Later, of those that are left, each alone.
        for later, last in [(NEW, first)] if len(first) == 1 else [(moment + 2, [row]) for row in first]:
            left, engine = list(range(4)), ENGINES[name](decoder, 4)
            engine.prefill(asked(rows))
            for new in range(NEW):
                for when, kept in ((moment, first), (later, last)):
                    if new == when:
                        engine = engine.keep(torch.tensor([left.index(row) for row in kept]))
                        left = kept
                        assert len(engine.hidden) == len(left)
                        for row, found in zip(left, engine.hidden, strict=True):
                            assert new == 0 or (found - expected[row][new - 1]).abs().max() < 1e-5
                ids = next_ids([rows[row] for row in left], new)
                given = ids.clone()
                engine.step(ids)
                assert torch.equal(ids, given)
                for row, found in zip(left, engine.hidden, strict=True):
                    assert (found - expected[row][new]).abs().max() < 1e-5


@each_engine
@pytest.mark.parametrize("count", [1, 3])
def test_who_owns_what_is_the_same_for_all_engines(rows, expected, make, count):
    rows = rows[:count]
    decoder, prompts = random_decoder(), asked(rows)
    engine, before = make(decoder, count), [prompt.ids.copy() for prompt in prompts]
    engine.prefill(prompts)
    allowed = torch.rand(count, 44, generator=torch.Generator().manual_seed(1)) < 0.5
    for new in range(NEW):
        ids, best, scores = next_ids(rows, new), engine.best(allowed), engine.scores()
        assert torch.equal(best, scores.masked_fill(~allowed, -torch.inf).argmax(1))
        assert allowed.equal(torch.rand(count, 44, generator=torch.Generator().manual_seed(1)) < 0.5)
        kept = scores.clone(), best.clone()
        engine.step(ids)
        assert torch.equal(scores, kept[0]) and torch.equal(best, kept[1])   # the engine writes over neither
        scores.fill_(7), best.fill_(7), ids.fill_(7)                          # and reads none of them
        for prompt in prompts:
            prompt.ids.fill(7)
        for place, found in enumerate(engine.hidden):
            if make is not ENGINES["reference"] or new == 0:
                assert (found - expected[place][new]).abs().max() < 1e-5
        for prompt, ids in zip(prompts, before, strict=True):
            prompt.ids[:] = ids
        for place, found in enumerate(engine.scores()):
            assert torch.allclose(found, full(decoder, rows[place][:LENGTHS[place] + new + 1]), atol=1e-4)
        assert (scores == 7).all()


def test_the_last_row_goes_on_where_it_is_fastest(rows):
    decoder = random_decoder()
    assert type(choose_engine(decoder, None, 1)) is RowEngine
    engine = choose_engine(decoder, None, 4)
    engine.prefill(asked(rows))
    assert type(engine) is TorchEngine and type(engine.keep(torch.tensor([0, 2]))) is TorchEngine
    assert type(engine.keep(torch.tensor([1]))) is RowEngine
    assert type(choose_engine(random_decoder().bfloat16(), None, 1)) is TorchEngine


@pytest.mark.parametrize("room", [0, 1, 3])
@pytest.mark.parametrize("kept", [[0, 1, 2, 3], [0, 2], [0]])
def test_a_cache_grows_when_it_is_full(rows, room, kept):
    decoder = random_decoder()
    engine = begin(decoder, rows, lambda *given: TorchEngine(*given, single_row=RowEngine.of), room)
    engine = engine.keep(torch.tensor(kept))
    for new in range(60):
        engine.step(torch.full((len(kept),), 7))
        if new % 20 == 19 or new < 5:
            for place, found in zip(kept, engine.scores(), strict=True):
                written = torch.cat([rows[place][:LENGTHS[place]], torch.full((new + 1,), 7)])
                assert torch.allclose(found, full(decoder, written), atol=1e-4)
    cache, taken = engine.cache, (LENGTHS[0] if len(kept) == 1 else max(LENGTHS)) + 60
    assert cache.used == taken and taken <= cache.capacity < 2 * taken
    assert {tensor.shape[2] for tensor in (*cache.keys, *cache.values)} == {cache.capacity} == {len(cache.cos)}


def test_bfloat16_follows_the_decoder(rows):
    decoder = random_decoder().bfloat16()
    engine = begin(decoder, rows)
    engine.step(next_ids(rows, 0))
    scores = engine.scores().float()
    expected = torch.stack([full(decoder, row[:length + 1]) for row, length in zip(rows, LENGTHS)]).float()
    assert engine.hidden.dtype == torch.bfloat16
    assert (scores - expected).abs().max() < 0.05 * expected.abs().max()


def test_float64_is_as_exact_as_full_passes(rows):
    decoder = random_decoder().double()
    engine = begin(decoder, rows)
    engine.step(next_ids(rows, 0))
    for row, length, found in zip(rows, LENGTHS, engine.scores(), strict=True):
        assert (found - full(decoder, row[:length + 1])).abs().max() < 1e-5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("laid_out", [False, True])
@pytest.mark.parametrize("short", [0, SHORT])
def test_a_row_alone_is_decoded_as_by_full_passes(rows, shape, laid_out, short, threads, monkeypatch):
    monkeypatch.setattr("mmtx.inference.row.SHORT", short)
    decoder = random_decoder(**shape)
    if laid_out:
        prepack_weights(decoder)
    for row, length in zip(rows, LENGTHS, strict=True):
        engine = begin(decoder, [row], lambda decoder, _: RowEngine(decoder, Weights.of(decoder, fixed=laid_out)))
        for new in range(NEW):
            engine.step(row[length + new:length + new + 1])
            (scores,) = engine.scores()
            assert torch.allclose(scores, full(decoder, row[:length + new + 1]), atol=1e-4)


@onednn
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("small", [0, 10**6])  # no matrix is, or all are
@pytest.mark.parametrize("load_in_8bit", [False, True])
def test_a_row_in_bfloat16_follows_full_passes_in_float32(rows, shape, small, load_in_8bit, threads, bfloat16, monkeypatch):
    """Of the same weights: prompts are read in bfloat16, and ids written with matrices of it."""
    monkeypatch.setattr("mmtx.inference.weights.SMALL", small)
    decoder, exact = random_decoder(**shape).bfloat16(), random_decoder(**shape).bfloat16().float()
    weights = Weights.of(decoder, fixed=True, load_in_8bit=load_in_8bit)
    assert RowEngine.fits(weights) and not RowEngine.fits(Weights.of(decoder))
    kinds = {type(matrix) for layer in weights.row_layers(False) for matrix in (layer.qkv, layer.out, layer.down)}
    assert kinds == {Int8Matrix if load_in_8bit else torch.Tensor if small else PackedMatrix}
    row, length = rows[0], LENGTHS[0]
    engine = choose_engine(decoder, weights, 3)
    engine.prefill(asked([row, *rows[1:3]]))
    engine = engine.keep(torch.tensor([0]))
    assert type(engine) is RowEngine
    for new in range(NEW):
        expected = full(exact, row[:length + new])
        allowed = torch.arange(44)[None] % 3 != new % 3
        scores, most = engine.scores()[0].float(), expected.abs().max() * (0.2 if load_in_8bit else 0.05)
        assert (scores - expected).abs().max() < most
        best = int(engine.best(allowed))
        assert allowed[0, best] and expected[allowed[0]].max() - expected[best] < 2 * most
        engine.step(row[length + new:length + new + 1])


@pytest.mark.parametrize("shared", [True, False])
def test_prompts_and_steps_of_a_row_go_the_way_that_is_faster(rows, shared, monkeypatch):
    """Told by one tuner for each, which hears of every prompt and step."""
    before, seen = torch.get_num_threads(), []
    prefill, step = TorchEngine.prefill, RowEngine._step
    monkeypatch.setattr(TorchEngine, "prefill", lambda *given: seen.append(torch.get_num_threads()) or prefill(*given))
    monkeypatch.setattr(RowEngine, "_step", lambda *given: seen.append(torch.get_num_threads()) or step(*given))
    decoder = random_decoder()
    weights, heard = Weights.of(decoder), []
    for name, tuner in (("prompt", weights.prompt_tuner), ("step", weights.step_tuner)):
        tuner.shared = shared
        monkeypatch.setattr(tuner, "record", lambda way, seconds, name=name: heard.append((name, way)))
    torch.set_num_threads(2)
    try:
        engine = RowEngine(decoder, weights)
        engine.prefill(asked(rows[:1]))
        engine.step(next_ids(rows[:1], 0))
        assert seen == ([2, 2] if shared else [1, 1]) and torch.get_num_threads() == 2
        assert heard == [("prompt", shared), ("step", shared)]
    finally:
        torch.set_num_threads(before)


def test_laying_out_changes_how_matrices_lie_and_no_value():
    decoder, other = random_decoder(), random_decoder()
    prepack_weights(decoder)
    for (name, a), b in zip(decoder.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.stride(0) == 1 or a.shape[0] <= a.shape[-1] or not name.startswith("blocks")
    assert decoder.blocks[0].feed_forward.gate_up.weight.stride() == (1, 2 * SIZES["mlp_dim"])


def test_large_activations_overflow_to_what_full_passes_give(rows):
    decoder, row = random_decoder(), rows[0]
    for block in decoder.blocks:
        block.feed_forward.gate_up.weight *= 1e3
    engine = begin(decoder, [row], RowEngine)
    engine.step(row[LENGTHS[0]:LENGTHS[0] + 1])
    assert torch.allclose(engine.scores()[0], full(decoder, row[:LENGTHS[0] + 1]), atol=1e-3)


@each_engine
@pytest.mark.parametrize("ids", [44, FEW_ROWS + 100])
@pytest.mark.parametrize("count", [1, 3])
def test_scores_that_are_not_finite_choose_an_allowed_id(rows, make, ids, count):
    decoder = Decoder(DecoderConfig(ids, **SIZES)).requires_grad_(False)
    engine = make(decoder, count)
    if isinstance(engine, TorchEngine):
        engine.weights = Weights.of(decoder, fixed=True)
    engine.prefill(asked(rows[:count]))
    for value in (torch.nan, torch.inf, 1e30):
        engine.hidden = torch.full((count, SIZES["width"]), value)
        for place in (1, ids - 2):
            allowed = torch.zeros(count, ids, dtype=torch.bool)
            allowed[:, place] = True
            assert engine.best(allowed).tolist() == [place] * count


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
def test_a_row_that_8_bits_say_nothing_of_is_kept_beside_one_that_they_are_sure_of():
    hidden = torch.full((40,), 63.0)
    hidden[0] = 0
    sure, unsure = torch.full((40,), 0.4), torch.full((40,), 0.49)
    unsure[0] = 127.0                       # beside which the others round to 0
    table = torch.cat([sure[None], unsure[None], torch.zeros(100, 40)])
    assert (table @ hidden).argmax() == 1
    screen = Screen.of(table)
    assert screen.scores(hidden.numpy())[0].argmax() == 0
    assert set(screen.candidates(hidden.numpy(), np.zeros(102, np.float32))) == {0, 1}


@onednn
@pytest.mark.parametrize("kind", ["random", "of all sizes", "one outlier each", "nearly equal", "equal", "zero"])
@pytest.mark.parametrize("few", [600, 1])
def test_a_screen_finds_the_best_row_of_each_state_of_a_batch(kind, few, monkeypatch):
    monkeypatch.setattr("mmtx.inference.screen.FEW", few)
    table, hidden = difficult_rows(kind)
    allowed = (torch.arange(600) + torch.arange(50)[:, None]) % 3 != 1          # of each state others
    best = Screen.of(table).best(table, hidden, np.where(allowed, np.float32(0), np.float32(-np.inf)))
    if few == 1:
        assert best is None                                                     # more are left, so all are to be read
        return
    scores = (table.double() @ hidden.double().T).T.masked_fill(~allowed, -torch.inf)
    found = scores.gather(1, best[:, None])[:, 0]
    assert allowed.gather(1, best[:, None]).all()
    torch.testing.assert_close(found, scores.amax(1), rtol=1e-5, atol=1e-5)
    if kind in ("equal", "zero"):                                               # of equal ones the first, as argmax has it
        assert torch.equal(best[1::2], scores.argmax(1)[1::2])


@onednn
def test_a_screen_leaves_states_of_a_batch_that_are_not_finite_to_others():
    table, hidden = difficult_rows("random")
    for value in (torch.nan, torch.inf, -torch.inf, 1e30):
        given = hidden.clone()
        given[3, 5] = value
        assert Screen.of(table).best(table, given, np.zeros((50, 600), np.float32)) is None


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
            scores, lengths = screen.scores(h.numpy())
            bound = screen.bound(slice(None), lengths)
            wrong = np.abs((table.double() @ h.double()).numpy() - scores)
            assert (wrong <= bound).all()
            assert wrong[row] > 0.4 * bound[row]


LARGEST = """
import numpy as np, torch
from mmtx.inference.screen import Screen

for sign in (1, -1):
    screen = Screen.of(torch.full((64, 40), 2.0))
    scores, lengths = screen.scores(np.full(40, sign * 3, np.float32))
    assert (np.abs(scores - sign * 240) <= screen.bound(slice(None), lengths)).all(), (scores, lengths)
"""


@onednn
@pytest.mark.parametrize("instructions", ["AVX2", "AVX512_CORE", "DEFAULT"])
def test_a_screen_is_right_on_processors_that_add_products_in_16_bits(instructions):
    subprocess.run([sys.executable, "-c", LARGEST], env={**os.environ, "ONEDNN_MAX_CPU_ISA": instructions}, check=True)


@onednn
def test_the_best_id_in_bfloat16_is_that_of_exact_products(bfloat16):
    """A screen finds it among rows that differ by less than bfloat16 keeps of their scores."""
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(FEW_ROWS + 100, **SIZES)).requires_grad_(False).bfloat16()
    weights, allowed = Weights.of(decoder, fixed=True), torch.rand(3, FEW_ROWS + 90) < 0.5
    for make, count in ((RowEngine, 1), (TorchEngine, 3)):
        engine = make(decoder, weights)
        engine.prefill([Prompt(np.arange(3))] * count)
        for hidden in torch.randn(20, count, SIZES["width"]).bfloat16():
            engine.hidden = hidden.float() if make is RowEngine else hidden
            scores = hidden.double() @ weights.output.double().T
            expected = scores[:, :FEW_ROWS + 90].masked_fill(~allowed[:count], -torch.inf).argmax(1)
            assert not Screen.pays() or engine.best(allowed[:count]).equal(expected)


@pytest.mark.parametrize(("make", "count"), [(RowEngine, 1), (TorchEngine, 1), (TorchEngine, 5)])
def test_the_best_id_is_the_same_with_and_without_a_screen(make, count):
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(FEW_ROWS + 100, **SIZES)).requires_grad_(False)
    allowed = torch.rand(count, FEW_ROWS + 90) < 0.5
    weights, prompts = Weights.of(decoder, fixed=True), [Prompt(np.arange(3))] * count
    screened, plain = make(decoder, weights), make(decoder, Weights.of(decoder))
    for engine in (screened, plain):
        engine.prefill(prompts)
    for hidden in torch.randn(20, count, SIZES["width"]):
        allowed = allowed.roll(1, 1)                    # another tensor, of other values
        expected = weights.scores(hidden)[:, :FEW_ROWS + 90].masked_fill(~allowed, -torch.inf).argmax(1)
        for engine in (screened, plain):
            engine.hidden = hidden
            assert engine.best(allowed).equal(expected)
    assert list(weights.screens) == ([FEW_ROWS + 90] if Screen.pays() else [])
