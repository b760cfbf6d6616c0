"""One measurement of ``timing.dense``, in a process of its own; prints a line of JSON.

    python -m benchmarks.timing.dense_measure recursion lenet
    python -m benchmarks.timing.dense_measure end_to_end lenet
    python -m benchmarks.timing.dense_measure dense lenet 1 gelsy
    python -m benchmarks.timing.dense_measure cholesky 3072 3072

The number of threads comes from the environment (OMP_NUM_THREADS and its kin), so that torch's and
SciPy's pools both follow it.  ``peak`` is the highest resident memory of the process in MiB,
``increment`` what came on top of imports and capture.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from rgap.network.chain import Chain
    from rgap.recursion.descend import Descent

Json = dict[str, Any]
MIB = 2**20


class Case:
    """A network, one photograph and the float32 gradient that a client sends of it."""

    def __init__(self, network: str) -> None:
        import torch

        import rgap

        self.model = rgap.models.BUILTIN[network](seed=0)
        self.picture = rgap.photos.load(1, dtype=torch.float32)
        self.loss = rgap.models.LOSSES[network]
        one_logit = self.loss == "binary_cross_entropy_with_logits"
        self.target = torch.tensor([[1.0]]) if one_logit else torch.tensor([3])
        self.update = rgap.capture(self.model, self.picture, self.target, self.loss)

    def psnr(self, inputs: Tensor) -> float:
        """Of a recovered picture, dB for values in [0, 1]."""
        error = (inputs.double() - self.picture.double()).square().mean()
        return -10 * math.log10(max(float(error), 1e-300))

    def truth(self, chain: Chain) -> list[tuple[Tensor, Tensor, Tensor]]:
        """True u, z and k = ∂L/∂z of every affine map, float64."""
        import torch

        x, pairs = self.picture.double(), []
        for stage in chain.stages:
            for op in stage.lead:
                x = op.forward(x)
            z = stage.affine.forward(x).requires_grad_()
            pairs.append((x, z))
            x = z
            for op in stage.tail:
                x = op.forward(x)
        k = torch.autograd.grad(self.update.loss(x, self.target), [z for _, z in pairs])
        return [(u.detach(), z.detach(), c) for (u, z), c in zip(pairs, k, strict=True)]


def recursion(network: str) -> Json:
    """Time the descent from the head's candidate with the true label to the data."""
    from rgap.head.features import HeadFailure, solve_head
    from rgap.inversion.answer import head_gradients
    from rgap.inversion.problem import prepare
    from rgap.recursion.descend import descend

    case = Case(network)
    before = peak()
    problem = prepare(case.model, case.update, None, None, 0.0, None, None, 0, 4e9)
    chain = problem.chain
    found = solve_head(
        chain.stages[-1],
        *head_gradients(chain.stages[-1], problem.gradients),
        case.update.loss,
        problem.precision,
    )
    if isinstance(found, HeadFailure):
        raise RuntimeError(found.reason)
    features = case.truth(chain)[-1][0]
    head = min(found, key=lambda c: float((c.features.value - features).norm()))
    last = len(chain.stages) - 1
    with Stopwatch() as watch:
        descent = descend(
            chain, problem.gradients, last, head.features, head.cotangent, problem.precision
        )
    data = descent.require_data().value
    layers = sizes(chain, descent)
    return {**watch.result(before), "psnr": case.psnr(data), "layers": layers}


def sizes(chain: Chain, descent: Descent) -> list[Json]:
    """What the recursion solved, layer by layer, and the dense matrix of the same equations."""
    layers = []
    for index, step in sorted(descent.solutions.items()):
        affine = chain.stages[index].affine
        rows = affine.weight.numel() + math.prod(affine.out_shape)
        unknowns = math.prod(affine.in_shape)
        block = math.prod(affine.in_shape[1:])
        groups = 1 if affine.geometry is None else affine.geometry.groups
        layers.append(
            {
                "layer": affine.name,
                "index": index,
                "rows": rows,
                "unknowns": unknowns,
                "route": step.solution.stats.route,
                "factored": {
                    "cholesky": [unknowns, unknowns],
                    "gradient": [groups, block, block],
                }[step.solution.stats.route],
                "seconds": step.seconds,
            }
        )
    return layers


def end_to_end(network: str) -> Json:
    """Time ``rgap.invert``."""
    import rgap

    case = Case(network)
    before = peak()
    with Stopwatch() as watch:
        recovery = rgap.invert(case.model, case.update)
    found = recovery.inputs
    psnr = None if found is None else case.psnr(found)
    return {**watch.result(before), "psnr": psnr, "status": recovery.status.name}


def dense(network: str, index: int, driver: str) -> Json:
    """Time ``scipy.linalg.lstsq`` on the dense [K; W] of one layer, from true k and z."""
    import numpy as np
    import torch
    from scipy.linalg import lstsq

    from rgap.constraints import gradient_constraint, gradient_rows
    from rgap.network.chain import parse

    case = Case(network)
    before = peak()
    chain = parse(case.model, case.picture.shape[1:])
    affine = chain.stages[index].affine
    u, z, k = case.truth(chain)[index]
    start = time.perf_counter()
    kernel = gradient_constraint(affine, k)
    (groups, rows, width), channels = kernel.matrix.shape, kernel.channels
    first, unknowns = channels * rows, channels * width
    # Fortran order and overwriting spare the dense route two copies of its matrix.
    matrix = np.zeros((first + z.numel(), unknowns), order="F")
    for c in range(channels):
        block = kernel.matrix[c // (channels // groups)].numpy()
        matrix[c * rows : (c + 1) * rows, c * width : (c + 1) * width] = block
    for begin in range(0, unknowns, 256):
        columns = torch.eye(unknowns, dtype=torch.float64)[begin : begin + 256]
        image = affine.linear(columns.reshape(-1, *affine.in_shape)).flatten(1)
        matrix[first:, begin : begin + 256] = image.T.numpy()
    bias = affine.forward(torch.zeros_like(u))
    sent = gradient_rows(affine, case.update.gradients[affine.weight_name].double())
    rhs = torch.cat([sent.flatten(), (z - bias).flatten()]).numpy()
    built = time.perf_counter() - start
    with Stopwatch() as watch:
        x, _, rank, _ = lstsq(
            matrix,
            rhs,
            lapack_driver=driver,
            overwrite_a=True,
            overwrite_b=True,
            check_finite=False,
        )
    error = float(np.sqrt(np.mean((x - u.flatten().numpy()) ** 2)))
    size = {"shape": list(matrix.shape), "rank": int(rank), "error": error, "build": built}
    return {**watch.result(before), **size}


def cholesky(shape: list[int]) -> Json:
    """Time one Cholesky factorisation of the given shape, the faster of SciPy's and torch's."""
    import scipy.linalg
    import torch

    generator = torch.Generator().manual_seed(0)
    half = torch.randn(shape, generator=generator, dtype=torch.float64)
    full = half @ half.mT / shape[-1] + torch.eye(shape[-1], dtype=torch.float64)
    stack = full.reshape(-1, *full.shape[-2:]).numpy()
    before = peak()
    best: dict[str, float] = {}
    for _ in range(4):  # the first pays for waking the threads
        start = time.perf_counter()
        for matrix in stack:
            scipy.linalg.cholesky(matrix, lower=True, check_finite=False)
        middle = time.perf_counter()
        torch.linalg.cholesky(full)
        end = time.perf_counter()
        best["scipy"] = min(best.get("scipy", math.inf), middle - start)
        best["torch"] = min(best.get("torch", math.inf), end - middle)
    return {**best, "seconds": min(best.values()), "peak": peak(), "increment": peak() - before}


def peak() -> float:
    """Highest resident memory of this process so far, in MiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB


class Stopwatch:
    """Seconds of a block, and the CPU time that other processes took meanwhile."""

    def __enter__(self) -> Stopwatch:
        self.busy, self.own = busy(), sum(os.times()[:2])
        self.start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self.start
        self.own, self.busy = sum(os.times()[:2]) - self.own, busy() - self.busy

    def result(self, before: float) -> Json:
        """For the report; ``before`` is the peak after imports and capture."""
        others = max(0.0, self.busy - self.own) / self.seconds
        return {
            "seconds": self.seconds, "others": others, "peak": peak(), "increment": peak() - before
        }  # fmt: skip


def busy() -> float:
    """CPU seconds that the machine has worked (and been held up) since it started; 0 if unknown."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    ticks = [int(n) for n in stat.read_text().split("\n")[0].split()[1:9]]
    return float(sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def pools() -> list[str]:
    """Thread pools of this process, as far as they can be asked."""
    import torch

    found = [f"torch {torch.get_num_threads()}"]
    importlib.import_module("scipy.linalg")  # loads the library that is asked below
    try:
        control = importlib.import_module("threadpoolctl")
    except ImportError:
        return found
    asked = control.threadpool_info()
    return found + sorted({f"{pool['internal_api']} {pool['num_threads']}" for pool in asked})


def main(what: str, *rest: str) -> Json:
    """Run one of the measurements by name."""
    if what == "recursion":
        return {**recursion(*rest), "pools": pools()}
    if what == "end_to_end":
        return end_to_end(*rest)
    if what == "dense":
        network, index, driver = rest
        return dense(network, int(index), driver)
    if what == "cholesky":
        return cholesky([int(n) for n in rest])
    raise ValueError(
        f"expected recursion, end_to_end, dense or cholesky, got {what!r}; write "
        "python -m benchmarks.timing.dense_measure recursion lenet"
    )


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
