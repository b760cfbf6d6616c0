"""Bytes that PyTorch allocates on the way, counted op by op: no clock, no resident size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rgap.machine import memory


@contextmanager
def smallest_routes() -> Iterator[None]:
    """Every choice of a route is made as if there were no memory but what is always there."""
    with patch.object(memory, "budget_of", lambda *_: 1.0):
        yield


class Allocations(TorchDispatchMode):
    """Counts tensors made inside: ``total`` bytes of all of them, ``peak`` of those that live."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.peak = 0
        self._old: set[int] = set()
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        before = {t.untyped_storage()._cdata for t in given}
        out = func(*args, **kwargs or {})
        for tensor in (t for t in tree_leaves(out) if isinstance(t, Tensor)):
            storage = tensor.untyped_storage()
            if tensor.device.type == "meta" or storage._cdata in before:
                continue
            reference = StorageWeakRef(storage)
            known = self._live.get(storage._cdata)
            if known is not None and not known[0].expired():
                continue
            self._live[storage._cdata] = (reference, storage.nbytes())
            self.total += storage.nbytes()
        self._live = {key: one for key, one in self._live.items() if not one[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return out
