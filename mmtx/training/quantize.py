"""Linear layers in 4 bits a weight (NF4, https://arxiv.org/abs/2305.14314) through bitsandbytes (extra `qlora`), on CPUs too."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from mmtx.files import require
from mmtx.model import Decoder


def library() -> Any:
    return require("bitsandbytes", "qlora", "lora.load_in_4bit")


def quantize(decoder: Decoder) -> None:
    """Put layers of 4 bits in the place of all linear layers of a decoder's blocks that have more, in the order of the blocks."""
    for number, block in enumerate(decoder.blocks):
        for name, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear):
                quantize_layer(decoder, f"blocks.{number}.{name}.weight")
    decoder.is_loaded_in_4bit = True  # type: ignore[assignment]  # peft asks for it


def quantize_layer(decoder: Decoder, name: str) -> None:
    """Put a layer of 4 bits in the place of the one whose weight has this name, if it is one of a block and has more."""
    at = name.removesuffix(".weight")
    layer = decoder.get_submodule(at) if at != name and name.startswith("blocks.") else None
    if not isinstance(layer, nn.Linear) or hasattr(layer.weight, "quant_state"):
        return
    small = _layer_type()(layer.in_features, layer.out_features, layer.bias is not None, quant_type="nf4", device="meta")
    small.weight = library().nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
    small.bias = layer.bias
    # On some CPUs a validation would lay the weights out anew, with rounded scales, and training would go on with these.
    small.support_avx512bf16_for_cpu = False
    parent, _, last = at.rpartition(".")
    setattr(decoder.get_submodule(parent), last, small.to(layer.weight.device))  # which makes the 4 bits


@cache
def _layer_type() -> Any:
    class Linear4bit(library().nn.Linear4bit):  # type: ignore[misc]
        """Is made anew from the start of a run, of which it is a function, and so is not part of checkpoints."""

        def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
            if self.bias is not None:
                destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()

        def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *_: Any) -> None:
            if self.bias is not None:
                self.bias.data.copy_(state[f"{prefix}bias"])

    return Linear4bit


def weight_of(layer: nn.Linear) -> Tensor:
    """The weight of a linear layer, of few bits or not, as numbers."""
    if (state := getattr(layer.weight, "quant_state", None)) is None:
        return layer.weight.detach()
    return library().functional.dequantize_4bit(layer.weight.data, state).to(torch.float32)


def size_of(parameter: nn.Parameter) -> int:
    """How many numbers a parameter stands for; two of 4 bits are one byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()
