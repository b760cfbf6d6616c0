"""Peak memory of ``rgap.invert`` on VGG-16 at 224×224, one photograph, in a process of its own.

Run ``python -m benchmarks.timing.memory`` (about a minute, 3.1 GB); ``--memory-limit 500MB`` shows
the refusal.  The client computes and stores its update in one process, the attacker reads it in
another: the peak is the whole resident size of that one, with PyTorch, the model (138 million
float32) and the update.  The features are judged on those that the client's own network computed.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import rgap
from rgap.memory import bytes_of

WIDTHS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)


def vgg16(seed: int = 0) -> nn.Sequential:
    """VGG-16 (Simonyan and Zisserman 2015), 0 for a max-pool; random weights."""
    torch.manual_seed(seed)
    layers: dict[str, nn.Module] = {}
    channels, number = 3, 0
    for width in WIDTHS:
        number += 1
        if not width:
            layers[f"pool{number}"] = nn.MaxPool2d(2)
            continue
        layers[f"conv{number}"] = nn.Conv2d(channels, width, 3, padding=1)
        layers[f"relu{number}"] = nn.ReLU()
        channels = width
    layers |= {"average": nn.AdaptiveAvgPool2d(7), "flatten": nn.Flatten()}
    for name, (n, m) in {"fc1": (25088, 4096), "fc2": (4096, 4096), "fc3": (4096, 1000)}.items():
        layers[name] = nn.Linear(n, m)
        if m == 4096:
            layers |= {f"relu_{name}": nn.ReLU(), f"dropout_{name}": nn.Dropout()}
    net = nn.Sequential()
    for name, layer in layers.items():
        net.add_module(name, layer)
    return net.eval()


def client(folder: Path) -> None:
    """Write the update, and the features that the recovery is judged on."""
    net = vgg16()
    picture = torch.nn.functional.interpolate(
        rgap.photos.load(count=1, dtype=torch.float32), size=(224, 224), mode="bilinear"
    )
    update = rgap.capture(net, picture, torch.tensor([7]))
    update.save(folder / "update.safetensors")
    with torch.no_grad():
        torch.save(
            net[: list(dict(net.named_children())).index("fc1")](picture), folder / "true.pt"
        )


def attacker(folder: Path, limit: str | None) -> None:
    """Invert and print what was found, in which memory."""
    net = vgg16()
    update = rgap.Update.load(folder / "update.safetensors")
    before = peak()
    began = time.process_time()
    try:
        found = rgap.invert(net, update, memory_budget=None if limit is None else bytes_of(limit))
    except ValueError as refusal:
        print(f"refused: {refusal}")
    else:
        print(found.explain())
        true = torch.load(folder / "true.pt").double()
        for name, value in found.features.items():
            gap = float((value.reshape(-1) - true.reshape(-1)).abs().max())
            print(f"{name}: largest error {gap:.1e} of {float(true.abs().max()):.2g}")
    print(
        f"peak {peak():.2f} GB (model and update loaded: {before:.2f} GB), "
        f"{time.process_time() - began:.1f} CPU s"
    )


def peak() -> float:
    """Largest resident size of this process so far, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    """One client, one attacker."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory-limit", default=None, help="as in rgap invert")
    parser.add_argument("--role", choices=("client", "attacker"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.role == "client":
        client(told.folder)
    elif told.role == "attacker":
        attacker(told.folder, told.memory_limit)
    else:
        with tempfile.TemporaryDirectory() as folder:
            for role in ("client", "attacker"):
                extra = ["--memory-limit", told.memory_limit] if told.memory_limit else []
                command = [
                    sys.executable,
                    "-m",
                    "benchmarks.timing.memory",
                    "--role",
                    role,
                    "--folder",
                    folder,
                    *extra,
                ]
                subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
