"""Is this checkout as fast as another one, and does it use no more memory?

    git worktree add /tmp/before 2743cef
    python benchmarks/two_trees.py --before /tmp/before

A process of each takes turns with the other, on one thread: greedy ids of one prompt, captions of pictures and of sounds, batches of
training data for the shipped captioner, and steps of its training (forward and backward). Time is CPU time, which other jobs affect
less than wall time; memory is the peak of each process.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from subprocess import PIPE

ROOT = Path(__file__).parents[1]
STARTER = ROOT / "demos" / "data" / "starter"


def answer() -> None:
    """Run each piece of work requested on stdin and print its seconds, until stdin ends."""
    import resource

    import torch

    import mmtx
    from mmtx.data.collection import DataSource, read_sources
    from mmtx.data.documents import Documents
    from mmtx.data.packing import PackedBatches
    from mmtx.loss import next_token_loss

    torch.set_num_threads(1)
    model = mmtx.load(ROOT / "demos" / "starter", "cpu")
    sources = {"image": "images-test-unseen-style", "audio": "sounds-test-unseen-notes"}
    samples = {kind: read_sources([DataSource([str(STARTER / f"{name}.tar.gz")], limit=32)], 0.0).samples
               for kind, name in sources.items()}
    files = {kind: [mmtx.Medium(kind, sample.turns[0].parts[0].source.read())
                    for sample in found] for kind, found in samples.items()}
    documents = Documents([*samples["image"], *samples["audio"]], model.tokenizers, model.vocabulary, max_seq_len=640,
                          patches=model.decoder.config.encoders)
    batches = PackedBatches(documents, model.vocabulary, 2048, steps=1)
    batch, decoder = batches[0], mmtx.load(ROOT / "demos" / "starter", "cpu").decoder.train()

    def step() -> None:
        hidden = decoder(batch.ids, batch.positions, batch.packing, batch.features).flatten(0, 1)[batch.supervised]
        next_token_loss(decoder.output or decoder.embedding, hidden, batch.targets, batch.plain).total.backward()

    work = {
        "greedy ids of a picture": lambda: model.generate("a cat", out="image"),
        "captions of pictures": lambda: model.caption(files["image"]),
        "captions of sounds": lambda: model.caption(files["audio"]),
        "batch of training data": lambda: batches[0],
        "training step": step,
    }
    for name in iter(lambda: sys.stdin.readline().strip(), ""):
        start = time.process_time()
        if name in work:
            work[name]()
        print(json.dumps([time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, list(work)]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare this checkout with another one.")
    parser.add_argument("--before", help="the other checkout")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--answer", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.answer:
        return answer()
    trees = (options.before, str(ROOT))
    processes = {tree: subprocess.Popen([sys.executable, __file__, "--answer"], text=True, stdin=PIPE, stdout=PIPE,
                                        env={**os.environ, "PYTHONPATH": tree, "OMP_NUM_THREADS": "1"}) for tree in trees}

    def ask(tree: str, name: str) -> list:
        print(name, file=processes[tree].stdin, flush=True)
        return json.loads(processes[tree].stdout.readline())

    names = {tree: ask(tree, "what is there") for tree in processes}[options.before][2]
    for tree in processes:  # warm-up
        for name in names:
            ask(tree, name)
    seconds: dict[tuple[str, str], list[float]] = {(tree, name): [] for tree in processes for name in names}
    for turn in range(options.rounds):
        for name in names:
            for tree in trees[::-1] if turn % 2 else trees:
                seconds[tree, name].append(ask(tree, name)[0])
    for name in names:
        before, now = seconds[options.before, name], seconds[str(ROOT), name]
        print(f"{name:24} before {1000 * median(before):8.1f} ms, now {1000 * median(now):8.1f} ms, "
              f"ratio {median(b / a for a, b in zip(before, now, strict=True)):.3f}")
    print(f"{'highest memory':24} before {ask(options.before, '-')[1] / 1024:8.0f} MB, now {ask(str(ROOT), '-')[1] / 1024:8.0f} MB")
    for process in processes.values():
        process.stdin.close()


if __name__ == "__main__":
    main()
