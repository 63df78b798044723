"""One large batch = accumulated batches = two ranks, whatever the lengths of the documents."""

import json
import multiprocessing
import os
import random
import socket

import pytest
import torch
from lightning import Trainer

from mmtx.data.collection import DataSource
from mmtx.data.packing import PackedBatches
from mmtx.model import DecoderConfig
from mmtx.training.decoder import DecoderData, DecoderModule, TokenizerFolders
from mmtx.training.guard import SkipNonFinite
from mmtx.training.optimizer import OptimizerConfig

CASES = 20
DECODER = DecoderConfig(width=32, depth=1, heads=2, kv_heads=1, head_width=16, hidden=32)


def gradients(text: str, manifest: str, tokens: int, ranks: int = 1) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Gradients of one optimizer step over all documents, with the targets of each batch of this rank."""
    source = DataSource([manifest])
    data = DecoderData(TokenizerFolders(text), [source], [source], tokens=tokens, context=1024)
    data.setup("fit")
    batches = len(PackedBatches(data.train_documents, data.vocabulary, tokens))
    assert batches % ranks == 0
    counts = []

    class Noting(DecoderModule):
        def training_step(self, batch, index):
            counts.append(len(batch.targets))
            return super().training_step(batch, index)

    module = Noting(DECODER, OptimizerConfig(learning_rate=0.0), z_loss=0.1)
    trainer = Trainer(accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto", max_steps=1,
                      accumulate_grad_batches=batches // ranks, limit_val_batches=0, logger=False,
                      enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                      use_distributed_sampler=False, callbacks=[SkipNonFinite()])
    torch.manual_seed(0)
    trainer.fit(module, data)
    return {name: parameter.grad for name, parameter in module.named_parameters()}, counts


def rank_of_two(rank: int, port: int, text: str, cases: list[tuple[str, int]], results) -> None:
    os.environ.update(LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    found = [gradients(text, manifest, tokens, ranks=2) for manifest, tokens in cases]
    results.send([({name: value.tolist() for name, value in values.items()}, counts) for values, counts in found])


def cases(folder) -> list[tuple[str, int, int]]:
    """Manifests of documents of random and very uneven lengths, with the tokens of a small and of a large batch."""
    choose, found = random.Random(0), []
    while len(found) < CASES:
        lengths = [int(2 ** choose.uniform(0, 7)) for _ in range(choose.randint(2, 7))]
        texts = ["".join(choose.choices("abcdefg ", k=length)).strip() or "a" for length in lengths]
        path = folder / f"{len(found)}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        source = DataSource([str(path)])
        data = DecoderData(TokenizerFolders(str(folder / "text")), [source], [source], context=1024)
        data.setup("fit")
        lengths = data.train_documents.lengths - 1
        small, large = int(lengths.max()), 2 * int(lengths.sum())
        if len(PackedBatches(data.train_documents, data.vocabulary, small)) % 2 == 0:
            found.append((str(path), small, large))
    return found


@pytest.mark.slow
def test_one_batch_many_batches_and_two_ranks_have_the_same_gradients(tokenizers, tmp_path):
    tokenizers["text"].save(tmp_path / "text")
    text, manifests = str(tmp_path / "text"), cases(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    here, there = zip(*(context.Pipe() for _ in range(2)))
    ranks = [context.Process(target=rank_of_two, args=(rank, port, text, [case[:2] for case in manifests], there[rank]))
             for rank in range(2)]
    for process in ranks:
        process.start()
    expected = [gradients(text, manifest, large) for manifest, _, large in manifests]
    accumulated = [gradients(text, manifest, small) for manifest, small, _ in manifests]
    for process, end in zip(ranks, there):
        end.close()
    first, second = here[0].recv(), here[1].recv()
    worst, uneven = 0.0, 0.0
    for large, small, left, right in zip(expected, accumulated, first, second, strict=True):
        (one, (count,)), (several, counts) = large, small
        assert sum(counts) == count and sorted(counts) == sorted(left[1] + right[1])
        uneven = max(uneven, max(counts) / min(counts))
        total = torch.cat([value.flatten() for value in one.values()]).norm()
        for name, value in one.items():
            for other in (several[name], torch.tensor(left[0][name]), torch.tensor(right[0][name])):
                worst = max(worst, float((other - value).norm() / total))
    assert worst < 1e-5, worst
    assert uneven > 4  # or an average of averages would do as well
