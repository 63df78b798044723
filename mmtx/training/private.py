"""Private parts of Lightning that mmtx depends on: each use in one function, with the reason.

No other file names a private part of Lightning. `tests/test_private.py` checks that, and fails with the name of a function
if a release of Lightning lacks what the function needs.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from lightning import Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy


class PlainCLI(LightningCLI):
    """Lightning's command line without configuration from checkpoints.

    Lightning reads any file that `--ckpt_path` names, sound or not, and lets the hyperparameters in it override the user's
    options.
    """

    def _parse_ckpt_path(self) -> None:
        pass


def data_of(trainer: Trainer) -> Any:
    """The data module of a run, or None if it was given plain loaders. The trainer has the attribute, but does not declare it."""
    return trainer.datamodule  # type: ignore[attr-defined]


def ends_step(trainer: Trainer) -> bool:
    """Whether the optimizer has taken a step after this batch.

    With `accumulate_grad_batches`, `global_step` shows that only by comparison with its previous value.
    """
    return not trainer.fit_loop._should_accumulate()


def validation_due(trainer: Trainer) -> bool:
    """Whether a validation follows this batch; the checkpoint before it must record that, and no hook runs in between."""
    loop = trainer.fit_loop
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def validate_now(trainer: Trainer) -> None:
    """Run the validation that a checkpoint was written just before: a trainer that resumes from it takes it as done."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.restarting, trainer.validating = False, True
    loop.run()
    trainer.training = True


def log_step_now(trainer: Trainer) -> None:
    """Pass the metrics of this step to the loggers, before a checkpoint counts their rows.

    The trainer does so only after the last hook of a step; a kill in between would lose the row. It does not do so again,
    unless a hook has added metrics.
    """
    connector = trainer._logger_connector
    connector.update_train_step_metrics()
    logged = {*connector.metrics["log"]}

    def rest() -> None:
        del connector.update_train_step_metrics  # which restores the method of the class
        if {*connector.metrics["log"]} != logged:
            connector.update_train_step_metrics()

    connector.update_train_step_metrics = rest  # type: ignore[method-assign]


def on_signals(trainer: Trainer, end: Callable[..., None], requeue: Callable[..., None]) -> None:
    """Let `end` handle SIGTERM instead of the trainer, and `requeue` the signal with which SLURM announces the end of a job.

    Call it before the trainer registers handlers, which is after all `setup` hooks. The trainer's own handler of SIGTERM starts a
    collective operation inside the signal handler, while other ranks may be in another one: then all ranks deadlock. It also ends
    training with status 0, and does not end a validation. That of SLURM writes a checkpoint in the middle of a step, and goes on.
    """
    trainer._signal_connector._sigterm_notifier_fn = end  # type: ignore[method-assign]
    trainer._signal_connector._slurm_sigusr_handler_fn = requeue  # type: ignore[method-assign]


def load_only_what_is_given(trainer: Trainer) -> None:
    """Let the trainer load the checkpoint that it is given, or none.

    On a SLURM cluster it would load any hpc_ckpt_N.ckpt in the output folder instead of none.
    """
    trainer._checkpoint_connector._parse_ckpt_path = lambda _, path, **more: path  # type: ignore[method-assign]


def launch_within(launcher: Any, around: Callable[[], AbstractContextManager]) -> None:
    """Start the other ranks inside a context, which determines the signal state that they inherit."""
    if start := getattr(launcher, "_call_children_scripts", None):
        def wrapped() -> None:
            with around():
                start()

        launcher._call_children_scripts = wrapped


def before_restoring(trainer: Trainer, check: Callable[[Mapping[str, Any]], None]) -> None:
    """Call `check` with a checkpoint that was read, before its weights and again before the rest of it are restored.

    Hooks of callbacks and modules run too late, when part of it has been restored, or do not see all of it.
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
    """The content of a checkpoint written now, to compare with one that was read; `save_checkpoint` can only write it."""
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)


def copies_this_process(strategy: Strategy) -> bool:
    """Whether a strategy's other processes are spawned or forked from this one, instead of running the same command.

    They then wait for one another without end, or for an address that this process holds.
    """
    return getattr(strategy, "_start_method", "popen") not in (None, "popen")


def share_among_all(strategy: ModelParallelStrategy) -> None:
    """Let a strategy shard weights across all processes, whose number is not yet known when it is constructed."""
    strategy._data_parallel_size = strategy.num_nodes * strategy.num_processes
