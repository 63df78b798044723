"""Validation starts anew each time, training never does, and the figures are those of all ranks."""

import json
import multiprocessing
import os
import socket

import pytest
import torch
from lightning import Trainer

import runs
from mmtx.data.collection import DataSource
from mmtx.data.packing import PackedBatches
from mmtx.model import DecoderConfig
from mmtx.training.decoder import DecoderData, DecoderModule, LossWeights, TokenizerFolders
from mmtx.vocabulary import MODALITIES

DECODER = DecoderConfig(width=32, depth=1, heads=2, kv_heads=1, head_width=16, hidden=32)
WEIGHTS = LossWeights(special=0.5, text=1.0, image=3.0)
PLAIN = dict(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
             enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    runs.prepare(root)
    return TokenizerFolders(*(str(root / kind) for kind in ("text", "image", "audio")))


class Noting(DecoderModule):
    """Notes samples, losses and modalities of all batches."""

    def __init__(self):
        super().__init__(DECODER, loss_weights=WEIGHTS)
        self.trained, self.drawn, self.validated, self.found = [], [], [], []

    def training_step(self, batch, index):
        self.trained.append(batch.samples.tolist())
        self.drawn.append(float(torch.rand(())))
        return super().training_step(batch, index)

    def validation_step(self, batch, index):
        self.validated.append(batch.samples.tolist())
        self.found += zip(self._losses(batch).loss.tolist(), batch.modality.tolist())
        super().validation_step(batch, index)


def test_a_part_of_the_held_out_samples_is_always_the_same_part(folders):
    sources = [DataSource(**source) for source in runs.FEW]
    data = DecoderData(folders, sources, sources, tokens=64, context=64)
    module = Noting()
    trainer = Trainer(max_steps=6, limit_train_batches=2, limit_val_batches=2, **PLAIN)
    trainer.fit(module, data)
    whole = PackedBatches(data.validation_documents, data.vocabulary, 64, shuffle=False)
    assert len(whole) > 2
    expected = [whole[k].samples.tolist() for k in range(2)]
    assert module.validated == 3 * expected and expected[0] != expected[1]
    # Training goes on where the epoch before it stopped.
    whole = PackedBatches(data.train_documents, data.vocabulary, 64, repeats=data.train_documents.repeats, steps=6)
    assert module.trained == [whole[k].samples.tolist() for k in range(6)]


def test_what_a_step_draws_depends_on_its_number_alone(folders):
    sources, drawn = [DataSource(**runs.FEW[0])], []
    for seed in (0, 1):
        torch.manual_seed(seed)
        module = Noting()
        Trainer(max_steps=4, limit_val_batches=0, **PLAIN).fit(module, DecoderData(folders, sources, sources, context=255))
        drawn.append(module.drawn)
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 4


def one_of_two(rank: int, port: int, data: DecoderData, results) -> None:
    os.environ.update(LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    module = Noting()
    trainer = Trainer(devices=2, strategy="ddp", **PLAIN)
    trainer.validate(module, data, verbose=False)
    results.send((module.found, {name: float(value) for name, value in trainer.callback_metrics.items()}))


def test_losses_of_modalities_are_those_of_all_ranks(folders, tmp_path):
    # Two batches: one has no target in a picture, the other none in a text.
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "red circles and blue squares " * 6}))
    pictures = DataSource(runs.FEW[0]["paths"], limit=1, task="generate")
    sources = [DataSource([str(tmp_path / "text.jsonl")]), pictures]
    tokens = 6 * len("red circles and blue squares ")
    data = DecoderData(folders, sources, sources, tokens=tokens, context=tokens)
    data.setup("validate")
    data.tokens = int(data.validation_documents.lengths.max()) - 1  # the longest fits, with no room for the other
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    here, there = zip(*(context.Pipe() for _ in range(2)))
    for rank in range(2):
        context.Process(target=one_of_two, args=(rank, port, data, there[rank])).start()
        there[rank].close()
    (first, metrics), (second, others) = (end.recv() for end in here)
    kinds = [{MODALITIES[kind] for _, kind in found} for found in (first, second)]
    assert kinds == [{"text", "special"}, {"image", "special"}]
    assert metrics == others
    every = [(loss, MODALITIES[kind]) for loss, kind in (*first, *second)]
    for name in ("text", "special", "image"):
        losses = [loss for loss, kind in every if kind == name]
        assert metrics.pop(f"val/loss_{name}") == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    counts = [getattr(WEIGHTS, kind) for _, kind in every]
    mean = sum(loss * count for (loss, _), count in zip(every, counts, strict=True)) / sum(counts)
    assert metrics.pop("val/loss") == pytest.approx(mean, rel=1e-5)
    assert not metrics
