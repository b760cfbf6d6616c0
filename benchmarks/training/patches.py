"""Learn the shapes of patches that the prior ``patches`` has, from photographs in a folder.

    python -m benchmarks.training.patches --output rgap/data/patches.safetensors    those shipped
    python -m benchmarks.training.patches --pictures FOLDER --output shapes.safetensors
    python -m benchmarks.training.patches --checkpoint em.safetensors ...    after a kill

The folder is that of Debian's packages lomiri-wallpapers-16.04 and -20.04 (apt install); who made
the photographs, and under which licence, is in rgap/data/LEARNED.md.  None of them is among those
that the library is measured on.  Every picture, cut to its central square, is reduced by area
averages to 768, 512, 256 and 128 pixels a side and gives as many patches at each.

Expectation maximisation of ``p(r) = Σ_k Σ_j w_kj N(r; 0, σ_j² C_k + ν² 1)`` in float32: of every
patch the posterior of its shape, its contrast and what it was before noise ν of 8 bits.  What is
printed is the mean log-likelihood of patches learned from and of those held out; it ends when the
latter has not grown by 0.02 for two rounds.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import interpolate

from benchmarks.common.arguments import Arguments
from rgap.photos import folder
from rgap.update.storage import written

REDUCED = 1.0, 2.0 / 3.0, 1.0 / 3.0, 1.0 / 6.0  # sides of a reduced picture, of the largest
CONTRASTS = [0.574 * 2.0 ** (-0.9 * j) for j in range(10)]  # of the range of values
NOISE = 1.5e-3  # of 8 bits, and a little more
HELD_OUT = 16  # of so many patches one
LIKELY = 1e-3  # posterior above which a patch counts for a shape
WEAK = 2e-4  # patches of white noise that every shape is thought to have had before
ENOUGH, VAIN = 0.02, 2  # growth of the held-out likelihood, and rounds without it
CHUNK = 20000  # patches at a time


class Model(NamedTuple):
    """Covariances C_k, [K, n, n], and weights w_kj, [K, J]."""

    covariances: Tensor
    weights: Tensor


def main() -> int:
    """Learn, and write the shapes."""
    parser = Arguments(
        __doc__,
        pictures="rgap/data",
        size=64,
        patches=50,
        shapes=3,
        rounds=2,
    )
    parser.add_argument("--pictures", type=Path, default=Path("/usr/share/backgrounds"))
    parser.add_argument("--size", type=int, default=768, help="largest side, in pixels")
    parser.add_argument("--patches", type=int, default=3000, help="of a picture at one size")
    parser.add_argument("--shapes", type=int, default=48, help="K")
    parser.add_argument("--side", type=int, default=6, help="of a patch, in pixels")
    parser.add_argument("--rounds", type=int, default=40, help="at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, help="written after every round, gone on from")
    parser.result("the shapes, a safetensors file; those shipped: rgap/data/patches.safetensors")
    options = parser.parse_args()
    draw = torch.Generator().manual_seed(options.seed)
    patches = drawn(folder(options.pictures, options.size), options.patches, options.side, draw)
    held, patches = patches[::HELD_OUT], patches[torch.arange(len(patches)) % HELD_OUT != 0]
    print(f"{len(patches)} patches to learn from, {len(held)} held out", flush=True)
    model, told = begun(patches, options.shapes, draw), [-math.inf]
    if options.checkpoint and options.checkpoint.exists():
        stored = load_file(options.checkpoint)
        model, told = Model(stored["covariances"], stored["weights"]), stored["told"].tolist()
    while len(told) <= options.rounds and (len(told) < 4 or grew(told)):
        began = time.perf_counter()
        model, own = improved(model, patches)
        told.append(likelihood(model, held))
        print(
            f"round {len(told) - 1}: {own:.2f} nats a patch, held out {told[-1]:.2f}, "
            f"{time.perf_counter() - began:.0f} s",
            flush=True,
        )
        if options.checkpoint:
            written(options.checkpoint, {**model._asdict(), "told": torch.tensor(told)}, {})
    variances, bases = torch.linalg.eigh(model.covariances.double())
    roots = bases * variances.clamp_min(0.0).sqrt()[:, None]
    shapes = {
        "roots": roots.half().contiguous(),
        "weights": model.weights,
        "contrasts": torch.tensor(CONTRASTS),
        "noise": torch.tensor(NOISE),
    }
    if options.output is not None:
        written(options.output, shapes, {})
    return 0


def grew(told: list[float]) -> bool:
    """True while one of the last rounds was worth it."""
    return max(told[-VAIN:]) > max(told[:-VAIN]) + ENOUGH


def drawn(pictures: Tensor, count: int, side: int, draw: torch.Generator) -> Tensor:
    """Patches of all pictures, less their brightness, in random order, [N, 3 side²]."""
    made, within = [], torch.arange(side)
    for share in REDUCED:
        size = round(share * pictures.shape[-1])
        for picture in interpolate(pictures, (size, size), mode="area").float():
            rows, columns = (
                torch.randint(size - side + 1, (count,), generator=draw)[:, None, None]
                for _ in range(2)
            )
            windows = picture[:, rows + within[:, None], columns + within]
            made.append(windows.transpose(0, 1).flatten(1))
    patches = torch.cat(made)
    patches = patches[torch.randperm(len(patches), generator=draw)]
    return patches - patches.mean(1, keepdim=True)


def begun(patches: Tensor, shapes: int, draw: torch.Generator) -> Model:
    """Shapes of patches that point the way of one of them, or the opposite one."""
    sizes = patches.square().mean(1).sqrt()
    strong = patches[sizes > sizes.median()][: 1000 * shapes]
    units = torch.nn.functional.normalize(strong)
    n, near = patches.shape[1], max(len(units) // 80, 1)
    made = []
    for seed in units[torch.randperm(len(units), generator=draw)[:shapes]]:
        alike = units[(units @ seed).abs().topk(near).indices]
        made.append(0.9 * n / near * alike.T @ alike + 0.1 * torch.eye(n))
    weights = torch.full((shapes, len(CONTRASTS)), 1.0 / (shapes * len(CONTRASTS)))
    return Model(torch.stack(made), weights)


def posterior(model: Model, patches: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bases, eigenvalues, log-posterior of shape and contrast [N, K, J], log-likelihood [N]."""
    variances, bases = torch.linalg.eigh(model.covariances)
    variances = variances.clamp_min(1e-5)
    squares = torch.tensor(CONTRASTS).square()
    logs = torch.empty(len(patches), *model.weights.shape)
    for k, (basis, variance) in enumerate(zip(bases, variances, strict=True)):
        spread = variance[:, None] * squares + NOISE**2
        near = (patches @ basis).square() @ (1.0 / spread)
        logs[:, k] = -0.5 * (near + spread.log().sum(0)) + model.weights[k].log()
    whole = logs.flatten(1).logsumexp(1)
    return bases, variances, logs - whole[:, None, None], whole


def likelihood(model: Model, patches: Tensor) -> float:
    """In the mean over patches, in nats."""
    parts = [posterior(model, some)[3] for some in patches.split(CHUNK)]
    return float(torch.cat(parts).mean()) - 0.5 * patches.shape[1] * math.log(2.0 * math.pi)


def improved(model: Model, patches: Tensor) -> tuple[Model, float]:
    """One round, and the likelihood before it."""
    shapes, n = model.covariances.shape[:2]
    sums, counts = torch.zeros(shapes, n, n), torch.zeros(model.weights.shape)
    total = 0.0
    for some in patches.split(CHUNK):
        bases, variances, logs, whole = posterior(model, some)
        total += float(whole.sum())
        likely = logs.exp()
        counts += likely.sum(0)
        for k, j in (likely.amax(0) > LIKELY).nonzero().tolist():
            mine = likely[:, k, j] > LIKELY
            share, squared = likely[mine, k, j], CONTRASTS[j] ** 2
            spread = squared * variances[k] + NOISE**2
            kept = squared * variances[k] / spread  # of an entry, that is not noise
            clean = (some[mine] @ bases[k]) * kept * (share / squared).sqrt()[:, None]
            left = variances[k] * NOISE**2 / spread * share.sum()
            sums[k] += bases[k] @ (clean.T @ clean + left.diag()) @ bases[k].T
    covariances = sums + WEAK * torch.eye(n)
    covariances /= covariances.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    weights = (counts + 0.1) / (counts + 0.1).sum()
    shown = total / len(patches) - 0.5 * n * math.log(2.0 * math.pi)
    return Model(covariances, weights), shown


if __name__ == "__main__":
    sys.exit(main())
