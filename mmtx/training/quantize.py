"""Linear layers with 4-bit weights (NF4, https://arxiv.org/abs/2305.14314) through bitsandbytes (extra `qlora`), also on CPUs."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from mmtx.extras import require
from mmtx.model import Decoder


def library() -> Any:
    return require("bitsandbytes", "qlora", "lora.load_in_4bit")


def quantize(decoder: Decoder) -> None:
    """Replace all linear layers in a decoder's blocks that are not yet 4-bit by 4-bit ones, block by block."""
    for number, block in enumerate(decoder.blocks):
        for name, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear):
                quantize_layer(decoder, f"blocks.{number}.{name}.weight")
    decoder.is_loaded_in_4bit = True  # type: ignore[assignment]  # peft asks for it


def quantize_layer(decoder: Decoder, name: str) -> None:
    """Replace the layer whose weight has this name by a 4-bit one, if it is a linear layer of a block and not yet 4-bit."""
    at = name.removesuffix(".weight")
    layer = decoder.get_submodule(at) if at != name and name.startswith("blocks.") else None
    if not isinstance(layer, nn.Linear) or hasattr(layer.weight, "quant_state"):
        return
    small = _layer_type()(layer.in_features, layer.out_features, layer.bias is not None, quant_type="nf4", device="meta")
    small.weight = library().nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
    small.bias = layer.bias
    # Otherwise, on some CPUs a validation would repack the weights with rounded scales, and training would continue with these.
    small.support_avx512bf16_for_cpu = False
    parent, _, last = at.rpartition(".")
    setattr(decoder.get_submodule(parent), last, small.to(layer.weight.device))  # which quantizes


@cache
def _layer_type() -> Any:
    class Linear4bit(library().nn.Linear4bit):  # type: ignore[misc]
        """Leaves its weight out of checkpoints, since a resumed run quantizes it again from `init_from`."""

        def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
            if self.bias is not None:
                destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()

        def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *_: Any) -> None:
            if self.bias is not None:
                self.bias.data.copy_(state[f"{prefix}bias"])

    return Linear4bit


def weight_of(layer: nn.Linear) -> Tensor:
    """The weight of a linear layer, dequantized to float32 if it is 4-bit."""
    if (state := getattr(layer.weight, "quant_state", None)) is None:
        return layer.weight.detach()
    return library().functional.dequantize_4bit(layer.weight.data, state).to(torch.float32)


def size_of(parameter: nn.Parameter) -> int:
    """The number of values in a parameter, where one byte holds two 4-bit values."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()
