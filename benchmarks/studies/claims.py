"""Four claims of the literature on gradient inversion, computed.

    python -m benchmarks.studies.claims    a few minutes

Every line is a statement of ``docs/claims.md`` with the number that it rests on.  Exit status 1 if
one of them does not hold.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

import rgap
from benchmarks.common.arguments import Arguments
from benchmarks.common.networks import BINARY, seeded
from rgap.analysis import Identifiability, identifiability, layer_form, symbolic

Check = tuple[str, object, object]  # what, found, expected


def main() -> int:
    """Print every number beside what the page says; count the differences."""
    parser = Arguments(__doc__, rows=["mlp"])
    parser.rows(CLAIMS)
    wrong = 0
    for name in parser.parse_args().rows:
        title, checks = CLAIMS[name]
        start = time.perf_counter()
        print(f"\n{title}")
        for what, value, expected in checks():
            same = value == expected
            wrong += not same
            print(f"  {what:<72} {value}" + ("" if same else f"   EXPECTED {expected}"))
        print(f"  {time.perf_counter() - start:.0f} s")
    return 1 if wrong else 0


def mlp() -> list[Check]:
    """Layer by layer, jointly, recovered; and the pair of samples that send one update."""
    model = rgap.models.mlp((64, 32), 10, "tanh", input_shape=(1, 8, 8), seed=0)
    net = symbolic(model, (1, 8, 8))
    jointly = identifiability(model, (1, 8, 8), 1)
    picture = rgap.photos.load(1, 8).mean(1, keepdim=True)
    update = rgap.capture(model, picture, torch.tensor([3]), dtype=torch.float64)
    odd = seeded(
        lambda: nn.Sequential(
            nn.Linear(64, 32, bias=False), nn.Tanh(), nn.Linear(32, 1, bias=False)
        ).double()
    )
    x = picture.flatten(1)
    return [
        ("nullity of all layers at B = 1", int(net.total_nullity.subs({_symbol(net): 1})), 0),
        ("joint rank of 64 unknowns", jointly.joint_rank, 64),
        ("status of its recovery", rgap.invert(model, update).status.name, "EXACT"),
        ("critical batch, layer by layer", [str(la.critical_batch) for la in net.layers], MLP),
        ("no bias, one logit: (x, 1) and (−x, 0) send the same", _same(odd, x, -x), True),
        ("nullity with its joint rank, without biases", _nullity(odd, x), 0),
    ]


MLP = ["oo", "33", "10"]


def lenet() -> list[Check]:
    """1152 missing layer by layer, 240 jointly."""
    model = rgap.models.lenet(seed=0)
    net = symbolic(model, (3, 32, 32))
    b = _symbol(net)
    joint = {batch: _joint(model, (3, 32, 32), batch) for batch in (1, 2)}
    return [
        ("conv2: joint rank of its own equations, every B", str(net.layers[1].joint_rank), LENET),
        ("B of every layer from which something stays open", _stars(net), ["oo", "2", "oo", "10"]),
        ("B = 1: open layer by layer", int(net.total_nullity.subs(b, 1)), 0),
        ("B = 1: joint rank of 3072 unknowns", joint[1].joint_rank, 3072),
        ("B = 2: open layer by layer", int(net.total_nullity.subs(b, 2)), 1152),
        ("B = 2: joint rank of 6144 unknowns", joint[2].joint_rank, 5904),
    ]


LENET = "Min(3072*B, 768*B + 3456)"


def convolutions() -> list[Check]:
    """CNN6-d's second convolution misses 280 equations; it depends on filters and stride."""
    small = symbolic(rgap.models.cnn6d(seed=0), (3, 32, 32), 1, loss=BINARY)
    large = symbolic(rgap.models.cnn6(seed=0), (3, 32, 32), 1, loss=BINARY)
    conv2 = small.layers[1]
    naive = 12 * 20 * 9
    sizes = {"kernel_size": 3, "input_size": (16, 16), "padding": 1}
    same = layer_form("conv2d", {**sizes, "in_channels": 16, "out_channels": 16})
    jointly = _joint(
        rgap.models.cnn6d(seed=0), rgap.photos.load(1), labels=torch.ones(1, 1), loss=BINARY
    )
    return [
        (
            "CNN6, nullity of every layer at B = 1",
            [int(la.nullity) for la in large.layers],
            [0] * 7,
        ),
        ("CNN6-d, the same", [int(la.nullity) for la in small.layers], [0, 280, 0, 0, 0, 0, 0]),
        ("its second convolution: naive count of gradient rows", naive, 2160),
        ("its second convolution: rank K and W", _ranks(conv2), (1968, 1620)),
        ("its second convolution: joint rank of 3468", int(conv2.joint_rank), 3188),
        ("CNN6-d, all layers together: rank of 3072 unknowns", jointly.joint_rank, 3072),
        (
            "stride 1, padding 1, 16 → 16 channels: discards from B =",
            str(same.critical_batch),
            "oo",
        ),
    ]


def labels() -> list[Check]:
    """The same joint nullity with equal labels, a smaller singular value, and a recovery."""
    model = rgap.models.lenet(seed=0).double()
    pictures = rgap.photos.load(2, dtype=torch.float64)
    ratio = {}
    equal = torch.tensor([3, 3])
    jointly = _joint(model, pictures, labels=equal)
    for name, pair in (("different", [3, 5]), ("equal", [3, 3])):
        target = torch.tensor(pair)
        update = rgap.capture(model, pictures, target, dtype=torch.float64)
        head = list(update.gradients.values())[-2]
        values = torch.linalg.svdvals(head.double())
        ratio[name] = float(values[1] / values[0])
    batch = rgap.models.mlp((64, 64), 10, "gelu", input_shape=(3, 16, 16), seed=0)
    four = rgap.photos.load(4, 16)
    update = rgap.capture(batch, four, torch.tensor([3, 3, 3, 3]), dtype=torch.float64)
    recovery = rgap.invert(batch, update)
    print(f"  σ_2/σ_1 of LeNet's head gradient: {ratio['different']:.1e} for labels 3, 5, ")
    print(f"  and {ratio['equal']:.1e} for labels 3, 3")
    return [
        ("LeNet, B = 2, labels 3, 3: joint nullity", jointly.joint_nullity, 240),
        ("equal labels lower σ_2/σ_1 more than a hundredfold", _far(ratio), True),
        ("and it stays above what float64 resolves, 1e-13", ratio["equal"] > 1e-13, True),
        ("MLP, four samples of one label: status", recovery.status.name, "EXACT"),
    ]


def _joint(model: nn.Module, *inputs: Any, **options: Any) -> Identifiability:
    """Ranks alone, layer by layer without the Jacobian."""
    return identifiability(
        model, *inputs, **options, method="structured", sequential=False, null_space=False
    )


def _far(ratio: dict[str, float]) -> bool:
    return ratio["equal"] < ratio["different"] / 100


def _symbol(net: rgap.analysis.SymbolicNetwork) -> object:
    return net.layers[0].batch


def _stars(net: rgap.analysis.SymbolicNetwork) -> list[str]:
    return [str(layer.critical_batch) for layer in net.layers]


def _ranks(layer: rgap.analysis.SymbolicLayer) -> tuple[int, int]:
    return int(layer.gradient_rank), int(layer.weight_rank)


def _same(model: nn.Module, x: Tensor, other: Tensor) -> bool:
    """True if (x, label 1) and (other, label 0) send the same update up to rounding."""
    updates = [
        rgap.capture(
            model,
            inputs,
            torch.tensor([[label]]),
            loss=BINARY,
            dtype=torch.float64,
            value_range=None,
        )
        for inputs, label in ((x, 1.0), (other, 0.0))
    ]
    pairs = zip(*(update.gradients.values() for update in updates), strict=True)
    return all(torch.allclose(a, b, rtol=1e-12, atol=1e-15) for a, b in pairs)


def _nullity(model: nn.Module, x: Tensor) -> int:
    return identifiability(model, x, loss=BINARY, sequential=False).joint_nullity


CLAIMS = {
    "mlp": ("a one-sample MLP is fully determined", mlp),
    "lenet": ("LeNet at batch size 2 fails", lenet),
    "convolutions": ("convolutions discard even at B = 1", convolutions),
    "labels": ("repeated labels are the obstacle", labels),
}

if __name__ == "__main__":
    sys.exit(main())
