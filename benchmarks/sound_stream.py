"""Streaming of generated sound: time to the first samples, and the real-time factor.

    python benchmarks/sound_stream.py
    python benchmarks/sound_stream.py --short

`demos/generate` plays notes, with one thread. For `model.stream(out="audio")`: seconds until the first samples, and seconds until
the last divided by the duration of the sound (the real-time factor: below 1 it can be played while it is generated). It takes turns
with `model.generate`, which returns nothing before the end; the samples of both are compared. Seconds are CPU time, which equals
wall time if no other program runs; a second table has wall time.
"""

import argparse
import json
import time
from datetime import date
from pathlib import Path
from statistics import median

import numpy as np
import torch
from measure import RESULTS, machine, versions

import mmtx

FOLDER = Path(__file__).parents[1] / "demos" / "generate"
SAID = ("trumpet, C 5", "acoustic grand piano, F 3", "marimba, C sharp 6", "contrabass, A 1", "clarinet, B 5", "violin, D 4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="once; says nothing about speed, writes nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = mmtx.load(FOLDER, "cpu")
    clocks = {"of a processor": time.process_time, "of the clock": time.perf_counter}
    now = lambda: np.array([clock() for clock in clocks.values()])
    found: dict[str, list[np.ndarray]] = {name: [] for name in (
        "seconds to the first samples", "real-time factor of the stream", "seconds to the whole", "real-time factor of the whole")}
    lasts, furthest = [], 0.0
    for turn in range(1 if options.short else 6):
        for said in SAID:
            asked = {"out": "audio", "temperature": 0.3, "seed": 0}
            begin, times, pieces = now(), [], []
            for piece in model.stream(said, **asked):
                pieces.append(piece.samples)
                times.append(now() - begin)
            begin = now()
            whole = model.generate(said, **asked)
            end = now() - begin
            samples = np.concatenate(pieces)
            furthest = max(furthest, float(np.abs(samples - whole.samples).max()))
            lasting = len(samples) / whole.rate
            if turn or options.short:  # the first turn warms up
                lasts.append(lasting)
                for name, figure in zip(found, (times[0], times[-1] / lasting, end, end / lasting), strict=True):
                    found[name].append(figure)
    result = {
        "name": "sound_stream", "date": date.today().isoformat(), "model": FOLDER.name, "sounds": len(lasts),
        "seconds_of_sound": round(median(lasts), 2), "largest_difference_of_a_sample": furthest,
        **{clock: {name: round(median(figure[place] for figure in figures), 4) for name, figures in found.items()}
           for place, clock in enumerate(clocks)},
        "machine": machine(), "versions": versions(),
    }
    print(json.dumps(result, indent=1))
    if not options.short:
        (RESULTS / "sound_stream.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
