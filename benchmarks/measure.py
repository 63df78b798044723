"""Shared code of the speed benchmarks: interleaved measurements of mmtx and its peers, medians and ratios, results as JSON."""

import argparse
import importlib.util
import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from datetime import date
from importlib import metadata
from pathlib import Path
from statistics import median
from types import MappingProxyType

import mmtx

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "litgpt", "lightning", "numpy")


def require(module: str, install: str) -> None:
    """End with one line if a module is not installed that mmtx itself does not need."""
    if importlib.util.find_spec(module) is None:
        raise SystemExit(f"{module} is not installed, expected pip install {install}")


def interpreter(name: str) -> str:
    """The absolute path of a Python, since scripts start it in another folder. Links stay: an environment's Python is one."""
    if (found := shutil.which(name)) is None:
        raise argparse.ArgumentTypeError(f"found {name}, expected a Python that can be run")
    return os.path.abspath(found)


def interleave(candidates: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Call each candidate in turn, `rounds` times -> the figures that each returned (e.g. tokens/s).

    Other load on the machine then slows all candidates alike, which it would not if they ran one after another.
    """
    results: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            results[name].append(run())
    return results


def report(name: str, unit: str, results: dict[str, list[float]], ours: str, bars: dict[str, float],
           settings: dict, short: bool, less_is_better: bool = False, equals: Mapping[str, str] = MappingProxyType({})) -> dict:
    """Print medians, and the ratio ours/peer with its bar -> the same, as written to results/NAME.json.

    The ratio is the median of the ratios in each round. The ratio must reach its bar or, with `less_is_better`, must not
    exceed it. `equals` names, for a peer, our candidate to compare with in place of `ours`, that of the same precision.
    With `short`, nothing is written.
    """
    print(f"\n{name}, {unit}: median of {len(results[ours])}" + (" (short: says nothing about speed)" if short else ""))
    ratios = {}
    for peer, figures in results.items():
        line = f"  {peer:44} {median(figures):12.4g}"
        if peer in bars:
            one = equals.get(peer, ours)
            ratio, bar = median(a / b for a, b in zip(results[one], figures, strict=True)), bars[peer]
            reached = ratio <= bar if less_is_better else ratio >= bar
            ratios[peer] = {"ratio": round(ratio, 4), "bar": bar, "reached": reached} | ({"of": one} if one != ours else {})
            sign, verdict = "<=" if less_is_better else ">=", "" if reached else "   MISSED"
            line += f"   {'ours' if one == ours else one}/this {ratio:.3g}, bar {sign} {bar:g}{verdict}"
        print(line, flush=True)
    result = {
        "name": name, "unit": unit, "date": date.today().isoformat(), "ours": ours,
        "median": {peer: float(f"{median(figures):.5g}") for peer, figures in results.items()},
        "ours_over": ratios,
        "rounds": {peer: [float(f"{figure:.5g}") for figure in figures] for peer, figures in results.items()},
        "settings": settings,
    }
    return result if short else write_result(result)


def write_result(result: dict) -> dict:
    """Write results/NAME.json, with NAME from `result` -> its contents: the result, the machine and the versions."""
    result = {**result, "machine": machine(), "versions": versions()}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{result['name']}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def machine() -> dict:
    """The machine that the figures were measured on."""
    import torch

    found = {"cpu": _cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return {**found, "gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else found


def versions() -> dict[str, str]:
    """Versions of Python and of the packages involved, as far as they are installed."""
    found = {"python": platform.python_version(), "mmtx": mmtx.__version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
