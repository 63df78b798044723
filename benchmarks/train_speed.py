"""Training tokens per second: mmtx, transformers' Qwen3ForCausalLM, litgpt's GPT and torchtune's TransformerDecoder.

    python benchmarks/train_speed.py --threads 1
    python benchmarks/train_speed.py --device cuda --precision bf16 --shapes 0.6b

The same network and the same work, and each is trained as its own users would: in a process of its own, with the same initial
weights, fused AdamW, and its own loss over all tokens. A step is forward, loss, backward, optimizer. They take turns of a few steps,
and their first losses must agree. litgpt and torchtune need old versions of other packages: `make bench` installs them, with what
they import only, into a folder of their own that goes into PYTHONPATH. Without it, their rows are left out.
"""

import argparse
import importlib.util
import multiprocessing
import time
from contextlib import nullcontext

import torch
from measure import interleave, report
from torch import nn

from mmtx.config import DecoderConfig
from mmtx.loss import next_token_loss
from mmtx.model import Decoder
from mmtx.training.memory import keep_memory
from mmtx.training.optimizer import OptimizerConfig, configure

# name: sizes, batch, context. Input and output matrix are not tied: litgpt cannot tie them.
SHAPES = {
    "short": (dict(vocabulary_size=512, width=64, depth=2, heads=2, kv_heads=2, head_dim=32, mlp_dim=128), 2, 32),
    "10m": (dict(vocabulary_size=20_000, width=192, depth=4, heads=3, kv_heads=3, head_dim=64, mlp_dim=512), 4, 512),
    "issue": (dict(vocabulary_size=32_768, width=384, depth=6, heads=6, kv_heads=6, head_dim=64, mlp_dim=1024), 4, 512),
    "100m": (dict(vocabulary_size=32_768, width=640, depth=12, heads=10, kv_heads=10, head_dim=64, mlp_dim=1728), 4, 512),
    "0.6b": (dict(vocabulary_size=151_936, width=1024, depth=28, heads=16, kv_heads=8, head_dim=128, mlp_dim=3072), 4, 2048),
}
BARS = {"cpu": {"transformers": 1.5, "litgpt": 1.3, "torchtune": 1.3},
        "cuda": {"transformers": 1.2, "litgpt": 1.2, "torchtune": 1.2}}


class Ours(nn.Module):
    def __init__(self, decoder: Decoder, context: int):
        super().__init__()
        self.decoder = decoder

    def forward(self, ids, targets):
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        hidden = self.decoder(ids, positions).flatten(0, 1)
        return next_token_loss(self.decoder.output, hidden, targets.flatten()).total / targets.numel()


class Transformers(nn.Module):
    def __init__(self, decoder: Decoder, context: int):
        from transformers import Qwen3Config, Qwen3ForCausalLM

        super().__init__()
        c = decoder.config
        self.model = Qwen3ForCausalLM(Qwen3Config(
            vocab_size=c.vocabulary_size, hidden_size=c.width, intermediate_size=c.mlp_dim, num_hidden_layers=c.depth,
            num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, head_dim=c.head_dim,
            rms_norm_eps=c.norm_eps, tie_word_embeddings=False, max_position_embeddings=context,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}, attention_bias=False,
        ))
        weights = {"model.embed_tokens.weight": decoder.embedding.weight, "model.norm.weight": decoder.norm.weight,
                   "lm_head.weight": decoder.output.weight}
        for i, block in enumerate(decoder.blocks):
            attention, gate_up = block.attention, block.feed_forward.gate_up
            parts = [("q_proj", "k_proj", "v_proj"), attention.qkv.weight.split(attention.qkv.sizes)]
            layer = {f"self_attn.{name}": part for name, part in zip(*parts)} | {
                "self_attn.o_proj": attention.out.weight, "self_attn.q_norm": attention.query_norm.weight,
                "self_attn.k_norm": attention.key_norm.weight, "input_layernorm": block.attention_norm.weight,
                "post_attention_layernorm": block.feed_forward_norm.weight,
                "mlp.gate_proj": gate_up.weight.split(gate_up.sizes)[0],
                "mlp.up_proj": gate_up.weight.split(gate_up.sizes)[1], "mlp.down_proj": block.feed_forward.down.weight}
            weights |= {f"model.layers.{i}.{name}.weight": part for name, part in layer.items()}
        self.model.load_state_dict(weights)

    def forward(self, ids, targets):
        # `shift_labels` are targets already shifted.
        return self.model(ids, labels=targets, shift_labels=targets.contiguous(), use_cache=False).loss


class LitGPT(nn.Module):
    def __init__(self, decoder: Decoder, context: int):
        from litgpt.config import Config
        from litgpt.model import GPT
        from litgpt.utils import chunked_cross_entropy

        super().__init__()
        self.loss = chunked_cross_entropy
        c = decoder.config
        self.model = GPT(Config(
            block_size=context, padded_vocab_size=c.vocabulary_size, vocab_size=c.vocabulary_size, n_layer=c.depth,
            n_head=c.heads, n_query_groups=c.kv_heads, head_size=c.head_dim, n_embd=c.width,
            intermediate_size=c.mlp_dim, rotary_percentage=1.0, parallel_residual=False, bias=False,
            norm_class_name="RMSNorm", norm_eps=c.norm_eps, norm_qk=True, mlp_class_name="LLaMAMLP",
            rope_base=int(c.rope_theta),
        ))
        weights = {"transformer.wte": decoder.embedding, "lm_head": decoder.output, "transformer.ln_f": decoder.norm}
        for i, block in enumerate(decoder.blocks):
            attention, feed = block.attention, block.feed_forward
            layer = {"norm_1": block.attention_norm, "norm_2": block.feed_forward_norm, "attn.qkv": attention.qkv,
                     "attn.proj": attention.out, "attn.norm_q": attention.query_norm,
                     "attn.norm_k": attention.key_norm, "mlp.proj": feed.down}
            weights |= {f"transformer.h.{i}.{name}": module for name, module in layer.items()}
            for name, part in zip(("fc_1", "fc_2"), feed.gate_up.weight.chunk(2)):
                weights[f"transformer.h.{i}.mlp.{name}"] = nn.ParameterDict({"weight": part})
        self.model.load_state_dict({f"{name}.weight": module.weight for name, module in weights.items()})

    def forward(self, ids, targets):
        return self.loss(self.model(ids), targets)


class TorchTune(nn.Module):
    def __init__(self, decoder: Decoder, context: int):
        from torchtune.modules import (
            FeedForward,
            MultiHeadAttention,
            RMSNorm,
            RotaryPositionalEmbeddings,
            TransformerDecoder,
            TransformerSelfAttentionLayer,
        )
        from torchtune.modules.loss import CEWithChunkedOutputLoss

        super().__init__()
        c = decoder.config
        norm = lambda size: RMSNorm(size, eps=c.norm_eps)
        linear = lambda inputs, outputs: nn.Linear(inputs, outputs, bias=False)
        queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
        self.loss = CEWithChunkedOutputLoss()
        self.model = TransformerDecoder(
            tok_embeddings=nn.Embedding(c.vocabulary_size, c.width), max_seq_len=context, num_heads=c.heads,
            head_dim=c.head_dim, norm=norm(c.width), output=linear(c.width, c.vocabulary_size),
            layers=nn.ModuleList(TransformerSelfAttentionLayer(
                attn=MultiHeadAttention(
                    embed_dim=c.width, num_heads=c.heads, num_kv_heads=c.kv_heads, head_dim=c.head_dim,
                    q_proj=linear(c.width, queries), k_proj=linear(c.width, keys), v_proj=linear(c.width, keys),
                    output_proj=linear(queries, c.width), q_norm=norm(c.head_dim), k_norm=norm(c.head_dim),
                    pos_embeddings=RotaryPositionalEmbeddings(c.head_dim, context, int(c.rope_theta)), max_seq_len=context),
                mlp=FeedForward(gate_proj=linear(c.width, c.mlp_dim), up_proj=linear(c.width, c.mlp_dim),
                                down_proj=linear(c.mlp_dim, c.width)),
                sa_norm=norm(c.width), mlp_norm=norm(c.width)) for _ in range(c.depth)))
        self.model.set_num_output_chunks(self.loss.num_output_chunks)
        # torchtune rotates neighbours, where the others rotate the first half of a head with the second.
        neighbours = lambda weight: weight.unflatten(0, (-1, 2, c.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        weights = {"tok_embeddings.weight": decoder.embedding.weight, "norm.scale": decoder.norm.weight,
                   "output.weight": decoder.output.weight}
        for i, block in enumerate(decoder.blocks):
            attention, gate_up = block.attention, block.feed_forward.gate_up
            query, key, value = attention.qkv.weight.split(attention.qkv.sizes)
            gate, up = gate_up.weight.split(gate_up.sizes)
            layer = {"attn.q_proj.weight": neighbours(query), "attn.k_proj.weight": neighbours(key),
                     "attn.v_proj.weight": value, "attn.output_proj.weight": attention.out.weight,
                     "attn.q_norm.scale": attention.query_norm.weight, "attn.k_norm.scale": attention.key_norm.weight,
                     "sa_norm.scale": block.attention_norm.weight, "mlp_norm.scale": block.feed_forward_norm.weight,
                     "mlp.w1.weight": gate, "mlp.w3.weight": up, "mlp.w2.weight": block.feed_forward.down.weight}
            weights |= {f"layers.{i}.{name}": part for name, part in layer.items()}
        self.model.load_state_dict(weights)

    def forward(self, ids, targets):
        return self.loss(self.model(ids), targets)


CANDIDATES = {"mmtx": Ours, "transformers": Transformers, "litgpt": LitGPT, "torchtune": TorchTune}


def train(name: str, shape: str, device: str, precision: str, threads: int, compiled: bool, channel) -> None:
    """Send the loss of the first step; then, for each number of steps received, run them and send tokens/s."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    sizes, batch, context = SHAPES[shape]
    model = CANDIDATES[name](Decoder(DecoderConfig(**sizes, tied=False)), context).to(device)
    if name == "mmtx":
        keep_memory()  # as `mmtx fit` does
        optimizer = configure(model, OptimizerConfig(), 10 ** 6)["optimizer"]
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    run = torch.compile(model) if compiled else model
    generator = torch.Generator().manual_seed(0)
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None

    def step() -> float:
        ids = torch.randint(0, sizes["vocabulary_size"], (batch, context + 1), generator=generator).to(device)
        with torch.autocast(device, torch.bfloat16) if precision == "bf16" else nullcontext():
            loss = run(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    channel.send(float(step()))
    while steps := channel.recv():
        synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        synchronize()
        channel.send(steps * batch * context / (time.perf_counter() - start))


def measure(shape: str, options: argparse.Namespace) -> None:
    """Measure the candidates in turns at one shape, and report."""
    names = [name for name in CANDIDATES if name == "mmtx" or importlib.util.find_spec(name)]
    for name in CANDIDATES.keys() - set(names):
        print(f"{name} cannot be imported: left out")
    context = multiprocessing.get_context("spawn")
    channels, processes, losses = {}, [], {}
    for name in names:
        channels[name], there = context.Pipe()
        compiled = options.device == "cuda" and name != "mmtx"
        arguments = (name, shape, options.device, options.precision, options.threads, compiled, there)
        processes.append(context.Process(target=train, args=arguments, daemon=True))
        processes[-1].start()
        there.close()
        losses[name] = channels[name].recv()
    tolerance = 1e-5 if options.precision == "fp32" else 1e-2
    assert all(abs(loss - losses["mmtx"]) < tolerance * losses["mmtx"] for loss in losses.values()), losses

    def turn(channel):
        channel.send(options.steps)
        return channel.recv()

    results = interleave({name: lambda channel=channel: turn(channel) for name, channel in channels.items()},
                         options.rounds)
    for channel, process in zip(channels.values(), processes, strict=True):
        channel.send(0)
        process.join()
    sizes, batch, length = SHAPES[shape]
    bars = {name: bar for name, bar in BARS[options.device].items() if name in names}
    report(f"train_speed-{shape}-{options.precision}-{options.device}-{options.threads}", "tokens/s", results, "mmtx", bars,
           {**sizes, "batch": batch, "context": length, "precision": options.precision, "first losses": losses,
            "threads": options.threads, "steps of a turn": options.steps}, options.short)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["10m", "issue", "100m"])
    parser.add_argument("--device", choices=BARS, default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="of a turn")
    parser.add_argument("--short", action="store_true", help="see that it runs")
    options = parser.parse_args()
    if options.short:
        options.shapes, options.rounds, options.steps, options.threads = ["short"], 1, 1, 1
    for shape in options.shapes:
        measure(shape, options)


if __name__ == "__main__":
    main()
