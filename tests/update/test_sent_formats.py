"""Genuine updates of few values in every format: none is refused, and no certificate is wrong."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rgap import Loss, Recovery, Status, Update, capture, check, invert
from rgap.diagnosis.finding import Kind
from rgap.update.quantisation import recognise, stored

N = 5


def int8(g: Tensor) -> Tensor:
    step = g.abs().max() / 127
    return (g / step).round() * step


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "float16": lambda g: g.half().to(g.dtype),
    "bfloat16": lambda g: g.bfloat16().to(g.dtype),
    "int8": int8,
    "kept in float16": Tensor.half,
    "kept in bfloat16": Tensor.bfloat16,
}
LOSSES = {
    "index": Loss(),
    "soft": Loss(targets="probability"),
    "smooth": Loss(label_smoothing=0.1, reduction="sum"),
    "value": Loss("mse_loss"),
    "binary": Loss("binary_cross_entropy_with_logits"),
}


def network(layers: int, outputs: int, gain: float = 1.0) -> nn.Module:
    below = [nn.Linear(N, 4), nn.Tanh()] if layers > 1 else []
    model = nn.Sequential(*below, nn.Linear(4 if below else N, outputs)).eval()
    for p in model.parameters():
        p.data.mul_(gain)
    return model


def targets(kind: str, batch: int, outputs: int) -> Tensor:
    if kind in ("index", "smooth"):
        return torch.randint(outputs, (batch,))
    drawn = torch.rand(batch, outputs)
    return {"soft": drawn.softmax(1), "value": drawn, "binary": drawn.round()}[kind]


def judged(recovery: Recovery, inputs: Tensor) -> None:
    assert recovery.status is not Status.INCONSISTENT, recovery.reason
    if recovery.status is Status.EXACT:
        own = recovery.inputs
        for order in itertools.permutations(range(len(inputs))):
            if float((own - inputs[list(order)]).abs().max()) <= recovery.error_bound:
                return
        raise AssertionError(f"off by more than {recovery.error_bound}")


CASES = [
    (way, *case, [torch.float32, torch.float64][number % 2])
    for number, (way, case) in enumerate(
        itertools.product(
            WAYS, [(1, 1, "index"), (1, 1, "binary"), (2, 1, "soft"), (2, 2, "index")]
        )
    )
]


@pytest.mark.parametrize(("way", "layers", "batch", "kind", "dtype"), CASES)
def test_no_format_makes_an_update_of_few_values_inconsistent(
    way: str, layers: int, batch: int, kind: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(7 * layers + batch)
    model = network(layers, 3, gain=1.0 if layers > 1 else 0.01).to(dtype)
    inputs = torch.rand(batch, N, dtype=dtype)
    if layers == 1 and way != "int8":
        inputs = inputs[:, :1].expand(batch, N).clone()  # three values in all of G
    y = targets(kind, batch, 3)
    update = capture(model, inputs, y.to(dtype) if y.is_floating_point() else y, LOSSES[kind])
    sent = {n: WAYS[way](g) for n, g in update.gradients.items()}
    update = dataclasses.replace(update, gradients=sent)
    assert update.dtype == dtype
    judged(invert(model, update), inputs)


def one_layer(seed: int = 0) -> dict[str, Tensor]:
    """The gradient of one sample of equal entries at three units: six different values."""
    torch.manual_seed(seed)
    model = network(1, 3)
    return capture(model, torch.full((1, N), 0.37), torch.tensor([1])).gradients


@pytest.mark.parametrize(("way", "kind"), [
    ("float16", "float16"), ("bfloat16", "bfloat16"), ("int8", "8-bit integers"),
])  # fmt: skip
def test_a_few_values_show_their_format(way: str, kind: str) -> None:
    for seed in range(20):
        shown = recognise({n: WAYS[way](g) for n, g in one_layer(seed).items()})
        assert shown is not None and shown.kind == kind, seed
        assert recognise(one_layer(seed)) is None


def test_the_evidence_of_small_tensors_adds_up() -> None:
    """Two values each: one that the scale is made from, and one that shows it."""
    torch.manual_seed(0)
    parts = {str(n): int8(torch.randn(2)) for n in range(6)}
    assert recognise({"0": parts["0"]}) is None
    shown = recognise(parts)
    assert shown is not None and shown.kind == "8-bit integers" and len(shown.noise) == 6


@pytest.mark.parametrize("sizes", [
    (3 / 128, 1 / 32, 5 / 128, 9 / 64, 11 / 64, 23 / 128, 25 / 128, 1 / 4),
    (9 / 256, 31 / 256, 35 / 256, 57 / 256, 1 / 4), (3 / 32, 9 / 32, 1.0), (3 / 8, 13 / 16, 9 / 8),
])  # fmt: skip
def test_small_fractions_show_no_format(sizes: tuple[float, ...]) -> None:
    """Genuine gradients of constant or zero weights and pictures of few levels."""
    assert recognise({"weight": torch.tensor(sizes)}) is None


@pytest.mark.parametrize("classes", [4, 128, 256, 512])
def test_classes_before_training_show_no_integers(classes: int) -> None:
    """κ = 1/C and 1/C − 1: one step and C − 1 of them."""
    kappa = torch.full((classes,), 1 / classes, dtype=torch.float64)
    kappa[1] -= 1.0
    x = torch.rand(9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert recognise({"w": torch.outer(kappa, x), "b": kappa}) is None


# --- the format that is sent, and the precision of the computation ------------------------------


def test_what_was_sent_in_half_precision_was_not_computed_in_it() -> None:
    """However the update is made, its readers see the rounding of its tensors."""
    torch.manual_seed(1)
    model = network(2, 3)
    x = torch.rand(1, N)
    single = capture(model, x, torch.tensor([2]))
    half = {n: g.half() for n, g in single.gradients.items()}
    fields = {"batch_size": 1, "input_shape": (N,)}
    made = {
        "replaced": dataclasses.replace(single, gradients=half),
        "stated": Update(half, dtype=torch.float32, **fields),
        "unknown": Update(half, **fields),
        "arrays": Update.from_ndarrays(model, [g.numpy() for g in half.values()], **fields),
        "values": dataclasses.replace(single, gradients={n: g.float() for n, g in half.items()}),
    }
    rounding = stored(half, torch.float32)
    for name, update in made.items():
        seen = update.as_rounded()[0]
        computed = torch.float32 if name in ("replaced", "stated") else torch.float16
        assert seen.dtype == computed, name
        assert seen.noise is not None
        for n, g in single.gradients.items():
            assert torch.equal(seen.noise[n], rounding[n]), name
            assert float(((half[n].float() - g).abs() / rounding[n]).max()) <= 3**0.5 + 1e-3
        judged(invert(model, update), x)
        assert check(model, update).ok or check(model, update).best.kind == "precision", name


def test_rounding_follows_the_entries_of_any_layout() -> None:
    g = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).half()
    turned = stored({"w": g.T}, torch.float32)["w"]
    assert torch.equal(turned, stored({"w": g}, torch.float32)["w"].T)


def test_a_coarser_format_adds_to_other_noise() -> None:
    g = torch.ones(2, 2).half()
    stated = {"w": torch.full((2, 2), 1.0)}
    both = Update({"w": g}, dtype=torch.float32, noise=stated).as_rounded()[0].noise
    assert both is not None
    assert torch.allclose(both["w"], (1 + stored({"w": g}, torch.float32)["w"] ** 2).sqrt())


def test_magnitudes_of_one_spacing_are_no_step_of_an_optimiser() -> None:
    """A gradient that underflowed in float16: every entry that is left is ± 2^-24."""
    torch.manual_seed(0)
    tiny = (torch.randn(8, 40) * 4e-8).half()
    assert set(tiny.abs().unique().tolist()) <= {0.0, 2**-24, 2**-23}
    kept = torch.where(tiny.abs() > 2**-24, tiny.sign() * 2**-24, tiny)
    model = nn.Linear(40, 8, bias=False)
    update = Update({"weight": kept}, batch_size=2)
    seen = check(model, update)
    assert all(finding.kind != "optimiser" for finding in seen.findings)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_frozen_layer_of_a_model_in_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)).eval().to(dtype)
    model[0].weight.requires_grad_(False)
    inputs = torch.rand(1, 6)
    update = capture(model, inputs, torch.tensor([1]))
    judged(invert(model, update), inputs)
    for trained in (False, True):
        model[0].weight.requires_grad_(trained)
        found = check(model, update)
        assert all(f.kind is Kind.NAMES for f in found.findings), str(found)
