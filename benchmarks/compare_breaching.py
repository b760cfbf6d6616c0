"""Inverting gradients here and in breaching: same network, pictures, constants and iterations.

    pip install breaching==0.1.2 torchvision        in an environment of its own, beside rgap
    python benchmarks/compare_breaching.py --iterations 600

LeNet with sigmoids and uniform weights, one photograph of the shipped ones, float32, labels known,
pictures normalised by mean 0.5 and deviation 0.25, so that both work on the same numbers; weight
0.2 of the total variation as breaching's configuration ``invertinggradients`` has it.  PSNR, and
iterations a second of CPU time on one thread, one after the other.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import rgap
from rgap.presets import PRESETS

MEAN, STD = 0.5, 0.25


def psnr(found: Tensor, x: Tensor) -> float:
    """Of normalised data beside the picture."""
    return float(-10 * torch.log10((found * STD + MEAN - x).square().mean()))


def theirs(model: nn.Module, update: rgap.Update, iterations: int, seed: int) -> Tensor:
    """What breaching finds."""
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
        "metadata": {"num_data_points": 1, "labels": update.labels, "local_hyperparams": None},
    }
    torch.manual_seed(seed)
    setup = {"dtype": torch.float, "device": torch.device("cpu")}
    attacker = breaching.attacks.prepare_attack(model, nn.CrossEntropyLoss(), config, setup)
    found: Tensor = attacker.reconstruct([payload], [shared], {})[0]["data"]
    return found


def ours(model: nn.Module, update: rgap.Update, iterations: int, seed: int) -> Tensor:
    """What the preset finds with breaching's weight."""
    preset = replace(PRESETS["ig"], name="ig, TV 0.2", variation=0.2)
    found = rgap.match(model, update, method=preset, iterations=iterations, seed=seed)
    assert found.nearest is not None
    return found.nearest


def main() -> int:
    """Both, picture by picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--places", type=int, nargs="+", default=[0, 8], help="photographs")
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("photograph seed  rgap  it/s  breaching  it/s")
    for place in options.places:
        model = rgap.models.lenet(seed=0, weights="uniform")
        x = rgap.photos.load(1, start=place, dtype=torch.float32)
        update = rgap.capture(
            model, (x - MEAN) / STD, torch.tensor([3]), share_labels=True,
            value_range=(-MEAN / STD, (1 - MEAN) / STD),
        )  # fmt: skip
        for seed in range(options.seeds):
            cells = []
            for find in (ours, theirs):
                began = time.process_time()
                found = find(model, update, options.iterations, seed)
                rate = options.iterations / (time.process_time() - began)
                cells.append(f"{psnr(found, x):6.2f} {rate:5.0f}")
            print(f"{place:10} {seed:4} {'     '.join(cells)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
