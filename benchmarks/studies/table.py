"""The other rows of the table of results: CNN6, CNN6-d, a batch of two, fully connected networks.

    python -m benchmarks.studies.table                  all rows, a quarter of an hour on 2 cores
    python -m benchmarks.studies.table --photographs 1  one photograph a row

Weights are drawn anew for every photograph.  Logits of both signs come from the head's weights
with both signs.
"""

from __future__ import annotations

import math
import sys
import time

import torch
from torch import Tensor, nn

import rgap
from benchmarks.common.arguments import Arguments
from benchmarks.common.judging import decibels
from benchmarks.common.networks import BINARY
from rgap.network.chain import parse


def main() -> int:
    """Run the rows that the command line names."""
    parser = Arguments(__doc__, rows=["mlp"], photographs=1)
    parser.add_argument("--photographs", type=int, default=5, help="a row")
    parser.rows(ROWS)
    options = parser.parse_args()
    missed = 0
    for name in options.rows:
        print(f"\n{name}: {ROWS[name].__doc__.splitlines()[0]}", flush=True)
        for index in range(options.photographs):
            missed += ROWS[name](index)
    print(f"\n{missed} missed" if missed else "\nall reached")
    return int(missed > 0)


def cnn6(index: int) -> int:
    """B = 1, float32, both labels, logits of both signs: >= 100 dB, EXACT.

    For t = ±1.5 with the label on the same side, the scaled picture of the other root of
    t(σ(t) − y) sends the same update: there both must be returned, the true one at >= 100 dB.
    """
    missed = 0
    picture = rgap.photos.load(1, start=index, dtype=torch.float32)
    for wanted in (0.0, -0.0, 1.5, -1.5):  # 0: as large as it is drawn
        model = rgap.models.cnn6(seed=index)
        with torch.no_grad():
            logit = float(model(picture))
            model.head.weight.mul_(math.copysign(abs(wanted) or abs(logit), wanted) / logit)
            logit = float(model(picture))
        for label in (0.0, 1.0):
            update = rgap.capture(model, picture, torch.tensor([label]), BINARY)
            case = f"photograph {index}, logit {logit:+.3f}, label {label:.0f}"
            twofold = abs(wanted) > 1 and (wanted > 0) == (label > 0)
            missed += report(model, update, picture, torch.tensor([label]), 100.0, case, twofold)
    return missed


def cnn6d(index: int) -> int:
    """Second convolution: rank K 1968, rank W 1620, joint 3188, nullity 280, not EXACT."""
    model = rgap.models.cnn6d(seed=index)
    picture = rgap.photos.load(1, start=index, dtype=torch.float32)
    update = rgap.capture(model, picture, torch.tensor([1.0]), BINARY)
    recovery = rgap.invert(model, update)
    layer = recovery.layer("conv2")
    ranks = (layer.gradient_rank, layer.weight_rank, layer.joint_rank, layer.nullity)
    right = ranks == (1968, 1620, 3188, 280) and not recovery.exact
    print(f"  photograph {index}: {recovery.status.name}, K, W, joint, nullity = {ranks}")
    return int(not right)


def lenet_pair(index: int) -> int:
    """LeNet sigmoid, B = 2, head given: conv3 exact, conv2 3600 -> 4992 of 6144, nullity 1152."""
    model = rgap.models.lenet(seed=index)
    pictures = rgap.photos.load(2, start=index)
    labels = torch.tensor([index % 10, (index + 4) % 10])
    update = rgap.capture(model, pictures, labels, dtype=torch.float64)
    chain = parse(model, (3, 32, 32))
    features, outputs = chain.trace(pictures)[-1]
    kappa = update.loss.cotangent(outputs, labels)
    recovery = rgap.invert(model, update, head=rgap.Head(features, kappa))
    conv2, conv3 = recovery.layer("conv2"), recovery.layer("conv3")
    ranks = (conv3.nullity, conv2.gradient_rank, conv2.joint_rank, conv2.unknowns, conv2.nullity)
    print(f"  photographs {index}, {index + 1}: {recovery.status.name}, {ranks}")
    return int(ranks != (0, 3600, 4992, 6144, 1152) or recovery.exact)


def fcn3(index: int) -> int:
    """R-GAP's FCN3 on 3x32x32 and 3x64x64, float64: >= 200 dB."""
    missed = 0
    for size in (32, 64):
        model = rgap.models.fcn3(input_shape=(3, size, size), seed=index)
        picture = rgap.photos.load(1, size, start=index)
        label = torch.tensor([float(index % 2)])
        update = rgap.capture(model, picture, label, BINARY, dtype=torch.float64)
        missed += report(model, update, picture, label, 200.0, f"photograph {index}, {size}x{size}")
    return missed


def mlp(index: int) -> int:
    """A fully connected network of four layers with biases, 3x32x32 and 3x64x64, float64."""
    missed = 0
    for size in (32, 64):
        model = rgap.models.mlp((512, 256, 128), input_shape=(3, size, size), seed=index)
        picture = rgap.photos.load(1, size, start=index)
        label = torch.tensor([index % 10])
        update = rgap.capture(model, picture, label, dtype=torch.float64)
        missed += report(model, update, picture, label, 200.0, f"photograph {index}, {size}x{size}")
    return missed


def report(
    model: nn.Module,
    update: rgap.Update,
    x: Tensor,
    label: Tensor,
    goal: float,
    case: str,
    twofold: bool = False,
) -> int:
    """Invert, print one line, and say whether the goal was missed.

    ``twofold``: two pictures send this update, and AMBIGUOUS with both is the right answer.
    """
    start = time.perf_counter()
    recovery = rgap.invert(model, update)
    seconds = time.perf_counter() - start
    if recovery.inputs is None:
        print(f"  {case}: {recovery.status.name}: {recovery.reason}", flush=True)
        return 1
    answers = [(c.inputs, c.labels) for c in recovery.candidates]
    answers = answers or [(recovery.inputs, recovery.labels)]
    nearest, labels = min(answers, key=lambda a: float((a[0] - x).square().mean()))
    psnr = decibels(float((nearest - x).square().mean().sqrt()))
    right = labels.flatten().tolist() == label.tolist()
    kept = float((nearest - x).abs().max()) <= recovery.error_bound
    status = recovery.status.name + (f" ({len(answers)})" if recovery.candidates else "")
    print(
        f"  {case}: {status}, {psnr:.1f} dB, label {'found' if right else 'WRONG'}, "
        f"within its bound: {kept}, {seconds:.1f} s",
        flush=True,
    )
    expected = rgap.Status.AMBIGUOUS if twofold else rgap.Status.EXACT
    return int(not (recovery.status is expected and right and kept and psnr >= goal))


ROWS = {"cnn6": cnn6, "cnn6d": cnn6d, "lenet_pair": lenet_pair, "fcn3": fcn3, "mlp": mlp}

if __name__ == "__main__":
    sys.exit(main())
