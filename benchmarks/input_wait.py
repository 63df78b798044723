"""What share of a training step is spent waiting for data, with the workers of a shipped config?

    python benchmarks/input_wait.py
    python benchmarks/input_wait.py --config configs/quickstart/decoder.yaml --steps 400

Runs `mmtx fit` with the config as it is, without validation, and reads from Lightning's profiler how long each step
waited for its batch. The steps before --after, in which workers start and the page cache is cold, are excluded. A round is
a run. OMP_NUM_THREADS sets the number of threads.
"""

import argparse
import os
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from measure import interleave, report

from mmtx.training.run import command_line, shipped_configs

BAR = 0.02
PROFILER = "lightning.pytorch.profilers.SimpleProfiler"
WAIT, STEP = "[_TrainingEpochLoop].train_dataloader_next", "run_training_batch"


def share(arguments: list[str], after: int) -> float:
    """Run once -> the share of time spent waiting for input, from step `after` on."""
    profiler = command_line(["fit", *arguments], run=True).trainer.profiler
    wait, step = (sum(profiler.recorded_durations[action][after:]) for action in (WAIT, STEP))
    return wait / (wait + step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/starter/decoder.yaml")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--after", type=int, default=50, help="steps that do not count, default: 50")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="only checks that it runs")
    options = parser.parse_args()
    steps, after, rounds, more = options.steps, options.after, options.rounds, []
    if options.short:       # tokenizers and model of the config, few of its samples
        steps, after, rounds = 4, 1, 1
        more = ["--data.num_workers=1", "--data.tokens_per_batch=640",
                *(f'--data.{part}=[{{"paths": ["demos/data/starter/images-train-004.tar.gz"], "limit": 8}}]'
                  for part in ("train", "validation"))]
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        arguments = [*shipped_configs(["--config", options.config]), f"--output={folder}/run", *more,
                     f"--trainer.max_steps={steps}", "--trainer.limit_val_batches=0", "--trainer.val_check_interval=null",
                     "--trainer.enable_progress_bar=false", f"--trainer.profiler={PROFILER}",
                     f"--trainer.profiler.dirpath={folder}", "--trainer.profiler.filename=profile"]
        results = interleave({"waiting": lambda: share(arguments, after)}, rounds)
    results["the step"] = [1.0] * rounds
    name = "input_wait_" + Path(options.config).parent.name
    report(name, "share of the step", results, "waiting", {"the step": BAR},
           {"config": options.config, "steps": steps, "after": after}, options.short, less_is_better=True)


if __name__ == "__main__":
    main()
