"""Plans from known laws: exact counts, constants that a fit must find, and data that repeat."""

import json
import math
from dataclasses import replace

import pytest
import runs as tiny
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmtx.cli import main
from mmtx.config import CodeRange, DecoderConfig, EncoderConfig
from mmtx.errors import InputError
from mmtx.modality.encoder import build_encoder
from mmtx.model import Decoder
from mmtx.scaling import Run, cost, effective_tokens_of, fit, held_out, isoflop_plot, plans, read_runs
from mmtx.vocabulary import Vocabulary

CONFIGS = [
    DecoderConfig(300, width=96, depth=3, heads=6, kv_heads=2, head_dim=16, mlp_dim=256),
    DecoderConfig(300, width=64, depth=2, heads=4, kv_heads=4, head_dim=16, mlp_dim=128, tied=False, qk_norm=False, qkv_bias=True),
    DecoderConfig(300, width=64, depth=2, heads=2, kv_heads=2, head_dim=32, mlp_dim=192, composed=(CodeRange(180, (5, 4, 6)),)),
]
E, A, ALPHA, B, BETA = 1.7, 406.0, 0.34, 410.0, 0.28


def loss(n: float, d: float) -> float:
    return E + A / n ** ALPHA + B / d ** BETA


def made(noise: float = 0.0) -> list[Run]:
    random = torch.Generator().manual_seed(0)
    return [Run(f"{n}-{d}", n, d, {"loss": loss(n, d) * math.exp(noise * torch.randn((), generator=random).item())})
            for n in (10**5, 10**6, 10**7, 10**8) for d in (10**7, 10**8, 10**9)]


@pytest.fixture(scope="module")
def law():
    return fit(made(), resamples=0)


@pytest.mark.parametrize("config", CONFIGS)
def test_parameters_and_operations_are_those_of_a_profiler(config):
    torch.manual_seed(0)
    decoder, batch, length = Decoder(config), 4, 64
    ids, positions = torch.randint(0, 300, (batch, length)), torch.arange(length).expand(batch, length)
    told = cost(config, batch * length, length)
    assert told.parameters == sum(p.numel() for p in decoder.parameters())
    assert told.blocks == sum(p.numel() for p in decoder.blocks.parameters())
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        scores = decoder.logits(decoder(ids, positions))
    assert counter.get_total_flops() == pytest.approx(told.forward, rel=0.01)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as back:
        decoder.logits(decoder(ids, positions)).square().mean().backward()
    assert back.get_total_flops() == pytest.approx(told.training, rel=0.01)
    assert scores.shape == (batch, length, 300)


def test_a_fit_finds_the_constants(law):
    assert (law.e, law.alpha, law.beta) == pytest.approx((E, ALPHA, BETA), rel=0.01)
    assert (law.a, law.b) == pytest.approx((A, B), rel=0.1)
    assert law.loss(10**9, 2 * 10**10) == pytest.approx(loss(10**9, 2 * 10**10), rel=1e-3)


def test_intervals_hold_the_constants_of_noisy_runs():
    law = fit(made(0.003), resamples=20)
    assert all(low <= high for low, high in law.intervals.values())
    for name, true in (("alpha", ALPHA), ("beta", BETA), ("e", E)):
        low, high = law.intervals[name]
        assert low * 0.97 <= true <= high * 1.03 and high > low


def test_one_run_that_went_wrong_does_not_bend_the_law():
    runs = made()
    runs[4] = runs[4]._replace(losses={"loss": 3 * runs[4].losses["loss"]})
    law = fit(runs, resamples=0)
    assert (law.alpha, law.beta) == pytest.approx((ALPHA, BETA), rel=0.05)


def test_the_largest_run_is_foretold_by_the_others():
    run, law = held_out(made())
    assert (run.parameters, run.tokens) == (10**8, 10**9)
    assert law.loss(run.parameters, run.tokens) == pytest.approx(run.losses["loss"], rel=0.005)


def test_the_largest_run_is_not_asked_what_it_is():
    runs = made()
    for wrong in (99.0, 1.02 * runs[-1].losses["loss"]):
        runs[-1] = runs[-1]._replace(losses={"loss": wrong})
        run, law = held_out(runs)
        assert run is runs[-1] and law.loss(10**8, 10**9) == pytest.approx(loss(10**8, 10**9), rel=0.005)
        assert law == fit(runs[:-1], resamples=0) != fit(runs, resamples=0)


def test_six_runs_are_enough_for_a_law_and_too_few_to_hold_one_out(tmp_path, models, capsys):
    for name in ("32-100", "64-1000", "128-10000"):
        (tmp_path / name / "model" / "config.json").unlink()
    main(["plan", "--runs", str(tmp_path), "--flops", "1e15", "--model", str(tmp_path / "32-1000" / "model")])
    told = capsys.readouterr()
    assert "your runs" in told.out and "held out" not in told.out
    assert told.err.count("\n") == 1 and "nothing held out: runs with val/loss: found 5 of" in told.err


def test_what_noisy_runs_foretell_has_an_interval_that_holds_it():
    run, law = held_out(made(0.003), resamples=20)
    low, high = law.interval(run.parameters, run.tokens)
    assert len(law.resampled) == 20 and low < high
    assert low * 0.99 <= loss(run.parameters, run.tokens) <= high * 1.01


def test_encoders_count_at_every_size():
    small = EncoderConfig(192, 32, 2, 1, 8)
    config = replace(CONFIGS[0], features={"image": 32, "audio": 32}, encoders={"image": small, "audio": replace(small, patch=64)})
    for each in (config, replace(config, width=192, depth=2)):
        assert cost(each, 8192, 512).parameters == sum(p.numel() for p in Decoder(each, build_encoder).parameters())


def test_a_plan_for_a_decoder_with_ctc_is_that_without(law):
    """Behind how many blocks it is asked costs nothing, and a smaller size need not have as many."""
    config = CONFIGS[0]
    with_ctc = replace(config, ctc_blocks=3)
    assert cost(with_ctc, 8192, 512) == cost(config, 8192, 512)
    assert plans(with_ctc, 1e13, 8192, 512, law) == plans(config, 1e13, 8192, 512, law)


def test_plans_spend_the_budget_by_their_laws(law):
    config, batch, length, budget = CONFIGS[0], 8192, 512, 1e18
    hoffmann, kaplan, own = plans(config, budget, batch, length, law)
    for each in (hoffmann, kaplan, own):
        assert each.tokens * each.cost.training / batch == pytest.approx(budget)
        assert each.steps == round(each.tokens / batch) and each.effective_tokens == each.tokens
        assert each.gigabytes == each.cost.parameters * 16 / 1e9
        muon = [p for block in Decoder(replace(each.config, depth=1)).blocks for p in block.parameters() if p.dim() == 2]
        assert each.cost.matrices == each.config.depth * sum(map(torch.numel, muon))
        assert each.with_muon == pytest.approx((16 * each.cost.parameters - 4 * each.cost.matrices) / 1e9)
        assert each.loss == pytest.approx(law.loss(each.cost.parameters, each.tokens))
    # Sizes come in steps: what is nearest is within one of them.
    assert hoffmann.tokens / hoffmann.cost.parameters == pytest.approx(20, rel=0.4)
    assert kaplan.tokens == pytest.approx(5e3 * kaplan.cost.blocks ** 0.74, rel=0.4)
    assert own.loss <= min(hoffmann.loss, kaplan.loss)
    # Where the optimum of the law lies: N (alpha A / beta B)^... of the paper, in FLOPs of 6 N D.
    share = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA)) * (budget / 6) ** (BETA / (ALPHA + BETA))
    assert own.cost.parameters == pytest.approx(share, rel=0.5)


def test_epochs_of_the_same_data_count_less(law):
    assert effective_tokens_of(5e6, None) == effective_tokens_of(5e6, 1e7) == 5e6
    # Four epochs are worth nearly four; no number is worth more than 1 + 15.39 of them.
    assert effective_tokens_of(4e7, 1e7) == pytest.approx(1e7 * (1 + 15.39 * (1 - math.exp(-3 / 15.39))))
    assert 3.6e7 < effective_tokens_of(4e7, 1e7) < 4e7
    assert effective_tokens_of(1e12, 1e7) == pytest.approx(1e7 * 16.39)
    few = plans(CONFIGS[0], 1e18, 8192, 512, law, unique=1e7)[2]
    many = plans(CONFIGS[0], 1e18, 8192, 512, law)[2]
    assert few.loss > many.loss and few.epochs == pytest.approx(few.tokens / 1e7)


def run_folder(folder, run: Run, model, vocabulary: Vocabulary) -> None:
    (folder / run.name / "metrics").mkdir(parents=True)
    rows = f"step,val/loss,val/loss_text\n0,9,9\n{round(run.tokens / 4096) - 1},{run.losses['loss']},{run.losses['loss'] / 2}\n"
    (folder / run.name / "metrics" / "metrics.csv").write_text(rows)
    (folder / run.name / "metrics" / "config.yaml").write_text(json.dumps({
        "trainer": {"devices": "auto", "num_nodes": 1, "accumulate_grad_batches": 2},
        "data": {"init_args": {"tokens_per_batch": 2048}}}))
    (folder / run.name / "model").mkdir()
    (folder / run.name / "model" / "config.json").write_text(json.dumps({"format": 2, "decoder": model.to_dict()}))
    vocabulary.save(folder / run.name / "model" / "vocabulary.json")


@pytest.fixture
def models(tmp_path, tokenizers) -> list[DecoderConfig]:
    """Sizes of which there are three runs each in `tmp_path`."""
    models = [DecoderConfig(300, width=w, depth=2, heads=2, kv_heads=2, head_dim=16, mlp_dim=4 * w) for w in (32, 64, 128)]
    for model in models:
        n = cost(model, 1, 1).parameters
        for steps in (100, 1000, 10_000):
            run_folder(tmp_path, Run(f"{model.width}-{steps}", n, steps * 4096, {"loss": loss(n, steps * 4096)}), model,
                       Vocabulary.build(tokenizers))
    return models


def test_runs_are_read_with_their_sizes_tokens_and_losses(tmp_path, models):
    runs = {run.name: run for run in read_runs(tmp_path)}
    assert len(runs) == 9
    run = runs["64-1000"]
    assert (run.parameters, run.tokens) == (cost(models[1], 1, 1).parameters, 1000 * 4096)
    assert run.losses == {"loss": pytest.approx(loss(run.parameters, run.tokens)), "loss_text": pytest.approx(run.losses["loss"] / 2)}
    law = fit(list(runs.values()), "loss_text", resamples=0)
    assert law.e == pytest.approx(E / 2, rel=0.1) and law.alpha == pytest.approx(ALPHA, rel=0.1)


@pytest.mark.parametrize("seed", range(3))
def test_losses_that_hardly_differ_give_a_law_all_the_same(seed):
    random = torch.Generator().manual_seed(seed)
    runs = [Run(f"{n}-{d}", n, 512 * d, {"loss": 6.3 + 3e-3 * torch.randn((), generator=random).item()})
            for n in (12_368, 24_000, 37_040) for d in (2, 4, 8)]
    run, law = held_out(runs, resamples=100)
    low, high = law.interval(run.parameters, run.tokens)
    assert 6 < low <= high < 6.6 and law.loss(run.parameters, run.tokens) == pytest.approx(6.3, rel=0.01)


def test_the_processes_of_a_run_count_and_a_run_of_a_tokenizer_does_not(tmp_path, models):
    (tmp_path / "64-1000" / "metrics" / "environment.json").write_text(json.dumps({"processes": 4}))
    listed = tmp_path / "32-100" / "metrics" / "config.yaml"
    listed.write_text(listed.read_text().replace('"auto"', "[0, 2]"))
    (tmp_path / "image" / "model").mkdir(parents=True)
    (tmp_path / "image" / "model" / "config.json").write_text('{"kind": "image"}')
    runs = {run.name: run for run in read_runs(tmp_path)}
    assert len(runs) == 9 and runs["64-1000"].tokens == 4 * 1000 * 4096 and runs["32-100"].tokens == 2 * 100 * 4096


def test_too_few_runs_are_refused(tmp_path):
    with pytest.raises(InputError, match="found no finished run of a decoder, expected folders that mmtx fit made"):
        read_runs(tmp_path)
    with pytest.raises(InputError, match=r"runs with val/loss: found 3 of 1 sizes and 3 numbers of tokens, expected 6"):
        fit(made()[:3])


def test_runs_of_other_tokenizers_are_refused(tmp_path, models, tokenizers):
    others = {kind: tokenizer for kind, tokenizer in tokenizers.items() if kind != "audio"}
    run_folder(tmp_path, Run("other", 1, 4096, {"loss": 2.0}), models[0], Vocabulary.build(others))
    with pytest.raises(InputError, match=f"^{tmp_path}/other: found other tokenizers than those of {tmp_path}/128-100, expected"):
        read_runs(tmp_path)


def test_a_run_without_metrics_or_validation_is_refused(tmp_path, models):
    metrics = tmp_path / "64-100" / "metrics" / "metrics.csv"
    metrics.write_text("step,train/loss\n1,2\n")
    with pytest.raises(InputError, match=f"^{metrics}: found no val/loss, expected a run that was validated$"):
        read_runs(tmp_path)
    metrics.unlink()
    with pytest.raises(InputError, match=f"^{metrics}: no such file, expected the metrics of a run$"):
        read_runs(tmp_path)


def test_the_command_tells_all_sources_and_what_repeats(tmp_path, capsys, models):
    main(["plan", "--model", str(tmp_path / "64-1000" / "model"), "--hours", "10", "--rate", "1e12", "--runs", str(tmp_path),
          "--unique_tokens", "1e6", "--file", str(tmp_path / "plan.png")])
    told = capsys.readouterr()
    for word in ("3.6e+16", "Hoffmann et al. 2022", "Kaplan et al. 2020", "your runs", "held out 128-10000: loss predicted",
                 "held out 128-10000: loss_text predicted"):
        assert word in told.out
    assert "epochs of the same data" in told.err
    assert "mmtx: note: 6 of 9 runs repeat data, 41.0 epochs at most" in told.err
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("budget, told", [("1e3", "16 x 2 is the smallest"), ("1e16", None), ("1e30", "is the largest")])
def test_a_plan_at_the_edge_of_the_sizes_says_so(budget, told, tmp_path, capsys, models):
    main(["plan", "--model", str(tmp_path / "64-1000" / "model"), "--flops", budget])
    found = capsys.readouterr()
    assert (f"{told} size tried, so the best one may lie beyond it" in found.err) if told else not found.err
    assert "| GB of state (with Muon) |" in found.out


@pytest.mark.parametrize("options, found", [
    ([], "no budget"), (["--flops", "1e15", "--hours", "2"], "--flops and --hours"), (["--hours", "2"], "--hours,"),
    (["--flops", "1e-320"], "1e-320 FLOPs"), (["--hours", "1e-200", "--rate", "1e-200"], "0 FLOPs"),
    (["--hours", "1e200", "--rate", "1e200"], "inf FLOPs"), (["--flops", "nan"], "nan"), (["--flops", "-1"], "-1"), (["--flops", "1e15", "--rate", "2"], "--flops and --rate")])
def test_budgets_that_are_none_are_refused(options, found, tmp_path, capsys, models):
    with pytest.raises(SystemExit) as stop:
        main(["plan", "--model", str(tmp_path / "64-1000" / "model"), *options])
    told = capsys.readouterr().err
    assert stop.value.code == 2 and told.count("\n") == 1 and f"found {found}" in told.replace("'", "")


def test_a_plot_has_the_frontier_at_exact_costs(law, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = {}
    monkeypatch.setattr(Axes, "plot", lambda axes, x, y, *_, label=None, **__: drawn.setdefault(label, (list(x), list(y))))
    monkeypatch.setattr(Axes, "legend", lambda *_, **__: None)
    isoflop_plot(law, made(), CONFIGS[0], 8192, 512, 1e19, tmp_path / "plot.png")
    sizes, losses = drawn["frontier"]
    best = plans(CONFIGS[0], 1e19, 8192, 512, law)[2]
    assert (sizes[-1], losses[-1]) == (best.cost.parameters, pytest.approx(best.loss))
    assert losses == sorted(losses, reverse=True)


@pytest.mark.slow
def test_runs_of_mmtx_fit_are_what_a_plan_is_made_of(tmp_path, capsys):
    config = tiny.prepare(tmp_path)
    config.update(samples=0, ema=None)
    config["data"]["init_args"]["num_workers"] = 0
    for width in (16, 32, 48):
        for steps in (2, 4, 8):
            (tmp_path / "config.yaml").write_text(yaml.safe_dump({**config, "output": str(tmp_path / "runs" / f"{width}-{steps}")}))
            main(["fit", "--config", str(tmp_path / "config.yaml"), "--model.decoder.width", str(width), "--trainer.max_steps",
                  str(steps), "--trainer.val_check_interval", "1.0", "--trainer.accumulate_grad_batches", "2"])
    runs = read_runs(tmp_path / "runs")
    assert {run.name: run.tokens for run in runs} == {f"{width}-{steps}": 512 * steps for width in (16, 32, 48) for steps in (2, 4, 8)}
    assert len({run.parameters for run in runs}) == 3
    assert all(run.losses.keys() == {"loss", "loss_text", "loss_special"} and run.losses["loss"] < 10 for run in runs)
    main(["plan", "--runs", str(tmp_path / "runs"), "--flops", "1e12", "--model", str(tmp_path / "runs" / "32-8" / "model")])
    assert "held out 48-8: loss predicted" in capsys.readouterr().out
