"""What does a token in a packed batch cost as the context grows and the length of documents stays the same?

    python benchmarks/packed_cost.py

Rows of one, two and more documents of equal length; forward, loss and backward. Each document attends only to itself, so the cost
per token should be constant. Each batch has --batch tokens, in fewer rows as the context grows. OMP_NUM_THREADS sets the number of
threads.
"""

import argparse
import time

import torch
from measure import interleave, report

from mmtx.config import DecoderConfig
from mmtx.loss import next_token_loss
from mmtx.model import Decoder
from mmtx.varlen import Packing

CONFIG = DecoderConfig(20_000, width=192, depth=4, heads=3, kv_heads=3, head_dim=64, mlp_dim=512)
BAR = 1.15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--document", type=int, default=256, help="tokens of each document, default: 256")
    parser.add_argument("--context", type=int, default=512, help="x1, default: 512")
    parser.add_argument("--batch", type=int, default=4096, help="tokens in a batch, default: 4096")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--short", action="store_true", help="only checks that it runs")
    options = parser.parse_args()
    config = CONFIG
    if options.short:
        config = DecoderConfig(512, width=32, depth=1, heads=2, kv_heads=2, head_dim=16, mlp_dim=32)
        options.document, options.context, options.batch, options.rounds = 8, 16, 128, 1
    torch.manual_seed(0)
    decoder = Decoder(config).to(options.device)
    ids = torch.randint(config.vocabulary_size, (options.batch + 1,), device=options.device)

    def run(times: int) -> float:
        """Microseconds per token."""
        if options.device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        token = torch.arange(options.batch, device=options.device).view(-1, options.context * times)
        packing = Packing.of(token % (options.context * times) // options.document)
        hidden = decoder(ids[:-1].view_as(token), token % options.document, packing)
        next_token_loss(decoder.embedding, hidden.flatten(0, 1), ids[1:]).total.backward()
        decoder.zero_grad()
        if options.device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / options.batch * 1e6

    name = "context x{}".format
    candidates = {name(times): lambda times=times: run(times) for times in (1, 2, 4, 8)}
    interleave(candidates, 1)
    results = interleave(candidates, options.rounds)
    report("packed_cost" + ("" if options.device == "cpu" else "_gpu"), "microseconds a token", results, name(8),
           {name(1): BAR}, {"document": options.document, "context x1": options.context, "batch": options.batch,
                            "threads": torch.get_num_threads()}, options.short, less_is_better=True)


if __name__ == "__main__":
    main()
