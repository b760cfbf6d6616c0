"""Ranks from a few random open directions, against the singular values of the whole Jacobian."""

from __future__ import annotations

from importlib import import_module
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import dense_jacobian
from torch import Tensor, nn

import rgap
from rgap.analysis import Identifiability, identifiability

chain_ranks = import_module("rgap.analysis.joint_rank.sampled")
ACTIVATIONS = [nn.Sigmoid, nn.Tanh, nn.Softplus, nn.ELU, lambda: nn.LeakyReLU(0.2)]


def chain(
    seed: int,
    channels: int,
    filters: int,
    stride: int,
    activation: nn.Module,
    bias: bool = True,
    classes: int = 8,
) -> nn.Module:
    """Two convolutions and a head on 2x6x6; the first is invertible at stride 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        side = 3 if stride == 1 else 2
        return (
            nn.Sequential(
                nn.Conv2d(2, channels, 3, stride, 1, bias=bias),
                activation,
                nn.Conv2d(channels, filters, 3, 2, 1, bias=bias),
                activation,
                nn.Flatten(),
                nn.Linear(filters * side**2, classes, bias=bias),
            )
            .double()
            .eval()
        )


def dense_rank(jacobian: dict[str, Tensor], layers: tuple[str, ...]) -> int:
    rows = [
        part / part.norm().clamp_min(1e-300)
        for name, part in jacobian.items()
        if name.startswith(layers)
    ]
    return int(torch.linalg.matrix_rank(torch.cat(rows)))


def joint_rank(model: nn.Module, x: Tensor, labels: Tensor) -> int:
    return dense_rank(dense_jacobian(model, x, labels, "cross_entropy"), ("",))


def drawn_ranks(model: nn.Module, x: Tensor, labels: Tensor, **options: object) -> Identifiability:
    """As if the network were a large one: every layer by angles, few spare directions."""
    with (
        patch("rgap.solvers.joint_rank.SMALL", 0),
        patch.object(chain_ranks, "SPARE", 8),
        patch.object(chain_ranks, "LEFT", 4),
    ):
        return identifiability(
            model,
            x,
            labels=labels,
            method="structured",
            sequential=False,
            null_space=False,
            **options,
        )


def batch_of(size: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(size, 2, 6, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 5, (size,), generator=generator)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    channels=st.integers(2, 3),
    filters=st.integers(1, 3),
    stride=st.sampled_from([1, 1, 2]),
    activation=st.sampled_from(ACTIVATIONS),
    bias=st.booleans(),
    size=st.integers(1, 5),
    classes=st.sampled_from([5, 8, 8]),
)
def test_the_ranks_are_those_of_the_jacobian(
    seed: int,
    channels: int,
    filters: int,
    stride: int,
    activation: type,
    bias: bool,
    size: int,
    classes: int,
) -> None:
    model = chain(seed, channels, filters, stride, activation(), bias, classes)
    x, labels = batch_of(size, seed)
    found = drawn_ranks(model, x, labels)
    names = tuple(row.layer for row in found.rows)
    jacobian = dense_jacobian(model, x, labels, "cross_entropy")
    for at, row in enumerate(found.rows):
        rank = dense_rank(jacobian, names[at:])
        assert row.rank == rank if row.exact else row.rank >= rank
    assert found.joint_rank == found.rows[0].rank and found.clear


@pytest.mark.parametrize("seed", [5, 9, 11, 19])
def test_what_badly_conditioned_weights_carry_is_no_equation(seed: int) -> None:
    """⟨W_f, G_f⟩ of two homogeneous layers agree: two equations of the first say nothing new."""
    model = chain(seed, 2, 1, 1, nn.LeakyReLU(0.2), bias=False)
    x, labels = batch_of(1, seed)
    whole = identifiability(model, x, labels=labels, method="structured", sequential=False)
    found = [row.rank for row in whole.rows]
    assert found == [row.rank for row in drawn_ranks(model, x, labels).rows] == [60, 26, 9]
    assert found[0] == joint_rank(model, x, labels)


@pytest.mark.parametrize(("size", "samples"), [(2, 2), (5, 2)])
def test_directions_are_drawn_in_as_few_samples_as_have_enough(size: int, samples: int) -> None:
    model = chain(0, 2, 1, 1, nn.Sigmoid())
    x, labels = batch_of(size, 0)
    draws: list[tuple[int, int, int]] = []
    follow = chain_ranks._continue

    def noted(node: object, draw: object, *rest: object) -> object:
        draws.append((len(draw.open.du), draw.count, draw.samples))
        return follow(node, draw, *rest)

    with patch.object(chain_ranks, "_continue", noted):
        found = drawn_ranks(model, x, labels)
    below = 2 * 2 * 9 + 2  # entries of the first layer's gradient
    assert draws == [(below + 8, found.unknowns - found.rows[1].rank, samples)]
    assert found.joint_rank == joint_rank(model, x, labels)


def test_a_sample_that_ends_empty_decides_nothing() -> None:
    """Fewer directions than equations: the whole null space is asked, and right."""
    model = chain(0, 2, 1, 1, nn.Sigmoid())
    x, labels = batch_of(4, 0)
    with patch.object(chain_ranks, "_equations", lambda node, options: 5):
        found = drawn_ranks(model, x, labels)
    assert found.joint_rank == joint_rank(model, x, labels)


def test_equal_samples_of_a_part_do_not_decide_for_the_batch() -> None:
    """Two equal pictures first: fewer equations meet them than meet the batch."""
    model = chain(3, 2, 1, 1, nn.Tanh())
    x, labels = batch_of(6, 3)
    x[1], labels[1] = x[0], labels[0]
    found = drawn_ranks(model, x, labels)
    assert found.joint_rank == joint_rank(model, x, labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 30.0])
def test_with_and_without_the_null_space_agree(dtype: torch.dtype, scale: float) -> None:
    """Weights in one direction 1e-3 as long, saturated activations, updates in float32."""
    model = chain(1, 3, 2, 1, nn.Sigmoid())
    with torch.no_grad():
        model[2].weight[0] *= scale
    x, labels = batch_of(3, 1)
    few = drawn_ranks(model, x, labels, dtype=dtype)
    whole = identifiability(
        model, x, labels=labels, method="structured", sequential=False, dtype=dtype
    )
    assert few.joint_rank == whole.joint_rank
    assert [row.rank for row in few.rows] == [row.rank for row in whole.rows]


@pytest.mark.parametrize("method", ["auto", "dense", "sketch"])
def test_dead_units_leave_the_structured_route(method: str) -> None:
    model = chain(2, 3, 3, 1, nn.ReLU())
    x, labels = batch_of(3, 2)
    found = identifiability(
        model, x, labels=labels, method=method, sequential=False, null_space=False
    )
    assert found.method != "structured"
    assert found.joint_rank == joint_rank(model, x, labels)


def test_ranks_alone_say_that_they_have_no_directions() -> None:
    model = chain(0, 2, 1, 1, nn.Sigmoid())
    found = drawn_ranks(model, *batch_of(3, 0))
    assert found.null_basis is None and found.joint_nullity > 0
    for ask in (lambda: found.share, lambda: found.determined, found.pictures):
        with pytest.raises(ValueError, match="null_space=True"):
            ask()
    assert found.summary()["determined_entries"] is None
    assert "the same along all" not in found.explain()
    assert found.plot().axes


def test_lenets_one_sample_is_determined() -> None:
    """Two of them leave 240 directions open: see test_identifiability."""
    found = identifiability(
        rgap.models.lenet(seed=0), rgap.photos.load(1), method="structured", sequential=False,
        null_space=False,
    )  # fmt: skip
    assert [row.rank for row in found.rows] == [3072, 3072, 768, 768]
    assert all(row.exact for row in found.rows) and found.gap > 1e6


@pytest.mark.parametrize("act", [nn.Sigmoid, nn.LeakyReLU])
@pytest.mark.parametrize(("classes", "batch"), [(2, 3), (5, 2), (5, 3)])
def test_rounding_that_comes_down_is_no_clear_rank(
    act: type[nn.Module], classes: int, batch: int
) -> None:
    """Two copies move against each other unseen: 15 numbers are open, however they are counted."""
    for seed in range(2):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(15, 22), act(), nn.Linear(22, 23), act(), nn.Linear(23, classes)
        ).double().eval()  # fmt: skip
        x = torch.rand(batch, 15, dtype=torch.float64)
        x[1] = x[0]
        labels = torch.zeros(batch, dtype=torch.long)
        found = identifiability(model, x, labels=labels, method="structured", sequential=False)
        assert not found.clear or found.joint_rank <= 15 * (batch - 1), seed
        assert not found.identifiable, seed


def test_a_bias_hears_nothing_of_cotangents_that_stand_still() -> None:
    """Two samples with one pattern of a LeakyReLU: all dk that are left are 0 up to rounding."""
    for seed in range(24):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(13, 8), nn.LeakyReLU(), nn.Linear(8, 2)).double().eval()
        x, labels = torch.rand(2, 13, dtype=torch.float64), torch.zeros(2, dtype=torch.long)
        ways = ("structured", "dense")
        found, dense = (
            identifiability(model, x, labels=labels, method=way, sequential=False) for way in ways
        )
        assert not found.clear or found.joint_rank == dense.joint_rank, seed
