"""Numerical health of a run: steps that would ruin the weights are skipped, and early signs of divergence are logged.

Shapes: N tokens of a batch, M supervised tokens, D width.
"""

import sys
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from mmtx.errors import InputError
from mmtx.training.decoder import DecoderModule
from mmtx.training.module import of_all_ranks
from mmtx.training.private import data_of, ends_step
from mmtx.training.sharding import full

NAMED = 8  # most samples named in an error message


class SkipNonFinite(Callback):
    """Skips optimizer steps whose loss or gradient is not finite on some rank; ends the run after `limit` in a row.

    Logs `train/gradient_norm`, before clipping, and `train/skipped`, the number of skipped steps so far.
    """

    def __init__(self, limit: int = 10):
        self.limit = limit
        self.skipped = self.in_a_row = 0
        self.losses: list[tuple[Any, int, Tensor]] = []  # batch, its index, and whether its loss was finite

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, index: int) -> None:
        if index % trainer.accumulate_grad_batches == 0:
            self.losses = []
        self.batch = batch, index

    def on_before_backward(self, trainer: Trainer, module: LightningModule, loss: Tensor) -> None:
        self.losses.append((*self.batch, loss.detach().isfinite()))

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        self.norm = full(torch.nn.utils.get_total_norm(gradients))
        finite = torch.stack([self.norm.isfinite(), *(finite for *_, finite in self.losses)]).all()
        if trainer.strategy.reduce_boolean_decision(bool(finite), all=True):
            self.in_a_row = 0
            return
        # Without gradients the optimizer changes neither weights nor state.
        for parameter in module.parameters():
            parameter.grad = None
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row >= self.limit:
            raise InputError(f"step {trainer.global_step + 1}: loss or gradient is not finite, for "
                             f"{self.in_a_row} steps in a row; samples of the batch: {self._names(trainer)}")

    def _names(self, trainer: Trainer) -> str:
        """Samples, on all ranks, of the batches whose loss is not finite or, if there are none, of all batches of the step."""
        own = [(name, bool(finite)) for batch, index, finite in self.losses for name in self._samples(trainer, batch, index)]
        found = [each for rank in of_all_ranks(own) for each in rank]
        names = list(dict.fromkeys([name for name, finite in found if not finite] or [name for name, _ in found]))
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        return ", ".join(names[:NAMED]) + more

    @staticmethod
    def _samples(trainer: Trainer, batch: Any, index: int) -> list[str]:
        name = getattr(data_of(trainer), "sample_names", None)
        return name(batch) if name else [f"batch {index}"]

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self.skipped and trainer.is_global_zero:
            print(f"mmtx: {self.skipped} of {trainer.global_step} steps were skipped, since their loss or gradient was not finite",
                  file=sys.stderr)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if module.automatic_optimization and ends_step(trainer):
            # The module scales the summed gradients only after `on_before_optimizer_step` has measured them here.
            module.log("train/gradient_norm", self.norm * getattr(module, "gradient_scale", 1.0))
            module.log("train/skipped", torch.full((), float(self.skipped), device=module.device))  # a float would be copied


class Telemetry(Callback):
    """Logs early signs of divergence: log-sum-exp of the logits, and norm of the hidden states before the final RMSNorm.

    Chameleon (https://arxiv.org/abs/2405.09818) saw both grow long before the loss. Loss and share of the targets of each
    modality are logged too, all every `log_every_n_steps` of the trainer; never if that is 0.
    """

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        if isinstance(module, DecoderModule):
            module.decoder.blocks[-1].register_forward_hook(self._see)

    def _see(self, block: torch.nn.Module, inputs: tuple, output: Tensor) -> None:
        self.hidden = output.detach()                         # (1, N, D)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, index: int,
                           ) -> None:
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # exists, but is not declared
        if not isinstance(module, DecoderModule) or not every or trainer.global_step % every:
            return
        loss, log_sum = module.seen                           # (M,) each
        module.log("train/log_sum_exp", log_sum.mean())
        module.log("train/last_norm", self.hidden.float().norm(dim=-1).mean())
        for number, modality in enumerate(module.vocabulary.modality_names):
            chosen = batch.modality == number
            if chosen.any():
                module.log(f"train/loss_{modality}", loss[chosen].mean())
            module.log(f"train/share_{modality}", chosen.float().mean())
