"""How long does planning the batches of many documents take, and how full are the batches?

    python benchmarks/planning.py                # 1 and 20 million documents, and length mixes
    python benchmarks/planning.py --starter      # also the starter data: reads all of it

The lengths of documents are in a memory-mapped file, as after `mmtx prepare`; documents have no content, since planning
does not read it. Each size is planned in a process of its own with only the package imported: seconds to the first batch,
for a window, and to a batch in the middle of the epoch, as for a run resumed there, and peak memory minus that before
planning, mapped pages of the file included. Writes results/planning.json.
"""

import argparse
import multiprocessing
import re
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
import yaml
from measure import write_result

from mmtx.data.collection import DataSource
from mmtx.data.corpus import read_corpus
from mmtx.data.packing import PackedBatches
from mmtx.modality.base import load_tokenizer
from mmtx.vocabulary import Vocabulary

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from test_packing import MIXES

TOKENS = 8192


class Lengths:
    """Documents that are only planned, never read."""

    def __init__(self, lengths: np.ndarray):
        self.lengths = lengths


def draw(path: Path, count: int) -> None:
    """Write random lengths of captions and longer texts, 4 bytes each, in parts that fit in memory."""
    random = np.random.default_rng(0)
    with open(path, "wb") as file:
        for start in range(0, count, 2**20):
            size = min(2**20, count - start)
            lengths = np.where(random.random(size) < 0.8, random.integers(60, 120, size), random.lognormal(6, 1, size))
            file.write(np.clip(lengths, 4, TOKENS).astype(np.uint32).tobytes())


def peak() -> float:
    """Peak memory of this process in megabytes; `getrusage` would include that of its parent."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


def plan(path: Path, results) -> None:
    before, begin = peak(), time.monotonic()
    batches = PackedBatches(Lengths(np.memmap(path, np.uint32, "r")), None, TOKENS, steps=10**9)
    first = len(batches.plan(0))
    seconds = [time.monotonic() - begin]
    real, count = 0, 0
    for window in range(1, 9):
        found = batches.plan(window)
        real += sum(int(batches.documents.lengths[document]) - 1 for group in found for document, _ in group)
        count += len(found)
    seconds.append((time.monotonic() - begin - seconds[0]) / 8)
    # Like a resumed run, which must know how many batches the earlier windows have.
    begin, batches = time.monotonic(), PackedBatches(batches.documents, None, TOKENS, steps=10**9)
    batches._known(batches.windows // 2)
    seconds.append(time.monotonic() - begin)
    results.send({"documents": batches.members, "windows": batches.windows, "batches_of_a_window": first,
                  "real_tokens": round(real / (count * TOKENS), 4), "seconds_to_the_first": round(seconds[0], 2),
                  "seconds_a_window": round(seconds[1], 3), "seconds_to_the_middle": round(seconds[2], 1),
                  "peak_megabytes": round(peak() - before, 1), "file_megabytes": round(path.stat().st_size / 2**20, 1)})


def starter() -> dict[int, float]:
    """Share of real tokens on the starter decoder's training data, by tokens per batch."""
    data = yaml.safe_load((ROOT / "configs/starter/decoder.yaml").read_text())["data"]["init_args"]
    tokenizers = {kind: load_tokenizer(ROOT / folder) for kind, folder in data["tokenizers"].items()}
    vocabulary = Vocabulary.build(tokenizers)
    corpus = read_corpus([DataSource(**source) for source in data["train"]], tokenizers, vocabulary, max_seq_len=data["max_seq_len"])
    repeats = np.ones(len(corpus), int) if corpus.repeats is None else corpus.repeats
    found = {}
    for tokens in (data["tokens_per_batch"], 1024, 2048, 4096, 8192, 16_384):
        batches = PackedBatches(corpus, vocabulary, tokens, repeats=corpus.repeats)
        found[tokens] = round(float((corpus.lengths - 1) @ repeats / (len(batches) * tokens)), 4)
    return found


def mixes() -> dict[str, float]:
    """Share of real tokens for synthetic lengths, two windows each."""
    found = {}
    for name, (room, make) in MIXES.items():
        documents = Lengths(1 + make(np.random.default_rng(1), 2 * 16_384))
        found[name] = round(float((documents.lengths - 1).sum() / (len(PackedBatches(documents, None, room)) * room)), 4)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, nargs="+", default=[1, 20])
    parser.add_argument("--starter", action="store_true")
    options = parser.parse_args()
    result = {"name": "planning", "date": date.today().isoformat(), "tokens": TOKENS, "planned": [], "mixes": mixes()}
    print(f"real tokens: {result['mixes']}", flush=True)
    context = multiprocessing.get_context("spawn")
    for millions in options.millions:
        with tempfile.TemporaryDirectory() as folder:
            draw(Path(folder) / "lengths", round(millions * 10**6))
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=plan, args=(Path(folder) / "lengths", there))
            process.start()
            result["planned"].append(here.recv())
            process.join()
        print(result["planned"][-1], flush=True)
    if options.starter:
        result["starter"] = starter()
        print(f"real tokens of the starter data: {result['starter']}")
    write_result(result)


if __name__ == "__main__":
    main()
