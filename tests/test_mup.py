"""muP: with it, activations move as much in a step at any width (coordinate check); what it changes, and that it is an option."""

import csv

import pytest
import runs as tiny
import torch
import yaml
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

import mmtx
from mmtx.cli import main
from mmtx.config import DecoderConfig
from mmtx.errors import InputError
from mmtx.model import Decoder
from mmtx.training.adapters import LoRA
from mmtx.training.decoder import DecoderModule
from mmtx.training.mup import rescale, scaled
from mmtx.training.optimizer import OptimizerConfig, configure

BASE, WIDTHS = 32, (32, 128, 512)
ADAMW, MUON = (OptimizerConfig(rate, muon, warmup_steps=0) for rate, muon in ((4e-3, None), (1e-3, 4e-2)))


def made(width: int, base: int | None) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(64, width, 2, width // 16, width // 16, 16, 2 * width))
    if base is not None:
        rescale(decoder, base)
    return decoder


def optimizer_of(decoder: Decoder, config: OptimizerConfig, base: int | None):
    more = {} if base is None else {"scaled": scaled(decoder), "ratio": base / decoder.config.width}
    return configure(decoder, config, 100, **more)["optimizer"]


def moved(config: OptimizerConfig, width: int, base: int | None, steps: int = 4) -> dict[str, float]:
    """How far (root mean square) what each block adds, and the scores, are after some steps from where they began."""
    decoder = made(width, base)
    ids = torch.randint(0, 64, (4, 33), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(32).expand(4, 32)
    seen: dict[str, torch.Tensor] = {}
    for k, block in enumerate(decoder.blocks):
        block.register_forward_hook(lambda _, given, out, k=k: seen.__setitem__(f"block {k}", (out - given[0]).detach()))

    def scores() -> torch.Tensor:
        seen["scores"] = decoder.logits(decoder(ids[:, :-1], positions))
        return seen["scores"]

    optimizer = optimizer_of(decoder, config, base)
    scores()
    first = {name: value.detach() for name, value in seen.items()}
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(scores().flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
    scores()
    return {name: (value.detach() - first[name]).square().mean().sqrt().item() for name, value in seen.items()}


def spread(config: OptimizerConfig, base: int | None) -> float:
    """Largest factor over the widths between how far the same activations moved."""
    found = [moved(config, width, base) for width in WIDTHS]
    return max(max(each[name] for each in found) / min(each[name] for each in found) for name in found[0])


@pytest.mark.parametrize("config", [ADAMW, MUON], ids=["adamw", "muon"])
def test_activations_move_alike_at_all_widths(config):
    assert spread(config, BASE) < 2.5


@pytest.mark.parametrize(("config", "least"), [(ADAMW, 6), (MUON, 3.5)], ids=["adamw", "muon"])
def test_without_it_they_move_further_where_the_decoder_is_wider(config, least):
    assert spread(config, None) > least


@pytest.mark.parametrize("config", [ADAMW, MUON], ids=["adamw", "muon"])
def test_at_its_base_nothing_changes(config):
    assert moved(config, BASE, BASE) == pytest.approx(moved(config, BASE, None))


def test_rates_and_what_a_decoder_begins_with():
    plain, decoder = made(128, None), made(128, BASE)
    matrices = {name for name, p in decoder.blocks.named_parameters() if p.dim() > 1}
    for (name, old), new in zip(plain.named_parameters(), decoder.parameters(), strict=True):
        factor = 0.5 if name.removeprefix("blocks.") in matrices else 0.25 if name == "norm.weight" else 1.0
        assert torch.equal(new, old * factor), name
    names = {p: name for name, p in decoder.named_parameters()}
    for config, factor in ((ADAMW, 0.25), (MUON, 0.5)):
        for group in optimizer_of(decoder, config, BASE).param_groups:
            for name in (names[p] for p in group["params"]):
                hidden = name.removeprefix("blocks.") in matrices
                rate = config.muon_lr if hidden and config.muon_lr else config.learning_rate
                wanted = factor if hidden else 0.25 if name == "norm.weight" else 1.0
                assert group["initial_lr"] == pytest.approx(rate * wanted), name
                # A step's decay is the rate times the weight decay.
                assert group["initial_lr"] * group["weight_decay"] == pytest.approx(
                    rate * config.weight_decay if decoder.get_parameter(name).dim() > 1 else 0.0), name


@pytest.mark.parametrize("base", [0, -3, 2**16 + 1])
def test_widths_that_are_none_are_refused(base):
    with pytest.raises(InputError, match=rf"^mup_base_width: found {base}, expected 1 or more, and 65536 at most$"):
        DecoderModule(DecoderConfig(), mup_base_width=base)


def test_mmtx_fit_trains_by_it_and_leaves_a_model_as_any_other(tmp_path):
    config = tiny.prepare(tmp_path)  # a decoder of width 32
    config.update(output=str(tmp_path / "run"), samples=0, ema=None)
    config["data"]["init_args"]["num_workers"] = 0
    config["model"]["init_args"] |= {"mup_base_width": 8, "optimizer": {"learning_rate": 4e-3, "muon_lr": 1e-2, "warmup_steps": 0}}
    config["trainer"] |= {"max_steps": 1, "val_check_interval": 1.0, "logger": False}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(tmp_path / "config.yaml")])
    with (tmp_path / "run" / "metrics" / "metrics.csv").open() as file:
        rates = {float(value) for row in csv.DictReader(file) for name, value in row.items() if name.startswith("lr-") and value}
    assert rates == {4e-3, 1e-3, 5e-3}
    gain = load_file(tmp_path / "run" / "model" / "model.safetensors")["norm.weight"]
    assert (gain - 0.25).abs().max() < 2e-3  # a step from where it begins
    assert mmtx.load(tmp_path / "run" / "model").decoder.config.width == 32


def test_with_lora_it_is_refused():
    with pytest.raises(InputError, match="^mup_base_width: found one with lora, expected none"):
        DecoderModule(DecoderConfig(), init_from="any", lora=LoRA(), mup_base_width=32)
