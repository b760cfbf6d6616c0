"""A fully connected layer's gradient in the coordinates in which its zeros are looked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Layer", "coordinates"]

NOISE = 16.0  # error of an entry of G over unit·(size of its row): sums of B terms, safely
LOOSE = 1e-4  # zero of a kernel in single precision


@dataclass
class Layer:
    """The layer in coordinates of its gradient's row space; rows of G V scaled to equal errors."""

    rows: Tensor  # R [live, B]: rows of G V over their sizes, errors of an entry ~ noise
    white: Tensor  # rows of U of unit length, [live, B], single precision: well-conditioned kernels
    live: Tensor  # units with a gradient, [live]
    mixed: Tensor  # L = G V, [m, B]
    sizes: Tensor  # of the rows of G, [m]
    basis: Tensor  # V [n, B]
    sigma: Tensor  # singular values [B]
    weights: Tensor  # w [B]: ∂b = L w
    forward: Tensor  # M = W V [m, B]
    bias: Tensor  # b [m]
    centres: Tensor  # z of the live units in two weighted means of the batch, [2, live]
    loose: float  # largest entry of a kernel on a row of ``white`` that counts as zero
    noise: float  # largest error of an entry of R
    scale: float  # what G and ∂b were divided by


def coordinates(
    gradient: Tensor, bias_gradient: Tensor, weight: Tensor, bias: Tensor, rank: int, unit: float
) -> Layer | str:
    """Coordinates of the search, or why there is none."""
    gradient, bias_gradient = gradient.double(), bias_gradient.double()
    weight, bias = weight.double(), bias.double()
    scale = float(gradient.abs().max())
    if not scale > 0:
        return "the gradient of the weight is zero: no sample left a trace"
    gradient, bias_gradient = gradient / scale, bias_gradient / scale
    _, sigma, vh = torch.linalg.svd(gradient, full_matrices=False)
    floor = 2 * max(unit, max(gradient.shape) ** 0.5 * 2**-53) * float(sigma[0])
    if not float(sigma[rank - 1]) > floor or bool((sigma[rank:] > 16 * floor).any()):
        ratios = ", ".join(f"{s:.1e}" for s in (sigma / sigma[0])[: rank + 2].tolist())
        return (
            f"the gradient has rank {int((sigma > floor).sum())} in the update's precision, not "
            f"{rank}: σ/σ_1 = {ratios}"
        )
    basis, sigma = vh[:rank].T, sigma[:rank]
    mixed = gradient @ basis
    sizes = gradient.norm(dim=1)
    live = torch.nonzero(sizes > 1e-100).flatten()
    if len(live) < rank + 1:
        return f"{len(live)} units have a gradient; {rank} samples need at least {rank + 1}"
    white = mixed / sigma
    weights = white.T @ bias_gradient / sigma
    misfit = float(
        (mixed @ weights - bias_gradient).norm() / bias_gradient.norm().clamp_min(1e-300)
    )
    if misfit > 1e3 * floor / float(sigma[-1]):
        return (
            f"the bias gradient is not in the range of the weight gradient (relative distance "
            f"{misfit:.1e}): they are not of one fully connected layer"
        )
    # Two points of the batch's affine hull: least squares over the rows, and the least norm.
    mean = gradient.T @ bias_gradient / bias_gradient.square().sum()
    nearest = basis @ weights / weights.square().sum()
    sizes = sizes.clamp_min(1e-3 * float(sizes[live].median()))
    # Rounding of G's entries averages out over the row, rounding of the product with V does not.
    noise = NOISE * unit / gradient.shape[1] ** 0.5 + NOISE * 2**-53
    error = 10 * unit * float(sigma[0] / sigma[-1])
    return Layer(
        rows=mixed[live] / sizes[live, None],
        white=torch.nn.functional.normalize(white[live], dim=1).float(),
        live=live,
        mixed=mixed,
        sizes=sizes,
        basis=basis,
        sigma=sigma,
        weights=weights,
        forward=weight @ basis,
        bias=bias,
        centres=(torch.stack([mean, nearest]) @ weight.T + bias)[:, live],
        loose=min(max(LOOSE, error), 30 * LOOSE),
        noise=noise,
        scale=scale,
    )
