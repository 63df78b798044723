"""The Transformer block: rotary positions, packed attention and the key-value cache against plain formulas."""

import math

import pytest
import torch

from mmtx.kernels import apply_rotary_emb
from mmtx.model import Block, BlockConfig, initialise, rotary_embedding
from mmtx.varlen import Packing

CAUSAL = BlockConfig(width=24, heads=4, kv_heads=2, head_dim=8, mlp_dim=40, causal=True)
# Two documents and the padding of row 0; three documents in row 1.
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1, 2, 2]])


def random_block(config: BlockConfig, seed: int = 0) -> Block:
    torch.manual_seed(seed)
    block = Block(config)
    for parameter in block.parameters():  # norms too: at 1 a mix-up of two of them would not show
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    return block


def positions_of(documents: torch.Tensor) -> torch.Tensor:
    positions = torch.zeros_like(documents)
    for i in range(1, documents.shape[1]):
        positions[:, i] = torch.where(documents[:, i] == documents[:, i - 1], positions[:, i - 1] + 1, 0)
    return positions


def test_rotary_is_a_rotation_of_pairs_by_position_times_frequency():
    x = torch.randn(1, 6, 2, 8, generator=torch.Generator().manual_seed(0))  # (B, T, H, K)
    positions = torch.tensor([[0, 1, 2, 5, 9, 100]])
    turned = apply_rotary_emb(x, *rotary_embedding(positions, 8, theta=100.0))
    pairs, expected = torch.complex(x[..., :4], x[..., 4:]), torch.complex(turned[..., :4], turned[..., 4:])
    for t, position in enumerate(positions[0].tolist()):
        for k in range(4):
            angle = torch.polar(torch.tensor(1.0), torch.tensor(position * 100.0 ** (-k / 4)))
            assert torch.allclose(pairs[0, t, :, k] * angle, expected[0, t, :, k], atol=1e-5)


def test_rotary_scores_depend_on_the_distance_alone():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 8, generator=generator)

    def score(at: int, to: int) -> float:
        left, right = (apply_rotary_emb(x, *rotary_embedding(torch.tensor([[p]]), 8, 10_000.0)) for x, p in ((query, at), (key, to)))
        return float((left * right).sum())

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert abs(score(7, 3) - score(7, 4)) > 1e-2


def test_rotary_on_a_grid_gives_each_axis_its_own_pairs():
    grid = torch.tensor([[[2, 5]]])
    cos, sin = rotary_embedding(grid, 8, theta=100.0)
    angles = [2.0, 2.0 / 10, 5.0, 5.0 / 10] * 2  # theta ** (-pair / 2 pairs an axis)
    assert torch.allclose(cos[0, 0], torch.tensor([math.cos(a) for a in angles]), atol=1e-6)
    assert torch.allclose(sin[0, 0], torch.tensor([math.sin(a) for a in angles]), atol=1e-6)


def test_packing_points_at_every_token_once():
    packing = Packing.of(DOCUMENTS)
    # Groups of lengths 1, 2, 3 to 4 and 5 to 8.
    assert packing.groups == ((2, 1), (1, 2), (2, 4), (1, 5))
    assert packing.gather.tolist() == [7, 8, 14, 15, 0, 1, 2, 0, 3, 4, 5, 6, 9, 10, 11, 12, 13]
    assert torch.equal(packing.gather[packing.scatter], torch.arange(16))
    assert packing.scatter.unique().numel() == 16


def test_packing_does_not_join_rows_that_end_and_start_with_the_same_number():
    packing = Packing.of(torch.tensor([[0, 0], [0, 0]]))
    assert packing.groups == ((2, 2),) and packing.gather.tolist() == [0, 1, 2, 3]


def test_packed_attention_equals_each_document_alone():
    block = random_block(CAUSAL)
    x = torch.randn(2, 8, 24, generator=torch.Generator().manual_seed(1))
    positions = positions_of(DOCUMENTS)
    packed = block(x, rotary_embedding(positions, 8, 10_000.0), Packing.of(DOCUMENTS))
    for row in range(2):
        for number in range(3):
            chosen = DOCUMENTS[row] == number
            alone = block(x[row, chosen][None], rotary_embedding(torch.arange(int(chosen.sum()))[None], 8, 10_000.0))
            assert torch.allclose(packed[row, chosen], alone[0], atol=1e-5)


def test_packed_attention_has_no_gradient_between_documents():
    block = random_block(CAUSAL)
    x = torch.randn(2, 8, 24, generator=torch.Generator().manual_seed(1), requires_grad=True)
    packed = block(x, rotary_embedding(positions_of(DOCUMENTS), 8, 10_000.0), Packing.of(DOCUMENTS))
    packed[0, 3:7].square().sum().backward()
    touched = x.grad.abs().sum(-1) > 0
    assert touched.tolist() == [[False] * 3 + [True] * 4 + [False], [False] * 8]


def test_packed_attention_needs_a_causal_block():
    block = random_block(BlockConfig(**{**vars(CAUSAL), "causal": False}))
    with pytest.raises(AssertionError, match="causal"):
        block(torch.zeros(2, 8, 24), rotary_embedding(torch.zeros(2, 8), 8, 1e4), Packing.of(DOCUMENTS))


@pytest.mark.parametrize("causal", [True, False])
def test_attention_against_a_loop_over_heads(causal):
    config = BlockConfig(**{**vars(CAUSAL), "causal": causal})
    attention = random_block(config).attention
    x = torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(2))
    angles = rotary_embedding(torch.arange(5)[None], 8, 10_000.0)
    query, key, value = (part.view(1, 5, -1, 8) for part in attention.qkv(x).split(attention.qkv.sizes, dim=-1))

    def normed(heads, norm):
        scale = (heads.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        return apply_rotary_emb(heads * scale * norm.weight, *angles)

    query, key = normed(query, attention.query_norm), normed(key, attention.key_norm)
    outputs = []
    for head in range(4):
        scores = query[0, :, head] @ key[0, :, head // 2].T / 8 ** 0.5
        if causal:
            scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
        outputs.append(scores.softmax(-1) @ value[0, :, head // 2])
    assert torch.allclose(attention(x, angles), attention.out(torch.cat(outputs, -1))[None], atol=1e-5)


def test_initialise_scales_the_matrices_that_write_into_the_stream():
    torch.manual_seed(0)
    block = Block(BlockConfig(width=128, heads=4, kv_heads=4, head_dim=32, mlp_dim=256, causal=True))
    initialise(block, depth=8)
    for name, parameter in block.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            writes = name in ("attention.out.weight", "feed_forward.down.weight")
            assert parameter.std().item() == pytest.approx(0.005 if writes else 0.02, rel=0.05), name
