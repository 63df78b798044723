"""What a GPU must do as the CPU does. Each body runs on any device; the other tests are its proof on the CPU."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import mmtx
from mmtx.cli import main
from mmtx.config import DecoderConfig
from mmtx.data.sample import Media
from mmtx.data.sources import scan
from mmtx.data.tokens import load_media
from mmtx.grammar import Grammar
from mmtx.inference.choose import choose_engine, has_triton
from mmtx.inference.generation import generate, steps
from mmtx.inference.graph_engine import GraphEngine
from mmtx.inference.reference import ReferenceEngine
from mmtx.inference.sampling import Sampling
from mmtx.inference.static_step import torch_step
from mmtx.inference.torch_engine import TorchEngine
from mmtx.inference.weights import Weights
from mmtx.model import Decoder
from mmtx.sequence import Prompt
from mmtx.varlen import Packing
from mmtx.vocabulary import Entry, Vocabulary

ROOT = Path(__file__).parents[1]
STARTER = ROOT / "demos" / "data" / "starter"
QUICKSTART = "configs/quickstart/decoder.yaml"
STEPS = 20
DEVICE = "cuda"  # or "cpu", to see that this file is right
STEPS_OF_ENGINES = [torch_step]
if has_triton() and DEVICE == "cuda":
    from mmtx.inference.fused_engine import FusedEngine, fused_step

    STEPS_OF_ENGINES.append(fused_step)
ACCELERATOR = {"cuda": "gpu", "cpu": "cpu"}[DEVICE]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no GPU")]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # the paths of the config are relative to it


def arguments(output: Path, *more: str) -> list[str]:
    return ["fit", *more, "--output", str(output), "--trainer.accelerator", ACCELERATOR, "--trainer.max_steps",
            str(STEPS), "--trainer.val_check_interval", str(STEPS), "--trainer.limit_val_batches", "2",
            "--trainer.log_every_n_steps", "1", "--trainer.enable_progress_bar", "false"]


def check_run(output: Path) -> None:
    """The loss fell, no step was left out, and the model that was written captions."""
    with open(output / "metrics" / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    losses = [float(row["train/loss"]) for row in rows]
    assert len(losses) == STEPS and np.mean(losses[-5:]) < 0.8 * losses[0]
    assert float(rows[-1]["train/skipped"]) == 0
    model = mmtx.load(output / "model", device=DEVICE)
    assert {parameter.dtype for parameter in model.decoder.parameters()} == {torch.float32}
    assert isinstance(model.caption(np.zeros((64, 64, 3), np.uint8), max_new_tokens=4), str)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_quickstart_trains(precision, tmp_path):
    main(arguments(tmp_path, "--config", QUICKSTART, "--trainer.devices", "1", "--trainer.precision", precision))
    check_run(tmp_path)


@pytest.mark.parametrize("devices", [1, 2])
def test_sharded_training(devices, tmp_path):
    if DEVICE == "cuda" and torch.cuda.device_count() < devices:
        pytest.skip(f"needs {devices} GPUs")
    config = yaml.safe_load(Path(QUICKSTART).read_text())
    del config["model"]["init_args"]["optimizer"]["muon_lr"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    more = ("--config", str(tmp_path / "config.yaml"), "--trainer.devices", str(devices), "--trainer.strategy",
            "sharded", "--trainer.precision", "bf16-mixed")
    # In processes of its own: each further rank repeats the command line.
    done = subprocess.run([sys.executable, "-m", "mmtx", *arguments(tmp_path, *more)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    check_run(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_change_of_one_packed_document_changes_no_other(dtype):
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(100, width=128, depth=3, heads=4, kv_heads=2, head_dim=32, mlp_dim=256))
    decoder = decoder.to(DEVICE, dtype)
    lengths = [3, 40, 1, 17, 64, 9, 130]
    documents = torch.repeat_interleave(torch.tensor(lengths))[None]
    positions = torch.cat([torch.arange(length) for length in lengths])[None].to(DEVICE)
    packing = Packing.of(documents.to(DEVICE))
    ids = torch.randint(100, documents.shape)
    with torch.no_grad():
        before = decoder.logits(decoder(ids.to(DEVICE), positions, packing)).cpu()
        for number in range(len(lengths)):
            other = torch.where(documents == number, (ids + 1) % 100, ids)
            difference = (decoder.logits(decoder(other.to(DEVICE), positions, packing)).cpu() - before).abs()
            assert difference[documents != number].eq(0).all()
            assert difference[documents == number].amax(-1).gt(0).all()


def test_captions_are_those_of_the_cpu():
    media = []
    for name, count in (("images-train-004", 12), ("sounds-train-001", 6)):
        for _, sample in zip(range(count), scan(str(STARTER / f"{name}.tar.gz"))):
            media += [part for turn in sample.turns for part in turn.parts if isinstance(part, Media)]
    here, there = mmtx.load(device="cpu"), mmtx.load(device=DEVICE)
    loaded = [load_media(medium, here.tokenizers) for medium in media]
    assert len(loaded) == 18
    assert there.caption(loaded) == here.caption(loaded)


@pytest.mark.parametrize("make_step", STEPS_OF_ENGINES)
@pytest.mark.parametrize("count", [1, 4, 12])
@pytest.mark.parametrize("kept", [None, 30])
def test_the_engine_follows_full_passes_while_its_cache_grows(make_step, count, kept, monkeypatch):
    """With graphs of caches of 16 to 256 slots, which later engines use again; at step `kept` only two rows stay."""
    monkeypatch.setattr("mmtx.inference.graph_engine.SMALLEST", 16)
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(100, width=64, depth=2, heads=4, kv_heads=2, head_dim=32, mlp_dim=96)).to(DEVICE)
    decoder.requires_grad_(False)
    weights = Weights.of(decoder, fixed=True)
    for first in (0, 50):                # the second finds what the first has captured
        prompts = [Prompt(np.arange(length) + first) for length in 3 * (9, 1, 40, 17)][:count]
        engine, plain = GraphEngine(decoder, weights, make_step), ReferenceEngine(decoder)
        with torch.inference_mode():
            engine.prefill(prompts, room=2)
            plain.prefill(prompts)
            allowed = torch.rand(count, 100, device=DEVICE) < 0.5
            for step in range(100):
                if step == kept:
                    rows = torch.arange(count, device=DEVICE)[-2:]
                    engine, plain, allowed = engine.keep(rows), plain.keep(rows), allowed[rows]
                assert (engine.hidden - plain.hidden).abs().max() < 1e-4
                assert torch.equal(engine.best(allowed), plain.best(allowed))
                ids = torch.randint(100, (len(allowed),), device=DEVICE)
                engine.step(ids), plain.step(ids)
        if DEVICE == "cuda":
            assert engine.captured.graph is not None


def test_a_gpu_gets_the_engine_with_graphs():
    decoder = Decoder(DecoderConfig(100, width=64, depth=2, heads=4, kv_heads=2, head_dim=32, mlp_dim=96)).to(DEVICE)
    assert type(choose_engine(decoder, None, 4)).__name__ == ("TorchEngine" if DEVICE == "cpu" else "FusedEngine")
    narrow = Decoder(DecoderConfig(100, width=64, depth=2, heads=4, kv_heads=2, head_dim=8, mlp_dim=96)).to(DEVICE)
    assert (type(choose_engine(narrow, None, 4)) is GraphEngine) == (DEVICE == "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 3, 9])
def test_the_fused_engine_equals_the_one_of_torch_in_long_answers(dtype, count):
    """With parts of the cache in blocks of their own, and with the best of many ids."""
    if DEVICE == "cpu":
        pytest.skip("tests/test_fused_engine.py does it for a CPU")
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(50_000, width=192, depth=2, heads=6, kv_heads=2, head_dim=64, mlp_dim=320)).to(DEVICE, dtype)
    decoder.requires_grad_(False)
    weights, prompts = Weights.of(decoder, fixed=True), [Prompt(np.arange(length)) for length in 3 * (700, 1500, 30)][:count]
    engine, plain = FusedEngine(decoder, weights), TorchEngine(decoder, weights)
    with torch.inference_mode():
        engine.prefill(prompts), plain.prefill(prompts)
        for step in range(700):
            ids = torch.randint(50_000, (count,), device=DEVICE)
            engine.step(ids), plain.step(ids)
            assert (engine.hidden - plain.hidden).abs().max() < (1e-4 if dtype == torch.float32 else 0.2), step
            if step % 10 == 0:
                allowed = torch.rand(count, 49_990, device=DEVICE) < 0.5
                scores = plain.scores(49_990).masked_fill(~allowed, -torch.inf)
                best = engine.best(allowed)[:, None]
                assert allowed.gather(1, best).all()
                assert (scores.gather(1, best)[:, 0] >= scores.amax(1) - (1e-4 if dtype == torch.float32 else 0.05)).all()


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}, {"guidance_scale": 2.0}], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 10])
@pytest.mark.parametrize("capture_all", [False, True])
def test_answers_are_the_same_when_what_was_captured_is_played_again(options, rows, capture_all, monkeypatch):
    monkeypatch.setattr("mmtx.inference.graph_engine.SMALLEST", 16)
    monkeypatch.setattr("mmtx.inference.choose.CAPTURE_ALL", capture_all)
    vocabulary = Vocabulary((Entry("text", 0, 5000, "", None, None),))
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(vocabulary.size, width=64, depth=2, heads=4, kv_heads=2, head_dim=32, mlp_dim=96)).to(DEVICE)
    decoder.requires_grad_(False)
    decoder.embedding.weight[:5000] *= 20
    weights, grammar = Weights.of(decoder, fixed=True), Grammar(vocabulary)
    prompts = [Prompt(np.arange(length) + 7) for length in (5, 300, 1, 17, 5, 5, 9, 9, 2, 40)][:rows]

    def answers(choose=choose_engine) -> list[list[int]]:
        found = generate(decoder, grammar, prompts, "text", Sampling(max_new_tokens=300, **options), weights=weights, choose=choose)
        return [each.tolist() for each in found]

    first = answers()
    assert {len(each) for each in first} == {301}
    assert answers() == first and answers() == first
    plain = answers(lambda decoder, weights, rows: TorchEngine(decoder, weights))
    same = [np.mean(np.equal(a[:100], b[:100])) for a, b in zip(first, plain, strict=True)]
    assert np.mean(same) > 0.8, same              # but where two scores are as good as equal
    both = [steps(decoder, grammar, prompts, "text", Sampling(max_new_tokens=300, **options), weights=weights) for _ in range(2)]
    turns = [torch.stack(each) for each in zip(*both, strict=True)]
    assert all(turn[0].equal(turn[1]) for turn in turns)
    assert torch.stack(turns)[:301, 0, 0].tolist() == first[0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("capture_all", [False, True])
def test_steps_do_not_wait_for_the_gpu(temperature, capture_all, monkeypatch):
    monkeypatch.setattr("mmtx.inference.choose.CAPTURE_ALL", capture_all)
    if DEVICE == "cpu":
        pytest.skip("there is nothing to wait for")
    vocabulary = Vocabulary((Entry("text", 0, 100, "", None, None),))
    decoder = Decoder(DecoderConfig(vocabulary.size, width=64, depth=2, heads=4, kv_heads=2, head_dim=32, mlp_dim=96)).to(DEVICE)
    decoder.requires_grad_(False)
    decoder.embedding.weight[100:] = 0       # no row ends early
    decoder.embedding.weight[:100] *= 50
    written = steps(decoder, Grammar(vocabulary), [Prompt(np.arange(5)), Prompt(np.arange(3))], "text",
                    Sampling(temperature, max_new_tokens=60, top_p=0.9, seed=1), weights=Weights.of(decoder, fixed=True))
    for _ in range(6):                       # prompts are read, the step is captured
        next(written)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(40):
            next(written)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(list(written)) >= 1


@pytest.mark.parametrize("out", ["text", "image"])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_sampled_answers_are_those_of_the_cpu(out, guidance_scale):
    said = ["cat", "a trumpet", "", "dog", "x" * 40, "cat"]
    sampling = {"temperature": 1.0, "top_p": 0.9, "seed": 5, "max_new_tokens": 20, "guidance_scale": guidance_scale, "out": out}
    here, there = mmtx.load(device="cpu"), mmtx.load(device=DEVICE)
    answers = [[answer if out == "text" else np.asarray(answer) for answer in model.generate_batch(said, **sampling)]
               for model in (here, there)]
    if out == "text":
        assert answers[0] == answers[1]
    else:
        # Decoders of pictures round otherwise on a GPU.
        differences = [np.abs(a.astype(int) - b).max() for a, b in zip(*answers, strict=True)]
        assert max(differences) <= 1, differences
    first, *_, last = answers[0]
    assert first != last if out == "text" else (first != last).any()
