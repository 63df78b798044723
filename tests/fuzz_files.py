"""Damage to files of models, tokenizers and prepared corpora: what is read is right, or refused in one short line.

    python tests/fuzz_files.py --seconds 300

`TARGETS` maps a name to what makes a folder of small real files, and what reads it; `mutate` damages the bytes of one.
"""

import argparse
import json
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

import mmtx
from mmtx.config import CodeRange, DecoderConfig
from mmtx.data.collection import DataSource
from mmtx.data.corpus import read_corpus
from mmtx.data.prepare import prepare
from mmtx.errors import InputError
from mmtx.modality.audio import AudioConfig, AudioTokenizer
from mmtx.modality.autoencoder import NetworkConfig
from mmtx.modality.base import load_tokenizer
from mmtx.modality.image import ImageConfig, ImageTokenizer
from mmtx.modality.text import TextTokenizer
from mmtx.modality.vocoder import VocoderConfig
from mmtx.model import Decoder
from mmtx.pipeline import Model
from mmtx.vocabulary import Vocabulary

VALUES = (-1, 0, 1, 2, 3, 255, 10**6, 10**9, 2**31, 2**62, 10**30, 0.5, float("nan"), float("inf"), 1e300, True, None,
          "x", "8", "\n\x1b[31m", [], {}, [10**9], [[1]], ["a"] * 50)
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 2**31 - 1, 2**63, 2**64 - 1)
LONGEST, SLOW = 300, 10  # characters of a message without the folder's name, seconds


def mutate(data: bytes, chance: random.Random, name: str = "") -> bytes:
    """Damaged bytes: of JSON values, of a header, or anywhere."""
    if name.endswith(".json") and chance.random() < 0.7:
        return mutate_json(data, chance)
    data = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        if not data:
            break
        at = chance.randrange(min(len(data), chance.choice((16, 2000, len(data)))))
        match chance.randrange(7):
            case 0: data[at] = chance.randrange(256)
            case 1: data[at] ^= 1 << chance.randrange(8)
            case 2: del data[at:at + chance.randrange(1, 9)]
            case 3: data[at:at] = chance.randbytes(chance.randrange(1, 9))
            case 4: del data[at:]
            case 5: data[at:at + 8] = chance.choice(NUMBERS).to_bytes(8, "little")
            case 6: data[at:at] = data[at // 2:at // 2 + chance.randrange(1, 99)]
    return bytes(data)


def mutate_json(data: bytes, chance: random.Random) -> bytes:
    """JSON with a value exchanged, removed or added."""
    value = json.loads(data)
    inside = list(containers(value))
    some = chance.choice(inside)
    keys = list(some) if isinstance(some, dict) else list(range(len(some)))
    what = chance.randrange(4) if keys else 3
    if what == 0:
        del some[chance.choice(keys)]
    elif what == 1 and len(keys) > 1:
        a, b = chance.sample(keys, 2)
        some[a], some[b] = some[b], some[a]
    elif what < 3:
        some[chance.choice(keys)] = chance.choice(VALUES)
    elif isinstance(some, dict):
        some[chance.choice(("colour", "\x1b", "kind", "size"))] = chance.choice(VALUES)
    else:
        some.append(chance.choice(VALUES))
    return json.dumps(value).encode()


def containers(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from containers(inner)


class Target(NamedTuple):
    """`read` raises InputError, or gives what must be as `fits` says when files are damaged but not refused."""

    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    files: tuple[str, ...] = ("*.json", "*.safetensors", "*.model")  # which are damaged


def small_tokenizers() -> dict[str, Any]:
    torch.manual_seed(0)
    network = NetworkConfig(width=16, heads=2, encoder_depth=1, decoder_depth=1, levels=(4, 3))
    audio = AudioTokenizer(AudioConfig(mels=8, patch_mels=4, window=1024, chunk=8, network=network)).eval()
    audio.vocoder = audio.new_vocoder(VocoderConfig(width=8, depth=1)).eval()
    return {"text": TextTokenizer.train(["a red circle", "a blue square", "trumpet, C 4"], 290),
            "image": ImageTokenizer(ImageConfig(patch=4, side=8, network=network)).eval(), "audio": audio}


def make_model(folder: Path) -> None:
    tokenizers = small_tokenizers()
    vocabulary = Vocabulary.build(tokenizers)
    ranges = tuple(CodeRange(vocabulary.range(kind).start, vocabulary.levels(kind)) for kind in ("image", "audio"))
    config = DecoderConfig(vocabulary.size, width=16, depth=1, heads=2, kv_heads=1, head_dim=8, mlp_dim=16, composed=ranges,
                           features={"image": 16})
    Model(Decoder(config), vocabulary, tokenizers).save(folder)


def read_model(folder: Path) -> list[int]:
    """The model, used: a sampled answer, whose numbers must not be nonsense."""
    model = mmtx.load(folder, device="cpu")
    return model.caption(np.zeros((8, 8, 3), np.uint8), max_new_tokens=2, temperature=1.0, seed=0)


def make_tokenizer(kind: str) -> Callable[[Path], None]:
    return lambda folder: small_tokenizers()[kind].save(folder)


def read_tokenizer(folder: Path) -> str:
    tokenizer = load_tokenizer(folder)
    if tokenizer.kind == "text":
        text = "a red circle \u2581\0 é 漢"
        assert tokenizer.decode(tokenizer.encode(text)) == text
    return tokenizer.fingerprint


def make_prepared(folder: Path) -> None:
    rows, picture = folder.with_name("rows.jsonl"), folder.with_name("picture.png")
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(picture)
    rows.write_text("".join(json.dumps({"messages": [
        {"role": "user", "content": [{"type": "text", "text": f"what is {n}"}, {"type": "image", "image": str(picture)}]},
        {"role": "assistant", "content": f"number {n}"}]}) + "\n" for n in range(9)))
    prepare(DataSource([str(rows)]), SOME, folder, rows=4, features=True)


SOME = {kind: tokenizer for kind, tokenizer in small_tokenizers().items() if kind != "audio"}


def read_prepared(folder: Path) -> list[tuple]:
    """All documents: their ids and features, a question and its answer in turn."""
    from mmtx.data.prepared import tensors

    tensors.cache_clear()
    corpus = read_corpus([DataSource([str(folder)], task=task) for task in ("caption", "generate")], SOME,
                         Vocabulary.build(SOME), max_seq_len=1000, max_bad=0, features=True)
    found = [corpus.render([(n, 0)])[0] for n in range(len(corpus))]
    return [(rendered.ids.tolist(), [span.values.tolist() for span in rendered.spans], corpus.where(n))
            for n, rendered in enumerate(found)]


TARGETS = {
    "model": Target(make_model, read_model),
    "text": Target(make_tokenizer("text"), read_tokenizer),
    "image": Target(make_tokenizer("image"), read_tokenizer),
    "audio": Target(make_tokenizer("audio"), read_tokenizer),
    "vocabulary": Target(lambda folder: (folder.mkdir(), Vocabulary.build(small_tokenizers()).save(folder / "v.json")),
                         lambda folder: Vocabulary.load(folder / "v.json").size),
    "prepared": Target(make_prepared, read_prepared, ("prepared.json", "*.safetensors")),
}


def fuzz(name: str, folder: Path, count: int, seed: int = 0, seconds: float = float("inf")) -> Counter:
    """Damage files of a target one at a time -> how often each outcome came; what is wrong begins with "!"."""
    target, chance, found = TARGETS[name], random.Random(f"{name} {seed}"), Counter()
    target.make(folder)
    right = target.read(folder)
    paths = sorted(path for pattern in target.files for path in folder.rglob(pattern))
    kept = {path: path.read_bytes() for path in paths}
    end = time.monotonic() + seconds
    for _ in range(count):
        if time.monotonic() > end:
            break
        path = chance.choice(paths)
        path.write_bytes(mutate(kept[path], chance, path.name))
        begun = time.process_time()
        try:
            result = target.read(folder)
            outcome = "the same" if result == right else "!other content" if name == "prepared" else "read"
        except InputError as error:
            told = str(error).replace(str(folder), "")
            outcome = "refused" if len(told) <= LONGEST and "\n" not in told else f"!message: {told[:400]!r}"
        except Exception as error:
            outcome = f"!{path.name}: {type(error).__name__}: {str(error)[:100]}"
        if time.process_time() - begun > SLOW:
            outcome = f"!slow: {path.name}"
        if outcome.startswith("!"):
            shutil.copy(path, tempfile.mkdtemp(prefix="mmtx-fuzz-"))
        found[outcome] += 1
        path.write_bytes(kept[path])
    assert target.read(folder) == right
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("targets", nargs="*", default=list(TARGETS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    wrong = 0
    for name in options.targets:
        with tempfile.TemporaryDirectory() as folder:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            found = fuzz(name, Path(folder) / name, 10**9, options.seed, options.seconds / len(options.targets))
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        wrong += sum(count for outcome, count in found.items() if outcome.startswith("!"))
        print(f"{name}: {sum(found.values())} damaged files, {grown:.0f} MB more: {dict(found.most_common(9))}", flush=True)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
