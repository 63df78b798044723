"""What mmtx uses of private parts of Lightning and torch: there, in this release, and of Lightning named in one file only."""

import ast
import importlib
import inspect
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.trainer.connectors.logger_connector import _LoggerConnector
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from mmtx.config import DecoderConfig
from mmtx.inference import int8, packed, screen
from mmtx.inference.row import RowEngine
from mmtx.inference.screen import FEW_ROWS
from mmtx.inference.weights import Weights
from mmtx.model import Decoder
from mmtx.sequence import Prompt
from mmtx.training import private

TRAINING = Path(private.__file__).parent
FILES = sorted(path for path in TRAINING.glob("*.py") if path.name not in ("private.py", "__init__.py"))

# Class, name, and the function of ours that needs it.
METHODS = [
    (LightningCLI, "_parse_ckpt_path", "PlainCLI"),
    (_FitLoop, "_should_accumulate", "ends_step"),
    (_TrainingEpochLoop, "_should_check_val_fx", "validation_due"),
    (_LoggerConnector, "update_train_step_metrics", "log_step_now"),
    (_SignalConnector, "_sigterm_notifier_fn", "on_signals"),
    (_SignalConnector, "_slurm_sigusr_handler_fn", "on_signals"),
    (_CheckpointConnector, "_parse_ckpt_path", "load_only_what_is_given"),
    (_SubprocessScriptLauncher, "_call_children_scripts", "launch_within"),
    (_CheckpointConnector, "restore_model", "before_restoring"),
    (_CheckpointConnector, "restore_training_state", "before_restoring"),
    (_CheckpointConnector, "dump_checkpoint", "state_now"),
]


@pytest.mark.parametrize("owner, name, user", METHODS, ids=lambda value: value if isinstance(value, str) else value.__name__)
def test_lightning_has_the_method(owner, name, user):
    assert callable(getattr(owner, name, None)), f"{owner.__name__}.{name} is gone: mend mmtx.training.private.{user}"
    assert name in inspect.getsource(getattr(private, user))


def test_a_trainer_has_the_attributes():
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    assert trainer._checkpoint_connector._loaded_checkpoint == {}
    assert hasattr(trainer.fit_loop, "_data_fetcher") and hasattr(trainer.fit_loop.epoch_loop.val_loop, "restarting")
    assert isinstance(trainer._signal_connector, _SignalConnector) and isinstance(trainer._logger_connector, _LoggerConnector)
    assert ModelParallelStrategy()._data_parallel_size == "auto"
    assert [DDPStrategy(start_method=name)._start_method for name in ("popen", "spawn")] == ["popen", "spawn"]


def test_sigterm_goes_to_the_handler():
    seen = []

    class Asked(LightningModule):
        def on_train_start(self):
            signal.raise_signal(signal.SIGTERM)
            self.trainer.should_stop = True

        def configure_optimizers(self):
            return None

        def training_step(self, batch, index):
            return None

    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                      enable_model_summary=False, max_steps=1)
    private.on_signals(trainer, lambda number, *_: seen.append(number), lambda number, *_: None)
    trainer.fit(Asked(), [0])
    assert seen == [signal.SIGTERM]


def test_weights_are_looked_at_before_they_are_taken():
    seen = []
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    private.before_restoring(trainer, seen.append)
    connector = trainer._checkpoint_connector
    connector.restore_model()
    assert not seen  # nothing was read
    connector._loaded_checkpoint = {"a": 1}

    def refuse(found):
        raise ValueError(found)

    private.before_restoring(trainer, refuse)
    for restore in (connector.restore_model, connector.restore_training_state):
        with pytest.raises(ValueError, match="'a': 1"):
            restore()
    assert not seen


def test_ranks_are_started_within_the_context():
    order = []

    class Launcher:
        def _call_children_scripts(self):
            order.append("start")

    class Around:
        def __enter__(self):
            order.append("enter")

        def __exit__(self, *_):
            order.append("exit")

    launcher = Launcher()
    private.launch_within(launcher, Around)
    launcher._call_children_scripts()
    assert order == ["enter", "start", "exit"]
    private.launch_within(None, Around)  # of one process there is no launcher


# What torch's own optimizers are made of, and mmtx.training's Muon and gradients: value of a list of one, given 2 (and 6).
ON_LISTS = {"_foreach_mul_": ((3.0,), 6.0), "_foreach_add_": (([torch.tensor(6.0)],), 8.0),
            "_foreach_lerp": (([torch.tensor(6.0)], 0.25), 3.0), "_foreach_lerp_": (([torch.tensor(6.0)], 0.25), 3.0)}


@pytest.mark.parametrize("name", ON_LISTS)
def test_torch_has_operations_on_lists(name):
    numbers, (arguments, expected) = [torch.tensor(2.0)], ON_LISTS[name]
    made = getattr(torch, name)(numbers, *arguments)
    assert (numbers if name.endswith("_") else made)[0] == expected


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_other_file_names_a_private_part(path):
    """Of a foreign object, or a method of Lightning's that a class of ours overrides."""
    ours = {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            # `os._exit`, torch's switch of an optimizer and its operations on lists are no parts of Lightning.
            assert own or node.attr in {*ours, "_exit", "_step_supports_amp_scaling", *ON_LISTS}, f"line {node.lineno}: {node.attr}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("attr"):
            named = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
            assert not named.startswith("_"), f"line {node.lineno}: {named}"
    module = importlib.import_module(f"mmtx.training.{path.stem}")
    for found in vars(module).values():
        if not inspect.isclass(found) or found.__module__ != module.__name__:
            continue
        for base in found.__mro__[1:]:
            if base.__module__.startswith("lightning"):
                common = {name for name in vars(found) if name.startswith("_") and not name.startswith("__")} & {*vars(base)}
                assert not common - {"_abc_impl"}, f"{found.__name__} overrides {common} of {base.__name__}"


# Operator, its arguments, and what of ours needs it.
OPERATORS = [
    ("onednn::qlinear_prepack", "(Tensor weight, int[]? x_shape) -> Tensor", "inference.screen.Screen"),
    ("onednn::qlinear_pointwise", "(Tensor qx, float x_scale, int x_zero_point, Tensor qw, Tensor w_scale, Tensor w_zero_point, "
     "Tensor? bias, float output_scale, int output_zero_point, ScalarType? output_dtype, str post_op_name, Scalar?[] post_op_args, "
     "str post_op_algorithm) -> Tensor", "inference.screen.Screen"),
    ("mkldnn::_reorder_linear_weight", "(Tensor self, int? batch_size=None) -> Tensor Y", "inference.packed.PackedMatrix"),
    ("mkldnn::_linear_pointwise", "(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm) -> Tensor Y",
     "inference.packed.PackedMatrix"),
    ("mkldnn::_linear_pointwise.binary", "(Tensor X, Tensor other, Tensor W, Tensor? B, str attr) -> Tensor Y",
     "inference.packed.PackedMatrix"),
    ("aten::_weight_int8pack_mm", "(Tensor self, Tensor mat2, Tensor scales) -> Tensor", "inference.int8.Int8Matrix"),
    ("aten::silu_backward.grad_input", "(Tensor grad_output, Tensor self, *, Tensor(a!) grad_input) -> Tensor(a!)", "kernels"),
]


@pytest.mark.parametrize("name, arguments, user", OPERATORS, ids=[name for name, *_ in OPERATORS])
def test_torch_has_the_operator(name, arguments, user):
    space, _, rest = name.partition("::")
    operator, _, overload = rest.partition(".")
    found = getattr(getattr(torch.ops, space), operator, None)
    assert found is not None, f"torch {torch.__version__} has no {name}: mend mmtx.{user}"
    schema = str(getattr(found, overload or "default")._schema)
    assert schema == name + arguments, f"torch {torch.__version__} has {schema}: mend mmtx.{user}"


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs a torch with oneDNN")
def test_the_operators_give_what_is_asked_of_them():
    told = f"torch {torch.__version__} computes otherwise: mend mmtx.inference."
    assert screen.has_operators(), f"{told}screen.Screen"
    assert int8.has_kernel(), f"{told}int8.Int8Matrix"
    assert packed.has_operators(), f"{told}packed.PackedMatrix"


def gone(*_):
    raise AttributeError("no such operator")


def wrong(*given):
    return torch.zeros(1, 2)


@pytest.mark.parametrize("other", [gone, wrong])
def test_without_the_operators_all_rows_are_read(other, monkeypatch):
    """A decoder writes the same ids where torch has lost or changed what a screen is made with."""
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(FEW_ROWS + 100, width=24, depth=1, heads=2, kv_heads=2, head_dim=16, mlp_dim=32)).requires_grad_(False)
    allowed, ids = torch.ones(1, FEW_ROWS + 90, dtype=torch.bool), []
    for broken in (False, True):
        screen.has_operators.cache_clear()
        if broken:
            monkeypatch.setattr(torch.ops.onednn, "qlinear_pointwise", other)
            assert not screen.has_operators() and not screen.Screen.pays()
        engine = RowEngine(decoder, Weights.of(decoder, fixed=True))
        engine.prefill([Prompt(np.arange(3))])
        found = []
        for _ in range(8):
            found.append(int(engine.best(allowed)))
            engine.step(torch.tensor(found[-1:]))
        ids.append(found)
    screen.has_operators.cache_clear()
    assert ids[0] == ids[1]
