"""Small real components that many tests share: a trained text tokenizer, random codecs and a random decoder."""

import itertools
import signal
from collections import Counter

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
    slow = [item for item in items if item.get_closest_marker("slow")]
    for item in slow:
        if not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW))
    # Fast ones first; then files with many slow ones, so that no process is left alone with them at the end.
    count = Counter(item.path for item in slow)
    items.sort(key=lambda item: (item in slow, -count[item.path] if item in slow else 0))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With several processes, tests of a file, which share fixtures, stay in one; its slow ones may go to another.

    pytest-xdist 3.8 has `--dist loadgroup` for that, but its groups are lost with pytest 9.2, which has other node ids.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def add_node_collection(self, node, collection):
            runs = itertools.groupby(collection, key=lambda name: name.partition("::")[0])
            self.groups = {name: number for number, (_, names) in enumerate(runs) for name in names}
            super().add_node_collection(node, collection)

        def _split_scope(self, name):
            return self.groups[name]

    return Scheduling(config, log)


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
