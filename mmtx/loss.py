"""Next-token cross entropy that never holds the logits of all tokens at once.

Shapes: M targets, m of them in a chunk, D width, R rows of the output table, V vocabulary, P parts of an id.

Two things keep memory small. Tokens are processed in chunks whose logits stay in the cache, and each chunk's gradient is
computed right away, as in Liger Kernel (https://arxiv.org/abs/2410.10989) and cut cross entropy
(https://arxiv.org/abs/2411.09009). And codes composed from digits need no logit of their own: the logit of a code is the
sum of the logits of its digits, so the sum of exp(logit) over all codes of a range is the product of the sums over each
digit. That is exact: a range of 8 * 8 * 8 * 6 * 5 = 15 360 codes costs 35 logits.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmtx.embedding import TokenEmbedding

CHUNK = 2 ** 24  # logits held at a time
NEAR = 2 ** 19   # logits that fit in the caches of a CPU core


class TokenLoss(NamedTuple):
    """The loss to minimise, which has a gradient, and its terms for each target, which have none."""

    total: Tensor    # () sum over targets of weight * (loss + z_loss * log_sum ** 2)
    loss: Tensor     # (M,) cross entropy in nats
    log_sum: Tensor  # (M,) log of the sum of exp(logit) over the competing ids


def next_token_loss(output: TokenEmbedding, hidden: Tensor, targets: Tensor, plain: int = 0,
                    weights: Tensor | None = None, z_loss: float = 0.0) -> TokenLoss:
    """Hidden states (M, D) and target ids (M,) -> their loss.

    Args:
        output: the output table, whose rows, composed or not, give the logits.
        hidden: final hidden states (M, D).
        targets: the id that should come next, for each of them.
        plain: number of leading targets for which only ids with a row of their own compete.
        weights: weight of each target, (M,); 1 by default.
        z_loss: weight of the squared log-sum-exp, which keeps logits from drifting (https://arxiv.org/abs/2204.02311).
    """
    precise = torch.promote_types(hidden.dtype, torch.float32)
    weights = hidden.new_ones(len(targets), dtype=precise) if weights is None else weights.to(precise)
    parts = []
    first, *last = output.tables()
    # All rows of the first run belong to plain ids; only the last run has rows of digits.
    own = (first, last[0][:output.plain - len(first)]) if last else (first[:output.plain],)
    for chosen, tables, groups in (
        (slice(None, plain), own, output.groups[:1]),
        (slice(plain, None), (first, *last), output.groups),
    ):
        if len(targets[chosen]):
            places = output.parts[targets[chosen]][:, :max(map(len, groups))]
            parts.append(_FusedLoss.apply(hidden[chosen], places, weights[chosen], groups, z_loss,
                                          torch.is_grad_enabled(), *tables))
    if not parts:  # no targets: a loss of 0 with a gradient of 0
        empty = hidden.new_empty(0, dtype=precise)
        return TokenLoss(hidden.sum().to(precise) * 0.0, empty, empty)
    total, loss, log_sum = zip(*parts)
    return TokenLoss(sum(total), torch.cat(loss), torch.cat(log_sum))


class _FusedLoss(torch.autograd.Function):
    """Loss and gradient, chunk by chunk.

    `places` (M, P) are the rows whose sum makes each target, padded with R. `groups` are numbers of rows: one for each digit
    of each range of ids. `tables` are the R rows in consecutive runs, of which frozen ones get no gradient.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, places: Tensor, weights: Tensor, groups: tuple[tuple[int, ...], ...], z_loss: float,
                differentiate: bool, *tables: Tensor):
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        precise = torch.promote_types(dtype, torch.float32)
        with torch.autocast(device, enabled=False):
            states, rows = hidden.to(dtype), [table.to(dtype) for table in tables]
            sizes = [len(table) for table in tables]
            total = sum(sizes)
            d_hidden = torch.empty_like(states) if differentiate else None
            trains = [differentiate and needed for needed in ctx.needs_input_grad[6:]]
            d_tables = [torch.zeros_like(table, dtype=precise) if train else None for table, train in zip(tables, trains)]
            loss, log_sum = torch.empty(2, len(hidden), dtype=precise, device=hidden.device)
            size = min(len(hidden), max(1, CHUNK // total))
            near = max(1, NEAR // total) if hidden.device.type == "cpu" else size
            # Allocated once: the system takes as long to zero a large block as a product takes to fill it.
            made = states.new_empty(size, total)
            exact = made.new_empty(min(near, size), total, dtype=precise) if dtype != precise else None
            products = [torch.empty_like(run) if train and dtype != precise else None for run, train in zip(rows, trains)]
            real = (places < total).to(precise)                              # (M, P)
            places = places.clamp_max(total - 1)
            for start in range(0, len(hidden), size):
                state, scores = states[start:start + size], made[:min(size, len(hidden) - start)]
                of_runs = scores.split(sizes, 1)                             # (m, rows of the run) each
                for run, some in zip(rows, of_runs):
                    torch.mm(state, run.T, out=some)
                for first in range(0, len(state), near):
                    some = scores[first:first + near]
                    chunk = slice(start + first, start + first + len(some))
                    given = some if exact is None else exact[:len(some)].copy_(some)
                    reached = (given.gather(1, places[chunk]) * real[chunk]).sum(1)
                    log_sum[chunk] = _softmax_(given, groups)
                    loss[chunk] = log_sum[chunk] - reached
                    if differentiate:
                        slope = 1 + 2 * z_loss * log_sum[chunk, None]
                        given.scatter_add_(1, places[chunk], -real[chunk] / slope)
                        if given is not some:
                            some.copy_(given)
                if differentiate:
                    # The weights of targets are applied to the narrow side of the products.
                    chunk = slice(start, start + size)
                    slope = (weights[chunk] * (1 + 2 * z_loss * log_sum[chunk]))[:, None]
                    for number, (run, some) in enumerate(zip(rows, of_runs)):
                        if number == 0:
                            torch.mm(some, run, out=d_hidden[chunk])
                        else:
                            d_hidden[chunk].addmm_(some, run)
                    d_hidden[chunk].mul_(slope)
                    state = (state * slope).to(dtype)
                    for d_table, product, some in zip(d_tables, products, of_runs):
                        if d_table is None:
                            continue
                        if product is None:
                            d_table.addmm_(some.T, state)
                        else:
                            d_table.add_(torch.mm(some.T, state, out=product))
        if differentiate:
            ctx.save_for_backward(d_hidden.to(hidden.dtype), *(None if found is None else found.to(table.dtype)
                                                               for found, table in zip(d_tables, tables)))
        ctx.mark_non_differentiable(loss, log_sum)
        return (weights * (loss + z_loss * log_sum.square())).sum(), loss, log_sum

    @staticmethod
    @once_differentiable
    def backward(ctx, d_total: Tensor, *_: Tensor):
        d_hidden, *d_tables = ctx.saved_tensors
        return (d_hidden * d_total, None, None, None, None, None,
                *(None if found is None else found * d_total for found in d_tables))


def _softmax_(scores: Tensor, groups: tuple[tuple[int, ...], ...]) -> Tensor:
    """Log-sum-exp over all ids (m,) from the logits of rows (m, R), which are overwritten with its gradient."""
    if len(groups) == 1 and len(groups[0]) == 1:
        return _shares_(scores)
    digits = iter(scores.split([size for group in groups for size in group], dim=-1))
    runs = [[next(digits) for _ in group] for group in groups]
    totals = torch.stack([cast(Tensor, sum(map(_shares_, group))) for group in runs])                 # (groups, m)
    log_sum = totals.logsumexp(0)
    for group, total in zip(runs, totals, strict=True):
        for run in group:
            # The probability of the range, times that of the value among those of its digit.
            run.mul_((total - log_sum).exp_()[:, None])
    return log_sum


def _shares_(scores: Tensor) -> Tensor:
    """Log-sum-exp (m,) of logits (m, n), which are overwritten with their softmax; it follows from the two maxima."""
    highest = scores.amax(1)
    torch.softmax(scores, 1, out=scores)
    return highest - scores.amax(1).log_()
