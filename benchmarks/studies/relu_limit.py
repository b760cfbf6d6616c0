"""Where the equations of a ReLU pair end: open directions at the true samples, against units.

    python -m benchmarks.studies.relu_limit                          a minute on one core
    python -m benchmarks.studies.relu_limit --widths 256 --seeds 1

Nothing is inverted.  At the true samples of a batch the slope of each sample's own equations is
formed and its open directions are counted.  A unit that is off for all samples of the batch sends
nothing: of m units m' count, and 2B − 1 unknowns (a point of the affine span of the batch, and its
combination of the next layer's inputs) meet m' equations.
"""

from __future__ import annotations

import sys

import torch

import rgap
from benchmarks.common.arguments import Arguments
from benchmarks.common.pictures import drawn_labels, pictures
from rgap.precision import Precision
from rgap.separation.batch import Batch
from rgap.separation.pair import Between, steps_between
from rgap.separation.subspace import open_directions

SHARES = (0.25, 0.375, 0.4, 0.44, 0.47, 0.5)  # batch sizes, of the width


def main() -> int:
    """Print a line for every width and batch size."""
    parser = Arguments(__doc__, widths=[16], seeds=1)
    parser.add_argument("--widths", nargs="+", type=int, default=(64, 128), help="of layers")
    parser.add_argument("--seeds", type=int, default=5, help="batches a size")
    options = parser.parse_args()
    print("| width | B | units on for some sample | (m' + 1)/2 | samples with open directions |")
    print("|---|---|---|---|---|")
    for width in options.widths:
        for size in sorted({round(share * width) for share in SHARES}):
            counts = [one(width, size, seed) for seed in range(options.seeds)]
            alive = [units for units, _ in counts]
            opened = sum(count for _, count in counts)
            print(
                f"| {width} | {size} | {min(alive)}–{max(alive)} | {(min(alive) + 1) / 2:.1f}–"
                f"{(max(alive) + 1) / 2:.1f} | {opened} of {size * len(counts)} |",
                flush=True,
            )
    return 0


def one(width: int, size: int, seed: int) -> tuple[int, int]:
    """Units that are on for some sample, and samples whose equations leave a direction open."""
    model = rgap.models.mlp((width, width), 10, "relu", seed=seed)
    x = pictures(size, seed)
    y = drawn_labels("distinct", size, 10, seed)
    update = rgap.capture(model, x, y, dtype=torch.float64)
    chain = rgap.network.parse(model, (3, 32, 32))
    gradients = {name: g.double() for name, g in update.gradients.items()}
    batch = Batch(chain, gradients, update.loss, Precision(torch.float64), size)
    steps = steps_between(chain, 0)
    assert not isinstance(steps, str)
    pair = Between.of(batch.mixture(0), batch.mixture(1), steps, batch.precision)
    roots = x.flatten(1) @ batch.mixture(0).right
    alive = int((pair.value(roots) > 0).any(0).sum())
    return alive, sum(open_directions(pair, q) > 0 for q in roots)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
