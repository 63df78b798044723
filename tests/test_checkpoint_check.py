"""Resume checkpoints that are not what this run would write: each is one line that names the value."""

import copy
import hashlib
import io
import os
import zipfile
from pathlib import Path

import lightning
import pytest
import torch

from mmtx.errors import InputError
from mmtx.training.checkpoint import MAGIC, AtomicCheckpointIO
from mmtx.training.checkpoint_check import check_checkpoint, check_fits

MODULE = torch.nn.Linear(3, 2)
OPTIMIZER = torch.optim.AdamW(MODULE.parameters(), lr=0.5)
COUNT = {"ready": 2, "completed": 1}


def expected(steps: int = 0) -> dict:
    """What a trainer writes, before or after steps."""
    optimizer = copy.deepcopy(OPTIMIZER)
    if steps:
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    return {
        "epoch": 0, "global_step": steps, "pytorch-lightning_version": lightning.__version__,
        "state_dict": copy.deepcopy(MODULE.state_dict()), "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [{"last_epoch": steps, "_last_lr": [0.5], "lr_lambdas": [None]}],
        "loops": {"fit_loop": {"state_dict": {"combined_loader": [{"next": steps}]} if steps else {},
                               "epoch_progress": {"total": dict(COUNT), "last": False}}},
        "callbacks": {"SkipNonFinite": {"skipped": 0}, "Checkpoints": {
            "rows": 3, "validate": False, "contents": {"data.train": [torch.arange(3)]} if steps else {}},
            "Theirs": {"anything": steps}},
        "record": {"seed": 1},
    }


def check(found: dict) -> None:
    check_checkpoint(found, "a.ckpt")
    check_fits(found, expected(), [OPTIMIZER], "a.ckpt")


def test_what_the_run_itself_wrote_passes():
    check(expected(2))
    check_fits(expected(2), {**expected(), "optimizer_states": [], "lr_schedulers": []}, [], "a.ckpt")  # before they are made


def test_a_checkpoint_from_before_muon_had_a_dtype_passes():
    found, own = expected(2), expected()
    own["optimizer_states"][0]["param_groups"][0]["turn_in"] = torch.float32
    check_fits(found, own, [OPTIMIZER], "a.ckpt")
    found["optimizer_states"][0]["param_groups"][0]["turn_in"] = torch.bfloat16
    with pytest.raises(InputError, match="param_groups.0.turn_in: found torch.bfloat16, expected torch.float32"):
        check_fits(found, own, [OPTIMIZER], "a.ckpt")


OTHERS = [None, True, -1, 2**70, float("nan"), "x", b"y", [], {}, [1], {"a": 1}, torch.zeros(7), torch.tensor(float("nan")),
          torch.zeros(1).expand(10**9), torch.zeros(2, 3).to_sparse(), torch.empty(2, 3, device="meta")]
# Values of which one is as good as another for a run, and what is not of ours.
FREE = {("callbacks", "Theirs"), ("callbacks", "Theirs", "anything"), ("callbacks", "Checkpoints", "contents"),
        ("loops", "fit_loop", "state_dict"), ("record",), ("record", "seed"),
        ("optimizer_states", 0, "state"), ("optimizer_states", 0, "param_groups", 0, "lr")}


def places(value, place=()):
    yield place
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*place, key))


def alter(place: tuple, change) -> dict:
    found = expected(2)
    inner = found
    for key in place[:-1]:
        inner = inner[key]
    change(inner, place[-1])
    return found


ALL = [place for place in places(expected(2)) if place and place not in FREE]


@pytest.mark.parametrize("place", ALL, ids=lambda place: ".".join(map(str, place)))
def test_another_value_at_any_place_is_told_or_as_good(place):
    told = 0
    for value in OTHERS:
        try:
            check(alter(place, lambda inner, key: inner.__setitem__(key, value)))
        except InputError as error:
            assert str(error).startswith("a.ckpt: ") and "\n" not in str(error) and len(str(error)) < 500
            told += 1
    assert told >= len(OTHERS) - 5  # a count may be another count, a number another number


@pytest.mark.parametrize("place", [p for p in ALL if isinstance(p[-1], str) and p[0] not in ("record",)],
                         ids=lambda place: ".".join(map(str, place)))
def test_a_name_that_is_missing_or_another_is_told(place):
    if place[:2] == ("callbacks", "Checkpoints") and "contents" in place or "combined_loader" in place:
        return  # older checkpoints have no digests, and loaders of the user no state
    for change in (lambda inner, key: inner.pop(key), lambda inner, key: inner.__setitem__("other", inner.pop(key))):
        with pytest.raises(InputError, match="^a.ckpt: "):
            check(alter(place, change))


def sealed(path: Path, data: bytes) -> Path:
    path.write_bytes(data + MAGIC + hashlib.sha256(data).digest())
    return path


def test_files_that_are_no_checkpoint_are_told(tmp_path):
    good = io.BytesIO()
    torch.save(expected(2), good)
    packed = io.BytesIO()
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    older, evil = io.BytesIO(), io.BytesIO()
    torch.save(expected(2), older, _use_new_zipfile_serialization=False)
    torch.save({**expected(2), "evil": os.system}, evil)
    os.mkfifo(tmp_path / "pipe")
    io_ = AtomicCheckpointIO()
    for data in (b"", b"text", packed.getvalue(), older.getvalue(), evil.getvalue(), good.getvalue()[:-900]):
        with pytest.raises(InputError, match="a.ckpt: not a checkpoint of mmtx"):
            io_.load_checkpoint(sealed(tmp_path / "a.ckpt", data))
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero"), Path("a\0b")):
        with pytest.raises(InputError, match="is no file|null (byte|character)"):
            io_.load_checkpoint(path)
    io_.record = {"seed": 1}
    assert io_.load_checkpoint(sealed(tmp_path / "a.ckpt", good.getvalue()))["global_step"] == 2
    for name, value in (("pytorch-lightning_version", "1.0"), ("pytorch-lightning_version", "x"), ("record", None),
                        ("record", {"a": torch.ones(3)}), ("global_step", True)):
        other = io.BytesIO()
        torch.save({**expected(2), name: value}, other)
        with pytest.raises(InputError, match="a.ckpt: .*(lightning|record|global_step)"):
            io_.load_checkpoint(sealed(tmp_path / "a.ckpt", other.getvalue()))
