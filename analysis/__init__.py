"""Measures equations and recoveries: how much of a batch each layer's gradient determines."""

from __future__ import annotations

from rgap.analysis.causes.cause import Cause
from rgap.analysis.causes.explain import Explanation, explain
from rgap.analysis.discard.audit import audit
from rgap.analysis.discard.table import Audit, AuditRow
from rgap.analysis.discard.training import TrainingAudit, audit_training
from rgap.analysis.generic_rank.ranks import LayerRanks, generic_ranks, layer_ranks
from rgap.analysis.hardening.harden import harden
from rgap.analysis.hardening.table import Change, Hardening
from rgap.analysis.joint_rank.identifiability import identifiability
from rgap.analysis.joint_rank.indices import IndexRow, LeakageIndices, leakage_indices
from rgap.analysis.joint_rank.largest_batch import LargestBatch, largest_identifiable_batch
from rgap.analysis.joint_rank.made_up import MadeUp, made_up
from rgap.analysis.joint_rank.table import Identifiability, IdentifiabilityRow
from rgap.analysis.noise_bound.cramer_rao import noise
from rgap.analysis.noise_bound.defences import (
    DEFENCES,
    Clip,
    Defence,
    DifferentialPrivacy,
    Prune,
    Quantise,
    Sending,
    Sign,
)
from rgap.analysis.noise_bound.report import NoiseReport
from rgap.analysis.noise_bound.trials import NoiseTrials, noise_trials
from rgap.analysis.scoring import Score, score
from rgap.analysis.symbolic import (
    ClosedForm,
    SymbolicLayer,
    SymbolicNetwork,
    closed_form,
    layer_form,
    symbolic,
)

__all__ = [
    "DEFENCES",
    "Audit",
    "AuditRow",
    "Cause",
    "Change",
    "Clip",
    "ClosedForm",
    "Defence",
    "DifferentialPrivacy",
    "Explanation",
    "Hardening",
    "Identifiability",
    "IdentifiabilityRow",
    "IndexRow",
    "LargestBatch",
    "LayerRanks",
    "LeakageIndices",
    "MadeUp",
    "NoiseReport",
    "NoiseTrials",
    "Prune",
    "Quantise",
    "Score",
    "Sending",
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
    "made_up",
    "noise",
    "noise_trials",
    "score",
    "symbolic",
]
