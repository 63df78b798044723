"""`mmtx serve` in a process of its own on loopback, asked by the official client and by sockets that behave badly."""

import asyncio
import base64
import contextlib
import io
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from pydantic import ValidationError
from servers import serving
from starlette.testclient import TestClient

import mmtx
from mmtx.cli import main
from mmtx.commands.serve import _name
from mmtx.config import DecoderConfig
from mmtx.document import Document, Turn
from mmtx.errors import InputError
from mmtx.inference.choose import choose_engine
from mmtx.inference.output_scores import OutputScores
from mmtx.inference.sampling import Sampling
from mmtx.model import Decoder
from mmtx.sequence import prompt
from mmtx.vocabulary import MAX_SIDE, Vocabulary

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

from mmtx.serving import messages as api  # noqa: E402
from mmtx.serving.app import make_app, serve  # noqa: E402
from mmtx.serving.batches import BatchScheduler, Job  # noqa: E402
from mmtx.serving.choices import Choice  # noqa: E402
from mmtx.serving.limits import Limits, Refused, TimedHeaders  # noqa: E402
from mmtx.serving.sounds import in_thread  # noqa: E402

ROOT = Path(__file__).parents[1]
START = 150  # seconds that a server may take to begin
NAME = "tiny"


class Process:
    """`mmtx serve` or `mmtx demo` with options, on a free port."""

    def __init__(self, folder: Path, *options: str, key: str | None = None, command: str = "serve", name: str = NAME):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        environment.pop("MMTX_API_KEY", None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mmtx", command, "--model", folder, "--name", name, "--device", "cpu", "--port", "0", *options],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment | ({"MMTX_API_KEY": key} if key else {}))
        self.name = name
        signal.signal(signal.SIGALRM, lambda *_: self.process.kill())
        signal.alarm(START)
        line = self.process.stdout.readline()
        signal.alarm(0)
        found = re.fullmatch(rf"{name} answers at http://127\.0\.0\.1:(\d+)/(?:v1)?\n", line)
        assert found, (line, self.process.stderr.read())
        self.port = int(found[1])
        self.address = f"http://127.0.0.1:{self.port}"
        self.client = openai.OpenAI(base_url=f"{self.address}/v1", api_key=key or "none", max_retries=0, timeout=60)
        self.chat("")  # all that is imported late is there

    def chat(self, content, **options):
        return self.client.chat.completions.create(model=self.name, messages=[{"role": "user", "content": content}],
                                                   **{"max_tokens": 16, **options})

    def metric(self, name: str) -> float:
        text = urllib.request.urlopen(f"{self.address}/metrics", timeout=20).read().decode()
        return float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.M)[1])

    def answers(self) -> Counter[str]:
        """How many have ended so far, by status."""
        text = urllib.request.urlopen(f"{self.address}/metrics", timeout=20).read().decode()
        found: Counter[str] = Counter()
        for status, number in re.findall(r'^mmtx_responses_total\{route="/v1/[^"]*",status="(\d+)"\} (\S+)$', text, re.M):
            found[status] += int(float(number))
        return found

    def wait_for(self, name: str, value: float) -> None:
        end = time.monotonic() + 30
        while self.metric(name) != value:
            assert time.monotonic() < end, f"{name} is {self.metric(name)}"
            time.sleep(0.02)

    def raw(self, head: str, body: bytes = b"") -> socket.socket:
        """A connection that has sent this and waits for the answer."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        connection.sendall(head.replace("\n", "\r\n").encode() + body)
        return connection

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        finally:
            self.process.kill()
            self.process.wait()


def answer_of(connection: socket.socket) -> tuple[int, dict, dict]:
    """Status, headers and JSON of an answer, after which the connection is closed."""
    with connection:
        data = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = data.partition(b"\r\n\r\n")
    first, *fields = head.decode().split("\r\n")
    return int(first.split()[1]), {k.lower(): v.strip() for k, _, v in (field.partition(":") for field in fields)}, json.loads(body)


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory):
    """A model whose answers depend on what it is asked, as it comes from its folder."""
    folder = tmp_path_factory.mktemp("serving") / "model"
    tiny_model.save(folder)
    made = mmtx.load(folder, "cpu")
    with torch.no_grad():
        for parameter in made.decoder.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    made.save(folder)
    loaded = mmtx.load(folder, "cpu")
    loaded.folder = folder
    return loaded


@pytest.fixture(scope="module")
def server(model):
    process = Process(model.folder)
    yield process
    process.close()


@pytest.fixture(scope="module")
def media():
    """Pictures and sounds, encoded, and as the items of a message that hold them."""
    random = np.random.default_rng(0)
    found = []
    for number in range(12):
        file = io.BytesIO()
        if number % 3 == 2:
            soundfile.write(file, 0.5 * random.standard_normal(900 + 700 * number).clip(-1, 1), 16_000, format="WAV")
        else:
            Image.fromarray(random.integers(0, 256, (12 + number, 20, 3), dtype=np.uint8)).save(file, "PNG")
        found.append(file.getvalue())
    return found


def is_sound(data: bytes) -> bool:
    return data.startswith(b"OggS") or data[8:12] == b"WAVE"


def item(data: bytes) -> dict:
    text = base64.b64encode(data).decode()
    if is_sound(data):
        return {"type": "input_audio", "input_audio": {"data": text, "format": "wav"}}
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text}"}}


def marked(data: bytes) -> mmtx.Image | mmtx.Audio:
    return (mmtx.Audio if is_sound(data) else mmtx.Image)(data)


def words(text: str) -> dict:
    return {"type": "text", "text": text}


# -- Answers -------------------------------------------------------------------------------------------------


def test_an_answer_is_that_of_the_model_and_is_counted(model, server, media):
    for data in media[1:3]:
        answer = server.chat([words("what is this? é"), item(data)])
        asked = model.processor.prompt(["what is this? é", marked(data)])
        (ids,) = model._answer([asked], "text", Sampling(max_new_tokens=16))
        assert answer.choices[0].message.content == model.tokenizers["text"].decode(ids) != ""
        assert answer.choices[0].message.role == "assistant" and answer.model == NAME
        assert answer.usage.prompt_tokens == len(asked.ids)
        ended = len(ids) < 16
        assert answer.usage.completion_tokens == len(ids) + ended
        assert answer.choices[0].finish_reason == ("stop" if ended else "length")


def test_a_stream_is_the_answer_in_pieces(server, media):
    whole = server.chat([item(media[0])], max_tokens=40)
    events = list(server.chat([item(media[0])], max_tokens=40, stream=True, stream_options={"include_usage": True}))
    assert "".join(event.choices[0].delta.content for event in events if event.choices) == whole.choices[0].message.content
    assert sum(bool(event.choices and event.choices[0].delta.content) for event in events) > 5
    assert events[-1].usage == whole.usage and events[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_a_proxy_is_told_not_to_hold_a_stream_back(server):
    asked = server.client.chat.completions.with_raw_response.create(
        model=NAME, max_tokens=4, messages=[{"role": "user", "content": "a"}], stream=True)
    assert (asked.headers["x-accel-buffering"], asked.headers["cache-control"]) == ("no", "no-cache")


def test_a_stream_tells_its_role_once(server, media):
    with server.client.chat.completions.stream(model=NAME, max_tokens=40, messages=[
            {"role": "user", "content": [item(media[0])]}]) as stream:
        pieces = [event.chunk.choices[0].delta for event in stream if event.type == "chunk"]
    message = stream.current_completion_snapshot.choices[0].message  # the final one is refused where an answer was cut
    assert (message.role, message.content) == ("assistant", server.chat([item(media[0])], max_tokens=40).choices[0].message.content)
    assert len(pieces) > 5 and [piece.role for piece in pieces] == ["assistant"] + [None] * (len(pieces) - 1)


def test_many_at_once_get_what_each_gets_alone(model, server, media):
    asked = [(data, most, stream) for data in media for most in (7, 30) for stream in (False, True)]
    truth = {(data, most): model.caption(marked(data), max_new_tokens=most) for data in media for most in (7, 30)}
    assert len(set(truth.values())) > 6

    def ask(data, most, stream):
        answer = server.chat([item(data)], max_tokens=most, stream=stream)
        return "".join(event.choices[0].delta.content for event in answer) if stream else answer.choices[0].message.content

    rows = server.metric("mmtx_batch_size_sum"), server.metric("mmtx_batch_size_count")
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda one: ask(*one), asked))
    assert answers == [truth[data, most] for data, most, _ in asked]
    rows, batches = (server.metric(f"mmtx_batch_size_{what}") - before for what, before in zip(("sum", "count"), rows))
    assert rows == len(asked) and rows / batches > 2


def test_a_seed_gives_the_same_answer_in_company(model, server, media):
    options = {"temperature": 1.0, "top_p": 0.9, "seed": 5, "max_tokens": 20}
    truth = [model.caption(marked(data), temperature=1.0, top_p=0.9, seed=5, max_new_tokens=20) for data in media]
    with ThreadPoolExecutor(len(media)) as pool:
        answers = list(pool.map(lambda data: server.chat([item(data)], **options).choices[0].message.content, media))
    assert answers == truth
    del options["seed"]
    with ThreadPoolExecutor(8) as pool:
        drawn = set(pool.map(lambda _: server.chat([item(media[0])], **options).choices[0].message.content, range(8)))
    assert len(drawn) > 5


def test_roles_become_turns(model, server):
    messages = [("system", "be brief"), ("user", "a red circle"), ("assistant", "a blue"), ("user", "and?")]
    answer = server.client.chat.completions.create(model=NAME, max_tokens=12,
                                                   messages=[{"role": role, "content": text} for role, text in messages])
    turns = [Turn("user" if role == "system" else role, tuple(model.encode_parts([text]))) for role, text in messages]
    asked = prompt(Document(tuple(turns)), model.vocabulary)
    (ids,) = model._answer([asked], "text", Sampling(max_new_tokens=12))
    assert answer.choices[0].message.content == model.tokenizers["text"].decode(ids)
    assert answer.usage.prompt_tokens == len(asked.ids)


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_those_of_a_full_pass(model, server, media, stream):
    answer = server.chat([item(media[1])], logprobs=True, top_logprobs=3, stream=stream)
    told = ([one for event in answer if event.choices and event.choices[0].logprobs for one in event.choices[0].logprobs.content]
            if stream else answer.choices[0].logprobs.content)
    asked = model.processor.prompt([marked(media[1])])
    (written,) = model._answer([asked], "text", Sampling(max_new_tokens=16))
    assert len(told) == len(written) > 8
    ids = torch.tensor([*asked.ids, *written])[None]
    with torch.inference_mode():
        logits = model.decoder.logits(model.decoder(ids, torch.arange(ids.shape[1])[None]))[0, len(asked.ids) - 1:]
    may_come = [*model.vocabulary.range("text"), model.vocabulary.end]
    expected = logits[:, may_come].log_softmax(-1)
    for one, ident, shares in zip(told, written, expected):
        assert one.logprob == pytest.approx(float(shares[ident]), abs=1e-4)
        assert [other.logprob for other in one.top_logprobs] == pytest.approx(shares.topk(3).values.tolist(), abs=1e-4)
    assert b"".join(bytes(one.bytes) for one in told).decode(errors="replace") == model.tokenizers["text"].decode(written)


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_those_of_the_text_before_a_stop_sequence(server, media, stream):
    whole = server.chat([item(media[1])], logprobs=True).choices[0]
    tokens = whole.logprobs.content
    before = ["", *(b"".join(bytes(token.bytes) for token in tokens[:number]).decode(errors="replace").rstrip("\ufffd")
                    for number in range(1, len(tokens)))]  # the text before each token
    text = whole.message.content
    assert len(text) > 8
    held = [character + "\0" for character, _ in Counter(text).most_common(4)]  # of which each is held back until the next comes
    for stop, cut in ((held, None), *((two, text.find(two)) for two in (text[begin:begin + 2] for begin in range(0, len(text), 3)))):
        answer = server.chat([item(media[1])], logprobs=True, stream=stream, stop=stop)
        choices = [event.choices[0] for event in answer] if stream else answer.choices
        told = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
        assert told == [token for token, part in zip(tokens, before) if cut is None or len(part) < cut]
        assert "".join((choice.delta if stream else choice.message).content for choice in choices) == text[:cut]
        assert choices[-1].finish_reason == (whole.finish_reason if cut is None else "stop")


def test_embeddings_are_the_mean_of_hidden_states(model, server, media):
    inputs = ["a red circle", "", [item(media[0])]]
    answer = server.client.embeddings.create(model=NAME, input=inputs)                               # base64
    plain = server.client.embeddings.create(model=NAME, input=inputs[0], encoding_format="float")
    for data, parts in zip(answer.data, (["a red circle"], [""], [marked(media[0])])):
        ids = torch.from_numpy(model.processor.prompt(parts).ids).long()[None]
        with torch.inference_mode():
            mean = model.decoder(ids, torch.arange(ids.shape[1])[None])[0].mean(0)
        np.testing.assert_allclose(data.embedding, mean / mean.norm(), atol=1e-5)
    np.testing.assert_allclose(plain.data[0].embedding, answer.data[0].embedding, atol=1e-6)
    assert answer.usage.prompt_tokens == sum(len(model.processor.prompt(parts).ids) for parts in (["a red circle"], [""], [marked(media[0])]))


def test_no_inputs_are_no_embeddings(server):
    with pytest.raises(openai.BadRequestError, match="input"):
        server.client.embeddings.create(model=NAME, input=[])


def test_token_ids_are_not_taken_for_those_of_the_model(server):
    """Clients that send them by default have a tokenizer of OpenAI's; the message says how they send text."""
    told = "found [1, 2], expected text, not token ids, which another tokenizer may have made: for text set check_embedding_ctx_length=False"
    for where, ask in (("input[0]", lambda: server.client.embeddings.create(model=NAME, input=[1, 2])),
                       ("input[0]", lambda: server.client.embeddings.create(model=NAME, input=[[1, 2], [3]])),
                       ("prompt[0]", lambda: server.client.completions.create(model=NAME, prompt=[1, 2])),
                       ("prompt[0]", lambda: server.client.completions.create(model=NAME, prompt=[[1, 2]]))):
        with pytest.raises(openai.BadRequestError) as error:
            ask()
        assert error.value.body["message"].startswith(f"{where}: {told}")


def test_completions_go_on_with_a_plain_document(model, server):
    answer = server.client.completions.create(model=NAME, prompt="a red", max_tokens=8)
    assert server.client.completions.create(model=NAME, prompt=["a red"], max_tokens=8).choices == answer.choices
    asked = prompt(Document((Turn(None, tuple(model.encode_parts(["a red"]))),)), model.vocabulary)
    (ids,) = model._answer([asked], "document", Sampling(max_new_tokens=8))
    texts = model.vocabulary.range("text")
    assert answer.choices[0].text == model.tokenizers["text"].decode([ident for ident in ids if ident in texts])
    assert answer.usage.prompt_tokens == len(asked.ids)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (8, "length")


# -- Several choices, and prompts that are echoed ----------------------------------------------------------------


def by_choice(events) -> tuple[dict[int, str], dict[int, list], dict[int, str]]:
    """Texts, log-probabilities of tokens and finish reasons of a stream, by the index of their choice."""
    texts, scored, reasons = {}, {}, {}
    for choice in (choice for event in events for choice in event.choices):
        assert choice.index not in reasons  # the last piece has it
        texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content if hasattr(choice, "delta") else choice.text)
        scored.setdefault(choice.index, []).extend(choice.logprobs.content if choice.logprobs else [])
        if choice.finish_reason:
            reasons[choice.index] = choice.finish_reason
    return texts, scored, reasons


def test_several_choices_are_drawn_on_their_own(model, server, media):
    """Under a seed they are those of a list of as many equal prompts, and the first is the answer of one alone."""
    options = {"temperature": 1.0, "seed": 7, "max_tokens": 20}
    truth = model.generate_batch([[marked(media[1])]] * 5, temperature=1.0, seed=7, max_new_tokens=20)
    assert len(set(truth)) == 5
    before = [server.metric(f"mmtx_batch_size_{what}") for what in ("sum", "count")]
    answer = server.chat([item(media[1])], n=4, **options)
    assert [server.metric(f"mmtx_batch_size_{what}") - last for what, last in zip(("sum", "count"), before)] == [4, 1]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.message.content for choice in answer.choices] == truth[:4]
    one = server.chat([item(media[1])], **options)
    assert one.choices[0].message.content == truth[0] and answer.usage.prompt_tokens == one.usage.prompt_tokens
    events = [*server.chat([item(media[1])], n=5, stream=True, stream_options={"include_usage": True}, **options)]
    texts, _, reasons = by_choice(events)
    assert texts == dict(enumerate(truth)) and [reasons[number] for number in range(4)] == [one.finish_reason for one in answer.choices]
    assert events[-1].usage.completion_tokens > answer.usage.completion_tokens > 4 * one.usage.completion_tokens // 2
    first = [event.choices[0].delta.role for event in events if event.choices]
    assert first.count("assistant") == 5 and set(first) == {"assistant", None}
    drawn = server.chat([item(media[1])], n=8, temperature=1.0)
    assert len({choice.message.content for choice in drawn.choices}) > 5


@pytest.mark.parametrize("stream", [False, True])
def test_each_choice_has_stop_sequences_and_log_probabilities_of_its_own(server, stream):
    options = {"temperature": 1.0, "seed": 3, "n": 4, "max_tokens": 24, "logprobs": True, "stream": stream}

    def ask(**more) -> tuple[dict, dict, dict]:
        answer = server.chat("a", **options, **more)
        if stream:
            return by_choice(answer)
        return tuple({one.index: tell(one) for one in answer.choices} for tell in (
            lambda one: one.message.content, lambda one: one.logprobs.content, lambda one: one.finish_reason))

    texts, scored, _ = ask()
    for number, text in texts.items():
        assert b"".join(bytes(token.bytes) for token in scored[number]).decode(errors="replace") == text
    whole, stop = texts[2], next(texts[2][begin:begin + 2] for begin in range(4, 20)
                                 if all(texts[2][begin:begin + 2] not in text for number, text in texts.items() if number != 2))
    found, told, reasons = ask(stop=stop)
    assert found == {**texts, 2: whole[:whole.index(stop)]} and reasons[2] == "stop"
    assert {number: told[number] for number in (0, 1, 3)} == {number: scored[number] for number in (0, 1, 3)}
    assert told[2] == scored[2][:len(told[2])] != scored[2]


def test_several_prompts_are_several_choices(model, server):
    asked, options = ["a red", "", "a blue circle"], {"temperature": 1.0, "seed": 2}
    answer = server.client.completions.create(model=NAME, prompt=asked, n=2, max_tokens=9, extra_body={"best_of": 2}, **options)
    prompts = [model.processor.prompt(text, "document") for text in asked for _ in range(2)]
    texts = model.vocabulary.range("text")
    truth = [model.tokenizers["text"].decode([ident for ident in ids if ident in texts])
             for ids in model._answer(prompts, "document", Sampling(max_new_tokens=9, **options))]
    assert [choice.index for choice in answer.choices] == [*range(6)] and [choice.text for choice in answer.choices] == truth
    assert answer.usage.prompt_tokens == sum(len(one.ids) for one in prompts[::2])
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    events = [*server.client.completions.create(model=NAME, prompt=asked, n=2, max_tokens=9, stream=True, **options)]
    assert by_choice(events)[0] == dict(enumerate(truth))


def test_several_pictures_are_drawn_for_a_prompt(model, server):
    answer = server.client.images.generate(model=NAME, prompt="a red circle", n=3, extra_body={"temperature": 1.0, "seed": 2})
    drawn = [np.asarray(Image.open(io.BytesIO(base64.b64decode(one.b64_json)))) for one in answer.data]
    truth = model.generate_batch(["a red circle"] * 3, out="image", temperature=1.0, seed=2)
    assert len(drawn) == 3 and all(np.array_equal(one, other) for one, other in zip(drawn, truth))
    assert not np.array_equal(drawn[0], drawn[1]) and answer.usage.output_tokens % 3 == 0


def test_choices_of_all_prompts_are_counted(server):
    ask = lambda **options: server.client.completions.create(model=NAME, **options)
    for options, told in (({"prompt": ["a"] * 5, "n": 26}, "n: found 130 choices of all prompts, expected up to 128"),
                          ({"prompt": ["a"] * 129}, "List should have at most 128 items after validation, not 129"),
                          ({"prompt": []}, "prompt: found []: List should have at least 1 item"),
                          ({"prompt": "a", "n": 2, "extra_body": {"best_of": 3}}, "best_of: found 3, expected n, 2"),
                          ({"prompt": ["a"] * 20, "max_tokens": 256}, "of answer for 20 choices, expected up to 4096 in all")):
        with pytest.raises(openai.BadRequestError, match=re.escape(told)):
            ask(**options)
    answer = ask(prompt=["a"] * 20)  # whose length is left to the server
    assert len(answer.choices) == 20 and answer.usage.total_tokens <= 4096


def full_pass(model, text: str) -> torch.Tensor:
    """Log-probabilities of all ids after each token of a plain text, among those that may come in one."""
    ids = torch.from_numpy(model.processor.prompt(text, "document").ids).long()[None]
    with torch.inference_mode():
        logits = model.decoder.logits(model.decoder(ids, torch.arange(ids.shape[1])[None]))[0]
    allowed = model.grammar.allowed(model.grammar.start(1, "document"))[0]
    return logits[:, :len(allowed)].masked_fill(~allowed, -torch.inf).log_softmax(-1)


@pytest.mark.parametrize("stream", [False, True])
def test_an_echoed_prompt_has_the_log_probabilities_of_a_full_pass(model, server, stream):
    """As lm-eval asks for them: of the last one, which is generated, it looks at the place alone."""
    texts = ["a red circle and a é", " ".join(["a blue circle"] * 60)]  # the longer one in several passes of the output matrix
    for most in (0, 1):
        answer = server.client.completions.create(model=NAME, prompt=texts, max_tokens=most, echo=True, logprobs=2, stream=stream,
                                                  stop="circle", extra_body={"temperature": 0, "seed": 1234})
        choices = [choice for event in answer for choice in event.choices] if stream else answer.choices
        for number, text in enumerate(texts):
            mine = [choice for choice in choices if choice.index == number]
            tokens, given, best, offsets = ([one for choice in mine if choice.logprobs for one in getattr(choice.logprobs, name)]
                                            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"))
            ids, shares = model.tokenizers["text"].encode(text), full_pass(model, text)
            assert len(given) == len(tokens) == len(best) == len(offsets) == len(ids) + most > 10
            assert given[:len(ids)] == pytest.approx(shares[range(len(ids)), ids].tolist(), abs=1e-4)
            assert given[len(ids):] == pytest.approx(shares[len(ids):].amax(-1).tolist()[:most], abs=1e-4)
            assert [max(one.values()) for one in best] == pytest.approx(shares.amax(-1).tolist()[:len(given)], abs=1e-4)
            whole = "".join(choice.text for choice in mine)
            assert whole.startswith(text) and (most or whole == text) and mine[-1].finish_reason == "length"
            assert [whole[begin:begin + len(token)] for begin, token in zip(offsets, tokens) if "�" not in token] == [
                token for token in tokens if "�" not in token]
        assert stream or answer.usage.completion_tokens == 2 * most


def test_an_echo_needs_no_log_probabilities_and_no_answer(server):
    ask = lambda **options: server.client.completions.create(model=NAME, prompt="a red", **options)
    plain = ask(max_tokens=8)
    assert ask(max_tokens=8, echo=True).choices[0].text == "a red" + plain.choices[0].text
    for echo, text in ((False, ""), (True, "a red")):
        answer = ask(max_tokens=0, echo=echo)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (text, "length")
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (plain.usage.prompt_tokens, 0)
    scored = ask(max_tokens=8, logprobs=0)
    assert scored.choices[0].text == plain.choices[0].text and [*scored.choices[0].logprobs.top_logprobs[0]] == scored.choices[0].logprobs.tokens[:1]


def test_the_end_of_a_plain_document_has_a_log_probability(model):
    """lm-eval asks for one token, and takes the last log-probability for that of this token, whichever it is."""
    v, logits = model.vocabulary, torch.zeros(model.vocabulary.size)
    for out, end, tokens in (("document", v.eos, ["<eos>"]), ("text", v.end, [])):
        choice = Choice(model, 0, out, False, [], 0)
        choice.add(end, logits)
        piece = choice.piece(over=True)
        assert (piece.text, [entry["token"] for _, entry in piece.scored], piece.finish_reason) == ("", tokens, "stop")


def test_the_log_probability_of_a_token_is_that_among_those_that_may_come_there(model):
    """In a plain document a picture may begin, of which the size comes next."""
    v, choice = model.vocabulary, Choice(model, 0, "document", False, [], 0)
    for ident in (v.image, v.height(2), v.width(1)):
        choice.add(ident, torch.zeros(v.size))
    told = [entry["logprob"] for _, entry in choice.piece(over=True).scored]
    first = len(v.range("text")) + len(v.media) + 1  # or the end
    assert told == pytest.approx([-math.log(count) for count in (first, MAX_SIDE, MAX_SIDE)])


def test_bytes_become_characters_as_in_the_whole(model):
    """Also bytes that are none, of which a stream shows what can be no other character."""
    v, text, random = model.vocabulary, model.tokenizers["text"], np.random.default_rng(0)
    texts = [ident for ident in v.range("text") if len(text.piece_bytes(ident - v.range("text").start)) == 1]
    assert len(texts) > 200
    for stream in (False, True):
        ids = random.choice(texts, 400).tolist()
        choice, pieces = Choice(model, 0, "text", stream, [], 0), []
        for ident in ids:
            choice.add(ident, None)
            pieces.append(choice.piece(over=False).text)
        pieces.append(choice.piece(over=True).text)
        assert "".join(pieces) == text.decode([ident - v.range("text").start for ident in ids]) and any(pieces[:-1]) == stream


def test_transcriptions_are_captions(model, server, media):
    for form in ("json", "text"):
        answer = server.client.audio.transcriptions.create(model=NAME, file=("a.wav", media[2]), response_format=form)
        assert getattr(answer, "text", answer) == model.caption(marked(media[2]))


def test_a_form_with_a_field_that_is_not_understood_is_refused(server, media):
    with pytest.raises(openai.BadRequestError, match="language: found a field that this server"):
        server.client.audio.transcriptions.create(model=NAME, file=("a.wav", media[2]), language="en")


def test_pictures_and_sounds_are_those_of_the_model(model, server):
    options = {"temperature": 1.0, "seed": 2}
    for size, pixels in (("auto", None), ("16x8", (8, 16))):
        answer = server.client.images.generate(model=NAME, prompt="a red circle", size=size, extra_body=options)
        drawn = Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json)))
        assert np.array_equal(drawn, model.generate("a red circle", out="image", size=pixels, **options))
    truth = model.generate("trumpet", out="audio", max_new_tokens=20, **options)
    for form in ("wav", "flac", "mp3", "opus"):
        answer = server.client.audio.speech.create(model=NAME, input="trumpet", voice="any", response_format=form,
                                                   extra_body={**options, "max_tokens": 20})
        samples, rate = soundfile.read(io.BytesIO(answer.read()))
        assert rate == truth.rate and (form in ("mp3", "opus") or np.abs(samples - truth.samples).max() < 1e-3)


@pytest.mark.parametrize("size", ["32x16", "auto"])
def test_a_picture_needs_room_for_all_of_its_codes(model, size):
    config = model.tokenizers["image"].config
    cells = (config.side ** 2 if size == "auto" else 32 * 16) // config.patch ** 2
    length, status, told = len(model.processor.prompt("a red circle").ids), {}, {}
    for spare in (-1, 0):  # <image>, rows, columns, codes, </image>, <end>
        app = make_app({NAME: model}, Limits(tokens=length + cells + 5 + spare))
        with TestClient(app, base_url="http://127.0.0.1") as client:
            answer = client.post("/v1/images/generations", json={"model": NAME, "prompt": "a red circle", "size": size})
        status[spare], told[spare] = answer.status_code, answer.json()
    assert status == {-1: 400, 0: 200} and told[-1]["error"]["code"] == "context_length_exceeded"
    assert told[0]["usage"] == {"input_tokens": length, "output_tokens": cells + 5, "total_tokens": length + cells + 5}


@pytest.fixture(scope="module")
def speaker():
    process = Process(ROOT / "demos" / "generate", name="speaker")
    yield process
    process.close()


@pytest.fixture(scope="module")
def spoken():
    """Options of a sound of some seconds, and the sound."""
    options = {"temperature": 8.0, "seed": 0}
    sound = mmtx.load(ROOT / "demos" / "generate", "cpu").generate("trumpet, C 5", out="audio", max_new_tokens=320, **options)
    assert len(sound.samples) > 3 * sound.rate
    return {**options, "max_tokens": 320}, sound


@pytest.mark.parametrize(("form", "pieces"), [("wav", 3), ("pcm", 3), ("opus", 3), ("flac", 1), ("mp3", 1)])
def test_speech_is_sent_while_it_is_made(speaker, spoken, form, pieces):
    options, truth = spoken
    asked = speaker.client.audio.speech.with_streaming_response.create(model="speaker", input="trumpet, C 5", voice="any",
                                                                       response_format=form, extra_body=options)
    with asked as answer:
        assert answer.headers["content-type"] == {"wav": "audio/wav", "pcm": "audio/pcm", "opus": "audio/ogg", "flac": "audio/flac",
                                                  "mp3": "audio/mpeg"}[form]
        assert answer.headers["x-accel-buffering"] == "no"
        found = list(answer.iter_bytes())
    data = b"".join(found)
    assert len([chunk for chunk in found if chunk]) >= pieces
    if form == "pcm":
        samples, rate = np.frombuffer(data, "<i2") / 2 ** 15, truth.rate
    else:
        samples, rate = soundfile.read(io.BytesIO(data))
    assert rate == truth.rate and len(samples) == len(truth.samples)
    if form in ("opus", "mp3"):
        assert np.corrcoef(samples, truth.samples)[0, 1] > 0.95
    else:
        np.testing.assert_allclose(samples, truth.samples, atol=1e-4)
    speaker.wait_for("mmtx_prompts_running", 0)


def test_who_goes_while_a_sound_is_sent_frees_the_place(speaker):
    """Of 2,000 codes, 25 s of sound, most are not written when the first piece is here."""
    for _ in range(3):
        written = speaker.metric('mmtx_tokens_total{kind="generated"}')
        with speaker.client.audio.speech.with_streaming_response.create(
                model="speaker", input="trumpet, C 5", voice="any", response_format="pcm",
                extra_body={"max_tokens": 2000, "temperature": 8.0, "seed": 0}) as answer:
            next(answer.iter_bytes())
        speaker.wait_for("mmtx_requests_in_progress", 0)
        speaker.wait_for("mmtx_prompts_running", 0)
        assert speaker.metric('mmtx_tokens_total{kind="generated"}') - written < 1500
    assert 'status="500"' not in urllib.request.urlopen(f"{speaker.address}/metrics", timeout=20).read().decode()


def test_who_goes_before_the_first_sound_frees_its_thread():
    async def main() -> None:
        queue, threads = asyncio.Queue(), ThreadPoolExecutor(1)

        async def given():
            while (item := await queue.get()) is not None:
                yield item

        pieces = in_thread(threads, given(), lambda items: items, lambda: queue.put_nowait(None))
        asked = asyncio.ensure_future(anext(pieces))
        await asyncio.sleep(0.1)
        asked.cancel()
        try:
            with pytest.raises(asyncio.CancelledError):
                await asked
            await asyncio.wait_for(asyncio.shield(asyncio.to_thread(threads.shutdown)), 10)
        finally:
            queue.put_nowait(None)

    asyncio.run(main())


def test_speech_that_cannot_be_made_is_refused_with_a_status(speaker):
    for options, told in (({"temperature": -1}, "temperature: found -1.0"), ({"max_tokens": 5000}, "expected up to 4096 in all"),
                          ({"response_format": "aac"}, "response_format")):
        with pytest.raises(openai.BadRequestError, match=told):
            speaker.client.audio.speech.create(model="speaker", input="a", voice="any", extra_body=options)


def test_a_model_without_sounds_says_so(tokenizers):
    v = Vocabulary.build({"text": tokenizers["text"]})
    model = mmtx.Model(Decoder(DecoderConfig(v.size, width=32, depth=1, heads=2, kv_heads=2, head_dim=16, mlp_dim=32)), v,
                       {"text": tokenizers["text"]}).to("cpu")
    with TestClient(make_app({NAME: model}, loopback=False)) as client:
        answer = client.post("/v1/audio/speech", json={"model": NAME, "input": "a", "voice": "any"})
        assert answer.status_code == 400, answer.text
        assert "found audio, but this model has tokenizers for text only" in answer.json()["error"]["message"]


def test_models_and_health(server):
    assert [one.id for one in server.client.models.list()] == [NAME] == [server.client.models.retrieve(NAME).id]
    assert json.load(urllib.request.urlopen(f"{server.address}/health", timeout=20)) == {"status": "ok"}


def test_a_name_may_have_a_slash(model):
    with TestClient(make_app({"org/model": model}), base_url="http://127.0.0.1") as client:
        for path in ("org/model", "org%2Fmodel"):
            assert client.get(f"/v1/models/{path}").json()["id"] == "org/model"
        assert client.get("/v1/models/org").status_code == 404


def test_what_is_null_is_not_given(server):
    names = ("temperature", "top_p", "n", "seed", "frequency_penalty", "presence_penalty", "stream", "stream_options",
             "max_completion_tokens", "logprobs", "user", "stop", "tools", "tool_choice", "response_format", "logit_bias", "metadata", "store")
    replied = {"role": "assistant", "content": "a blue"}
    more = dict.fromkeys(("refusal", "audio", "function_call", "tool_calls", "annotations", "name"))
    ask = lambda message, **options: server.client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": "a"}, message, {"role": "user", "content": "and?"}], max_tokens=12, **options)
    answer, expected = ask({**replied, **more}, extra_body=dict.fromkeys(names)), ask(replied)
    assert answer.choices[0].message.content == expected.choices[0].message.content and answer.usage == expected.usage
    for message, options in (({**replied, "refusal": "no"}, {}), (replied, {"extra_body": {"prediction": {"type": "content"}}})):
        with pytest.raises(openai.BadRequestError, match="found a field that this server does not support, expected none of this name"):
            ask(message, **options)


def test_what_asks_for_nothing_is_not_refused(server):
    """Some clients send each field with its default, and the limit under both of its names."""
    more = {"stop": [], "tools": [], "logit_bias": {}, "response_format": {"type": "text"}, "max_completion_tokens": 12, "n": 1,
            "user": "me", "safety_identifier": "me", "prompt_cache_key": "me", "metadata": {"run": "1"}, "store": False,
            "modalities": ["text"], "tool_choice": "none", "parallel_tool_calls": False}
    for tier in ("auto", "default"):
        asked = server.chat("a", max_tokens=12, extra_body={**more, "service_tier": tier})
        assert asked.choices[0].message == server.chat("a", max_tokens=12).choices[0].message
    for name, value, told in (("store", True, "found True, expected False"), ("service_tier", "flex", "found 'flex', expected 'auto' or"),
                              ("metadata", {"run": 1}, "found 1, expected a valid string"),
                              ("modalities", ["text", "audio"], "found 'audio', expected 'text'"),
                              ("tool_choice", "required", "found 'required', expected 'auto' or 'none'")):
        with pytest.raises(openai.BadRequestError, match=f"{name}.*: {told}"):
            server.chat("a", extra_body={name: value})
    with pytest.raises(openai.BadRequestError, match=r"response_format.type: found 'json_object', expected 'text'"):
        server.chat("a", response_format={"type": "json_object"})
    with pytest.raises(openai.BadRequestError, match=r"messages: found \[\]: List should have at least 1 item"):
        server.client.chat.completions.create(model=NAME, messages=[])


# -- Bad requests --------------------------------------------------------------------------------------------


def bomb(side: int) -> bytes:
    """A small PNG of many pixels."""
    file = io.BytesIO()
    Image.new("1", (side, side)).save(file, "PNG")
    return file.getvalue()


def silence(seconds: float) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.zeros(int(seconds * 8000)), 8000, format="WAV")
    return file.getvalue()


@pytest.mark.parametrize(("content", "options", "status", "told"), [
    ([item(bomb(6000))], {}, 400, "messages[0].content[0].image_url.url: 6000 x 6000 pixels, expected up to 25000000"),
    ([words("a"), item(b"RIFF0000WAVE")], {}, 400, "messages[0].content[1]"),
    ([item(silence(70))], {}, 400, "found 70.0 s, expected up to 60 s"),
    ([item(b"GIF89a")], {}, 400, "not a whole picture"),
    ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,%%%"}}], {}, 400, "not base64 (Only base64 data is allowed), found '%%%'"),
    ([{"type": "image_url", "image_url": {"url": "/etc/passwd"}}], {}, 400, "does not fetch URLs"),
    ([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}], {}, 400, "does not fetch URLs"),
    ([{"type": "file", "file": {}}], {}, 400, "messages[0].content[0].type: found 'file', expected one of 'text', 'image_url', 'input_"),
    (None, {}, 400, "messages[0].content: found none, expected one"),
    ("a", {"extra_body": {"guided": 1}}, 400, "guided"),
    ("a", {"temperature": -1}, 400, "temperature: found -1.0"),
    ("a", {"top_p": 2.0}, 400, "top_p"),
    ("a", {"seed": -1}, 400, "seed"),
    ("a", {"n": 0}, 400, "n: found 0, expected greater than or equal to 1"),
    ("a", {"n": 129}, 400, "n: found 129, expected less than or equal to 128"),
    ("a", {"n": 16, "max_tokens": 500}, 400, "tokens of prompt and 8000 of answer for 16 choices, expected up to 4096 in all"),
    ("a", {"max_tokens": 5000}, 400, "tokens"),
    ("a", {"max_tokens": 0}, 400, "max_tokens: found 0, expected greater than or equal to 1"),
    ("a", {"max_tokens": "16"}, 400, "max_tokens: found '16', expected a valid integer"),
    ("a", {"max_tokens": 16.0}, 400, "max_tokens: found 16.0, expected a valid integer"),
    ("a", {"temperature": "0.5"}, 400, "temperature: found '0.5', expected a valid number"),
    ("a", {"n": True}, 400, "n: found True, expected a valid integer"),
    ("a", {"extra_body": {"presence_penalty": False}}, 400, "presence_penalty: found False, expected a valid number"),
    ("a", {"logprobs": 1}, 400, "logprobs: found 1, expected a valid boolean"),
    ("a", {"extra_body": {"stream": "yes"}}, 400, "stream: found 'yes', expected a valid boolean"),
    ("a", {"stream_options": {"include_usage": "no"}}, 400, "stream_options.include_usage: found 'no', expected a valid boolean"),
    ("a", {"frequency_penalty": 0.5}, 400, "frequency_penalty: found 0.5, expected"),
    ("a", {"top_logprobs": 3}, 400, "top_logprobs: found without logprobs, expected logprobs: true"),
    ("a", {"stream_options": {"include_usage": True}}, 400, "stream_options: found without stream, expected stream: true"),
    (5, {}, 400, "messages[0].content: found 5, expected a valid list"),
    ([5], {}, 400, "messages[0].content[0]: found 5, expected a JSON object"),
    ([{"text": "a"}], {}, 400, "messages[0].content[0]: found {'text': 'a'}, expected a JSON object with its type"),
    ([words("a"), words(5)], {}, 400, "messages[0].content[1].text: found 5, expected a valid string"),
    ([{"type": "image_url", "image_url": "a"}], {}, 400, "messages[0].content[0].image_url: found 'a', expected a JSON object"),
    ([{"type": "image_url", "image_url": {"url": 5}}], {}, 400, "messages[0].content[0].image_url.url: found 5, expected a valid string"),
    ("a", {"max_completion_tokens": 3}, 400, ", expected one limit, not different max_tokens and max_completion_tokens"),  # beside 16
    ("a", {"extra_body": {"logit_bias": {"5": 1}}}, 400, "logit_bias: found a field that this server does not support"),
    ("a" * 9000, {}, 400, "expected up to 4096 in all"),
    ("a", {"stop": ""}, 400, "stop[0]: found '': String should have at least 1 character"),
    ("a", {"stop": ["b", ""]}, 400, "stop[1]: found '': String should have at least 1 character"),
    ("a", {"stop": 5}, 400, "stop: found 5, expected a valid list"),
    ("a", {"stop": ["b", 5]}, 400, "stop[1]: found 5, expected a valid string"),
    ("a", {"stop": list("abcde")}, 400, "stop: found ['a', 'b', 'c', 'd', 'e']: List should have at most 4 items"),
    ("a", {"stop": "b" * 1001}, 400, "String should have at most 1000 characters"),
    ("a" * 200_000, {}, 400, "found 200000 characters, expected up to 131072"),
])
def test_a_mistake_is_told_in_the_form_of_the_api(server, content, options, status, told):
    with pytest.raises(openai.APIStatusError) as error:
        server.chat(content, **options)
    assert error.value.status_code == status
    assert told in error.value.body["message"] and error.value.body["type"] == "invalid_request_error"
    assert server.chat("a").choices


def bodies(parent=api.Body):
    """All that may be asked, and what it is made of."""
    for each in parent.__subclasses__():
        yield each
        yield from bodies(each)


def test_no_field_takes_a_value_of_another_type():
    wrong = {bool: ["yes", "true", 1, 0], int: ["1", 1.0, True, False], float: ["1", True, False, math.nan], str: [1, True]}
    seen = Counter()
    for body in {*bodies()} - {api.TranscriptionBody}:  # a form, in which all is text
        for name, field in body.model_fields.items():
            for kind in (kind for kind in wrong if field.annotation in (kind, kind | None)):
                seen[kind] += 1
                for value in wrong[kind]:
                    with pytest.raises(ValidationError) as error:
                        body.model_validate({name: value})
                    assert [one for one in error.value.errors() if one["input"] is value], (body, name, value)
    assert min(seen[kind] for kind in wrong) > 4


def test_whole_numbers_are_numbers(server, media):
    options = {"temperature": 1, "top_p": 1, "seed": 3, "n": 1, "extra_body": {"frequency_penalty": 0.0, "presence_penalty": 0}}
    assert server.chat("a", **options).choices[0].message == server.chat("a", temperature=1.0, seed=3).choices[0].message
    drawn = [server.client.audio.transcriptions.create(model=NAME, file=("a.wav", media[2]), temperature=1, extra_body={"seed": 3}).text
             for _ in range(2)]  # in a form, where all is text
    assert drawn[0] == drawn[1] != server.client.audio.transcriptions.create(model=NAME, file=("a.wav", media[2])).text


def test_mistakes_of_forms_and_sizes_are_told(server):
    named = lambda name: b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\ntiny\r\n' % name
    for more, told in ((named(b"file"), "file: found 'tiny', expected a file"), (b"", "file: found none, expected one"),
                       (named(b"file") + named(b"temperature"), "temperature: found 'tiny', expected a valid number")):
        status, answer = post(server, AS_FORM, named(b"model") + more + b"--x--\r\n", "/v1/audio/transcriptions")
        assert status == 400 and told in answer["error"]["message"]
    for size, told in (("big", "size: found 'big'"), *((size, f"size: found '{size}', expected width and height as multiples of 8, from 8 to 512")
                                                      for size in ("17x16", "16x0", "0x16", "520x8", "8x9999"))):
        with pytest.raises(openai.BadRequestError) as error:
            server.client.images.generate(model=NAME, prompt="a", size=size)
        assert error.value.body["message"].startswith(told) and error.value.body["param"] == "size"


@pytest.mark.parametrize(("path", "body", "status"), [
    ("/v1/chat/completions", b"{", 400),
    ("/v1/chat/completions", b"[" * 100_000, 400),
    ("/v1/chat/completions", b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}', 400),
    ("/v1/chat/completions", b'{"model": "tiny", "messages": [], "temperature": NaN}', 400),
    ("/v1/chat/completions", b'{"model": "tiny", "messages": [{"role": "user", "content": "a"}], "seed": ' + b"9" * 4000 + b"}", 400),
    ("/v1/chat/completions", b"\xff\xfe", 400),
    ("/v1/chat/completions", b'{"model": "other", "messages": [{"role": "user", "content": "a"}]}', 404),
    ("/v1/nothing", b"{}", 404),
    ("/v1/models", b"{}", 405),
])
def test_bodies_that_are_none(server, path, body, status):
    head = f"POST {path} HTTP/1.1\nHost: localhost\nContent-Type: application/json\nConnection: close\nContent-Length: {len(body)}\n\n"
    found, _, told = answer_of(server.raw(head, body))
    assert found == status and told["error"]["message"] and set(told["error"]) == {"message", "type", "param", "code"}
    assert len(told["error"]["message"]) <= 1000


def test_a_base_url_without_its_end_is_told(server):
    client = server.client.with_options(base_url=server.address)
    with pytest.raises(openai.NotFoundError, match=r"found '/chat/completions', .* expected one such as /v1/chat/completions; .* ends in /v1"):
        client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "a"}])


PLAIN = json.dumps({"model": NAME, "max_tokens": 4, "messages": [{"role": "user", "content": "a"}]}).encode()
FORM = b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\ntiny\r\n--x--\r\n'
AS_FORM = "Content-Type: multipart/form-data; boundary=x\n"


def post(server, fields: str, body: bytes = PLAIN, path: str = "/v1/chat/completions") -> tuple[int, dict]:
    head = f"POST {path} HTTP/1.1\nHost: localhost\nConnection: close\nContent-Length: {len(body)}\n{fields}\n"
    status, _, told = answer_of(server.raw(head, body))
    return status, told


@pytest.mark.parametrize("fields", ["", "Content-Type: application/x-www-form-urlencoded\n", "Content-Type: text/plain; charset=utf-8\n"])
def test_json_is_read_whatever_it_is_called(server, fields):
    status, told = post(server, fields)
    assert status == 200 and told["choices"] == post(server, "Content-Type: application/json\n")[1]["choices"]
    assert post(server, fields, b"a=b") == post(server, "Content-Type: application/json\n", b"a=b")
    status, told = post(server, fields, path="/v1/audio/transcriptions")
    assert status == 415 and "expected multipart/form-data" in told["error"]["message"]


def test_a_form_where_json_is_expected_is_told_so(server):
    status, told = post(server, AS_FORM, FORM)
    assert status == 400 and told["error"]["message"].startswith("body: found b'--x") and "a JSON object" in told["error"]["message"]


def test_json_that_is_none_is_told_with_its_place(server):
    status, told = post(server, "Content-Type: application/json\n", b'{"model": tiny}')
    assert status == 400 and told["error"]["message"] == "body: not JSON, Expecting value at character 10"
    for body, reason in ((b"[" * 100_000, "maximum recursion depth"), (b'{"model": "\xff"}', "can't decode byte 0xff in position 11"),
                         (b'{"seed": ' + b"9" * 5000 + b"}", "5000 digits")):
        status, told = post(server, "Content-Type: application/json\n", body)
        assert status == 400 and told["error"]["message"].startswith("body: not JSON, ") and reason in told["error"]["message"]


@pytest.mark.parametrize("kind", ["", "Content-Type: text/plain\n", AS_FORM])
def test_a_page_elsewhere_cannot_ask_without_leave(server, small_server, kind):
    """What a browser sends without a preflight is refused; JSON needs one, which is never granted."""
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1", "http://localhost.evil.example"):
        status, told = post(server, f"{kind}Origin: {origin}\nSec-Fetch-Site: cross-site\n")
        assert status == 403 and told["error"]["message"].startswith(f"Origin: found '{origin}'")
    for own in ("http://localhost", "https://proxy.example\nSec-Fetch-Site: same-origin"):
        assert post(server, f"{kind}Origin: {own}\n")[0] in (200, 400) and post(server, f"Origin: {own}\n")[0] == 200
    assert post(server, "Content-Type: application/json\nOrigin: https://evil.example\n")[0] == 200
    answer = server.raw("OPTIONS /v1/chat/completions HTTP/1.1\nHost: localhost\nOrigin: https://evil.example\nConnection: close\n"
                        "Access-Control-Request-Method: POST\nAccess-Control-Request-Headers: content-type\n\n")
    status, fields, _ = answer_of(answer)
    assert status == 405 and not any(name.startswith("access-control") for name in fields)
    assert post(small_server, "Authorization: Bearer secret\nOrigin: https://evil.example\n")[0] == 200


@pytest.mark.parametrize(("path", "status"), [("/health", 200), ("/metrics", 200), ("/v1/models", 200), (f"/v1/models/{NAME}", 200),
                                              ("/v1/models/other", 404), ("/v1/chat/completions", 405), ("/nothing", 404)])
def test_head_is_answered_as_get_without_a_body(server, path, status):
    found = {}
    for method in ("GET", "HEAD"):
        with server.raw(f"{method} {path} HTTP/1.1\nHost: localhost\nConnection: close\n\n") as connection:
            head, _, body = b"".join(iter(lambda: connection.recv(65536), b"")).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d " % status) and (method == "GET") == bool(body)
        found[method] = {line.split(b":")[0] for line in head.split(b"\r\n")[1:]}
    assert found["GET"] == found["HEAD"] and (b"allow" in found["HEAD"]) == (status == 405)


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_of_ours_is_told_as_one_and_counted(model, monkeypatch, caplog, stream):
    """In the log stands what happened; the caller learns nothing of it."""
    server = uvicorn.Server(uvicorn.Config(make_app({NAME: mmtx.load(model.folder, "cpu")}), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)

    def broken(*given):
        raise KeyError("a secret")

    thread.start()
    try:
        while not server.started:
            time.sleep(0.02)
        address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60)
        monkeypatch.setattr("mmtx.serving.batches.prompt" if stream else "mmtx.pipeline.Model.embed_prompt", broken)
        with pytest.raises(openai.APIError) as error:
            if stream:  # of which the status, 200, has been sent
                list(client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "a"}], stream=True))
            else:
                client.embeddings.create(model=NAME, input="a")
        metrics = urllib.request.urlopen(f"{address}/metrics", timeout=20).read().decode()
        assert stream or 'mmtx_responses_total{route="/v1/embeddings",status="500"} 1.0' in metrics
    finally:
        server.should_exit = True
        thread.join()
    assert error.value.body["type"] == "server_error" and "secret" not in str(error.value.body)
    assert [record.exc_info[0] for record in caplog.records if record.name == "mmtx"] == [KeyError]


def test_no_address_is_fetched(server):
    with serving({}) as other:
        with pytest.raises(openai.BadRequestError):
            server.chat([{"type": "image_url", "image_url": {"url": f"{other.address}/a.png"}}])
        assert not other.asked


# -- Limits --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_server(model):
    process = Process(model.folder, "--max_requests", "2", "--max_megabytes", "1", "--max_timeout", "2", key="secret")
    yield process
    process.close()


HEAD = "POST /v1/chat/completions HTTP/1.1\nHost: 127.0.0.1\nAuthorization: Bearer secret\nContent-Type: application/json\n"


def test_a_key_is_asked_for(small_server):
    for head in (HEAD.replace("secret", "other"), HEAD.replace("Authorization: Bearer secret\n", "")):
        status, _, told = answer_of(small_server.raw(f"{head}Content-Length: 2\n\n", b"{}"))
        assert status == 401 and told["error"]["code"] == "invalid_api_key"
    for other in ("s\u00e9cret".encode(), "s\u00e9cret".encode("latin-1"), b"secret\xff"):
        connection = small_server.raw("")
        connection.sendall(HEAD.replace("\n", "\r\n").encode().replace(b"secret", other) + b"Content-Length: 2\r\n\r\n{}")
        status, _, told = answer_of(connection)
        assert status == 401 and told["error"]["code"] == "invalid_api_key"
    for scheme, expected in (("Basic", 401), ("bearer", 400), ("BEARER ", 400)):  # whatever its case; the body is none
        status, *_ = answer_of(small_server.raw(f"{HEAD.replace('Bearer', scheme)}Connection: close\nContent-Length: 2\n\n", b"{}"))
        assert status == expected
    for path, status in (("/v1/models", 401), ("/metrics", 401), ("/health", 200)):
        found, *_ = answer_of(small_server.raw(f"GET {path} HTTP/1.1\nHost: 127.0.0.1\nConnection: close\n\n"))
        assert found == status


def test_an_empty_key_is_no_server_without_one(monkeypatch, capsys):
    monkeypatch.setenv("MMTX_API_KEY", "")
    monkeypatch.setattr("mmtx.serving.app.serve", lambda *given: None)
    with pytest.raises(SystemExit) as stop:
        main(["serve", "--port", "0"])
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", "mmtx: error: MMTX_API_KEY: found an empty key, expected a key; unset it for a server without one\n")


@pytest.mark.parametrize("key", ["\u043a\u043b\u044e\u0447", "s3cr\u00e9t", "s3cr3t\udcff", "s3cr3t\n", " s3cr3t", "\t"])
def test_a_key_that_cannot_be_sent_is_refused_at_the_start(key, monkeypatch, capsys):
    monkeypatch.setenv("MMTX_API_KEY", key)
    monkeypatch.setattr("mmtx.serving.app.serve", lambda *given: None)
    with pytest.raises(SystemExit) as stop:
        main(["serve", "--port", "0"])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.startswith("mmtx: error: MMTX_API_KEY: found a key that no header can hold")
    assert err.count("\n") == 1 and "s3cr" not in err and "\u043a" not in err


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1:1@evil.example", "localhost:1/health?", ""])
def test_another_name_of_this_machine_is_refused(small_server, host):
    head = HEAD.replace("Host: 127.0.0.1", f"Host: {host}")
    status, _, told = answer_of(small_server.raw(f"{head}Connection: close\nContent-Length: 2\n\n", b"{}"))
    assert status == 400 and told["error"]["message"].startswith(f"Host: found '{host}', expected localhost")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1:1", "[::1]", "[::1]:8000"])
def test_the_names_of_this_machine_are_known(small_server, host):
    status, *_ = answer_of(small_server.raw(f"GET /health HTTP/1.1\nHost: {host}\nConnection: close\n\n"))
    assert status == 200


def test_a_large_body_is_refused_whether_its_size_is_told_or_not(small_server):
    status, _, told = answer_of(small_server.raw(f"{HEAD}Content-Length: 1048577\n\n"))
    assert status == 413 and told["error"]["code"] == "request_too_large"
    connection = small_server.raw(f"{HEAD}Transfer-Encoding: chunked\n\n")
    with contextlib.suppress(OSError):
        for _ in range(17):
            connection.sendall(b"10000\r\n" + bytes(0x10000) + b"\r\n")
    assert connection.recv(65536).startswith(b"HTTP/1.1 413")
    connection.close()


def test_headers_without_an_end_are_refused(small_server):
    """Before their end nobody has been asked for a key."""
    connection = small_server.raw("GET /health HTTP/1.1\nHost: 127.0.0.1\nX: ", b"a" * 2 ** 17)
    with connection:
        assert connection.recv(65536).startswith(b"HTTP/1.1 400")


def closed_while(connection: socket.socket, data: bytes) -> bool:
    """Whether a connection is closed while bytes are sent one at a time."""
    connection.settimeout(0.1)
    for byte in data:
        try:
            if connection.recv(1) == b"":
                return True
        except TimeoutError:
            connection.sendall(bytes([byte]))
        except ConnectionError:
            return True
    return False


def test_headers_that_do_not_arrive_end_the_connection():
    """The first ones and later ones; a body and an answer may take longer than headers may."""
    async def app(scope, receive, send) -> None:
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                break
        await asyncio.sleep(1.0)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off", http=TimedHeaders, timeout_keep_alive=0.5))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.02)
        connect = lambda: socket.create_connection(server.servers[0].sockets[0].getsockname(), timeout=20)
        head = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n"
        with connect() as silent, connect() as slow:
            assert closed_while(slow, b"GET / HTTP/1.1\r\nX: " + b"a" * 40) and silent.recv(1) == b""
        with connect() as good:
            for _ in range(2):
                good.sendall(head)
                assert not closed_while(good, b"0123456789")
                good.settimeout(20)
                while not (answer := good.recv(4096)).endswith(b"\r\n\r\n0123456789"):
                    assert answer
            assert closed_while(good, head[:-1] * 2)
    finally:
        server.should_exit = True
        thread.join()


def test_a_full_house_says_when_to_come_again(small_server):
    slow = [small_server.raw(f"{HEAD}Content-Length: 9\n\n", b"{") for _ in range(2)]
    deadline = time.monotonic() + 20
    while True:
        status, headers, told = answer_of(small_server.raw(f"{HEAD}Connection: close\nContent-Length: 2\n\n", b"{}"))
        if status == 429 or time.monotonic() > deadline:
            break
    assert status == 429 and int(headers["retry-after"]) >= 1 and told["error"]["type"] == "rate_limit_error"
    # Those who do not go on lose their place.
    for connection in slow:
        status, _, told = answer_of(connection)
        assert status == 408 and told["error"]["code"] == "timeout"
    assert small_server.chat("a").choices


@pytest.fixture(scope="module")
def endless(model):
    """The folder of a model that never ends by itself."""
    folder = model.folder.with_name("endless")
    other = mmtx.load(model.folder, "cpu")
    with torch.no_grad():
        other.decoder.embedding.weight[model.vocabulary.end] = 0
        other.decoder.norm.weight.mul_(0.01)
    other.save(folder)
    return folder


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_frees_a_place_at_once(endless_server, stream):
    """400,000 tokens would take minutes."""
    body = json.dumps({"model": NAME, "stream": stream, "n": 2, "max_tokens": 200_000,
                       "messages": [{"role": "user", "content": "a"}]}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\nHost: localhost\nContent-Type: application/json\nContent-Length: {len(body)}\n\n"
    before = endless_server.answers()
    connections = [endless_server.raw(head, body)]
    endless_server.wait_for("mmtx_prompts_running", 2)
    connections += [endless_server.raw(head, body) for _ in range(2)]
    endless_server.wait_for("mmtx_requests_in_progress", 3)
    for connection in connections:
        connection.close()
    endless_server.wait_for("mmtx_requests_in_progress", 0)
    endless_server.wait_for("mmtx_prompts_running", 0)
    told = endless_server.answers() - before
    assert told.total() == 3 and set(told) <= {"499", "200"} and (stream or told["499"] == 3)  # no answer, and no error of the server's
    assert endless_server.chat("a", max_tokens=2).usage.completion_tokens == 2


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_has_stopped_is_computed_no_further(endless_server, stream):
    """400,000 tokens would take minutes."""
    text = endless_server.chat("a", max_tokens=20).choices[0].message.content
    stop = text.rstrip("\ufffd")[-3:]  # without an incomplete character
    before = endless_server.metric('mmtx_tokens_total{kind="generated"}')
    answer = endless_server.chat("a", max_tokens=400_000, stop=stop, stream=stream)
    shown = "".join(event.choices[0].delta.content for event in answer) if stream else answer.choices[0].message.content
    assert shown == text[:text.index(stop)]
    endless_server.wait_for("mmtx_prompts_running", 0)
    assert endless_server.metric('mmtx_tokens_total{kind="generated"}') - before <= 20


def test_nobody_waits_behind_long_answers(endless_server):
    """Each of which would take minutes."""
    body = json.dumps({"model": NAME, "max_tokens": 400_000, "messages": [{"role": "user", "content": "a"}]}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\nHost: localhost\nContent-Type: application/json\nContent-Length: {len(body)}\n\n"
    long, truth = [], endless_server.chat("b", max_tokens=20).choices[0].message.content
    for number in range(1, 4):
        long.append(endless_server.raw(head, body))
        endless_server.wait_for("mmtx_prompts_running", number)
        assert endless_server.chat("b", max_tokens=20).choices[0].message.content == truth != ""
        endless_server.wait_for("mmtx_prompts_running", number)  # they are still answered
    for connection in long:
        connection.close()
    endless_server.wait_for("mmtx_prompts_running", 0)


@pytest.fixture(scope="module")
def endless_server(endless):
    process = Process(endless, "--max_tokens", "500000")
    yield process
    process.close()


def test_an_answer_that_takes_too_long_ends(endless):
    process = Process(endless, "--max_timeout", "1", "--max_tokens", "100000")
    try:
        with pytest.raises(openai.APIStatusError) as error:
            process.chat("a", max_tokens=90_000)
        assert error.value.status_code == 504
        with pytest.raises(openai.APIError, match="not ready in time"):
            list(process.chat("a", max_tokens=90_000, stream=True))
        process.wait_for("mmtx_requests_in_progress", 0)
        process.wait_for("mmtx_prompts_running", 0)
    finally:
        process.close()
    assert process.process.returncode in (0, -signal.SIGTERM)
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", process.port), timeout=5)


def test_who_does_not_read_an_answer_loses_the_place(model, monkeypatch):
    """The buffers of a connection hold megabytes, so the sender is one that waits from the first piece on."""
    monkeypatch.setattr("mmtx.serving.limits.UNREAD", 0.1)
    body = json.dumps({"model": NAME, "stream": True, "max_tokens": 64, "messages": [{"role": "user", "content": "a"}]}).encode()
    app, left = make_app({NAME: model}, Limits(timeout=0.2), loopback=False), [{"type": "http.request", "body": body}]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"", "headers": []}

    async def receive() -> dict:
        return left.pop() if left else await asyncio.Future()

    async def send(message: dict) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Future()

    async def ask() -> None:
        async with app.router.lifespan_context(app):
            ended, _ = await asyncio.wait({asyncio.ensure_future(app(scope, receive, send))}, timeout=20)
            assert ended
            async with asyncio.timeout(20):
                while app.state.server.services[NAME].batches.running:
                    await asyncio.sleep(0.02)

    asyncio.run(ask())


# -- Media that are encoded together --------------------------------------------------------------------------


def test_documents_that_are_encoded_together_are_those_of_each_alone(model, media):
    parts = [[marked(data), "a red circle"] if number % 2 else ["b", marked(data), marked(media[0])]
             for number, data in enumerate(media)]
    read = lambda item: model.encode_parts([item])[0] if isinstance(item, str) else model.read_medium(item)
    waiting = [Document((Turn("user", tuple(map(read, items))),)) for items in parts]
    alone = [prompt(Document((Turn("user", tuple(model.encode_parts(items))),)), model.vocabulary) for items in parts]
    together = [prompt(document, model.vocabulary) for document in model.encode_documents(waiting)]
    for one, document, truth in zip(together, waiting, alone):
        assert np.array_equal(one.ids, truth.ids) and model.prompt_length(document) == len(truth.ids)
        assert len(one.spans) == len(truth.spans) > 0
        for a, b in zip(one.spans, truth.spans):
            assert a.start == b.start
            # A product of few rows may round otherwise than one of many: at most a step of float16, in which features are held.
            torch.testing.assert_close(a.values, b.values, rtol=2 ** -10, atol=1e-6)
    assert len({truth.ids.tobytes() for truth in alone}) == len(media)


def test_codes_that_the_decoder_never_reads_are_not_made(media, monkeypatch):
    """The shipped model reads patches of what users show. The answer is the same to the bit; what an assistant showed is codes."""
    shipped = mmtx.load(device="cpu")
    read = [Document((Turn("user", (shipped.read_medium(marked(data)),)),)) for data in media]
    whole = [prompt(document, shipped.vocabulary) for document in shipped.encode_documents(read)]
    with monkeypatch.context() as patched:
        for kind in ("image", "audio"):
            patched.setattr(shipped.tokenizers[kind].network, "features", None)  # what makes the codes
        found = [prompt(document, shipped.vocabulary) for document in shipped.encode_documents(read, codes=False)]
        with pytest.raises(TypeError):
            shipped.encode_documents(read)
        assert all(isinstance(told, str) for told in answers_of(shipped, media))
    for one, truth in zip(found, whole):
        assert len(one.ids) == len(truth.ids) and not np.array_equal(one.ids, truth.ids)
        assert np.array_equal(shipped.embed_prompt(one), shipped.embed_prompt(truth))
    sampling = Sampling(max_new_tokens=12)
    assert shipped._answer(found, "text", sampling) == shipped._answer(whole, "text", sampling)
    shown = [Document((Turn("user", (shipped.read_medium(marked(media[0])),)), Turn("assistant", (shipped.read_medium(marked(media[1])),))))]
    (one,), (truth,) = shipped.encode_documents(shown, codes=False), shipped.encode_documents(shown)
    assert np.array_equal(one.turns[1].parts[0].codes, truth.turns[1].parts[0].codes) and truth.turns[1].parts[0].codes.any()


def answers_of(model, media: list[bytes]) -> list[str | Exception]:
    """What requests that wait together are told."""
    async def told(batches: BatchScheduler, job: Job) -> str:
        (ids, _) = [[ident for ident, _ in new or ()] async for _, new in batches.answer([job])]  # not live: all at once
        return model.tokenizers["text"].decode([ident for ident in ids if ident != model.vocabulary.end])

    async def ask() -> list[str | Exception]:
        batches, deadline = BatchScheduler(model), asyncio.get_running_loop().time() + 60
        documents = [Document((Turn("user", (model.read_medium(marked(data)),)),)) for data in media]
        jobs = [Job(document, model.prompt_length(document), "text", Sampling(max_new_tokens=9), None, deadline, asyncio.Queue())
                for document in documents]
        try:
            return await asyncio.gather(*(told(batches, job) for job in jobs), return_exceptions=True)
        finally:
            await batches.close()

    return asyncio.run(ask())


def test_requests_that_wait_together_are_encoded_in_one_batch(model, media, monkeypatch):
    tokenizer, seen = model.tokenizers["image"], []
    embed = tokenizer.embed_batch
    monkeypatch.setattr(tokenizer, "embed_batch", lambda pictures, *more: seen.append(len(pictures)) or embed(pictures, *more))
    pictures = [data for data in media if not is_sound(data)]
    truth = [model.caption(marked(data), max_new_tokens=9) for data in pictures]
    seen.clear()
    assert answers_of(model, pictures) == truth and len(set(truth)) > 3
    assert sum(seen) == len(pictures) and max(seen) >= len(pictures) // 2


def test_time_runs_while_a_prompt_waits(model, media, monkeypatch):
    released, encode = threading.Event(), model.encode_documents
    monkeypatch.setattr(model, "encode_documents", lambda *given, **options: released.wait(60) and encode(*given, **options))
    document = Document((Turn("user", (model.read_medium(marked(media[0])),)),))

    async def ids(batches: BatchScheduler, seconds: float) -> list[int]:
        deadline = asyncio.get_running_loop().time() + seconds
        job = Job(document, model.prompt_length(document), "text", Sampling(max_new_tokens=9), None, deadline, asyncio.Queue())
        return [ident async for _, new in batches.answer([job]) for ident, _ in new or ()]

    async def ask() -> list[int]:
        batches = BatchScheduler(model)
        try:
            patient = asyncio.ensure_future(ids(batches, 60))
            with pytest.raises(Refused, match="not ready in time"):
                await asyncio.wait_for(ids(batches, 0.1), 30)
            released.set()
            return await patient
        finally:
            released.set()
            await batches.close()

    found = asyncio.run(ask())
    assert model.tokenizers["text"].decode([ident for ident in found if ident != model.vocabulary.end]) == model.caption(
        marked(media[0]), max_new_tokens=9) != ""


def test_all_that_a_request_waits_for_shares_its_time(model):
    app = make_app({NAME: model}, Limits(timeout=0.5))
    app.state.server.services[NAME].embed = lambda document: time.sleep(0.2) or np.zeros(2, np.float32)
    with TestClient(app, base_url="http://127.0.0.1") as client:
        status = {count: client.post("/v1/embeddings", json={"model": NAME, "input": ["a"] * count}).status_code for count in (1, 8)}
    assert status == {1: 200, 8: 504}


def test_what_is_wrong_with_one_is_not_told_to_the_others(model, media, monkeypatch):
    pictures = [data for data in media if not is_sound(data)]
    truth = [model.caption(marked(data), max_new_tokens=9) for data in pictures]
    tokenizer, bad = model.tokenizers["image"], model.read_medium(marked(pictures[3])).data
    embed = tokenizer.embed_batch

    def failing(given, *more):
        if any(torch.equal(picture, bad) for picture in given):
            raise InputError("the third")
        return embed(given, *more)

    monkeypatch.setattr(tokenizer, "embed_batch", failing)
    found = answers_of(model, pictures)
    assert isinstance(found[3], InputError) and found[:3] + found[4:] == truth[:3] + truth[4:]


# -- Rows that nobody waits for ------------------------------------------------------------------------------


def test_rows_that_are_not_wanted_end(model):
    prompts = [model.processor.prompt(word) for word in ("a", "red", "blue", "circle")]
    sampling = Sampling(max_new_tokens=12)
    alone = [model._answer([one], "text", sampling)[0] for one in prompts]
    assert min(map(len, alone)) > 4
    wanted, columns = torch.ones(4, dtype=torch.bool), []
    for ids in model.stream_ids(prompts, sampling=sampling, wanted=wanted):
        columns.append(ids.tolist())
        if len(columns) == 2:
            wanted[[0, 2, 3]] = False
    rows = list(zip(*columns))
    assert [ident for ident in rows[1] if ident not in (model.vocabulary.pad, model.vocabulary.end)] == alone[1]
    assert all(set(rows[row][4:]) <= {model.vocabulary.pad} for row in (0, 2, 3))


def test_scores_are_those_of_their_row_when_others_have_left(model):
    prompts, engines = [model.processor.prompt(word) for word in ("a", "red", "blue", "circle")], []
    choose = lambda *asked: engines.append(OutputScores(choose_engine(*asked))) or engines[-1]
    wanted, written, scores = torch.ones(4, dtype=torch.bool), [], []
    for ids in model.stream_ids(prompts, sampling=Sampling(max_new_tokens=8), wanted=wanted, choose=choose):
        written.append(int(ids[3]))
        scores.append(engines[0].row(3))
        wanted[[0, 2]] = len(written) < 2
    given = torch.tensor([*prompts[3].ids.tolist(), *written[:-1]])[None]
    with torch.inference_mode():
        full = model.decoder.logits(model.decoder(given, torch.arange(given.shape[1])[None]))[0, -len(written):]
    assert len(written) == 9 and len(engines[0].of) == 2
    torch.testing.assert_close(torch.stack(scores), full[:, :scores[0].shape[0]], atol=1e-4, rtol=1e-4)


def test_an_address_with_colons_is_shown_in_brackets(model, monkeypatch, capsys):
    monkeypatch.setattr("uvicorn.Server.run", lambda server, sockets: sockets[0].close() or served.append(server.config))
    served = []
    try:
        serve(make_app({NAME: model}), "::1", 0)
    except InputError:
        pytest.skip("this machine has no IPv6")
    assert re.fullmatch(rf"{NAME} answers at http://\[::1\]:\d+/v1\n", capsys.readouterr().out)
    assert [(config.http, config.timeout_keep_alive) for config in served] == [(TimedHeaders, 30)]


def test_a_port_that_is_taken_is_a_mistake_of_one_line(server, model):
    done = subprocess.run([sys.executable, "-m", "mmtx", "serve", "--model", model.folder, "--port", str(server.port)],
                          capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith(f"mmtx: error: 127.0.0.1:{server.port}: cannot listen on this address")
    assert done.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def shipped_server():
    """`mmtx serve` without a model, for pages of one other origin."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("MMTX_API_KEY", None)
    process = subprocess.Popen([sys.executable, "-m", "mmtx", "serve", "--device", "cpu", "--port", "0", "--allowed_origins",
                                "https://page.example"], stdout=subprocess.PIPE, text=True, env=environment)
    signal.signal(signal.SIGALRM, lambda *_: process.kill())
    signal.alarm(START)
    line = process.stdout.readline()
    signal.alarm(0)
    found = re.fullmatch(r"starter, generate, speech, prose answer at (http://127\.0\.0\.1:\d+/v1)\n", line)
    assert found, line
    yield openai.OpenAI(base_url=found[1], api_key="none", max_retries=0, timeout=60)
    process.terminate()
    process.wait(30)


def test_without_a_model_each_route_has_one_that_was_trained_for_it(shipped_server):
    client = shipped_server
    assert [model.id for model in client.models.list()] == ["starter", "generate", "speech", "prose"]
    drawn = client.images.generate(model="generate", prompt="red apple", extra_body={"temperature": 0.3, "seed": 0})
    expected = mmtx.load(ROOT / "demos" / "generate", "cpu").generate("red apple", "image", temperature=0.3, seed=0)
    assert np.array_equal(Image.open(io.BytesIO(base64.b64decode(drawn.data[0].b64_json))), expected)
    for model, call in (
            ("starter", lambda model: client.images.generate(model=model, prompt="red apple")),
            ("starter", lambda model: client.audio.speech.create(model=model, input="violin, C 5", voice="none")),
            ("starter", lambda model: client.completions.create(model=model, prompt="She was very")),
            ("prose", lambda model: client.chat.completions.create(model=model, messages=[{"role": "user", "content": "a"}]))):
        with pytest.raises(openai.BadRequestError, match=f"found '{model}', which was not trained for this route, expected '"):
            call(model)
    with pytest.raises(openai.NotFoundError, match="found 'tiny', expected 'starter' or 'generate' or 'speech' or 'prose'"):
        client.models.retrieve("tiny")
    said = client.completions.create(model="prose", prompt="She was very", max_tokens=8, temperature=0)
    assert said.model == "prose" and [said.choices[0].text] == mmtx.load(ROOT / "demos" / "prose", "cpu").generate(
        "She was very", "document", max_new_tokens=8)


def test_only_pages_of_allowed_origins_may_call(shipped_server):
    def ask(method: str, origin: str, kind: str = "application/json", **headers: str):
        request = urllib.request.Request(f"{shipped_server.base_url}models" if method == "GET" else
                                         f"{shipped_server.base_url}audio/transcriptions", method=method,
                                         data=b"" if method == "POST" else None)
        for name, value in {"Origin": origin, "Content-Type": kind, **headers}.items():
            request.add_header(name, value)
        try:
            return urllib.request.urlopen(request, timeout=30)
        except urllib.error.HTTPError as error:
            return error

    assert ask("GET", "https://page.example").headers["access-control-allow-origin"] == "https://page.example"
    assert ask("GET", "https://other.example").headers["access-control-allow-origin"] is None
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    allowed, refused = (ask("OPTIONS", f"https://{name}.example", **asked) for name in ("page", "other"))
    assert allowed.status == 200 and "authorization" in allowed.headers["access-control-allow-headers"]
    assert refused.status == 400 and refused.headers["access-control-allow-origin"] is None
    form = "multipart/form-data; boundary=x"
    assert [ask("POST", f"https://{name}.example", form).status for name in ("page", "other")] == [400, 403]


def test_a_preflight_needs_no_key(model):
    with TestClient(make_app({NAME: model}, key="secret", origins=["https://page.example"]), base_url="http://127.0.0.1") as client:
        asked = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
        assert client.options("/v1/chat/completions", headers=asked).status_code == 200
        answer = client.post("/v1/chat/completions", json={}, headers=asked)
        assert answer.status_code == 401 and answer.headers["access-control-allow-origin"] == "https://page.example"


def test_the_model_of_a_run_is_named_after_the_run():
    assert [_name(path) for path in ("runs/quickstart/model", "demos/starter", "/model", "org/name")] == [
        "quickstart", "starter", "model", "name"]


@pytest.fixture
def app_of(monkeypatch):
    """The application that `mmtx serve` or `mmtx demo` with these arguments would serve."""
    def started(*arguments: str):
        apps: list = []
        monkeypatch.setattr("mmtx.serving.app.serve", lambda app, host, port: apps.append(app))
        main([*arguments, "--device", "cpu"])
        return TestClient(apps[0], base_url="http://127.0.0.1")

    return started


@pytest.mark.slow
def test_the_shipped_model_by_another_name_has_its_routes_only(app_of):
    with app_of("serve", "--name", "mine") as client:
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["mine"]
        answer = client.post("/v1/images/generations", json={"model": "mine", "prompt": "red apple"})
        assert answer.status_code == 400
        assert answer.json()["error"]["message"] == ("model: found 'mine', which was not trained for this route, expected another route: "
                                                     "no other model is served here")
        assert client.post("/v1/embeddings", json={"model": "mine", "input": "a"}).status_code == 200


@pytest.mark.parametrize("name", ["speech", "generate"])
def test_a_model_of_ones_own_may_have_a_shipped_name(app_of, model, name):
    with app_of("demo", "--model", str(model.folder), "--name", name) as client:
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == [name]
        made = {"model": name, "out": "image", "content": [{"type": "text", "text": "a"}]}
        assert client.post("/demo/make", json=made).status_code == 200
