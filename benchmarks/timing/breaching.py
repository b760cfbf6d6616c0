"""Inverting gradients here and in breaching: same network, pictures, constants and iterations.

    pip install breaching==0.1.2 torchvision        in an environment of its own, beside rgap
    python -m benchmarks.timing.breaching --iterations 600

LeNet with sigmoids and uniform weights, one photograph of the shipped ones, float32, labels known,
pictures normalised by mean 0.5 and deviation 0.25, so that both work on the same numbers; the same
random start; weight 0.2 of the total variation as breaching's configuration ``invertinggradients``
has it.  Breaching takes pixels beyond the right and the lower border for 0, the mean of pictures,
and does not round kinks off: ``its terms`` is the preset with that variation, ``preset`` the preset
with ours.  PSNR, and milliseconds of CPU time an iteration on one thread, one after the other.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import rgap
from benchmarks.common.arguments import Arguments
from benchmarks.common.measuring import Stopwatch
from rgap.matching.presets import PRESETS
from rgap.solvers.priors import Prior, TotalVariation

MEAN, STD = 0.5, 0.25
BARE = TotalVariation(smoothing=1e-6, isotropic=False)  # kinks hardly rounded off


@dataclass(frozen=True)
class Bordered:
    """Total variation of pictures with a row and a column of zeros below and to their right."""

    inner: TotalVariation = BARE

    def value(self, x: Tensor) -> Tensor:
        """Per entry of the picture."""
        wide = _widened(x)
        return self.inner.value(wide) * (wide.numel() / x.numel())

    def gradient(self, x: Tensor) -> Tensor:
        """Of that."""
        return self.curvature(x)(x)

    def curvature(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """That of the widened picture, without its border."""
        wide = _widened(x)
        bend, share = self.inner.curvature(wide), wide.numel() / x.numel()
        return lambda v: bend(_widened(v))[..., :-1, :-1] * share

    def smoothed(self, size: float) -> Bordered:
        """With differences below ``size`` rounded off."""
        return Bordered(self.inner.smoothed(size))


def _widened(x: Tensor) -> Tensor:
    return nn.functional.pad(x, (0, 1, 0, 1))


def psnr(inputs: Tensor, x: Tensor) -> float:
    """Of normalised data beside the picture."""
    return float(-10 * torch.log10((inputs * STD + MEAN - x).square().mean()))


def theirs(model: nn.Module, update: rgap.Update, iterations: int, seed: int) -> Tensor:
    """What breaching finds."""
    assert update.labels is not None
    import breaching
    from omegaconf import OmegaConf

    config: Any = breaching.get_attack_config("invertinggradients")
    OmegaConf.set_struct(config, False)
    config.optim.max_iterations = iterations
    about = {"shape": [3, 32, 32], "mean": [MEAN] * 3, "std": [STD] * 3, "modality": "vision"}
    payload = {
        "parameters": list(model.parameters()),
        "buffers": [],
        "metadata": OmegaConf.create({**about, "classes": 10, "task": "classification"}),
    }
    shared = {
        "gradients": list(update.gradients.values()),
        "buffers": None,
        "metadata": {
            "num_data_points": len(update.labels),
            "labels": update.labels,
            "local_hyperparams": None,
        },
    }
    torch.manual_seed(seed)
    setup = {"dtype": torch.float, "device": torch.device("cpu")}
    attacker = breaching.attacks.prepare_attack(model, nn.CrossEntropyLoss(), config, setup)
    data: Tensor = attacker.reconstruct([payload], [shared], {})[0]["data"]
    return data


def ours(
    model: nn.Module, update: rgap.Update, iterations: int, seed: int, prior: Prior | None = None
) -> Tensor:
    """What the preset finds with breaching's weight, from breaching's start."""
    assert update.labels is not None
    preset = replace(PRESETS["ig"], name="ig, TV 0.2", variation=0.2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        start = torch.randn(len(update.labels), 3, 32, 32)
    matching = rgap.match(
        model, update, method=preset, iterations=iterations, start=start, prior=prior
    )
    assert matching.nearest is not None
    return matching.nearest


def main() -> int:
    """All three, picture by picture."""
    parser = Arguments(__doc__, searches=["preset"], iterations=20, places=[0], seeds=1)
    parser.add_argument("--iterations", type=int, default=600, help="of each")
    parser.add_argument("--places", type=int, nargs="+", default=[0, 8, 16, 24], help="photographs")
    parser.add_argument("--seeds", type=int, default=3, help="of the start")
    parser.add_argument("--batch", type=int, default=1, help="photographs, from each place on")
    names = ("breaching", "its terms", "preset")
    parser.several("--searches", names, "which")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = rgap.models.lenet(seed=0, weights="uniform")
    searches: dict[str, Callable[[rgap.Update, int, int], Tensor]] = {
        "breaching": partial(theirs, model),
        "its terms": partial(ours, model, prior=Bordered()),
        "preset": partial(ours, model),
    }
    searches = {name: searches[name] for name in options.searches}
    labels = (torch.arange(options.batch) + 3) % 10
    levels = {name: list[float]() for name in searches}
    times = {name: list[float]() for name in searches}
    for number, place in enumerate(options.places):
        x = rgap.photos.load(options.batch, start=place, dtype=torch.float32)
        update = rgap.capture(
            model, (x - MEAN) / STD, labels, share_labels=True,
            value_range=(-MEAN / STD, (1 - MEAN) / STD),
        )  # fmt: skip
        if not number:  # a first call imports and prepares
            for find in searches.values():
                find(update, 5, 0)
            print("photograph seed" + "".join(f"{name:>11}   ms" for name in searches))
        for seed in range(options.seeds):
            line = f"{place:10} {seed:4}"
            for name, find in searches.items():
                with Stopwatch() as watch:
                    picture = find(update, options.iterations, seed)
                times[name].append(watch.cpu / options.iterations * 1e3)
                levels[name].append(psnr(picture, x))
                line += f"{levels[name][-1]:8.2f} dB {times[name][-1]:4.1f}"
            print(line, flush=True)
    for name in set(searches) - {"breaching"} if "breaching" in searches else ():
        gaps = [a - b for a, b in zip(levels[name], levels["breaching"], strict=True)]
        ratios = [b / a for a, b in zip(times[name], times["breaching"], strict=True)]
        print(
            f"{name}: {statistics.fmean(gaps):+.2f} dB in the mean, {min(gaps):+.2f} to "
            f"{max(gaps):+.2f}; {statistics.median(ratios):.2f} times the iterations a second in "
            f"the median, {min(ratios):.2f} to {max(ratios):.2f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
