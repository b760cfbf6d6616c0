"""Figures and numbers of docs/identifiability.md; a few minutes on one core.

    python -m benchmarks.figures.identifiability                    all figures and tables
    python -m benchmarks.figures.identifiability --rows lenet       some of them

``lenet``: null directions of LeNet at B = 2; ``curve``: nullity against batch size; ``cnn6d``:
joint rank of CNN6-d at B = 1; ``harden``: the defender's table of a small LeNet.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

import rgap
from benchmarks.common.arguments import Arguments
from benchmarks.common.measuring import ROOT
from benchmarks.common.networks import BINARY
from rgap.analysis import harden, identifiability
from rgap.analysis.joint_rank.table import Identifiability
from rgap.analysis.plots.null_space import null_pictures, nullity_curves

PICTURES = ROOT / "docs" / "pictures"
SMALL = (3, 16, 16)


def tell(finding: Identifiability) -> None:
    """The finding in words and rows."""
    print(finding.explain())
    for row in finding.rows:
        print(
            f"    {row.layer:<8} {row.equations:>6} equations, own nullity {row.own_nullity}, "
            f"cumulative rank {row.rank}, gain {row.gain}"
        )
    print(f"    {finding.seconds:.0f} s", flush=True)


def lenet(folder: Path) -> None:
    """What two photographs in one gradient of LeNet leave open."""
    finding = identifiability(rgap.models.lenet(seed=0), rgap.photos.load(2), method="structured")
    tell(finding)
    null_pictures(finding, 4).savefig(folder / "null-directions.png", dpi=150)


def curve(folder: Path) -> None:
    """Missing equations against batch size, on 16x16 crops."""
    model = rgap.models.lenet(input_shape=SMALL, seed=0)
    crops = rgap.photos.load(9)[:, :, 8:24, 8:24]
    findings = [identifiability(model, crops[:b], null_space=False) for b in (1, 2, 4, 6, 7, 8, 9)]
    for finding in findings:
        tell(finding)
    nullity_curves(findings).savefig(folder / "nullity-by-batch.png", dpi=150)


def cnn6d(_: Path) -> None:
    """The published rank-deficient network: 280 short layer by layer, and jointly."""
    tell(
        identifiability(
            rgap.models.cnn6d(seed=0),
            rgap.photos.load(1),
            loss=BINARY,
            labels=torch.ones(1, 1),
            null_space=False,
        )
    )


def defend(_: Path) -> None:
    """What a defender has to change."""
    model = rgap.models.lenet(channels=6, input_shape=(3, 12, 12), seed=0)
    print(harden(model, (3, 12, 12), 0.1, largest_stride=3, largest_batch=8).explain(), flush=True)


ROWS: dict[str, Callable[[Path], None]] = {
    "lenet": lenet,
    "curve": curve,
    "cnn6d": cnn6d,
    "harden": defend,
}


def main() -> int:
    """Run the rows named."""
    parser = Arguments(__doc__, rows=["harden"])
    parser.rows(ROWS)
    parser.add_argument("--folder", type=Path, default=PICTURES, help="of the figures")
    options = parser.parse_args()
    for name in options.rows:
        ROWS[name](options.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
