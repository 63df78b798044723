"""The choice of the engine: the only module that knows all of them."""

from importlib.util import find_spec

from mmtx.inference.engine import Engine
from mmtx.inference.graph_engine import GraphEngine
from mmtx.inference.row import RowEngine
from mmtx.inference.torch_engine import TorchEngine
from mmtx.inference.weights import Weights
from mmtx.model import Decoder

# Everything chosen has run on a GPU. Captured prompts and choices, and our kernels for many rows, have not: `make gpu` tests them.
CAPTURE_ALL = False


def has_triton() -> bool:
    """Whether Triton is installed, which comes with torch for the GPUs that it supports."""
    return find_spec("triton") is not None


def choose_engine(decoder: Decoder, weights: Weights | None, rows: int) -> Engine:
    """The fastest engine for a batch of so many rows; `weights` are those of the decoder, if they were made before."""
    weights = weights or Weights.of(decoder)
    if weights.output.is_cuda and not weights.in_8_bits:
        if has_triton():
            from mmtx.inference.fused_engine import MOST_ROWS, FusedEngine, fits, works

            if rows <= MOST_ROWS and fits(weights) and works(weights.output.device):
                return FusedEngine(decoder, weights, CAPTURE_ALL)
        return GraphEngine(decoder, weights, capture_all=CAPTURE_ALL)
    if not RowEngine.fits(weights):
        return TorchEngine(decoder, weights)
    return RowEngine(decoder, weights) if rows == 1 else TorchEngine(decoder, weights, single_row=RowEngine.of)
