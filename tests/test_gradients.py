"""One large batch = accumulated batches = two ranks = the loss by hand, whatever lengths and weights are."""

import json
import os
import random
import socket
from dataclasses import asdict
from typing import NamedTuple

import pytest
import runs
import torch
from fresh import context
from lightning import Trainer

from mmtx.config import DecoderConfig
from mmtx.data.collection import DataSource
from mmtx.data.packing import PackedBatches
from mmtx.errors import InputError
from mmtx.training.ctc import CTCConfig
from mmtx.training.decoder import DecoderModule, LossWeights
from mmtx.training.decoder_data import DecoderData, TokenizerFolders
from mmtx.training.guard import SkipNonFinite
from mmtx.training.optimizer import OptimizerConfig
from mmtx.training.sharding import full
from mmtx.vocabulary import NUMBERED

CASES = 20
DECODER = DecoderConfig(width=32, depth=1, heads=2, kv_heads=1, head_dim=16, mlp_dim=32)


class Case(NamedTuple):
    """Documents, the tokens of a small and of a large batch, and what targets count for."""

    sources: list[DataSource]
    small: int
    large: int
    weights: LossWeights
    continuous_inputs: bool = False
    train_encoder: bool = False
    ctc: CTCConfig | None = None


class Noting(DecoderModule):
    """Notes the batches that it trains on."""

    batches = ()

    def training_step(self, batch, index):
        self.batches = (*self.batches, batch)
        return super().training_step(batch, index)


def gradients(folders: TokenizerFolders, case: Case, tokens: int, strategy: str | None = None,
              ) -> tuple[dict[str, torch.Tensor], list[int], Noting]:
    """Gradients of one optimizer step over all documents, with the targets of each batch of this rank.

    With a strategy this process is one of two.
    """
    data, ranks = DecoderData(folders, case.sources, case.sources, tokens_per_batch=tokens, max_seq_len=1024), 2 if strategy else 1
    data.setup("fit")
    batches = len(PackedBatches(data.train_documents, data.vocabulary, tokens))
    assert batches % ranks == 0
    module = Noting(DECODER, OptimizerConfig(learning_rate=0.0), 0.1, case.continuous_inputs, case.weights,
                    train_encoder=case.train_encoder, ctc=case.ctc)
    trainer = Trainer(accelerator="cpu", devices=ranks, strategy=strategy or "auto", max_steps=1,
                      accumulate_grad_batches=batches // ranks, limit_val_batches=0, logger=False,
                      enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                      use_distributed_sampler=False, callbacks=[SkipNonFinite()])
    torch.manual_seed(0)
    trainer.fit(module, data)
    found = {name: full(parameter.grad) for name, parameter in module.named_parameters()}
    return found, [len(batch.targets) for batch in module.batches], module


def by_hand(module: Noting, weights: LossWeights) -> dict[str, torch.Tensor]:
    """Gradients of the weighted mean of the losses of the one batch of a module, all of whose scores compete."""
    (batch,) = module.batches
    scores = module.decoder.logits(module.decoder(batch.ids, batch.positions, batch.packing)).flatten(0, 1)
    scores = scores[batch.supervised]
    losses = torch.nn.functional.cross_entropy(scores, batch.targets, reduction="none")
    counts = torch.tensor([weights.text if kind == NUMBERED.index("text") else weights.special
                           for kind in batch.modality.tolist()])
    loss = ((losses + 0.1 * scores.logsumexp(-1).square()) * counts).sum() / counts.sum()
    named = dict(module.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def rank_of_two(rank: int, port: int, folders: TokenizerFolders, cases: list[Case], results) -> None:
    os.environ.update(LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    for case in cases:
        for strategy in ("ddp", "sharded"):
            values, counts, _ = gradients(folders, case, case.small, strategy)
            results.send(({name: value.tolist() for name, value in values.items()}, counts))


def worst_error(folders: TokenizerFolders, cases: list[Case], true=None) -> float:
    """The largest relative error of the gradients of one batch, many batches, and two ranks with either strategy.

    `true` computes what they should be; without it, one batch is right.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here, there = zip(*(context.Pipe(duplex=False) for _ in range(2)))
    for rank in range(2):
        context.Process(target=rank_of_two, args=(rank, port, folders, cases, there[rank])).start()
        there[rank].close()
    worst = 0.0
    for case in cases:
        one, (count,), module = gradients(folders, case, case.large)
        several, counts, _ = gradients(folders, case, case.small)
        assert sum(counts) == count
        found = [one, several]
        for _ in ("ddp", "sharded"):
            (left, few), (right, more) = (end.recv() for end in here)
            assert sorted(counts) == sorted(few + more)
            found += [left, right]
        expected = true(module, case.weights) if true else one
        total = torch.cat([value.flatten() for value in expected.values()]).norm()
        for values in found:
            for name, value in expected.items():
                worst = max(worst, float((torch.as_tensor(values[name]) - value).norm() / total))
    return worst


def cases(folder) -> list[Case]:
    """Documents of random and very uneven lengths, and random weights, one of which may be 0."""
    choose, found = random.Random(0), []
    while len(found) < CASES:
        lengths = [int(2 ** choose.uniform(0, 7)) for _ in range(choose.randint(2, 7))]
        texts = ["".join(choose.choices("abcdefg ", k=length)).strip() or "a" for length in lengths]
        path = folder / f"{len(found)}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        sources = [DataSource([str(path)])]
        data = DecoderData(TokenizerFolders(str(folder / "text")), sources, sources, max_seq_len=1024)
        data.setup("fit")
        lengths = data.train_documents.lengths - 1
        small, large = int(lengths.max()), 2 * int(lengths.sum())
        uneven = lengths.max() > 4 * lengths.min()  # or an average of averages would do as well
        if uneven and len(PackedBatches(data.train_documents, data.vocabulary, small)) % 2 == 0:
            kinds = [choose.choice([0.0, choose.uniform(0.1, 3)]), choose.uniform(0.1, 3)]
            choose.shuffle(kinds)
            found.append(Case(sources, small, large, LossWeights(special=kinds[0], text=kinds[1])))
    return found


@pytest.mark.slow
def test_one_batch_many_batches_two_ranks_and_the_loss_by_hand_have_the_same_gradients(tokenizers, tmp_path):
    tokenizers["text"].save(tmp_path / "text")
    chosen = cases(tmp_path)
    assert worst_error(TokenizerFolders(str(tmp_path / "text")), chosen, by_hand) < 1e-5
    assert any(0 in asdict(case.weights).values() for case in chosen)


@pytest.mark.slow
@pytest.mark.parametrize("train_encoder, ctc", [(False, None), (True, None), (True, CTCConfig(0, 0.5)), (False, CTCConfig(1))],
                         ids=["features", "encoders", "encoders, ctc before the blocks", "features, ctc behind them"])
def test_ranks_whose_batches_hold_other_media_have_the_same_gradients(tokenizers, tmp_path, train_encoder, ctc):
    for kind, tokenizer in tokenizers.items():
        tokenizer.save(tmp_path / kind)
    folders = TokenizerFolders(*(str(tmp_path / kind) for kind in ("text", "image", "audio")))
    sources = [DataSource(source["paths"], limit=1) for source in runs.FEW]  # a picture and a sound
    data = DecoderData(folders, sources, sources, max_seq_len=1024)
    data.setup("fit")
    lengths = data.train_documents.lengths - 1
    case = Case(sources, int(lengths.max()), int(lengths.sum()), LossWeights(special=2.0), True, train_encoder, ctc)
    assert worst_error(folders, [case]) < 1e-5


@pytest.mark.parametrize("weights, told", [
    ({"text": -0.5}, "loss_weights.text: found -0.5"),
    ({"audio": float("nan")}, "loss_weights.audio: found nan"),
    ({"special": 0.0, "text": 0.0, "image": 0.0, "audio": 0.0}, "loss_weights: found 0 for all"),
])
def test_weights_that_weigh_nothing_are_refused(weights, told):
    with pytest.raises(InputError, match=told):
        LossWeights(**weights)


def test_a_step_whose_targets_all_count_for_nothing_changes_no_weight(tokenizers, tmp_path):
    tokenizers["text"].save(tmp_path / "text")
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": "abc"}) + "\n")
    case = Case([DataSource([str(tmp_path / "one.jsonl")])], 8, 8, LossWeights(special=0.0, text=0.0))
    found, _, module = gradients(TokenizerFolders(str(tmp_path / "text")), case, 8)
    assert not any(value.any() for value in found.values())
    assert module.trainer.callback_metrics["train/loss"] == 0
