"""Reference networks, how they are built, and how they are named on a command line.

Small ones, for 32×32 pictures or less, are in :data:`BUILTIN`; those for ImageNet in
:data:`IMAGENET`, with the names of parameters and the computation of torchvision's, so that a state
dict saved there loads (``weights=``, or ``--weights`` on the command line):

- ``resnet18``, ``resnet34``, ``resnet50``: He, Zhang, Ren and Sun 2016
- ``vgg11``, ``vgg13``, ``vgg16``, ``vgg19``: Simonyan and Zisserman 2015; ``vgg11_bn`` … normalised
- ``mobilenet_v2``: Sandler et al. 2018
- ``densenet121``: Huang et al. 2017
- ``convnext_tiny``: Liu et al. 2022
"""

from __future__ import annotations

from rgap.models.build import ACTIVATIONS
from rgap.models.classifiers import lenet5, resnet, vgg
from rgap.models.imagenet import (
    IMAGENET,
    convnext_tiny,
    densenet121,
    mobilenet_v2,
    resnet18,
    resnet34,
    resnet50,
    vgg11,
    vgg11_bn,
    vgg13,
    vgg13_bn,
    vgg16,
    vgg16_bn,
    vgg19,
    vgg19_bn,
)
from rgap.models.published import BUILTIN, INPUT_SHAPES, LOSSES, cnn6, cnn6d, fcn3, lenet, mlp

__all__ = [
    "ACTIVATIONS", "BUILTIN", "IMAGENET", "INPUT_SHAPES", "LOSSES", "cnn6", "cnn6d",
    "convnext_tiny", "densenet121", "fcn3", "lenet", "lenet5", "mlp", "mobilenet_v2", "resnet",
    "resnet18", "resnet34", "resnet50", "vgg", "vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16",
    "vgg16_bn", "vgg19", "vgg19_bn",
]  # fmt: skip
