"""The loss in chunks and by digits against the plain formula over the scores of the whole vocabulary."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mmtx.loss
from mmtx.config import CodeRange, DecoderConfig
from mmtx.embedding import TokenEmbedding
from mmtx.loss import next_token_loss

RANGES = {"rows alone": (), "one range": (CodeRange(10, (4, 3, 2)),), "one digit": (CodeRange(10, (5,)),),
          "two ranges": (CodeRange(10, (4, 3, 2)), CodeRange(34, (5, 2)))}
TARGETS, PLAIN = 40, 15


class Made(TorchDispatchMode):
    """All tensors that operations give, on the way back too."""

    def __init__(self):
        super().__init__()
        self.tensors = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        found = function(*arguments, **(options or {}))
        self.tensors += [tensor for tensor in tree_leaves(found) if isinstance(tensor, torch.Tensor)]
        return found


def problem(ranges: tuple[CodeRange, ...], spread: float = 1.0):
    """An output table, hidden states, targets of which the first PLAIN have rows of their own, and weights."""
    size = max([10, *(r.stop for r in ranges)])
    generator = torch.Generator().manual_seed(0)
    table = TokenEmbedding(DecoderConfig(size, width=16, composed=ranges))
    torch.nn.init.normal_(table.weight, std=spread, generator=generator)
    hidden = torch.randn(TARGETS, 16, generator=generator).requires_grad_()
    targets = torch.cat([torch.randint(0, 10, (PLAIN,), generator=generator),
                         torch.randint(0, size, (TARGETS - PLAIN,), generator=generator)])
    return table, hidden, targets, torch.rand(TARGETS, generator=generator)


def by_hand(table, hidden, targets, plain, weights, z_loss):
    """Total, loss and log-sum-exp over all scores, those of codes left out in the first `plain` places."""
    scores = hidden @ table.matrix().T
    hidden_codes = torch.zeros_like(scores, dtype=torch.bool)
    hidden_codes[:plain, 10:] = True
    scores = scores.masked_fill(hidden_codes, -torch.inf)
    loss = torch.nn.functional.cross_entropy(scores, targets, reduction="none")
    log_sum = scores.logsumexp(-1)
    return (weights * (loss + z_loss * log_sum ** 2)).sum(), loss, log_sum


@pytest.mark.parametrize("plain", [0, PLAIN, TARGETS])
@pytest.mark.parametrize("chunk, near", [(1, 1), (7 * 20, 3 * 20), (2 ** 23, 2 ** 23)], ids=["each alone", "some", "all"])
@pytest.mark.parametrize("name", RANGES)
def test_value_and_gradients_are_those_of_all_scores(name, chunk, near, plain, monkeypatch):
    monkeypatch.setattr(mmtx.loss, "CHUNK", chunk)
    monkeypatch.setattr(mmtx.loss, "NEAR", near)
    table, hidden, targets, weights = problem(RANGES[name])
    targets = torch.where(torch.arange(TARGETS) < plain, targets % 10, targets)
    expected = by_hand(table, hidden, targets, plain, weights, 0.1)
    found = next_token_loss(table, hidden, targets, plain, weights, z_loss=0.1)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(expected[0] * 3, (hidden, table.weight))
    for ours, theirs in zip(torch.autograd.grad(found.total * 3, (hidden, table.weight)), wanted, strict=True):
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("chunk, near", [(60, 30), (2 ** 23, 2 ** 23)], ids=["some", "all"])
@pytest.mark.parametrize("name", RANGES)
def test_where_new_rows_train_the_others_get_no_gradient_and_the_table_is_never_put_together(name, chunk, near, monkeypatch):
    monkeypatch.setattr(mmtx.loss, "CHUNK", chunk)
    monkeypatch.setattr(mmtx.loss, "NEAR", near)
    table, hidden, targets, weights = problem(RANGES[name])
    plain = 13  # no chunk of tokens is as long as a table, or as its rows that stay
    targets[:plain] = torch.arange(plain) % 10
    expected = by_hand(table, hidden, targets, plain, weights, 0.1)
    inputs = table(targets[None])
    wanted = torch.autograd.grad(expected[0] + inputs.square().sum(), (hidden, table.weight))
    table.train_rows(7)
    rows, original = table.new_rows().rows, table.parametrizations.weight.original
    with Made() as made:
        found = next_token_loss(table, hidden, targets, plain, weights, z_loss=0.1)
        again = table(targets[None])
        d_hidden, d_rows = torch.autograd.grad(found.total + again.square().sum(), (hidden, rows))
    assert torch.equal(again, inputs)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not original.requires_grad and d_rows.shape == rows.shape
    assert (d_hidden - wanted[0]).abs().max() < 1e-5 * wanted[0].abs().max()
    assert (d_rows - wanted[1][7:]).abs().max() < 1e-5 * wanted[1].abs().max()
    own = {tensor.shape for tensor in made.tensors if tensor.untyped_storage().data_ptr() != original.untyped_storage().data_ptr()}
    assert rows.shape in own and not own & {original.shape, original[:7].shape}


@pytest.mark.parametrize("name", RANGES)
def test_gradients_against_differences(name):
    table, hidden, targets, weights = problem(RANGES[name])

    def total(states, rows):
        return mmtx.loss._FusedLoss.apply(states, table.parts[targets], weights, table.groups, 0.1, True, rows)[0]
    inputs = (each.detach().double().requires_grad_() for each in (hidden, table.weight))
    assert torch.autograd.gradcheck(total, tuple(inputs))


def test_scores_far_apart_do_not_overflow():
    table, hidden, targets, weights = problem(RANGES["two ranges"], spread=100.0)
    found = next_token_loss(table, hidden, targets, PLAIN, weights)
    expected = by_hand(table, hidden, targets, PLAIN, weights, 0.0)
    assert expected[1].max() > 500
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-3)
    found.total.backward()
    assert hidden.grad.isfinite().all() and table.weight.grad.isfinite().all()


def test_weights_count_and_are_one_by_default():
    table, hidden, targets, weights = problem(RANGES["two ranges"])
    loss = next_token_loss(table, hidden, targets, PLAIN)
    assert torch.allclose(loss.total, loss.loss.sum())
    weights[3:] = 0
    next_token_loss(table, hidden, targets, PLAIN, weights).total.backward()
    assert ((hidden.grad != 0).any(1) == (weights != 0)).all()


def test_without_gradients_none_are_made():
    table, hidden, targets, weights = problem(RANGES["two ranges"])
    with torch.no_grad():
        found = next_token_loss(table, hidden, targets, PLAIN, weights, 0.1)
    assert not found.total.requires_grad
    assert torch.allclose(found.total, next_token_loss(table, hidden, targets, PLAIN, weights, 0.1).total)


def test_autocast_rounds_the_scores_and_nothing_else():
    table, hidden, targets, weights = problem(RANGES["two ranges"])
    exact = next_token_loss(table, hidden, targets, PLAIN, weights, 0.1)
    exact_gradients = torch.autograd.grad(exact.total, (hidden, table.weight))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = next_token_loss(table, hidden, targets, PLAIN, weights, 0.1)
    gradients = torch.autograd.grad(rounded.total, (hidden, table.weight))
    assert {rounded.total.dtype, rounded.loss.dtype, *(g.dtype for g in gradients)} == {torch.float32}
    assert not torch.equal(rounded.loss, exact.loss)  # bf16 was at work
    assert torch.allclose(rounded.loss, exact.loss, rtol=0.02, atol=0.1)
    for ours, theirs in zip(gradients, exact_gradients, strict=True):
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_of_no_targets_it_is_0():
    table, hidden, targets, _ = problem(())
    found = next_token_loss(table, hidden[:0], targets[:0])
    assert found.total.item() == 0 and len(found.loss) == len(found.log_sum) == 0
    found.total.backward()
    assert hidden.grad.abs().sum() == 0
