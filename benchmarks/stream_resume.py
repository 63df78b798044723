"""Does a stream of shards resume where it was interrupted? Ours, litdata's and WebDataset's, each with 2 workers.

    pip install litdata webdataset
    python benchmarks/stream_resume.py

1,000 numbered samples, shuffled, in shards of 50 and batches of 4, two epochs. Each stream is interrupted at 20 points:
its state is saved after a batch while workers have read ahead, as in a checkpoint, and a new process resumes from it.
Compared with the uninterrupted stream: whether all following batches are the same, with as many workers and with 3, and how
many samples of the interrupted epoch are repeated or lost. WebDataset has no state: the stream is rebuilt, and batches up to
that point are skipped. Writes results/stream_resume.json.
"""

import json
import multiprocessing
import os
import random
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from importlib import metadata
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

from measure import RESULTS, machine, require, versions

SAMPLES, SHARD, BATCH, WORKERS, OTHER_WORKERS, POINTS = 1000, 50, 4, 2, 3, 20
EPOCH = SAMPLES // BATCH
Stream = tuple[Iterator[list[int]], Callable[[], Any]]  # batches, and a function that returns the state after the last one


def ours(root: Path, state: Any, skip: int, workers: int) -> Stream:
    from mmtx.data.collection import DataSource
    from mmtx.data.packing import PackedBatches
    from mmtx.data.prepared import Prepared
    from mmtx.modality.base import load_tokenizer
    from mmtx.training.loader import ResumableLoader
    from mmtx.vocabulary import Vocabulary

    vocabulary = Vocabulary.build({"text": load_tokenizer(root / "text")})
    documents = Prepared(DataSource([str(root / "prepared")]), str(root / "prepared"), vocabulary, max_seq_len=64)
    batches = PackedBatches(documents, vocabulary, BATCH * int(documents.lengths[0] - 1), steps=2 * EPOCH)
    loader = ResumableLoader(batches, workers)
    if state is not None:
        loader.load_state_dict(state)
    return (batch.samples.tolist() for batch in loader), loader.state_dict


def litdata(root: Path, state: Any, skip: int, workers: int) -> Stream:
    from litdata import StreamingDataLoader, StreamingDataset

    loader = StreamingDataLoader(StreamingDataset(str(root / "litdata"), shuffle=True, seed=0), batch_size=BATCH,
                                 num_workers=workers)
    if state is not None:
        loader.load_state_dict(state)

    def batches() -> Iterator[list[int]]:
        for _ in range(2 if state is None or state["current_epoch"] == 1 else 1):
            for batch in loader:
                yield [int(number) for number in batch]
    return batches(), loader.state_dict


def webdataset(root: Path, state: Any, skip: int, workers: int, seeded: bool = True) -> Stream:
    """Has no state to resume from, so it skips what was read before. Unless `seeded`, it shuffles as in its manual."""
    import torch
    from webdataset import WebDataset, detshuffle, shuffle, split_by_worker

    shards = sorted(map(str, (root / "webdataset").glob("*.tar")))
    given = {"workersplitter": split_by_worker, "detshuffle": True, "seed": 0} if seeded else {}
    data = WebDataset(shards, shardshuffle=SAMPLES // SHARD, **given)
    data = data.compose(detshuffle(100, seed=0) if seeded else shuffle(100)).decode().to_tuple("cls")
    loader = torch.utils.data.DataLoader(data.batched(BATCH, partial=True), batch_size=None, num_workers=workers)
    whole = ([int(number) for number in batch[0]] for _ in range(2) for batch in loader)
    return islice(whole, skip, None), lambda: None


STREAMS = {"mmtx": ours, "litdata": litdata, "webdataset, detshuffle, skipping": webdataset,
           "webdataset, shuffle, skipping": partial(webdataset, seeded=False)}


def number(index: int) -> int:
    return index


def make(root: Path) -> None:
    """Write the samples in the format of each library."""
    from litdata import optimize

    from mmtx.data.collection import DataSource
    from mmtx.data.prepare import prepare
    from mmtx.modality.text import TextTokenizer

    optimize(number, list(range(SAMPLES)), str(root / "litdata"), chunk_size=SHARD, num_workers=1, keep_data_ordered=True)
    (root / "webdataset").mkdir()
    for start in range(0, SAMPLES, SHARD):
        with tarfile.open(root / "webdataset" / f"{start:04d}.tar", "w") as tar:
            for index in range(start, start + SHARD):
                info, data = tarfile.TarInfo(f"{index:04d}.cls"), str(index).encode()
                info.size = len(data)
                tar.addfile(info, BytesIO(data))
    text = TextTokenizer.train(["0 1 2 3 4 5 6 7 8 9"], 270)
    text.save(root / "text")
    (root / "rows.jsonl").write_text("".join(json.dumps({"text": f"{index:04d}"}) + "\n" for index in range(SAMPLES)))
    prepare(DataSource([str(root / "rows.jsonl")]), {"text": text}, root / "prepared", rows=SHARD)


FRESH = multiprocessing.get_context("forkserver")  # with fork, a lock held here would block the child


def read(name: str, root: Path, state: Any, skip: int, count: int | None, workers: int, told) -> None:
    """Send `count` batches, or all that are left, and the state after the last one."""
    batches, state_of = STREAMS[name](root, state, skip, workers)
    try:
        found = list(islice(batches, count)), state_of()
    except Exception as error:  # a library that refuses to resume
        found = [], type(error).__name__
    told.send(found)
    told.close()
    os._exit(0)


def apart(*arguments) -> tuple[list[list[int]], Any]:
    """`read` in its own process."""
    here, there = FRESH.Pipe(duplex=False)
    process = FRESH.Process(target=read, args=(*arguments, there))
    process.start()
    there.close()
    answer = here.recv()
    process.join()
    return answer


def main() -> None:
    for name in ("litdata", "webdataset"):
        require(name, name)
    result = {"name": "stream_resume", "date": date.today().isoformat(), "samples": SAMPLES, "interruptions": POINTS}
    points = sorted(random.Random(0).sample(range(1, 2 * EPOCH - 1), POINTS))
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        os.environ.pop("TQDM_DISABLE", None)  # litdata's progress bar fails if tqdm is disabled
        os.environ |= {"DATA_OPTIMIZER_CACHE_FOLDER": name + "/cache", "DATA_OPTIMIZER_DATA_CACHE_FOLDER": name + "/cached"}
        make(root)
        for stream in STREAMS:
            whole, _ = apart(stream, root, None, 0, None, WORKERS)
            same = others = twice = never = 0
            for point in points:
                before, state = apart(stream, root, None, 0, point, WORKERS)
                after, _ = apart(stream, root, state, point, None, WORKERS)
                same += before + after == whole
                others += before + apart(stream, root, state, point, None, OTHER_WORKERS)[0] == whole
                epoch = point // EPOCH
                counts = Counter(sample for batch in (before + after)[epoch * EPOCH:(epoch + 1) * EPOCH] for sample in batch)
                twice += sum(count - 1 for count in counts.values())
                never += SAMPLES - len(counts)
            result[stream] = {"the_same": same, "the_same_with_other_workers": others, "samples_twice": twice,
                              "samples_never": never}
            print(f"{stream}: {same} of {POINTS} go on with the same batches, with {OTHER_WORKERS} workers {others}; in the "
                  f"epochs interrupted {twice} samples come again and {never} never", flush=True)
    packages = {package: metadata.version(package) for package in ("litdata", "webdataset")}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "stream_resume.json").write_text(
        json.dumps({**result, "machine": machine(), "versions": {**versions(), **packages}}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
