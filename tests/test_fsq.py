"""The quantizer: codes and vectors are the same thing, all codes are reachable, gradients pass."""

import itertools

import pytest
import torch

from mmtx.errors import InputError
from mmtx.modality.fsq import FSQ

LEVELS = [(2,), (5,), (4, 3, 3), (8, 5, 5), (2, 7, 3, 4), (8, 8, 8, 6, 5)]


@pytest.mark.parametrize("levels", LEVELS)
def test_codes_and_vectors_are_the_same_thing(levels):
    quantizer = FSQ(levels)
    codes = torch.arange(quantizer.size)
    latents = quantizer.to_latents(codes)
    assert torch.equal(quantizer.to_codes(latents), codes)
    assert len(latents.unique(dim=0)) == quantizer.size
    assert latents.min() == -1 and latents.max() == 1


@pytest.mark.parametrize("levels", LEVELS)
def test_every_code_is_what_some_latent_becomes(levels):
    quantizer = FSQ(levels)
    wanted = quantizer.to_latents(torch.arange(quantizer.size))
    share = ((wanted + 1) / 2).clamp(0.01, 0.99)
    latents = torch.logit(share) / 1.6  # the inverse of the bound
    assert torch.allclose(quantizer(latents), wanted, atol=1e-6)


def test_the_first_digit_counts_fastest():
    quantizer = FSQ((4, 3, 2))
    digits = ((quantizer.to_latents(torch.arange(24)) + 1) / 2 * torch.tensor([3, 2, 1])).round().int().tolist()
    assert digits == [[a, b, c] for c, b, a in itertools.product(range(2), range(3), range(4))]


def test_any_latent_gives_a_code_of_the_grid():
    quantizer = FSQ((8, 5, 2))
    latents = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0)) * 100
    codes = quantizer.to_codes(quantizer(latents))
    assert codes.min() >= 0 and codes.max() < quantizer.size
    assert torch.equal(quantizer.to_latents(codes), quantizer(latents).round(decimals=6)) or torch.allclose(
        quantizer.to_latents(codes), quantizer(latents), atol=1e-6)


def test_normal_latents_use_all_digits_nearly_equally():
    quantizer = FSQ((8,))
    codes = quantizer.to_codes(quantizer(torch.randn(80_000, 1, generator=torch.Generator().manual_seed(0))))
    share = codes.bincount(minlength=8) / len(codes)
    # Inner digits span a full step of the bound, the two outer ones half of it.
    assert share[1:-1].min() > 0.10 and share[1:-1].max() < 0.18
    assert share[0] > 0.04 and share[-1] > 0.04


def test_gradients_are_those_of_the_bound():
    quantizer = FSQ((8, 3))
    latents = torch.tensor([[0.3, -1.2]], requires_grad=True)
    quantizer(latents).sum().backward()
    share = torch.sigmoid(1.6 * latents.detach())
    assert torch.allclose(latents.grad, 2 * 1.6 * share * (1 - share), atol=1e-6)


@pytest.mark.parametrize("levels", [(), (1,), (8, 0), (-2, 4)])
def test_levels_are_checked(levels):
    with pytest.raises(InputError, match="levels: found"):
        FSQ(levels)
