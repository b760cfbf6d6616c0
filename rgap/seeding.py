"""A recovery as the start of an optimiser: ours, breaching's or inversefed's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rgap import validation
from rgap.recovery import Recovery

__all__ = ["batch_of", "breaching_start", "inversefed_start", "start_as", "start_of"]


def start_of(recovery: Recovery) -> Tensor:
    """The batch that a recovery holds: the answer, else the one that came nearest.

    A row that occurs several times in the batch comes as often, one after another.

    Raises:
        ValueError: it holds none.
    """
    return batch_of(recovery)[0]


def start_as(start: Tensor | Recovery, size: int | None, input_shape: Sequence[int]) -> Tensor:
    """The batch that a search begins with, float64.

    Args:
        start: itself, or a recovery that holds one.
        size: of the batch; None: nobody knows.
        input_shape: of one sample.

    Raises:
        TypeError: neither.
        ValueError: another size or shape, or entries that are not finite.
    """
    batch = start_of(start) if isinstance(start, Recovery) else start
    if not isinstance(batch, Tensor):
        raise TypeError(f"start: expected a tensor or a Recovery, got {type(batch).__name__}")
    shape = (len(batch) if size is None and batch.ndim else size, *input_shape)
    validation.require_finite("start", batch, "leave it out, or write what came out of a search")
    if tuple(batch.shape) != shape:
        raise ValueError(
            f"start: expected a batch of {'any size' if size is None else size}, samples of "
            f"shape {list(input_shape)} each, got {list(batch.shape)}; write start=recovery, one "
            "of an update of this batch size"
        )
    return batch.detach().double()


def batch_of(recovery: Recovery) -> tuple[Tensor, Tensor | None]:
    """The batch that a recovery holds, and its labels, rows as often as they occur."""
    data, labels = recovery.nearest, recovery.nearest_labels
    if data is None:
        raise ValueError(
            f"the recovery holds no batch ({recovery.status.name}); write "
            "rgap.invert(model, update, complete=True)"
        )
    held = recovery if recovery.inputs is not None else recovery.candidates[0]
    copies = held.multiplicities
    if copies is None:
        return data, labels
    often = copies.to(data.device)
    if labels is not None:
        labels = labels.repeat_interleave(copies.to(labels.device), 0)
    return data.repeat_interleave(often, 0), labels


def breaching_start(
    recovery: Recovery,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """``initial_data`` for breaching's attackers, float32, [B, C, H, W].

    breaching sorts the labels that it has read off the update, so the rows come by label; it
    optimises what its model sees, normalised pictures.

    Args:
        recovery: with a batch.
        mean: of each channel, where the update was captured on pictures that were not normalised;
            None: the recovered data are as breaching's model sees them (an update of
            :meth:`rgap.Update.from_breaching`).
        std: the same.

    Raises:
        ValueError: no batch, or one of ``mean`` and ``std`` without the other.

    Example:
        >>> import rgap, torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 5)).eval()
        >>> update = rgap.capture(model, rgap.photos.load(1, 8), torch.tensor([3]))
        >>> start = breaching_start(rgap.invert(model, update), mean=(0.5,) * 3, std=(0.25,) * 3)
        >>> start.shape, start.dtype
        (torch.Size([1, 3, 8, 8]), torch.float32)

        attacker.reconstruct([server_payload], [shared_data], {}, initial_data=start)
    """
    data, labels = batch_of(recovery)
    if labels is not None and labels.ndim == 1:
        data = data[torch.argsort(labels, stable=True).to(data.device)]
    return _normalised(data, mean, std)


def inversefed_start(
    recovery: Recovery,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    restarts: int = 1,
) -> Callable[[Sequence[int]], Tensor]:
    """What replaces ``_init_images`` of inversefed's ``GradientReconstructor``.

    Its rows are those of ``recovery.labels``, which go to ``reconstruct`` as its ``labels``, each
    as often as ``recovery.multiplicities`` says; only the first of the restarts is the recovery,
    the others are random.

    Args:
        recovery: with a batch.
        mean: as in :func:`breaching_start`.
        std: the same.
        restarts: of its configuration.

    Raises:
        ValueError: no batch, or one of ``mean`` and ``std`` without the other.

    Example:
        >>> import rgap, torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 5)).eval()
        >>> update = rgap.capture(model, rgap.photos.load(1, 8), torch.tensor([3]))
        >>> start = inversefed_start(rgap.invert(model, update), restarts=2)
        >>> start((3, 8, 8)).shape
        torch.Size([2, 1, 3, 8, 8])

        machine._init_images = start
        machine.reconstruct(gradients, recovery.labels, img_shape=(3, 8, 8))
    """
    data = _normalised(start_of(recovery), mean, std)

    def images(shape: Sequence[int]) -> Tensor:
        if tuple(shape) != tuple(data.shape[1:]):
            raise ValueError(
                f"img_shape: expected {tuple(data.shape[1:])}, the recovery's, got {tuple(shape)}"
            )
        return torch.cat([data[None], torch.randn(restarts - 1, *data.shape).to(data)])

    return images


def _normalised(data: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    if (mean is None) != (std is None):
        raise ValueError(
            "mean, std: expected both or none, got one; write mean=(0.5,) * 3, std=(0.25,) * 3"
        )
    if mean is not None and std is not None:
        shape = (-1, *(1,) * (data.ndim - 2))
        centre, width = (torch.tensor(v, dtype=torch.float64).reshape(shape) for v in (mean, std))
        data = (data - centre.to(data)) / width.to(data)
    return data.float()
