"""The decoder: parity with Qwen3 of transformers, no leak between packed documents, composed rows."""

import json
from dataclasses import asdict

import pytest
import torch

from mmtx.config import CodeRange, DecoderConfig
from mmtx.embedding import TokenEmbedding
from mmtx.errors import InputError
from mmtx.modality.fsq import FSQ
from mmtx.model import Decoder
from mmtx.varlen import Packing

SIZES = {"width": 32, "depth": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "mlp_dim": 48, "rope_theta": 5000.0}
COMPOSED = (CodeRange(10, (4, 3, 2)), CodeRange(34, (5, 2)))  # 24 and 10 ids
LENGTHS = (7, 1, 12, 4)


def random_decoder(vocabulary_size: int = 44, seed: int = 0, **config) -> Decoder:
    torch.manual_seed(seed)
    decoder = Decoder(DecoderConfig(vocabulary_size, **{**SIZES, **config}))
    for parameter in decoder.parameters():  # norms too: at 1 a mix-up of two of them would not show
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return decoder.eval().requires_grad_(False)


def random_ids(*shape: int, seed: int = 0, size: int = 44) -> torch.Tensor:
    return torch.randint(0, size, shape, generator=torch.Generator().manual_seed(seed))


def pack(documents: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, Packing]:
    numbers = torch.cat([torch.full_like(document, n) for n, document in enumerate(documents)])[None]
    positions = torch.cat([torch.arange(len(document)) for document in documents])[None]
    return torch.cat(documents)[None], positions, Packing.of(numbers)


def qwen3(decoder: Decoder):
    """The same network in transformers, with the weights of `decoder`."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    c = decoder.config
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=c.vocabulary_size, hidden_size=c.width, intermediate_size=c.mlp_dim, num_hidden_layers=c.depth,
        num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, head_dim=c.head_dim,
        rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tied, max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}, attention_bias=False,
    ))
    weights = {"model.embed_tokens.weight": decoder.embedding.matrix(), "model.norm.weight": decoder.norm.weight,
               "lm_head.weight": decoder.output_matrix()}
    for i, block in enumerate(decoder.blocks):
        parts = [heads * c.head_dim for heads in (c.heads, c.kv_heads, c.kv_heads)]
        query, key, value = block.attention.qkv.weight.split(parts)
        gate, up = block.feed_forward.gate_up.weight.chunk(2)
        layer = {
            "input_layernorm": block.attention_norm.weight, "post_attention_layernorm": block.feed_forward_norm.weight,
            "self_attn.q_proj": query, "self_attn.k_proj": key, "self_attn.v_proj": value,
            "self_attn.o_proj": block.attention.out.weight,
            "self_attn.q_norm": block.attention.query_norm.weight, "self_attn.k_norm": block.attention.key_norm.weight,
            "mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": block.feed_forward.down.weight,
        }
        weights |= {f"model.layers.{i}.{name}.weight": tensor for name, tensor in layer.items()}
    model.load_state_dict(weights)
    return model.eval()


@pytest.mark.parametrize(
    "config",
    [{}, {"tied": False}, {"kv_heads": 4}, {"kv_heads": 1, "head_dim": 10}, {"composed": COMPOSED},
     {"norm_eps": 1e-2}],
    ids=str,
)
def test_parity_with_qwen3(config):
    pytest.importorskip("transformers")
    decoder = random_decoder(**config)
    ids = random_ids(2, 19)
    with torch.no_grad():
        ours = decoder.logits(decoder(ids, torch.arange(19).expand(2, 19)))
        theirs = qwen3(decoder)(ids).logits
    assert ours.std() > 0.1
    assert torch.allclose(ours, theirs, atol=1e-5), (ours - theirs).abs().max()


@pytest.mark.parametrize("changed", range(len(LENGTHS)))
def test_packed_documents_do_not_see_each_other(changed):
    decoder = random_decoder(composed=COMPOSED)
    documents = [random_ids(length, seed=n) for n, length in enumerate(LENGTHS)]
    before = decoder.logits(decoder(*pack(documents)))[0].split(LENGTHS)
    documents[changed] = (documents[changed] + 1) % 44
    after = decoder.logits(decoder(*pack(documents)))[0].split(LENGTHS)
    for n, (old, new) in enumerate(zip(before, after, strict=True)):
        difference = (old - new).abs().max()
        assert difference > 0.1 if n == changed else difference == 0


def test_packed_logits_equal_each_document_alone():
    decoder = random_decoder()
    documents = [random_ids(length, seed=n) for n, length in enumerate(LENGTHS)]
    packed = decoder.logits(decoder(*pack(documents)))[0].split(LENGTHS)
    for document, logits in zip(documents, packed, strict=True):
        alone = decoder.logits(decoder(document[None], torch.arange(len(document))[None]))[0]
        assert torch.allclose(logits, alone, atol=1e-5)


def test_the_decoder_looks_only_back():
    decoder = random_decoder()
    ids = random_ids(1, 12)
    positions = torch.arange(12)[None]
    before = decoder(ids, positions)
    ids[0, 7] = (ids[0, 7] + 1) % 44
    difference = (decoder(ids, positions) - before).abs().amax(-1)[0]
    assert (difference[:7] == 0).all() and (difference[7:] > 0).all()


def test_composed_rows_are_the_sum_of_digit_rows():
    decoder = random_decoder(composed=COMPOSED)
    weight = decoder.embedding.weight
    assert weight.shape == (10 + (4 + 3 + 2) + (5 + 2), 32)
    matrix = decoder.output_matrix()
    assert matrix.shape == (44, 32)
    assert torch.equal(matrix[:10], weight[:10])
    for code in range(24):
        digits = (code % 4, code // 4 % 3, code // 12)
        row = weight[10 + digits[0]] + weight[14 + digits[1]] + weight[17 + digits[2]]
        assert torch.allclose(matrix[10 + code], row, atol=1e-6)
    for code in range(10):
        assert torch.allclose(matrix[34 + code], weight[19 + code % 5] + weight[24 + code // 5], atol=1e-6)


def test_digits_of_the_embedding_are_those_of_the_quantizer():
    levels = (4, 3, 2)
    embedding = TokenEmbedding(DecoderConfig(24, composed=(CodeRange(0, levels),), width=3))
    with torch.no_grad():  # a row holds the value of its digit in the column of its place
        embedding.weight.zero_()
        first = 0
        for place, level in enumerate(levels):
            embedding.weight[first:first + level, place] = torch.arange(level) * 2 / (level - 1) - 1
            first += level
    assert torch.allclose(embedding.matrix(), FSQ(levels).to_latents(torch.arange(24)), atol=1e-6)


@pytest.mark.parametrize("composed", [(), COMPOSED])
def test_matrix_holds_what_forward_gives(composed):
    embedding = random_decoder(composed=composed).embedding
    assert torch.allclose(embedding.matrix(), embedding(torch.arange(44)[None])[0], atol=1e-6)


def test_gradients_reach_every_row():
    decoder = random_decoder(composed=COMPOSED, tied=False).requires_grad_(True)
    ids = torch.arange(44)[None]
    decoder.logits(decoder(ids, ids)).square().sum().backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert (parameter.grad.flatten(1).abs().sum(1) > 0).all() if parameter.dim() > 1 else True, name


def test_plain_matrix_is_the_first_rows_of_the_whole():
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(20 + 12, width=32, depth=1, heads=2, kv_heads=2, head_dim=16, mlp_dim=32,
                                    composed=(CodeRange(20, (4, 3)),)))
    assert torch.equal(decoder.output_matrix(plain=True), decoder.output_matrix()[:20])


def test_tied_and_untied():
    tied, untied = random_decoder(), random_decoder(tied=False)
    assert tied.output_matrix() is tied.embedding.weight
    assert untied.output_matrix() is untied.output.weight
    assert set(untied.state_dict()) - set(tied.state_dict()) == {"output.weight"}
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(tied.logits(hidden), hidden @ tied.embedding.weight.T)
    assert torch.allclose(untied.logits(hidden), hidden @ untied.output.weight.T)


def test_config_survives_json():
    config = DecoderConfig(44, **SIZES, composed=COMPOSED)
    assert DecoderConfig(**json.loads(json.dumps(asdict(config)))) == config
    assert config.plain_rows == 10


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"heads": 3, "kv_heads": 2}, "heads: found 3, expected a multiple of kv_heads=2"),
        ({"kv_heads": 0}, "kv_heads: found 0"),
        ({"head_dim": 15}, "head_dim: found 15, expected an even number"),
        ({"depth": 0}, "depth: found 0"),
        ({"width": 0}, "width: found 0"),
        ({"mlp_dim": -1}, "mlp_dim: found -1"),
        ({"composed": (CodeRange(11, (4, 3, 2)),)}, "composed: found a range at id 11, expected it at 20"),
        ({"composed": (CodeRange(10, (4, 3, 2)), CodeRange(33, (5, 2)))}, "found a range at id 33, expected it at 34"),
        ({"composed": COMPOSED[::-1]}, "composed: found a range at id 34, expected it at 10"),
    ],
)
def test_config_errors(config, message):
    with pytest.raises(InputError, match=message):
        DecoderConfig(44, **{**SIZES, **config})
