"""Steps whose numbers are not finite are left out and counted, and the logs foretell a divergence."""

import csv
import os
import socket

import pytest
import runs
import torch
from fresh import context
from lightning import Trainer

from mmtx.config import DecoderConfig
from mmtx.data.collection import DataSource
from mmtx.data.packing import Batch
from mmtx.errors import InputError
from mmtx.modality.image import ImageConfig, to_float
from mmtx.training.codec import ImageCodecModule
from mmtx.training.codec_data import CodecData
from mmtx.training.ctc import CTCConfig
from mmtx.training.decoder import DecoderModule
from mmtx.training.decoder_data import DecoderData, TokenizerFolders
from mmtx.training.guard import SkipNonFinite, Telemetry
from mmtx.training.loggers import Metrics
from mmtx.vocabulary import NUMBERED

DECODER = DecoderConfig(width=32, depth=1, heads=2, kv_heads=1, head_dim=16, mlp_dim=32)
BAD = float("nan"), float("inf")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    runs.prepare(root)
    sources = [DataSource(**source) for source in runs.FEW]
    return DecoderData(TokenizerFolders(*(str(root / kind) for kind in ("text", "image", "audio"))), sources, sources,
                       tokens_per_batch=256, max_seq_len=255)


class Poisoned(DecoderModule):
    """Has a loss, or a gradient only, that is not finite at some batches, and notes batches and weights."""

    def __init__(self, bad: range, value: float, gradient_only: bool):
        super().__init__(DECODER)
        self.bad, self.value, self.gradient_only, self.weights, self.batches = bad, value, gradient_only, [], []

    def training_step(self, batch: Batch, index: int):
        loss = super().training_step(batch, index)
        self.batches.append(batch)
        if index in self.bad:
            if self.gradient_only:
                loss.register_hook(lambda gradient: gradient * self.value)
            else:
                loss = loss * self.value
        return loss

    def on_train_batch_end(self, *_):
        self.weights.append(self.decoder.embedding.weight.detach().clone())


def train(data: DecoderData, module: DecoderModule, folder, steps: int = 5, accumulate: int = 1, limit: int = 10,
          **trainer):
    """Train for a few steps -> the rows of the metrics."""
    torch.manual_seed(0)
    trainer = Trainer(accelerator="cpu", max_steps=steps, accumulate_grad_batches=accumulate, limit_val_batches=0,
                      logger=Metrics(folder), callbacks=[SkipNonFinite(limit), Telemetry()], enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
                      log_every_n_steps=1, gradient_clip_val=1.0, **trainer)
    trainer.fit(module, data)
    if trainer.global_rank:
        return []  # only rank 0 writes them
    with open(folder / "metrics" / "metrics.csv") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("gradient_only", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_is_not_finite_is_left_out_and_counted(data, tmp_path, value, gradient_only, accumulate, capsys):
    bad = range(2 * accumulate, 2 * accumulate + 1)  # the first batch of the third step
    module = Poisoned(bad, value, gradient_only)
    rows = train(data, module, tmp_path, accumulate=accumulate)
    after = module.weights[accumulate - 1::accumulate]
    moved = [not torch.equal(before, weight) for before, weight in zip(after, after[1:])]
    assert moved == [True, False, True, True]
    assert after[-1].isfinite().all()
    assert [float(row["train/skipped"]) for row in rows] == [0, 0, 1, 1, 1]
    assert "mmtx: 1 of 5 steps were skipped, since their loss or gradient was not finite" in capsys.readouterr().err


def test_gradients_are_clipped_in_mixed_precision(data, tmp_path):
    # The trainer refuses to do so with an optimizer that takes scaled gradients.
    row = train(data, DecoderModule(DECODER), tmp_path, steps=1, precision="bf16-mixed")[-1]
    assert float(row["train/gradient_norm"]) > 0 and float(row["train/skipped"]) == 0


def test_too_many_such_steps_in_a_row_end_the_run_with_the_samples(data, tmp_path):
    module = Poisoned(range(3, 100), BAD[0], False)
    with pytest.raises(InputError, match="step 6: .* 3 steps in a row") as error:
        train(data, module, tmp_path, steps=20, limit=3)
    names = [data.train_documents.samples[number].where for number in module.batches[5].samples.tolist()]
    assert len(module.batches) == 6 and names
    assert all(name in str(error.value) for name in names[:8]), error.value
    assert all("train-00" in name for name in names)
    # A good step in between starts the count again.
    scattered = Poisoned(range(1, 100, 2), BAD[0], False)
    rows = train(data, scattered, tmp_path / "scattered", steps=8, limit=2)
    assert float(rows[-1]["train/skipped"]) == 4


def test_a_codec_names_the_media_of_such_steps(tmp_path):
    class Broken(ImageCodecModule):
        """Has no loss, and notes what it was shown."""

        def training_step(self, batch, index):
            self.batch = batch
            return super().training_step(batch, index) * BAD[0]

    sources = [DataSource(**source) for source in runs.FEW]
    module, data = Broken(ImageConfig(patch=16, side=32, network=runs.NETWORK)), CodecData(sources, sources, batch_size=3)
    with pytest.raises(InputError, match="step 1: .* 1 steps in a row") as error:
        train(data, module, tmp_path, limit=1)
    names = data.sample_names(module.batch)
    assert len(names) == 3 and all(name in str(error.value) for name in names)
    # The names are those of the media that were shown.
    pictures = [to_float(data.train_media[data.names.index(name)]) for name in names]
    assert torch.equal(module.batch.media, torch.stack(pictures))
    assert all(name.startswith(runs.FEW[0]["paths"][0]) and name.endswith(".webp") for name in names), names


@pytest.mark.parametrize("options", [{}, {"continuous_inputs": True, "ctc": CTCConfig(0)}], ids=["alone", "with CTC"])
def test_the_logs_say_what_the_step_did(data, tmp_path, options):
    class Noting(DecoderModule):
        """Notes what the logs are made of, computed anew."""

        def training_step(self, batch, index):
            if index == 0:
                with torch.no_grad():
                    matrix, hidden = self.decoder.output_matrix(), []
                    handle = self.decoder.norm.register_forward_hook(lambda norm, x, y: hidden.extend([x[0], y]))
                    self.decoder(batch.ids, batch.positions, batch.packing, batch.features)
                    handle.remove()
                    scores = hidden[1][0, batch.supervised] @ matrix.T
                    scores[:batch.plain, self.decoder.config.plain_rows:] = -torch.inf
                    loss = torch.nn.functional.cross_entropy(scores, batch.targets, reduction="none")
                    self.expected = {"train/log_sum_exp": scores.logsumexp(-1).mean(),
                                     "train/last_norm": hidden[0].square().sum(-1).sqrt().mean()}
                    for number, name in enumerate(NUMBERED):
                        chosen = batch.modality == number
                        self.expected[f"train/share_{name}"] = chosen.float().mean()
                        if chosen.any():
                            self.expected[f"train/loss_{name}"] = loss[chosen].mean()
            return super().training_step(batch, index)

        def configure_gradient_clipping(self, *arguments, **names):
            gradients = [parameter.grad.flatten() for parameter in self.parameters() if parameter.grad is not None]
            self.norms = [*getattr(self, "norms", []), torch.cat(gradients).norm()]
            super().configure_gradient_clipping(*arguments, **names)

    module = Noting(DECODER, **options)
    rows = train(data, module, tmp_path, steps=3)
    for name, value in module.expected.items():
        assert float(rows[0][name]) == pytest.approx(float(value), rel=1e-4, abs=1e-6), name
    # The norm is the true one, of the mean over all targets and before clipping.
    norms = [float(norm) for norm in module.norms]
    assert [float(row["train/gradient_norm"]) for row in rows] == pytest.approx(norms, rel=1e-4)
    assert sum(float(rows[0][f"train/share_{name}"]) for name in NUMBERED) == pytest.approx(1)


def one_of_two(rank: int, port: int, data: DecoderData, folder, results) -> None:
    os.environ.update(LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)

    class Infinite(Poisoned):
        """Has an infinite loss with a finite gradient, which the mean of the gradients does not show."""

        def training_step(self, batch, index):
            return super().training_step(batch, index) + (float("inf") if self.global_rank == 1 and index == 1 else 0.0)

    module = Infinite(range(0), BAD[0], False)
    rows = train(data, module, folder / str(rank), steps=3, devices=2, strategy="ddp")
    moved = [not torch.equal(before, after) for before, after in zip(module.weights, module.weights[1:])]
    results.send((moved, module.weights[-1].tolist(), len(rows)))


@pytest.mark.slow
def test_all_ranks_leave_out_the_step_that_one_of_them_cannot_take(data, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data.trainer = None  # that of a test before does not travel to another process
    here, there = zip(*(context.Pipe() for _ in range(2)))
    for rank in range(2):
        context.Process(target=one_of_two, args=(rank, port, data, tmp_path, there[rank])).start()
        there[rank].close()
    (first, weights, rows), (second, others, _) = (end.recv() for end in here)
    assert first == second == [False, True]
    assert weights == others and rows == 3  # of the metrics
