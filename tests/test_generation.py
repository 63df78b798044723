"""Generation: ids against full passes, rows against themselves alone, sampling, and output that parses."""

import itertools
import subprocess
import sys
import tarfile
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mmtx
from mmtx.config import CodeRange, DecoderConfig
from mmtx.data.media import load_audio
from mmtx.document import Document, TextPart, Turn
from mmtx.errors import InputError
from mmtx.grammar import Grammar
from mmtx.inference.choose import choose_engine
from mmtx.inference.generation import generate, steps
from mmtx.inference.graph_engine import GraphEngine
from mmtx.inference.guidance import without_user_turns
from mmtx.inference.reference import ReferenceEngine
from mmtx.inference.sampling import DRAW_CHUNK, Draws, Sampling, sample
from mmtx.inference.torch_engine import ROOM, TorchEngine
from mmtx.inference.weights import Weights
from mmtx.model import Decoder
from mmtx.pipeline import Model
from mmtx.sequence import Prompt, Span, gather_features, parse, prompt
from mmtx.vocabulary import Vocabulary

OUTS = ("text", "image", "audio", "any", "document")


@pytest.fixture(scope="module")
def vocabulary(small_vocabulary):
    return small_vocabulary


@pytest.fixture(scope="module")
def grammar(vocabulary):
    return Grammar(vocabulary)


@pytest.fixture(scope="module")
def decoder(vocabulary):
    torch.manual_seed(3)
    ranges = tuple(CodeRange(vocabulary.range(kind).start, vocabulary.levels(kind)) for kind in ("image", "audio"))
    decoder = Decoder(DecoderConfig(vocabulary.size, width=24, depth=2, heads=4, kv_heads=2, head_dim=8, mlp_dim=32,
                                    composed=ranges))
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    return decoder.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def prompts(vocabulary):
    """Four questions of different lengths; a long one first and last, so that each neighbour is padded."""
    v, random = vocabulary, np.random.default_rng(0)
    return [np.array([v.bos, v.user, *random.integers(0, 20, length), v.end, v.assistant])
            for length in (9, 1, 4, 17)]


def asked(prompts) -> list[Prompt]:
    return [Prompt(np.array(prompt)) for prompt in prompts]


def full_scores(decoder: Decoder, ids: np.ndarray) -> torch.Tensor:
    """Scores behind every id (T, V), without a cache."""
    ids = torch.tensor(ids)[None]
    return decoder.logits(decoder(ids, torch.arange(ids.shape[1])[None]))[0]


# -- Against full passes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", OUTS)
def test_greedy_ids_are_those_of_full_passes(decoder, grammar, prompts, out):
    prefix = [grammar.vocabulary.image, grammar.vocabulary.height(3), grammar.vocabulary.width(2)]
    prefix = prefix if out == "image" else []
    sampling = Sampling(max_new_tokens=10)
    for prompt, answer in zip(prompts, generate(decoder, grammar, asked(prompts), out, sampling, prefix), strict=True):
        assert answer[:len(prefix)].tolist() == prefix
        state = grammar.start(1, out, prefix=prefix or None)
        for place in range(len(prefix), min(len(answer), len(prefix) + 10)):
            scores = full_scores(decoder, np.concatenate([prompt, answer[:place]]))[-1]
            best = scores.masked_fill(~grammar.allowed(state)[0], -torch.inf).argmax()
            assert answer[place] == best
            state = grammar.advance(state, best[None])


@pytest.mark.parametrize("out", ["text", "audio", "any"])
def test_a_row_in_a_batch_equals_the_row_alone(decoder, grammar, prompts, out):
    sampling = Sampling(max_new_tokens=12)
    together = generate(decoder, grammar, asked(prompts), out, sampling)
    for prompt, answer in zip(prompts, together, strict=True):
        assert np.array_equal(answer, generate(decoder, grammar, asked([prompt]), out, sampling)[0])


def test_features_of_a_padded_batch_equal_each_prompt_alone(vocabulary):
    v, codes = vocabulary, vocabulary.range("image").start
    ranges = tuple(CodeRange(v.range(kind).start, v.levels(kind)) for kind in ("image", "audio"))
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(v.size, width=32, depth=2, heads=4, kv_heads=2, head_dim=16, mlp_dim=64,
                                    composed=ranges, features={"image": 8, "audio": 8}))
    prompts = []
    for size, kind in ((3, "image"), (1, "audio"), (2, "image")):
        ids = [v.bos, v.user, *[codes] * size, v.end, v.assistant]
        prompts.append(Prompt(np.array(ids), (Span(kind, 2, torch.randn(size, 8)),)))
    with torch.no_grad():
        engine, plain = choose_engine(decoder, None, len(prompts)), ReferenceEngine(decoder)
        engine.prefill(prompts)
        plain.prefill(prompts)
        for row, prompt in enumerate(prompts):
            ids = torch.tensor(prompt.ids)[None]
            x = decoder.embedding(ids)
            size = len(prompt.spans[0].values)
            x[0, 2:2 + size] = decoder.projections[prompt.spans[0].kind](prompt.spans[0].values)
            found = decoder.embed(ids, gather_features([(0, prompt.spans)]))
            assert torch.equal(found, x)
            alone = decoder(ids, torch.arange(ids.shape[1])[None], features=gather_features([(0, prompt.spans)]))
            assert torch.allclose(engine.hidden[row], alone[0, -1], atol=1e-5)
            assert torch.allclose(plain.hidden[row], alone[0, -1], atol=1e-5)
            assert not torch.allclose(alone, decoder(ids, torch.arange(ids.shape[1])[None]), atol=1e-3)


# -- Each answer is the one that the prompt gets alone --------------------------------------------------------

SHOWN = 16  # ids of an answer that are compared: a picture may have thousands
CLOSE = 3e-5  # what rounding may decide: chances, or scores, that are no further apart


@pytest.fixture(scope="module")
def restless(vocabulary):
    """A random decoder whose answers are of many lengths: what ends something, and small pictures, are often chosen."""
    torch.manual_seed(5)
    v = vocabulary
    ranges = tuple(CodeRange(v.range(kind).start, v.levels(kind)) for kind in ("image", "audio"))
    decoder = Decoder(DecoderConfig(v.size, width=24, depth=2, heads=4, kv_heads=2, head_dim=8, mlp_dim=32,
                                    composed=ranges))
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    often = [v.end, v.eos, v.image, v.audio, v.image_end, v.audio_end, *map(v.height, (1, 2, 3)), *map(v.width, (1, 2, 3))]
    decoder.embedding.weight.data[often] *= 4
    return decoder.eval().requires_grad_(False)


def reference(decoder, grammar, prompt, out, sampling, prefix, place) -> list[int]:
    """The answer by a full pass for each id, in float64 behind the scores; it ends before the first close call."""
    v, state, answer = grammar.vocabulary, grammar.start(1, out, prefix=prefix or None), []
    random = sampling.seed is not None and np.random.Philox(np.random.SeedSequence(sampling.seed, spawn_key=(place,)))
    emptied = without_user_turns(Prompt(prompt), v).ids
    while len(answer) < SHOWN and not grammar.finished(state):
        written = [*prefix, *answer]
        scores = full_scores(decoder, np.concatenate([prompt, written]).astype(int))[-1].double().numpy()
        if sampling.guidance_scale != 1:
            free = full_scores(decoder, np.concatenate([emptied, written]).astype(int))[-1].double().numpy()
            scores = free + sampling.guidance_scale * (scores - free)
        allowed = grammar.allowed(state)
        if len(answer) >= sampling.max_new_tokens:
            allowed = grammar.closing(allowed)
        left = allowed[0].nonzero()[:, 0].numpy()
        left = left[np.argsort(-scores[left], kind="stable")]                         # the best first
        gaps, kept = -np.diff(scores[left]), len(left)
        if sampling.temperature == 0:
            if len(left) > 1 and gaps[0] < CLOSE * (1 + sampling.guidance_scale):
                break
            chosen = left[0]
        else:
            number = ((int(random.random_raw()) >> 40) + 1) / 2 ** 24
            if sampling.top_k is not None and sampling.top_k < kept:
                kept = sampling.top_k
                if gaps[kept - 1] < CLOSE * (1 + sampling.guidance_scale):
                    break
            heights = np.exp((scores[left[:kept]] - scores[left[0]]) / sampling.temperature)
            if sampling.top_p is not None:
                before = np.cumsum(heights) / heights.sum() - heights / heights.sum()
                if np.abs(before - sampling.top_p).min() < CLOSE:
                    break
                kept = int((before < sampling.top_p).sum())
            left = np.sort(left[:kept])
            heights = np.exp((scores[left] - scores[left].max()) / sampling.temperature)
            edges = np.cumsum(heights) / heights.sum()
            if np.abs(edges[:-1] - number).min(initial=1) < CLOSE:
                break
            chosen = left[np.argmax(edges >= number)]
        answer.append(int(chosen))
        state = grammar.advance(state, torch.tensor([chosen]))
    return answer


def first_ids(decoder, grammar, prompts, out, sampling, prefix, places, choose=choose_engine) -> list[list[int]]:
    """The first SHOWN ids of each answer."""
    written = steps(decoder, grammar, asked(prompts), out, sampling, prefix, None, places, choose)
    columns = list(itertools.islice(written, SHOWN))
    return [row[row != grammar.vocabulary.pad].tolist() for row in torch.stack(columns, 1)]


class Handed(GraphEngine):
    """That of a GPU, with weights that all its answers share, caches that they hand on, and little room in them."""

    weights_of: dict[int, Weights] = {}

    def __init__(self, decoder):
        super().__init__(decoder, self.weights_of.setdefault(id(decoder), Weights.of(decoder)))

    def prefill(self, prompts, room=2):
        super().prefill(prompts, room)


ENGINES = [
    choose_engine,
    lambda decoder, weights, rows: TorchEngine(decoder, Weights.of(decoder)),
    lambda decoder, weights, rows: Handed(decoder),
    lambda decoder, weights, rows: ReferenceEngine(decoder),
]
REQUESTS = st.fixed_dictionaries({
    "lengths": st.lists(st.integers(0, 30), min_size=1, max_size=6),
    "out": st.sampled_from(("text", "audio", *OUTS)),
    "sized": st.booleans(),
    "longest": st.integers(1, 12),
    "temperature": st.sampled_from([0.0, 0.0, 0.7, 1.5]),
    "top_k": st.sampled_from([None, 3]),
    "top_p": st.sampled_from([None, 0.8]),
    "guidance_scale": st.sampled_from([1.0, 1.0, 0.0, 2.5]),
    "seed": st.integers(0, 2 ** 64 - 1),
})


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(request=REQUESTS, random=st.randoms(use_true_random=False))
def test_answers_are_those_of_the_prompt_alone_and_of_full_passes(restless, grammar, request, random):
    v, r = grammar.vocabulary, request
    words = np.random.default_rng(r["seed"])
    prompts = [np.array([v.bos, v.user, *words.integers(0, 20, length), v.end, v.assistant]) for length in r["lengths"]]
    prefix = [v.image, v.height(2), v.width(3)] if r["sized"] and r["out"] not in ("text", "audio") else []
    seed = r["seed"] if r["temperature"] else None
    sampling = Sampling(r["temperature"], r["top_k"], r["top_p"], r["longest"], seed, r["guidance_scale"])
    count = len(prompts)
    expected = [reference(restless, grammar, prompt, r["out"], sampling, prefix, place)
                for place, prompt in enumerate(prompts)]

    def check(places, choose=choose_engine):
        given = [prompts[place] for place in places]
        found = first_ids(restless, grammar, given, r["out"], sampling, prefix, places, choose)
        for place, ids in zip(places, found, strict=True):
            assert ids[:len(expected[place])] == expected[place]

    with mock.patch("mmtx.inference.graph_engine.SMALLEST", 16):
        for choose in ENGINES:
            check(range(count), choose)
    check(random.sample(range(count), random.randint(1, count)))
    for place in range(count):
        check([place])


def test_answers_on_a_gpu_hand_on_what_was_captured(restless, grammar, prompts):
    weights = Weights.of(restless, fixed=True)

    def answer(choose, **options):
        sampling = Sampling(max_new_tokens=12, **options)
        return [ids.tolist() for ids in generate(restless, grammar, asked(prompts), "any", sampling, weights=weights, choose=choose)]

    static = lambda decoder, weights, rows: GraphEngine(decoder, weights)
    ways = [{}, {"temperature": 1.0, "seed": 3}, {"temperature": 1.0, "seed": 4}, {"temperature": 0.5, "seed": 4}, {"guidance_scale": 2.0}]
    for options in ways + ways:
        assert answer(static, **options) == answer(choose_engine, **options)
    # Seeds are no part of a choice; the one with guidance has grown behind its last chosen id.
    count = len(prompts)
    assert {entry.shape[:2]: (len(entry.thing[2]), len(entry.thing[3])) for entry in weights.kept._entries} == {
        (count, 256): (6, 1), (2 * count, 256): (2, 1), (2 * count, 512): (0, 0)}
    assert len(weights.kept._entries) == 3
    # Two at the same time keep apart.
    both = [steps(restless, grammar, asked(prompts), "any", Sampling(max_new_tokens=12), weights=weights, choose=static) for _ in range(2)]
    for first, second in zip(*both, strict=True):
        assert first.equal(second)
    assert len(weights.kept._entries) == 4


def test_few_ids_are_close_calls(restless, grammar, prompts):
    # Otherwise the test above would compare nothing.
    for temperature, seed in ((0.0, None), (1.5, 3)):
        sampling, told, written = Sampling(temperature, max_new_tokens=16, seed=seed), 0, 0
        for out in OUTS:
            for place, prompt in enumerate(prompts):
                told += len(reference(restless, grammar, prompt, out, sampling, [], place))
                written += len(first_ids(restless, grammar, [prompt], out, sampling, [], [place])[0])
        assert written > 100 and told > 0.9 * written


def test_answers_of_the_restless_decoder_are_of_many_lengths(restless, grammar, prompts):
    many = [np.concatenate([prompt[:2], [n], prompt[2:]]) for n in range(5) for prompt in prompts]
    for out in ("text", "audio"):
        assert len({len(ids) for ids in generate(restless, grammar, asked(many), out, Sampling(max_new_tokens=16))}) > 3


@pytest.fixture(scope="module")
def model(tokenizers):
    """A random decoder with tokenizers, whose answers differ much."""
    torch.manual_seed(1)
    vocabulary = Vocabulary.build(tokenizers)
    decoder = Decoder(DecoderConfig(vocabulary.size, width=32, depth=2, heads=4, kv_heads=2, head_dim=16, mlp_dim=64))
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    return Model(decoder, vocabulary, tokenizers).to("cpu")


SAID = ["a", "a red circle", "", "a" * 60, "trumpet, C 4", "a red circle", "b", "violin", "blue", "a", "square", "a", "a"]


@pytest.mark.parametrize(("out", "threads"), [("text", 1), ("image", 1), ("audio", 1), ("text", 2)])
def test_the_size_of_batches_changes_no_answer(model, monkeypatch, request, out, threads):
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(threads)   # so many batches run at a time
    asked_for = {"out": out, "temperature": 1.0, "seed": 2 ** 63 + 1, "max_new_tokens": 12}

    def plain(answer):
        return answer if isinstance(answer, str) else np.asarray(getattr(answer, "samples", answer)).tolist()

    found = []
    for size in (1, 2, 5, 32):
        monkeypatch.setattr("mmtx.batching.BATCH", size)
        found.append([plain(answer) for answer in model.generate_batch(SAID, **asked_for)])
    assert found[1:] == found[:1] * 3
    assert found[0][0] == plain(model.generate(SAID[0], **asked_for))
    same = [found[0][place] for place, said in enumerate(SAID) if said == "a"]
    assert all(a != b for a, b in itertools.combinations(same, 2))


@pytest.mark.slow
# Numbers that lie far (6e-4) from the edge of an id's share: one nearer than rounding falls on either side, as the last bit does.
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.4, "seed": 5}], ids=["greedy", "sampled"])
def test_captions_of_the_shipped_model_are_those_of_each_sound_alone(sampling):
    model = mmtx.load(device="cpu")
    with tarfile.open(Path(__file__).parents[1] / "demos" / "data" / "starter" / "speech-test.tar.gz") as tar:
        sounds = [mmtx.Audio(load_audio(tar.extractfile(member).read(), 16000)) for member in tar
                  if member.name.endswith(".ogg")]
    parts = model.encode_parts(sounds)
    prompts = [prompt(Document((Turn("user", (part,)),)), model.vocabulary) for part in parts]
    assert len(prompts) == 52
    alone = [generate(model.decoder, model.grammar, [asked], "text", Sampling(**sampling), places=[place])[0]
             for place, asked in enumerate(prompts)]
    together = model.caption(sounds, **sampling)
    assert together == [model.tokenizers["text"].decode(ids[:-1].tolist()) for ids in alone]
    if not sampling:
        assert together == [model.caption(sound) for sound in sounds]


# -- Guidance ------------------------------------------------------------------------------------------------


def test_user_turns_are_emptied(vocabulary):
    v = vocabulary
    picture = [v.image, v.height(1), v.width(2), 276, 277, v.image_end]
    ids = [v.bos, 3, v.user, 1, *picture, 2, v.end, v.assistant, 4, *picture, v.end, v.user, *picture, v.end, v.user,
           v.end, v.assistant, 5, v.image]
    emptied = without_user_turns(Prompt(np.array(ids), (Span("image", 7, torch.zeros(2, 8)),)), v)
    assert emptied.ids.tolist() == [v.bos, 3, v.user, v.end, v.assistant, 4, *picture, v.end, v.user, v.end, v.user,
                                    v.end, v.assistant, 5, v.image]
    assert emptied.spans == ()


@pytest.mark.parametrize("out", OUTS)
@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 2.5])
def test_guided_ids_are_those_of_two_full_passes(decoder, grammar, prompts, out, guidance_scale):
    v = grammar.vocabulary
    prefix = [v.image, v.height(3), v.width(2)] if out == "image" else []
    sampling = Sampling(max_new_tokens=10, guidance_scale=guidance_scale)
    unasked = np.array([v.bos, v.user, v.end, v.assistant])
    for prompt, answer in zip(prompts, generate(decoder, grammar, asked(prompts), out, sampling, prefix), strict=True):
        state = grammar.start(1, out, prefix=prefix or None)
        for place in range(len(prefix), min(len(answer), len(prefix) + 10)):
            given, free = (full_scores(decoder, np.concatenate([ids, answer[:place]]))[-1] for ids in (prompt, unasked))
            scores = guidance_scale * given + (1 - guidance_scale) * free
            best = scores.masked_fill(~grammar.allowed(state)[0], -torch.inf).argmax()
            assert answer[place] == best
            state = grammar.advance(state, best[None])


@pytest.mark.parametrize("out", ["text", "image", "audio"])
def test_guidance_changes_answers_and_one_is_off(decoder, grammar, vocabulary, prompts, out):
    v = vocabulary
    prefix = [v.image, v.height(3), v.width(2)] if out == "image" else []

    def run(guidance_scale, given=prompts):
        sampling = Sampling(temperature=1.0, seed=5, max_new_tokens=12, guidance_scale=guidance_scale)
        return [ids.tolist() for ids in generate(decoder, grammar, asked(given), out, sampling, prefix)]

    plain = run(1.0)
    assert run(1.0 + 1e-6) == plain and run(4.0) != plain
    assert run(0.0) == run(1.0, [[v.bos, v.user, v.end, v.assistant]] * len(prompts))
    for prompt, ids in zip(prompts, map(np.array, run(4.0)), strict=True):
        media(ids, prompt, v)


# -- Output always parses ------------------------------------------------------------------------------------


def media(ids, prompt, vocabulary):
    """The parts of an answer, read together with its prompt."""
    closed = [] if ids[-1] == vocabulary.eos else [vocabulary.eos]
    return parse([*prompt, *ids, *closed], vocabulary).turns[-1].parts


@pytest.mark.parametrize(
    ("out", "longest"),
    [*((out, longest) for out in OUTS for longest in (1, 2, 3, 7)), ("text", 40), ("audio", 40), ("any", 40)])
def test_what_is_generated_parses(decoder, grammar, vocabulary, prompts, out, longest):
    v = vocabulary
    if out == "document":
        prompts = [[v.bos, *range(length)] for length in (1, 5)]
    # Large pictures take long: the first one is small, and few ids are likely.
    mixed = out in ("any", "document")
    prefix = [v.image, v.height(2), v.width(3)] if mixed or out == "image" else []
    for seed in range(1 if mixed else 4):
        sampling = Sampling(temperature=1.5, max_new_tokens=longest, seed=seed, top_k=2 if mixed else None)
        for prompt, ids in zip(prompts, generate(decoder, grammar, asked(prompts), out, sampling, prefix), strict=True):
            assert ids[-1] == (v.eos if out == "document" else v.end)
            parts = media(ids, prompt, v)
            if out == "text":
                assert len(parts) <= 1 and all(isinstance(part, TextPart) for part in parts)
                assert len(ids) <= longest + 1
            elif out == "image":
                assert [part.codes.shape for part in parts] == [(2, 3)]
            elif out == "audio":
                (part,) = parts
                assert part.kind == "audio" and len(part.codes) >= 1
                assert len(ids) <= longest + 3 + 2
            else:
                assert next(part for part in parts if part.kind == "image").codes.shape == (2, 3)


@pytest.mark.parametrize(
    ("out", "opened", "side"),
    [("image", 0, 9), ("image", 1, 9), ("image", 2, 9), ("image", 3, 9), ("any", 0, 9), ("any", 2, 9),
     ("document", 3, 9), ("any", 3, 64)],
)
def test_a_picture_opened_at_the_last_moment_is_finished(vocabulary, grammar, out, opened, side):
    v = vocabulary
    # The model wants square pictures, one behind the other, and nothing else.
    decoder = Decoder(DecoderConfig(v.size, width=4, depth=1, heads=1, kv_heads=1, head_dim=4, mlp_dim=4))
    decoder.eval().requires_grad_(False)
    decoder.embedding.weight.zero_()
    decoder.embedding.weight[:, 0] = 1.0
    decoder.embedding.weight[[v.image, v.height(side), v.width(side)], 0] = 2.0
    # A first picture of one patch, of which `opened` ids are given.
    prefix = [v.image, v.height(1), v.width(1), v.range("image")[0]][:opened + 1]
    prompt = [v.bos, v.user, v.end, v.assistant] if out != "document" else [v.bos]
    (ids,) = generate(decoder, grammar, asked([np.array(prompt)]), out, Sampling(max_new_tokens=2), prefix)
    parts = media(ids, prompt, v)
    assert all(part.kind == "image" for part in parts) and parts
    if out != "image" and opened == 3:  # </image>, then a second one at the very end
        assert [part.codes.shape for part in parts] == [(1, 1), (side, side)]


def test_finished_rows_are_cut_off(decoder, grammar, vocabulary, prompts):
    sampling = Sampling(temperature=1.0, seed=2, max_new_tokens=60)
    answers = generate(decoder, grammar, asked(prompts), "text", sampling)
    assert len({len(ids) for ids in answers}) > 1
    for ids in answers:
        assert vocabulary.pad not in ids and (ids == vocabulary.end).sum() == 1


def test_rows_that_finish_early_are_no_longer_computed(decoder, grammar, prompts, monkeypatch):
    widths = []

    def step(engine, ids):
        widths.append(len(ids))
        return whole(engine, ids)
    whole = TorchEngine.step
    monkeypatch.setattr(TorchEngine, "step", step)
    many = [np.concatenate([prompt[:2], [n], prompt[2:]]) for n in range(5) for prompt in prompts]
    for guidance_scale, temperature in ((1.0, 0.0), (0.5, 0.0), (1.0, 1.0)):
        widths.clear()
        sampling = Sampling(temperature, max_new_tokens=60, guidance_scale=guidance_scale, seed=3)
        answers = generate(decoder, grammar, asked(many), "text", sampling)
        rows = 20 if guidance_scale == 1 else 40
        assert widths[0] == rows and widths[-1] <= rows // 2 and len(widths) <= max(map(len, answers)) - 1
        for place, (prompt, answer) in enumerate(zip(many, answers, strict=True)):
            alone = generate(decoder, grammar, asked([prompt]), "text", sampling, places=[place])[0]
            assert np.array_equal(answer, alone)


def test_steps_stop_when_all_rows_are_finished(vocabulary, grammar, prompts):
    decoder = Decoder(DecoderConfig(vocabulary.size, width=4, depth=1, heads=1, kv_heads=1, head_dim=4, mlp_dim=4))
    decoder.embedding.weight.data.zero_()  # all ids score alike: the first allowed one is text, id 0
    columns = list(steps(decoder, grammar, asked(prompts), "text", Sampling(max_new_tokens=5)))
    assert [column.tolist() for column in columns] == [[0] * 4] * 5 + [[vocabulary.end] * 4]


def test_prefix_comes_first_and_is_continued(decoder, grammar, vocabulary, prompts):
    v = vocabulary
    prefix = [v.image, v.height(2), v.width(2), v.range("image")[5], v.range("image")[3]]
    for prompt, ids in zip(prompts, generate(decoder, grammar, asked(prompts), "image", prefix=prefix), strict=True):
        (part,) = media(ids, prompt, v)
        assert part.codes.shape == (2, 2) and part.codes[0].tolist() == [5, 3]
    with pytest.raises(InputError, match="prefix"):
        generate(decoder, grammar, asked(prompts), "image", prefix=[v.image, 3])


# -- Sampling ------------------------------------------------------------------------------------------------


def draw(logits: list[float], count: int = 4000, seed: int = 0, **sampling) -> torch.Tensor:
    """Shares of each id among `count` draws."""
    draws = 1 - torch.rand(count, generator=torch.Generator().manual_seed(seed))
    rows = torch.tensor(logits).expand(count, -1)
    return sample(rows, Sampling(**sampling), draws).bincount(minlength=len(logits)) / count


LOGITS = torch.tensor([0.1, 0.4, 0.3, 0.2]).log().tolist()


def test_temperature_zero_takes_the_best():
    assert draw(LOGITS, count=5).tolist() == [0, 1, 0, 0]


def test_temperature_one_draws_the_distribution():
    assert draw(LOGITS, temperature=1.0).tolist() == pytest.approx([0.1, 0.4, 0.3, 0.2], abs=0.03)


def test_temperature_is_a_divisor():
    squares = np.array([0.01, 0.16, 0.09, 0.04]) / 0.3
    assert draw(LOGITS, temperature=0.5).tolist() == pytest.approx(squares.tolist(), abs=0.03)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300])
def test_a_tiny_temperature_takes_the_best(temperature):
    assert draw([90.0, 91.0, -torch.inf, 89.0], count=50, temperature=temperature).tolist() == [0, 1, 0, 0]


def test_top_k_keeps_the_k_best():
    assert draw(LOGITS, temperature=1.0, top_k=2).tolist() == pytest.approx([0, 0.4 / 0.7, 0.3 / 0.7, 0], abs=0.03)
    assert draw(LOGITS, temperature=2.0, top_k=1).tolist() == [0, 1, 0, 0]
    assert draw(LOGITS, temperature=1.0, top_k=9).min() > 0


@pytest.mark.parametrize(
    ("top_p", "kept"), [(1e-46, [1]), (0.01, [1]), (0.39, [1]), (0.41, [1, 2]), (0.69, [1, 2]), (0.71, [1, 2, 3]), (1.0, [0, 1, 2, 3])]
)
def test_top_p_keeps_the_fewest_that_reach_p(top_p, kept):
    shares = draw(LOGITS, temperature=1.0, top_p=top_p)
    assert shares.nonzero().flatten().tolist() == kept
    total = sum([0.1, 0.4, 0.3, 0.2][i] for i in kept)
    assert shares[1] == pytest.approx(0.4 / total, abs=0.03)


def test_forbidden_ids_are_never_drawn():
    shares = draw([-torch.inf, 0.0, -torch.inf, -30.0], temperature=50.0, top_k=3, top_p=0.999)
    assert shares[0] == shares[2] == 0 and shares[3] > 0


def test_the_seed_fixes_the_choices(decoder, grammar, prompts):
    def run(seed):
        return [ids.tolist() for ids in generate(decoder, grammar, asked(prompts), "text",
                                                 Sampling(temperature=1.0, seed=seed, max_new_tokens=20))]

    torch.manual_seed(0)
    first = run(1)
    assert first == run(1) and first != run(2)
    torch.manual_seed(0)
    assert run(None) != run(None)


def test_one_prompt_many_times_gives_as_many_draws(decoder, grammar, prompts):
    sampling = Sampling(temperature=4.0, seed=1, max_new_tokens=20)
    answers = [tuple(ids) for ids in generate(decoder, grammar, asked([prompts[0]] * 96), "text", sampling) if len(ids) > 6]
    assert len(set(answers)) == len(answers) > 60


def test_random_numbers_depend_on_seed_place_and_step_alone():
    device, count = torch.device("cpu"), 2 * DRAW_CHUNK + 5

    def numbers(seed, places):
        draws = Draws(seed, places, device)
        return torch.stack([draws.next() for _ in range(count)])

    together = numbers(7, range(5))
    assert together.unique().numel() == 5 * count
    for place in range(5):
        assert torch.equal(numbers(7, [place])[:, 0], together[:, place])
    assert torch.equal(numbers(7, [3, 0, 4]), together[:, [3, 0, 4]])
    # Words of 32 bits that are joined would take seed 2^32 + 5 at place 0 for seed 5 at place 1.
    others = [numbers(seed, range(3)) for seed in (0, 1, 5, 2 ** 32 + 5, 2 ** 64 - 1)]
    assert torch.cat(others, 1).unique(dim=1).shape[1] == 15
    assert not torch.equal(numbers(None, [0]), numbers(None, [0]))
    assert together.min() > 0 and together.max() <= 1
    assert abs(float(together.mean()) - 0.5) < 0.05


@pytest.mark.parametrize("kept_at", [0, 1, DRAW_CHUNK - 1, DRAW_CHUNK, DRAW_CHUNK + 1])
def test_random_numbers_of_rows_that_are_kept_go_on(kept_at):
    whole, draws = (Draws(7, range(5), torch.device("cpu")) for _ in range(2))
    expected = torch.stack([whole.next() for _ in range(2 * DRAW_CHUNK + 5)])
    for step, row in enumerate(expected):
        if step == kept_at:
            draws.keep(torch.tensor([1, 4]))
        assert torch.equal(draws.next(), row[[1, 4]] if step >= kept_at else row)


@pytest.mark.parametrize("seed", [None, 3])
def test_draws_leave_the_global_random_state_alone(decoder, grammar, prompts, seed):
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    generate(decoder, grammar, asked(prompts), "text", Sampling(temperature=1.0, seed=seed, max_new_tokens=5))
    assert torch.equal(before[0], torch.get_rng_state()) and np.array_equal(before[1], np.random.get_state()[1])


@pytest.mark.parametrize("number", [2.0 ** -24, 0.5, 1 - 2.0 ** -24, 1.0])
def test_no_random_number_draws_a_forbidden_id(number):
    for scores in ([-torch.inf, 0.0, -torch.inf, -40.0, -torch.inf], [-torch.inf, 3.0], [2.0, -torch.inf], [0.1] * 2000):
        (ident,) = sample(torch.tensor([scores]), Sampling(temperature=1.0), torch.tensor([number]))
        assert scores[ident] > -torch.inf
        if number == 2.0 ** -24:
            assert ident == int(np.isfinite(scores).argmax())


@pytest.mark.parametrize("options", [{"guidance_scale": 1e300}, {"temperature": 1e300}, {"temperature": 1e39, "top_p": 0.5},
                                     {"guidance_scale": 1e300, "temperature": 1e-300}, {"top_k": 10 ** 30}], ids=str)
@pytest.mark.parametrize("out", ["text", "audio"])
def test_extreme_options_write_what_parses(decoder, grammar, vocabulary, prompts, options, out):
    sampling = Sampling(**{"temperature": 1.0, "seed": 1, "max_new_tokens": 9, **options})
    for prompt, ids in zip(prompts, generate(decoder, grammar, asked(prompts), out, sampling), strict=True):
        assert ids[-1] == vocabulary.end and media(ids, prompt, vocabulary)


@pytest.mark.parametrize("scores", [[float("nan")] * 4, [float("inf"), 0, float("nan"), 1], [-3e38, 3e38, 0, 1]], ids=str)
@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.5}], ids=str)
def test_scores_that_are_not_finite_draw_an_allowed_id(scores, options):
    forbidden = torch.tensor([True, False, True, True, False, False])
    logits = torch.zeros(1, 6).masked_fill_(forbidden, -torch.inf)
    logits[0, [1, 4, 5]] = torch.tensor(scores[:3])
    for number in (2 ** -24, 0.3, 0.6, 1.0):
        (ident,) = sample(logits, Sampling(temperature=1.0, **options), torch.tensor([number]))
        assert not forbidden[ident]


WRONG = {
    "temperature": [-0.1, float("nan"), float("inf"), "1", True, None, 10 ** 400, [1.0], 1j],
    "guidance_scale": [-1.0, float("inf"), float("nan"), "2", False, None],
    "top_k": [0, -1, 1.5, 2.0, True, "3", float("nan")],
    "top_p": [0.0, 1.5, -1, float("nan"), True, "0.5"],
    "max_new_tokens": [0, -5, 1.0, "3", True, None, float("inf")],
    "seed": [-1, 2 ** 64, 2 ** 70, 10 ** 5000, 1.0, True, "1", np.bool_(True), "x" * 5000],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in WRONG.items() for value in values],
                         ids=lambda value: str(value)[:12] if not isinstance(value, int) else "int")
def test_sampling_is_checked(field, value):
    for make in (Sampling, Sampling.of):
        with pytest.raises(InputError, match=f"^{field}: found .*, expected a ") as raised:
            make(**{field: value})
        assert len(str(raised.value)) < 150 and "\n" not in str(raised.value)


@pytest.mark.parametrize(("name", "told"), [
    ("temprature", "did you mean temperature?"), ("max_tokens", "did you mean max_new_tokens?"), ("topk", "did you mean top_k?"),
    ("Seed", "did you mean seed?"),
    ("zzz", "expected one of temperature, top_k, top_p, max_new_tokens, seed, guidance_scale")])
def test_an_unknown_option_names_the_nearest(name, told):
    with pytest.raises(InputError) as raised:
        Sampling.of(**{"temperature": 1.0, name: 1})
    assert str(raised.value) == f"{name}: unknown option, {told}"


@pytest.mark.parametrize("call", [
    lambda model: model.caption(np.zeros((16, 16, 3), np.uint8), temprature=1),
    lambda model: model.generate("a", temprature=1),
    lambda model: model.generate_batch(["a"], temprature=1),
    lambda model: list(model.stream("a", temprature=1)),
    lambda model: model.outpaint(np.zeros((16, 16, 3), np.uint8), temprature=1),
    lambda model: model.continue_audio(np.zeros(4000, np.float32), temprature=1),
])
def test_every_call_names_an_unknown_option(model, call):
    with pytest.raises(InputError, match="^temprature: unknown option, did you mean temperature"):
        call(model)


def test_the_length_of_a_sound_that_goes_on_is_said_once(model):
    with pytest.raises(InputError, match="^max_new_tokens: found 3, expected `seconds` instead"):
        model.continue_audio(np.zeros(4000, np.float32), max_new_tokens=3)


def test_numbers_of_numpy_are_options(decoder, grammar, prompts):
    given = Sampling(np.float32(0.5), np.int64(3), np.float64(0.5), np.int32(9), np.uint64(2 ** 64 - 1), 2)
    plain = Sampling(0.5, 3, 0.5, 9, 2 ** 64 - 1, 2.0)
    assert given == plain
    assert [type(value) for value in vars(given).values()] == [float, int, float, int, int, float]


# -- What is left behind -------------------------------------------------------------------------------------


def test_room_follows_what_is_written(decoder, grammar, prompts):
    made = []

    def choose(*arguments):
        made.append(choose_engine(*arguments))
        return made[-1]
    for count in (1, 3):
        sampling = Sampling(max_new_tokens=10 ** 9)
        written = steps(decoder, grammar, asked(prompts[:count]), "text", sampling, choose=choose)
        for _ in range(3):
            next(written)
        assert made[-1].cache.capacity <= max(map(len, prompts)) + ROOM


LEFT = """
import mmtx

streams = [mmtx.load(device="cpu").stream("x", out=out, temperature=1.0, seed=1, max_new_tokens=40) for out in ("text", "any")]
for stream in streams:
    next(stream, None)
"""


def test_a_stream_that_is_left_at_exit_says_nothing():
    done = subprocess.run([sys.executable, "-c", LEFT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_a_caller_of_steps_is_not_in_inference_mode(decoder, grammar, prompts):
    for _ in steps(decoder, grammar, asked(prompts), "text", Sampling(max_new_tokens=3)):
        assert not torch.is_inference_mode_enabled()
