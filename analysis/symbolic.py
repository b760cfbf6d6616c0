"""Ranks without numbers: closed forms in the sizes of a layer, and of a whole network.

:func:`closed_form` counts one layer at given sizes and masks, with a proof where there is one;
:func:`layer_form` gives expressions with symbols for any size; :func:`symbolic` lists a network.
"""

from __future__ import annotations

from rgap.analysis.closed_forms.closed_form import ClosedForm, closed_form
from rgap.analysis.closed_forms.kinds import layer_form
from rgap.analysis.closed_forms.layer import SymbolicLayer
from rgap.analysis.closed_forms.network import SymbolicNetwork, symbolic

__all__ = [
    "ClosedForm",
    "SymbolicLayer",
    "SymbolicNetwork",
    "closed_form",
    "layer_form",
    "symbolic",
]
