"""Reference networks, how they are built, and how they are named on a command line."""

from __future__ import annotations

from rgap.models.build import ACTIVATIONS
from rgap.models.classifiers import lenet5, resnet, vgg
from rgap.models.published import BUILTIN, INPUT_SHAPES, LOSSES, cnn6, cnn6d, fcn3, lenet, mlp

__all__ = ["ACTIVATIONS", "BUILTIN", "INPUT_SHAPES", "LOSSES", "cnn6", "cnn6d", "fcn3", "lenet",
           "lenet5", "mlp", "resnet", "vgg"]  # fmt: skip
