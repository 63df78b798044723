"""The kernels of a GPU in Triton's interpreter, and the static step through a compiler, against full passes of the decoder."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from mmtx.inference.choose import has_triton
from mmtx.inference.graph_engine import GraphEngine
from mmtx.inference.reference import ReferenceEngine
from mmtx.inference.static_step import compiled_step
from mmtx.inference.weights import Weights
from mmtx.sequence import Prompt

sys.path.insert(0, str(Path(__file__).parent))
from test_engines import SHAPES, random_decoder

# In a process of its own: whether kernels are compiled or interpreted is decided where they are defined.
INTERPRETED = """
import sys
import numpy as np, torch
sys.path.insert(0, "tests")
from test_engines import SHAPES, random_decoder
import mmtx.inference.graph_engine as graph_engine
import mmtx.inference.fused_engine as fused_engine
from mmtx.inference.reference import ReferenceEngine
from mmtx.inference.weights import Weights
from mmtx.sequence import Prompt

assert fused_engine.works(torch.device("cpu"))
graph_engine.SMALLEST = 32
for shape, (part, slots, tile), lengths in [
        ({}, (64, 32, 256), (9,)), ({}, (64, 64, 256), (30,) * 9), (SHAPES[9], (16, 16, 256), (9, 1, 30) * 3), *((SHAPES[number], (16, 16, 2 ** 11), (9, 1, 30)) for number in (0, 2, 4, 9, 10))]:
    shape = {**shape, "head_dim": 16}
    fused_engine.PART, fused_engine.SLOTS, fused_engine.TILES = part, slots, dict.fromkeys(fused_engine.TILES, (tile, 4))
    decoder, rows = random_decoder(**shape), len(lengths)
    weights = Weights.of(decoder)
    assert fused_engine.fits(weights)
    engine, plain = fused_engine.FusedEngine(decoder, weights), ReferenceEngine(decoder)
    prompts = [Prompt(np.arange(length)) for length in lengths]
    with torch.inference_mode():
        engine.prefill(prompts, room=2), plain.prefill(prompts)
        for step in range(3):                                                 # behind the second the cache of three rows grows
            ids = torch.randint(44, (rows,))
            engine.step(ids), plain.step(ids)
            assert (engine.hidden - plain.hidden).abs().max() < 2e-5, (shape, part, rows, step)
            for reach in (1, 7, 10, 44):
                allowed = torch.rand(rows, reach) < 0.5
                allowed[:, 0] |= ~allowed.any(1)
                assert engine.best(allowed).equal(plain.best(allowed)), (shape, reach)
    assert engine.cache.capacity == (64 if rows > 1 else 32)

matrix = torch.randn(700, 24)
for value in (torch.nan, torch.inf, -torch.inf, 1e30, 0):                # of scores that are not finite, or equal, the first that is allowed
    allowed = torch.zeros(2, 700, dtype=torch.bool)
    allowed[0, 650:], allowed[1, 3] = True, True
    matrix[:] = abs(matrix) if value != 0 else matrix
    best = fused_engine.fused_best(torch.full((2, 24), value), matrix, allowed).tolist()
    assert best[1] == 3 and (best[0] == 650 or abs(value) == 1e30), (value, best)
"""


@pytest.mark.skipif(not has_triton(), reason="needs Triton")
@pytest.mark.skipif(np.lib.NumpyVersion(np.__version__) >= "2.5.0", reason="the interpreter needs an older NumPy")
def test_kernels_follow_full_passes():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", INTERPRETED], cwd=Path(__file__).parents[1], capture_output=True, text=True,
                          env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], SHAPES[9]], ids=str)
def test_the_static_step_is_one_graph_for_a_compiler(shape):
    """With `fullgraph`, and without compiling anew at any step but where the cache has grown."""
    torch.compiler.reset()
    decoder, prompts = random_decoder(**shape), [Prompt(np.arange(length) % 44) for length in (250, 3)]
    engine = GraphEngine(decoder, Weights.of(decoder), partial(compiled_step, backend="aot_eager"))
    plain = ReferenceEngine(decoder)
    with torch.inference_mode():
        engine.prefill(prompts, room=2), plain.prefill(prompts)
        for step in range(10):
            ids = torch.randint(44, (2,))
            with torch._dynamo.config.patch(error_on_recompile=step not in (0, 6)):
                engine.step(ids)
            plain.step(ids)
            assert (engine.hidden - plain.hidden).abs().max() < 2e-5, step
    assert engine.cache.capacity == 512
