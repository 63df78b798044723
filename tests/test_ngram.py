"""The control for text: Kneser-Ney against its formula, worked by hand and written out once more with fractions."""

import itertools
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from ngram import KneserNey

TINY = [[0, 1, 0], [0, 1, 2], [2]]  # of three ids


def test_a_bigram_model_by_hand():
    """Begin 0 1 0 end, begin 0 1 2 end, begin 2 end. Bigrams: begin 0 and 0 1 twice; 1 0, 0 end, 1 2, begin 2 once, 2 end twice."""
    model = KneserNey(TINY, size=3, order=2)
    # Four bigrams are seen once and three twice: D = 4 / (4 + 2 * 3) = 0.4. Unigrams count what stands before: 0 and 2 have two
    # (begin and 1), 1 has one (0), the end two (0 and 2), of 7 in all; one is seen once, three twice: D = 1 / (1 + 2 * 3) = 1/7.
    unigram = {0: (2 - 1 / 7) / 7, 1: (1 - 1 / 7) / 7, "end": (2 - 1 / 7) / 7}
    over = 4 / 7 / 7 / 4  # what four discounts leave, over four ids that are equally likely
    p0, p1, end = (unigram[key] + over for key in (0, 1, "end"))
    assert model.probabilities([0, 1]) == pytest.approx([
        (2 - 0.4) / 3 + 2 * 0.4 / 3 * p0,     # begin: three times, two ids follow
        (2 - 0.4) / 3 + 2 * 0.4 / 3 * p1,     # 0: three times, 1 twice and the end once
        0 + 2 * 0.4 / 2 * end], abs=1e-15)    # 1: twice, never before the end
    assert model.bits_per_byte([[0, 1]], ["é"]) == pytest.approx(-np.log2(model.probabilities([0, 1])).sum() / 2)


def by_formula(documents, size, order, word, history):
    """Interpolated Kneser-Ney once more, slowly and with fractions; `history` holds order - 1 ids, "<" the beginning."""
    def grams(n):
        if n == order:
            return Counter(tuple(padded[i:i + n]) for padded in (["<"] * (order - 1) + list(d) + [size] for d in documents)
                           for i in range(len(padded) - n + 1))
        return Counter(gram[1:] for gram in grams(n + 1))

    p = Fraction(1, size + 1)
    for n in range(1, order + 1):
        counts, context = grams(n), tuple(history[len(history) - n + 1:])
        found = Counter(counts.values())
        discount = Fraction(found[1], found[1] + 2 * found[2]) if found[1] else Fraction(0)
        follow = {gram[-1]: count for gram, count in counts.items() if gram[:-1] == context}
        if total := sum(follow.values()):
            seen = max(follow.get(word, 0) - discount, Fraction(0)) / total
            p = seen + discount * len(follow) / total * p
    return p


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_the_formula_with_fractions(order):
    documents = [*TINY, [1, 1, 2, 0, 1, 0], []]
    model = KneserNey(documents, size=3, order=order)
    for document in ([], [2, 2], [0, 1, 0, 1, 2], [1, 1, 2, 0]):
        ids = ["<"] * (order - 1) + document + [3]
        expected = [float(by_formula(documents, 3, order, ids[i], ids[i - order + 1:i])) for i in range(order - 1, len(ids))]
        assert model.probabilities(document) == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("numbers", [None, 200, 40])
def test_probabilities_sum_to_one_whatever_is_left_out(numbers):
    random = np.random.default_rng(0)
    documents = [(random.integers(0, 12, 40) ** 2 // 12).tolist() for _ in range(20)]
    model = KneserNey(documents, size=12, order=3, numbers=numbers)
    assert numbers is None or model.numbers <= numbers
    for history in itertools.product(range(0, 12, 3), repeat=2):
        total = sum(model.probabilities([*history, word])[2] for word in range(12)) + model.probabilities(history)[2]
        assert total == pytest.approx(1, abs=1e-12)


def test_the_rarest_of_the_longest_n_grams_are_left_out_first():
    whole = KneserNey(TINY, size=3, order=3)
    fewer = KneserNey(TINY, size=3, order=3, numbers=whole.numbers - 1)
    # Of the trigrams those stay that are seen twice: begin begin 0 and begin 0 1.
    assert len(fewer.orders[2].grams) == 2
    assert [len(order.grams) for order in fewer.orders[:2]] == [len(order.grams) for order in whole.orders[:2]]
    assert fewer.numbers == sum(len(order.grams) + len(order.contexts) for order in fewer.orders)


def test_n_grams_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="found 7 for 1024 ids"):
        KneserNey(TINY, size=1024, order=7)


def test_bits_of_a_decoder_are_those_of_its_scores():
    """Two rows in one packed batch against a pass over each alone: all ids that text may have compete, ends are counted."""
    import torch
    from text_bits import decoder_bits

    import mmtx
    from mmtx.data.collection import DataSource, read_source

    root = Path(__file__).parents[1]
    model = mmtx.load(root / "demos" / "starter")
    samples = read_source(DataSource([str(root / "demos/data/starter/text-test-definitions.jsonl")], limit=2))
    texts, nats = [sample.caption for sample in samples], 0.0
    decoder, vocabulary = model.decoder, model.vocabulary
    for text in texts:
        ids = torch.tensor([[vocabulary.bos, *model.tokenizers["text"].encode(text), vocabulary.eos]])
        with torch.inference_mode():
            hidden = decoder(ids[:, :-1], torch.arange(ids.shape[1] - 1)[None])
            scores = hidden @ decoder.embedding.weight[:decoder.embedding.plain].T
        nats += torch.nn.functional.cross_entropy(scores[0], ids[0, 1:], reduction="sum").item()
    expected = nats / np.log(2) / sum(len(text.encode()) for text in texts)
    assert decoder_bits(model, samples, texts) == pytest.approx(expected, rel=1e-5)
