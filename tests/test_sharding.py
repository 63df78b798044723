"""Sharded training is training: the same gradients, weights and metrics, and checkpoints that a kill cannot damage."""

import copy
import csv
import os
import socket

import pytest
import runs
import torch
import yaml
from fresh import context
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh

from mmtx.cli import main
from mmtx.config import CodeRange, DecoderConfig
from mmtx.model import Decoder
from mmtx.training.checkpoint import damage
from mmtx.training.optimizer import OptimizerConfig, configure
from mmtx.training.sharding import full, gathered, shard

CONFIG = DecoderConfig(77, width=32, depth=2, heads=2, kv_heads=1, head_dim=16, mlp_dim=48, tied=False,
                       composed=(CodeRange(41, (4, 3, 3)),))
STEPS = 4


class Holder(torch.nn.Module):
    """Stands for the training module, of which only the decoder and its device are asked for."""

    device = torch.device("cpu")

    def __init__(self, decoder: Decoder):
        super().__init__()
        self.decoder = decoder


def train(decoder: Decoder, parts: list[int]) -> list[dict[str, torch.Tensor]]:
    """Gradients, their norm, and finally weights, of steps on the mean over some of two batches."""
    optimizer = configure(decoder, OptimizerConfig(learning_rate=0.1, warmup_steps=1), 100)["optimizer"]
    choose, found = torch.Generator().manual_seed(1), []
    for _ in range(STEPS):
        ids, positions = torch.randint(77, (2, 3, 16), generator=choose), torch.arange(16).expand(3, -1)
        for part in parts:
            hidden = decoder(ids[part], positions)
            coded = decoder.logits(hidden[:, ::2], decoder.output_matrix())
            plain = decoder.logits(hidden[:, 1::2], decoder.output_matrix(plain=True))
            (coded.logsumexp(-1).square().mean() + plain.logsumexp(-1).mean()).div(len(parts)).backward()
        named = dict(decoder.named_parameters())
        norm = torch.nn.utils.clip_grad_norm_(named.values(), 0.1)
        found.append({"norm": full(norm), **{name: full(p.grad).clone() for name, p in named.items()}})
        optimizer.step()
        optimizer.zero_grad()
    return [*found, {name: full(parameter.detach()).clone() for name, parameter in decoder.named_parameters()}]


def one_of_two(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(rank)  # the weights must be those of rank 0 on both
    holder = Holder(Decoder(CONFIG).double())
    shard(holder.decoder, init_device_mesh("cpu", (2,)))
    sizes = {name: p.to_local().numel() / p.numel() for name, p in holder.decoder.named_parameters()}
    found = train(holder.decoder, [rank])
    sharded = holder.decoder
    with gathered(holder):
        copied = holder.decoder.state_dict() if rank == 0 else None
        assert (holder.decoder is sharded) == (rank == 1)
    assert holder.decoder is sharded
    torch.save((found, sizes, copied), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_share_a_decoder_out_and_train_it_as_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=one_of_two, args=(rank, port, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    torch.manual_seed(0)
    plain = Decoder(CONFIG).double()  # Adam makes much of rounding errors where a gradient is nearly 0
    before = copy.deepcopy(plain.state_dict())
    expected = train(plain, [0, 1])
    assert not any(torch.equal(before[name], value) for name, value in expected[-1].items())
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    for rank in range(2):
        found, sizes, copied = torch.load(tmp_path / f"{rank}.pt")
        assert max(sizes.values()) < 0.6, "each process holds its share only"
        for left, right in zip(found, expected, strict=True):
            for name, value in right.items():
                assert (left[name] - value).norm() <= 1e-6 * value.norm(), (rank, name)
        if rank == 0:
            assert all(torch.equal(copied[name].double(), value.float().double()) for name, value in found[-1].items())


# -- Runs ----------------------------------------------------------------------------------------------------


def sharded(config: dict, **trainer) -> dict:
    """The configuration without averaged weights, for two sharded gloo processes that accumulate two batches each."""
    trainer = {**runs.two_ranks(config)["trainer"], "strategy": "sharded", **trainer}
    return {**{name: value for name, value in config.items() if name != "ema"}, "trainer": trainer}


@pytest.mark.slow
def test_sharded_runs_are_those_of_ddp_and_go_on_after_a_kill(tmp_path):
    config = runs.prepare(tmp_path, steps=6)
    with_ddp, output = tmp_path / "ddp", tmp_path / "sharded"
    assert runs.fit(sharded(config, strategy="ddp"), with_ddp, ranks=2) == [0, 0], with_ddp.with_suffix(".log").read_text()
    assert runs.fit(sharded(config), output, ranks=2) == [0, 0], output.with_suffix(".log").read_text()
    expected, found = (list(csv.DictReader((run / "metrics" / "metrics.csv").open())) for run in (with_ddp, output))
    assert len(expected) == len(found) and any(row["val/loss_text"] for row in found)
    for left, right in zip(expected, found, strict=True):
        assert left.keys() == right.keys()
        for name, value in left.items():
            assert (value == right[name] == "") or float(right[name]) == pytest.approx(float(value), rel=1e-4), name
    left, right = (load_file(run / "model" / "model.safetensors") for run in (with_ddp, output))
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert (right[name] - value).norm() < 1e-4 * value.norm(), name
    assert (output / "samples" / "step-000003.txt").read_text() == (with_ddp / "samples" / "step-000003.txt").read_text()
    # A checkpoint is one file that is checked like any other.
    kept = sorted((output / "checkpoints").iterdir())
    assert kept and all(path.is_file() and damage(path) is None for path in kept)
    resumed = tmp_path / "killed"
    processes = runs.start(sharded(config), resumed, ranks=2)
    runs.wait_for(lambda: runs.latest(resumed) >= 2, processes)
    assert runs.kill(processes)
    assert runs.fit(sharded(config), resumed, "--ckpt_path", "last", ranks=2) == [0, 0], resumed.with_suffix(".log").read_text()
    assert runs.results(resumed) == runs.results(output)
    # And it is of a sharded run: its optimizer state is another one's.
    status = runs.fit(sharded(config, strategy="ddp"), tmp_path / "other", "--ckpt_path", str(kept[-1]), ranks=2)
    log = (tmp_path / "other.log").read_text()
    assert status == [2, 2] and "sharded: found True, expected None" in log, log


MISTAKES = {
    "averaged weights": ({"ema": 0.9}, ["ema", "sharded"]),
    "muon": ({"model.init_args.optimizer.muon_lr": 1e-3}, ["optimizer.muon_lr", "found 0.001", "sharded"]),
    "stock strategy": ({"trainer.strategy": {"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"}},
                       ["trainer.strategy", "found ModelParallelStrategy", "sharded"]),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    return sharded(runs.prepare(root), devices=1)


@pytest.mark.parametrize("name", MISTAKES)
def test_what_cannot_be_sharded_ends_in_one_line(name, config, tmp_path, capsys):
    changes, told = MISTAKES[name]
    config = copy.deepcopy(config)
    for path, value in changes.items():
        *route, last = path.split(".")
        place = config
        for key in route:
            place = place.setdefault(key, {})
        place[last] = value
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"output": str(tmp_path / "run"), **config}))
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(tmp_path / "config.yaml")])
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and line.startswith("mmtx: error: ") and all(word in line for word in told), line


def test_a_codec_cannot_be_sharded(config, tmp_path, capsys):
    main_config = {"output": str(tmp_path / "run"), "trainer": config["trainer"],
                   "model": {"class_path": "mmtx.training.codec.ImageCodecModule"},
                   "data": {"class_path": "mmtx.training.codec_data.CodecData",
                            "init_args": {"train": runs.FEW, "validation": runs.FEW}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(main_config))
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(tmp_path / "config.yaml")])
    line = capsys.readouterr().err.splitlines()[-1]
    assert "trainer.strategy" in line and "decoders only" in line, line
