"""How many tokens per second does the decoder generate at batch 1, compared with transformers with the same weights?

    python benchmarks/decode_speed.py
    python benchmarks/decode_speed.py --shape 600m --device cuda --dtype bfloat16

Greedy, fp32 unless --dtype says otherwise, random weights; the peer is Qwen3ForCausalLM.generate with its dynamic and
its static cache. All generate the same ids, which is checked. The limit is the speed at the machine's copy bandwidth if
each step reads all weights that it needs once. OMP_NUM_THREADS sets the number of CPU threads.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from measure import interleave, report

from mmtx.config import DecoderConfig
from mmtx.grammar import Grammar
from mmtx.inference.generation import generate
from mmtx.inference.row import prepack_weights
from mmtx.inference.sampling import Sampling
from mmtx.inference.weights import Weights
from mmtx.model import Decoder
from mmtx.sequence import Prompt
from mmtx.vocabulary import SLOTS, Entry, Vocabulary

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from test_model import qwen3

SHAPES = {
    "192x4": DecoderConfig(20_000, width=192, depth=4, heads=3, kv_heads=3, head_dim=64, mlp_dim=512),
    "384x6": DecoderConfig(32_768, width=384, depth=6, heads=6, kv_heads=6, head_dim=64, mlp_dim=1024),
    "600m": DecoderConfig(151_936, width=1024, depth=28, heads=16, kv_heads=8, head_dim=128, mlp_dim=3072,
                          rope_theta=1e6),
    "short": DecoderConfig(2_048, width=32, depth=2, heads=2, kv_heads=1, head_dim=16, mlp_dim=64),
}
PROMPT = 16
BAR = 5.0


def random_decoder(config: DecoderConfig, device: str, dtype: torch.dtype) -> Decoder:
    """Random weights that generate varied text; special tokens have logit 0, so that no answer ends early."""
    torch.manual_seed(0)
    with torch.device(device):
        decoder = Decoder(config).eval().requires_grad_(False)
    for name, parameter in decoder.named_parameters():
        if parameter.dim() > 1 and not name.startswith("embedding"):
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    decoder.embedding.weight[-SLOTS:] = 0
    return decoder.to(device, dtype)


def copy_rate(device: str) -> float:
    """Bytes read per second while copying a block larger than any cache (the bytes written are not counted)."""
    source = torch.empty(2 ** 28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(5):
        start = now(device)
        target.copy_(source)
        best = max(best, len(source) / (now(device) - start))
    return best


def now(device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(name: str, options: argparse.Namespace, new: int, rounds: int) -> None:
    config, dtype = SHAPES[name], getattr(torch, options.dtype)
    decoder = random_decoder(config, options.device, dtype)
    peer = qwen3(decoder).to(options.device, dtype)
    vocabulary = Vocabulary((Entry("text", 0, config.vocabulary_size - SLOTS, "", None, None),))
    grammar = Grammar(vocabulary)
    ids = np.random.default_rng(0).integers(0, vocabulary.range("text").stop, PROMPT)
    given = torch.tensor(ids, device=options.device)[None]
    written = {}
    prepack_weights(decoder)
    weights = Weights.of(decoder, fixed=True)

    def ours() -> float:
        start = now(options.device)
        (written["mmtx"],) = generate(decoder, grammar, [Prompt(ids)], "text", Sampling(max_new_tokens=new), weights=weights)
        # One more step closes the answer; it is not counted.
        return new / (now(options.device) - start)

    def theirs(cache: str) -> float:
        start = now(options.device)
        answer = peer.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=new, do_sample=False,
                               cache_implementation=cache, eos_token_id=None, pad_token_id=0)
        written[cache] = answer[0, PROMPT:].cpu().numpy()
        return new / (now(options.device) - start)

    candidates = {"mmtx": ours, "transformers, dynamic cache": lambda: theirs("dynamic"),
                  "transformers, static cache": lambda: theirs("static")}
    with torch.inference_mode():
        interleave(candidates, 1)
        results = interleave(candidates, rounds)
    for cache in ("dynamic", "static"):
        if dtype == torch.float32:
            assert np.array_equal(written["mmtx"][:new], written[cache]), "found other ids than transformers'"
    bytes_read = sum(p.numel() * p.element_size() for p in decoder.parameters())
    limit = copy_rate(options.device) / bytes_read
    results["limit: all weights read once"] = [limit] * rounds
    report(f"decode_speed_{name}{'' if options.device == 'cpu' else '_gpu'}", "ids/s", results, "mmtx",
           {peer: BAR for peer in candidates if peer != "mmtx"},
           {"shape": name, "parameters": sum(p.numel() for p in decoder.parameters()), "dtype": options.dtype,
            "prompt": PROMPT, "new": new}, options.short)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="default: 192x4 and 384x6")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--new", type=int, default=128, help="ids to write, default: 128")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--short", action="store_true", help="only checks that it runs")
    options = parser.parse_args()
    for name in ["short"] if options.short else options.shape or ["192x4", "384x6"]:
        measure(name, options, 8 if options.short else options.new, 1 if options.short else options.rounds)


if __name__ == "__main__":
    main()
