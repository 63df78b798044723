"""How many files per second does the shipped model caption, a folder at once and one file at a time?

    python benchmarks/captions_speed.py

End to end: `caption` of 1,000 pictures or sounds of the starter data, from files to strings; one call per file; and the
command `mmtx caption` once per file, as in a shell loop, over the first --commands files. Captions must be the same. For
pictures there are two peers in transformers (whose version 5 has no image-to-text pipeline), greedy, with a KV cache, in
batches of 32 and on the same number of threads:

- VisionEncoderDecoder (ViT and GPT-2) with random weights, the decoder of the same width and depth, the encoder with the same patches
  and about as many parameters, from files by its image processor. As in mmtx, a batch runs until its longest caption ends. It does
  less work: its decoder sees a picture through cross-attention, while ours processes the 64 patches in every layer.
- Qwen3, the same decoder with the same weights after our reading of files and our encoder, as vision-language models are written in
  transformers: the same work and the same captions.

--model is another model folder, --dtype the dtype of all decoders. OMP_NUM_THREADS sets the number of threads.
"""

import argparse
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch
from measure import interleave, report

import mmtx
from mmtx.document import Document, Turn
from mmtx.inference.engine import pad
from mmtx.modality.encoder import build_encoder
from mmtx.model_folder import DEFAULT_MODEL
from mmtx.sequence import prompt

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from test_model import qwen3

STARTER = Path(__file__).parents[1] / "demos" / "data" / "starter"
SOURCES = {
    "pictures": [STARTER / "images-test-unseen-style.tar.gz"],
    "sounds": [STARTER / "sounds-test-unseen-notes.tar.gz", *sorted(STARTER.glob("sounds-train-*.tar.gz"))],
}
BAR = 8.0
PEER, SAME_WORK, PEER_BAR = "transformers VisionEncoderDecoder", "transformers Qwen3, same weights", 5.0
TOGETHER = 32  # batch size of the peers


def unpack(kind: str, count: int, folder: Path) -> list[Path]:
    """Write `count` images or sounds of the starter data to a folder -> their paths."""
    def members():
        for source in SOURCES[kind]:
            with tarfile.open(source) as tar:
                for member in tar:
                    if member.isfile() and not member.name.endswith(".json"):
                        yield member.name, tar.extractfile(member).read()

    folder.mkdir()
    paths = []
    for name, content in islice(members(), count):
        paths.append(folder / Path(name).name)
        paths[-1].write_bytes(content)
    return paths


def vision_encoder_decoder(model: mmtx.Model, lengths: list[int]) -> Callable[[list[str]], list[str]]:
    """A captioner in transformers of the size of our model; `lengths` are the ids that ours writes for each file."""
    from PIL import Image
    from transformers import (
        GPT2Config,
        VisionEncoderDecoderConfig,
        VisionEncoderDecoderModel,
        ViTConfig,
        ViTImageProcessor,
    )

    c, image, text = model.decoder.config, model.tokenizers["image"].config, model.tokenizers["text"]
    # A ViT of the decoder's width with about as many parameters as the encoder.
    encoder = build_encoder(c.encoders.get("image") or model.tokenizers["image"].encoder_config)
    width, heads = c.width, c.heads
    depth = max(1, round(sum(parameter.numel() for parameter in encoder.parameters()) / (12 * width ** 2)))
    vision = ViTConfig(hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, intermediate_size=4 * width,
                       image_size=image.side, patch_size=image.patch)
    words = GPT2Config(vocab_size=text.size + 2, n_embd=c.width, n_layer=c.depth, n_head=c.heads, n_inner=c.mlp_dim, n_positions=128)
    network = VisionEncoderDecoderModel(config=VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, words)).eval()
    settings = network.generation_config
    settings.decoder_start_token_id, settings.pad_token_id, settings.eos_token_id = text.size, text.size + 1, None
    network.to(dtype := model.decoder.embedding.weight.dtype)
    processor = ViTImageProcessor(size={"height": image.side, "width": image.side})

    def run(files: list[str]) -> list[str]:
        said: list[str] = []
        for first in range(0, len(files), TOGETHER):
            pictures = [Image.open(file).convert("RGB") for file in files[first:first + TOGETHER]]
            new = max(lengths[first:first + TOGETHER])
            pixels = processor(pictures, return_tensors="pt").pixel_values.to(dtype)
            ids = network.generate(pixels, max_new_tokens=new, do_sample=False)
            said += [text.decode([ident for ident in row if ident < text.size]) for row in ids.tolist()]
        return said
    return run


def qwen3_captions(model: mmtx.Model) -> Callable[[list[str]], list[str]]:
    """A captioner with the same decoder in transformers."""
    decoder, v, text = model.decoder, model.vocabulary, model.tokenizers["text"]
    peer, first_of_text = qwen3(decoder).eval().to(decoder.embedding.weight.dtype), v.range("text").start
    peer.lm_head = torch.nn.Linear(decoder.config.width, v.range("special").stop, bias=False)     # ours scores only text and tags
    peer.lm_head.weight.data = decoder.output_matrix()[:v.range("special").stop].detach()

    def run(files: list[str]) -> list[str]:
        said: list[str] = []
        for first in range(0, len(files), TOGETHER):
            parts = model.encode_parts([mmtx.Image(file) for file in files[first:first + TOGETHER]], codes=False)
            ids, lengths, features = pad([prompt(Document((Turn("user", (part,)),)), v) for part in parts], torch.device("cpu"))
            assert (lengths == ids.shape[1]).all(), "pictures of unequal size"
            written = peer.generate(inputs_embeds=decoder.embed(ids, features), attention_mask=torch.ones_like(ids),
                                    max_new_tokens=256, do_sample=False, eos_token_id=v.end, pad_token_id=v.end)
            said += [text.decode([ident - first_of_text for ident in row if ident != v.end]) for row in written.tolist()]
        return said
    return run


def measure(kind: str, folder: Path, options: argparse.Namespace) -> None:
    files = [str(path) for path in unpack(kind, options.files, folder / kind)]
    model, captions = mmtx.load(options.model, dtype=options.dtype), {}
    now = time.perf_counter if options.clock == "wall" else time.process_time

    def at_once() -> float:
        start = now()
        captions["at once"] = model.caption(files)
        return len(files) / (now() - start)

    def one_by_one() -> float:
        start = now()
        captions["one by one"] = [model.caption(file) for file in files]
        return len(files) / (now() - start)

    def commands() -> float:
        start = now()
        for file in files[:options.commands]:
            subprocess.run([sys.executable, "-m", "mmtx", "caption", "--model", options.model, "--dtype", options.dtype, file],
                           check=True, capture_output=True)
        return options.commands / (now() - start)

    said = model.caption(files)
    candidates = {"at once": at_once, "one file at a time": one_by_one, "one command a file": commands}
    if options.clock == "processor":
        del candidates["one command a file"]  # runs in other processes
    bars = dict.fromkeys([*candidates][1:], BAR)
    if kind == "pictures":
        lengths = [len(model.tokenizers["text"].encode(caption)) + 1 for caption in said]
        for name, theirs in ((PEER, vision_encoder_decoder(model, lengths)), (SAME_WORK, qwen3_captions(model))):
            def transformers(name: str = name, theirs: Callable = theirs) -> float:
                start = now()
                captions[name] = theirs(files)
                return len(files) / (now() - start)

            candidates[name], bars[name] = transformers, PEER_BAR
            with torch.inference_mode():
                theirs(files[:2])
    with torch.inference_mode():
        results = interleave(candidates, options.rounds)
    same = sum(a == b for a, b in zip(captions["at once"], captions["one by one"], strict=True))
    most = 1.0 if options.dtype == "float32" else 0.98  # rounding depends on the shape of the batch
    assert same >= most * len(files), f"{len(files) - same} captions differ"
    if SAME_WORK in captions:
        same = sum(a == b for a, b in zip(captions["at once"], captions[SAME_WORK], strict=True))
        assert same >= 0.98 * len(files), f"transformers' captions differ in {len(files) - same} of {len(files)}"
    name = "_".join(["captions_speed", kind, *["processor"][:options.clock != "wall"], *[options.dtype][:options.dtype != "float32"]])
    report(name, f"files/s of {options.clock} time", results, "at once", bars,
           {"files": len(files), "model": options.model, "threads": torch.get_num_threads()}, options.short)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--commands", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall",
                        help="processor: seconds of processor time, which other jobs change least; with one thread only")
    parser.add_argument("--short", action="store_true", help="only checks that it runs")
    options = parser.parse_args()
    if options.short:
        options.files, options.commands, options.rounds = 4, 1, 1
    with tempfile.TemporaryDirectory() as folder:
        for kind in options.kinds:
            measure(kind, Path(folder), options)


if __name__ == "__main__":
    main()
