"""Reference networks, how they are built, and how they are named on a command line."""

from __future__ import annotations

from rgap.models.published import (
    ACTIVATIONS,
    BUILTIN,
    INPUT_SHAPES,
    LOSSES,
    cnn6,
    cnn6d,
    fcn3,
    lenet,
    lenet5,
    mlp,
    resnet,
    vgg,
)

__all__ = [
    "ACTIVATIONS",
    "BUILTIN",
    "INPUT_SHAPES",
    "LOSSES",
    "cnn6",
    "cnn6d",
    "fcn3",
    "lenet",
    "lenet5",
    "mlp",
    "resnet",
    "vgg",
]
