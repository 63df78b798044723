"""Every shipped YAML is parsed and built by the machinery of `mmtx fit`, and its data and sizes are what it says."""

import functools
import glob
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml

from mmtx.config import CodeRange
from mmtx.model import Decoder
from mmtx.model_folder import read_model
from mmtx.plugins import import_file
from mmtx.training.codec import AudioCodecModule, ImageCodecModule
from mmtx.training.decoder import DecoderModule
from mmtx.training.fit_cli import TRAINER
from mmtx.training.run import command_line
from mmtx.training.text import TextModule
from mmtx.training.vocoder import VocoderModule

ROOT = Path(__file__).parents[1]
# Those of configs/motion need a plugin: tests/test_plugin.py trains with them.
CONFIGS = {str(path.relative_to(ROOT / "configs")): path for path in sorted((ROOT / "configs").rglob("*.yaml"))
           if path.parent.name != "motion"}
# In place of the starts that the first lines of a config make under runs/.
STARTS = {"smollm2/adapters.yaml": "demos/starter", "smollm2/projections.yaml": "demos/starter", "starter/captions-extra.yaml": "null", "starter/captions-last.yaml": "null", "starter/captions-sounds.yaml": "null",
          "starter/everything.yaml": "null", "starter/generate.yaml": "null", "starter/generate-notes.yaml": "null", "starter/generate-fine.yaml": "null",
          "starter/generate-text.yaml": "null",
          "starter/speech.yaml": "null",
          "starter/speech-extra.yaml": "null", "starter/speech-captions.yaml": "null", "starter/speech-last.yaml": "null",
          "starter/speech-notes.yaml": "null"}
# Data that the first lines of a config, or benchmarks/scaling_grid.py, make.
MADE = ("runs/scaling/data/", "runs/notes/sounds-extra-", "runs/pictures/images-extra-", "runs/speech/speech-synthetic-",
        "runs/preferences/")
MODULES = {"text": TextModule, "image": ImageCodecModule, "audio": AudioCodecModule, "audio-fine": AudioCodecModule, "vocoder": VocoderModule}
LEVELS = (8, 8, 8, 6, 5)
# Parameters with a vocabulary of 1 024 text pieces and two codecs of LEVELS; each codec adds a row a digit.
PARAMETERS = {
    "gpu/decoder-100m.yaml": 101_727_488,
    "gpu/decoder-600m.yaml": 441_849_856,
    "gpu/decoder-4b.yaml": 3_636_967_936,
}


@pytest.fixture(scope="module")
def built(tokenizers, tmp_path_factory):
    """Build a config without training, once: its `FitCLI`, with tiny tokenizers, on a machine without GPUs."""
    root = tmp_path_factory.mktemp("configs")
    for kind, tokenizer in tokenizers.items():
        tokenizer.save(root / kind)

    @functools.cache
    def build(name):
        arguments = ["--config", str(CONFIGS[name]), "--output", str(root / "run"),
                     "--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.strategy", "auto"]
        if "decoder" in yaml.safe_load(CONFIGS[name].read_text())["data"]["class_path"]:
            for kind in tokenizers:
                arguments += [f"--data.init_args.tokenizers.{kind}", str(root / kind)]
        if name in STARTS:
            arguments += ["--model.init_args.init_from", STARTS[name]]
        return command_line(arguments, run=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", ["mmtx"])
        yield build


def test_there_are_configs():
    assert {"starter/text.yaml", "starter/image.yaml", "starter/audio.yaml", "starter/decoder.yaml", "starter/generate.yaml",
            *PARAMETERS,
            "quickstart/decoder.yaml"} <= set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_config_builds(built, name):
    cli = built(name)
    assert isinstance(cli.model, MODULES.get(Path(name).stem, DecoderModule))
    assert cli.trainer.max_steps > 0 or cli.trainer.max_epochs == 1
    values = yaml.safe_load(CONFIGS[name].read_text())
    assert values["output"].startswith("runs/")
    # What the YAML says is what was built.
    for key, value in values["model"]["init_args"].get("decoder", {}).items():
        assert getattr(cli.model.config, key) == value, key


@pytest.mark.parametrize("name", CONFIGS)
def test_no_config_repeats_a_default(built, name):
    said = yaml.safe_load(CONFIGS[name].read_text())["trainer"]
    assert not [key for key, value in said.items() if key in TRAINER and value == TRAINER[key]]
    trainer = built(name).trainer
    assert trainer.log_every_n_steps == said.get("log_every_n_steps", 20)
    assert trainer.val_check_interval == said.get("val_check_interval", 1.0)
    # The text tokenizer has no gradient.
    assert trainer.gradient_clip_val == (None if name == "starter/text.yaml" else 1.0)
    assert trainer.check_val_every_n_epoch == (None if "val_check_interval" in said else 1)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_a_config_begins_from_is_made_before_and_fits(name):
    text = CONFIGS[name].read_text()
    wanted = yaml.safe_load(text)["model"]["init_args"]
    if (start := wanted.get("init_from")) is None:
        return
    others = [yaml.safe_load(path.read_text()) for path in CONFIGS.values()]
    makers = {f"{other['output']}/model": other["model"]["init_args"] for other in others}
    if (ROOT / start).is_dir():
        config = asdict(read_model(ROOT / start).config)
        makers[start] = {"decoder": config, "train_encoder": bool(config["encoders"])}
    if start not in makers:
        assert f"--output {start}" in text  # a command of its first lines
        return
    for key, value in wanted["decoder"].items():
        assert makers[start]["decoder"].get(key) == value, key
    # Encoders that have been trained along cannot be left behind.
    assert wanted.get("train_encoder") or not makers[start].get("train_encoder")


@pytest.mark.parametrize("name", CONFIGS)
def test_config_names_data_that_exist(name):
    arguments = yaml.safe_load(CONFIGS[name].read_text())["data"]["init_args"]
    for source in [*arguments["train"], *arguments.get("validation", [])]:
        for path in source["paths"]:
            assert glob.glob(str(ROOT / path)) or path.startswith(MADE), path
        if reader := source.get("reader"):
            file, function = reader.split(":")
            assert callable(getattr(import_file(ROOT / file, file), function)), reader
    for folder in arguments.get("tokenizers", {}).values():
        assert (ROOT / folder / "config.json").is_file() or folder == "runs/smollm2/start/text", folder


@pytest.mark.parametrize("name", PARAMETERS)
def test_gpu_configs_have_the_size_in_their_name(built, name):
    config = built(name).model.config
    plain = 1024 + 256
    size = 8 * 8 * 8 * 6 * 5
    ranges = (CodeRange(plain, LEVELS), CodeRange(plain + size, LEVELS))
    with torch.device("meta"):  # no memory and no time
        decoder = Decoder(replace(config, vocabulary_size=plain + 2 * size, composed=ranges))
    count = sum(parameter.numel() for parameter in decoder.parameters())
    c = config
    heads = c.heads + 2 * c.kv_heads
    block = c.width * c.head_dim * (heads + c.heads) + 3 * c.width * c.mlp_dim + 2 * c.width + 2 * c.head_dim
    assert count == c.depth * block + c.width + c.width * (plain + 2 * sum(LEVELS))
    assert count == PARAMETERS[name]
    values = yaml.safe_load(CONFIGS[name].read_text())["trainer"]
    assert (values["devices"], values["precision"]) == (8, "bf16-mixed")


@pytest.mark.parametrize("size, shape", [("600m", (1024, 28, 16, 8, 128, 3072)), ("4b", (2560, 36, 32, 8, 128, 9728))])
def test_the_larger_decoders_have_the_shape_of_qwen3(built, size, shape):
    c = built(f"gpu/decoder-{size}.yaml").model.config
    assert (c.width, c.depth, c.heads, c.kv_heads, c.head_dim, c.mlp_dim) == shape
    assert (c.rope_theta, c.norm_eps, c.tied) == (1e6, 1e-6, True)
