"""Manners of a library: what a program has set changes no answer, what we do changes nothing of the program's, and models go
wherever its threads and processes are.
"""

import copy
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

import mmtx
from mmtx import ambient
from mmtx.ambient import in_threads, neutral, neutral_steps
from mmtx.modality.base import load_tokenizer
from mmtx.modality.vocoder import VocoderConfig
from mmtx.pipeline import Model
from mmtx.weights import load_module, to_bytes

ROOT = Path(__file__).parents[1]
SAMPLED = {"temperature": 1.0, "seed": 5, "max_new_tokens": 12}
PICTURE = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
TONE = (0.5 * np.sin(np.arange(3000) / 5)).astype(np.float32)
MEDIA = [PICTURE, TONE, mmtx.Audio(TONE, 22_050), PICTURE[:9]]


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    """A model of lively weights, whose sounds come from a vocoder."""
    decoder, audio = copy.deepcopy(tiny_model.decoder), copy.deepcopy(tiny_model.tokenizers["audio"])
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    torch.manual_seed(2)
    audio.vocoder = audio.new_vocoder(VocoderConfig(width=16, depth=1)).eval()
    path = tmp_path_factory.mktemp("lively") / "model"
    Model(decoder, tiny_model.vocabulary, {**tiny_model.tokenizers, "audio": audio}).save(path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return mmtx.load(folder, "cpu")


def answers(model: Model) -> list:
    """What a model says to all kinds of questions, in a form that can be compared."""
    tokens = model.tokenize(["a", *MEDIA])
    features = [part.features.float().numpy().tobytes() for part in model.encode_parts([mmtx.Image(PICTURE), mmtx.Audio(TONE)])]
    return [
        model.caption(MEDIA, max_new_tokens=8), model.caption(MEDIA, **SAMPLED), model.caption(TONE, max_new_tokens=8),
        model.generate(["a red circle", PICTURE], guidance_scale=2.0, max_new_tokens=8),
        np.asarray(model.generate("a", out="image", **SAMPLED)).tobytes(),
        model.generate("a", out="audio", **SAMPLED).samples.tobytes(),
        np.asarray(model.outpaint(PICTURE, 8, **SAMPLED)).tobytes(),
        list(model.stream([TONE], max_new_tokens=8)), tokens, features,
        [np.asarray(getattr(part, "samples", part)).tobytes() for part in model.detokenize(tokens) if not isinstance(part, str)],
    ]


@pytest.fixture(scope="module")
def expected(model):
    found = answers(model)
    assert len(set(found[0])) > 1
    return found


@contextmanager
def default_dtype(dtype: torch.dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        assert torch.get_default_dtype() == dtype
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device():
    torch.set_default_device("meta")
    try:
        yield
    finally:
        assert torch.get_default_device().type == "meta"
        torch.set_default_device(None)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def autocast():
    with torch.autocast("cpu", torch.bfloat16):
        yield
        assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16


@contextmanager
def inference():
    with torch.inference_mode():
        yield
        assert torch.is_inference_mode_enabled()


SETTINGS = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "default device": default_device,
    "device": lambda: torch.device("meta"),
    "autocast": autocast,
    "no_grad": torch.no_grad,
    "inference_mode": inference,
    "deterministic": deterministic,
    "numpy": lambda: np.errstate(all="raise"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_the_program_change_no_answer(name, model, expected):
    with SETTINGS[name]():
        assert answers(model) == expected


@pytest.mark.parametrize("name", SETTINGS)
def test_a_model_that_is_loaded_under_settings_is_as_any(name, folder, model, expected):
    with SETTINGS[name]():
        loaded = mmtx.load(folder, "cpu")
    assert answers(loaded) == expected
    for found, given in zip(loaded.decoder.parameters(), model.decoder.parameters(), strict=True):
        assert found.dtype == torch.float32 and found.requires_grad and not found.is_inference()
        assert torch.equal(found, given)
    loaded.decoder(torch.tensor([[1, 2]]), torch.tensor([[0, 1]])).sum().backward()  # it can be trained


@pytest.mark.parametrize("name", ["float64", "device", "autocast"])
def test_codecs_alone_keep_their_codes_as_well(name, model):
    image, audio = model.tokenizers["image"], model.tokenizers["audio"]

    def found():
        codes = audio.encode(torch.from_numpy(TONE).cpu())
        pieces = list(audio.encode_stream([torch.from_numpy(TONE[:1000]), torch.from_numpy(TONE[1000:])]))
        waves = list(audio.decode_stream([codes]))
        return [codes.tobytes(), np.concatenate(pieces).tobytes(), audio.decode(codes).numpy().tobytes(),
                torch.cat(waves).numpy().tobytes(), image.encode(torch.from_numpy(PICTURE).permute(2, 0, 1)).tobytes(),
                image.decode(np.zeros((2, 2), int)).numpy().tobytes()]

    before = found()
    assert before[0] == before[1]
    with SETTINGS[name]():
        assert found() == before


def test_between_two_pieces_of_a_stream_the_settings_are_the_programs(model, expected):
    pieces = []
    with default_dtype(torch.float64), autocast(), np.errstate(over="raise"), torch.device("meta"):
        for piece in model.stream([TONE], max_new_tokens=8):
            assert torch.get_default_dtype() == torch.float64 and torch.is_autocast_enabled("cpu")
            assert np.geterr()["over"] == "raise" and torch.get_default_device().type == "meta"
            pieces.append(piece)
        left = model.stream([TONE], max_new_tokens=8)
        assert next(left) == pieces[0]
        left.close()
        assert torch.get_default_dtype() == torch.float64 and torch.is_autocast_enabled("cpu")
    assert pieces == expected[7]


def test_calls_that_overlap_give_the_default_dtype_back_when_the_last_ends():
    with default_dtype(torch.float64):
        with ThreadPoolExecutor(1) as pool:
            first, second = neutral(), neutral()
            first.__enter__()
            pool.submit(second.__enter__).result()
            first.__exit__(None, None, None)
            assert torch.get_default_dtype() == torch.float32
            pool.submit(second.__exit__, None, None, None).result()
        assert torch.get_default_dtype() == torch.float64
        with pytest.raises(KeyError), neutral():
            raise KeyError
        assert torch.get_default_dtype() == torch.float64


@pytest.mark.parametrize("name", SETTINGS)
def test_nothing_of_the_program_is_set_within(name):
    def seen():
        kinds = [torch.is_autocast_enabled(kind) for kind in ambient.AUTOCAST]
        return (torch.get_default_dtype(), torch.get_default_device(), torch.is_inference_mode_enabled(), kinds, np.geterr(),
                torch.zeros(1).device)

    usual = seen()
    with SETTINGS[name]():
        with neutral():
            assert seen() == usual
        (within,) = neutral_steps(lambda: (seen() for _ in range(1)))()
        assert name in ("no_grad", "deterministic") or seen() != usual
        assert within == usual


# -- Random state --------------------------------------------------------------------------------------------


def test_random_state_is_left_alone(folder, model):
    bare = copy.deepcopy(model)
    bare.tokenizers["audio"].vocoder = None  # Griffin-Lim starts from random phases
    torch.manual_seed(7), np.random.seed(7), random.seed(7)
    calls = (lambda: mmtx.load(folder, "cpu"), lambda: load_tokenizer(folder / "audio"), lambda: answers(model),
             lambda: bare.generate("a", out="audio", **SAMPLED), lambda: model.caption(PICTURE, temperature=1.0),
             lambda: bare.tokenizers["audio"].griffin_lim(torch.zeros(8, 16)))
    for call in calls:
        call()
    drawn = torch.rand(3), np.random.rand(3), random.random()
    torch.manual_seed(7), np.random.seed(7), random.seed(7)
    assert torch.equal(drawn[0], torch.rand(3)) and (drawn[1] == np.random.rand(3)).all() and drawn[2] == random.random()


def test_networks_whose_weights_are_read_are_made_without_drawing(tmp_path):
    """Whatever their initial values are drawn with; a truncated normal draws until all values are within its bounds."""
    def build():
        network = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Conv1d(4, 4, 3), torch.nn.Embedding(4, 4))
        torch.nn.init.trunc_normal_(network[1].weight, std=9.0)
        torch.nn.init.xavier_normal_(network[2].weight)
        network[0].weight.data.normal_()
        return network

    written = build()
    (tmp_path / "model.safetensors").write_bytes(to_bytes(written.state_dict()))
    before = torch.get_rng_state()
    read = load_module(build, tmp_path / "model.safetensors")
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(value, read.state_dict()[name]) for name, value in written.state_dict().items())
    build()
    assert not torch.equal(before, torch.get_rng_state())


def test_griffin_lim_is_that_of_torchaudio(model):
    import torchaudio.functional as AF

    tokenizer = copy.deepcopy(model.tokenizers["audio"])
    tokenizer.vocoder, c = None, tokenizer.config
    mel = tokenizer.spectrogram(torch.from_numpy(TONE))
    magnitude = (tokenizer.to_log(mel).exp() @ torch.linalg.pinv(tokenizer._mel_matrix)).clamp_min(0).T
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wanted = AF.griffinlim(torch.nn.functional.pad(magnitude, (0, 1)), tokenizer.hann, c.window, c.hop, c.window, power=1.0,
                               n_iter=32, momentum=0.99, length=len(mel) * c.hop, rand_init=True)
    assert torch.equal(tokenizer.waveform(mel), wanted)


# -- Threads -------------------------------------------------------------------------------------------------


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def threads_of_a_new_thread() -> int:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


def test_a_thread_that_begins_while_batches_run_has_the_programs_number(two_threads):
    def run(number):
        return torch.get_num_threads(), threads_of_a_new_thread()

    assert in_threads(run, range(6), 2) == [(1, 2)] * 6
    assert torch.get_num_threads() == threads_of_a_new_thread() == 2


def test_a_number_that_another_thread_has_set_stays_what_new_ones_get(two_threads, monkeypatch):
    monkeypatch.setattr(ambient, "_state", ambient._State())  # its threads are still to be made
    with ThreadPoolExecutor(1) as pool:
        pool.submit(torch.set_num_threads, 3).result()
        assert in_threads(lambda _: torch.get_num_threads(), range(4), 2) == [1] * 4
        assert pool.submit(torch.get_num_threads).result() == threads_of_a_new_thread() == 3
    assert torch.get_num_threads() == 2


def test_the_error_of_the_first_item_is_raised_and_no_more_are_begun(two_threads):
    begun, barrier = [], threading.Barrier(2, timeout=30)

    def run(number):
        begun.append(number)
        barrier.wait()  # the first two fail at the same time
        raise mmtx.InputError(f"number {number}")

    with pytest.raises(mmtx.InputError, match="number 0"):
        in_threads(run, range(100), 2)
    assert sorted(begun) == [0, 1]
    assert torch.get_num_threads() == threads_of_a_new_thread() == 2


def test_many_threads_get_the_answers_of_one(model, expected, two_threads, monkeypatch):
    monkeypatch.setattr("mmtx.batching.BATCH", 2)  # so that each call has batches in threads
    wanted = model.caption(MEDIA * 2, max_new_tokens=8)
    streamed = "".join(expected[7])

    def ask(number):
        if number % 2:
            return "".join(model.stream([TONE], max_new_tokens=8)) == streamed
        return model.caption(MEDIA * 2, max_new_tokens=8) == wanted

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(32)))


# -- Copies and processes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_answers_as_the_model(copied, model, expected):
    other = copied(model)
    assert answers(other) == expected
    assert other._weights is not None and model._weights is not None  # fixed, as it was
    with torch.no_grad():
        other.decoder.norm.weight.normal_(generator=torch.Generator().manual_seed(1))
    assert answers(other.to("cpu")) != expected == answers(model)
    loose = Model(model.decoder, model.vocabulary, model.tokenizers)
    assert copied(loose)._weights is None


def caption(call, queue) -> None:
    queue.put((call(MEDIA, max_new_tokens=8), torch.get_num_threads()))


def test_a_spawned_process_answers_as_this_one(model, expected):
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    child = context.Process(target=caption, args=(model.caption, queue))
    child.start()
    child.join(120)
    try:
        assert child.exitcode == 0
        assert queue.get()[0] == expected[0]
    finally:
        child.kill()


FORK = """
import multiprocessing, sys, threading
import numpy as np, torch, mmtx

torch.set_num_threads(2)
model = mmtx.load(sys.argv[1], "cpu")
media = [np.zeros((16, 16, 3), np.uint8)] * 40 + [np.sin(np.arange(3000) / 5).astype(np.float32)]
torch.ones(1000, 1000) @ torch.ones(1000, 1000)  # now torch's threads are there
expected = model.caption(media, max_new_tokens=4), list(model.stream("a", max_new_tokens=4))

def child():
    assert (model.caption(media, max_new_tokens=4), list(model.stream("a", max_new_tokens=4))) == expected
    torch.ones(1000, 1000) @ torch.ones(1000, 1000)
    seen = []
    other = threading.Thread(target=lambda: seen.append((torch.get_num_threads(), model.caption(media, max_new_tokens=4))))
    other.start(), other.join()
    assert seen == [(2, expected[0])]

for _ in range(2):
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    print("hangs" if process.is_alive() else process.exitcode, torch.get_num_threads(), flush=True)
    process.kill()
"""


def run(code: str, *arguments, **more) -> subprocess.CompletedProcess:
    """A program in a process of its own."""
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
                          timeout=240, **more)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
def test_a_forked_process_answers_though_threads_of_torch_are_gone(folder):
    done = run(FORK, folder)
    assert (done.stdout.split(), done.returncode) == (["0", "2"] * 2, 0), done.stderr


# -- What else a program sees --------------------------------------------------------------------------------


def test_the_environment_is_left_alone(folder):
    code = """
import os, subprocess, sys
def seen():
    return dict(line.split("=", 1) for line in subprocess.check_output([sys.executable, "-c",
        "import os; [print(f'{n}={v}') for n, v in os.environ.items() if 'OMP' in n or 'THREAD' in n]"], text=True).splitlines())
before, ours = seen(), dict(os.environ)
import mmtx
assert seen() == before and os.environ == ours
model = mmtx.load(sys.argv[1], "cpu")
import numpy
model.caption(numpy.zeros((9, 9, 3), numpy.uint8), max_new_tokens=2)
assert seen() == before and os.environ == ours
"""
    kept = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = run(code, folder, env=kept)
    assert done.returncode == 0, done.stderr


def test_steps_that_are_left_at_exit_say_nothing():
    code = """
import torch
from mmtx.ambient import neutral_steps

@neutral_steps
def count():
    yield from range(9)

steps = count()
torch.set_default_dtype(torch.float64)
print(next(steps))
"""
    done = run(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


def test_steps_hand_errors_and_ends_through():
    @neutral_steps
    def count(last):
        """Documented."""
        yield 0
        raise last

    assert count.__doc__ == "Documented."
    for error in (mmtx.InputError("x"), KeyError()):
        steps = count(error)
        assert next(steps) == 0
        with pytest.raises(type(error)):
            next(steps)
    assert list(neutral_steps(lambda: iter("ab"))()) == ["a", "b"]


def test_no_warning_is_given(folder):
    code = """
import sys, mmtx, numpy
model = mmtx.load(sys.argv[1], "cpu")
model.caption([numpy.zeros((9, 9, 3), numpy.uint8), numpy.ones(900, numpy.float32)], max_new_tokens=2)
model.generate("a", out="audio", max_new_tokens=4), model.generate("a", out="image")
"""
    done = run("import warnings; warnings.simplefilter('error', UserWarning)\n" + code, folder)
    assert (done.returncode, done.stderr) == (0, "")
