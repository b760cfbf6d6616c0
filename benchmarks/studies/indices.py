"""R-GAP's rank analysis and COPA's c(M) beside the rank of the whole update.

    python -m benchmarks.studies.indices

One line a network: both indices, plain and relative to the unknowns, the nullity layer by layer and
of the whole update, and which index misleads.  Small inputs, so that every rank is measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import nn

import rgap
from rgap.analysis import leakage_indices

BINARY = "binary_cross_entropy_with_logits"


def narrow(channels: int) -> nn.Module:
    """The plan of CNN6-d on 12×12: a second convolution that is too narrow for its input."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 12, 4, 2, 2, bias=False), nn.LeakyReLU(0.2),
            nn.Conv2d(12, channels, 3, 2, 1, bias=False), nn.LeakyReLU(0.2),
            nn.Conv2d(channels, 24, 3, 1, 1, bias=False), nn.LeakyReLU(0.2),
            nn.Flatten(), nn.Linear(24 * 16, 1, bias=False),
        ).eval()  # fmt: skip


def softmax() -> nn.Module:
    """A softmax regression."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 4)).eval()


def _lenet(channels: int) -> Callable[[], nn.Module]:
    return lambda: rgap.models.lenet(channels=channels, input_shape=(3, 16, 16), seed=0)


CASES: tuple[tuple[str, Callable[[], nn.Module], tuple[int, ...], int, str], ...] = (
    ("LeNet, 12 channels", _lenet(12), (3, 16, 16), 1, "cross_entropy"),
    ("LeNet, 4 channels", _lenet(4), (3, 16, 16), 1, "cross_entropy"),
    ("softmax regression 16-4", softmax, (1, 4, 4), 3, "cross_entropy"),
    ("softmax regression 16-4", softmax, (1, 4, 4), 4, "cross_entropy"),
    ("narrow, 12-4-24", lambda: narrow(4), (3, 12, 12), 1, BINARY),
    ("narrow, 12-3-24", lambda: narrow(3), (3, 12, 12), 1, BINARY),
    ("narrow, 12-2-24", lambda: narrow(2), (3, 12, 12), 1, BINARY),
)


def main() -> int:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    print(
        "| network | B | rank analysis | relative | c(M) | relative | missing, layer by layer | "
        "missing, whole update | misleads |\n|---|---|---|---|---|---|---|---|---|"
    )
    for name, build, shape, batch, loss in CASES:
        found = leakage_indices(build(), shape, batch, loss=loss)
        wrong = ", ".join(words.split(" says")[0] for words in found.misleading) or "–"
        print(
            f"| {name} | {batch} | {found.rank_analysis:+d} | {found.rank_analysis_share:+.2f} | "
            f"{found.copa:.4g} | {found.copa_share:.3f} | "
            f"{sum(row.nullity for row in found.rows)} | "
            f"{found.nullity} | {wrong} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
