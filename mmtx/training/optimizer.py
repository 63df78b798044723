"""AdamW with warm-up and linear decay to zero, for codecs and decoder alike."""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class OptimizerConfig:
    """Peak learning rate, and how it gets there and back to zero at the trainer's `max_steps`."""

    learning_rate: float = 2e-3
    warmup_steps: int = 50
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)


def configure(module: nn.Module, config: OptimizerConfig, max_steps: int) -> dict:
    """What `LightningModule.configure_optimizers` returns. Only matrices decay, not gains and biases."""
    matrices = [p for p in module.parameters() if p.requires_grad and p.dim() > 1]
    others = [p for p in module.parameters() if p.requires_grad and p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)

    def factor(step: int) -> float:
        return min((step + 1) / max(1, config.warmup_steps), max(0.0, 1 - step / max_steps))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
