"""Configurations from others: none takes more memory, time or stack than it should, or runs what it should not."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import runs
import yaml
from fresh import context

from mmtx.cli import main
from mmtx.data.collection import read_config
from mmtx.data.yaml_check import DEEPEST, LONGEST, MOST_VALUES, Loader, check_yaml
from mmtx.errors import InputError
from mmtx.schema import within
from mmtx.training.codec_data import CodecData
from mmtx.training.parser import STOCK_YAML
from mmtx.training.run import is_trusted_only
from mmtx.training.vocoder import VocoderData

CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))
LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
BAD = {
    "laughs": (LAUGHS, f"found more than {MOST_VALUES:,} values"),
    "merged laughs": ("a: &a {x: 1}\n" + "".join(f"b{n}: &b{n} [{'*a, ' * 99} *a]\n" for n in range(MOST_VALUES // 90)), "found more than"),
    "deep": ("[" * 5000 + "]" * 5000, f"found more than {DEEPEST} nested lists and mappings"),
    "deep mappings": ("{a: " * 5000 + "1" + "}" * 5000, f"found more than {DEEPEST} nested lists and mappings"),
    "deep by lines": ("".join(f"{' ' * n}a:\n" for n in range(200)), f"found more than {DEEPEST} nested lists and mappings"),
    "endless": ("a: &a [*a]", r"found \*a within itself"),
    "long": ("# " + "x" * LONGEST, f"found more than {LONGEST:,} bytes"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_configuration_that_grows_is_one_line(kind, tmp_path, capsys):
    text, told = BAD[kind]
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=f"config.yaml: {told}"):
        read_config(path)
    for command in (["fit", "--config", str(path)], ["fit", f"--config={path}"], ["fit", "-c", str(path)],
                    ["prepare", "--config", str(path)]):
        with pytest.raises(SystemExit) as stop:
            main([*command, "--output", str(tmp_path / "run")])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith(f"mmtx: error: {path}: found ") and error.count("\n") == 1, error
    assert not (tmp_path / "run").exists()


def test_what_is_no_yaml_is_one_line_that_says_where(tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text("model: 1\ndata: [a, [b\n")
    for arguments, told in ((["--config", str(path)], f"{path}: not a configuration: did not find expected ',' or ']' in line 3, column 1"),
                            (["--trainer", "{a: ["], "trainer: Unable to load config '{a: ['"),
                            (["--seed_everything", "[a"], "seed_everything: ")):
        with pytest.raises(SystemExit) as stop:
            main(["fit", *arguments, "--output", str(tmp_path / "run")])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith(f"mmtx: error: {told}") and error.count("\n") == 1, error
    assert not (tmp_path / "run").exists()


def test_values_and_files_that_a_configuration_names_are_looked_at_too(tmp_path, capsys):
    (tmp_path / "model.yaml").write_text(LAUGHS)
    for value in (str(tmp_path / "model.yaml"), "{" + "a: {" * 200 + "}" * 201):
        with pytest.raises(SystemExit) as stop:
            main(["fit", "--model", value, "--output", str(tmp_path / "run")])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and "found more than" in error and error.count("\n") == 1, error


@pytest.mark.parametrize("text, key, line", [
    ("trainer:\n  max_steps: 5\n  devices: 1\n  max_steps: 9\n", "max_steps", 4),
    ("data: {}\nmodel: {}\n'data': {}\n", "data", 3),
    ("- {a: 1, b: {c: [1, 2], a: 3}, a: 4}\n", "a", 1)], ids=["within a section", "a section", "in one line"])
def test_a_key_that_is_given_twice_is_named(text, key, line, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    for command in ("fit", "prepare"):
        with pytest.raises(SystemExit) as stop:
            main([command, "--config", str(path), "--output", str(tmp_path / "run")])
        assert stop.value.code == 2
        assert capsys.readouterr().err == f"mmtx: error: {path}: found {key} twice in a mapping, the second time in line {line}\n"


def test_a_key_may_be_in_several_mappings_and_several_may_be_merged():
    check_yaml("a: &a {x: 1, y: a}\nb: &b {x: 2, z: [x, x, {x: x}]}\nc: {<<: *a, <<: *b, x: 3, y: x}\n? [x, x]\n: x\n? {x: x}\n: x\n*a : x\n",
               "config")


@pytest.mark.parametrize("word", ["1e-3", "-2E5", "+1.5e+3", "1.", ".5", "1_000.5", "1_000", ".inf", "-.INF", ".nan", "2020-01-31", "12:30",
                                  "012", "0x1f", "no", "True", "~", "null", "e5", "1e", "1e5x", "7435e", "-", ".", "1.2.3", "'1e-3'"])
def test_a_value_is_the_same_for_all_commands(word):
    """`mmtx fit` reads a configuration through jsonargparse, `prepare` and `evaluate` read it themselves."""
    found, expected = yaml.load(f"a: [{word}]", Loader)["a"][0], STOCK_YAML(f"a: [{word}]")["a"][0]
    assert type(found) is type(expected) and (found == expected or found != found and expected != expected)


def test_what_is_no_configuration_is_named(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"a: caf\xe9")
    os.mkfifo(tmp_path / "pipe")
    for name, told in (("latin.yaml", "not UTF-8 at byte 6"), ("pipe", "not a file"), (".", "not a file"),
                       ("none.yaml", "no such file")):
        with pytest.raises(InputError, match=told):
            read_config(tmp_path / name)
    with pytest.raises(InputError, match="/dev/zero: not a file"):
        read_config("/dev/zero")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configurations_pass(path):
    check_yaml(path.read_text(), path.name)


def test_as_much_as_is_allowed_passes():
    check_yaml("[" * DEEPEST + "]" * DEEPEST, "config")
    check_yaml(f"[{'1, ' * (MOST_VALUES - 2)}]", "config")
    for text in (f"[{'1, ' * MOST_VALUES}]", "[" * (DEEPEST + 1) + "]" * (DEEPEST + 1)):
        with pytest.raises(InputError, match="config: found more than"):
            check_yaml(text, "config")
    assert check_yaml("no: [yaml", "config") is not None  # told by whoever reads it


@pytest.mark.parametrize("value, told", [(-1, "-1"), (6, "6"), (10**5000, "a number beyond all bounds")], ids=["-1", "6", "huge"])
def test_numbers_out_of_range_are_named(value, told):
    with pytest.raises(InputError, match=f"seed: found {told}, expected 0 or more, and 5 at most"):
        within("seed", value, 0, 5)
    within("seed", 0, 0, 5)
    within("seed", 5, 0, 5)


@pytest.mark.parametrize("option, value", [
    ("seed_everything", "-1"), ("seed_everything", str(2**64)), ("seed_everything", str(2**32)), ("save_every", "0"),
    ("save_every", str(2**70)), ("samples", "-1"), ("max_skipped", "0"), ("max_skipped", str(10**40)), ("ema", "nan"),
    ("trainer.max_steps", "-5"), ("trainer.max_steps", str(10**30)), ("trainer.accumulate_grad_batches", "0"),
    ("data.seed", "-1"), ("data.seed", str(2**64)), ("output", ""), ("output", " "),
    ("data.num_workers", "-1"), ("data.image_augmentation.scale", "-1"), ("data.audio_augmentation.gain", "1.5"),
    ("trainer.log_every_n_steps", "-1"), ("trainer.val_check_interval", "0"), ("trainer.val_check_interval", "0.0"),
    ("trainer.gradient_clip_val", "-1"), ("trainer.gradient_clip_val", ".nan"),
    ("model.z_loss", "-1"), ("model.optimizer.learning_rate", "-0.001"), ("model.optimizer.muon_lr", ".nan"),
    ("model.optimizer.weight_decay", "-0.1"), ("model.optimizer.warmup_steps", "-1"), ("model.optimizer.betas", "[0.9, 1.0]"),
])
def test_options_of_fit_out_of_range_are_one_line(option, value, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = Path(__file__).parents[1] / "configs" / "starter" / "text.yaml"
    config = config if not option.startswith(("data", "model", "trainer")) else config.with_name("decoder.yaml")
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(config), "--output", str(tmp_path / "run"), f"--{option}={value}"])
    lines = [line for line in capsys.readouterr().err.splitlines() if "Seed set" not in line]
    assert stop.value.code == 2 and len(lines) == 1 and option.split(".")[-1] in lines[0], lines


@pytest.mark.parametrize("option, value", [("train", "x.csv"), ("train", "rows.csv"), ("train", "[x.csv]"), ("train", "[[x.csv]]"),
                                           ("validation", "x.csv"), ("validation", "{paths: [x.csv]}")])
def test_what_is_no_list_of_sources_is_told_as_it_was_given(option, value, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text("image,text\na.png,a\n")  # a file of this name would be read as the value
    config = Path(__file__).parents[1] / "configs" / "starter" / "image.yaml"
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(config), "--output", "run", f"--data.{option}", value])
    (line,) = capsys.readouterr().err.splitlines()
    found = re.match(rf"mmtx: error: data\.{option}: found (.*), expected a list of sources, as in \[{{paths: \[FILE\]}}\]$", line)[1]
    assert stop.value.code == 2 and yaml.safe_load(found) == yaml.safe_load(value)


@pytest.mark.parametrize("data, option, value", [
    (CodecData, "batch_size", 0), (CodecData, "multi_size_prob", -0.1), (CodecData, "multi_size_prob", 1.5),
    (VocoderData, "steps", 0), (VocoderData, "batch_size", -1)])
def test_numbers_of_codec_data_out_of_range_are_named(data, option, value):
    with pytest.raises(InputError, match=rf"data\.{option}: found {value}, expected"):
        data([], [], **{option: value})


CALLBACKS = "lightning.pytorch.callbacks"
MISTAKES = {
    "a wrong value of a callback": ("callbacks", {"class_path": f"{CALLBACKS}.EarlyStopping", "init_args": {
        "monitor": "val/loss", "mode": "least"}}, r"trainer.callbacks: `mode` can be min, max, got least"),
    "a wrong value of one of several": ("callbacks", [{"class_path": f"{CALLBACKS}.StochasticWeightAveraging", "init_args": {
        "swa_lrs": -1}}], r"trainer.callbacks: .*swa_lrs. should a positive float"),
    "no such callback": ("callbacks", [{"class_path": "EarlyStoping"}], r"trainer.callbacks: .*EarlyStoping"),
    "no such metric": ("callbacks", [{"class_path": f"{CALLBACKS}.EarlyStopping", "init_args": {"monitor": "val/los"}}],
                       r"trainer.callbacks: found the monitor 'val/los', expected one of train/loss, .*val/loss[^`\]]*$"),
    "no such metric to choose by": ("callbacks", [{"class_path": f"{CALLBACKS}.ModelCheckpoint", "init_args": {"monitor": "val/los"}}],
                                    r"trainer.callbacks: found the monitor 'val/los', expected one of train/loss, .*val/loss[^`\]]*$"),
    "a wrong format of a name": ("callbacks", [{"class_path": f"{CALLBACKS}.ModelCheckpoint", "init_args": {"filename": "{step:q}"}}],
                                r"trainer.callbacks: found ModelCheckpoint with the filename '{step:q}' \(.*\), expected one such as"),
    "a name that does not end": ("callbacks", [{"class_path": f"{CALLBACKS}.ModelCheckpoint", "init_args": {"filename": "{step"}}],
                                r"trainer.callbacks: found ModelCheckpoint with the filename '{step' \(.*\), expected one such as"),
    "a name by number": ("callbacks", [{"class_path": f"{CALLBACKS}.ModelCheckpoint", "init_args": {"filename": "{0}"}}],
                        r"trainer.callbacks: found ModelCheckpoint with the filename '.0.' \(.*\), expected one such as"),
    "two of a kind": ("callbacks", 2 * [{"class_path": f"{CALLBACKS}.EarlyStopping", "init_args": {"monitor": "val/loss"}}],
                      r"trainer: Found more than one stateful callback of type `EarlyStopping`"),
    "a search for a size": ("callbacks", [{"class_path": f"{CALLBACKS}.BatchSizeFinder"}],
                            r"trainer.callbacks: found BatchSizeFinder, expected data.batch_size or data.tokens_per_batch"),
    "an average of epochs": ("callbacks", [{"class_path": f"{CALLBACKS}.StochasticWeightAveraging", "init_args": {
        "swa_lrs": 1e-3, "swa_epoch_start": 1}}], r"trainer.callbacks: found StochasticWeightAveraging, expected ema"),
    "a backbone": ("callbacks", [{"class_path": f"{CALLBACKS}.BackboneFinetuning"}],
                   r"trainer.callbacks: found BackboneFinetuning, expected another, for DecoderModule has no backbone"),
    "a schedule of accumulation": ("callbacks", [{"class_path": f"{CALLBACKS}.GradientAccumulationScheduler", "init_args": {
        "scheduling": {0: 2}}}], r"trainer.callbacks: found GradientAccumulationScheduler, expected trainer.accumulate_grad_batches"),
    "a search for a rate": ("callbacks", [{"class_path": f"{CALLBACKS}.LearningRateFinder"}],
                            r"trainer.callbacks: found LearningRateFinder, expected model.optimizer.learning_rate"),
    "a logger without its package": ("logger", {"class_path": "lightning.pytorch.loggers.WandbLogger"},
                                     r"trainer.logger: .*Requirement 'wandb"),
    "one of several": ("logger", [{"class_path": "lightning.pytorch.loggers.WandbLogger"}], r"trainer.logger: .*Requirement 'wandb"),
    "another strategy": ("strategy", {"class_path": "lightning.pytorch.strategies.DeepSpeedStrategy"},
                         r"trainer.strategy: .*DeepSpeed installed"),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    config = runs.prepare(root, 2, val_check_interval=1)
    config["data"]["init_args"]["num_workers"] = 0
    return config


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_classes_of_lightning_are_one_line(name, tiny, tmp_path, capsys, monkeypatch):
    """Whoever finds them: the parser, a constructor, or the run."""
    for package in ("wandb", "deepspeed"):
        monkeypatch.setitem(sys.modules, package, None)
    option, value, told = MISTAKES[name]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**tiny, "trainer": {**tiny["trainer"], option: value}}))
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(path), "--output", str(tmp_path / "run")])
    lines = [line for line in capsys.readouterr().err.splitlines() if "Seed set" not in line and "parameters train" not in line]
    assert stop.value.code == 2 and len(lines) == 1 and re.match(f"mmtx: error: {told}", lines[0]), lines
    assert len(lines[0]) < 900 and "class path" not in lines[0] and "Union" not in lines[0], lines


@pytest.mark.parametrize("options", [{"limit_val_batches": 0}, {"val_check_interval": 9}])
def test_what_watches_validation_needs_one(tiny, tmp_path, capsys, options):
    callback = {"class_path": f"{CALLBACKS}.EarlyStopping", "init_args": {"monitor": "val/loss"}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**tiny, "trainer": {**tiny["trainer"], **options, "callbacks": [callback]}}))
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(path), "--output", str(tmp_path / "run")])
    assert "trainer.callbacks: found EarlyStopping of val/loss, expected another metric" in capsys.readouterr().err


def test_a_callback_with_a_default_that_yaml_lacks(tiny, tmp_path):
    """That of `Timer` is a member of an enumeration: its configuration could not be written."""
    callback = {"class_path": f"{CALLBACKS}.Timer", "init_args": {"duration": "00:01:00:00"}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**tiny, "trainer": {**tiny["trainer"], "callbacks": [callback]}}))
    main(["fit", "--config", str(path), "--output", str(tmp_path / "run")])
    written = yaml.safe_load((tmp_path / "run" / "metrics" / "config.yaml").read_text())
    assert written["trainer"]["callbacks"][0]["init_args"] == {"duration": "00:01:00:00", "interval": "step", "verbose": True}


@pytest.mark.parametrize("command, kind, option", [
    ("fit", "decoder", "train"), ("fit", "decoder", "validation"), ("prepare", "decoder", "train"),
    ("fit", "image", "train"), ("fit", "image", "validation"), ("fit", "text", "train")])
def test_no_source_is_told_by_the_option(command, kind, option, tiny, tmp_path, capsys):
    config = tiny
    if kind != "decoder":
        config = yaml.safe_load((Path(__file__).parents[1] / "configs" / "starter" / f"{kind}.yaml").read_text())
    data = {**config["data"], "init_args": {**config["data"]["init_args"], "train": runs.FEW[:1], option: []}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**config, "data": data}))
    with pytest.raises(SystemExit) as stop:
        main([command, "--config", str(path), "--output", str(tmp_path / "run")])
    assert stop.value.code == 2
    assert f"mmtx: error: data.{option}: found none, expected at least one source" in capsys.readouterr().err


# -- Code from strangers -------------------------------------------------------------------------------------


def test_the_command_line_alone_says_who_is_trusted():
    for arguments in (["--trusted_only", "true"], ["--trusted_only=true"], ["--trusted_only=True"], ["--trusted_only", "yes"]):
        assert is_trusted_only(["--config", "a", *arguments])
    assert not is_trusted_only(["--config", "a"]) and not is_trusted_only(["--trusted_only", "false"])


STRANGE = {
    "a class": {"class_path": "stranger.Module"},
    "a callback": ("trainer", {"callbacks": [{"class_path": "stranger.Call"}]}),
    "a logger by its name": ("trainer", {"logger": "stranger.Call"}),
    "a function": ("trainer", {"callbacks": [{"class_path": "lightning.pytorch.callbacks.LambdaCallback",
                                              "init_args": {"on_fit_start": "stranger.call"}}]}),
    "a module behind one of ours": ("trainer", {"callbacks": [{"class_path": "lightning.pytorch.callbacks.LambdaCallback",
                                                               "init_args": {"on_fit_start": "mmtx.files.os.abort"}}]}),
    **{f"variants for {place}": ("data", place) for place in ("train", "validation", "test")},
    "a network": ("perceptual", {"network": "stranger.call", "layers": ["a"]}),
}


def ask(folder: Path, told) -> None:
    """What the command says to a configuration of each kind -> status and lines on stderr, by name."""
    sys.path.append(str(folder))
    source, found = Path(__file__).parents[1] / "configs" / "starter" / "image.yaml", {}
    for name, change in STRANGE.items():
        config = yaml.safe_load(source.read_text())
        if name == "a class":
            config["model"] = change
        elif change[0] == "trainer":
            config["trainer"] |= change[1]
        elif change[0] == "data":
            config["data"]["init_args"] |= {place: [{"paths": ["a.jsonl"]}] for place in ("train", "validation", "test")}
            config["data"]["init_args"][change[1]][0]["variants"] = str(folder / "stranger.py:call")
        else:
            config["model"]["init_args"]["perceptual"] = change[1]
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        with contextlib.redirect_stderr(io.StringIO()) as error:
            try:
                main(["fit", "--config", str(folder / "config.yaml"), "--output", str(folder / "run"), "--trusted_only", "true"])
            except SystemExit as stop:
                found[name] = stop.code, [line for line in error.getvalue().splitlines() if "seed" not in line.lower()]
    told.send(found)


def test_nothing_of_a_stranger_runs_with_trusted_only(tmp_path):
    (tmp_path / "stranger.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\ndef call(*a): pass\nclass Call: pass\n")
    here, there = context.Pipe()
    process = context.Process(target=ask, args=(tmp_path, there))  # the list of what is trusted is the process's
    process.start()
    there.close()
    found = here.recv()
    process.join(60)
    assert found.keys() == STRANGE.keys()
    for name, (status, lines) in found.items():
        assert status == 2 and len(lines) == 1 and lines[0].startswith("mmtx: error: "), (name, lines)
        assert "a.jsonl" not in lines[0], "it read data first"
    assert not (tmp_path / "marker").exists()


@pytest.mark.slow
def test_the_current_folder_is_not_looked_at_for_modules(tmp_path):
    for name in ("yaml", "numpy", "callbacks", "torch", "argparse"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\n")
    root = str(Path(__file__).parents[1])
    done = subprocess.run([sys.executable, "-m", "mmtx", "prepare", "--config", "no.yaml", "--output", "a"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=280, env={**os.environ, "PYTHONPATH": root})
    assert done.returncode == 2 and done.stderr.startswith("mmtx: error: no.yaml"), done.stderr
    assert not (tmp_path / "marker").exists()


# -- Ctrl-C --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ctrl_c_ends_fit_with_a_checkpoint_and_prepare_with_its_shards(tmp_path):
    config = runs.prepare(tmp_path, steps=10**6, val_check_interval=10**5)
    config["save_every"] = 10**5
    output = tmp_path / "run"
    processes = runs.start(config, output)
    rows = lambda: len((output / "metrics" / "metrics.csv").read_text().splitlines()) if (
        output / "metrics" / "metrics.csv").exists() else 0
    runs.wait_for(lambda: rows() > 3, processes)
    os.killpg(processes[0].pid, signal.SIGINT)
    processes[0].join(120)
    told = output.with_suffix(".log").read_text()
    assert processes[0].exitcode == 130 and runs.latest(output) >= 2, told
    assert told.count("interrupted") == 1 and "Traceback" not in told, told
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"line {n}"}) + "\n" for n in range(3000)))
    shards = tmp_path / "shards"
    with open(tmp_path / "prepare.log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mmtx", "prepare", str(tmp_path / "rows.jsonl"), "--output", str(shards), "--rows", "1",
             "--tokenizers", str(tmp_path / "text"), "--max_bad", "1"], stdout=log, stderr=log, start_new_session=True)
    while process.poll() is None and not list(shards.glob("shard-*")):
        pass
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    told = (tmp_path / "prepare.log").read_text()
    assert "mmtx: interrupted" in told and "Traceback" not in told, told
    assert not [path for path in shards.iterdir() if not path.name.startswith(("shard-0", "plan.json"))]
