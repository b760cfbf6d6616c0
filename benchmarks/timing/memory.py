"""Peak memory of ``rgap.invert`` on VGG-16 at 224×224, one photograph, in a process of its own.

    python -m benchmarks.timing.memory                          about a minute, 3.1 GB
    python -m benchmarks.timing.memory --memory-limit 500MB     the refusal

The client computes and stores its update in one process, the attacker reads it in
another: the peak is the whole resident size of that one, with PyTorch, the model (138 million
float32) and the update.  The features are judged on those that the client's own network computed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

import rgap
from benchmarks.common.arguments import Arguments
from benchmarks.common.measuring import Stopwatch, peak, run_script
from benchmarks.common.networks import seeded, vgg16
from rgap.machine.memory import bytes_of


def client(folder: Path, narrower: int) -> None:
    """Write the update, and the features that the recovery is judged on."""
    net = seeded(lambda: vgg16(narrower=narrower))
    picture = torch.nn.functional.interpolate(
        rgap.photos.load(count=1, dtype=torch.float32), size=(224, 224), mode="bilinear"
    )
    update = rgap.capture(net, picture, torch.tensor([7]))
    update.save(folder / "update.safetensors")
    with torch.no_grad():
        torch.save(
            net[: list(dict(net.named_children())).index("fc1")](picture), folder / "true.pt"
        )


def attacker(folder: Path, narrower: int, limit: str | None) -> None:
    """Invert and print what was found, in which memory."""
    net = seeded(lambda: vgg16(narrower=narrower))
    update = rgap.Update.load(folder / "update.safetensors")
    before, refusal = peak(), ""
    with Stopwatch() as watch:
        try:
            budget = None if limit is None else bytes_of(limit)
            recovery = rgap.invert(net, update, memory_budget=budget)
        except ValueError as error:
            refusal = str(error)
    if refusal:
        print(f"refused: {refusal}")
    else:
        print(recovery.explain())
        true = torch.load(folder / "true.pt").double()
        for name, value in [*recovery.features.items()][:1]:  # of the lowest layer, as it was kept
            gap = float((value.reshape(-1) - true.reshape(-1)).abs().max())
            print(f"{name}: largest error {gap:.1e} of {float(true.abs().max()):.2g}")
    print(
        f"peak {peak() / 1e9:.2f} GB (model and update loaded: {before / 1e9:.2f} GB), "
        f"{watch.cpu:.1f} CPU s"
    )


def main() -> int:
    """One client, one attacker."""
    parser = Arguments(__doc__, narrower=16)
    parser.add_argument("--memory-limit", help="as in rgap invert")
    parser.add_argument("--narrower", type=int, default=1, help="divides every width")
    parser.add_argument("--role", choices=("client", "attacker"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.role == "client":
        client(told.folder, told.narrower)
    elif told.role == "attacker":
        attacker(told.folder, told.narrower, told.memory_limit)
    else:
        limit = ["--memory-limit", told.memory_limit] if told.memory_limit else []
        with tempfile.TemporaryDirectory() as folder:
            for role in ("client", "attacker"):
                words = ["--role", role, "--folder", folder, "--narrower", told.narrower, *limit]
                run_script("benchmarks.timing.memory", words, check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
