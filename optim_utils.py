"""Gradient descent on prompt embeddings or latents against any differentiable score.

Detectors that need a prompt are differentiable functions of a trace, and the predictions of the pipeline are
differentiable in embeddings and latents, so one descent serves every mitigation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Descent(NamedTuple):
    """What a descent found.

    Attributes:
        best: the iterate of lowest loss of every row, ``(rows, ...)``; the first below the target where there is one.
        losses: ``(iterations + 1, rows)``, the start first; NaN once a row has stopped.
        steps: how many steps each row took, ``(rows,)``.
    """

    best: Tensor
    losses: Tensor
    steps: Tensor


def descend(
    loss_of: Callable[[Tensor, Tensor], Tensor],
    start: Tensor,
    *,
    lr: float = 0.05,
    iterations: int = 10,
    target: float | None = None,
    free: Tensor | None = None,
    penalty: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Descent:
    """Adam on every row of ``start`` at once; rows do not see one another.

    Wen et al. use AdamW; its decay pulls embeddings to zero for no reason of the method's, so there is none here.

    Args:
        loss_of: ``(iterates (k, ...), rows (k,)) -> losses (k,)``, the rows that are still moving and their numbers.
        start: ``(rows, ...)``.
        target: a row stops once its loss is at or below it.
        free: what may move, broadcast over ``start``; ones and zeros.
        penalty: as ``loss_of``; added to the loss where a step is chosen, but not where it is compared with the target
            or with other iterates.

    Raises:
        FloatingPointError: a loss is not finite; names the row.
    """
    moving = start.detach().float().clone().requires_grad_()
    optimizer = torch.optim.Adam([moving], lr=lr)
    best, lowest = moving.detach().clone(), torch.full((len(start),), torch.inf, device=start.device)
    rows = torch.arange(len(start), device=start.device)  # those that still move
    steps, losses = torch.zeros_like(rows), []
    for step in range(iterations + 1):
        with torch.set_grad_enabled(step < iterations):
            loss = loss_of(moving[rows], rows)
        if not loss.isfinite().all():
            raise FloatingPointError(f"the loss of row {rows[~loss.isfinite()][0].item()} is not finite")
        seen = torch.full_like(lowest, torch.nan).index_put((rows,), loss.detach().float())
        losses.append(seen)
        better = seen < lowest  # never where it is NaN
        best[better], lowest[better] = moving.detach()[better], seen[better]
        going = torch.ones_like(rows, dtype=torch.bool) if target is None else loss.detach() > target
        if step == iterations or not going.any():
            break
        downhill = loss if penalty is None else loss + penalty(moving[rows], rows)
        (gradient,) = torch.autograd.grad(downhill[going].sum(), moving)
        # Rows that have stopped are moved on by Adam's memory; nobody looks at them any more.
        moving.grad = gradient if free is None else gradient * free
        optimizer.step()
        rows = rows[going]
        steps[rows] += 1
    return Descent(best, torch.stack(losses), steps)


def all_but_the_start_token(embeds: Tensor) -> Tensor:
    """``free`` for prompt embeddings ``(rows, tokens, width)``: the start token stays as it is, as in Wen et al."""
    free = torch.ones_like(embeds[:1])
    free[:, 0] = 0
    return free
