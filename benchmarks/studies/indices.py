"""R-GAP's rank analysis and COPA's c(M) beside the rank of the whole update.

    python -m benchmarks.studies.indices

One line a network: both indices, plain and relative to the unknowns, the nullity layer by layer and
of the whole update, and which index misleads.  Small inputs, so that every rank is measured.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from torch import nn

import rgap
from benchmarks.common.arguments import Arguments
from benchmarks.common.networks import BINARY, seeded
from rgap.analysis import leakage_indices


def narrow(channels: int) -> nn.Module:
    """The plan of CNN6-d on 12×12: a second convolution that is too narrow for its input."""
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 12, 4, 2, 2, bias=False), nn.LeakyReLU(0.2),
            nn.Conv2d(12, channels, 3, 2, 1, bias=False), nn.LeakyReLU(0.2),
            nn.Conv2d(channels, 24, 3, 1, 1, bias=False), nn.LeakyReLU(0.2),
            nn.Flatten(), nn.Linear(24 * 16, 1, bias=False),
        )
    )  # fmt: skip


def softmax() -> nn.Module:
    """A softmax regression."""
    return seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 4)))


def lenet(channels: int) -> nn.Module:
    """LeNet on 16×16."""
    return rgap.models.lenet(channels=channels, input_shape=(3, 16, 16), seed=0)


ROWS: dict[str, tuple[str, Callable[[], nn.Module], tuple[int, ...], int, str]] = {
    "lenet-12": ("LeNet, 12 channels", lambda: lenet(12), (3, 16, 16), 1, "cross_entropy"),
    "lenet-4": ("LeNet, 4 channels", lambda: lenet(4), (3, 16, 16), 1, "cross_entropy"),
    "softmax-3": ("softmax regression 16-4", softmax, (1, 4, 4), 3, "cross_entropy"),
    "softmax-4": ("softmax regression 16-4", softmax, (1, 4, 4), 4, "cross_entropy"),
    "narrow-4": ("narrow, 12-4-24", lambda: narrow(4), (3, 12, 12), 1, BINARY),
    "narrow-3": ("narrow, 12-3-24", lambda: narrow(3), (3, 12, 12), 1, BINARY),
    "narrow-2": ("narrow, 12-2-24", lambda: narrow(2), (3, 12, 12), 1, BINARY),
}


def main() -> int:
    """Print the table."""
    parser = Arguments(__doc__, rows=["softmax-3"])
    parser.rows(ROWS)
    options = parser.parse_args()
    print(
        "| network | B | rank analysis | relative | c(M) | relative | missing, layer by layer | "
        "missing, whole update | misleads |\n|---|---|---|---|---|---|---|---|---|"
    )
    for name, build, shape, batch, loss in map(ROWS.__getitem__, options.rows):
        indices = leakage_indices(build(), shape, batch, loss=loss)
        wrong = ", ".join(words.split(" says")[0] for words in indices.misleading) or "–"
        print(
            f"| {name} | {batch} | {indices.rank_analysis:+d} | "
            f"{indices.rank_analysis_share:+.2f} | {indices.copa:.4g} | {indices.copa_share:.3f} | "
            f"{sum(row.nullity for row in indices.rows)} | "
            f"{indices.nullity} | {wrong} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
