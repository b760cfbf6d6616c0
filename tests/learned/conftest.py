"""An inverse that is trained once for all tests."""

from __future__ import annotations

import pytest
from small_inverse import QUICK, client, smooth

from rgap.learned import Design, Inverse, train


@pytest.fixture(scope="session")
def inverse() -> Inverse:
    pictures, labels = smooth(600)
    design = Design(batch_sizes=(1, 2), hash_size=256, hidden=128)
    return train(client(), pictures, labels, design=design, schedule=QUICK)
