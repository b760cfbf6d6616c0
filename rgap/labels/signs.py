"""iDLG: the label of a single sample, from the signs in the head's gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from rgap import validation
from rgap.labels.result import LabelEstimate

__all__ = ["check_gradients", "idlg"]


def idlg(weight_gradient: Tensor, bias_gradient: Tensor | None = None) -> LabelEstimate:
    """Label of a single sample from the signs in the head's gradient.

    Under cross-entropy the cotangent k = s (p - e_c) is negative in entry c only, and its entries
    sum to zero. With a bias k is ``bias_gradient`` itself. Without one, ``weight_gradient`` = k x^T
    has rank one: with u its leading right singular vector, v = G u is k times a scalar of unknown
    sign, so c is the one entry whose sign differs from all others, whatever the signs of the
    features x. That takes C >= 3: with two classes v = (a, -a) fits both labels.

    A single logit (C = 1, binary cross-entropy) is positive for label 0 and negative for label 1,
    and needs the bias. Entries that underflowed to zero carry no sign: the label is still found
    where the others leave one choice, and ``reason`` says so.

    Args:
        weight_gradient: gradient of the head's weight [C, d].
        bias_gradient: gradient of the head's bias [C], None if it has none.

    Returns:
        The estimate. ``confidence`` is ``1 - |sum v| / sum |v|``, the same for every class: 1 where
        the entries balance as the rows of a cross-entropy's cotangent must, 0 where the label's
        own entry was rounded away; 1 for a single logit, which has nothing to balance.

    Raises:
        TypeError: not tensors.
        ValueError: shapes that are not a head's, NaN or infinity.

    Source: iDLG (Zhao, Mopuri and Bilen 2020), which reads the signs of G's rows and so needs
    features of one sign; the singular vector removes that condition.

    Example:
        >>> import torch
        >>> k = torch.tensor([0.2, -0.7, 0.5])
        >>> features = torch.tensor([1.0, -2.0])
        >>> idlg(torch.outer(k, features)).labels
        tensor([1])
    """
    check_gradients(weight_gradient, bias_gradient)
    classes, single = len(weight_gradient), len(weight_gradient) == 1
    method = "single negative entry of the " + (
        "bias gradient" if bias_gradient is not None else "gradient along its singular vector"
    )
    assumptions = (
        "one sample (B = 1)",
        "binary cross-entropy, label 0 or 1" if single else "cross-entropy, class-index target",
        "no label smoothing, no class weights",
    )

    def undecided(reason: str) -> LabelEstimate:
        return LabelEstimate.undecided(max(classes, 2), method, assumptions, reason)

    v, parallel = _along_singular_vector(weight_gradient)
    if not parallel:
        return undecided(
            "the head's weight gradient has rank above one: more than one sample, or an average "
            "over local steps"
        )
    # Without a bias the scalar between v and k may be negative.
    oriented = [v, -v] if bias_gradient is None else [bias_gradient.detach().double()]
    if single:
        if bias_gradient is None:
            return undecided("a single logit without a bias: the sign of the features is unknown")
        if not bool(oriented[0].any()):
            return undecided("the bias gradient underflowed to zero")
        named = {int(oriented[0][0] < 0): oriented[0]}
    else:
        named = {c: k for k in oriented for c in _possible_labels(k)}
    zeros = int((oriented[0] == 0).sum())
    underflow = f"{zeros} of {classes} entries underflowed to zero" if zeros else ""
    if len(named) != 1:
        why = (
            "the sign of the features is unknown, and both signs name a label"
            if named and bias_gradient is None
            else "no sign pattern of a single sample's cross-entropy"
        )
        return undecided(f"{why}; {underflow}" if underflow else why)
    label, k = named.popitem()
    balance = 1.0 if single else 1.0 - float(k.sum().abs() / k.abs().sum())
    counts = torch.bincount(torch.tensor([label], device="cpu"), minlength=max(classes, 2))
    confidence = torch.full((len(counts),), balance, dtype=torch.float64, device="cpu")
    return LabelEstimate.of(counts, confidence, method, assumptions, underflow)


def _possible_labels(k: Tensor) -> list[int]:
    """Labels c for which k can be p - e_c: its negative entry, or one that was rounded away.

    p_c - 1 can round to zero while other probabilities are still positive numbers; every entry
    that is zero may then be the label's.
    """
    negative = (k < 0).nonzero().flatten().tolist()
    if len(negative) > 1:
        return []
    return negative or (k == 0).nonzero().flatten().tolist()


def _along_singular_vector(gradient: Tensor) -> tuple[Tensor, bool]:
    """``G u`` for the leading right singular vector u, and whether G has rank one.

    Power steps from the largest row: for a matrix of rank one the first is exact, and no C x d
    singular value decomposition is needed. Every term of row j's product has the sign of k_j times
    the same unknown sign, so that even rows of subnormal numbers keep their sign.
    """
    limits = torch.finfo(gradient.dtype)
    g = gradient.detach().double()
    largest = float(g.abs().max())
    if largest == 0.0:
        return g.new_zeros(g.shape[0]), True
    g = g / largest
    u = g[int(g.norm(dim=1).argmax())]
    for _ in range(2):
        u = u / u.norm()
        u = g.T @ (g @ u)
    u = u / u.norm()
    v = g @ u
    off = (g - torch.outer(v, u)).norm(dim=1)
    # Row by row, because a second sample of small weight shows in the small rows first; below the
    # smallest normal number only the absolute error is bounded.
    noise = 16.0 * limits.eps * g.norm(dim=1) + g.shape[1] ** 0.5 * limits.tiny / largest
    return v, bool((off <= noise).all())


def check_gradients(weight: Tensor, bias: Tensor | None) -> None:
    """Raise unless these are the gradients of a head: [C, d] and [C] or None, finite."""
    for name, given in (("weight", weight), ("bias", bias)):
        if given is not None and not isinstance(given, Tensor):
            raise TypeError(
                f"{name}_gradient: expected a tensor, got {type(given).__name__}; write "
                f"update.gradients['<last layer>.{name}'], or rgap.invert(model, update).labels."
            )
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(
            f"weight_gradient: expected the head's [C, d], got shape {tuple(weight.shape)}; write "
            "update.gradients['<last layer>.weight']."
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(
            f"bias_gradient: expected [{weight.shape[0]}] as the weight's rows, got shape "
            f"{tuple(bias.shape)}."
        )
    for name, tensor in (("weight_gradient", weight), ("bias_gradient", bias)):
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: expected a floating dtype, got {tensor.dtype}.")
        validation.require_finite(name, tensor, "capture again in float64")
