"""Linear layers in 4 bits a weight (NF4, https://arxiv.org/abs/2305.14314) through bitsandbytes (extra `qlora`), on CPUs too."""

from typing import Any

import torch
from torch import Tensor, nn

from mmtx.files import require
from mmtx.model import Decoder


def library() -> Any:
    return require("bitsandbytes", "qlora", "lora.load_in_4bit")


def quantize(decoder: Decoder) -> None:
    """Put layers of 4 bits in the place of all linear layers of a decoder's blocks, in the order of the blocks."""
    bitsandbytes = library()

    class Linear4bit(bitsandbytes.nn.Linear4bit):  # type: ignore[name-defined]
        """Is made anew from the start of a run, of which it is a function, and so is not part of checkpoints."""

        def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
            if self.bias is not None:
                destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()

        def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *_: Any) -> None:
            if self.bias is not None:
                self.bias.data.copy_(state[f"{prefix}bias"])

    for block in decoder.blocks:
        for name, layer in [(name, layer) for name, layer in block.named_modules() if isinstance(layer, nn.Linear)]:
            small = Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, quant_type="nf4", device="meta")
            small.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
            small.bias = layer.bias
            # On some CPUs a validation would lay the weights out anew, with rounded scales, and training would go on with these.
            small.support_avx512bf16_for_cpu = False
            parent, _, last = name.rpartition(".")
            setattr(block.get_submodule(parent), last, small.to(layer.weight.device))  # which makes the 4 bits
    decoder.is_loaded_in_4bit = True  # type: ignore[assignment]  # peft asks for it


def weight_of(layer: nn.Linear) -> Tensor:
    """The weight of a linear layer, of few bits or not, as numbers."""
    if (state := getattr(layer.weight, "quant_state", None)) is None:
        return layer.weight.detach()
    return library().functional.dequantize_4bit(layer.weight.data, state).to(torch.float32)


def size_of(parameter: nn.Parameter) -> int:
    """How many numbers a parameter stands for; two of 4 bits are one byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()
