"""How much memory do the loss and its gradient take at a vocabulary of 150,000 ids, compared with materialising all logits?

    python benchmarks/loss_memory.py
    python benchmarks/loss_memory.py --device cuda --dtype bfloat16 --tokens 8192

Each in a process of its own, which allocates hidden states and the output matrix, then computes loss and both gradients once;
the figure is peak memory minus that before the loss. Losses must agree to a relative 1e-5, and gradient norms to 1e-4.
`F.linear_cross_entropy` is torch's own fused loss (torch >= 2.13), by default and in chunks.
"""

import argparse
import multiprocessing
import resource
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import interleave, report
from torch import Tensor

from mmtx.config import DecoderConfig
from mmtx.embedding import TokenEmbedding
from mmtx.loss import next_token_loss

BAR, LOSS, GRADIENT = 0.25, 1e-5, 1e-4
PEER = "scores of all tokens"


def ours(table: TokenEmbedding, hidden: Tensor, targets: Tensor) -> Tensor:
    return next_token_loss(table, hidden, targets).total


def full(table: TokenEmbedding, hidden: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ table.weight.T).float(), targets, reduction="sum")


def fused(table: TokenEmbedding, hidden: Tensor, targets: Tensor) -> Tensor:
    return F.linear_cross_entropy(hidden, table.weight, targets, reduction="sum")


def chunked(table: TokenEmbedding, hidden: Tensor, targets: Tensor) -> Tensor:
    return F.linear_cross_entropy(hidden, table.weight, targets, reduction="sum",
                                  options=torch.nn.LinearCrossEntropyOptions())


CANDIDATES = {"mmtx": ours, PEER: full, "torch's fused loss": fused, "torch's fused loss, chunked": chunked}


def measure(name: str, options: argparse.Namespace, channel) -> None:
    """Send peak MB above the memory before, the loss, and the norms of the gradients."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    dtype, cuda = getattr(torch, options.dtype), options.device == "cuda"
    table = TokenEmbedding(DecoderConfig(vocabulary_size=options.ids, width=options.width))
    torch.nn.init.normal_(table.weight, std=options.width ** -0.5)
    table.to(options.device, dtype)
    hidden = torch.randn(options.tokens, options.width).to(options.device, dtype).requires_grad_()
    targets = torch.randint(options.ids, (options.tokens,)).to(options.device)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = resident("VmRSS")
    loss = CANDIDATES[name](table, hidden, targets)
    loss.backward()
    peak = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")
    channel.send(((peak - before) / 1e6, loss.item(), float(hidden.grad.norm()), float(table.weight.grad.norm())))


def resident(mark: str) -> int:
    """Bytes of memory of this process, current (VmRSS) or peak (VmHWM)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(mark)) * 1024
    except OSError:     # not Linux: only the peak is known
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ids", type=int, default=150_000)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="only checks that it runs")
    options = parser.parse_args()
    if options.short:
        options.ids, options.tokens, options.width, options.rounds = 4096, 64, 32, 1
    context, found = multiprocessing.get_context("spawn"), {}

    def run(name: str) -> float:
        here, there = context.Pipe()
        process = context.Process(target=measure, args=(name, options, there))
        process.start()
        there.close()
        size, *found[name] = here.recv()
        process.join()
        return size

    names = [name for name in CANDIDATES if "fused" not in name or hasattr(F, "linear_cross_entropy")]
    results = interleave({name: lambda name=name: run(name) for name in names}, options.rounds)
    for name, (loss, *gradients) in found.items():
        reference, *others = found[PEER]
        precise = options.dtype == "float32"
        assert abs(loss - reference) <= (LOSS if precise else 1e-2) * reference, (name, loss, reference)
        assert all(abs(a - b) <= (GRADIENT if precise else 1e-2) * b for a, b in zip(gradients, others, strict=True)), name
    report("loss_memory" + ("" if options.device == "cpu" else "_gpu"), "MB", results, "mmtx", {PEER: BAR},
           {"ids": options.ids, "tokens": options.tokens, "width": options.width, "dtype": options.dtype,
            "losses": {name: loss for name, (loss, *_) in found.items()}}, options.short, less_is_better=True)


if __name__ == "__main__":
    main()
