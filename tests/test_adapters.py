"""LoRA: what trains, what stays to the bit, and that peft alone makes the same model of what is saved."""

import json
import shutil
import sys
import weakref

import pytest
import runs
import torch
import yaml
from safetensors.torch import load_file
from test_export import sharpen
from test_interop import full, media, save_model  # noqa: F401
from test_training import DECODER, FEW, TRAINER, fit, section

from mmtx.cli import main
from mmtx.config import DecoderConfig, EncoderConfig
from mmtx.errors import InputError
from mmtx.interop.convert import convert
from mmtx.interop.export import export
from mmtx.modality.encoder import build_encoder
from mmtx.model import Decoder
from mmtx.pipeline import load
from mmtx.training.adapters import LoRA, MergedWeights, adapt, merged, parameters_by_group, tables
from mmtx.training.decoder import DecoderModule
from mmtx.training.quantize import quantize, quantize_layer, weight_of
from mmtx.weights import load_module, to_bytes, to_parts

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
NAMES = ("llama scaled", "qwen2", "qwen3")  # the first is tied


@pytest.fixture(scope="module")
def starts(media, tmp_path_factory):  # noqa: F811
    """Folders of grown models of each family."""
    made = {}
    for name in NAMES:
        folder = tmp_path_factory.mktemp("start")
        save_model(folder / "in", name)
        convert(folder / "in", media).save(folder / "start")
        made[name] = folder / "start"
    return made


def told(folder) -> dict:
    """The decoder of a model as a configuration says it."""
    config = json.loads((folder / "config.json").read_text())["decoder"]
    return {name: value for name, value in config.items() if name not in ("vocabulary_size", "composed", "features")}


def arguments(start) -> tuple[dict, dict]:
    folders = {kind: str(start / kind) for kind in ("text", "image", "audio")}
    model = {"decoder": told(start), "init_from": str(start), "lora": {"rank": 4}, "optimizer": {"learning_rate": 0.02, "warmup_steps": 0}}
    return model, {"tokenizers": folders, "train": FEW, "validation": FEW, "tokens_per_batch": 512, "max_seq_len": 256}


@pytest.mark.parametrize("name", NAMES)
def test_adapters_and_new_rows_train_and_peft_alone_gives_the_same_model(starts, name, tmp_path, capsys):
    start = starts[name]
    model, data = arguments(start)
    fit(tmp_path / "run", section("decoder.DecoderModule", **model), section("decoder_data.DecoderData", **data), {**TRAINER, "max_steps": 4})
    before, after = load(start, "cpu"), load(tmp_path / "run" / "model", "cpu")
    said = capsys.readouterr().err
    rows = before.decoder.embedding.weight.shape[0] - before.tokenizers["text"].size
    new = rows * 32 * (1 if before.decoder.config.tied else 2)
    assert f"new rows {new:,}" in said and "are frozen (" in said and "embedding" in said.split("are frozen")[1]

    size = before.tokenizers["text"].size
    for old, table in [(before.decoder.embedding, after.decoder.embedding), (before.decoder.output, after.decoder.output)]:
        if table is not None:
            assert torch.equal(old.weight[:size], table.weight[:size])
            for kind in ("image", "audio"):  # the digits of codes, which were in the batches, moved
                moved = (old.matrix() - table.matrix()).detach().abs().amax(1)
                chosen = before.vocabulary.range(kind)
                assert (moved[chosen.start:chosen.stop] > 1e-4).all()
    norms = [(a, b) for (n, a), (_, b) in zip(before.decoder.named_parameters(), after.decoder.named_parameters()) if "norm" in n or "bias" in n]
    assert norms and all(torch.equal(a, b) for a, b in norms)
    assert not torch.equal(before.decoder.blocks[0].attention.qkv.weight, after.decoder.blocks[0].attention.qkv.weight)

    export(before, "transformers", tmp_path / "base", max_seq_len=256)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    ids = torch.randperm(before.vocabulary.size, generator=torch.Generator().manual_seed(0))[:60]
    with torch.no_grad():
        found = theirs(ids[None]).logits[0]
    assert (full(before, ids) - full(after, ids)).abs().max() > 0.05
    assert torch.allclose(full(after, ids), found, atol=1e-4)


def test_a_killed_run_goes_on_bit_by_bit(starts, tmp_path):
    """Model, adapters and figures; with dropout, which draws anew at every step."""
    model, data = arguments(starts["qwen2"])
    model["lora"] |= {"dropout": 0.1}
    config = {"seed_everything": 0, "save_every": 2, "ema": 0.9, "model": section("decoder.DecoderModule", **model),
              "data": section("decoder_data.DecoderData", **{**data, "num_workers": 1, "image_augmentation": {}, "audio_augmentation": {}}),
              "trainer": {**TRAINER, "max_steps": 6}}
    assert runs.fit(config, tmp_path / "whole") == [0], (tmp_path / "whole.log").read_text()
    processes = runs.start(config, tmp_path / "killed")
    runs.wait_for(lambda: runs.latest(tmp_path / "killed") >= 2, processes)
    runs.kill(processes)
    assert not (tmp_path / "killed" / "model").exists()
    assert runs.fit(config, tmp_path / "killed", "--ckpt_path", "last") == [0], (tmp_path / "killed.log").read_text()
    assert runs.results(tmp_path / "killed") == runs.results(tmp_path / "whole")
    adapters = [(tmp_path / run / "adapter" / "adapter_model.safetensors").read_bytes() for run in ("whole", "killed")]
    assert adapters[0] == adapters[1]


def test_a_merged_decoder_scores_as_the_adapted_one(starts):
    decoder = sharpen(load(starts["qwen2"], "cpu")).decoder
    adapt(decoder, LoRA(rank=3, rank_stabilized=True, parts=("feed_forward",)), 336)
    for name, parameter in decoder.named_parameters():
        assert parameter.requires_grad == (".lora_" in name or name.endswith(".rows"))
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    ids, positions = torch.arange(0, 600, 17)[None], torch.arange(36)[None]
    with torch.no_grad():
        expected, plain = decoder.eval().logits(decoder(ids, positions)), merged(decoder)
        found = plain.logits(plain(ids, positions))
    assert torch.allclose(expected, found, atol=1e-5)
    assert {*plain.state_dict()} == {*Decoder(plain.config, build_encoder).state_dict()}
    assert "attention" in parameters_by_group(decoder).split("are frozen")[1]


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_a_base_in_4_bits_stays_and_adapters_and_new_rows_train(starts, name, tmp_path, capsys):
    """QLoRA on a CPU: the base is that of bitsandbytes, to the bit; what comes out is that base with the adapters added."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model, data = arguments(starts[name])
    model["lora"] |= {"load_in_4bit": True}
    config = {"seed_everything": 0, "save_every": 2, "model": section("decoder.DecoderModule", **model),
              "data": section("decoder_data.DecoderData", **data), "trainer": {**TRAINER, "max_steps": 4}}
    before = load(starts[name], "cpu").decoder
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"output": str(tmp_path / "whole"), **config}))
    main(["fit", "--config", str(tmp_path / "run.yaml")])
    attention = sum(parameter.numel() for name, parameter in before.named_parameters() if ".attention." in name and "norm" not in name)
    assert f"attention {attention:,}" in capsys.readouterr().err.split("are frozen (")[1]
    after = load(tmp_path / "whole" / "model", "cpu").decoder
    adapters = load_file(tmp_path / "whole" / "adapter" / "adapter_model.safetensors")
    base, layer = before.blocks[0].feed_forward.down.weight.data, "base_model.model.model.layers.0.mlp.down_proj"
    small = bitsandbytes.nn.Params4bit(base.clone(), requires_grad=False, quant_type="nf4").to("cpu")
    small = bitsandbytes.functional.dequantize_4bit(small.data, small.quant_state)
    assert 0.02 < (small - base).abs().mean() / base.abs().mean() < 0.2
    update = adapters[f"{layer}.lora_B.weight"] @ adapters[f"{layer}.lora_A.weight"] * 16.0 / 4
    assert update.abs().max() > 1e-3 and torch.allclose(after.blocks[0].feed_forward.down.weight, small + update, atol=1e-6)
    start = load(starts[name], "cpu").vocabulary.range("image").start
    assert not torch.equal(before.embedding.weight[start:], after.embedding.weight[start:])

    # Checkpoints hold no base, which is made anew: the same run goes on from one.
    saved = torch.load(tmp_path / "whole" / "checkpoints" / "step-000000002.ckpt", weights_only=True)["state_dict"]
    assert not any("down.base_layer" in name for name in saved) and any("down.lora_A" in name for name in saved)
    (tmp_path / "resumed" / "checkpoints").mkdir(parents=True)
    shutil.copy(tmp_path / "whole" / "checkpoints" / "step-000000002.ckpt", tmp_path / "resumed" / "checkpoints")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"output": str(tmp_path / "resumed"), **config}))
    main(["fit", "--config", str(tmp_path / "run.yaml"), "--ckpt_path", "last"])
    whole, resumed = ((tmp_path / run / "model" / "model.safetensors").read_bytes() for run in ("whole", "resumed"))
    assert whole == resumed


def test_of_two_stages_the_first_trains_projections_and_new_rows_alone(starts, tmp_path, capsys):
    """From a language model of codes alone and the encoders of another model, which may train in the second."""
    start = starts["qwen3"]
    model, data = arguments(start)
    options = {"continuous_inputs": True, "train_encoder": True}
    one = section("decoder.DecoderModule", **{"decoder": DECODER, **options, "optimizer": {"learning_rate": 0.05, "warmup_steps": 0}})
    fit(tmp_path / "small", one, section("decoder_data.DecoderData", **data), {**TRAINER, "max_steps": 2})
    small = load(tmp_path / "small" / "model", "cpu")
    model |= {**options, "encoders_from": str(tmp_path / "small" / "model"), "lora": {"parts": [], "freeze_encoder": True}}
    fit(tmp_path / "first", section("decoder.DecoderModule", **model), section("decoder_data.DecoderData", **data), {**TRAINER, "max_steps": 2})
    told, before, first = capsys.readouterr().err, load(start, "cpu").decoder, load(tmp_path / "first" / "model", "cpu").decoder
    text = load(start, "cpu").tokenizers["text"].size
    assert "parameters train (new rows" in told and "projections" in told.split("are frozen")[0]
    assert not (tmp_path / "first" / "adapter").exists()
    own = first.state_dict()
    for name, value in before.state_dict().items():
        same = value[:text].equal(own[name][:text]) if name.split(".")[0] in ("embedding", "output") else value.equal(own[name])
        assert same, name
    assert not before.embedding.weight[text:].equal(first.embedding.weight[text:])
    codecs = load(start, "cpu").tokenizers
    for kind in ("image", "audio"):
        assert all(value.equal(small.decoder.encoders[kind].state_dict()[name]) for name, value in first.encoders[kind].state_dict().items())
        assert not small.decoder.encoders[kind].embed.weight.equal(codecs[kind].network.embed.weight)  # they had learnt something

    model |= {"init_from": str(tmp_path / "first" / "model"), "encoders_from": None, "lora": {"rank": 2}}
    fit(tmp_path / "second", section("decoder.DecoderModule", **model), section("decoder_data.DecoderData", **data), {**TRAINER, "max_steps": 2})
    second = load(tmp_path / "second" / "model", "cpu").decoder
    assert (tmp_path / "second" / "adapter").exists()
    for name in ("blocks.0.attention.qkv", "projections.image", "encoders.audio.embed"):
        assert not first.get_submodule(name).weight.equal(second.get_submodule(name).weight), name
    assert first.embedding.weight[:text].equal(second.embedding.weight[:text])


@pytest.mark.parametrize("option, place, told", [
    ("encoders_from", "", "found no encoder for image, expected one for patches of 192 numbers, as tokenizers.image makes them"),
    ("image_encoder", "", "found no encoder for image, expected one for patches of 192 numbers, as tokenizers.image makes them"),
    ("image_encoder", "image", "found a tokenizer, expected a model"),
    ("image_encoder", "..", "config.json: no such file"),
    ("image_encoder", "config.json", "found a file, expected the folder of a model"),
])
def test_what_has_no_encoders_that_fit_is_refused(option, place, told, starts, tmp_path, capsys):
    model, data = arguments(starts["qwen3"])
    model |= {"continuous_inputs": True, "train_encoder": True, option: str(starts["qwen3"] / place)}
    with pytest.raises(SystemExit):
        fit(tmp_path / "run", section("decoder.DecoderModule", **model), section("decoder_data.DecoderData", **data), {**TRAINER, "max_steps": 1})
    error = capsys.readouterr().err
    assert told in error and option in error and "Traceback" not in error
    assert not [*(tmp_path / "run").rglob("config.yaml")]  # nor is the record of a run before in its place written over


def test_a_base_in_4_bits_is_read_layer_by_layer(starts):
    """There is never more than one matrix of a block in full, and the 4 bits are those of a decoder that was read whole."""
    pytest.importorskip("bitsandbytes")
    start, most = load(starts["qwen2"], "cpu").decoder, []

    def loaded(decoder, name):
        quantize_layer(decoder, name)
        matrices = [parameter for name, parameter in decoder.blocks.named_parameters() if parameter.dim() > 1 and not parameter.is_meta]
        most.append(sum(parameter.is_floating_point() for parameter in matrices))
    found = load_module(lambda: Decoder(start.config, build_encoder), starts["qwen2"] / "model.safetensors", loaded)
    assert len(most) == len(start.state_dict()) and max(most) == 0
    quantize(found)  # what has 4 bits stays as it is
    quantize(start)
    layers = [(name, layer) for name, layer in start.blocks.named_modules() if isinstance(layer, torch.nn.Linear)]
    assert len(layers) == 4 * len(start.blocks)
    for name, layer in layers:
        other = found.blocks.get_submodule(name)
        assert type(other) is type(layer) and torch.equal(other.weight, layer.weight) and torch.equal(weight_of(other), weight_of(layer))
        assert layer.bias is None and other.bias is None or torch.equal(layer.bias, other.bias)


def test_merged_weights_are_made_one_by_one(starts):
    decoder = load(starts["qwen2"], "cpu").decoder
    adapt(decoder, LoRA(rank=3), 336)
    for parameter in decoder.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    expected, weights, alive, most = merged(decoder).state_dict(), MergedWeights(decoder), weakref.WeakSet(), []
    assert {*weights} == {*expected}
    for name, tensor in expected.items():
        assert torch.equal(torch.cat(weights[name]) if name == "embedding.weight" or name == "output.weight" else weights[name], tensor)

    class Watched(dict):
        def __getitem__(self, name):
            most.append(len(alive))
            runs = weights[name]
            if isinstance(runs, tuple):  # no copies: what is kept of the start, and what trains
                assert any(runs[0].data_ptr() == table.parametrizations.weight.original.data_ptr() for table in tables(decoder))
            elif runs.dim() > 1:
                alive.add(runs)
            return runs
    parts = b"".join(bytes(part) for part in to_parts(Watched.fromkeys(weights)))
    assert len(most) == 2 * len(weights) and max(most) <= 1
    assert parts == to_bytes(expected)


def test_gradient_checkpointing_changes_no_gradient(starts):
    found = []
    for again in (False, True):
        decoder = Decoder(DecoderConfig(40, **DECODER)).train()
        sharpen(type("Model", (), {"decoder": decoder}))
        decoder.gradient_checkpointing = again
        calls = []
        decoder.blocks[0].attention.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        decoder(torch.arange(30)[None], torch.arange(30)[None]).square().sum().backward()
        assert len(calls) == 1 + again
        found.append([parameter.grad for parameter in decoder.parameters() if parameter.grad is not None])
    assert len(found[0]) > 8 and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_mistakes_are_told_in_one_line(monkeypatch):
    with pytest.raises(InputError, match="found none with lora, expected the model that is to be adapted"):
        DecoderModule(DecoderConfig(**DECODER), lora=LoRA())
    with pytest.raises(InputError, match="lora.rank: found 0, expected 1 or more, and 4096 at most"):
        LoRA(rank=0)
    with pytest.raises(InputError, match="lora.parts: found mlp, expected some of attention, feed_forward"):
        LoRA(parts=("mlp",))
    with pytest.raises(InputError, match="model.init_args.encoders_from: found one with train_encoder: false, expected train_encoder: true"):
        DecoderModule(DecoderConfig(**DECODER), encoders_from="somewhere")
    with pytest.raises(InputError, match="lora.dropout: found 1"):
        LoRA(dropout=1.0)
    for alpha in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match=f"lora.alpha: found {alpha}, expected a finite number of more than 0"):
            LoRA(alpha=alpha)
    with pytest.raises(InputError, match="lora: found nothing to train, expected new_rows: true, some of lora.parts, or cont"):
        adapt(Decoder(DecoderConfig(300, **DECODER)), LoRA(parts=(), new_rows=False), 280)
    for package, extra, lora in (("peft", "lora", LoRA()), ("bitsandbytes", "qlora", LoRA(load_in_4bit=True))):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(InputError, match=rf"lora.*: {package} is not installed, expected pip install 'mmtx\[{extra}\]'"):
            adapt(Decoder(DecoderConfig(300, **DECODER)), lora, 280)


def test_encoders_train_as_they_are_and_adapters_stand_in_blocks_alone():
    config = DecoderConfig(300, **DECODER, features={"image": 16}, encoders={"image": EncoderConfig(12, 16, 2, 1, 4)})
    decoder = Decoder(config, build_encoder)
    adapt(decoder, LoRA(rank=2), 280)
    adapted = {name.split(".lora_A")[0] for name, _ in decoder.named_parameters() if ".lora_A" in name}
    assert adapted == {f"blocks.{n}.{part}" for n in range(len(decoder.blocks))
                       for part in ("attention.qkv", "attention.out", "feed_forward.gate_up", "feed_forward.down")}
    assert all(parameter.requires_grad for parameter in decoder.encoders.parameters())
    size = sum(parameter.numel() for parameter in decoder.encoders.parameters())
    assert f"encoders {size:,}" in parameters_by_group(decoder).split("train (")[1].split(")")[0]
    assert torch.equal(merged(decoder).encoders["image"].embed.weight, decoder.encoders["image"].embed.weight)
