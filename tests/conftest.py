"""Small real components that many tests share: a trained text tokenizer, random codecs and a random decoder."""

import signal

import numpy as np
import pytest
import torch

from mmtx.config import CodeRange, DecoderConfig
from mmtx.modality.audio import AudioConfig, AudioTokenizer
from mmtx.modality.autoencoder import NetworkConfig
from mmtx.modality.base import Tokenizer
from mmtx.modality.image import ImageConfig, ImageTokenizer
from mmtx.modality.text import TextTokenizer
from mmtx.model import Decoder
from mmtx.pipeline import Model
from mmtx.vocabulary import Vocabulary

# Two cores are shared: more than one thread can be fifty times slower while another process runs.
torch.set_num_threads(1)

# A shell that runs the tests in the background makes them ignore Ctrl-C, and so would the programs that they interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SLOW = 1800  # seconds for a slow test; the others' limit is in pyproject.toml


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)  # fast ones first
    for item in items:
        slow = item.get_closest_marker("slow") is not None
        if slow and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW))
        # With several processes (`-n 2 --dist loadgroup`), tests of a file, which share fixtures, stay in one process.
        item.add_marker(pytest.mark.xdist_group(f"{item.path.stem}{'-slow' if slow else ''}"))


def pytest_make_parametrize_id(val):
    """A test id that all processes agree on: bytes of a generated file may contain the time, and so differ between processes."""
    return f"{len(val)} bytes" if isinstance(val, bytes) else None


NETWORK = NetworkConfig(width=32, heads=2, encoder_depth=1, decoder_depth=1, levels=(4, 3, 3))


@pytest.fixture(scope="session")
def tokenizers():
    """A tokenizer of each kind; the codecs have random weights."""
    torch.manual_seed(0)
    return {
        "text": TextTokenizer.train(["a red circle", "a blue square", "trumpet, C 4", "violin, D sharp 5"], 300),
        "image": ImageTokenizer(ImageConfig(patch=8, side=16, network=NETWORK)).eval(),
        "audio": AudioTokenizer(AudioConfig(mels=16, patch_mels=8, window=512, chunk=8, network=NETWORK)).eval(),
    }


@pytest.fixture(scope="session")
def vocabulary(tokenizers):
    return Vocabulary.build(tokenizers)


@pytest.fixture(scope="session")
def tiny_model(tokenizers, vocabulary):
    """A random decoder with its tokenizers."""
    torch.manual_seed(1)
    ranges = [CodeRange(vocabulary.range(kind).start, vocabulary.levels(kind)) for kind in ("image", "audio")]
    config = DecoderConfig(vocabulary.size, width=32, depth=2, heads=4, kv_heads=2, head_dim=16, mlp_dim=64,
                           composed=tuple(ranges))
    return Model(Decoder(config), vocabulary, tokenizers).to("cpu")


class Codes(Tokenizer):
    """A tokenizer stub for tests that start from codes: it has sizes and nothing else."""

    size = 0
    bands = 3

    def __init__(self, kind: str, levels: tuple[int, ...]):
        self.kind, self.levels, self.size = kind, levels, int(np.prod(levels))

    def encode(self, media):
        raise NotImplementedError

    decode = from_folder = encode

    def files(self):
        return {"config.json": repr((self.kind, self.levels)).encode()}


@pytest.fixture(scope="session")
def small_vocabulary():
    """20 text pieces, 6 image codes and 4 audio codes in 3 bands: ids [0, 20), [276, 282) and [282, 286)."""
    kinds = {"text": (20,), "image": (3, 2), "audio": (2, 2)}
    return Vocabulary.build({kind: Codes(kind, levels) for kind, levels in kinds.items()})
