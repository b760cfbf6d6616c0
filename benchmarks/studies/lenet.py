"""LeNet at batch size 1 on real photographs: how near the recovery is, and how honest.

    python -m benchmarks.studies.lenet                  all of it: 400 runs, half an hour, 2 cores
    python -m benchmarks.studies.lenet --photographs 2  a quick look

Every activation × weights × precision is run on the same photographs; the width of the network,
its classes, its weights and the label change from photograph to photograph.  float32 means that
the client's forward and backward pass ran in float32.  A run below 90 dB is compared with the
Cramér–Rao bound: tr((JᵀΣ⁻¹J)⁻¹) with the whole Jacobian J of the update at the true picture and Σ
from the rounding errors that the client truly made.
"""

from __future__ import annotations

import math
import sys
import time

import torch
from torch import Tensor, nn

import rgap
from benchmarks.common.arguments import Arguments
from benchmarks.common.json_lines import append
from benchmarks.common.judging import decibels
from rgap.jacobian.linearisation import Linearisation
from rgap.network.chain import parse

ACTIVATIONS = ("sigmoid", "tanh", "leaky_relu", "elu", "softplus")
WEIGHTS = ("default", "uniform")
SIZES = ((12, 10), (16, 100), (12, 100), (16, 10), (14, 37))
EMPTY = "EMPTY"  # every gradient is exactly zero
GOAL = {torch.float64: 200.0, torch.float32: 90.0}


def main() -> int:
    """Run what the command line asks for, print one line a group, say what was missed."""
    parser = Arguments(
        __doc__, photographs=1, activations=["sigmoid"], weights=["default"], dtypes=["float64"]
    )
    parser.add_argument("--photographs", type=int, default=20, help="how many")
    parser.add_argument("--start", type=int, default=0, help="first photograph")
    parser.several("--activations", ACTIVATIONS, "of LeNet")
    parser.several("--weights", WEIGHTS, "how they are drawn")
    parser.dtypes()
    parser.add_argument("--seed", type=int, default=0, help="of weights and labels")
    parser.output()
    options = parser.parse_args()
    runs = []
    print(HEADER, flush=True)
    for dtype in (getattr(torch, name) for name in options.dtypes):
        for weights in options.weights:
            for activation in options.activations:
                group = [
                    one(activation, weights, dtype, options.start + i, options.seed)
                    for i in range(options.photographs)
                ]
                print(line(activation, weights, dtype, group), flush=True)
                runs += group
                append(options.output, group)
    return verdict(runs)


def one(activation: str, weights: str, dtype: torch.dtype, index: int, seed: int) -> dict:
    """Capture and invert one photograph."""
    picture = rgap.photos.load(1, start=index)
    channels, classes = SIZES[index % len(SIZES)]
    model = rgap.models.lenet(
        classes, channels, activation, seed=1000 * seed + index, weights=weights
    )
    label = torch.tensor([(7 * index + seed) % classes])
    update = rgap.capture(model, picture, label, dtype=dtype)
    case = {
        "activation": activation,
        "weights": weights,
        "dtype": str(dtype).removeprefix("torch."),
        "photograph": index,
        "channels": channels,
        "classes": classes,
        "goal": GOAL[dtype],
    }
    if not any(bool(g.any()) for g in update.gradients.values()):
        # p = y in the client's precision: no equation at all, invert refuses such an update.
        return {**case, "status": EMPTY, "flagged": True, "seconds": 0.0, "reason": "p = y"}
    start = time.perf_counter()
    recovery = rgap.invert(model, update)
    run = {
        **case,
        "status": recovery.status.name,
        "reason": recovery.reason,
        "flagged": bool(recovery.warnings),
        "seconds": time.perf_counter() - start,
    }
    if recovery.predicted_error is not None:
        run["predicted"] = float(recovery.predicted_error[0])
        run["bound"] = recovery.error_bound
    if recovery.inputs is not None:
        error = recovery.inputs - picture
        run["rms"] = float(error.square().mean().sqrt())
        run["worst"] = float(error.abs().max())
        run["psnr"] = decibels(run["rms"])
        run["label_right"] = recovery.labels.tolist() == label.tolist()
    if dtype == torch.float32 and not run.get("psnr", 0.0) >= GOAL[dtype]:
        run["bound_psnr"] = cramer_rao(model, picture, label, update)
        run["goal"] = min(GOAL[dtype], run["bound_psnr"] - 6)
    return run


def cramer_rao(model: nn.Module, x: Tensor, label: Tensor, update: rgap.Update) -> float:
    """PSNR that no unbiased estimate passes, for errors as large as the client's own."""
    exact = rgap.capture(model, x, label, dtype=torch.float64)
    chain = parse(model, tuple(x.shape[1:]))
    outputs = chain.forward(x).detach()
    kappa = update.loss.cotangent(outputs, label)
    point = Linearisation(chain, x, kappa)
    normal = torch.zeros(x.numel(), x.numel(), dtype=torch.float64)
    columns: dict[str, list[Tensor]] = {}
    for chunk in torch.eye(x.numel(), dtype=torch.float64).split(64):
        for name, rows in point.jvp(chunk.reshape(-1, *x.shape)).items():
            columns.setdefault(name, []).append(rows.flatten(1))
    for name, parts in columns.items():
        jacobian = torch.cat(parts)
        gap = (update.gradients[name].double() - exact.gradients[name]).square()
        if gap.ndim > 1:  # one variance a row of the layer
            gap = gap.flatten(1).mean(1, keepdim=True).expand(len(gap), gap[0].numel())
        jacobian = jacobian / gap.flatten().sqrt().clamp_min(1e-30)
        normal += jacobian @ jacobian.T
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(normal))
    return -10 * math.log10(float(inverse.trace()) / x.numel())


HEADER = (
    f"{'activation':11} {'weights':8} {'dtype':8} {'runs':>4} {'EXACT':>5} {'min dB':>7} "
    f"{'median':>7} {'reached':>7} {'in 3x':>6} {'bound/error':>11} {'flagged':>7} {'s/run':>6}"
)


def line(activation: str, weights: str, dtype: torch.dtype, runs: list[dict]) -> str:
    """One row of the table: PSNR, outcomes and the honesty of the stated errors."""
    runs = [run for run in runs if run["status"] != EMPTY]
    psnr = sorted(run.get("psnr", 0.0) for run in runs)
    ratios = sorted(run["bound"] / run["worst"] for run in runs if "worst" in run)
    return (
        f"{activation:11} {weights:8} {str(dtype).removeprefix('torch.'):8} {len(runs):4} "
        f"{sum(run['status'] == 'EXACT' for run in runs):5} {psnr[0]:7.1f} "
        f"{psnr[len(psnr) // 2]:7.1f} {sum(map(reached, runs)):7} {sum(map(honest, runs)):6} "
        f"{(ratios[len(ratios) // 2] if ratios else math.nan):11.1f} "
        f"{sum(run['flagged'] for run in runs):7} "
        f"{sum(run['seconds'] for run in runs) / len(runs):6.1f}"
    )


def reached(run: dict) -> bool:
    """EXACT, the label right, and the PSNR asked for."""
    return run["status"] == "EXACT" and run["label_right"] and run["psnr"] >= run["goal"]


def honest(run: dict) -> bool:
    """Predicted rms error within a factor 3 of the true one."""
    return "rms" in run and 1 / 3 <= run["predicted"] / run["rms"] <= 3


def verdict(runs: list[dict]) -> int:
    """Print the totals and every miss; 0 if there was none and every EXACT kept its bound."""
    empty = [run for run in runs if run["status"] == EMPTY]
    runs = [run for run in runs if run["status"] != EMPTY]
    wrong = [r for r in runs if r["status"] == "EXACT" and r["worst"] > r["bound"]]
    for run in empty:
        print(
            f"left out: {run['activation']} {run['weights']} {run['dtype']} photograph "
            f"{run['photograph']}: the gradient is exactly zero, p = y in the client's precision"
        )
    print(
        f"\n{sum(map(reached, runs))} of {len(runs)} reached; predicted error within a factor 3 in "
        f"{sum(map(honest, runs))}; EXACT but off by more than the bound: {len(wrong)}"
    )
    for run in runs:
        if not reached(run):
            print(
                f"missed: {run['activation']} {run['weights']} {run['dtype']} photograph "
                f"{run['photograph']} ({run['channels']} channels, {run['classes']} classes): "
                f"{run['status']}, {run.get('psnr', math.nan):.1f} of {run['goal']:.1f} dB"
                f"{', underflow flagged' if run['flagged'] else ''}; {run['reason']}"
            )
    return int(bool(wrong) or not all(map(reached, runs)))


if __name__ == "__main__":
    sys.exit(main())
