"""Stop sequences: an answer ends before the one that is complete first, whatever its tokens are."""

import json
from pathlib import Path
from random import Random

import pytest

import mmtx
from mmtx.inference.sampling import Sampling

pytest.importorskip("fastapi")

from starlette.testclient import TestClient

from mmtx.serving.app import make_app
from mmtx.serving.stops import begun_stop, find_stop

ASKED = {"model": "prose", "prompt": "She was very", "max_tokens": 40, "temperature": 0.8, "seed": 3}


@pytest.fixture(scope="module")
def prose():
    return mmtx.load(Path(__file__).parents[1] / "demos" / "prose", "cpu")


@pytest.fixture(scope="module")
def client(prose):
    with TestClient(make_app({"prose": prose}), base_url="http://127.0.0.1") as client:
        yield client


def completion(client, stream: bool = False, **options) -> tuple[str, str, int]:
    """The text of a completion, why it ended, and the number of its tokens."""
    answer = client.post("/v1/completions", json={**ASKED, **options, **(
        {"stream": True, "stream_options": {"include_usage": True}} if stream else {})})
    assert answer.status_code == 200, answer.text
    events = [answer.json()] if not stream else [
        json.loads(event.removeprefix("data: ")) for event in answer.text.split("\n\n") if event and not event.endswith("[DONE]")]
    choices = [choice for event in events for choice in event["choices"]]
    return "".join(choice["text"] for choice in choices), choices[-1]["finish_reason"], events[-1]["usage"]["completion_tokens"]


def cut(text: str, stops: list[str]) -> int | None:
    """Where a text is cut, one character at a time; where two stop sequences end at the same one, before the longer."""
    return next((begin for end in range(len(text) + 1) for begin in range(end) if text[begin:end] in stops), None)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_before_its_first_stop_sequence(prose, client, stream):
    text, reason, count = completion(client, stream)
    assert reason == "length" and count == 40 and len(text) > 60
    (ids,) = prose._answer([prose.processor.prompt("She was very", "document")], "document",
                           Sampling(max_new_tokens=40, temperature=0.8, seed=3))
    texts = [prose.tokenizers["text"].decode(ids[:number]) for number in range(len(ids) + 1)]
    assert texts[-1] == text
    random, within_tokens = Random(0), 0
    for _ in range(12):
        begins = [random.randrange(len(text) - 9) for _ in range(random.randint(1, 4))]
        stops = [text[begin:begin + random.randint(1, 9)] for begin in begins] + ["not there"][:4 - len(begins)]
        shown, reason, count = completion(client, stream, stop=stops if len(stops) > 1 else stops[0])
        assert (shown, reason) == (text[:cut(text, stops)], "stop")
        assert count == next(number for number, part in enumerate(texts) if cut(part, stops) is not None)
        within_tokens += shown not in texts
    assert within_tokens > 2


def test_stop_sequences_that_do_not_come_change_nothing(client):
    text, *_ = completion(client)
    for stop in ("not there", [text + "a", text[-5:] + "a"], []):
        assert completion(client, True, stop=stop) == completion(client, stop=stop) == (text, "length", 40)


def test_no_more_is_held_back_than_may_begin_a_stop_sequence():
    random, found = Random(0), 0
    for _ in range(2000):
        text, shown = "".join(random.choices("ab", k=12)), 0
        stops = ["".join(random.choices("abc", (4, 4, 1), k=random.randint(1, 4))) for _ in range(random.randint(1, 4))]
        for end in range(1, len(text) + 1):
            if find_stop(text[:end], stops) is not None:
                break
            clear = end - begun_stop(text[:end], stops)
            begins = [begin for begin in range(end) if any(stop.startswith(text[begin:end]) for stop in stops)]
            assert shown <= clear == min(begins, default=end)
            shown = clear
        assert find_stop(text, stops) == cut(text, stops)
        assert cut(text, stops) is None or shown <= cut(text, stops)
        found += cut(text, stops) is not None
    assert 500 < found < 1900


def test_a_lone_surrogate_is_no_stop_sequence(client):
    answer = client.post("/v1/completions", content=json.dumps({**ASKED, "stop": "\ud800"}))
    assert answer.status_code == 400 and answer.json()["error"]["message"].startswith("stop[0]: ")
