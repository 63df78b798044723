"""Sharded training (FSDP2): each process holds a shard of every weight, of its gradient and of its optimizer state."""

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

FULL_STATE_DICT = StateDictOptions(full_state_dict=True, cpu_offload=True)  # rank 0 gets everything, the others nothing


class Sharded(ModelParallelStrategy):
    """Lightning's strategy for FSDP2 over all processes, with the same checkpoint format as any other run.

    Lightning's own checkpoints of it are a folder, or a file, that bypasses the trainer's `CheckpointIO`: nothing would notice
    a kill during a write. Here rank 0 gathers everything into one file, which all ranks read.
    """

    def __init__(self):
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        share_among_all(self)
        super().setup_environment()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return get_optimizer_state_dict(self.model, getattr(optimizer, "optimizer", optimizer), options=FULL_STATE_DICT)

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
    """Shard the weights of rank 0 across the processes of a mesh, block by block."""
    decoder.to(mesh.device_type)
    for parameter in decoder.parameters():
        broadcast(parameter.data, 0)
    for module in (*decoder.blocks, decoder):
        fully_shard(module, mesh=mesh)


@contextmanager
def gathered(module: LightningModule) -> Iterator[None]:
    """In this context, a sharded `module.decoder` is an unsharded copy on rank 0; all ranks must enter it together."""
    decoder: Decoder = getattr(module, "decoder", None)
    if not isinstance(decoder, FSDPModule):
        yield
        return
    if weights := get_model_state_dict(decoder, options=FULL_STATE_DICT):
        module.decoder = Decoder(decoder.config, build_encoder).to(module.device).train(decoder.training)
        module.decoder.load_state_dict(weights)
    try:
        yield
    finally:
        module.decoder = decoder


def full(tensor: Tensor) -> Tensor:
    """A tensor, gathered if it is sharded; all ranks must call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
