"""Which block sizes of the decoding kernels are fastest on this GPU, for one row of decode_speed's shape 600m?

    python benchmarks/tune_decoding.py --write        # writes the result to mmtx/inference/fused_engine.py

One size after another is changed, and kept if the step is faster by half a percent. Prints JSON lines.
"""

import argparse
import json
import re
import time
import traceback
from pathlib import Path

import decode_speed
import numpy as np
import torch

from mmtx.inference import fused_engine
from mmtx.inference.fused_engine import FusedEngine
from mmtx.inference.weights import Weights
from mmtx.sequence import Prompt

FILE = Path(fused_engine.__file__)
STEPS = 100
BLOCKS = [(2 ** 11, 1), (2 ** 12, 1), (2 ** 11, 2), (2 ** 12, 2), (2 ** 13, 2), (2 ** 12, 4), (2 ** 13, 4), (2 ** 14, 4),
          (2 ** 13, 8), (2 ** 14, 8)]
AHEAD = [0, 1, 2, 3]
SLOTS = [(16, 1), (32, 1), (32, 2), (32, 4), (64, 2), (64, 4), (64, 8), (128, 4), (128, 8)]
PARTS = [32, 64, 128, 256]


def say(**told) -> None:
    print(json.dumps(told), flush=True)


class Tuning:
    def __init__(self, seconds: float):
        self.decoder = decode_speed.random_decoder(decode_speed.SHAPES["600m"], "cuda", torch.bfloat16)
        self.ids, self.end = torch.zeros(1, dtype=torch.long, device="cuda"), time.perf_counter() + seconds

    def engine(self) -> FusedEngine:
        engine = FusedEngine(self.decoder, Weights.of(self.decoder, fixed=True))
        engine.prefill([Prompt(np.arange(16))])
        for _ in range(3):
            engine.step(self.ids)
        return engine

    def microseconds(self) -> float:
        """Time of a step of the network alone, at 20 to 125 tokens."""
        try:
            engine = self.engine()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            best = float("inf")
            for _ in range(2):
                engine.cache.restart(torch.tensor([19], device="cuda"), 19)
                engine.captured.graph.replay()
                begin.record()
                for _ in range(STEPS):
                    engine.captured.graph.replay()
                end.record()
                torch.cuda.synchronize()
                best = min(best, begin.elapsed_time(end) * 1e3 / STEPS)
            return best
        except Exception:
            traceback.print_exc()
            return float("inf")

    def choose(self, name: str, read, write, options: list) -> None:
        """Try options of one setting and keep the fastest."""
        best, kept = self.microseconds(), read()
        found = {str(kept): round(best, 1)}
        for option in options:
            if option == kept or time.perf_counter() > self.end:
                continue
            write(option)
            found[str(option)] = round(self.microseconds(), 1)
            if found[str(option)] < 0.995 * best:
                best, kept = found[str(option)], option
        write(kept)
        say(setting=name, kept=kept, microseconds=best, tried=found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--seconds", type=float, default=120)
    options = parser.parse_args()
    f = fused_engine
    say(device=torch.cuda.get_device_name())
    with torch.inference_mode():
        tuning = Tuning(options.seconds)

        def ahead() -> None:
            tuning.choose("AHEAD", lambda: f.AHEAD, lambda o: vars(f).update(AHEAD=o), AHEAD)

        def slots() -> None:
            tuning.choose("SLOTS, SLOT_WARPS", lambda: (f.SLOTS, f.SLOT_WARPS),
                          lambda o: vars(f).update(SLOTS=o[0], SLOT_WARPS=o[1]), SLOTS)

        ahead()
        slots()
        for name in ("gate_up", "qkv", "down", "out"):
            tuning.choose(name, lambda: f.TILES[name], lambda o: f.TILES.update({name: o}), BLOCKS)
        tuning.choose("PART", lambda: f.PART, lambda o: vars(f).update(PART=o), PARTS)
        slots()
        ahead()
        # Cost of a step without one of its kernels.
        for name in ("_attend", "_norm_linear", "_norm_swiglu", "_linear_add"):
            kept = getattr(f, name)
            setattr(f, name, type("Nothing", (), {"__getitem__": lambda self, grid: lambda *a, **k: None})())
            say(without=name, microseconds=tuning.microseconds())
            setattr(f, name, kept)
    if options.write:
        text = FILE.read_text(encoding="utf-8")
        for pattern, made in ((r"TILES = .*", f"TILES = {f.TILES!r}".replace("'", '"')),
                              (r"AHEAD = \d+", f"AHEAD = {f.AHEAD}"), (r"PART = \d+", f"PART = {f.PART}"),
                              (r"SLOTS, SLOT_WARPS = \d+, \d+", f"SLOTS, SLOT_WARPS = {f.SLOTS}, {f.SLOT_WARPS}")):
            text, count = re.subn(f"^{pattern}", made, text, count=1, flags=re.MULTILINE)
            assert count == 1, pattern
        FILE.write_text(text, encoding="utf-8")
        say(written=[line for line in text.splitlines() if re.match(r"(TILES|AHEAD|SLOTS|PART)\b.* = ", line)])


if __name__ == "__main__":
    main()
