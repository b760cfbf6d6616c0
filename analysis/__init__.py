"""Measures equations and recoveries: how much of a batch each layer's gradient determines."""

from __future__ import annotations

from rgap.analysis.cause import Cause
from rgap.analysis.defences import Clip, DifferentialPrivacy, Prune, Quantise, Sign
from rgap.analysis.discard import audit
from rgap.analysis.explain import Explanation, explain
from rgap.analysis.generic_rank import generic_ranks, layer_ranks
from rgap.analysis.harden import harden
from rgap.analysis.harden_table import Change, Hardening
from rgap.analysis.identifiability import identifiability
from rgap.analysis.identifiability_table import Identifiability, IdentifiabilityRow
from rgap.analysis.indices import IndexRow, LeakageIndices, leakage_indices
from rgap.analysis.largest_batch import LargestBatch, largest_identifiable_batch
from rgap.analysis.noise import noise
from rgap.analysis.noise_table import NoiseReport
from rgap.analysis.noise_trials import NoiseTrials, noise_trials
from rgap.analysis.rank_report import LayerRanks
from rgap.analysis.symbolic import (
    ClosedForm,
    SymbolicLayer,
    SymbolicNetwork,
    closed_form,
    layer_form,
    symbolic,
)
from rgap.analysis.table import Audit, AuditRow
from rgap.analysis.training_audit import TrainingAudit, audit_training

__all__ = [
    "Audit",
    "AuditRow",
    "Cause",
    "Change",
    "Clip",
    "ClosedForm",
    "DifferentialPrivacy",
    "Explanation",
    "Hardening",
    "Identifiability",
    "IdentifiabilityRow",
    "IndexRow",
    "LargestBatch",
    "LayerRanks",
    "LeakageIndices",
    "NoiseReport",
    "NoiseTrials",
    "Prune",
    "Quantise",
    "Sign",
    "SymbolicLayer",
    "SymbolicNetwork",
    "TrainingAudit",
    "audit",
    "audit_training",
    "closed_form",
    "explain",
    "generic_ranks",
    "harden",
    "identifiability",
    "largest_identifiable_batch",
    "layer_form",
    "layer_ranks",
    "leakage_indices",
    "noise",
    "noise_trials",
    "symbolic",
]
