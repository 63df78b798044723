"""AdamW, and Muon for the matrices inside blocks, with warm-up and linear decay to zero, for codecs and decoder alike."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from mmtx.errors import InputError
from mmtx.modality.vocoder import ConvNeXtBlock
from mmtx.model import Block, FusedLinear
from mmtx.schema import typed, within

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of the published method, for five iterations
BATCH_ELEMENTS = {"cpu": 2 ** 20, "cuda": 2 ** 25}  # orthogonalised as one batch: small matrices alone would take as long as all
GROUP_ELEMENTS = {"cpu": 2 ** 22, "cuda": 2 ** 27}  # whose updates are held at a time

Members = list[tuple[Tensor, tuple[int, ...]]]  # parameters, each with the numbers of rows of the matrices fused in it


@typed
@dataclass(frozen=True)
class OptimizerConfig:
    """Peak learning rates, with linear warm-up and linear decay to zero at the trainer's `max_steps`.

    Measured on the image codec of the starter data, 2.5 minutes each on one core: 21.5 dB with AdamW at 3e-3, 22.5 dB with Muon at
    8e-3.

    Args:
        learning_rate: peak rate of AdamW, which trains everything that Muon does not.
        muon_lr: peak rate of Muon, which then trains the matrices inside blocks; None: AdamW trains them, too.
        warmup_steps: steps of linear warm-up.
        weight_decay: decoupled weight decay of matrices; gains and biases have none.
        betas: AdamW's decay rates of the moment estimates.
    """

    learning_rate: float = 2e-3
    muon_lr: float | None = None
    warmup_steps: int = 50
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)

    def __post_init__(self):
        for name, most in (("learning_rate", 100), ("muon_lr", 100), ("weight_decay", 100), ("warmup_steps", 10**9)):
            if getattr(self, name) is not None:
                within(f"optimizer.{name}", getattr(self, name), 0, most)
        for beta in self.betas:
            if not 0 <= beta < 1:
                raise InputError(f"optimizer.betas: found {beta}, expected 0 or more, and less than 1")


class Muon(torch.optim.AdamW):
    """AdamW, in which groups with `parts` take orthogonalised momentum steps instead (Muon, with the step size of AdamW).

    Muon: https://kellerjordan.github.io/posts/muon; the scale of its steps: https://arxiv.org/abs/2502.16982.
    `torch.optim.Muon` does not know that a fused projection holds several matrices, and always computes in bfloat16, which is slow on
    CPUs that only emulate it. Here matrices are orthogonalised in the dtype `turn_in` of their group: bfloat16 in bfloat16 runs,
    where a step of the captioner took 85 ms instead of 131 (one core with AVX512-BF16), else float32; on a GPU always bfloat16.
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
            turned = [(parameter, sizes) for parameter, sizes in zip(group["params"], group.get("parts", ()))
                      if parameter.grad is not None]
            for members in memory_bounded_groups(turned):
                self._turn(members, group["lr"], group["weight_decay"],
                           group.get("turn_in", torch.float32))  # older checkpoints have none
        self.param_groups = [group for group in groups if "parts" not in group]
        try:
            super().step()
        finally:
            self.param_groups = groups
        return loss

    def _turn(self, members: Members, rate: float, decay: float, turn_in: torch.dtype) -> None:
        """Update parameters that consist of matrices with the given numbers of rows; equal shapes are orthogonalised together."""
        parameters = [parameter for parameter, _ in members]
        for parameter in parameters:
            if not self.state[parameter]:
                # AdamW's state always has a step, which loading a state expects.
                self.state[parameter].update(step=torch.zeros(()), momentum=torch.zeros_like(parameter))
        gradients = [cast(Tensor, parameter.grad) for parameter in parameters]
        momenta = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - self.momentum)
        updates = torch._foreach_lerp(gradients, momenta, self.momentum)
        torch._foreach_mul_(parameters, 1 - rate * decay)
        by_shape = defaultdict(list)
        for (parameter, sizes), update in zip(members, updates, strict=True):
            for matrix, part in zip(parameter.split(sizes), update.split(sizes), strict=True):
                by_shape[part.shape].append((matrix, part))
        for shape, pairs in by_shape.items():
            on, dtype = ("cuda", torch.bfloat16) if parameters[0].is_cuda else ("cpu", turn_in)
            # On one core of an Intel Xeon with AMX, 24 matrices of 192 x 192 take 12 ms together and 22 ms one by one.
            together = max(1, BATCH_ELEMENTS[on] // shape.numel()) if dtype == torch.bfloat16 else 1
            for first in range(0, len(pairs), together):
                matrices, chosen = zip(*pairs[first:first + together])
                turned = orthogonal(torch.stack(chosen), dtype).unbind() if together > 1 else [orthogonal(chosen[0], dtype)]
                torch._foreach_add_(matrices, turned, alpha=-0.2 * rate * max(shape) ** 0.5)


def memory_bounded_groups(turned: Members) -> Iterator[Members]:
    """Groups of parameters whose updates are held together: up to about GROUP_ELEMENTS elements."""
    members: Members = []
    numbers = 0
    for member in turned:
        members.append(member)
        numbers += member[0].numel()
        if numbers >= GROUP_ELEMENTS["cuda" if member[0].is_cuda else "cpu"]:
            yield members
            members, numbers = [], 0
    if members:
        yield members


def orthogonal(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Matrices (n, m) or (k, n, m) -> nearly the nearest ones with all singular values 1, by Newton-Schulz iteration in `dtype`."""
    a, b, c = NEWTON_SCHULZ
    addmm = torch.addmm if matrices.dim() == 2 else torch.baddbmm
    x = matrices.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = addmm(x, addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def configure(module: nn.Module, config: OptimizerConfig, max_steps: int, more: Sequence[dict] = (),
              scaled: Sequence[nn.Parameter] = (), ratio: float = 1.0, precision: str = "32-true") -> OptimizerLRSchedulerConfig:
    """The return value of `LightningModule.configure_optimizers`; weight decay applies to matrices, not to gains and biases.

    `more` are parameter groups with learning rates of their own, for parameters outside `module` or some of its own. For `scaled`
    parameters (mup.py), AdamW's rate is multiplied by `ratio` and Muon's by its square root; the decay per step stays the same.
    `precision` is the trainer's.
    """
    turn_in = torch.bfloat16 if precision.startswith("bf16") else torch.float32
    apart = {p for group in more for p in group["params"]}
    parts = {}
    if config.muon_lr is not None:
        for block in (m for m in module.modules() if isinstance(m, (Block, ConvNeXtBlock))):
            for linear in (m for m in block.modules() if isinstance(m, nn.Linear)):
                if linear.weight.requires_grad and linear.weight not in apart:
                    parts[linear.weight] = linear.sizes if isinstance(linear, FusedLinear) else (linear.out_features,)
    rest = [p for p in module.parameters() if p.requires_grad and p not in parts and p not in apart]
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
                           "weight_decay": config.weight_decay / factor_of, "turn_in": turn_in})
    optimizer = Muon([*groups, *more], lr=config.learning_rate, betas=config.betas, fused=True)
    # Otherwise the trainer would leave unscaling gradients to the fused step, and not clip them in mixed precision.
    optimizer._step_supports_amp_scaling = False

    def factor(step: int) -> float:
        return min((step + 1) / max(1, config.warmup_steps), max(0.0, 1 - step / max_steps))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
