"""The Python API on a tiny random model: what goes in, what comes out, and folders that are not whole."""

import copy
import io
import json
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage

import mmtx
from mmtx.batching import BATCH, BATCH_TOKENS, by_length, run_batches
from mmtx.batching import SHORT as SHORT_PROMPT
from mmtx.document import Document, MediaPart, TextPart, Turn
from mmtx.inference.generation import steps
from mmtx.inference.sampling import Sampling
from mmtx.inference.torch_engine import TorchEngine
from mmtx.modality import image
from mmtx.modality.audio import CHUNKS
from mmtx.modality.text import TextTokenizer
from mmtx.modality.vocoder import VocoderConfig
from mmtx.model_folder import DEFAULT_MODEL
from mmtx.pipeline import Model
from mmtx.sequence import render
from mmtx.shipped_files import find_shipped, shipped
from mmtx.vocabulary import Vocabulary

RATE = 16_000
SHORT = {"max_new_tokens": 6}
SAMPLED = {"temperature": 1.0, "seed": 3, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def pixels():
    """A picture, uint8 (H=20, W=24, 3)."""
    return np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def tone():
    """A sound, float32 (S,)."""
    return (0.7 * np.sin(np.arange(4000) * 2 * np.pi * 440 / RATE)).astype(np.float32)


@pytest.fixture(scope="module")
def files(pixels, tone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    PILImage.fromarray(pixels).save(folder / "picture.png")
    soundfile.write(folder / "sound.wav", tone, RATE, subtype="FLOAT")
    return folder


@pytest.fixture(scope="module")
def lively_model(tiny_model):
    """Small random weights give every prompt the same answer: larger ones make answers depend on prompts."""
    model = Model(copy.deepcopy(tiny_model.decoder), tiny_model.vocabulary, tiny_model.tokenizers)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    return model


@pytest.fixture
def saved(tiny_model, tmp_path):
    tiny_model.save(tmp_path / "model")
    return tmp_path / "model"


def different(tokenizer):
    """A copy of a codec with one weight changed."""
    other = type(tokenizer)(tokenizer.config)
    other.load_state_dict(tokenizer.state_dict())
    with torch.no_grad():
        other.network.embed.bias[0] += 1
    return other.eval()


# -- Captions ------------------------------------------------------------------------------------------------


def test_caption_takes_a_picture_in_every_form(tiny_model, files, pixels):
    path = files / "picture.png"
    expected = tiny_model.caption(path, **SAMPLED)
    assert expected and isinstance(expected, str)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    for form in (str(path), PILImage.open(path), pixels, tensor, tensor.float() / 255, mmtx.Image(pixels),
                 mmtx.Image(str(path)), mmtx.Image(PILImage.fromarray(pixels))):
        assert tiny_model.caption(form, **SAMPLED) == expected


def test_caption_takes_a_sound_in_every_form(tiny_model, files, tone):
    path = files / "sound.wav"
    expected = tiny_model.caption(path, **SAMPLED)
    for form in (str(path), tone, torch.from_numpy(tone), mmtx.Audio(tone), mmtx.Audio(tone, RATE),
                 mmtx.Audio(path), mmtx.Audio(np.stack([tone, 0 * tone], 1)), mmtx.Sound(tone, RATE)):
        assert tiny_model.caption(form, **SAMPLED) == expected


@pytest.mark.parametrize("wrap", [lambda data: data, bytearray, memoryview, io.BytesIO, lambda data: {"bytes": data, "path": None},
                                  lambda data: at_end(io.BytesIO(data)), lambda data: mmtx.Audio(io.BytesIO(data))])
def test_what_a_program_holds_is_captioned_as_the_file_it_is(lively_model, files, wrap):
    for name in ("picture.png", "sound.wav"):
        given = wrap((files / name).read_bytes())
        if not isinstance(given, mmtx.Audio) or name == "sound.wav":
            assert lively_model.tokenize([given]) == lively_model.tokenize(given) == lively_model.tokenize([files / name])
    with (files / "picture.png").open("rb") as file:
        assert lively_model.caption([file, file], **SHORT) == 2 * [lively_model.caption(files / "picture.png", **SHORT)]


def at_end(file: io.BytesIO) -> io.BytesIO:
    """A file that another reader left at its end."""
    file.seek(0, io.SEEK_END)
    return file


def test_a_sound_with_its_rate_is_one_medium(lively_model, files, tone):
    """As soundfile and torchaudio read it, and as a cell of a Hugging Face dataset has it."""
    slow, asked = np.repeat(tone, 2), lively_model.tokenize
    expected = asked(mmtx.Audio(slow, 2 * RATE))
    assert expected != asked(mmtx.Audio(slow, RATE))
    for given in ((slow, 2 * RATE), (torch.from_numpy(slow)[None], 2 * RATE), (np.stack([slow, slow], 1), np.int64(2 * RATE)),
                  {"path": "gone.wav", "array": slow, "sampling_rate": 2 * RATE}, {"array": slow.tolist(), "sampling_rate": 2 * RATE}):
        assert asked(given) == asked([given]) == expected
    assert asked(soundfile.read(files / "sound.wav")) == asked(files / "sound.wav")
    assert asked((tone, tone)) == asked([tone, tone]) == asked(Column([tone, tone]))


class Column(Sequence):
    """A sequence of media that is no list, as a column of a Hugging Face dataset is."""

    def __init__(self, items: list):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


@dataclass
class LazySound:
    """What torchcodec's `AudioDecoder` offers; the package needs FFmpeg, which may be missing here."""

    samples: SimpleNamespace | None

    def get_all_samples(self):
        if self.samples is None:
            raise RuntimeError("Could not receive frame from decoder: Invalid data found when processing input\nand more")
        return self.samples


def test_a_sound_that_is_yet_to_be_decoded(lively_model, tone):
    """As the cells of a Hugging Face dataset are, in a column or one by one."""
    slow, asked = torch.from_numpy(np.repeat(tone, 2)), lively_model.tokenize
    sound = LazySound(SimpleNamespace(data=torch.stack([slow, slow]), sample_rate=2 * RATE))
    assert asked(sound) == asked(Column([sound])) == asked(mmtx.Audio(slow, 2 * RATE))
    with pytest.raises(mmtx.InputError, match="^found LazySound of a sound that cannot be decoded .Could not .* processing input.$"):
        asked(LazySound(None))


def test_what_a_program_holds_and_cannot_be_read_is_one_clear_error(tiny_model, files, tmp_path):
    closed = io.BytesIO(b"a")
    closed.close()
    (tmp_path / "a.txt").write_text("a text")
    with open(tmp_path / "a.txt") as text, open(tmp_path / "b.bin", "wb") as written:
        for given, told in ((b"a text", "found 6 bytes of neither a picture nor a sound"), (closed, "BytesIO cannot be read"),
                            (text, "found an open file that holds text, expected one opened in binary mode"),
                            (written, "BufferedWriter cannot be read"), (io.BytesIO(), "found 0 bytes of neither"),
                            (mmtx.Image(text), "found an open file that holds text"), ({"a": 1}, "found an object with 'a', expected one with"),
                            ({"bytes": None, "path": str(files / "picture.png")}, "found an object with 'bytes', 'path'"),
                            ({"bytes": str(files / "picture.png")}, "found an object with 'bytes'")):
            with pytest.raises(mmtx.InputError, match=told):
                tiny_model.caption(given)
    with pytest.raises(mmtx.InputError, match="item 2 of 2: found int, expected a path, bytes, an open file, a PIL image"):
        tiny_model.caption([files / "picture.png", 5])


def test_vectors_of_a_batch_are_those_of_each_prompt(lively_model, files, pixels, tone, three_threads):
    prompts = [[pixels, "what?"], "a red circle", mmtx.Audio(tone), [], files / "sound.wav", "b", [tone, pixels, "and?"], *map(str, range(40))]
    vectors = lively_model.embed_batch(iter(prompts))
    assert len(vectors) == len(prompts)
    np.testing.assert_allclose(vectors, np.stack([lively_model.embed(prompt) for prompt in prompts]), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert lively_model.embed_batch([]).shape == (0, vectors.shape[1])
    for given, told in ((["a", [files / "none.png"]], "prompt 2 of 2: "), ("a", "prompts: found str, expected a list")):
        with pytest.raises(mmtx.InputError, match=told):
            lively_model.embed_batch(given)


def test_the_rate_of_an_array_counts(tiny_model, tone):
    # Twice the rate is half the time: half as many codes.
    at_rate, at_double = (len(tiny_model.tokenize([mmtx.Audio(tone, rate)])) for rate in (RATE, 2 * RATE))
    assert at_double < 0.7 * at_rate


def test_several_media_come_in_any_order_that_they_have(tiny_model, files):
    names = [str(files / name) for name in ("picture.png", "sound.wav")]
    expected = tiny_model.caption(names, **SHORT)
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"path": names, "object": [Path(name) for name in names]}, index=[7, 3])
    for several in (tuple(names), iter(names), (name for name in names), np.array(names), table["path"], table["object"], table["path"].array,
                    np.array([Path(name) for name in names], object)):
        assert tiny_model.caption(several, **SHORT) == expected, type(several)
    assert tiny_model.tokenize(iter(["a", Path(names[0])])) == tiny_model.tokenize(["a", Path(names[0])])
    for one in (set(names), table):
        with pytest.raises(mmtx.InputError, match=f"^found {type(one).__name__}, expected a path"):
            tiny_model.caption(one)


def test_captions_depend_on_the_picture(tiny_model):
    pictures = [np.full((16, 16, 3), value, np.uint8) for value in (0, 128, 255)]
    assert len({tuple(tiny_model.tokenize([picture])) for picture in pictures}) == 3
    logits = []
    for picture in pictures:
        ids = torch.tensor(tiny_model.tokenize([picture]))[None]
        hidden = tiny_model.decoder(ids, torch.arange(ids.shape[1])[None])
        logits.append(tiny_model.decoder.logits(hidden[:, -1]))
    assert not torch.equal(logits[0], logits[1])


def test_a_batch_answers_as_each_item_alone(lively_model, files, pixels, tone):
    # Lengths differ: a padded row must see exactly what it sees alone.
    items = [files / "picture.png", tone, tone[:900], pixels[:8], files / "sound.wav", tone[:2000]]
    together = lively_model.caption(items, max_new_tokens=16)
    assert len(set(together)) > 3
    assert together == [lively_model.caption(item, max_new_tokens=16) for item in items]
    assert lively_model.caption(tuple(items[:1]), **SHORT) == [lively_model.caption(items[0], **SHORT)]
    assert lively_model.caption([]) == []


def test_a_model_that_is_moved_forgets_what_it_made_of_its_weights(lively_model, pixels):
    model = Model(copy.deepcopy(lively_model.decoder), lively_model.vocabulary, lively_model.tokenizers).prepare_for_inference()
    before = model.caption(pixels)
    model.decoder.norm.weight.data.normal_(generator=torch.Generator().manual_seed(1))  # which by itself is not detected
    after = Model(model.decoder, model.vocabulary, model.tokenizers).caption(pixels)
    assert model.to("cpu").caption(pixels) == after != before


@pytest.mark.parametrize("bits", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("assign", [False, True], ids=["written", "replaced"])
def test_weights_that_change_after_loading_are_those_that_answer(lively_model, pixels, tone, assign, bits):
    make = lambda decoder: Model(decoder, lively_model.vocabulary, lively_model.tokenizers).prepare_for_inference(bits)
    model, other = (make(copy.deepcopy(lively_model.decoder)) for _ in range(2))
    with torch.no_grad():
        for weight in other.decoder.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)), alpha=0.05)
    before = model.caption([pixels, tone])
    model.decoder.load_state_dict(other.decoder.state_dict(), assign=assign)
    expected = make(copy.deepcopy(other.decoder)).caption([pixels, tone])
    assert model.caption([pixels, tone]) == expected != before
    assert model.caption(pixels) == expected[0]
    # Training writes to the same places.
    optimizer = torch.optim.SGD(model.decoder.parameters(), lr=0.1)
    for weight in model.decoder.parameters():
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    optimizer.step()
    assert model.caption([pixels, tone]) == make(copy.deepcopy(model.decoder)).caption([pixels, tone]) != expected


@pytest.fixture
def three_threads():
    """Torch may use three threads, two of them too many for this machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_more_prompts_than_a_batch_keep_their_order(lively_model, tone, pixels, monkeypatch, three_threads):
    items = [tone[:3000], tone[:500], pixels, tone[:2000], pixels[:8], tone[:900], pixels[:, :9], tone[:1500]]
    expected = lively_model.caption(items, **SHORT)
    assert len(set(expected)) > 3
    monkeypatch.setattr("mmtx.batching.BATCH", 2)
    assert lively_model.caption(items, **SHORT) == expected
    sampled = lively_model.caption(items, **SAMPLED)
    torch.set_num_threads(1)
    assert lively_model.caption(items, **SAMPLED) == sampled


@pytest.mark.parametrize("form", ["jpeg", "png"])
def test_a_pil_image_may_be_given_twice(tiny_model, three_threads, form, monkeypatch):
    """Its file is read when its pixels are first asked for, and several threads ask."""
    monkeypatch.setattr("mmtx.batching.BATCH", 2)
    file = io.BytesIO()
    PILImage.fromarray(np.random.default_rng(0).integers(0, 256, (700, 900, 3), dtype=np.uint8)).save(file, form)
    expected = tiny_model.caption(PILImage.open(file), **SHORT)
    for _ in range(4):
        assert tiny_model.caption([PILImage.open(io.BytesIO(file.getvalue()))] * 8, **SHORT) == [expected] * 8


def test_batches_run_in_threads_of_one_thread_each(tiny_model, monkeypatch, three_threads):
    monkeypatch.setattr("mmtx.batching.BATCH", 2)
    barrier = threading.Barrier(3, timeout=30)      # passed only when three are at it at the same time

    def run(batch):
        barrier.wait()
        return [(number * number, torch.get_num_threads()) for number in batch]

    def threads_of_a_new_thread():
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.get_num_threads).result()

    assert list(run_batches(run, [[0, 1], [2, 3], [4, 5]], torch.device("cpu"))) == [(n, (n * n, 1)) for n in range(6)]
    assert torch.get_num_threads() == threads_of_a_new_thread() == 3
    with pytest.raises(mmtx.InputError, match="fourth"):
        tiny_model.caption([np.zeros((9, 9, 3), np.uint8)] * 3 + [mmtx.Image("fourth.png")])
    assert torch.get_num_threads() == threads_of_a_new_thread() == 3


# -- Batches -------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 3 * BATCH_TOKENS) | st.integers(1, 300), max_size=150))
def test_prompts_share_a_batch_with_those_of_about_their_length(lengths):
    batches = by_length(lengths)
    assert sorted(number for batch in batches for number in batch) == list(range(len(lengths)))
    for batch in batches:
        longest, real = max(lengths[i] for i in batch), sum(lengths[i] for i in batch)
        assert 0 < len(batch) <= BATCH
        assert longest * len(batch) <= BATCH_TOKENS or len(batch) == 1
        assert longest <= 2 * max(SHORT_PROMPT, min(lengths[i] for i in batch))
        assert longest * len(batch) <= 2 * real or longest <= 2 * SHORT_PROMPT


def test_prompts_of_one_length_are_not_torn_apart():
    assert [len(batch) for batch in by_length([70] * 100)] == [32, 32, 32, 4]
    assert by_length([5, 100, 30]) == [[0, 2, 1]]
    assert by_length([]) == []


@pytest.fixture
def work(lively_model, monkeypatch):
    """Tokens that the decoder is fed as prompts, and numbers of media that an encoder holds at a time."""
    prefilled, held = [], []
    begin, begin_long, tokenizer = TorchEngine._prefill, TorchEngine._prefill_long, lively_model.tokenizers["audio"]
    embed = tokenizer.embed_batch
    monkeypatch.setattr(TorchEngine, "_prefill", lambda engine, x, *more: (prefilled.append(x[..., 0].numel()),
                                                                           begin(engine, x, *more))[1])
    monkeypatch.setattr(TorchEngine, "_prefill_long", lambda engine, x, length, *more: (prefilled.append(length),
                                                                                        begin_long(engine, x, length, *more))[1])
    monkeypatch.setattr(tokenizer, "embed_batch", lambda media, *more: (held.append(sum(map(len, media))), embed(media, *more))[1])
    return prefilled, held


def test_a_long_sound_costs_short_ones_nothing(lively_model, work):
    prefilled, held = work
    random = np.random.default_rng(0)
    short, long = [random.normal(0, 0.1, 1600) for _ in range(31)], [random.normal(0, 0.1, 300_000)]
    costs = []
    for media in (short, long, short[:9] + long + short[9:]):
        prefilled.clear(), held.clear()
        answers = lively_model.caption(media, max_new_tokens=4)
        costs.append((sum(prefilled), sum(held)))
    apart = sum(tokens for tokens, _ in costs[:2])
    assert costs[2] == (apart, 31 * 1600 + 300_000) and apart > 1000
    assert answers[9] == lively_model.caption(long, max_new_tokens=4)[0]


def test_sounds_that_are_held_at_a_time_are_bounded(lively_model, work, monkeypatch):
    _, held = work
    monkeypatch.setattr("mmtx.batching.BATCH_VALUES", 8_000)
    sounds = [np.random.default_rng(0).normal(0, 0.1, length) for length in (3000, 3000, 3000, 20_000, 500, 600)]
    together = lively_model.caption(sounds, **SHORT)
    assert held == [9_000, 20_000, 1_100]
    assert together == [lively_model.caption(sound, **SHORT) for sound in sounds]


def test_the_spectrogram_of_a_long_sound_is_made_in_pieces(tiny_model):
    tokenizer = tiny_model.tokenizers["audio"]
    c = tokenizer.config
    sound = torch.from_numpy(np.random.default_rng(0).normal(0, 0.1, 2 * CHUNKS * c.chunk * c.patch_frames * c.hop + 777)).float()
    pieces = list(tokenizer._column_pieces(tokenizer._padded(sound)))
    assert len(pieces) == 3 and max(map(len, pieces)) == CHUNKS * c.chunk * c.patch_frames
    torch.testing.assert_close(torch.cat(pieces), tokenizer.spectrogram(sound))
    assert len(tokenizer.encode(sound)) == tokenizer.grid(sound)[0]


PHOTOGRAPHS = """
import io, sys
import torch, mmtx
from PIL import Image

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1000

torch.set_num_threads(1)
file = io.BytesIO()
Image.new("L", (6000, 4000)).save(file, "PNG", compress_level=1)
model, photograph = mmtx.load(sys.argv[1], "cpu"), mmtx.Image(file.getvalue())
before = peak()
model.caption(photograph, max_new_tokens=1)
one = peak()
model.caption([photograph] * 3, max_new_tokens=1)
print(one - before, peak() - one)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak of a process is told otherwise")
def test_photographs_are_held_small(saved):
    done = subprocess.run([sys.executable, "-c", PHOTOGRAPHS, saved], capture_output=True, text=True, timeout=240,
                          cwd=Path(__file__).parents[1])
    one, more = map(float, done.stdout.split())
    assert one > 72  # MB: the picture in 8 bits, so the measure works
    assert more < 40


def test_a_large_picture_is_resized_to_the_same_values(monkeypatch):
    picture = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 90, 61), np.uint8))
    whole = image.resize(picture, 24, 17)
    monkeypatch.setattr(image, "LARGE", 0)
    assert torch.equal(image.resize(picture, 24, 17), whole)


# -- Wrong values --------------------------------------------------------------------------------------------


def test_caption_documents_ask_up_to_the_last_user_turn(tiny_model, monkeypatch):
    asked = []
    monkeypatch.setattr(tiny_model, "_answer_texts", lambda documents, sampling: asked.extend(documents))
    one, two = Turn("user", (TextPart([1]),)), Turn("assistant", (TextPart([2]),))
    tiny_model.caption_documents([Document((one, two)), Document((one, two, one, two)), Document((one,))])
    assert asked == [Document((one,)), Document((one, two, one)), Document((one,))]


def test_media_of_documents_are_encoded_first(lively_model, pixels):
    document = Document((Turn("user", (mmtx.Image(pixels),)),))
    with pytest.raises(mmtx.InputError, match="document 2 of 2: found Image, expected parts of codes, as `encode_documents` makes them"):
        lively_model.caption_documents([*lively_model.encode_documents([document]), document])
    (encoded,) = lively_model.encode_documents([document])
    assert lively_model.prompt_length(document) == lively_model.prompt_length(encoded)
    assert lively_model.caption_documents([encoded], Sampling(**SHORT)) == [lively_model.caption(pixels, **SHORT)]


@pytest.mark.parametrize("media, told", [
    ("nothing.png", ["nothing.png", "no such file"]),
    (3, ["int", "expected a path"]),
    (None, ["NoneType"]),
    (np.zeros((2, 3, 5, 7), np.uint8), ["(2, 3, 5, 7)"]),
    (np.full((4, 4, 3), 2.0), ["2"]),
    (np.zeros((0,), np.float32), ["sound"]),
    (np.array([np.nan], np.float32), ["NaN"]),
    (np.array(0.5), ["shape ()"]),
    (np.array([None, 1.0], object), ["item 1 of 2", "NoneType"]),
    (b"abc", ["3 bytes", "expected PNG"]),
    ("x" * 5000, ["xxx", "too long"]),
    (mmtx.Image(None), ["NoneType"]),
    (mmtx.Audio(np.zeros(99, np.float32), -1), ["-1 Hz"]),
    (torch.zeros(1, 900), ["(1, 900)", "mmtx.Audio", "mmtx.Image"]),
    (torch.zeros(2, 900) - 0.5, ["mmtx.Audio"]),
    (torch.zeros(1, 900, dtype=torch.int16), ["mmtx.Audio"]),
    (torch.zeros(1, 1, 900), ["mmtx.Audio"]),
    (np.zeros((900, 2), np.float32), ["mmtx.Audio"]),
    ({}, ["nothing", "'sampling_rate'"]),
])
def test_caption_names_what_it_cannot_read(tiny_model, media, told):
    with pytest.raises(mmtx.InputError) as error:
        tiny_model.caption(media)
    assert all(word in str(error.value) for word in told), error.value


def test_media_lie_in_the_home_of_the_user(tiny_model, files, tone, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(files))
    expected = tiny_model.tokenize([files / "picture.png", files / "sound.wav"])
    assert tiny_model.tokenize([Path("~/picture.png"), mmtx.Audio("~/sound.wav")]) == expected
    assert tiny_model.tokenize([mmtx.Image("~/picture.png"), mmtx.Audio(Path("~/sound.wav"))]) == expected
    assert tiny_model.caption("~/picture.png", **SHORT) == tiny_model.caption(files / "picture.png", **SHORT)
    assert [*mmtx.find_media(["~/picture.png", "~"])] == [str(files / name) for name in ("picture.png", "picture.png", "sound.wav")]
    monkeypatch.setenv("HOME", str(tmp_path))
    mmtx.Sound(tone, RATE).save("~/a.wav")
    assert (tmp_path / "a.wav").is_file()
    for call in (tiny_model.caption, lambda name: tiny_model.caption(mmtx.Image(name)), mmtx.Sound(tone, RATE).save):
        with pytest.raises(mmtx.InputError, match="~nobody-of-this-name/a.wav: found ~nobody-of-this-name, the home of no user here"):
            call("~nobody-of-this-name/a.wav")
    (error,) = mmtx.find_media(["~nobody-of-this-name/a.wav"])
    assert "the home of no user here" in str(error)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~").mkdir()
    shutil.copy(files / "picture.png", "~/picture.png")  # a file of this very name is meant
    assert tiny_model.tokenize(Path("~/picture.png")) == tiny_model.tokenize(files / "picture.png")


@pytest.mark.parametrize("make, one, other", [
    (mmtx.Image, np.zeros((4, 4, 3), np.uint8), np.ones((4, 4, 3), np.uint8)),
    (mmtx.Image, np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4, 3), np.float32)),
    (mmtx.Image, torch.zeros(3, 4, 4), torch.ones(3, 4, 4)),
    (mmtx.Image, torch.zeros(3, 4, 4), np.zeros((3, 4, 4))),
    (mmtx.Image, PILImage.new("RGB", (4, 4)), PILImage.new("RGB", (4, 4), "red")),
    (mmtx.Image, "a.png", "b.png"),
    (mmtx.Audio, np.zeros(4, np.float32), np.zeros(5, np.float32)),
    (partial(mmtx.Medium, "image"), [np.zeros(4)], [np.ones(4)]),
    (partial(mmtx.Sound, rate=RATE), np.zeros(4, np.float32), np.ones(4, np.float32)),
], ids=range(9))
def test_media_are_equal_if_their_data_are(make, one, other):
    first, second = make(one), make(other)
    assert [first == same for same in (first, second)] == [True, False]
    assert [first != same for same in (first, second, one, "a.png")] == [False, True, True, True]
    alike = [make(copy.deepcopy(one)), copy.copy(first), *([] if isinstance(one, list) else [copy.deepcopy(first), pickle.loads(pickle.dumps(first))])]
    if not isinstance(one, list):  # whose arrays cannot be compared as one value
        assert all(item == first and hash(item) == hash(first) for item in alike)
        assert len({first, *alike, second}) == 2 and {first: 1}[alike[0]] == 1 and [second, first].index(alike[0]) == 1


def test_media_of_another_kind_or_rate_differ():
    sound = np.zeros(4, np.float32)
    assert mmtx.Audio(sound, RATE) != mmtx.Audio(sound) and mmtx.Sound(sound, RATE) != mmtx.Sound(sound, 8000)
    assert mmtx.Image("a.png") != mmtx.Audio("a.png") and mmtx.Medium("image", "a") != mmtx.Medium("audio", "a")
    assert mmtx.Image("a.png") != mmtx.Medium("image", "a.png")
    assert tuple(mmtx.Sound(sound, RATE)) == (sound, RATE)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", None])
def test_a_picture_that_was_closed_is_told_as_that(tiny_model, pixels, form):
    picture, file = PILImage.fromarray(pixels), io.BytesIO()
    if form:
        picture.save(file, form)
        picture = PILImage.open(file)
    tiny_model.caption(picture.copy(), **SHORT)
    if form:
        picture = PILImage.open(file)
    picture.close()
    told = "closed" if form == "WEBP" else "closed before its pixels were read"
    for given in (picture, mmtx.Image(picture)):
        with pytest.raises(mmtx.InputError, match=told):
            tiny_model.caption(given)


def test_an_open_picture_that_is_cut_short_is_told_as_that(tiny_model, files):
    picture = PILImage.open(io.BytesIO((files / "picture.png").read_bytes()[:200]))
    with pytest.raises(mmtx.InputError, match="not a whole picture"):
        tiny_model.caption(picture)


def test_tensors_of_other_types_are_taken_by_their_values(lively_model, pixels, tone):
    picture, sound = torch.from_numpy(pixels).permute(2, 0, 1) / 255, torch.from_numpy(tone)
    asked = lively_model.tokenize
    # Halves of bfloat16 are exact where 8 bits of it hold the value.
    coarse = (picture * 4).round() / 4
    for form in (coarse.bfloat16(), coarse.half(), coarse.double(), coarse.half().numpy().transpose(1, 2, 0),
                 coarse.requires_grad_()):
        assert asked(form) == asked(coarse.float())
    for form in (sound.double(), sound[None], torch.stack([0 * sound, sound]), sound[:, None].numpy()):
        assert asked(mmtx.Audio(form)) == asked(sound)
    assert asked(pixels[:4, :4]) != asked(pixels[:, :4])  # small pictures are pictures
    assert asked(mmtx.Image(torch.zeros(1, 900))) == asked(np.zeros((1, 900, 3), np.uint8))


def test_an_error_of_a_list_names_the_item(tiny_model, pixels, tone, files):
    for call, told in {
        lambda: tiny_model.caption([pixels] * 26 + [pixels + 300.0] + [pixels] * 13): "^item 27 of 40: image: values from 3",
        lambda: tiny_model.caption([pixels, pixels, None]): "^item 3 of 3: found NoneType",
        lambda: tiny_model.caption([pixels, tone, tone * np.nan, None, pixels]): "^item 4 of 5: found None",
        lambda: tiny_model.caption([pixels, tone, tone * np.nan, pixels]): "^item 3 of 4: sound: NaN",
        lambda: tiny_model.caption([files / "sound.wav", "nothing.png"]): "^item 2 of 2: nothing.png: no such file",
        lambda: tiny_model.caption([None]): "^found NoneType",
        lambda: tiny_model.generate(["a", 3]): "^item 2 of 2: found int",
        lambda: tiny_model.tokenize(["a", "b", pixels[0, 0, 0]]): "^item 3 of 3: found uint8",
        lambda: tiny_model.generate_batch(["a", ["b", None]]): "^prompt 2 of 2: item 2 of 2: found None",
        lambda: tiny_model.generate_batch(["a", mmtx.Image("x.png")]): "^prompt 2 of 2: x.png: no such file",
    }.items():
        with pytest.raises(mmtx.InputError, match=told):
            call()


@pytest.mark.parametrize("text", ["x" * 300, "a\nb " * 100, "a\0b", "what does https://example.com say?", "data:,x", "cat.png",
                                  "/etc/passwd", "http://x/y.png"])
def test_a_str_of_a_prompt_is_text_whatever_it_says(tiny_model, text):
    assert tiny_model.detokenize(tiny_model.tokenize(text)) == [text]
    assert isinstance(tiny_model.generate(text, **SHORT), str)


@pytest.mark.parametrize("call, told", [
    (lambda model, _: mmtx.Audio(np.zeros(9), "16000"), "rate: found '16000'"),
    (lambda model, _: mmtx.Audio(np.zeros(9), float("nan")), "rate: found nan"),
    (lambda model, _: model.generate("a", out="image", size=8), "size: found 8"),
    (lambda model, _: model.generate("a", out="image", size=(8, "8")), "size: found"),
    (lambda model, _: model.generate("a", size=(8, 8)), "size: found \\(8, 8\\) with out='text', expected it only with out='image'"),
    (lambda model, _: model.generate("a", out="image", size=(8, 8, 8)), "size: found"),
    (lambda model, _: model.generate("a", out="image", size=(8.0, 8.0)), "size: found"),
    (lambda model, _: model.generate("a", out=None), "out: found NoneType, expected one of text, image, audio, any, document"),
    (lambda model, _: next(model.stream("a", out=["text"])), "out: found list"),
    (lambda model, _: model.generate_batch("ab"), "prompts: found str"),
    (lambda model, _: model.generate_batch(None), "prompts: found NoneType, expected a list of prompts"),
    (lambda model, _: model.generate_batch(5), "prompts: found int"),
    (lambda model, _: model.generate_batch(np.array("a")), "prompts: found ndarray"),
    (lambda model, tone: model.generate_batch(mmtx.Sound(tone, RATE)), "prompts: found Sound"),
    (lambda model, _: model.generate_batch([], out="video"), "out: found 'video', expected one of text, image, audio, any"),
    (lambda model, _: model.tokenize("a", "chat", out="video"), "out: found 'video'"),
    (lambda model, _: model.tokenize("a", out="video"), "out: found 'video'"),
    (lambda model, _: model.tokenize("a", out="image"), "out: found 'image' with format='document', expected it only with format='chat'"),
    (lambda model, _: model.caption([], start_index=-1), "start_index: found -1, expected a whole number, 0 or more"),
    (lambda model, _: model.caption([], start_index=1.0), "start_index: found 1.0"),
    (lambda model, _: model.caption([], start_index="0"), "start_index: found '0'"),
    (lambda model, _: model.encode_parts([5]), "^found int, expected text"),
    (lambda model, _: model.encode_parts(["a", None]), "^item 2 of 2: found NoneType, expected text"),
    (lambda model, tone: model.encode_parts(["a", tone]), "^item 2 of 2: found ndarray, expected text"),
    (lambda model, tone: model.encode_parts([mmtx.Sound(tone, RATE)]), "^found Sound"),
    (lambda model, _: model.encode_parts("a b"), "items: found str, expected a list of items"),
    (lambda model, _: model.encode_parts(5), "items: found int"),
    (lambda model, _: model.read_medium(5), "found int, expected a path"),
    (lambda model, _: model.caption_documents(5), "documents: found int"),
    (lambda model, _: model.caption_documents(["a"]), "^found str, expected a Document"),
    (lambda model, _: model.caption_documents([], {"temperature": 1}), "sampling: found dict, expected a Sampling"),
    (lambda model, _: model.encode_documents([Document(()), None]), "^document 2 of 2: found NoneType, expected a Document"),
    (lambda model, _: model.prompt_length("a"), "^found str, expected a Document"),
    (lambda model, _: model.save(5), "found int, expected the path of a folder"),
    (lambda model, _: model.save(None), "found NoneType, expected the path of a folder"),
    (lambda model, _: model.save(b"x"), "found bytes, expected the path of a folder"),
    (lambda model, _: model.save("\ud800"), "cannot be written"),
    (lambda model, _: model.to(2 ** 70), "device: 1180591620717411303424 cannot be used"),
    (lambda model, _: model.outpaint(np.zeros((16, 16, 3)), "8"), "rows: found '8'"),
    (lambda model, _: model.outpaint(np.zeros((16, 16, 3)), 8.0), "rows: found 8.0"),
    (lambda model, tone: model.continue_audio(tone, "1"), "seconds: found '1'"),
    (lambda model, tone: model.continue_audio(tone, 1e9), "seconds: found 1000000000.0"),
    (lambda model, _: model.detokenize("abc"), "ids: "),
    (lambda model, _: model.detokenize([1.5]), "ids: "),
    (lambda model, _: model.detokenize(None), "ids: "),
    (lambda model, _: model.detokenize([2 ** 70]), "ids: found 11805.* at position 0"),
    (lambda model, _: model.embed_prompt("a"), "prompt: found str, expected a Prompt"),
    (lambda model, _: model.to("meta"), "device: meta"),
    (lambda model, _: model.to(3.5), "device: 3.5"),
    (lambda model, _: mmtx.load(3), "found int, expected the path"),
    (lambda model, _: mmtx.load(b"x"), "found bytes"),
    (lambda model, _: mmtx.load("x" * 300), "xxx.*File name too long"),
    (lambda model, _: mmtx.load("a\0b"), "no such folder"),
])
def test_a_wrong_option_is_named(tiny_model, tone, call, told):
    with pytest.raises(mmtx.InputError, match=told):
        call(tiny_model, tone)


def test_several_things_may_come_one_by_one(tiny_model, pixels):
    each = lambda items: (item for item in items)
    prompts, document = ["a red circle", ["a", pixels]], Document((Turn("user", (TextPart([1]),)),))
    assert tiny_model.generate_batch(each(prompts), **SHORT) == tiny_model.generate_batch(prompts, **SHORT)
    assert tiny_model.generate_batch(each([])) == []
    assert tiny_model.encode_parts(each(["a", mmtx.Image(pixels)])) == tiny_model.encode_parts(["a", mmtx.Image(pixels)])
    assert tiny_model.encode_documents(each([document])) == [document]
    assert tiny_model.caption_documents(each([document])) == tiny_model.caption_documents([document])
    with pytest.raises(mmtx.InputError, match="^prompt 2 of 2: found NoneType"):
        tiny_model.generate_batch(each(["a", None]))


def test_caption_names_a_file_of_no_known_kind(tiny_model, tmp_path):
    (tmp_path / "notes").write_text("a red circle")
    with pytest.raises(mmtx.InputError, match="notes"):
        tiny_model.caption(tmp_path / "notes")


@pytest.mark.parametrize("field, value", [("temperature", -1), ("top_k", 0), ("top_p", 0.0), ("max_new_tokens", 0)])
def test_sampling_names_a_wrong_value(tiny_model, pixels, field, value):
    with pytest.raises(mmtx.InputError, match=field):
        tiny_model.caption(pixels, **{field: value})


def test_a_model_without_audio_says_so(tokenizers, tiny_model, tone):
    text = {"text": tokenizers["text"]}
    model = Model(tiny_model.decoder, Vocabulary.build(text), text)
    with pytest.raises(mmtx.InputError, match="audio"):
        model.caption(tone)
    with pytest.raises(mmtx.InputError, match="image"):
        model.generate("a", out="image")


# -- Generation ----------------------------------------------------------------------------------------------


def test_a_document_is_continued_without_a_question(tiny_model):
    assert tiny_model.processor.prompt("a red", "document").ids.tolist() == tiny_model.tokenize("a red")[:-1]
    assert tiny_model.processor.prompt("a red", "text").ids.tolist() == tiny_model.tokenize("a red", format="chat")
    options = {"out": "document", "max_new_tokens": 12, "temperature": 1.0, "seed": 3}
    assert "".join(piece for piece in tiny_model.stream("a red", **options) if isinstance(piece, str)) == "".join(
        piece for piece in tiny_model.generate("a red", **options) if isinstance(piece, str))


def test_generate_returns_what_out_asks_for(tiny_model, pixels, tone):
    assert isinstance(tiny_model.generate("a red circle", **SAMPLED), str)
    picture = tiny_model.generate("a red circle", out="image", **SAMPLED)
    assert picture.size == (16, 16) and picture.mode == "RGB"
    sound = tiny_model.generate(["a", pixels, tone], out="audio", **SAMPLED)
    assert sound.rate == RATE and sound.samples.ndim == 1 and len(sound.samples) and np.isfinite(sound.samples).all()
    for mixed in ("any", "document"):
        parts = tiny_model.generate("a", out=mixed, **SAMPLED)
        assert isinstance(parts, list)
        assert all(isinstance(part, (str, PILImage.Image, mmtx.Sound)) for part in parts)


@pytest.mark.parametrize("size", [(8, 24), (24, 8), (16, 16)])
def test_generate_makes_a_picture_of_the_size_asked_for(tiny_model, size):
    picture = tiny_model.generate("a", out="image", size=size, **SAMPLED)
    assert picture.size == size[::-1]  # PIL tells the width first


@pytest.mark.parametrize("size, told", [((16, 9), "multiples of 8"), ((0, 8), "expected 1 to 64"),
                                        ((8, 8 * 65), "expected 1 to 64")])
def test_generate_refuses_other_sizes(tiny_model, size, told):
    with pytest.raises(mmtx.InputError, match=told):
        tiny_model.generate("a", out="image", size=size)


def test_generate_refuses_another_out(tiny_model):
    with pytest.raises(mmtx.InputError, match="video"):
        tiny_model.generate("a", out="video")


def test_the_seed_fixes_the_answer(tiny_model):
    answers = {tiny_model.generate("a", temperature=1.0, seed=seed, max_new_tokens=20) for seed in (1, 1, 1, 2)}
    assert len(answers) == 2


PROMPTS = ["a", "a red circle, a blue square", ["a", np.zeros((16, 16, 3), np.uint8)], "trumpet"]


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("out", ["text", "image", "audio", "any"])
def test_prompts_together_are_answered_as_each_alone(lively_model, out, guidance_scale, monkeypatch):
    sampling = {"max_new_tokens": 12, "guidance_scale": guidance_scale, "size": (8, 24) if out == "image" else None}
    alone = [lively_model.generate(parts, out, **sampling) for parts in PROMPTS]
    monkeypatch.setattr("mmtx.batching.BATCH", 3)
    together = lively_model.generate_batch(PROMPTS, out, **sampling)
    assert len({str(plain(answer)) for answer in alone}) > 1
    assert [plain(answer) for answer in together] == [plain(answer) for answer in alone]
    assert lively_model.generate_batch([], out) == []


def plain(answer):
    """An answer in a form that can be compared."""
    if isinstance(answer, list):
        return [plain(item) for item in answer]
    return answer if isinstance(answer, str) else np.asarray(getattr(answer, "samples", answer)).tolist()


@pytest.fixture
def decoded(lively_model, monkeypatch):
    """Codes that a tokenizer of the model turned into media, in order."""
    seen = []
    for kind in ("image", "audio"):
        decode = lively_model.tokenizers[kind].decode
        monkeypatch.setattr(lively_model.tokenizers[kind], "decode",
                            lambda codes, decode=decode: (seen.append(codes), decode(codes))[1])
    return seen


@pytest.mark.parametrize("shape, rows, kept", [((20, 24), None, 1), ((16, 16), 0, 0), ((16, 16), 8, 1),
                                               ((40, 9), 16, 2)])
def test_complete_keeps_the_codes_of_the_upper_rows(lively_model, pixels, decoded, shape, rows, kept):
    picture = np.resize(pixels, (*shape, 3))
    given = lively_model.tokenizers["image"].encode(torch.from_numpy(picture).permute(2, 0, 1))
    completed = [lively_model.outpaint(picture, rows, temperature=1.0, seed=seed) for seed in range(4)]
    assert all(picture.size == (16, 16) for picture in completed)
    assert all(np.array_equal(codes[:kept], given[:kept]) for codes in decoded)
    drawn = {codes[kept:].tobytes() for codes in decoded}
    assert (len(drawn) > 1) == (kept < 2)
    for codes, picture in zip(decoded[:4], completed, strict=True):
        tensor = lively_model.tokenizers["image"].decode(codes)
        assert np.array_equal(np.asarray(picture), tensor.permute(1, 2, 0).numpy())


def test_completion_without_kept_rows_is_generation(lively_model, pixels):
    for parts in (["a red circle"], []):
        sampling = {"temperature": 1.0, "seed": 1, "guidance_scale": 2.0}
        made = lively_model.generate(parts, out="image", **sampling)
        assert np.array_equal(lively_model.outpaint(pixels, 0, parts, **sampling), made)


def test_what_is_said_about_a_picture_and_a_sound_counts(lively_model, pixels, tone):
    sampling = {"temperature": 1.0, "seed": 0, "guidance_scale": 4.0}
    said = [[], "a red circle", "trumpet, C 4"]
    assert len({lively_model.outpaint(pixels, 8, parts, **sampling).tobytes() for parts in said}) > 1
    assert len({lively_model.continue_audio(tone, 0.2, parts, **sampling).samples.tobytes() for parts in said}) > 1


@pytest.mark.parametrize("samples", [900, 4000, 9000])
@pytest.mark.parametrize("seconds", [0.01, 0.3])
def test_a_sound_goes_on_behind_its_reconstruction(lively_model, tone, decoded, samples, seconds):
    tokenizer = lively_model.tokenizers["audio"]
    sound = np.resize(tone, samples)
    given = tokenizer.encode(torch.from_numpy(sound))
    longer = [lively_model.continue_audio(mmtx.Audio(sound, RATE), seconds, temperature=1.0, seed=seed) for seed in range(6)]
    step = tokenizer.config.hop * tokenizer.config.patch_frames
    most = len(given) + -(-int(seconds * RATE) // step)
    for codes, whole in zip(decoded, longer, strict=True):
        assert np.array_equal(codes[:len(given)], given)
        assert len(codes) <= most and len(whole.samples) == len(codes) * step and whole.rate == RATE
        # Whole chunks of the beginning are those of the reconstruction.
        frames = len(given) // tokenizer.config.chunk * tokenizer.config.chunk * tokenizer.config.patch_frames
        assert torch.equal(tokenizer.decode_spectrogram(codes)[:frames], tokenizer.decode_spectrogram(given)[:frames])
    assert max(map(len, decoded)) == most > len(given)
    assert len({codes.tobytes() for codes in decoded}) > 1


@pytest.mark.parametrize("call, told", [
    (lambda model, tone: model.outpaint(np.zeros((16, 16, 3)), 9), "rows: found 9, .* multiple of 8 from 0 to 16"),
    (lambda model, tone: model.outpaint(np.zeros((16, 16, 3)), 24), "rows: found 24"),
    (lambda model, tone: model.outpaint(np.zeros((16, 16, 3)), -8), "rows: found -8"),
    (lambda model, tone: model.outpaint(tone, 8), "found audio, expected image"),
    (lambda model, tone: model.continue_audio(np.zeros((16, 16, 3))), "found image, expected audio"),
    (lambda model, tone: model.continue_audio(tone, 0), "seconds: found 0"),
    (lambda model, tone: model.continue_audio(tone, float("inf")), "seconds: found inf"),
])
def test_a_beginning_that_cannot_be_used_is_named(tiny_model, tone, call, told):
    with pytest.raises(mmtx.InputError, match=told):
        call(tiny_model, tone)


def test_a_sound_is_saved_as_it_is(tiny_model, tmp_path):
    sound = tiny_model.generate("a", out="audio", **SAMPLED)
    sound.save(tmp_path / "sound.wav")
    samples, rate = soundfile.read(tmp_path / "sound.wav")
    assert rate == RATE
    assert np.abs(samples - sound.samples.clip(-1, 1)).max() < 1e-3
    (tmp_path / "link.wav").symlink_to("sound.wav")
    sound._replace(samples=sound.samples[:-9]).save(str(tmp_path / "link.wav"))
    assert (tmp_path / "link.wav").is_symlink() and len(soundfile.read(tmp_path / "sound.wav")[0]) == len(samples) - 9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.wav", "sound.wav"]


@pytest.mark.parametrize("name, told", [
    ("no/a.wav", r"no/a\.wav: cannot be written \(No such file or directory\)"), ("a.wav", r"a\.wav: cannot be written \(Is a directory\)"),
    ("a.nothing", r"a\.nothing: found the extension '.nothing', expected .wav, .flac, .ogg, .*.w64"), ("a", "found the extension ''"),
    ("a.png", "found the extension '.png'"), ("a.sd2", "found the extension '.sd2'"), ("", "found the extension ''"), ("\0.wav", "cannot be written"),
    ("x" * 300 + ".wav", "cannot be written .*name too long"), ("\ud800.wav", "cannot be written"), (None, "found NoneType, expected the name of a file"),
    (5, "found int"), (b"a.wav", "found bytes"), ("b.raw", r"b\.raw: cannot be written"),
])
def test_a_sound_that_cannot_be_saved_there_is_one_line(tone, tmp_path, monkeypatch, name, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.wav").mkdir()
    with pytest.raises(mmtx.InputError, match=told):
        mmtx.Sound(tone, RATE).save(name)
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]


@pytest.mark.parametrize("samples, rate, form, told", [
    (None, 0, "ogg", "rate: found 0, expected a whole number of Hz from 1000 to 192000"), (None, 300_000, "ogg", "rate: found 300000"),
    (None, None, "wav", "rate: found None"), (None, 16000.0, "wav", "rate: found 16000.0"), (None, "16000", "wav", "rate: found '16000'"),
    (None, 12_345, "mp3", r"a\.mp3: cannot be written \(.*sample rate"), (None, 700_000, "flac", "rate: found 700000"),
    (np.float32(0.5), RATE, "wav", r"samples: found float32 of shape \(\), expected numbers \(S,\)"),
    (np.zeros((2, 2, 2)), RATE, "wav", r"samples: found float64 of shape \(2, 2, 2\)"),
    (np.zeros((2, 100)), RATE, "wav", r"samples: found 100 channels in shape \(2, 100\), expected numbers \(S,\)"),
    (np.array(["a"]), RATE, "wav", "samples: found <U1"), ("abc", RATE, "wav", "samples: found <U3"),
    (np.zeros(9, np.float16), RATE, "wav", r"a\.wav: cannot be written \(.*float16"),
    (np.array([0, np.nan]), RATE, "wav", "samples: found NaN or infinite ones, expected finite numbers"),
    (np.array([0, -np.inf], np.float32), RATE, "ogg", "samples: found NaN or infinite ones"),
    (np.full((9, 2), np.nan, np.float32), RATE, "flac", "samples: found NaN or infinite ones"),
])
def test_a_sound_that_is_none_leaves_the_file_that_was_there(tone, tmp_path, samples, rate, form, told):
    """A rate that Vorbis does not have ended the whole program."""
    path = tmp_path / f"a.{form}"
    path.write_bytes(b"before")
    with pytest.raises(mmtx.InputError, match=told):
        mmtx.Sound(tone if samples is None else samples, rate).save(path)
    assert path.read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 1


SAVED_LONG = """
import sys
import numpy as np, soundfile, mmtx
sound = mmtx.Sound(np.random.default_rng(0).normal(0, 0.1, 4_800_000).astype(np.float32), 16_000)
sound.save(sys.argv[1])
print(soundfile.info(sys.argv[1]).frames)
"""


SAVED_WRONG = """
import sys
import numpy as np, mmtx
sound = mmtx.Sound(np.random.default_rng(0).normal(0, 0.1, 5000), 16_000)
sound._replace(samples=sound.samples * 1e20).save(sys.argv[1])
try:
    sound._replace(samples=sound.samples * np.nan).save(sys.argv[1])
except mmtx.InputError as error:
    print(error)
"""


def test_no_sound_ends_the_program(tmp_path):
    """LAME did, if samples were NaN or far too loud."""
    done = subprocess.run([sys.executable, "-c", SAVED_WRONG, tmp_path / "a.mp3"], capture_output=True, text=True, timeout=240,
                          cwd=Path(__file__).parents[1])
    assert (done.stdout, done.returncode) == ("samples: found NaN or infinite ones, expected finite numbers\n", 0), done.stderr
    assert len(soundfile.read(tmp_path / "a.mp3")[0]) == 5000


@pytest.mark.parametrize("form", ["wav", "flac", "ogg", "mp3"])
def test_samples_that_are_too_loud_are_clipped(tone, tmp_path, form):
    """Vorbis and LAME wrote them as they were, or silence."""
    for samples, name in ((tone * 1e3, "a"), ((tone * 1e3).clip(-1, 1), "b")):
        mmtx.Sound(samples, RATE).save(tmp_path / f"{name}.{form}")
    (one, _), (other, _) = (soundfile.read(tmp_path / f"{name}.{form}") for name in "ab")
    assert np.array_equal(one, other) and 0.9 < np.abs(one).max() < 1.5


def test_five_minutes_are_saved_in_every_form(tmp_path):
    """libsndfile ends the program where Vorbis is given so much at once."""
    done = subprocess.run([sys.executable, "-c", SAVED_LONG, tmp_path / "a.ogg"], capture_output=True, text=True, timeout=240,
                          cwd=Path(__file__).parents[1])
    assert (done.stdout, done.returncode) == ("4800000\n", 0), done.stderr


@pytest.mark.parametrize("form", ["wav", "flac", "WAV", "aiff", "ogg", "mp3"])
@pytest.mark.parametrize("shape", [(200_000,), (70_000, 2)])
def test_a_saved_sound_is_that_of_soundfile(tmp_path, form, shape):
    samples = np.random.default_rng(0).normal(0, 0.1, shape).astype(np.float32)
    mmtx.Sound(samples, RATE).save(str(tmp_path / f"a.{form}"))
    soundfile.write(tmp_path / f"b.{form}", samples, RATE)
    (one, rate), (other, _) = (soundfile.read(tmp_path / f"{name}.{form}") for name in "ab")
    assert rate == RATE and one.shape == other.shape
    assert np.abs(one - other).max(initial=0) < (0.05 if form in ("ogg", "mp3") else 1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_stream_adds_up_to_generate_for_text(tiny_model, seed):
    # A random model writes single bytes, which are no characters: these must come through as well.
    sampling = {"temperature": 1.0, "seed": seed, "max_new_tokens": 30}
    pieces = list(tiny_model.stream("a red circle", **sampling))
    assert len(pieces) > 1 and all(pieces)
    assert "".join(pieces) == tiny_model.generate("a red circle", **sampling)


def test_stream_yields_whole_pictures(tiny_model):
    (streamed,) = tiny_model.stream("a", out="image", **SAMPLED)
    assert np.array_equal(np.asarray(streamed), np.asarray(tiny_model.generate("a", out="image", **SAMPLED)))


def test_stream_yields_whole_sounds_where_there_is_no_vocoder(tiny_model):
    assert tiny_model.processor.sound_decoder.vocoder is None
    (streamed,) = tiny_model.stream("a", out="audio", **SAMPLED)
    made = tiny_model.generate("a", out="audio", **SAMPLED)
    assert streamed.rate == made.rate and np.array_equal(streamed.samples, made.samples)


@pytest.fixture(scope="module")
def player():
    """The model that plays, whose vocoder is the shipped one."""
    return mmtx.load(Path(__file__).parents[1] / "demos" / "generate", "cpu")


@pytest.mark.parametrize("said", ["trumpet, C 5", "acoustic grand piano, F 3"])
def test_streamed_sounds_add_up_to_generate(player, said, monkeypatch):
    written = []
    monkeypatch.setattr("mmtx.pipeline.steps", lambda *a, **b: (written.append(1) or step for step in steps(*a, **b)))
    asked, began = {"out": "audio", "temperature": 1.0, "seed": 3, "max_new_tokens": 300}, []
    pieces = [began.append(len(written)) or piece for piece in player.stream(said, **asked)]
    made = player.generate(said, **asked)
    assert len(pieces) > 2 and {piece.rate for piece in pieces} == {made.rate}
    streamed = np.concatenate([piece.samples for piece in pieces])
    assert streamed.shape == made.samples.shape and np.abs(streamed - made.samples).max() < 1e-5
    # The first piece comes with the first chunk of codes: <audio>, and 32 time steps of two.
    assert began[0] == 65 < len(written) - 30
    tokenizer = player.processor.sound_decoder
    heard = tokenizer.config.chunk * tokenizer.config.patch_frames - tokenizer.vocoder.context
    assert len(pieces[0].samples) == heard * tokenizer.config.hop


def test_stream_of_mixed_parts_adds_up_to_generate(tiny_model, monkeypatch):
    v, text = tiny_model.vocabulary, tiny_model.tokenizers["text"]
    picture = [v.image, v.height(1), v.width(2), *v.to_global("image", [3, 4]).tolist(), v.image_end]
    euro = text.encode("\u20ac")  # three bytes, of which two are no character
    written = [*text.encode("a b"), *euro[:2], *picture, *text.encode("c"), *picture, *euro, v.end, v.pad]
    assert len(euro) == 3
    monkeypatch.setattr("mmtx.pipeline.steps", lambda *_, **options: iter(torch.tensor(written)[:, None]))
    monkeypatch.setattr("mmtx.pipeline.generate", lambda *_, **options: [np.array(written[:-1])])
    merged = []
    for part in tiny_model.stream("a", out="any"):
        if isinstance(part, str) and merged and isinstance(merged[-1], str):
            part = merged.pop() + part
        merged.append(part)
    expected = tiny_model.generate("a", out="any")
    assert [type(part) for part in merged] == [str, PILImage.Image, str, PILImage.Image, str]
    for found, part in zip(merged, expected, strict=True):
        assert np.array_equal(np.asarray(found), np.asarray(part))


# -- What comes with the package -----------------------------------------------------------------------------


def test_a_folder_of_the_shipped_name_is_not_taken_for_the_default(saved, tiny_model, tmp_path, monkeypatch, pixels):
    tiny_model.save(tmp_path / "here" / DEFAULT_MODEL)
    monkeypatch.chdir(tmp_path / "here")
    assert mmtx.load(device="cpu").vocabulary != tiny_model.vocabulary
    assert mmtx.load(DEFAULT_MODEL, "cpu").vocabulary == tiny_model.vocabulary  # who names it means his own
    monkeypatch.chdir(tmp_path)
    assert mmtx.load(DEFAULT_MODEL, "cpu").vocabulary != tiny_model.vocabulary
    monkeypatch.chdir(tmp_path / "here")
    (Path("tokenizers/text")).mkdir(parents=True)
    assert find_shipped("tokenizers/text") == Path("tokenizers/text") != shipped("tokenizers/text")
    assert (shipped("tokenizers/text") / "tokenizer.model").exists()
    with pytest.raises(mmtx.InputError, match="nothing: no such folder or file"):
        find_shipped("nothing")


# -- Ids -----------------------------------------------------------------------------------------------------


def test_detokenize_is_the_inverse_of_tokenize(tiny_model, pixels, tone):
    ids = tiny_model.tokenize(["a red <image> circle", pixels, "and", tone])
    v = tiny_model.vocabulary
    assert ids[0] == v.bos and ids[-1] == v.eos and ids.count(v.image) == 1
    before, picture, after, sound = tiny_model.detokenize(ids)
    assert (before, after) == ("a red <image> circle", "and")
    assert picture.size == (16, 16)
    assert tiny_model.tokenize([before, mmtx.Image(pixels), after, tone]) == ids
    codes = [part for part in tiny_model.encode_parts([mmtx.Image(pixels)]) if part.kind == "image"]
    expected = tiny_model.tokenizers["image"].decode(codes[0].codes).permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(picture), expected)
    assert sound.rate == RATE and len(sound.samples) >= len(tone)


def test_detokenize_names_the_place_of_a_mistake(tiny_model):
    v = tiny_model.vocabulary
    with pytest.raises(mmtx.InputError, match="position 1"):
        tiny_model.detokenize([v.bos, v.image_end, v.eos])
    for wrong in (v.size, -7, 2 ** 70):
        with pytest.raises(mmtx.InputError, match=rf"ids: found {wrong} at position 1, expected 0 to {v.size - 1}"):
            tiny_model.detokenize([v.bos, wrong])


# -- Folders -------------------------------------------------------------------------------------------------


def test_a_saved_model_answers_as_before(tiny_model, saved, files, tone):
    loaded = mmtx.load(saved, device="cpu")
    items = [files / "picture.png", tone]
    assert loaded.caption(items, **SAMPLED) == tiny_model.caption(items, **SAMPLED)
    assert loaded.vocabulary == tiny_model.vocabulary
    assert loaded.decoder.config == tiny_model.decoder.config


@pytest.mark.parametrize("part", ["whole", "block"])
def test_a_compiled_model_saves_what_it_had_before(part, tiny_model, tmp_path):
    tiny_model.save(tmp_path / "plain")
    model = copy.deepcopy(tiny_model)
    if part == "whole":
        model.decoder = torch.compile(model.decoder, backend="eager")
        codec = model.tokenizers["image"]
        codec.network = torch.compile(codec.network, backend="eager")
    else:
        model.decoder.blocks[0] = torch.compile(model.decoder.blocks[0], backend="eager")
    model.save(tmp_path / "compiled")
    for path in filter(Path.is_file, (tmp_path / "plain").rglob("*")):
        assert (tmp_path / "compiled" / path.relative_to(tmp_path / "plain")).read_bytes() == path.read_bytes(), path
    assert {kind: tokenizer.fingerprint for kind, tokenizer in model.tokenizers.items()} == {
        kind: tokenizer.fingerprint for kind, tokenizer in tiny_model.tokenizers.items()}


def test_saving_twice_gives_the_same_bytes_and_replaces(tiny_model, saved):
    before = {path.relative_to(saved): path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    tiny_model.save(saved)
    assert {path.relative_to(saved): path.read_bytes() for path in saved.rglob("*") if path.is_file()} == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_crash_while_saving_leaves_the_old_model(tiny_model, saved, monkeypatch, files):
    expected = tiny_model.caption(files / "picture.png", **SHORT)
    monkeypatch.setattr(TextTokenizer, "files", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        tiny_model.save(saved)
    monkeypatch.undo()
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
    assert mmtx.load(saved, device="cpu").caption(files / "picture.png", **SHORT) == expected


@pytest.mark.parametrize("name", ["config.json", "vocabulary.json", "model.safetensors", "text/config.json",
                                  "text/tokenizer.model", "image/config.json", "image/model.safetensors",
                                  "audio/model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "folder"])
def test_a_folder_that_is_not_whole_is_refused_by_name(saved, name, damage):
    path = saved / name
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes(content[:len(content) // 2] if damage == "cut" else b"")
    with pytest.raises(mmtx.InputError) as error:
        mmtx.load(saved, device="cpu")
    told = str(error.value)
    assert str(saved / Path(name).parent) in told and "\n" not in told
    assert name.split("/")[0] in told


def change(path: Path, edit) -> None:
    """Edit a JSON file in place."""
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("edit, told", [
    (lambda c: c.update(format=99), ["config.json", "format"]),
    (lambda c: c.pop("decoder"), ["config.json"]),
    (lambda c: c["decoder"].update(depth=3), ["config.json"]),
    (lambda c: c["decoder"].update(width=64), ["config.json"]),
    (lambda c: c["decoder"].update(colour="red"), ["config.json", "colour"]),
    (lambda c: c["decoder"].update(heads="many"), ["config.json"]),
])
def test_a_config_that_does_not_fit_is_refused(saved, edit, told):
    change(saved / "config.json", edit)
    with pytest.raises(mmtx.InputError) as error:
        mmtx.load(saved, device="cpu")
    assert all(word in str(error.value) for word in told), error.value
    assert "\n" not in str(error.value)


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(mmtx.InputError, match="nothing: no such folder"):
        mmtx.load(tmp_path / "nothing")
    with pytest.raises(mmtx.InputError, match="config.json: no such file"):
        mmtx.load(tmp_path)


def test_a_swapped_tokenizer_is_refused_by_its_fingerprint(saved, tokenizers):
    other = different(tokenizers["image"])
    other.save(saved / "image")
    with pytest.raises(mmtx.InputError) as error:
        mmtx.load(saved, device="cpu")
    assert "image tokenizer" in str(error.value)
    assert other.fingerprint[:12] in str(error.value)
    assert tokenizers["image"].fingerprint[:12] in str(error.value)


def test_a_tokenizer_of_another_kind_is_refused(saved):
    shutil.rmtree(saved / "image")
    shutil.copytree(saved / "audio", saved / "image")
    with pytest.raises(mmtx.InputError, match="image"):
        mmtx.load(saved, device="cpu")


def test_a_vocabulary_of_another_model_is_refused(saved, tokenizers):
    # It fits the tokenizers that it names, but the decoder has more ids.
    Vocabulary.build({kind: tokenizers[kind] for kind in ("text", "image")}).save(saved / "vocabulary.json")
    with pytest.raises(mmtx.InputError, match="ids"):
        mmtx.load(saved, device="cpu")


@pytest.mark.parametrize("device", ["abacus", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(saved, device):
    with pytest.raises(mmtx.InputError, match=f"device: {device}"):
        mmtx.load(saved, device=device)


@pytest.mark.parametrize("same", [True, False])
def test_sound_comes_from_the_shipped_vocoder_if_the_codes_are_the_same(same, tiny_model, saved, tmp_path, monkeypatch):
    own = tiny_model.tokenizers["audio"]
    shipped = copy.deepcopy(own) if same else different(own)
    shipped.vocoder = shipped.new_vocoder(VocoderConfig(width=16, depth=1))
    shipped.save(tmp_path / "shipped")
    monkeypatch.setattr("mmtx.processor.AUDIO_TOKENIZER", tmp_path / "shipped")
    codes = np.arange(12).reshape(6, 2)
    ids = render(Document((Turn(None, (MediaPart("audio", codes),)),)), tiny_model.vocabulary).ids
    [sound] = mmtx.load(saved, device="cpu").detokenize(ids)
    expected = (shipped if same else own).decode(codes).detach().numpy()
    assert np.allclose(sound.samples, expected, atol=1e-5)
    assert not np.allclose(sound.samples, (own if same else shipped).decode(codes).detach().numpy(), atol=1e-5)


def test_weights_that_were_saved_in_half_precision_load_as_float32(tiny_model, tmp_path, pixels):
    half = copy.deepcopy(tiny_model)
    half.decoder.half()
    half.save(tmp_path / "half")
    loaded = mmtx.load(tmp_path / "half", device="cpu")
    for given, found in zip(tiny_model.decoder.parameters(), loaded.decoder.parameters(), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, given, rtol=1e-3, atol=1e-6)
    assert loaded.caption(pixels, **SHORT) is not None
