"""Muon: what its steps are made of, which parameters take them, and that its state survives saving."""

import copy
import math

import pytest
import torch
from torch import nn

from mmtx.errors import InputError
from mmtx.model import Block, BlockConfig
from mmtx.training import optimizer as muon
from mmtx.training.optimizer import Muon, OptimizerConfig, configure, orthogonal

BLOCK = BlockConfig(width=24, heads=4, kv_heads=2, head_dim=8, mlp_dim=40, causal=True)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"embedding": nn.Linear(5, 24), "block": Block(BLOCK), "norm": nn.RMSNorm(24)})


def give_gradients(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def optimizer_of(module: nn.Module, **config) -> Muon:
    return configure(module, OptimizerConfig(warmup_steps=0, **config), max_steps=100)["optimizer"]


@pytest.mark.parametrize("name, value", [
    ("learning_rate", -1e-3), ("learning_rate", math.nan), ("muon_lr", -1.0), ("muon_lr", math.inf), ("weight_decay", -0.1),
    ("warmup_steps", -1), ("betas", (-0.1, 0.9)), ("betas", (0.9, 1.0)), ("betas", (math.nan, 0.9))])
def test_numbers_that_would_train_backwards_or_not_at_all_are_refused(name, value):
    with pytest.raises(InputError, match=rf"optimizer\.{name}: found .*, expected 0 or more"):
        OptimizerConfig(**{name: value})
    OptimizerConfig(learning_rate=0.0, muon_lr=0.0, weight_decay=0.0, warmup_steps=0, betas=(0.0, 0.999))


@pytest.mark.parametrize("shape", [(32, 32), (96, 32), (32, 96)])
def test_orthogonal_keeps_directions_and_evens_out_their_strength(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape) @ torch.diag(torch.linspace(0.2, 1, shape[1]))
    found = orthogonal(matrix)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    strengths = torch.diag(left.T @ found @ right.T)
    assert strengths.min() > 0.3 and strengths.max() < 1.3  # the published coefficients aim at about 0.7 to 1.2
    assert torch.allclose(left @ torch.diag(strengths) @ right, found, atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 16, 16), (4, 24, 8), (2, 8, 24)])
def test_matrices_turn_together_as_they_do_alone(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.arange(1, shape[0] + 1)[:, None, None]
    assert torch.allclose(orthogonal(matrices), torch.stack([orthogonal(each) for each in matrices]), atol=1e-5)


@pytest.mark.parametrize("precision, dtype", [("bf16-mixed", torch.bfloat16), ("32-true", torch.float32)])
def test_matrices_turn_in_the_precision_of_the_run(precision, dtype):
    module, config = network(), OptimizerConfig(warmup_steps=0, muon_lr=0.01, weight_decay=0.0)
    optimizer = configure(module, config, 10 ** 9, precision=precision)["optimizer"]
    give_gradients(module, 0)
    weight = module["block"].attention.out.weight
    before = weight.detach().clone()
    optimizer.step()
    update = orthogonal(weight.grad * (0.05 * 0.95 + 0.05), dtype)
    assert torch.allclose(weight, before - 0.01 * 0.2 * max(weight.shape) ** 0.5 * update, atol=1e-7)
    other = orthogonal(weight.grad, {torch.bfloat16: torch.float32, torch.float32: torch.bfloat16}[dtype])
    assert 1e-4 < (other - update).norm() / update.norm() < 0.02


def test_only_matrices_of_blocks_take_muon_steps():
    module = network()
    groups = optimizer_of(module, muon_lr=0.01).param_groups
    names = {parameter: name for name, parameter in module.named_parameters()}
    muon = {names[p] for group in groups if "parts" in group for p in group["params"]}
    assert muon == {f"block.{name}.weight" for name in ("attention.qkv", "attention.out", "feed_forward.gate_up",
                                                        "feed_forward.down")}
    everything = [names[p] for group in groups for p in group["params"]]
    assert sorted(everything) == sorted(names.values())
    decays = {names[p]: group["weight_decay"] > 0 for group in groups for p in group["params"]}
    assert decays["embedding.weight"] and not decays["embedding.bias"] and not decays["norm.weight"]


def test_without_muon_it_is_adamw():
    module = network()
    twin = copy.deepcopy(module)
    ours, theirs = optimizer_of(module), torch.optim.AdamW(twin.parameters(), lr=2e-3, betas=(0.9, 0.95), fused=True)
    theirs.param_groups[0]["weight_decay"] = 0.0
    for group in ours.param_groups:
        group["weight_decay"] = 0.0
    for seed in range(3):
        give_gradients(module, seed)
        give_gradients(twin, seed)
        ours.step()
        theirs.step()
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), twin.parameters(), strict=True))


def test_a_fused_projection_is_turned_part_by_part():
    module = network()
    optimizer = optimizer_of(module, muon_lr=0.01, weight_decay=0.0)
    before = copy.deepcopy(module.state_dict())
    give_gradients(module, 1)
    optimizer.step()
    qkv = module["block"].attention.qkv
    moved = (before["block.attention.qkv.weight"] - qkv.weight).split(qkv.sizes)
    for part, gradient in zip(moved, qkv.weight.grad.split(qkv.sizes), strict=True):
        expected = orthogonal(gradient * (0.05 * 0.95 + 0.05)) * 0.01 * 0.2 * max(part.shape) ** 0.5
        assert torch.allclose(part, expected, atol=1e-6)


def test_batches_of_matrices_move_as_each_would_alone(monkeypatch):
    modules = [nn.ModuleList([network(), network()]) for _ in range(3)]
    # Alone; in batches of two matrices of 24 x 24, and one left over, in groups of several parameters; all at once.
    for module, batch, group in zip(modules, (1, 1200, 10 ** 9), (1, 3000, 10 ** 9), strict=True):
        monkeypatch.setattr(muon, "BATCH_ELEMENTS", {"cpu": batch})
        monkeypatch.setattr(muon, "GROUP_ELEMENTS", {"cpu": group})
        config = OptimizerConfig(warmup_steps=0, muon_lr=0.01, weight_decay=0.0)
        taken = configure(module, config, 10 ** 9, precision="bf16-mixed")["optimizer"]
        give_gradients(module, 0)
        taken.step()
    before = nn.ModuleList([network(), network()]).state_dict()
    for name, alone in modules[0].state_dict().items():
        moved = (alone - before[name]).norm()
        assert moved > 0
        for module in modules[1:]:
            assert (module.state_dict()[name] - alone).norm() < 0.02 * moved, name


def test_the_second_step_goes_on_with_the_momentum_of_the_first():
    module = network()
    optimizer = configure(module, OptimizerConfig(warmup_steps=0, muon_lr=0.01, weight_decay=0.0), 10 ** 9)["optimizer"]
    weight, gradients = module["block"].attention.out.weight, []
    for seed in range(2):
        give_gradients(module, seed)
        gradients.append(weight.grad.clone())
        before = weight.detach().clone()
        optimizer.step()
    momentum = 0.05 * (0.95 * gradients[0] + gradients[1])
    update = orthogonal(0.05 * gradients[1] + 0.95 * momentum)  # Nesterov
    expected = before - 0.01 * 0.2 * max(weight.shape) ** 0.5 * update
    assert torch.allclose(weight, expected, atol=1e-5)


def test_a_parameter_without_gradient_stays():
    module = network()
    optimizer = optimizer_of(module, muon_lr=0.01)
    before = copy.deepcopy(module.state_dict())
    optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_the_state_survives_saving():
    module = network()
    optimizer = optimizer_of(module, muon_lr=0.01)
    for seed in range(2):
        give_gradients(module, seed)
        optimizer.step()
    twin = copy.deepcopy(module)
    resumed = optimizer_of(twin, muon_lr=0.01)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for either, model in ((optimizer, module), (resumed, twin)):
        give_gradients(model, 2)
        either.step()
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), twin.parameters(), strict=True))
