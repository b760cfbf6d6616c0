"""Inverses that were learned: networks from the gradient of one model to the pictures of a batch.

Trained on pictures like the clients', they answer in milliseconds, certify nothing, and hold for
one model and its weights: another is refused, with its distance.

>>> from rgap import learned
>>> learned.Design(batch_sizes=(1, 2), hash_size=1024).network
'mlp'
"""

from __future__ import annotations

from rgap.learned.adapting import adapt
from rgap.learned.design import Design
from rgap.learned.inverse import Inverse, load
from rgap.learned.report import TrainingReport
from rgap.learned.schedule import Schedule
from rgap.learned.training import train

__all__ = ["Design", "Inverse", "Schedule", "TrainingReport", "adapt", "load", "train"]
