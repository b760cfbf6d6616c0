"""Noise: the error of the most likely batch, measured, over the Cramér–Rao bound.

    python -m benchmarks.studies.noise             five networks, the table of docs/noise.md
    python -m benchmarks.studies.noise --figures docs/pictures
    python -m benchmarks.studies.noise --defences  what each defence leaves of LeNet's update

Gaussian noise is added to the update of photographs of 16×16; the batch that fits best in least
squares is found by Gauss–Newton from the truth; its squared error is averaged over noisy updates
until the standard error of the ratio to the bound is below the goal.  The noise of each network is
the level at which the prediction is 80 dB: far enough from rounding, near enough to linear.

Goal: every ratio within [0.95, 1.05] at a standard error below 0.02.  Exit status 1 on a miss.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import rgap
from benchmarks.common.arguments import Arguments
from benchmarks.common.json_lines import append
from benchmarks.common.networks import BINARY, seeded
from rgap.analysis import (
    Clip,
    DifferentialPrivacy,
    NoiseTrials,
    Prune,
    Quantise,
    Sign,
    noise,
    noise_trials,
)

QUALITY = 80.0  # dB
LOW, HIGH = 0.95, 1.05
SURE = 0.02
AIM = 0.016  # planned standard error, with room below the goal
FEWEST = 600
SHAPE = (3, 16, 16)


class Residual(nn.Module):
    """A stem, one residual block with SiLU, and a head."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, 1, 1)
        self.first = nn.Conv2d(channels, channels, 3, 1, 1)
        self.second = nn.Conv2d(channels, channels, 3, 1, 1)
        self.head = nn.Linear(channels * 16 * 16, 10)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        z = self.act(self.stem(x))
        z = self.act(z + self.second(self.act(self.first(z))))
        return self.head(z.flatten(1))


def _tanh() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, 2, 1), nn.Tanh(), nn.Conv2d(12, 16, 3, 1, 1), nn.Tanh(),
        nn.Flatten(), nn.Linear(16 * 8 * 8, 10),
    )  # fmt: skip


def _leaky() -> nn.Module:
    """The plan of CNN6 with fewer channels: no bias, one logit."""
    return nn.Sequential(
        nn.Conv2d(3, 12, 4, 2, 2, bias=False), nn.LeakyReLU(0.2),
        nn.Conv2d(12, 20, 3, 1, 1, bias=False), nn.LeakyReLU(0.2),
        nn.Conv2d(20, 20, 3, 2, 1, bias=False), nn.LeakyReLU(0.2),
        nn.Flatten(), nn.Linear(20 * 5 * 5, 1, bias=False),
    )  # fmt: skip


NETWORKS: dict[str, tuple[str, Callable[[int], nn.Module], str]] = {
    "mlp": (
        "MLP 768-32-10, sigmoid",
        lambda seed: rgap.models.mlp((32,), 10, "sigmoid", input_shape=SHAPE, seed=seed),
        "cross_entropy",
    ),
    "lenet": (
        "LeNet, sigmoid",
        lambda seed: rgap.models.lenet(input_shape=SHAPE, seed=seed),
        "cross_entropy",
    ),
    "cnn": ("CNN, tanh", lambda seed: seeded(_tanh, seed), "cross_entropy"),
    "cnn6": ("CNN6-like, LeakyReLU", lambda seed: seeded(_leaky, seed), BINARY),
    "residual": ("residual, SiLU", lambda seed: seeded(Residual, seed), "cross_entropy"),
}


def measure(name: str, seed: int, trials: int | None = None) -> NoiseTrials:
    """One network at one photograph; as many trials as its spectrum asks for."""
    _, build, loss = NETWORKS[name]
    picture = rgap.photos.load(8, 16)[seed : seed + 1]
    label = torch.tensor([[1.0]]).double() if loss.startswith("binary") else torch.tensor([3])
    model = build(seed)
    report = noise(model, picture, loss=loss, labels=label, method="dense")
    # One trial scatters by √(2/effective) around its mean.
    planned = max(FEWEST, math.ceil(2 / report.effective / AIM**2))
    return noise_trials(
        model,
        picture,
        sigma=report.critical_sigma(QUALITY),
        trials=trials or planned,
        loss=loss,
        labels=label,
        seed=seed,
    )


def line(name: str, trials: NoiseTrials) -> str:
    """One row of the table."""
    report = trials.report
    assert report.decision is not None
    return (
        f"| {NETWORKS[name][0]} | {report.equations:,} | {report.decision.condition:.1e} | "
        f"{report.effective:.0f} | {report.level:.1e} | {len(trials.totals):,} | "
        f"{trials.ratio:.3f} | {trials.standard_error:.3f} | {trials.seconds:.0f} |"
    )


HEADER = (
    "| network | equations | condition | effective directions | σ | noisy updates | "
    "measured / bound | standard error | s |\n|---|---|---|---|---|---|---|---|---|"
)


def main() -> int:
    """Measure, print one line a network, draw on request."""
    parser = Arguments(__doc__, networks=["mlp"], trials=100)
    parser.several("--networks", NETWORKS, "lines of the table")
    parser.add_argument("--seed", type=int, default=0, choices=range(8), help="and photograph")
    parser.add_argument("--trials", type=int, help="default: what the standard error asks for")
    parser.output()
    parser.add_argument("--figures", type=Path, help="folder for the figures")
    parser.add_argument("--defences", action="store_true", help="the table of defences instead")
    options = parser.parse_args()
    if options.defences:
        return defences()
    print(HEADER, flush=True)
    missed = []
    for name in options.networks:
        trials = measure(name, options.seed, options.trials)
        print(line(name, trials), flush=True)
        # Of a stated number of trials nothing finer is asked than it can tell.
        room = 0.0 if options.trials is None else 4 * trials.standard_error
        sure = options.trials is not None or trials.standard_error < SURE
        if not (LOW - room <= trials.ratio <= HIGH + room and sure and trials.settled):
            missed.append(name)
        run = {
            "network": name,
            "ratio": trials.ratio,
            "standard_error": trials.standard_error,
            "trials": len(trials.totals),
            "settled": trials.settled,
            "steps": trials.steps,
            **trials.report.summary(),
        }
        append(options.output, [run])
        if options.figures is not None and name == "residual":
            draw(trials, options.figures)
    if missed:
        print(f"missed: {', '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0


DEFENCES = (
    (1e-6, None),
    (1e-6, Clip(0.1)),
    (1e-6, Prune(0.5)),
    (1e-6, Prune(0.1)),
    (0.0, Quantise(16)),
    (0.0, Quantise(8)),
    (1e-2, Sign()),
    (0.0, DifferentialPrivacy(1.0, 1e-6)),
    (0.0, DifferentialPrivacy(1.0, 1e-3)),
    (0.0, DifferentialPrivacy(1.0, 1.0)),
)


def defences() -> int:
    """One line a defence: LeNet (sigmoid), one photograph."""
    model, picture = rgap.models.lenet(input_shape=SHAPE, seed=0), rgap.photos.load(1, 16)
    print(
        "| stated noise | defence | noise of an entry | equations | identifiable | "
        "worse than the range | PSNR |\n|---|---|---|---|---|---|---|"
    )
    for sigma, defence in DEFENCES:
        report = noise(model, picture, sigma=sigma, defence=defence, labels=torch.tensor([3]))
        print(
            f"| {sigma:g} | {'–' if defence is None else f'`{defence}`'} | {report.level:.1e} | "
            f"{report.equations:,} | {report.rank} of {report.unknowns} | {report.lost} | "
            f"{float(report.psnr):.1f} dB |",
            flush=True,
        )
    return 0


def draw(trials: NoiseTrials, folder: Path) -> None:
    """The figures of docs/noise.md."""
    from rgap.analysis.plots.noise import (
        error_map,
        measured_against_predicted,
        noise_levels,
        weighed_spectrum,
    )

    pictures = rgap.photos.load(4, 16)
    lenet = rgap.models.lenet(input_shape=SHAPE, seed=0)
    each = [
        noise(lenet, picture[None], sigma=1e-6, labels=torch.tensor([3])) for picture in pictures
    ]
    pair = noise(lenet, pictures[:2], sigma=1e-6, labels=torch.tensor([3, 5]))
    small = rgap.models.lenet(channels=6, input_shape=SHAPE, seed=0)
    short = noise(small, pictures[:2], sigma=1e-6, labels=torch.tensor([3, 5]))
    figures = {
        "noise-measured": measured_against_predicted(trials),
        "noise-map": error_map(pair),
        "noise-spectrum": weighed_spectrum(short),
        "noise-levels": noise_levels(each[0], 20.0),
    }
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=150)
        print(f"written to {folder / name}.png")


if __name__ == "__main__":
    sys.exit(main())
