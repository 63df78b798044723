"""`mmtx serve` under load: many users, some of them hostile. Wrong answers, errors, memory, latency, throughput.

    python benchmarks/serving.py                       # 20 users for 10 minutes, then 16 users against one
    python benchmarks/serving.py --seconds 60
    python benchmarks/serving.py --short

Users ask for captions of pictures, notes and speech of the starter data, half of them as a stream, and every answer is
compared with the one that its medium got alone, before. One request in twenty is hostile: a bomb, a body cut short, a file that
is none, a caller who goes. Then the same number of captions is asked for by one user at a time and by 16, and so are texts of
64 tokens. Resident memory is read when a fifth of the time is over and at the end.
"""

import argparse
import base64
import io
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from http.client import HTTPConnection
from statistics import median, quantiles

from measure import RESULTS, machine, versions
from PIL import Image as PILImage
from soak import media

import mmtx

USERS, HOSTILE, MANY = 20, 0.05, 16
BARS = {"p99_over_median": 5, "growth": 0.05, "throughput": 4}


def content(item) -> list:
    text = base64.b64encode(item.data).decode()
    if isinstance(item, mmtx.Image):
        return [{"type": "image_url", "image_url": {"url": f"data:image/webp;base64,{text}"}}]
    return [{"type": "input_audio", "input_audio": {"data": text, "format": "ogg"}}]


def bomb() -> bytes:
    file = io.BytesIO()
    PILImage.new("1", (9000, 9000)).save(file, "PNG")
    return file.getvalue()


class Refusal(Exception):
    """A status other than 200."""


class Load:
    """A server, and what its users found."""

    def __init__(self):
        self.server = subprocess.Popen([sys.executable, "-m", "mmtx", "serve", "--port", "0", "--device", "cpu"],
                                       stdout=subprocess.PIPE, text=True)
        self.address = self.server.stdout.readline().split()[-1]
        self.port = int(self.address.split(":")[2].split("/")[0])
        self.own = threading.local()
        self.bomb = bomb()
        self.lock, self.times, self.wrong, self.errors, self.refused = threading.Lock(), [], [], [], 0

    def ask(self, asked: list, stream: bool = False, **options) -> str:
        """One answer, over the connection of this thread: the official client would take as much of the machine as the server."""
        body = json.dumps({"model": "starter", "messages": [{"role": "user", "content": asked}], "stream": stream, **options})
        if not hasattr(self.own, "connection"):
            self.own.connection = HTTPConnection("127.0.0.1", self.port, timeout=120)
        self.own.connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        answer = self.own.connection.getresponse()
        data = answer.read()
        if answer.status != 200:
            raise Refusal(answer.status)
        if not stream:
            return json.loads(data)["choices"][0]["message"]["content"]
        events = [json.loads(line[6:]) for line in data.decode().split("\n\n") if line.startswith("data: {")]
        return "".join(event["choices"][0]["delta"]["content"] for event in events)

    def attack(self, chance: random.Random, good: list) -> None:
        """Something that must end in a refusal, or in nothing."""
        kind = chance.randrange(4)
        if kind < 3:
            data = [self.bomb, self.bomb[:200], chance.randbytes(20_000)][kind]
            try:
                self.ask(content(mmtx.Image(data) if chance.random() < 0.5 else mmtx.Audio(data)))
                self.errors.append("a hostile file was answered")
            except Refusal as error:
                if error.args != (400,):
                    self.errors.append(f"hostile: {error.args[0]}")
                self.refused += 1
        else:
            body = json.dumps({"model": "starter", "messages": [{"role": "user", "content": good}]}).encode()
            with socket.create_connection(("127.0.0.1", self.port)) as connection:
                connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                                   b"Content-Length: %d\r\n\r\n" % len(body) + body[:chance.randrange(len(body)) if
                                                                                    chance.random() < 0.5 else len(body)])
                time.sleep(0.02 * chance.random())

    def user(self, number: int, until: float, asked: list, truth: list) -> None:
        chance = random.Random(number)
        while time.monotonic() < until:
            at = chance.randrange(len(asked))
            if chance.random() < HOSTILE:
                self.attack(chance, asked[at])
                continue
            begin = time.monotonic()
            try:
                answer = self.ask(asked[at], chance.random() < 0.5)
            except Exception as error:
                self.errors.append(repr(error)[:200])
                continue
            with self.lock:
                self.times.append(time.monotonic() - begin)
                if answer != truth[at]:
                    self.wrong.append((at, answer, truth[at]))

    def memory(self) -> int:
        with open(f"/proc/{self.server.pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")

    def work(self) -> float:
        """Seconds of a processor that the server has had, which other programs of the machine do not change."""
        with open(f"/proc/{self.server.pid}/stat") as file:
            return sum(map(int, file.read().rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")

    def rate(self, users: int, asked: list, count: int, **options) -> tuple[float, float]:
        """Answers a second, and ms of a processor for each."""
        begin, work = time.monotonic(), self.work()
        with ThreadPoolExecutor(users) as pool:
            list(pool.map(lambda n: self.ask(asked[n % len(asked)], **options), range(count)))
        return count / (time.monotonic() - begin), 1000 * (self.work() - work) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--short", action="store_true", help="a few seconds; says nothing, writes nothing")
    options = parser.parse_args()
    seconds, count = (4, 32) if options.short else (options.seconds, 320)
    model, items = mmtx.load(device="cpu"), media(8)
    truth, asked = [model.caption(item) for item in items], [content(item) for item in items]
    load, marks = Load(), []
    try:
        load.rate(8, asked, 64)
        begin = time.monotonic()
        users = [threading.Thread(target=load.user, args=(n, begin + seconds, asked, truth)) for n in range(USERS)]
        for user in users:
            user.start()
        time.sleep(seconds / 5)
        marks.append(load.memory())
        for user in users:
            user.join()
        marks.append(load.memory())
        p99, middle = quantiles(load.times, n=100)[98], median(load.times)
        print(f"{len(load.times)} answers, {len(load.wrong)} wrong, errors {load.errors[:10]}, median {middle:.3f} s, p99 {p99:.3f}, "
              f"memory {marks}", flush=True)
        pictures = asked[:8]
        words = [[{"type": "text", "text": "a long story"}, *picture] for picture in pictures]
        found = {}
        for name, what, more in (("captions", pictures, {}),
                                 ("64 tokens", words, {"temperature": 1.5, "max_tokens": 64})):
            rounds = [[load.rate(users, what, count // (1 if users > 1 else 4), **more) for users in (1, MANY)] for _ in range(3)]
            found[name] = {f"{what}, {users} users": round(median(one[place][kind] for one in rounds), 2)
                           for kind, what in enumerate(("answers/s", "ms of a processor"))
                           for place, users in enumerate((1, MANY))}
            found[name]["throughput"] = round(median(many[0] / one[0] for one, many in rounds), 2)
    finally:
        load.server.terminate()
        load.server.wait(30)
    result = {
        "name": "serving", "date": date.today().isoformat(), "users": USERS, "seconds": seconds, "answers": len(load.times),
        "refused": load.refused, "wrong": len(load.wrong), "errors": load.errors[:10],
        "median_ms": round(1000 * middle, 1), "p99_ms": round(1000 * p99, 1), "p99_over_median": round(p99 / middle, 2),
        "memory_mb": [round(mark / 2**20, 1) for mark in marks], "growth": round(marks[1] / marks[0] - 1, 4),
        "one_and_many": found,
        "bars": BARS, "machine": machine(), "versions": versions(),
    }
    print(json.dumps(result, indent=1))
    if not options.short:
        (RESULTS / "serving.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
