"""The equations of the whole update, as a function of the data.

Its products with the Jacobian and its transpose, its weights, and its normal equations.
"""

from __future__ import annotations

from rgap.jacobian.linearisation import Linearisation

__all__ = ["Linearisation"]
