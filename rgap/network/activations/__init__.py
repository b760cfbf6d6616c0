"""Every activation that the chain knows, by its name in ``torch.nn``.

The equations pass through all of them but :class:`Opaque`, which stands for those without an
element-wise inverse (GELU, SiLU, Hardtanh ...).

>>> import torch
>>> op = Sigmoid("features.1", (2,))
>>> x = op.forward(torch.tensor([[0.5, -3.0]], dtype=torch.float64))
>>> op.inverse(x).round(decimals=12).tolist()
[[0.5, -3.0]]
>>> op.domain, op.one_sided, op.odd
((0.0, 1.0), False, False)
"""

from __future__ import annotations

from rgap.network.activations.piecewise import Activation, Identity, LeakyReLU, Opaque, PReLU, ReLU
from rgap.network.activations.smooth import (
    CELU,
    ELU,
    SELU,
    LogSigmoid,
    Sigmoid,
    Softplus,
    Softsign,
    Tanh,
)

__all__ = [
    "CELU",
    "ELU",
    "SELU",
    "Activation",
    "Identity",
    "LeakyReLU",
    "LogSigmoid",
    "Opaque",
    "PReLU",
    "ReLU",
    "Sigmoid",
    "Softplus",
    "Softsign",
    "Tanh",
]
