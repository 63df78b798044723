"""LoRA through peft (extra `lora`): a decoder is frozen; low-rank adapters and the embedding rows of new ids train."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmtx.embedding import TokenEmbedding
from mmtx.errors import InputError
from mmtx.extras import require
from mmtx.files import write_whole
from mmtx.interop.families import BLOCK, sizes_of
from mmtx.modality.encoder import build_encoder
from mmtx.model import Decoder
from mmtx.schema import typed, within
from mmtx.training.quantize import quantize, size_of, weight_of
from mmtx.weights import Runs, file_parts, weights_of

NAME = "default"  # of the adapter in peft
TARGETS = {"attention": ("qkv", "out"), "feed_forward": ("gate_up", "down")}


@typed
@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters (https://arxiv.org/abs/2106.09685) of a decoder that starts from a finished model.

    Args:
        rank: inner dimension of an adapter.
        alpha: adapters are scaled by alpha / rank.
        dropout: probability of dropout on the inputs of adapters.
        parts: layers of each block that get adapters: "attention", "feed_forward"; with none, only projections of features, encoders
            and new rows train, as in the first of two stages.
        new_rows: also train the rows of ids that are not text, without which a model never learns what the codes of a picture mean.
        rank_stabilized: scale by alpha / sqrt(rank) instead.
        load_in_4bit: keep the linear layers of blocks in 4 bits per weight (QLoRA).
        freeze_encoder: also freeze the decoder's encoders.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    parts: tuple[str, ...] = ("attention", "feed_forward")
    new_rows: bool = True
    rank_stabilized: bool = False
    load_in_4bit: bool = False
    freeze_encoder: bool = False

    def __post_init__(self):
        object.__setattr__(self, "parts", tuple(self.parts))
        within("lora.rank", self.rank, 1, 2**12)
        if not 0 < self.alpha < math.inf:
            raise InputError(f"lora.alpha: found {self.alpha}, expected a finite number of more than 0")
        if not 0 <= self.dropout < 1:
            raise InputError(f"lora.dropout: found {self.dropout}, expected 0 or more, and less than 1")
        if not {*self.parts} <= TARGETS.keys():
            raise InputError(f"lora.parts: found {', '.join(self.parts)}, expected some of {', '.join(TARGETS)}, or none")


def adapt(decoder: Decoder, lora: LoRA, text: int) -> None:
    """Freeze a decoder except its projections and encoders, and add adapters to its blocks; ids from `text` on are not text."""
    decoder.requires_grad_(False)
    if lora.load_in_4bit:
        quantize(decoder)
    if lora.parts:
        targets = "|".join(name for part in lora.parts for name in TARGETS[part])
        config = _config(lora, rf"blocks\..*\.({targets})")  # and not encoders
        require("peft", "lora", "lora").inject_adapter_in_model(config, decoder, NAME)
    decoder.projections.requires_grad_(True)
    decoder.encoders.requires_grad_(not lora.freeze_encoder)
    if lora.new_rows:
        for table in tables(decoder):
            table.train_rows(text)
    if not any(parameter.requires_grad for parameter in decoder.parameters()):
        raise InputError("lora: found nothing to train, expected new_rows: true, some of lora.parts, or continuous_inputs: true")


def _config(lora: LoRA, targets: list[str] | str, **more: Any) -> Any:
    options = dict(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, use_rslora=lora.rank_stabilized)
    return require("peft", "lora", "lora").LoraConfig(target_modules=targets, **options, **more)


def tables(decoder: Decoder) -> list[TokenEmbedding]:
    return [table for table in (decoder.embedding, decoder.output) if table is not None]


class MergedWeights(Mapping[str, Runs]):
    """The weights of a decoder with its adapters merged in, each on access: all at once take several times the memory of the base.

    An embedding whose new rows train is returned as two runs of rows.
    """

    def __init__(self, decoder: Decoder):
        layers = {name.replace("_orig_mod.", ""): module for name, module in decoder.named_modules()}
        own = {name.replace(".base_layer", ""): tensor for name, tensor in weights_of(decoder).items()
               if ".lora_" not in name and ".parametrizations." not in name}
        self.made: dict[str, Callable[[], Runs]] = {name: tensor.detach for name, tensor in own.items()}
        for name, layer in layers.items():
            if hasattr(layer, "lora_A"):
                self.made[f"{name}.weight"] = partial(_with_adapter, layer)
            elif isinstance(layer, nn.Linear) and ".lora_" not in name and not name.endswith(".base_layer"):
                self.made[f"{name}.weight"] = partial(weight_of, layer)
            elif isinstance(layer, TokenEmbedding):
                self.made[f"{name}.weight"] = layer.tables

    def __getitem__(self, name: str) -> Runs:
        return self.made[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.made)

    def __len__(self) -> int:
        return len(self.made)


def _with_adapter(layer: Any) -> Tensor:
    return weight_of(layer.get_base_layer()) + layer.get_delta_weight(NAME).detach()


@torch.no_grad()
def merged(decoder: Decoder) -> Decoder:
    """A copy of a decoder with the adapters merged into its weights."""
    plain, weights = Decoder(decoder.config, build_encoder), MergedWeights(decoder)
    for name, tensor in plain.state_dict().items():
        runs = weights[name]
        tensor.copy_(torch.cat(runs) if isinstance(runs, tuple) else runs)
    return plain.to(next(decoder.parameters()).device).eval()


def adapter_tensors(decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
    """The adapters under the names that peft gives those of the exported model.

    Each part of a fused projection gets its own rows of B and a copy of A, which the parts share.
    """
    for number, block in enumerate(decoder.blocks):
        for ours, part, theirs, _ in BLOCK:
            layer: Any = block.get_submodule(ours) if "." in ours and not ours.endswith("_norm") else None
            if layer is None or not hasattr(layer, "lora_A"):
                continue
            rows = layer.lora_B[NAME].weight                                                      # (rows, r)
            rows = rows if part is None else rows.split(sizes_of(decoder.config, ours))[part]
            at = f"base_model.model.model.layers.{number}.{theirs}"
            yield f"{at}.lora_A.weight", layer.lora_A[NAME].weight.detach().clone()
            yield f"{at}.lora_B.weight", rows.detach().clone()
    for table, name in ((decoder.embedding, "model.embed_tokens"), (decoder.output, "lm_head")):
        if table is not None and table.new_rows() is not None:
            yield f"base_model.model.{name}.token_adapter.trainable_tokens_delta", table.new_matrix().detach()


def save_adapter(decoder: Decoder, lora: LoRA, folder: Path) -> None:
    """Write the adapters in peft's format, for the model that `mmtx export --to transformers` makes of `init_from`."""
    config, targets = decoder.config, [row[2].split(".")[1] for row in BLOCK if "_proj" in row[2]
                                       and row[0].split(".")[0] in lora.parts]
    first = 0 if (new := decoder.embedding.new_rows()) is None else new.first
    names = ["embed_tokens"] if config.tied else ["embed_tokens", "lm_head"]
    rows = {name: list(range(first, config.vocabulary_size)) for name in names} if lora.new_rows else None
    settings = _config(lora, targets, trainable_token_indices=rows, task_type="CAUSAL_LM", inference_mode=True)
    values = {name: sorted(value) if isinstance(value, set) else value for name, value in settings.to_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "adapter_model.safetensors", file_parts(dict(adapter_tensors(decoder)), {"format": "pt"}))
    write_whole(folder / "adapter_config.json", json.dumps(values, indent=2, default=str).encode())


def parameters_by_group(decoder: nn.Module) -> str:
    """One line with the number of trainable and of frozen parameters, by group."""
    counts: dict[bool, dict[str, int]] = {True: {}, False: {}}
    for name, parameter in decoder.named_parameters():
        group = ("adapters" if ".lora_" in name else "encoders" if name.startswith("encoders") else
                 "new rows" if name.endswith(".rows") else "projections"
                 if name.startswith("projections") else "norms" if "norm" in name else
                 "attention" if ".attention." in name else "feed-forward" if ".feed_forward." in name else "embedding")
        groups = counts[parameter.requires_grad]
        groups[group] = groups.get(group, 0) + size_of(parameter)
    told = [", ".join(f"{group} {count:,}" for group, count in groups.items()) or "none" for groups in counts.values()]
    return f"{sum(counts[True].values()):,} parameters train ({told[0]}), {sum(counts[False].values()):,} are frozen ({told[1]})"
