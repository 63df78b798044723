"""`mmtx serve` under load: many users, some of them hostile. Checks every answer; reports errors, memory, latency, throughput.

    python benchmarks/serving.py                       # 20 users for 10 minutes, then 16 users against one
    python benchmarks/serving.py soak --seconds 60
    python benchmarks/serving.py rate
    python benchmarks/serving.py --short

soak: users request captions of pictures, notes and speech of the starter data, half of them streamed, and every answer is
compared with the one that its medium gets alone, computed before. One request in twenty is hostile: a decompression bomb, a
truncated file, an invalid file, a caller who disconnects. Counted are right answers (200 with the expected text) and wrong ones
(200 with another text, or to a request that must be refused), expected and unexpected refusals (4xx), 429, 5xx with the server's
log, broken connections and, as the server counts them, callers who disconnected (499). Resident memory is read ten times between
a fifth of the time and the end.

rate: the same number of captions is requested by one user at a time and by 16, and so are texts of 64 tokens.
"""

import argparse
import base64
import io
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from http.client import HTTPConnection, HTTPException
from statistics import median, quantiles

from measure import RESULTS, machine, versions
from PIL import Image as PILImage
from soak import media

import mmtx

USERS, HOSTILE, MANY, LOOKS = 20, 0.05, 16, 10
BARS = {"p99_over_median": 5, "growth": 0.05, "throughput": 4}
GOOD = {"2xx right", "4xx expected", "left"}


def content(item) -> list:
    text = base64.b64encode(item.data).decode()
    if isinstance(item, mmtx.Image):
        return [{"type": "image_url", "image_url": {"url": f"data:image/webp;base64,{text}"}}]
    return [{"type": "input_audio", "input_audio": {"data": text, "format": "ogg"}}]


def request(asked: list, stream: bool = False, **options) -> bytes:
    return json.dumps({"model": "starter", "messages": [{"role": "user", "content": asked}], "stream": stream, **options}).encode()


def bomb() -> bytes:
    file = io.BytesIO()
    PILImage.new("1", (9000, 9000)).save(file, "PNG")
    return file.getvalue()


def judge(status: int, text: str, truth: str | None) -> str:
    """Outcome of an answer; `truth` is the right answer, None for a request that must be refused."""
    if status >= 500:
        return "5xx"
    if status == 429:
        return "429"
    if status >= 400:
        return "4xx expected" if truth is None else "4xx unexpected"
    return "2xx right" if text == truth else "2xx wrong"


class Load:
    """A server, and the outcomes that its users saw."""

    def __init__(self):
        self.log = tempfile.TemporaryFile("w+")
        self.server = subprocess.Popen([sys.executable, "-m", "mmtx", "serve", "--port", "0", "--device", "cpu"],
                                       stdout=subprocess.PIPE, stderr=self.log, text=True)
        self.address = self.server.stdout.readline().split()[-1]
        self.port = int(self.address.split(":")[2].split("/")[0])
        self.own = threading.local()
        self.bomb = bomb()
        self.lock, self.times = threading.Lock(), []
        self.counts, self.surprises = Counter(), []

    def ask(self, body: bytes) -> tuple[int, str]:
        """Status and text of an answer, or its error message, over a connection per thread: the official client would take as much
        processor time as the server."""
        if not hasattr(self.own, "connection"):
            self.own.connection = HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection = self.own.connection
        try:
            connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            data, streamed = answer.read(), answer.headers["Content-Type"].startswith("text/event-stream")
        except BaseException:
            connection.close()
            raise
        if answer.status != 200:
            return answer.status, data.decode()
        if not streamed:
            return 200, json.loads(data)["choices"][0]["message"]["content"]
        *events, done = [line.removeprefix("data: ") for line in data.decode().split("\n\n") if line]
        if done != "[DONE]":  # an error after the status line was sent
            return 500, done
        return 200, "".join(json.loads(event)["choices"][0]["delta"]["content"] for event in events)

    def note(self, outcome: str, told: str) -> None:
        with self.lock:
            self.counts[outcome] += 1
            if outcome not in GOOD:
                self.surprises.append(f"{time.strftime('%H:%M:%S')} {outcome}: {told[:300]}")

    def attack(self, chance: random.Random, good: list) -> None:
        """A hostile request, which must be refused or have no effect."""
        kind = chance.randrange(4)
        if kind < 3:
            data = [self.bomb, self.bomb[:200], chance.randbytes(20_000)][kind]
            status, told = self.ask(request(content(mmtx.Image(data) if chance.random() < 0.5 else mmtx.Audio(data))))
            return self.note(judge(status, told, None), f"hostile {kind}: {status} {told}")
        body = request(good)
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                               b"Content-Length: %d\r\n\r\n" % len(body) + body[:chance.randrange(len(body)) if
                                                                                chance.random() < 0.5 else len(body)])
            time.sleep(0.02 * chance.random())
        self.note("left", "")

    def user(self, number: int, until: float, asked: list, truth: list) -> None:
        chance = random.Random(number)
        while time.monotonic() < until:
            at = chance.randrange(len(asked))
            try:
                if chance.random() < HOSTILE:
                    self.attack(chance, asked[at])
                    continue
                begin = time.monotonic()
                status, told = self.ask(request(asked[at], chance.random() < 0.5))
            except (OSError, HTTPException) as error:
                self.note("broken connection", repr(error))
                continue
            with self.lock:
                self.times.append(time.monotonic() - begin)
            self.note(judge(status, told, truth[at]), f"{status} {told!r}, expected {truth[at]!r}")

    def soak(self, seconds: float, asked: list, truth: list) -> dict:
        begin = time.monotonic()
        users = [threading.Thread(target=self.user, args=(n, begin + seconds, asked, truth)) for n in range(USERS)]
        for user in users:
            user.start()
        memory = []
        for look in range(LOOKS):
            time.sleep(max(0.0, begin + seconds * (0.2 + 0.8 * look / (LOOKS - 1)) - time.monotonic()))
            memory.append(self.memory())
        for user in users:
            user.join()
        time.sleep(1)  # let the server notice closed connections
        p99, middle = quantiles(self.times, n=100)[98], median(self.times)
        return {"users": USERS, "seconds": seconds, "answers": sum(self.counts.values()), **dict(sorted(self.counts.items())),
                "499 as the server counts": self.counted("499"), "5xx as the server counts": self.counted("5.."),
                "surprises": self.surprises[:20], "log": self.logged(),
                "median_ms": round(1000 * middle, 1), "p99_ms": round(1000 * p99, 1), "p99_over_median": round(p99 / middle, 2),
                "memory_mb": [round(mark / 2**20, 1) for mark in memory], "growth": round(max(memory) / memory[0] - 1, 4)}

    def counted(self, status: str) -> int:
        """Answers with a status, as counted in /metrics."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=60) as answer:
            return sum(map(float, re.findall(rf'^mmtx_responses_total{{.*status="{status}"}} (\S+)$', answer.read().decode(), re.M)))

    def logged(self) -> list[str]:
        """First lines of the server log."""
        self.log.seek(0)
        return self.log.read().splitlines()[:200]

    def memory(self) -> int:
        with open(f"/proc/{self.server.pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")

    def work(self) -> float:
        """Processor time of the server in seconds, which does not depend on other programs."""
        with open(f"/proc/{self.server.pid}/stat") as file:
            return sum(map(int, file.read().rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")

    def rate(self, users: int, asked: list, count: int, **options) -> tuple[float, float]:
        """Answers per second, and processor time per answer in ms."""
        bodies = [request(one, **options) for one in asked]
        begin, work = time.monotonic(), self.work()
        with ThreadPoolExecutor(users) as pool:
            statuses = list(pool.map(lambda n: self.ask(bodies[n % len(bodies)])[0], range(count)))
        assert set(statuses) == {200}, statuses
        return count / (time.monotonic() - begin), 1000 * (self.work() - work) / count

    def rates(self, count: int, pictures: list) -> dict:
        words, found = [[{"type": "text", "text": "a long story"}, *picture] for picture in pictures], {}
        for name, what, more in (("captions", pictures, {}), ("64 tokens", words, {"temperature": 1.5, "max_tokens": 64})):
            rounds = [[self.rate(users, what, count // (1 if users > 1 else 4), **more) for users in (1, MANY)] for _ in range(3)]
            found[name] = {f"{what}, {users} users": round(median(one[place][kind] for one in rounds), 2)
                           for kind, what in enumerate(("answers/s", "ms of a processor"))
                           for place, users in enumerate((1, MANY))}
            found[name]["throughput"] = round(median(many[0] / one[0] for one, many in rounds), 2)
            found[name]["by processor time"] = round(median(one[1] / many[1] for one, many in rounds), 2)
        return {"one_and_many": found}

    def end(self) -> None:
        self.server.terminate()
        self.server.wait(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", choices=["soak", "rate", []], help="by default both")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--short", action="store_true", help="a few seconds; says nothing, writes nothing")
    options = parser.parse_args()
    parts = options.what or ["soak", "rate"]
    seconds, count = (4, 32) if options.short else (options.seconds, 320)
    model, items = mmtx.load(device="cpu"), media(8)
    truth, asked = [model.caption(item) for item in items], [content(item) for item in items]
    del model
    path = RESULTS / "serving.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    result = {name: before[name] for name in ("soak", "one_and_many") if name in before}
    result = {"name": "serving", "date": date.today().isoformat(), "bars": BARS, "machine": machine(), "versions": versions(),
              **result}
    load = Load()
    try:
        load.rate(8, asked, 64)
        if "soak" in parts:
            result["soak"] = load.soak(seconds, asked, truth)
        if "rate" in parts:
            result |= load.rates(count, asked[:8])
    finally:
        load.end()
    print(json.dumps(result, indent=1))
    if not options.short:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
