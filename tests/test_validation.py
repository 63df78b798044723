"""Validation starts anew each time, training never does, and the figures are those of all ranks."""

import json
import multiprocessing
import os
import socket
from typing import NamedTuple

import numpy as np
import pytest
import runs
import torch
from lightning import Callback, Trainer

from mmtx.config import DecoderConfig
from mmtx.data.collection import DataSource
from mmtx.data.packing import PackedBatches
from mmtx.document import Document, TextPart, Turn
from mmtx.errors import InputError
from mmtx.modality.audio import AudioConfig
from mmtx.modality.image import ImageConfig
from mmtx.modality.vocoder import VocoderConfig
from mmtx.sequence import render
from mmtx.training.codec import AudioCodecModule, ImageCodecModule
from mmtx.training.codec_data import CodecBatches, CodecData
from mmtx.training.decoder import DecoderModule, LossWeights
from mmtx.training.decoder_data import DecoderData, TokenizerFolders
from mmtx.training.vocoder import VocoderData, VocoderModule
from mmtx.vocabulary import NUMBERED

DECODER = DecoderConfig(width=32, depth=1, heads=2, kv_heads=1, head_dim=16, mlp_dim=32)
IMAGE = ImageConfig(patch=8, side=32, network=runs.NETWORK)
AUDIO = AudioConfig(mels=16, patch_mels=8, patch_frames=4, window=512, chunk=16, pitch=True, network=runs.NETWORK)
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
        self.loss_mask, self.drawn, self.validated, self.found = [], [], [], []

    def training_step(self, batch, index):
        self.loss_mask.append(batch.samples.tolist())
        self.drawn.append(float(torch.rand(())))
        return super().training_step(batch, index)

    def validation_step(self, batch, index):
        self.validated.append(batch.samples.tolist())
        self.found += zip(self._losses(batch).loss.tolist(), batch.modality.tolist())
        super().validation_step(batch, index)


def test_a_part_of_the_held_out_samples_is_always_the_same_part(folders):
    sources = [DataSource(**source) for source in runs.FEW]
    data = DecoderData(folders, sources, sources, tokens_per_batch=64, max_seq_len=64)
    module = Noting()
    trainer = Trainer(max_steps=6, limit_train_batches=2, limit_val_batches=2, **PLAIN)
    trainer.fit(module, data)
    whole = PackedBatches(data.validation_documents, data.vocabulary, 64, shuffle=False)
    assert len(whole) > 2
    expected = [whole[k].samples.tolist() for k in range(2)]
    assert module.validated == 3 * expected and expected[0] != expected[1]
    # Training goes on where the epoch before it stopped.
    whole = PackedBatches(data.train_documents, data.vocabulary, 64, repeats=data.train_documents.repeats, steps=6)
    assert module.loss_mask == [whole[k].samples.tolist() for k in range(6)]


def test_what_a_step_draws_depends_on_its_number_alone(folders):
    sources, drawn = [DataSource(**runs.FEW[0])], []
    for seed in (0, 1):
        torch.manual_seed(seed)
        module = Noting()
        Trainer(max_steps=4, limit_val_batches=0, **PLAIN).fit(module, DecoderData(folders, sources, sources, max_seq_len=255))
        drawn.append(module.drawn)
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 4


def test_mistakes_of_a_program_are_named(folders):
    sources = [DataSource(**runs.FEW[0])]
    with pytest.raises(InputError, match=r"Trainer: found max_steps -1, expected the steps of the run"):
        Trainer(max_epochs=1, **PLAIN).fit(Noting(), DecoderData(folders, sources, sources, max_seq_len=255))
    data = DecoderData(folders, sources, sources, max_seq_len=255)
    data.setup("fit")
    with pytest.raises(InputError, match=r"DecoderData: found no trainer, expected Trainer\(max_steps=...\).fit"):
        data.train_dataloader()
    for wrong, place, expected in (("folder", "", "a list of DataSource"), (["folder"], r"\[0\]", "DataSource"),
                                   (sources[0], "", "a list of DataSource")):
        with pytest.raises(InputError, match=f"^DecoderData: train{place}: found .*, expected {expected}$"):
            DecoderData(folders, wrong, sources)
        with pytest.raises(InputError, match=f"^DecoderData: validation{place}: found .*, expected {expected}$"):
            DecoderData(folders, sources, wrong)


# -- Ranks and batches -----------------------------------------------------------------------------------------


class Held(NamedTuple):
    """A validation: what is held out, and in batches of which size (tokens of the decoder, media of a codec)."""

    kind: str
    sources: list[DataSource]
    size: int
    context: int = 255


class Found(NamedTuple):
    metrics: dict[str, float]
    samples: list[int]             # those that this rank saw
    losses: list[tuple[float, int]]  # of the decoder's targets, with their modality


class Seen(Callback):
    def __init__(self):
        self.samples = []

    def on_validation_batch_end(self, trainer, module, outputs, batch, *_):
        self.samples += batch.samples.tolist()


def validate(folders: TokenizerFolders, held: Held, devices: int = 1) -> Found:
    torch.manual_seed(0)
    common = dict(train=held.sources, validation=held.sources)
    module = {
        "decoder": Noting,
        "image": lambda: ImageCodecModule(IMAGE),
        "audio": lambda: AudioCodecModule(AUDIO),
        "vocoder": lambda: VocoderModule(folders.audio, VocoderConfig(width=16)),
    }[held.kind]()
    if held.kind == "decoder":
        data = DecoderData(folders, tokens_per_batch=held.size, max_seq_len=held.context, **common)
    else:
        data = (VocoderData if held.kind == "vocoder" else CodecData)(batch_size=held.size, **common)
    if held.kind == "vocoder":
        data.steps = 8
    seen = Seen()
    trainer = Trainer(devices=devices, strategy="ddp" if devices > 1 else "auto", callbacks=[seen], **PLAIN)
    trainer.validate(module, data, verbose=False)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return Found(metrics, seen.samples, getattr(module, "found", []))


def one_of_two(rank: int, port: int, folders: TokenizerFolders, jobs: list[Held], results) -> None:
    os.environ.update(LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    for held in jobs:
        results.send(validate(folders, held, devices=2))


def validate_on_two(folders: TokenizerFolders, jobs: list[Held], seconds: float = 240) -> list[tuple[Found, Found]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    here, there = zip(*(context.Pipe(duplex=False) for _ in range(2)))
    processes = [context.Process(target=one_of_two, args=(rank, port, folders, jobs, there[rank])) for rank in range(2)]
    for process, end in zip(processes, there, strict=True):
        process.start()
        end.close()
    try:
        found = []
        for _ in jobs:
            assert all(end.poll(seconds) for end in here), "a rank waits for the other"
            found.append(tuple(end.recv() for end in here))
        return found
    finally:
        for process in processes:
            process.join(30)
            process.kill()


PICTURES, SOUNDS = ([DataSource(**source)] for source in runs.FEW)   # 6 and 4
SPEECH = [DataSource([str(runs.STARTER / "speech-test.tar.gz")], limit=4)]  # no cut of silence, beside which all errors are large
HELD_OUT = [
    Held("decoder", [*PICTURES, *SOUNDS], 64), Held("decoder", [*PICTURES, *SOUNDS], 255),
    Held("decoder", PICTURES, 255),                                  # one batch: the second rank gets none
    Held("image", PICTURES, 4), Held("image", PICTURES, 3), Held("image", PICTURES, 6),
    Held("audio", SOUNDS, 3), Held("audio", SOUNDS, 4), Held("vocoder", SPEECH, 3), Held("vocoder", SPEECH, 4),
]
OTHER_SIZES = {"decoder": (64, 100, 255, 2000), "image": (1, 3, 4, 6, 7), "audio": (1, 2, 3, 4), "vocoder": (1, 3, 4)}


def same(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found == {name: pytest.approx(value, rel=1e-6, abs=1e-7) for name, value in expected.items()}


@pytest.mark.parametrize("kind", OTHER_SIZES)
def test_every_figure_is_the_same_for_any_size_of_a_batch(kind, folders):
    sources = {"decoder": [*PICTURES, *SOUNDS], "image": PICTURES, "audio": SOUNDS, "vocoder": SPEECH}[kind]
    every = [validate(folders, Held(kind, sources, size)) for size in OTHER_SIZES[kind]]
    count = sum(source.limit for source in sources)
    assert len(every[0].metrics) >= 3
    for found in every:
        assert sorted(found.samples) == list(range(count))
        same(found.metrics, every[0].metrics)


@pytest.mark.slow
def test_every_figure_is_the_same_on_two_ranks(folders):
    for held, (first, second) in zip(HELD_OUT, validate_on_two(folders, HELD_OUT), strict=True):
        alone = validate(folders, held)
        assert first.metrics == second.metrics
        assert sorted(first.samples + second.samples) == sorted(alone.samples), held
        same(first.metrics, alone.metrics)


class Texts:
    """Twelve documents of ten tokens, three in a batch of 30."""

    lengths = np.full(12, 11)

    def __init__(self, vocabulary):
        document = Document((Turn(None, (TextPart(np.arange(8)),)),))
        self.items = [render(document, vocabulary) for _ in self.lengths]

    def render(self, chosen):
        return [self.items[number] for number, _ in chosen]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("size", [1, 2, 3, 12, 50])
def test_each_sample_is_held_out_once_and_ranks_take_as_many_steps(world, size, small_vocabulary):
    packed = [PackedBatches(Texts(small_vocabulary), small_vocabulary, 10 * size, shuffle=False, rank=rank, world=world)
              for rank in range(world)]
    steps = -(-12 // (size * world))
    media = [torch.full((1,), float(n)) for n in range(12)]
    codec = [CodecBatches(media, lambda chosen, _: torch.stack(chosen), size, 0, steps, rank, world, None)
             for rank in range(world)]
    for ranks in (packed, codec):
        assert {len(batches) for batches in ranks} == {steps}
        every = [batch for batches in ranks for batch in (batches[k] for k in range(len(batches)))]
        assert sorted(n for batch in every for n in batch.samples.tolist()) == list(range(12))
        # Also a batch that does not count goes through the network, in which ranks wait for each other.
        assert all(len(batch.ids if ranks is packed else batch.media) for batch in every)


@pytest.mark.slow
def test_losses_of_modalities_are_those_of_all_ranks(folders, tmp_path):
    # Two batches: one has no target in a picture, the other none in a text.
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "red circles and blue squares " * 6}))
    pictures = DataSource(runs.FEW[0]["paths"], limit=1, task="generate")
    sources = [DataSource([str(tmp_path / "text.jsonl")]), pictures]
    context = 6 * len("red circles and blue squares ")
    data = DecoderData(folders, sources, sources, tokens_per_batch=context, max_seq_len=context)
    data.setup("validate")
    longest = int(data.validation_documents.lengths.max()) - 1  # fits, with no room for the other
    (first, second), = validate_on_two(folders, [Held("decoder", sources, longest, context)])
    (metrics, _, first), (others, _, second) = first, second
    kinds = [{NUMBERED[kind] for _, kind in found} for found in (first, second)]
    assert kinds == [{"text", "special"}, {"image", "special"}]
    assert metrics == others
    every = [(loss, NUMBERED[kind]) for loss, kind in (*first, *second)]
    for name in ("text", "special", "image"):
        losses = [loss for loss, kind in every if kind == name]
        assert metrics.pop(f"val/loss_{name}") == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    counts = [getattr(WEIGHTS, kind) for _, kind in every]
    mean = sum(loss * count for (loss, _), count in zip(every, counts, strict=True)) / sum(counts)
    assert metrics.pop("val/loss") == pytest.approx(mean, rel=1e-5)
    assert not metrics
