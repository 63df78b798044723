"""Checks that a resume checkpoint looks like one that this run would write, before anything in it is used."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.optim import Optimizer

from mmtx.errors import InputError

MOST_COUNT = 2**62
PARTS = {"epoch": int, "global_step": int, "pytorch-lightning_version": str, "state_dict": Mapping, "loops": Mapping,
         "callbacks": Mapping, "optimizer_states": list, "lr_schedulers": list}
AVERAGED = ("current_model_state", "averaging_state")  # there if weights are averaged
NEXT = {"combined_loader": [{"next": 0}]}              # state of a `ResumableLoader`
OURS = ("Checkpoints", "SkipNonFinite", "EMAWeightAveraging")


def shown(value: Any) -> str:
    """A value for a message, shortened if it is long."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {value.dtype}"
    if isinstance(value, Mapping | list | tuple):
        return f"{type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def check_checkpoint(found: Any, where: str) -> None:
    """Raise InputError unless `found` has the parts of a checkpoint, written by this version of Lightning."""
    if not isinstance(found, Mapping):
        raise InputError(f"{where}: found {shown(found)}, expected a checkpoint of mmtx")
    for name, kind in PARTS.items():
        if not isinstance(found.get(name), kind) or isinstance(found.get(name), bool):
            raise InputError(f"{where}: {name}: found {shown(found.get(name))}, expected {kind.__name__.lower()}")
    version = found["pytorch-lightning_version"]
    if version.split(".")[:2] != lightning.__version__.split(".")[:2]:
        raise InputError(f"{where}: was written with lightning {shown(version)}, found {lightning.__version__}")
    record = found.get("record")
    if not isinstance(record, Mapping) or not all(
            isinstance(name, str) and isinstance(value, bool | int | float | str | None) for name, value in record.items()):
        raise InputError(f"{where}: record: found {shown(record)}, expected the configuration of a run")


def check_fits(found: Mapping[str, Any], expected: Mapping[str, Any], optimizers: Sequence[Optimizer], where: str) -> None:
    """Raise InputError that names the first value of a checkpoint that does not fit the run whose own would be `expected`.

    States of optimizers and schedulers are not checked until there are optimizers.
    """
    check = _Check(where)
    for name in ("epoch", "global_step", "state_dict", *(name for name in AVERAGED if name in {**found, **expected})):
        check(found.get(name), expected.get(name), name)
    states = {name: (found["callbacks"].get(name), state) for name, state in expected["callbacks"].items() if name in OURS}
    for name, (state, own) in states.items():
        if name == "Checkpoints" and isinstance(state, Mapping):
            digests = state.get("contents", {})
            if not isinstance(digests, Mapping) or not all(
                    isinstance(parts, list) and all(isinstance(part, Tensor) and part.dtype == torch.int64 and part.dim() == 1
                                                    for part in parts) for parts in digests.values()):
                raise InputError(f"{where}: callbacks.Checkpoints.contents: found {shown(digests)}, expected digests")
            state, own = ({key: some.get(key) for key in ("rows", "validate")} for some in (state, own))
        check(state, own, f"callbacks.{name}")
    loops = {**expected["loops"]}
    fit, place = loops["fit_loop"], found["loops"].get("fit_loop")
    if isinstance(place, Mapping) and place.get("state_dict"):
        loops["fit_loop"] = {**fit, "state_dict": NEXT}
    check(found["loops"], loops, "loops")
    if optimizers:
        check(found["lr_schedulers"], expected["lr_schedulers"], "lr_schedulers")
        if len(found["optimizer_states"]) != len(optimizers):
            check.fail("optimizer_states", found["optimizer_states"], f"list of {len(optimizers)}")
        for number, (state, own, optimizer) in enumerate(
                zip(found["optimizer_states"], expected["optimizer_states"], optimizers)):
            _check_optimizer(check, state, own, optimizer, f"optimizer_states.{number}")


def check_weights(found: Any, expected: Mapping[str, Tensor], where: str) -> None:
    """Raise InputError unless weights have the names, shapes and types of `expected`; any float type fits any other."""
    _Check(where)(found, expected, "state_dict")


def _check_optimizer(check: "_Check", found: Any, expected: Mapping, optimizer: Optimizer, name: str) -> None:
    if not isinstance(found, Mapping) or {*found} != {"state", "param_groups"} or not isinstance(found["state"], Mapping):
        check.fail(name, found, "the state of an optimizer")
    groups = found["param_groups"] if isinstance(found["param_groups"], list) else []
    # Older checkpoints have no `turn_in`, and go on without: in float32, as they were.
    missing = {"turn_in"} if not any(isinstance(group, Mapping) and "turn_in" in group for group in groups) else set()
    owns = [{key: value for key, value in group.items() if key not in missing} for group in expected["param_groups"]]
    check(groups, owns, f"{name}.param_groups")
    parameters: dict[int, Tensor] = {}
    for number, (group, own, live) in enumerate(zip(groups, owns, optimizer.param_groups)):
        for key in own.keys() - {"lr"}:
            if not isinstance(own[key], Tensor) and group[key] != own[key]:
                check.fail(f"{name}.param_groups.{number}.{key}", group[key], shown(own[key]))
        parameters |= dict(zip(own["params"], live["params"]))
    for number, state in found["state"].items():
        if number not in parameters or not isinstance(state, Mapping):
            check.fail(f"{name}.state.{shown(number)}", state, "the state of a parameter")
        for key, value in state.items():
            own = parameters[number]
            if isinstance(value, Tensor):
                like = own.new_empty(()) if value.dim() == 0 else own
                check.tensor(value, like, f"{name}.state.{number}.{key}", any_dtype=True)
            elif not isinstance(value, int | float) or not math.isfinite(value):
                check.fail(f"{name}.state.{number}.{key}", value, "a finite number")
    for number, group in enumerate(expected["param_groups"]):
        if len({frozenset(found["state"][n]) for n in group["params"] if n in found["state"]}) > 1:
            raise InputError(f"{check.where}: {name}.state: found parameters of group {number} with entries that others lack")


class _Check:
    """Compares the structure of nested values with that expected: keys, lengths, types and shapes; all numbers must be finite."""

    def __init__(self, where: str):
        self.where = where

    def fail(self, name: str, found: Any, expected: str) -> None:
        raise InputError(f"{self.where}: {name}: found {shown(found)}, expected {expected}")

    def __call__(self, found: Any, expected: Any, name: str) -> None:
        if isinstance(expected, Tensor):
            self.tensor(found, expected, name)
        elif isinstance(expected, Mapping):
            if not isinstance(found, Mapping):
                self.fail(name, found, "a mapping")
            for key in sorted({*found} ^ {*expected}, key=str):
                self.fail(f"{name}.{key}" if isinstance(key, str | int) else name, found.get(key),
                          "none" if key in found else "one")
            for key, value in expected.items():
                self(found[key], value, f"{name}.{key}")
        elif isinstance(expected, list | tuple):
            if not isinstance(found, list | tuple) or len(found) != len(expected):
                self.fail(name, found, shown(expected))
            for number, (left, right) in enumerate(zip(found, expected)):
                self(left, right, f"{name}.{number}")
        elif isinstance(expected, bool | str | None):
            if type(found) is not type(expected):
                self.fail(name, found, shown(expected) if expected is None else type(expected).__name__)
        elif isinstance(expected, int):
            if type(found) is not int or not 0 <= found < MOST_COUNT:
                self.fail(name, found, "a count")
        elif isinstance(expected, float):
            if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
                self.fail(name, found, "a finite number")

    def tensor(self, found: Any, expected: Tensor, name: str, any_dtype: bool = False) -> None:
        if not isinstance(found, Tensor) or found.layout != torch.strided or found.device.type == "meta" or \
                found.shape != expected.shape:
            self.fail(name, found, shown(expected))
        # Any float type fits: a run in half precision saves its own, and the record compares the precision of runs.
        floats = found.is_floating_point() and expected.is_floating_point()
        if not (any_dtype or floats or found.dtype == expected.dtype):
            self.fail(name, found, shown(expected))
        if found.is_floating_point() and not bool(found.isfinite().all()):
            raise InputError(f"{self.where}: {name} holds values that are not finite")
