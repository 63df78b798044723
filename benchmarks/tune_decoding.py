"""Temporary: which sizes of blocks are fastest, kernel by kernel. Prints JSON lines."""
import json, sys, time, traceback
from functools import partial
import numpy as np, torch
import torch.nn.functional as F
import decode_speed
from mmtx.inference.graph_engine import GraphEngine
from mmtx.inference.weights import Weights
from mmtx.inference import fused_engine as fs
from mmtx.inference.static_step import torch_step
from mmtx.sequence import Prompt

def say(**k): print(json.dumps(k), flush=True)

def timed(run, n=100):
    for _ in range(5): run()
    a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(); a.record()
    for _ in range(n): run()
    b.record(); torch.cuda.synchronize()
    return a.elapsed_time(b) / n * 1e3

def graphed(run):
    run(); torch.cuda.synchronize()
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g): run()
    return g.replay

def main():
    torch.manual_seed(0)
    say(device=torch.cuda.get_device_name())
    decoder = decode_speed.random_decoder(decode_speed.SHAPES["600m"], "cuda", torch.bfloat16)
    weights = Weights.of(decoder, fixed=True)
    with torch.inference_mode():
        s = torch.empty(2**31, dtype=torch.uint8, device="cuda"); t = torch.empty_like(s)
        say(copy_TBs=2 * 2**31 / timed(lambda: t.copy_(s), 10) / 1e6); del t
        say(read_TBs=2**31 / timed(lambda: s.view(torch.float32).sum(), 10) / 1e6); del s
        w = weights.output; x = torch.randn(1, w.shape[1], device="cuda", dtype=torch.bfloat16); y = x.new_empty(1, len(w))
        say(head_linear_TBs=w.nbytes / timed(graphed(lambda: F.linear(x, w)), 20) / 1e6)
        allowed = torch.rand(1, len(w), device="cuda") < 0.5
        say(us_mask_argmax=timed(graphed(lambda: y.masked_fill_(~allowed, -torch.inf).argmax(-1)), 50))
        for out in (2, 4, 8, 16):
            for warps in (1, 2, 4):
                try:
                    def run():
                        fs._norm_linear[(-(-len(w) // out),)](x, weights.norm.gain, w, w, y, 1e-6, w.shape[1], len(w), ROWS=1, IN=1024, OUT=out,
                                                            BIAS=False, EARLY=False, num_warps=warps)
                    say(head_out=out, warps=warps, TBs=w.nbytes / timed(graphed(run), 20) / 1e6)
                except Exception: traceback.print_exc()
        for tile in (2**12, 2**13, 2**14):
            fs.TILE = tile
            try: say(fused_best_us=timed(graphed(lambda: fs.fused_best(x, w, allowed)), 50), tile=4 * tile)
            except Exception: traceback.print_exc()
        ids = torch.zeros(1, dtype=torch.long, device="cuda")
        def network(make, **more):
            try:
                w = Weights.of(decoder, fixed=True)
                engine = GraphEngine(decoder, w, make)
                engine.prefill([Prompt(np.arange(16))])
                for _ in range(3): engine.step(ids)
                g = engine.captured.graph
                def replay():
                    g.replay()
                us = timed(replay, 100)
                say(us_step=us, **more)
                return engine
            except Exception: traceback.print_exc(); say(failed=True, **more)
        network(torch_step, way="torch")
        cap = torch.cuda.get_device_capability
        for early in (True, False):
            torch.cuda.get_device_capability = cap if early else (lambda *a: (8, 0))
            for tile, fs.WARPS in ((2**13, 4), (2**11, 1), (2**12, 1), (2**12, 2), (2**13, 2), (2**14, 4), (2**14, 8)) if early else ((2**13, 4),):
                fs.TILE = tile
                engine = network(lambda *a: fs.fused_step(*a), way="fused", early=early, tile=tile, warps=fs.WARPS)
                if engine is None: continue
                if (tile, fs.WARPS) == (2**13, 4):
                    from torch.profiler import profile, ProfilerActivity
                    engine.cache.restart(torch.tensor([16], device="cuda"), 16)
                    with profile(activities=[ProfilerActivity.CUDA]) as p:
                        for _ in range(5): engine.captured.graph.replay()
                        torch.cuda.synchronize()
                    for e in sorted(p.key_averages(), key=lambda e: -e.device_time_total)[:14]:
                        say(kernel=e.key[:60], us_each=round(e.device_time_total / max(e.count, 1), 2), count=e.count / 5, early=early)
        torch.cuda.get_device_capability = cap
        # What is left when a kernel is left out: where the time goes.
        fs.TILE, fs.WARPS = 2**13, 4
        class Skip:
            def __getitem__(self, grid): return lambda *a, **k: None
        for name in ("_attend", "_norm_linear", "_norm_swiglu", "_linear_add"):
            kept = getattr(fs, name); setattr(fs, name, Skip())
            network(lambda *a: fs.fused_step(*a), way="fused", without=name)
            setattr(fs, name, kept)
        for slots, part in ((16, 256), (64, 256), (32, 64), (32, 128), (64, 64)):
            fs.SLOTS, fs.PART = slots, part
            network(lambda *a: fs.fused_step(*a), way="fused", slots=slots, part=part)

main()
