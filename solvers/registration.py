"""Pictures of one scene laid over each other by a shift, and their mean."""

from __future__ import annotations

import torch
from torch import Tensor

RISE = 1e-6  # of a correlation: less is its rounding, and the pictures stay where they are


def registered_mean(pictures: Tensor) -> Tensor:
    """Mean of several versions of a picture, each shifted to where it fits their plain mean best.

    The shift is cyclic, of whole pixels, and maximises the correlation with the plain mean, which
    minimises the squared distance to it; a version that fits best where it is stays there.  Every
    picture of a batch is shifted by itself.

    Args:
        pictures: [R, B, C, *space], R versions; without space there is nothing to shift.

    Returns:
        [B, C, *space].

    >>> x = torch.rand(1, 1, 1, 6, 6)
    >>> versions = torch.cat([x, x, x.roll(1, -1)])
    >>> bool(torch.allclose(registered_mean(versions), x[0]))
    True
    """
    mean = pictures.mean(0)
    axes = tuple(range(3, pictures.ndim))
    if not axes or len(pictures) == 1:
        return mean
    sizes = pictures.shape[3:]
    centred = pictures - pictures.mean(axes, keepdim=True)
    goal = torch.fft.fftn(
        mean - mean.mean([a - 1 for a in axes], keepdim=True), dim=list(range(2, mean.ndim))
    )
    spectrum = torch.fft.fftn(centred, dim=axes)
    # Entry d: the correlation of the mean with a version that is shifted by d.
    correlation = torch.fft.ifftn(goal * spectrum.conj(), dim=axes).real.sum(2)
    flat = correlation.flatten(2)
    best = flat.argmax(2)
    gain = flat.gather(2, best[..., None])[..., 0] - flat[..., 0]
    best = torch.where(gain > RISE * flat[..., 0].abs(), best, torch.zeros_like(best))
    shifted = []
    for version, places in zip(pictures, best, strict=True):
        rows = []
        for picture, place in zip(version, places, strict=True):
            shift = [int(n) for n in torch.unravel_index(place, sizes)]
            rows.append(picture.roll(shift, tuple(range(1, picture.ndim))))
        shifted.append(torch.stack(rows))
    return torch.stack(shifted).mean(0)
