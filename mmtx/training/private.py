"""What mmtx uses of Lightning that Lightning does not promise to keep: each part in one function, with the reason.

No other file names a private part of Lightning. `tests/test_private.py` checks that, and fails by the name of the function
where a release of Lightning lacks what one of them needs.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from lightning import Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import ModelParallelStrategy


class PlainCLI(LightningCLI):
    """The stock command line, which takes no configuration out of checkpoints.

    The stock one reads any file that `--ckpt_path` names, sound or not, and lets the hyperparameters in it override what
    the user has said.
    """

    def _parse_ckpt_path(self) -> None:
        pass


def data_of(trainer: Trainer) -> Any:
    """The data module of a run; None where it was given loaders alone. The trainer has it without declaring it."""
    return trainer.datamodule  # type: ignore[attr-defined]


def ends_step(trainer: Trainer) -> bool:
    """Whether the optimizer has taken a step after this batch.

    With `accumulate_grad_batches`, `global_step` tells that only by comparison with what it was before.
    """
    return not trainer.fit_loop._should_accumulate()


def validation_due(trainer: Trainer) -> bool:
    """Whether a validation follows this batch: the checkpoint before it must know, and no hook comes between the two."""
    loop = trainer.fit_loop
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def validate_now(trainer: Trainer) -> None:
    """Run the validation that a checkpoint was written before: the trainer that goes on with it takes it for done."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.restarting, trainer.validating = False, True
    loop.run()
    trainer.training = True


def log_step_now(trainer: Trainer) -> None:
    """Hand the metrics of this step to the loggers, before a checkpoint counts their rows.

    The trainer does so after the last hook of a step; a kill in between would lose the row. It is kept from doing so again,
    if no hook has added anything.
    """
    connector = trainer._logger_connector
    connector.update_train_step_metrics()
    logged = {*connector.metrics["log"]}

    def rest() -> None:
        del connector.update_train_step_metrics  # from now on the method of the class
        if {*connector.metrics["log"]} != logged:
            connector.update_train_step_metrics()

    connector.update_train_step_metrics = rest  # type: ignore[method-assign]


def on_sigterm(trainer: Trainer, handle: Callable[..., None]) -> None:
    """Let `handle` have SIGTERM in place of the trainer; to be called before it registers its handlers, after all `setup`.

    The trainer's own handler starts a collective operation within the signal handler, where other ranks may be in another
    one: then all wait for each other forever. It ends a training with status 0, and a validation not at all.
    """
    trainer._signal_connector._sigterm_notifier_fn = handle  # type: ignore[method-assign]


def launch_within(launcher: Any, around: Callable[[], AbstractContextManager]) -> None:
    """Start the other ranks within a context: what they inherit of signals is decided there."""
    if start := getattr(launcher, "_call_children_scripts", None):
        def wrapped() -> None:
            with around():
                start()

        launcher._call_children_scripts = wrapped


def before_restoring(trainer: Trainer, check: Callable[[Mapping[str, Any]], None]) -> None:
    """Call `check` with a checkpoint that was read, before the weights and before the rest of it are taken over.

    The hooks of callbacks and modules come too late, when some of it has been, or do not see all of it.
    """
    connector = trainer._checkpoint_connector

    def guarded(restore: Callable[[], None]) -> Callable[[], None]:
        def wrapped() -> None:
            if connector._loaded_checkpoint:
                check(connector._loaded_checkpoint)
            restore()

        return wrapped

    connector.restore_model = guarded(connector.restore_model)  # type: ignore[method-assign]
    connector.restore_training_state = guarded(connector.restore_training_state)  # type: ignore[method-assign]


def state_now(trainer: Trainer) -> dict[str, Any]:
    """What a checkpoint written now would hold, to compare one that was read with; `save_checkpoint` only writes it."""
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)


def share_among_all(strategy: ModelParallelStrategy) -> None:
    """Let a strategy share weights out among all processes; asked at its construction, their number is not yet known."""
    strategy._data_parallel_size = strategy.num_nodes * strategy.num_processes
