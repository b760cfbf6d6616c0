"""Labels read off the last layer's gradient: by published rules, by our own, and exactly.

    labels = rgap.labels.estimate(model, update).labels

All methods approximate one identity: under cross-entropy the bias gradient of the last layer,
times the batch size, is the sum of the predicted probabilities minus the count of each label.
They differ in how they guess the probabilities; `exact` knows them, from recovered features.
"""

from rgap.labels.best import best
from rgap.labels.estimate import METHODS, estimate, head_features, head_gradient
from rgap.labels.exact import exact
from rgap.labels.gradient import HeadGradient
from rgap.labels.gradinversion import gradinversion
from rgap.labels.ilrg import ilrg
from rgap.labels.integers import nearest_counts
from rgap.labels.llg import llg, llg_star
from rgap.labels.result import LabelEstimate
from rgap.labels.rlg import rlg
from rgap.labels.signs import idlg

__all__ = [
    "METHODS",
    "HeadGradient",
    "LabelEstimate",
    "best",
    "estimate",
    "exact",
    "gradinversion",
    "head_features",
    "head_gradient",
    "idlg",
    "ilrg",
    "llg",
    "llg_star",
    "nearest_counts",
    "rlg",
]
