"""`mmtx plan`: model size and number of tokens for a compute budget, from published scaling laws and a fit of your own runs.

    loss(N, D) = E + A / N^alpha + B / D^beta      (https://arxiv.org/abs/2203.15556, approach 3)

N parameters, D tokens, C floating-point operations (FLOPs) of a training run.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from torch import Tensor

from mmtx.config import AnyEncoderConfig, DecoderConfig
from mmtx.errors import InputError
from mmtx.modality.encoder import build_encoder
from mmtx.model import Decoder
from mmtx.model_folder import read_model_config
from mmtx.run_page import read_curves
from mmtx.saved_folder import CONFIG
from mmtx.vocabulary import Vocabulary

TOKENS_A_PARAMETER = 20.0         # Hoffmann et al. 2022, counting all parameters
KAPLAN = (5e3, 0.74)              # Kaplan et al. 2020: D >= 5e3 N^0.74 keeps overfitting small, N without embeddings
REUSE = 15.39                     # Muennighoff et al. 2023: decay constant of the value of repeated epochs
EPOCHS = 4                        # on the same data that are worth almost as much as new data
HUBER = 1e-3                      # threshold of the Huber loss, for logarithms of losses
RESAMPLES = 400
STEEPEST = 10                     # bound of exponents, which diverge if losses hardly differ
ROUNDS = 300                      # iterations of a fit, which needs a few dozen
ADAMW, MUON = 16, 12              # bytes per parameter in float32: weight, gradient, and AdamW's two moments or Muon's one


class Cost(NamedTuple):
    """Exact numbers of a decoder's parameters and FLOPs."""

    parameters: int
    blocks: int         # parameters without embeddings, output, encoders and their projections
    forward: int        # FLOPs of a batch, including the logits of every token
    training: int       # FLOPs of the forward and backward pass
    matrices: int       # parameters in the matrices of blocks, which Muon trains if there is a muon_lr


def cost(config: DecoderConfig, tokens: int, length: int) -> Cost:
    """The cost of a batch of `tokens` in documents of `length`, without features and gradient checkpointing.

    FLOPs are those of matrix products only, 2 n k m for (n, k) times (k, m), with attention over whole documents, as profilers
    count it.
    """
    c = config
    with torch.device("meta"):
        decoder = Decoder(replace(c, depth=1, encoders={}, ctc_blocks=None))  # all blocks are alike
    block = sum(p.numel() for p in decoder.blocks[0].parameters())
    matrices = c.depth * sum(p.numel() for p in decoder.blocks[0].parameters() if p.dim() == 2)
    attention = 4 * c.depth * c.heads * c.head_dim * length
    coded = c.vocabulary_size - c.plain_rows
    digits = sum(level for r in c.composed for level in r.levels)
    # Composed rows are made once per batch; in the backward pass only their digits get a gradient.
    composed = 2 * coded * digits * c.width
    products = tokens * (2 * matrices + attention + 2 * c.vocabulary_size * c.width)
    parameters = sum(p.numel() for p in decoder.parameters()) + sum(map(_encoder_parameters, c.encoders.values()))
    return Cost(parameters + (c.depth - 1) * block, c.depth * block, products + composed, 3 * products + 2 * composed, matrices)


@lru_cache
def _encoder_parameters(config: AnyEncoderConfig) -> int:
    """Parameters of an encoder, which takes a second to build and does not depend on the decoder's size."""
    with torch.device("meta"):
        return sum(p.numel() for p in build_encoder(config).parameters())


def sizes(config: DecoderConfig) -> list[DecoderConfig]:
    """Decoders of all sizes with the vocabulary and head width of `config`: depth about width / 64, MLPs of 8/3 the width."""
    found = []
    for heads in (*range(1, 17), *range(18, 33, 2), *range(36, 65, 4), *range(72, 257, 8)):
        width = heads * config.head_dim
        found.append(replace(config, width=width, heads=heads, kv_heads=heads, depth=max(2, round(width / 64)),
                             mlp_dim=max(64, round(width * 8 / 3 / 64) * 64), ctc_blocks=None))
    return [c for c in found if c.depth <= 200]


class Plan(NamedTuple):
    source: str
    config: DecoderConfig
    cost: Cost
    tokens: float
    steps: int
    gigabytes: float    # of weights, gradients and AdamW's state; activations are not included
    with_muon: float    # the same if Muon trains the matrices of blocks
    loss: float | None  # predicted by a fit of runs, if there is one
    epochs: float | None
    effective_tokens: float  # tokens of new data with the same effect


def plan(source: str, made: Sequence[tuple[DecoderConfig, Cost]], budget: float, batch: int,
         tokens_of: Callable[[Cost], float] | None, law: "Law | None" = None, unique: float | None = None) -> Plan:
    """The one of some decoders for a budget of FLOPs: that whose `tokens_of` tokens use it up, or with the least loss by a law."""
    def tokens(c: Cost) -> float:
        return budget * batch / c.training

    if tokens_of is not None:
        size, found = min(made, key=lambda each: abs(math.log(tokens(each[1]) / tokens_of(each[1]))))
    else:
        assert law is not None
        size, found = min(made, key=lambda each: law.loss(each[1].parameters, effective_tokens_of(tokens(each[1]), unique)))
    count = tokens(found)
    loss = None if law is None else law.loss(found.parameters, effective_tokens_of(count, unique))
    return Plan(source, size, found, count, max(1, round(count / batch)), found.parameters * ADAMW / 1e9,
                (found.parameters * ADAMW - found.matrices * (ADAMW - MUON)) / 1e9, loss,
                None if unique is None else count / unique, effective_tokens_of(count, unique))


def plans(config: DecoderConfig, budget: float, batch: int, length: int, law: "Law | None" = None,
          unique: float | None = None) -> list[Plan]:
    """The plans of all sources; `unique` is the number of tokens before the data repeats."""
    factor, power = KAPLAN
    made = [(size, cost(size, batch, length)) for size in sizes(config)]
    found = [plan("Hoffmann et al. 2022", made, budget, batch, lambda c: TOKENS_A_PARAMETER * c.parameters, law, unique),
             plan("Kaplan et al. 2020", made, budget, batch, lambda c: factor * c.blocks ** power, law, unique)]
    return found if law is None else [*found, plan("your runs", made, budget, batch, None, law, unique)]


def effective_tokens_of(tokens: float, unique: float | None) -> float:
    """Tokens of new data that `tokens` are worth if only `unique` are new (https://arxiv.org/abs/2305.16264)."""
    if unique is None or tokens <= unique:
        return tokens
    return unique * (1 + REUSE * (1 - math.exp(-(tokens / unique - 1) / REUSE)))


# -- A fit of runs -------------------------------------------------------------------------------------------


class Run(NamedTuple):
    name: str
    parameters: int
    tokens: float
    losses: Mapping[str, float]  # of the last validation: "loss", and by kind, such as "loss_text"


class Law(NamedTuple):
    """loss = E + A / N^alpha + B / D^beta, with 90 % bootstrap intervals over the runs."""

    e: float
    a: float
    alpha: float
    b: float
    beta: float
    intervals: Mapping[str, tuple[float, float]]
    resampled: Sequence["Law"] = ()  # the laws of the resampled runs

    def loss(self, parameters: float, tokens: float) -> float:
        return self.e + self.a / parameters ** self.alpha + self.b / tokens ** self.beta

    def interval(self, parameters: float, tokens: float) -> tuple[float, float]:
        """90 % interval of the loss that the resampled laws predict."""
        low, high = np.percentile([law.loss(parameters, tokens) for law in self.resampled], (5, 95)).tolist()
        return low, high


def read_runs(folder: str | Path) -> list[Run]:
    """All finished decoder runs in a folder of runs.

    Raises InputError if there is none, one is damaged, or their tokenizers differ, since losses then cannot be compared.
    """
    runs, first = [], None
    for config in sorted(Path(folder).glob(f"*/model/{CONFIG}")):
        run, vocabulary = config.parents[1], config.with_name("vocabulary.json")
        if not vocabulary.is_file():  # a run of a tokenizer
            continue
        metrics = run / "metrics" / "metrics.csv"
        if not metrics.is_file():
            raise InputError(f"{metrics}: no such file, expected the metrics of a run")
        entries = Vocabulary.load(vocabulary).entries
        first = first or (run, entries)
        if entries != first[1]:
            raise InputError(f"{run}: found other tokenizers than those of {first[0]}, expected runs with the same")
        curves = read_curves(metrics)
        losses = {name.removeprefix("val/"): curve[-1][1] for name, curve in curves.items() if name.startswith("val/loss")}
        if "loss" not in losses:
            raise InputError(f"{metrics}: found no val/loss, expected a run that was validated")
        parameters = cost(read_model_config(run / "model"), 1, 1).parameters
        steps = curves["val/loss"][-1][0] + 1  # steps are numbered from 0
        runs.append(Run(run.name, parameters, steps * _tokens_of_a_step(run), losses))
    if not runs:
        raise InputError(f"{folder}: found no finished run of a decoder, expected folders that mmtx fit made")
    return runs


def _tokens_of_a_step(run: Path) -> int:
    path, told = run / "metrics" / "config.yaml", run / "metrics" / "environment.json"
    try:
        config: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        trainer, devices = config["trainer"], config["trainer"]["devices"]
        if told.is_file():  # the configuration may say "auto" or -1 devices
            processes = int(json.loads(told.read_text(encoding="utf-8"))["processes"])
        else:
            count = len(devices) if isinstance(devices, list) else devices if isinstance(devices, int) and devices > 0 else 1
            processes = int(trainer["num_nodes"]) * count
        return int(config["data"]["init_args"]["tokens_per_batch"]) * int(trainer["accumulate_grad_batches"]) * processes
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not the configuration of a decoder's run ({type(error).__name__})") from None


def fit(runs: Sequence[Run], what: str = "loss", resamples: int = RESAMPLES) -> Law:
    """Fit a law to a loss. Raises InputError unless there are at least 6 runs of 3 sizes and 3 numbers of tokens."""
    chosen = [run for run in runs if what in run.losses and run.losses[what] > 0 and run.tokens > 0]
    n, d = (len({getattr(run, name) for run in chosen}) for name in ("parameters", "tokens"))
    if len(chosen) < 6 or n < 3 or d < 3:
        raise InputError(f"runs with val/{what}: found {len(chosen)} of {n} sizes and {d} numbers of tokens, expected 6 or more of "
                         "3 or more each")
    points = torch.tensor([[run.parameters, run.tokens, run.losses[what]] for run in chosen], dtype=torch.float64).log()
    least = points[:, 2].min().item()
    starts = torch.stack([_start(points, least + math.log(share), alpha, beta)
                          for share in (0.2, 0.6, 0.9) for alpha in (0.2, 0.5) for beta in (0.2, 0.5)])
    found, left = _levenberg_marquardt(points.expand(len(starts), -1, -1), starts)
    best = found[left.argmin()]
    random = np.random.default_rng(0)
    rows: list[Tensor] = []
    while len(rows) < resamples:
        drawn = points[random.integers(0, len(points), len(points))]
        if min(len(set(drawn[:, 0].tolist())), len(set(drawn[:, 1].tolist()))) >= 3:
            rows.append(drawn)
    laws = [_law(x) for x in _levenberg_marquardt(torch.stack(rows), best.expand(len(rows), -1))[0]] if rows else []
    intervals: dict[str, tuple[float, float]] = {}
    for name in ("e", "a", "alpha", "b", "beta") if laws else ():
        low, high = np.percentile([getattr(law, name) for law in laws], (5, 95)).tolist()
        intervals[name] = low, high
    return _law(best)._replace(intervals=intervals, resampled=laws)


def _start(points: Tensor, e: float, alpha: float, beta: float) -> Tensor:
    """Initial constants, at which each of the two terms is half of the mean loss above E."""
    n, d, loss = points.mean(0).tolist()
    half = math.log(max(math.exp(loss) - math.exp(e), 1e-3) / 2)
    return torch.tensor([e, half + alpha * n, alpha, half + beta * d, beta], dtype=torch.float64)


def _law(x: Tensor) -> Law:
    e, a, alpha, b, beta = x.tolist()
    return Law(math.exp(e), math.exp(a), alpha, math.exp(b), beta, {})


def _levenberg_marquardt(points: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Levenberg-Marquardt on the Huber loss of log losses, for many sets of runs at once.

    `points` (sets, runs, 3) are logarithms of N, D and loss; `start` (sets, 5) log E, log A, alpha, log B, beta -> those constants
    at the minimum, and the Huber loss there (sets,).
    """
    n, d, wanted = points.unbind(-1)

    def at(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        e, a, alpha, b, beta = x[..., None].unbind(1)
        terms = torch.stack([e.expand_as(n), a - alpha * n, b - beta * d])
        told = terms.logsumexp(0)
        shares = (terms - told).exp()
        slopes = torch.stack([shares[0], shares[1], -shares[1] * n, shares[2], -shares[2] * d], -1)
        wrong = told - wanted
        return wrong, slopes, torch.nn.functional.huber_loss(wrong, torch.zeros_like(wrong), reduction="none", delta=HUBER).sum(1)

    x, damping = start, torch.full((len(points), 1), 1e-2, dtype=points.dtype)
    wrong, slopes, left = at(x)
    for _ in range(ROUNDS):
        weighted = slopes / wrong.abs().clamp_min(HUBER)[..., None]
        square = weighted.mT @ slopes
        ridge = torch.diag_embed(damping * square.diagonal(dim1=1, dim2=2) + 1e-9)
        # A singular system gives a step that is not finite, which is never an improvement.
        there = x - torch.linalg.solve_ex(square + ridge, weighted.mT @ wrong[..., None])[0].squeeze(-1)
        there[:, 2::2].clamp_(-STEEPEST, STEEPEST)
        wrong_there, slopes_there, left_there = at(there)
        better = left_there < left
        x, wrong, slopes, left = (torch.where(better.view(-1, *[1] * (old.dim() - 1)), new, old) for new, old in (
            (there, x), (wrong_there, wrong), (slopes_there, slopes), (left_there, left)))
        damping = torch.where(better[:, None], damping / 3, damping * 2).clamp(1e-9, 1e9)
    return x, left


def held_out(runs: Sequence[Run], what: str = "loss", resamples: int = 0) -> tuple[Run, Law]:
    """The run with the most compute, and the law fitted to the others."""
    largest = max(runs, key=lambda run: run.parameters * run.tokens)
    return largest, fit([run for run in runs if run is not largest], what, resamples)


def isoflop_plot(law: Law, runs: Sequence[Run], config: DecoderConfig, batch: int, length: int, budget: float, file: Path) -> None:
    """Plot IsoFLOP curves up to the budget with their minima, and measured losses against those of the law.

    FLOPs are exact and include the logits; 6 N D would omit most of the compute of small decoders. Raises InputError.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError('a plot needs matplotlib: pip install "mmtx[plot]"') from None
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes, right = figure.subplots(1, 2)
    made = [(c.parameters, c.training / batch) for c in (cost(size, batch, length) for size in sizes(config))]
    rates = dict(made)
    nearest = {run.name: min(rates, key=lambda n: abs(math.log(n / run.parameters))) for run in runs}
    least, best = min(rates[nearest[run.name]] * run.tokens for run in runs), []
    for compute in np.geomspace(least, max(budget, 2 * least), 6):
        losses = np.array([law.loss(n, compute / rate) for n, rate in made])
        near = losses < 1.25 * losses.min()
        axes.plot(np.array(list(rates))[near], losses[near], ".-", markersize=3, label=f"{compute:.1e} FLOPs")
        best.append((made[losses.argmin()][0], losses.min()))
    axes.plot(*zip(*best), "k--", label="frontier")
    points = axes.scatter([run.parameters for run in runs], [run.losses["loss"] for run in runs], s=14, zorder=3,
                          c=[math.log10(run.tokens) for run in runs])
    figure.colorbar(points, ax=axes, label="runs: log10 of tokens")
    axes.set(xscale="log", xlabel="parameters", ylabel="loss")
    axes.legend(fontsize=7)
    measured = [run.losses["loss"] for run in runs]
    right.scatter([law.loss(run.parameters, run.tokens) for run in runs], measured, s=14, c=[math.log10(run.tokens) for run in runs])
    right.plot((min(measured), max(measured)), (min(measured), max(measured)), "k--")
    right.set(xlabel="loss by the law", ylabel="loss measured")
    try:
        figure.savefig(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be written ({error})") from None
