"""Decoding with a cache against full passes of the decoder: any lengths, any order of rows, any shape of the network."""

import pytest
import torch

from mmtx.decoding import Weights, prefill, step
from mmtx.model import CodeRange, Decoder, DecoderConfig

SIZES = {"width": 24, "depth": 2, "heads": 4, "kv_heads": 2, "head_width": 8, "hidden": 32}
COMPOSED = (CodeRange(10, (4, 3, 2)), CodeRange(34, (5, 2)))  # of 44 ids, 10 have rows of their own
SHAPES = [{}, {"composed": COMPOSED}, {"composed": COMPOSED, "tied": False}, {"kv_heads": 4}, {"kv_heads": 1},
          {"depth": 1}, {"norm_eps": 1e-1}, {"rope_theta": 50.0}]
LENGTHS = (9, 1, 4, 17)
NEW = 8


def random_decoder(**config) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(44, **{**SIZES, **config}))
    for parameter in decoder.parameters():  # norms too: at 1 a mix-up of two of them would not show
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    return decoder.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def rows() -> list[torch.Tensor]:
    """Prompts of LENGTHS ids, and NEW ids behind each."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 44, (length + NEW,), generator=generator) for length in LENGTHS]


def full(decoder: Decoder, ids: torch.Tensor) -> torch.Tensor:
    """Scores (V,) behind the last of some ids."""
    return decoder.logits(decoder(ids[None], torch.arange(len(ids))[None]))[0, -1]


def begin(decoder: Decoder, rows: list[torch.Tensor], capacity: int = 40):
    lengths = torch.tensor([len(row) - NEW for row in rows])
    ids = torch.full((len(rows), int(lengths.max())), 43)
    for row, length, given in zip(ids, lengths, rows, strict=True):
        row[:length] = given[:length]
    weights = Weights.of(decoder)
    return weights, *prefill(weights, decoder.embed(ids), lengths, capacity)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores_are_those_of_full_passes(rows, shape):
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


def test_a_cache_is_filled_to_its_last_slot(rows):
    decoder = random_decoder()
    weights, hidden, cache = begin(decoder, rows, max(LENGTHS) + 2)
    for new in range(2):
        hidden = step(weights, decoder.embedding(torch.tensor([1, 2, 3, 4])), cache)
    with pytest.raises((IndexError, RuntimeError)):
        step(weights, decoder.embedding(torch.tensor([1, 2, 3, 4])), cache)


def test_bfloat16_follows_the_decoder(rows):
    decoder = random_decoder().bfloat16()
    weights, hidden, cache = begin(decoder, rows)
    hidden = step(weights, decoder.embedding(torch.stack([row[length] for row, length in zip(rows, LENGTHS)])), cache)
    scores = weights.scores(hidden).float()
    expected = torch.stack([full(decoder, row[:length + 1]) for row, length in zip(rows, LENGTHS)]).float()
    assert hidden.dtype == torch.bfloat16
    assert (scores - expected).abs().max() < 0.05 * expected.abs().max()
