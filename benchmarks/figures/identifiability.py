"""Figures and numbers of docs/identifiability.md; a few minutes on one core.

python -m benchmarks.figures.identifiability            all figures and tables
python -m benchmarks.figures.identifiability lenet      null directions of LeNet at B = 2
python -m benchmarks.figures.identifiability curve      nullity against batch size
python -m benchmarks.figures.identifiability cnn6d      joint rank of CNN6-d at B = 1
python -m benchmarks.figures.identifiability harden     the defender's table of a small LeNet
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

import rgap
from benchmarks.common.chosen_rows import chosen_rows
from rgap.analysis import harden, identifiability
from rgap.analysis.joint_rank.table import Identifiability
from rgap.analysis.plots.null_space import null_pictures, nullity_curves

PICTURES = Path(__file__).parents[2] / "docs" / "pictures"
SMALL = (3, 16, 16)


def tell(found: Identifiability) -> None:
    """The finding in words and rows."""
    print(found.explain())
    for row in found.rows:
        print(
            f"    {row.layer:<8} {row.equations:>6} equations, own nullity {row.own_nullity}, "
            f"cumulative rank {row.rank}, gain {row.gain}"
        )
    print(f"    {found.seconds:.0f} s", flush=True)


def lenet() -> None:
    """What two photographs in one gradient of LeNet leave open."""
    found = identifiability(rgap.models.lenet(seed=0), rgap.photos.load(2), method="structured")
    tell(found)
    null_pictures(found, 4).savefig(PICTURES / "null-directions.png", dpi=150)


def curve() -> None:
    """Missing equations against batch size, on 16x16 crops."""
    model = rgap.models.lenet(input_shape=SMALL, seed=0)
    crops = rgap.photos.load(9)[:, :, 8:24, 8:24]
    findings = [identifiability(model, crops[:b], null_space=False) for b in (1, 2, 4, 6, 7, 8, 9)]
    for found in findings:
        tell(found)
    nullity_curves(findings).savefig(PICTURES / "nullity-by-batch.png", dpi=150)


def cnn6d() -> None:
    """The published rank-deficient network: 280 short layer by layer, and jointly."""
    tell(
        identifiability(
            rgap.models.cnn6d(seed=0),
            rgap.photos.load(1),
            loss="binary_cross_entropy_with_logits",
            labels=torch.ones(1, 1),
            null_space=False,
        )
    )


def defend() -> None:
    """What a defender has to change."""
    model = rgap.models.lenet(channels=6, input_shape=(3, 12, 12), seed=0)
    print(harden(model, (3, 12, 12), 0.1, largest_stride=3, largest_batch=8).explain(), flush=True)


ROWS: dict[str, Callable[[], None]] = {
    "lenet": lenet,
    "curve": curve,
    "cnn6d": cnn6d,
    "harden": defend,
}


def main() -> None:
    """Run the rows named."""
    for name in chosen_rows(str(__doc__), ROWS):
        ROWS[name]()


if __name__ == "__main__":
    main()
