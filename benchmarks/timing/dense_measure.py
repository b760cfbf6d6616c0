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
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

import rgap
from benchmarks.common.arguments import Arguments
from benchmarks.common.measuring import Stopwatch, peak
from benchmarks.common.one_photograph import OnePhotograph
from rgap.constraints import gradient_constraint, gradient_rows
from rgap.network.chain import Chain, parse
from rgap.recursion.reached import Descent

Json = dict[str, Any]
MIB = 2**20


class Case(OnePhotograph):
    """The client and the truth of every layer."""

    def truth(self, chain: Chain) -> list[tuple[Tensor, Tensor, Tensor]]:
        """True u, z and k = ∂L/∂z of every affine map, float64."""
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
    case = Case.of(network)
    before = peak()
    problem = case.problem()
    head = case.heads(problem)[0]
    with Busy() as watch:
        descent = case.descend(problem, head)
    data = descent.require_data().value
    layers = sizes(problem.chain, descent)
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
    case = Case.of(network)
    before = peak()
    with Busy() as watch:
        recovery = rgap.invert(case.model, case.update)
    inputs = recovery.inputs
    psnr = None if inputs is None else case.psnr(inputs)
    return {**watch.result(before), "psnr": psnr, "status": recovery.status.name}


def dense(network: str, index: int, driver: str) -> Json:
    """Time ``scipy.linalg.lstsq`` on the dense [K; W] of one layer, from true k and z."""
    case = Case.of(network)
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
    with Busy() as watch:
        x, _, rank, _ = scipy.linalg.lstsq(
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
    return {**best, "seconds": min(best.values()), **memory(before)}


def memory(before: int) -> Json:
    """Peak of this process, and what came on top of an earlier one (bytes), in MiB."""
    return {"peak": peak() / MIB, "increment": (peak() - before) / MIB}


class Busy(Stopwatch):
    """Seconds of a block, and the CPU time that other processes took meanwhile."""

    def __enter__(self) -> Busy:
        self.busy = busy()
        super().__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self.busy = busy() - self.busy

    def result(self, before: int) -> Json:
        """For the report; ``before`` is the peak after imports and capture."""
        others = max(0.0, self.busy - self.cpu) / self.wall
        return {"seconds": self.wall, "others": others, **memory(before)}


def busy() -> float:
    """CPU seconds that the machine has worked (and been held up) since it started; 0 if unknown."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    ticks = [int(n) for n in stat.read_text().split("\n")[0].split()[1:9]]
    return float(sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def pools() -> list[str]:
    """Thread pools of this process, as far as they can be asked."""
    names = [f"torch {torch.get_num_threads()}"]
    try:
        control = importlib.import_module("threadpoolctl")
    except ImportError:
        return names
    asked = control.threadpool_info()
    return names + sorted({f"{pool['internal_api']} {pool['num_threads']}" for pool in asked})


def main() -> int:
    """Print the measurement that the command line names."""
    parser = Arguments(__doc__, measurement=["cholesky", "64", "64"])
    parser.add_argument("measurement", nargs="*", help="as above")
    print(json.dumps(measured(*parser.parse_args().measurement)))
    return 0


def measured(what: str = "", *rest: str) -> Json:
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
    raise SystemExit(
        f"expected recursion, end_to_end, dense or cholesky, got {what!r}; write "
        "python -m benchmarks.timing.dense_measure recursion lenet"
    )


if __name__ == "__main__":
    sys.exit(main())
