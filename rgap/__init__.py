"""What a client's gradient gives away: rank, exact recovery and certificates.

    update   = rgap.capture(model, inputs, targets)      what the client sends
    recovery = rgap.invert(model, update)                what it determines, certified
    audit    = rgap.analysis.audit(model, (3, 32, 32))   why, layer by layer

Names are loaded on first use (PEP 562), so that ``import rgap`` and ``rgap --help`` do not wait
for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rgap._version import __version__

if TYPE_CHECKING:
    from rgap import (
        analysis,
        labels,
        learned,
        matching,
        models,
        photos,
        priors,
        solvers,
        testing,
    )
    from rgap.diagnosis import Check, Finding, check
    from rgap.halt import Halt, HaltKind
    from rgap.inversion.invert import Head, invert
    from rgap.labels import LabelEstimate, idlg
    from rgap.matching import Checkpoint, Matching, match
    from rgap.recovery import Candidate, LayerReport, Recovery, Route, Status
    from rgap.update import Update
    from rgap.update.capture import capture
    from rgap.update.local_training import LocalTraining
    from rgap.update.losses import Loss

_HOMES = {
    "Candidate": "recovery",
    "Check": "diagnosis",
    "Checkpoint": "matching",
    "Finding": "diagnosis",
    "Halt": "halt",
    "HaltKind": "halt",
    "Head": "inversion.invert",
    "LabelEstimate": "labels",
    "LayerReport": "recovery",
    "Loss": "update.losses",
    "LocalTraining": "update.local_training",
    "Matching": "matching",
    "Recovery": "recovery",
    "Route": "recovery",
    "Status": "recovery",
    "Update": "update",
    "capture": "update.capture",
    "check": "diagnosis",
    "idlg": "labels",
    "invert": "inversion.invert",
    "match": "matching",
}
_ROOMS = (
    "analysis", "labels", "learned", "matching", "models", "photos", "priors", "solvers", "testing",
)  # fmt: skip

__all__ = [
    "Candidate",
    "Check",
    "Checkpoint",
    "Finding",
    "Halt",
    "HaltKind",
    "Head",
    "LabelEstimate",
    "LayerReport",
    "LocalTraining",
    "Loss",
    "Matching",
    "Recovery",
    "Route",
    "Status",
    "Update",
    "__version__",
    "analysis",
    "capture",
    "check",
    "idlg",
    "invert",
    "labels",
    "learned",
    "match",
    "matching",
    "models",
    "photos",
    "priors",
    "solvers",
    "testing",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"rgap.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"rgap.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'rgap' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
