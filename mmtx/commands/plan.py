"""`mmtx plan`: which model size to train, and for how long, with a compute budget."""

import argparse
import sys

from mmtx.commands.arguments import count
from mmtx.errors import InputError
from mmtx.files import user_path


def add(commands) -> None:
    parser = commands.add_parser("plan", help="say which model size to train, and for how long, with a compute budget",
                                 description="Which model size to train, and for how long: by Hoffmann et al. 2022, by Kaplan et al. "
                                 "2020, and, with --runs, by a fit of your own runs. The budget is --flops, or --hours at a "
                                 "measured --rate.")
    parser.add_argument("--flops", type=_amount, help="compute budget in floating-point operations, e.g. 1e18")
    parser.add_argument("--hours", type=_amount, help="training time in hours, with --rate")
    parser.add_argument("--rate", type=_amount, help="measured training throughput in FLOPs per second, e.g. 3e14, with --hours")
    parser.add_argument("--tokens_per_batch", type=count(1), default=8192, help="tokens per step; default: 8192")
    parser.add_argument("--max_seq_len", type=count(1), default=1024, help="tokens per document; default: 1024")
    parser.add_argument("--unique_tokens", type=_amount, help="tokens in the data before they repeat; default: they never do")
    parser.add_argument("--runs", metavar="FOLDER", help="folder of finished runs: at least 6, with 3 model sizes and 3 token counts")
    parser.add_argument("--file", type=user_path, help="plot the IsoFLOP curves of the fit to this file, e.g. plan.png; needs --runs")
    parser.add_argument("--model", help="model folder whose vocabulary and head width to plan with; default: the one that "
                        "comes with mmtx")
    parser.set_defaults(run=run)


def _amount(word: str) -> float:
    """A number above 0."""
    try:
        if 0 < (value := float(word)) < float("inf"):
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"found {word!r}, expected a number above 0, as 1e18")


def run(options: argparse.Namespace) -> None:
    from mmtx.model_folder import DEFAULT_MODEL, read_model_config
    from mmtx.scaling import EPOCHS, RESAMPLES, effective_tokens_of, fit, held_out, isoflop_plot, plans, read_runs, sizes
    from mmtx.shipped_files import find_shipped, shipped

    if (options.flops is None) == (options.hours is None) or (options.hours is None) != (options.rate is None):
        given = [f"--{name}" for name in ("flops", "hours", "rate") if getattr(options, name) is not None]
        raise InputError(f"found {' and '.join(given) or 'no budget'}, expected --flops, or --hours with --rate")
    if options.file and not options.runs:
        raise InputError("--file: found no --runs, expected the folder of runs to plot")
    budget = options.flops or options.hours * 3600 * options.rate
    if not 1 <= budget < float("inf"):  # which hours and rate, each a number above 0, can make
        raise InputError(f"budget: found {budget:.4g} FLOPs, expected a finite number of 1 or more")
    config = read_model_config(find_shipped(options.model) if options.model else shipped(DEFAULT_MODEL))
    runs = read_runs(options.runs) if options.runs else []
    unique = options.unique_tokens
    if repeated := [run for run in runs if unique is not None and run.tokens > unique]:
        print(f"mmtx: note: {len(repeated)} of {len(runs)} runs repeat data, {max(run.tokens for run in repeated) / unique:.1f} "
              "epochs at most: their tokens count for the new ones that they are worth", file=sys.stderr)
        runs = [run._replace(tokens=effective_tokens_of(run.tokens, unique)) for run in runs]
    law = fit(runs) if runs else None
    print(f"budget: {budget:.4g} FLOPs")
    kinds = sorted({name for run in runs for name in run.losses if all(name in each.losses for each in runs)})
    for what in kinds:
        found = law if what == "loss" else fit(runs, what)
        print(f"{what} = {found.e:.4g} + {found.a:.4g} / N^{found.alpha:.3f} + {found.b:.4g} / D^{found.beta:.3f}; 90 %: " +
              ", ".join(f"{name} {low:.3g} to {high:.3g}" for name, (low, high) in found.intervals.items()))
    for what in kinds:
        try:
            run, others = held_out(runs, what, RESAMPLES)
        except InputError as error:  # enough runs for a fit, but too few without the largest
            print(f"mmtx: note: nothing held out: {error}", file=sys.stderr)
            break
        point, measured = (run.parameters, run.tokens), run.losses[what]
        told, (low, high) = others.loss(*point), others.interval(*point)
        print(f"held out {run.name}: {what} predicted {told:.4f} [{low:.4f}, {high:.4f}], measured {measured:.4f} "
              f"({told / measured - 1:+.1%})")
    tried = sizes(config)
    print("| by | parameters | width x depth | tokens | steps | GB of state (with Muon) | "
          + "hours | " * bool(options.rate) + "loss |")
    print("| --- | --- | --- | --- | --- | --- | " + "--- | " * bool(options.rate) + "--- |")
    for each in plans(config, budget, options.tokens_per_batch, options.max_seq_len, law, unique):
        hours = f"{budget / options.rate / 3600:.3g} | " if options.rate else ""
        loss = "-" if each.loss is None else f"{each.loss:.3f}"
        print(f"| {each.source} | {each.cost.parameters:,} | {each.config.width} x {each.config.depth} | {each.tokens:,.0f} | "
              f"{each.steps:,} | {each.gigabytes:.3g} ({each.with_muon:.3g}) | {hours}{loss} |")
        if each.config in (tried[0], tried[-1]):
            edge = "smallest" if each.config == tried[0] else "largest"
            print(f"mmtx: note: {each.source}: {each.config.width} x {each.config.depth} is the {edge} size tried, so the best one "
                  "may lie beyond it", file=sys.stderr)
        if each.epochs is not None and each.epochs > EPOCHS:
            print(f"mmtx: note: {each.source}: {each.epochs:.1f} epochs of the same data are worth {each.effective_tokens:,.0f} new "
                  f"tokens; more than {EPOCHS} pay little", file=sys.stderr)
    if options.file:
        isoflop_plot(law, runs, config, options.tokens_per_batch, options.max_seq_len, budget, options.file)
        print(options.file)
