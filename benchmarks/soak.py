"""A soak test: captions and abandoned streams from many threads on one model. Are answers the same, and memory flat?

    python benchmarks/soak.py                      # 10,000 captions and 1,000 streams from 8 threads
    python benchmarks/soak.py --short              # 200 and 20

Media are pictures, notes and speech of the starter data. Every caption is compared with the one that its medium got alone,
before. Streams of text, pictures and sounds are abandoned at a random point. Resident memory is read when an eighth of the work
is done, and may grow by no more than 5 % after that.
"""

import argparse
import gc
import json
import random
import tarfile
import threading
import time
from datetime import date
from pathlib import Path

from measure import RESULTS, machine, versions

import mmtx

DATA = Path(__file__).parents[1] / "demos" / "data" / "starter"
TARS = ("images-test-unseen-style.tar.gz", "sounds-test-unseen-notes.tar.gz", "speech-test.tar.gz")
GROWTH = 0.05  # share by which memory may grow after warm-up


def media(count: int) -> list:
    """`count` media of each source, in memory."""
    found = []
    for name in TARS:
        with tarfile.open(DATA / name) as tar:
            members = [member for member in tar if member.name.endswith((".webp", ".ogg"))]
            step = max(1, len(members) // count)
            mark = mmtx.Image if "images" in name else mmtx.Audio
            found += [mark(tar.extractfile(member).read()) for member in members[::step][:count]]
    return found


def resident() -> int:
    """Resident memory of this process in bytes."""
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--captions", type=int, default=10_000)
    parser.add_argument("--streams", type=int, default=1_000)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--short", action="store_true")
    options = parser.parse_args()
    if options.short:
        options.captions, options.streams = 200, 20
    model, items = mmtx.load(device="cpu"), media(16)
    truth = [model.caption(item) for item in items]
    work = [("caption", n) for n in range(options.captions)] + [("stream", n) for n in range(options.streams)]
    random.Random(0).shuffle(work)
    lock, wrong, done = threading.Lock(), [], 0
    marks: list[int] = []
    begin = time.monotonic()

    def run(number: int) -> None:
        nonlocal done
        chance = random.Random(number)
        while True:
            with lock:
                if not work:
                    return
                kind, n = work.pop()
            if kind == "caption":
                at = n % len(items)
                answer = model.caption(items[at])
                if answer != truth[at]:
                    wrong.append((at, answer, truth[at]))
            else:
                out = ("text", "image", "audio")[n % 3]
                stream = model.stream(items[n % len(items)] if out == "text" else "red apple", out=out, temperature=1.0,
                                      seed=n, max_new_tokens=40)
                for _, _piece in zip(range(chance.randrange(4)), stream):
                    pass
                if chance.random() < 0.5:
                    stream.close()  # otherwise left to the garbage collector
            with lock:
                done += 1
                if done * 8 % (options.captions + options.streams) < 8:
                    marks.append(resident())
                    print(f"{done:>7,} done, {marks[-1] / 1e6:.0f} MB, {len(wrong)} wrong, {time.monotonic() - begin:.0f} s",
                          flush=True)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(options.threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds, growth = time.monotonic() - begin, marks[-1] / marks[0] - 1
    print(f"{options.captions:,} captions and {options.streams:,} streams from {options.threads} threads in {seconds:.0f} s: "
          f"{len(wrong)} wrong answers, memory grew by {growth:.1%} after the first eighth")
    if not options.short:
        result = {"name": "soak", "date": date.today().isoformat(), "captions": options.captions, "streams": options.streams,
                  "threads": options.threads, "wrong": len(wrong), "seconds": round(seconds),
                  "megabytes": [round(mark / 1e6, 1) for mark in marks], "machine": machine(), "versions": versions()}
        (RESULTS / "soak.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for at, answer, true in wrong[:5]:
        print(f"medium {at}: {answer!r}, alone {true!r}")
    raise SystemExit(bool(wrong) or (growth > GROWTH and not options.short))


if __name__ == "__main__":
    main()
