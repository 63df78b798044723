"""Sharded training: each process holds a share of every weight, of its gradient and of its optimizer state (FSDP2)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor
from torch.distributed import broadcast
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from mmtx.modality.encoder import build_encoder
from mmtx.model import Decoder
from mmtx.training.checkpoint_check import check_weights
from mmtx.training.private import share_among_all

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # rank 0 gets all, the others get nothing


class Sharded(ModelParallelStrategy):
    """Lightning's strategy for FSDP2 over all processes, with the checkpoints of any other run.

    Its own are a folder, or a file, that it neither writes nor reads through the `CheckpointIO` of the trainer: nothing
    would notice a kill within a write. Here rank 0 gathers everything in one file, and all ranks read it.
    """

    def __init__(self):
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        share_among_all(self)
        super().setup_environment()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return get_optimizer_state_dict(self.model, getattr(optimizer, "optimizer", optimizer), options=WHOLE)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint = self.checkpoint_io.load_checkpoint(self.broadcast(checkpoint_path))
        check_weights(checkpoint["state_dict"], self.model.state_dict(), str(checkpoint_path))
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self.model, checkpoint["state_dict"], options=options)
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            set_optimizer_state_dict(self.model, optimizer, state, options=options)
        return checkpoint


StrategyRegistry.register("sharded", Sharded)


def shard(decoder: Decoder, mesh: DeviceMesh) -> None:
    """Share out the weights that rank 0 has, block by block, among the processes of a mesh."""
    decoder.to(mesh.device_type)
    for parameter in decoder.parameters():
        broadcast(parameter.data, 0)
    for module in (*decoder.blocks, decoder):
        fully_shard(module, mesh=mesh)


@contextmanager
def whole(module: LightningModule) -> Iterator[None]:
    """Within, a sharded `module.decoder` is on rank 0 a copy with all weights; to be entered by all ranks at once."""
    decoder: Decoder = getattr(module, "decoder", None)
    if not isinstance(decoder, FSDPModule):
        yield
        return
    if weights := get_model_state_dict(decoder, options=WHOLE):
        module.decoder = Decoder(decoder.config, build_encoder).to(module.device).train(decoder.training)
        module.decoder.load_state_dict(weights)
    try:
        yield
    finally:
        module.decoder = decoder


def full(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded as one that is not; to be called by all ranks at once."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
