"""Generation: ids against full passes, rows against themselves alone, sampling, and output that parses."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mmtx import decoding
from mmtx.decoding import Weights
from mmtx.errors import InputError
from mmtx.generation import Sampling, generate, prefill, sample, steps, without_user_turns
from mmtx.model import CodeRange, Decoder, DecoderConfig
from mmtx.sequence import AudioPart, Grammar, ImagePart, Prompt, Span, TextPart, gather_features, parse

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
    decoder = Decoder(DecoderConfig(vocabulary.size, width=24, depth=2, heads=4, kv_heads=2, head_width=8, hidden=32,
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
    decoder = Decoder(DecoderConfig(v.size, width=32, depth=2, heads=4, kv_heads=2, head_width=16, hidden=64,
                                    composed=ranges, features={"image": 8, "audio": 8}))
    prompts = []
    for size, kind in ((3, "image"), (1, "audio"), (2, "image")):
        ids = [v.bos, v.user, *[codes] * size, v.end, v.assistant]
        prompts.append(Prompt(np.array(ids), (Span(kind, 2, torch.randn(size, 8)),)))
    with torch.no_grad():
        last, _ = prefill(decoder, Weights.of(decoder), prompts, 1)
        for row, prompt in enumerate(prompts):
            ids = torch.tensor(prompt.ids)[None]
            x = decoder.embedding(ids)
            size = len(prompt.spans[0].values)
            x[0, 2:2 + size] = decoder.projections[prompt.spans[0].kind](prompt.spans[0].values)
            found = decoder.embed(ids, gather_features([(0, prompt.spans)]))
            assert torch.equal(found, x)
            alone = decoder(ids, torch.arange(ids.shape[1])[None], features=gather_features([(0, prompt.spans)]))
            assert torch.allclose(last[row], alone[0, -1], atol=1e-5)
            assert not torch.allclose(alone, decoder(ids, torch.arange(ids.shape[1])[None]), atol=1e-3)


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
@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.5])
def test_guided_ids_are_those_of_two_full_passes(decoder, grammar, prompts, out, guidance):
    v = grammar.vocabulary
    prefix = [v.image, v.height(3), v.width(2)] if out == "image" else []
    sampling = Sampling(max_new_tokens=10, guidance=guidance)
    unasked = np.array([v.bos, v.user, v.end, v.assistant])
    for prompt, answer in zip(prompts, generate(decoder, grammar, asked(prompts), out, sampling, prefix), strict=True):
        state = grammar.start(1, out, prefix=prefix or None)
        for place in range(len(prefix), min(len(answer), len(prefix) + 10)):
            given, free = (full_scores(decoder, np.concatenate([ids, answer[:place]]))[-1] for ids in (prompt, unasked))
            scores = guidance * given + (1 - guidance) * free
            best = scores.masked_fill(~grammar.allowed(state)[0], -torch.inf).argmax()
            assert answer[place] == best
            state = grammar.advance(state, best[None])


@pytest.mark.parametrize("out", ["text", "image", "audio"])
def test_guidance_changes_answers_and_one_is_off(decoder, grammar, vocabulary, prompts, out):
    v = vocabulary
    prefix = [v.image, v.height(3), v.width(2)] if out == "image" else []

    def run(guidance, given=prompts):
        sampling = Sampling(temperature=1.0, seed=5, max_new_tokens=12, guidance=guidance)
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
                assert isinstance(part, AudioPart) and len(part.codes) >= 1
                assert len(ids) <= longest + 3 + 2
            else:
                assert next(part for part in parts if isinstance(part, ImagePart)).codes.shape == (2, 3)


@pytest.mark.parametrize(
    ("out", "opened", "side"),
    [("image", 0, 9), ("image", 1, 9), ("image", 2, 9), ("image", 3, 9), ("any", 0, 9), ("any", 2, 9),
     ("document", 3, 9), ("any", 3, 64)],
)
def test_a_picture_opened_at_the_last_moment_is_finished(vocabulary, grammar, out, opened, side):
    v = vocabulary
    # The model wants square pictures, one behind the other, and nothing else.
    decoder = Decoder(DecoderConfig(v.size, width=4, depth=1, heads=1, kv_heads=1, head_width=4, hidden=4))
    decoder.eval().requires_grad_(False)
    decoder.embedding.weight.zero_()
    decoder.embedding.weight[:, 0] = 1.0
    decoder.embedding.weight[[v.image, v.height(side), v.width(side)], 0] = 2.0
    # A first picture of one patch, of which `opened` ids are given.
    prefix = [v.image, v.height(1), v.width(1), v.range("image")[0]][:opened + 1]
    prompt = [v.bos, v.user, v.end, v.assistant] if out != "document" else [v.bos]
    (ids,) = generate(decoder, grammar, asked([np.array(prompt)]), out, Sampling(max_new_tokens=2), prefix)
    parts = media(ids, prompt, v)
    assert all(isinstance(part, ImagePart) for part in parts) and parts
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

    def step(weights, x, cache):
        widths.append(len(x))
        return decoding.step(weights, x, cache)
    monkeypatch.setattr("mmtx.generation.decoding", SimpleNamespace(step=step, prefill=decoding.prefill))
    many = [np.concatenate([prompt[:2], [n], prompt[2:]]) for n in range(5) for prompt in prompts]
    for guidance in (1.0, 0.5):
        widths.clear()
        sampling = Sampling(max_new_tokens=60, guidance=guidance)
        answers = generate(decoder, grammar, asked(many), "text", sampling)
        rows = 20 if guidance == 1 else 40
        assert widths[0] == rows and widths[-1] <= rows // 2 and len(widths) == max(map(len, answers)) - 1
        for prompt, answer in zip(many, answers, strict=True):
            assert np.array_equal(answer, generate(decoder, grammar, asked([prompt]), "text", sampling)[0])


def test_steps_stop_when_all_rows_are_finished(vocabulary, grammar, prompts):
    decoder = Decoder(DecoderConfig(vocabulary.size, width=4, depth=1, heads=1, kv_heads=1, head_width=4, hidden=4))
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
    generator = torch.Generator().manual_seed(seed)
    rows = torch.tensor(logits).expand(count, -1)
    return sample(rows, Sampling(**sampling), generator).bincount(minlength=len(logits)) / count


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
    ("top_p", "kept"), [(0.01, [1]), (0.39, [1]), (0.41, [1, 2]), (0.69, [1, 2]), (0.71, [1, 2, 3]), (1.0, [0, 1, 2, 3])]
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


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")), ("top_k", 0),
     ("top_p", 0.0), ("top_p", 1.5), ("max_new_tokens", 0), ("guidance", -1.0), ("guidance", float("inf")),
     ("guidance", float("nan"))],
)
def test_sampling_is_checked(field, value):
    with pytest.raises(InputError, match=f"{field}: found {value}"):
        Sampling(**{field: value})
