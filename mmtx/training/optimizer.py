"""AdamW, and Muon for the matrices inside blocks, with warm-up and linear decay to zero, for codecs and decoder alike."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from mmtx.modality.vocoder import ConvNeXtBlock
from mmtx.model import Block, FusedLinear

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of the published method, for five rounds


@dataclass(frozen=True)
class OptimizerConfig:
    """Peak learning rates, and how they get there and back to zero at the trainer's `max_steps`.

    `muon_lr` is the learning rate of the matrices inside blocks, which are then trained with Muon; without
    it, and for everything else, AdamW does the work. Measured on the image codec of the starter data, 2.5 minutes
    each on one core: 21.5 dB with AdamW at 3e-3, 22.5 dB with Muon at 8e-3.
    """

    learning_rate: float = 2e-3
    muon_lr: float | None = None
    warmup_steps: int = 50
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)


class Muon(torch.optim.AdamW):
    """AdamW whose groups with `parts` take orthogonalised momentum steps instead (Muon, with the step size of AdamW).

    Muon: https://kellerjordan.github.io/posts/muon; the scale of its steps: https://arxiv.org/abs/2502.16982.
    `torch.optim.Muon` always computes in bfloat16, which took 0.67 s for a codec's matrices on a CPU where this takes
    about 0.05 s, and cannot see that a fused projection holds several matrices.
    """

    momentum = 0.95

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]  # a loss is a tensor
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        for group in groups:
            for parameter, sizes in zip(group["params"], group.get("parts", ())):
                if parameter.grad is not None:
                    self._turn(parameter, sizes, group["lr"], group["weight_decay"])
        self.param_groups = [group for group in groups if "parts" not in group]
        try:
            super().step()
        finally:
            self.param_groups = groups
        return loss

    def _turn(self, parameter: Tensor, sizes: tuple[int, ...], rate: float, decay: float) -> None:
        state = self.state[parameter]
        if not state:
            # AdamW's state always has a step, and loading a state looks for it.
            state.update(step=torch.zeros(()), momentum=torch.zeros_like(parameter))
        momentum = state["momentum"].lerp_(parameter.grad, 1 - self.momentum)
        update = parameter.grad.lerp(momentum, self.momentum)
        parameter.mul_(1 - rate * decay)
        for matrix, part in zip(parameter.split(sizes), update.split(sizes), strict=True):
            matrix.add_(orthogonal(part), alpha=-0.2 * rate * max(part.shape) ** 0.5)


def orthogonal(matrix: Tensor) -> Tensor:
    """A matrix (n, m) -> nearly the nearest one whose singular values are all 1, by Newton-Schulz rounds."""
    a, b, c = NEWTON_SCHULZ
    x = matrix.bfloat16() if matrix.is_cuda else matrix
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)


def configure(module: nn.Module, config: OptimizerConfig, max_steps: int, more: Sequence[dict] = (),
              scaled: Sequence[nn.Parameter] = (), ratio: float = 1.0) -> OptimizerLRSchedulerConfig:
    """What `LightningModule.configure_optimizers` returns. Only matrices decay, not gains and biases.

    `more` are parameter groups of what trains beside `module`, with learning rates of their own. Of `scaled` (mup.py), AdamW's rate
    is multiplied by `ratio` and Muon's by its root; what a step decays stays as it is.
    """
    parts = {}
    if config.muon_lr is not None:
        for block in (m for m in module.modules() if isinstance(m, (Block, ConvNeXtBlock))):
            for linear in (m for m in block.modules() if isinstance(m, nn.Linear) and m.weight.requires_grad):
                parts[linear.weight] = linear.sizes if isinstance(linear, FusedLinear) else (linear.out_features,)
    rest = [p for p in module.parameters() if p.requires_grad and p not in parts]
    slower = set(scaled)
    plain, rated = ([p for p in rest if (p in slower) is chosen] for chosen in (False, True))
    groups = [
        {"params": [p for p in plain if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in plain if p.dim() < 2], "weight_decay": 0.0},
    ]
    if rated:
        groups += [{"params": [p for p in rated if p.dim() > 1], "weight_decay": config.weight_decay / ratio,
                    "lr": config.learning_rate * ratio},
                   {"params": [p for p in rated if p.dim() < 2], "weight_decay": 0.0, "lr": config.learning_rate * ratio}]
    for factor_of, turned in ((1.0, [p for p in parts if p not in slower]), (ratio ** 0.5, [p for p in parts if p in slower])):
        if turned:
            groups.append({"params": turned, "parts": [parts[p] for p in turned], "lr": config.muon_lr * factor_of,
                           "weight_decay": config.weight_decay / factor_of})
    optimizer = Muon([*groups, *more], lr=config.learning_rate, betas=config.betas, fused=True)
    # Or the trainer would leave the gradients of a scaled loss to the fused step, and clip none in mixed precision.
    optimizer._step_supports_amp_scaling = False

    def factor(step: int) -> float:
        return min((step + 1) / max(1, config.warmup_steps), max(0.0, 1 - step / max_steps))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
