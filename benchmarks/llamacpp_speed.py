"""How many tokens per second does the decoder generate, compared with llama.cpp and transformers with the same weights?

    OMP_NUM_THREADS=1 python benchmarks/llamacpp_speed.py
    OMP_NUM_THREADS=2 python benchmarks/llamacpp_speed.py --clock wall

Greedy decoding after a prompt whose prefill is not timed. llama.cpp (package xllamacpp) runs the same random weights as GGUF in f32,
bf16 and q8_0, each in a server process of its own; ours run in float32, in bfloat16 and with `load_in_8bit`. All take turns.
Speed is per second of CPU time of the computing process, which other jobs on the machine affect least; with more than one
thread, waiting threads use CPU time too, so --clock wall counts wall time. Writes
results/llamacpp_speed_SHAPE_batch_ROWS_BEFORE_threads_THREADS.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import gguf
import numpy as np
import torch
from decode_speed import SHAPES as DECODE_SHAPES
from decode_speed import qwen3, random_decoder
from measure import interleave, report

from mmtx.ambient import neutral
from mmtx.config import DecoderConfig
from mmtx.grammar import Grammar
from mmtx.inference.generation import steps
from mmtx.inference.row import prepack_weights
from mmtx.inference.sampling import Sampling
from mmtx.inference.weights import Weights
from mmtx.interop.families import write_weights
from mmtx.interop.gguf_files import NORMAL, write_gguf
from mmtx.model import Decoder
from mmtx.sequence import Prompt
from mmtx.vocabulary import SLOTS, Entry, Vocabulary

SHAPES = {name: DECODE_SHAPES[name] for name in ("192x4", "384x6", "short")} | {
    "640x12": DecoderConfig(32_768, width=640, depth=12, heads=10, kv_heads=10, head_dim=64, mlp_dim=1728)}
TYPES = {"f32": None, "bf16": gguf.GGMLQuantizationType.BF16, "q8_0": gguf.GGMLQuantizationType.Q8_0}
CASES = {  # number of prompts, tokens in each, ids timed
    "batch 1, 32 tokens before": (1, 32, 64), "batch 16, 32 tokens before": (16, 32, 12),
    "batch 1, 1,500 tokens before": (1, 1500, 32)}
BARS = {1: 1.0, 16: 1.5}
SERVER = """
import sys, xllamacpp
path, threads, rows, context = sys.argv[1], *map(int, sys.argv[2:])
options = xllamacpp.CommonParams()
options.model.path, options.n_ctx, options.n_parallel, options.n_gpu_layers, options.warmup = path, rows * context, rows, 0, False
options.cpuparams.n_threads = options.cpuparams_batch.n_threads = threads
server = xllamacpp.Server(options)
print("ADDRESS " + server.listening_address, flush=True)
sys.stdin.read()
"""


class LlamaCpp:
    """A llama.cpp server in its own process."""

    def __init__(self, path: Path, threads: int, rows: int, context: int):
        self.process = subprocess.Popen([sys.executable, "-c", SERVER, str(path), *map(str, (threads, rows, context))],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.address = next(line.split()[1] for line in self.process.stdout if line.startswith("ADDRESS"))
        self.pool = ThreadPoolExecutor(rows)

    def write(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        """Answers of `new` ids to all prompts at once; a slot does not read again what it has cached."""
        def ask(slot: int, ids: list[int]) -> list[int]:
            body = {"prompt": ids, "n_predict": new, "temperature": 0.0, "top_k": 1, "samplers": ["top_k"], "ignore_eos": True,
                    "cache_prompt": True, "id_slot": slot, "return_tokens": True}
            request = urllib.request.Request(self.address + "/completion", json.dumps(body).encode(),
                                             {"Content-Type": "application/json"})
            return json.load(urllib.request.urlopen(request))["tokens"]
        return list(self.pool.map(ask, range(len(prompts)), prompts))

    def seconds(self) -> float:
        """Processor time that the server has used."""
        return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{self.process.pid}/task").glob("*/schedstat")) / 1e9

    def close(self) -> None:
        self.pool.shutdown()
        self.process.kill()
        self.process.wait()


def write_file(decoder: Decoder, path: Path, kind: Any, context: int) -> None:
    """The decoder as GGUF, its matrices in one of TYPES."""
    class Writer(gguf.GGUFWriter):
        def add_tensor(self, name: str, tensor: np.ndarray, **options: Any) -> None:
            if kind is not None and tensor.ndim == 2:
                tensor, options = gguf.quants.quantize(np.ascontiguousarray(tensor), kind), {"raw_dtype": kind}
            super().add_tensor(name, tensor, **options)

    size = decoder.config.vocabulary_size
    pieces = [(f"t{ident}", NORMAL) for ident in range(size)]
    with mock.patch.object(gguf, "GGUFWriter", Writer):
        write_gguf(path, decoder.config, size, write_weights(decoder, gguf=True), pieces, [0.0] * size, {},
                   {"eos": size - 1, "bos": size - 2, "pad": size - 3}, "", context)


def ours(decoder: Decoder, grammar: Grammar, prompts: list[list[int]], new: int, clock: Callable[[], float],
         load_in_8bit: bool = False) -> tuple[Callable[[], float], list]:
    """A function that returns ids per second, and the list that it writes the ids to."""
    weights, written = Weights.of(decoder, fixed=True, load_in_8bit=load_in_8bit), []

    def run() -> float:
        with neutral():
            columns = steps(decoder, grammar, [Prompt(np.array(ids)) for ids in prompts], "text", Sampling(max_new_tokens=new + 1),
                            weights=weights)
            first = next(columns)   # from reading the prompt
            start = clock()
            rest = [next(columns) for _ in range(new)]
            spent = clock() - start
        written[:] = torch.stack([first, *rest], 1).tolist()
        return new * len(prompts) / spent
    return run, written


def measure(name: str, options: argparse.Namespace) -> None:
    config, threads = SHAPES[name], torch.get_num_threads()
    clock = time.process_time if options.clock == "processor" else time.perf_counter
    decoder = random_decoder(config, "cpu", torch.float32)
    small = random_decoder(config, "cpu", torch.bfloat16)
    prepack_weights(decoder)
    grammar = Grammar(Vocabulary((Entry("text", 0, config.vocabulary_size - SLOTS, "", None, None),)))
    peer = qwen3(decoder).eval()
    with tempfile.TemporaryDirectory() as folder:
        for kind, kept in TYPES.items():
            write_file(decoder, Path(folder, f"{kind}.gguf"), kept, 2048)
        for case, (rows, length, new) in CASES.items():
            if options.rows not in (None, rows):
                continue
            if options.short:
                rows, length, new = min(rows, 2), min(length, 40), 4
            rng = np.random.default_rng(0)
            prompts = [rng.integers(0, config.vocabulary_size - SLOTS, length).tolist() for _ in range(rows)]
            context = -(-(length + new + 8) // 256) * 256
            servers = {kind: LlamaCpp(Path(folder, f"{kind}.gguf"), threads, rows, context) for kind in TYPES}

            def theirs(server: LlamaCpp) -> float:
                before = server.seconds() if options.clock == "processor" else time.perf_counter()
                answers = server.write(prompts, new)
                after = server.seconds() if options.clock == "processor" else time.perf_counter()
                assert [len(ids) for ids in answers] == [new] * rows, [len(ids) for ids in answers]
                return new * rows / (after - before)

            def transformers() -> float:
                given, spent = torch.tensor(prompts), []
                for count in (1, new + 1):
                    start = clock()
                    peer.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=count, do_sample=False,
                                  eos_token_id=None, pad_token_id=0)
                    spent.append(clock() - start)
                return new * rows / (spent[1] - spent[0])

            try:
                plain, written = ours(decoder, grammar, prompts, new, clock)
                candidates = {"mmtx float32": plain,
                              "mmtx bfloat16": ours(small, grammar, prompts, new, clock)[0],
                              "mmtx load_in_8bit": ours(decoder, grammar, prompts, new, clock, load_in_8bit=True)[0],
                              **{f"llama.cpp {kind}": lambda server=server: theirs(server) for kind, server in servers.items()}}
                if length < 100:
                    candidates["transformers float32"] = transformers
                with torch.inference_mode():
                    interleave(candidates, 1)
                    answers = servers["f32"].write(prompts, new)
                    results = interleave(candidates, options.rounds)
            finally:
                for server in servers.values():
                    server.close()
            # llama.cpp keeps keys and values in float16: a near tie may be broken differently, and the answers diverge after it.
            same = np.mean([one[0] == two[0] for one, two in zip(answers, written, strict=True)])
            assert same >= 0.5 or length > 100, f"llama.cpp writes other ids: only {same:.2f} of the first are equal"
            suffix = case.replace(",", "").replace(" tokens before", "").replace(" ", "_")
            bar = BARS[1 if rows == 1 else 16]
            found = report(f"llamacpp_speed_{name}_{suffix}_threads_{threads}", f"ids/s of {options.clock} time, {case}", results,
                           "mmtx float32", {"llama.cpp f32": bar, "llama.cpp bf16": bar},
                           {"shape": name, "threads": threads, "rows": rows, "before": length, "new": new, "clock": options.clock,
                            "same first ids as llama.cpp f32": round(float(same), 4),
                            "load average": os.getloadavg()[0]}, options.short, equals={"llama.cpp bf16": "mmtx bfloat16"})
            ratios = [a / b for a, b in zip(results["mmtx load_in_8bit"], results["llama.cpp q8_0"], strict=True)]
            print(f"  8 bits: ours/llama.cpp {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}); 8 bits/float32 of ours "
                  f"{found['median']['mmtx load_in_8bit'] / found['median']['mmtx float32']:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="default: 192x4, 384x6 and 640x12")
    parser.add_argument("--rows", type=int, choices=BARS, help="only the cases of so many prompts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", choices=("processor", "wall"), default="processor")
    parser.add_argument("--short", action="store_true", help="only checks that it runs")
    options = parser.parse_args()
    if options.short:
        options.rounds = 1
    for name in ["short"] if options.short else options.shape or ["192x4", "384x6", "640x12"]:
        measure(name, options)


if __name__ == "__main__":
    main()
