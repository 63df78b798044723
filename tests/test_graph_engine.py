"""The engine of a GPU on a CPU: what it shares between answers, and what it does not. Its graphs are for tests/test_gpu.py."""

import sys
from threading import Thread

import numpy as np
import pytest
import torch
from test_engines import random_decoder

from mmtx.inference import captured
from mmtx.inference.graph_engine import GraphEngine
from mmtx.inference.reference import ReferenceEngine
from mmtx.inference.weights import Weights
from mmtx.sequence import Prompt


@pytest.fixture
def decoder():
    return random_decoder()


@pytest.fixture
def weights(decoder):
    return Weights.of(decoder, fixed=True)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr("mmtx.inference.graph_engine.SMALLEST", 16)


def begin(decoder, weights, lengths=(5, 3), room=2) -> tuple[GraphEngine, ReferenceEngine]:
    engine, plain = GraphEngine(decoder, weights), ReferenceEngine(decoder)
    prompts = [Prompt(torch.randint(44, (length,)).numpy()) for length in lengths]
    engine.prefill(prompts, room), plain.prefill(prompts)
    return engine, plain


def check(engine, plain, steps: int) -> None:
    for _ in range(steps):
        ids = torch.randint(44, (len(engine.hidden),))
        engine.step(ids), plain.step(ids)
        assert (engine.hidden - plain.hidden).abs().max() < 1e-5


def test_a_cache_goes_to_the_next_engine_and_nothing_in_it_does(decoder, weights, monkeypatch):
    monkeypatch.setattr("mmtx.inference.graph_engine.SMALLEST", 64)
    engine, plain = begin(decoder, weights, (5, 3))
    check(engine, plain, 10)
    first = engine.captured
    for each in (*engine.cache.keys, *engine.cache.values):
        each.fill_(torch.nan)
    del engine
    later, plain = begin(decoder, weights, (2, 9))
    assert later.captured is first
    check(later, plain, 6)


def test_engines_at_the_same_time_share_nothing(decoder, weights):
    some = [begin(decoder, weights, lengths) for lengths in ((5, 3), (1, 12), (5, 3))]
    assert len({id(engine.captured) for engine, _ in some}) == 3
    for _ in range(10):
        for engine, plain in some:
            check(engine, plain, 1)


def test_a_cache_of_another_shape_is_not_taken(decoder, weights):
    engine, plain = begin(decoder, weights, (5, 3))
    check(engine, plain, 1)
    first = engine.captured
    del engine
    for lengths in ((5, 3, 1), (5,), (20, 3)):
        engine, plain = begin(decoder, weights, lengths)
        assert engine.captured is not first
        check(engine, plain, 3)


def test_a_cache_that_grows_leaves_the_smaller_one_to_others(decoder, weights):
    engine, plain = begin(decoder, weights, (5, 14))
    first = engine.captured
    check(engine, plain, 4)
    assert engine.cache.capacity == 32 and engine.captured is not first
    other, its_plain = begin(decoder, weights, (5, 3))
    assert other.captured is first
    for _ in range(8):
        check(engine, plain, 1), check(other, its_plain, 1)


def test_what_rows_leave_behind_fits_no_other_batch(decoder, weights):
    engine, plain = begin(decoder, weights, (5, 3, 4))
    check(engine, plain, 2)
    first, rows = engine.captured, torch.tensor([0, 2])
    engine, plain = engine.keep(rows), plain.keep(rows)
    check(engine, plain, 3)
    others = [begin(decoder, weights, lengths) for lengths in ((5, 3, 4), (5, 3))]
    assert all(other.captured not in (first, engine.captured) for other, _ in others)
    for _ in range(20):
        for each in ((engine, plain), *others):
            check(*each, 1)


def test_an_engine_that_begins_again_takes_its_own_cache(decoder, weights):
    engine, plain = begin(decoder, weights)
    check(engine, plain, 3)
    first, prompts = engine.captured, [Prompt(np.arange(length)) for length in (2, 7)]
    engine.prefill(prompts, 2), plain.prefill(prompts)
    assert engine.captured is first
    check(engine, plain, 3)


def test_many_threads_share_what_is_kept(monkeypatch):
    """What one takes no other has, and what is too much goes once."""
    monkeypatch.setattr(captured, "POOL_BYTES", 10)
    kept, failed = captured.CachePool(), []

    def give_and_take():
        try:
            for number in range(20_000):
                kept.give("shape", 20, number)
                kept.take("shape")
        except Exception as error:
            failed.append(error)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [Thread(target=give_and_take) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(before)
    assert not failed


def test_the_oldest_go_where_there_is_too_much(monkeypatch):
    monkeypatch.setattr(captured, "POOL_BYTES", 100)
    kept = captured.CachePool()
    for number in range(5):
        kept.give("shape", 30, number)
    kept.give("large", 101, "never")
    assert [kept.take("shape") for _ in range(4)] == [None] * 4
    for number in range(5):
        kept.give("shape", 30, number)
    assert kept.take("other") is None
    assert [kept.take("shape") for _ in range(4)] == [4, 3, 2, None]

