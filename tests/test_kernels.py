"""What lies between the matrix products, against plain formulas: values, gradients, and the types under autocast."""

import pytest
import torch
import torch.nn.functional as F

from mmtx import kernels
from mmtx.kernels import apply_rotary_emb, attend, pad_input, qk_norm_rope, rms_norm, swiglu, unpad_input

HEADS, KV_HEADS, WIDTH, EPS = 4, 2, 6, 1e-2


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def plain_norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def plain_heads(qkv, query_weight, key_weight, cos, sin):
    query, key, value = qkv.unflatten(-1, (-1, WIDTH)).split([HEADS, KV_HEADS, KV_HEADS], dim=-2)
    return apply_rotary_emb(plain_norm(query, query_weight), cos, sin), apply_rotary_emb(plain_norm(key, key_weight), cos, sin), value


def plain_attention(query, key, value, causal):
    groups = query.shape[2] // key.shape[2]
    key, value = (part.repeat_interleave(groups, 2) for part in (key, value))
    scores = torch.einsum("bqhk,bthk->bhqt", query, key) / query.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    return torch.einsum("bhqt,bthk->bqhk", scores.softmax(-1), value)


def angles(*shape: int):
    turn = numbers(*shape, WIDTH // 2, seed=9).detach().repeat_interleave(2, -1).sort(-1).values
    turn = torch.cat([turn[..., :WIDTH // 2]] * 2, -1)
    return turn.cos(), turn.sin()


def same(found, expected, inputs, tolerance=1e-10):
    """Values and gradients."""
    found, expected = ([x] if isinstance(x, torch.Tensor) else list(x) for x in (found, expected))
    weights = [numbers(*x.shape, seed=5).detach() for x in expected]
    gradients = [torch.autograd.grad(sum((x * w).sum() for x, w in zip(values, weights, strict=True)), inputs)
                 for values in (found, expected)]
    for a, b in (*zip(found, expected, strict=True), *zip(*gradients, strict=True)):
        assert a.shape == b.shape and torch.allclose(a, b, atol=tolerance, rtol=tolerance)


def test_rms_norm():
    x, weight = numbers(2, 5, 8), numbers(8, seed=1)
    same(rms_norm(x, weight, EPS), plain_norm(x, weight), (x, weight))


def test_swiglu():
    x = numbers(2, 5, 14)
    same(swiglu(x), F.silu(x[..., :7]) * x[..., 7:], (x,))


def test_turned_heads():
    qkv, query_weight, key_weight = numbers(2, 5, 8 * WIDTH), numbers(WIDTH, seed=1), numbers(WIDTH, seed=2)
    arguments = qkv, query_weight, key_weight, *angles(2, 5)
    same(qk_norm_rope(*arguments, HEADS, KV_HEADS, EPS), plain_heads(*arguments), arguments[:3])


def test_frozen_norms_leave_the_other_gradients_as_they_are():
    x, weight, query_weight, key_weight = numbers(2, 5, 8 * WIDTH), *(numbers(size, seed=1) for size in (8 * WIDTH, WIDTH, WIDTH))
    norm = lambda weight: rms_norm(x, weight, EPS)
    heads = lambda *weights: torch.cat(qk_norm_rope(x, *weights, *angles(2, 5), HEADS, KV_HEADS, EPS), -2)
    for run, weights in ((norm, [weight]), (heads, [query_weight, key_weight])):
        expected = torch.autograd.grad(run(*weights).square().sum(), (x, *weights))
        for trained in range(len(weights) + 1):  # the first weights; the others are frozen
            given = [weight if i < trained else weight.detach() for i, weight in enumerate(weights)]
            found = torch.autograd.grad(run(*given).square().sum(), (x, *given[:trained]))
            assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length, groups", [(1, 1), (3, 1), (4, 2), (11, 2), (12, 1)])
def test_attention_in_blocks(causal, length, groups, monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 4)
    monkeypatch.setattr(kernels, "KEPT", 11)  # weights of rows of 12 are computed again
    query = numbers(2, length, 4, 3)
    key, value = numbers(2, length, 4 // groups, 3, seed=1), numbers(2, length, 4 // groups, 3, seed=2)
    same(attend(query, key, value, causal), plain_attention(query, key, value, causal), (query, key, value))


def test_rows_laid_out_and_picked_up():
    x, y = numbers(4, 3), numbers(6, 3)
    # Slots 1 and 4 are padding: they hold row 0, which gets no gradient from them.
    gather, scatter = torch.tensor([2, 0, 0, 1, 0, 3]), torch.tensor([2, 3, 0, 5])
    mask = torch.tensor([1.0, 0, 1, 1, 0, 1])[:, None]
    same(pad_input(x, gather, scatter) * mask, x[gather] * mask, (x,))
    same(unpad_input(y, scatter), y[scatter], (y,))


@pytest.mark.parametrize("causal", [True, False])
def test_under_autocast_all_is_in_bfloat16_and_near(causal):
    qkv, query_weight, key_weight = (x.detach().float().requires_grad_() for x in
                                     (numbers(2, 9, 8 * WIDTH), numbers(WIDTH, seed=1), numbers(WIDTH, seed=2)))
    cos, sin = (x.float() for x in angles(2, 9))

    def run(heads, attention, norm, gated):
        x = gated(norm(qkv, qkv.detach()[0, 0]).bfloat16())
        found = attention(*heads, causal)
        return found.float().flatten(-2), x.float()

    with torch.autocast("cpu", torch.bfloat16):
        assert rms_norm(qkv, qkv.detach()[0, 0], EPS).dtype == torch.bfloat16
        heads = qk_norm_rope(qkv.bfloat16(), query_weight, key_weight, cos, sin, HEADS, KV_HEADS, EPS)
        assert {part.dtype for part in heads} == {torch.bfloat16} == {attend(*heads, causal).dtype}
        found = run(heads, attend, lambda x, w: rms_norm(x, w, EPS), swiglu)
    expected = run(plain_heads(qkv, query_weight, key_weight, cos, sin), plain_attention, plain_norm,
                   lambda x: F.silu(x[..., :24]) * x[..., 24:])
    same(found, expected, (qkv, query_weight, key_weight), tolerance=0.15)
