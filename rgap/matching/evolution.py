"""Codes to begin with by an evolution strategy, which asks for values of the objective alone.

A generator bends the objective of its codes into many valleys; CMA-ES draws codes from a normal
distribution, N(0, 1) at first, and moves it to where the better half of them was.  It is the search
of Li, Zhang, Liu and Liu (2022) for gradients behind defences; here what it found is where a search
by gradients begins.

Source: Hansen, *The CMA evolution strategy* (2016), by the package ``cma``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

__all__ = ["evolved"]

WIDE = 200  # unknowns above which variances alone are learned: a covariance takes their square


def evolved(
    values: Callable[[Tensor], Tensor],
    rows: Tensor,
    generations: int,
    seed: int,
    ends: Callable[[int, Tensor], bool],
) -> Tensor:
    """The rows, with the best code of an evolution strategy in place of the first.

    Args:
        values: of the objective at rows [R, n], [R].
        rows: starts from N(0, 1), [R, n].
        generations: at most.
        seed: of what is drawn; the global random state is not touched.
        ends: told the number and the values of every generation; True: it was the last.

    Raises:
        ImportError: the package is not installed.

    >>> far, never = lambda r: (r - 3.0).square().sum(1), lambda number, values: False
    >>> rows = evolved(far, torch.zeros(2, 4), 60, 0, never)
    >>> bool((rows[0] - 3.0).abs().max() < 0.1), rows[1].tolist()
    (True, [0.0, 0.0, 0.0, 0.0])
    """
    try:
        import cma
    except ImportError as error:
        raise ImportError(
            "evolution: codes to begin with come from the package cma, which is not installed; "
            "write pip install 'rgap[evolution]', or evolution=0"
        ) from error
    draw = np.random.default_rng(seed % 2**64)
    strategy = cma.CMAEvolutionStrategy(
        np.zeros(rows.shape[1]),
        1.0,
        {
            "randn": lambda *shape: draw.standard_normal(shape),
            "seed": np.nan,  # leave numpy's own state
            "verbose": -9,
            "maxiter": generations,
            "CMA_diagonal": rows.shape[1] > WIDE,
        },
    )
    number, over = 0, False
    while not (over or strategy.stop()):
        asked = strategy.ask()
        own = values(torch.from_numpy(np.stack(asked)).to(rows)).double()
        own = torch.nan_to_num(own, nan=torch.inf)
        strategy.tell(asked, own.tolist())
        over, number = ends(number, own), number + 1
    best = strategy.result.xbest
    if best is None:
        return rows
    return torch.cat([torch.from_numpy(best).to(rows)[None], rows[1:]])
