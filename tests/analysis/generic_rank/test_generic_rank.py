"""Generic ranks of layers: structured against dense, exact against numerical, and the words."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import numpy as np
import pytest
import torch
from random_layers import RandomLayer, layers, true_joint_rank
from torch import Tensor, nn

import rgap
from rgap.analysis.generic_rank.modular import BlockRanks, ModularRanks, modular_ranks
from rgap.analysis.generic_rank.ranks import generic_ranks, layer_ranks
from rgap.network.affine import Affine, Geometry, convolution, linear
from rgap.network.chain import parse
from rgap.solvers.modular import rank

SAMPLE = layers(60)
PRIME = 1_073_741_827  # 2^30 + 3


def dense_blocks(affine: Affine, k: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """[I_C ⊗ K] and [I_B ⊗ W] column by column, from the layer's own forward and backward."""
    batch, size = len(k), prod(affine.in_shape)
    unit = torch.eye(batch * size, dtype=torch.float64).reshape(-1, batch, *affine.in_shape)
    gradient = torch.stack([affine.weight_gradient(x, k).flatten() for x in unit], dim=1)
    weight = torch.stack([(affine.linear(x) * active).flatten() for x in unit], dim=1)
    return gradient, weight


def dense_modular(layer: RandomLayer, seed: int) -> tuple[int, int, int]:
    """Ranks of the whole stacked matrix at a random integer point, modulo one prime."""
    rng = np.random.default_rng(seed)
    point = rng.integers(1, PRIME, tuple(layer.affine.weight.shape)).astype(np.float64)
    k = rng.integers(1, PRIME, (layer.batch, *layer.affine.out_shape)).astype(np.float64)
    affine = replace(layer.affine, weight=torch.from_numpy(point), bias=None)
    blocks = dense_blocks(affine, torch.from_numpy(k) * layer.active, layer.active)
    gradient, weight = (block.numpy().astype(np.int64) for block in blocks)
    return (
        rank(gradient, PRIME),
        rank(weight, PRIME),
        rank(np.concatenate([gradient, weight]), PRIME),
    )


@pytest.mark.cases(20)
@pytest.mark.parametrize(
    "layer",
    [layer for layer in SAMPLE if layer.batch * prod(layer.affine.in_shape) <= 330],
    ids=lambda layer: f"{layer.index}: {layer.title}",
)
def test_structured_elimination_is_dense_elimination(layer: RandomLayer) -> None:
    assert true_joint_rank(layer) == dense_modular(layer, layer.index)


@pytest.mark.cases(15)
@pytest.mark.parametrize("layer", SAMPLE[::2], ids=lambda layer: f"{layer.index}: {layer.title}")
def test_three_ways_of_counting(layer: RandomLayer) -> None:
    """numerical = modular ≤ structural at random weights, and the words say what differs."""
    found = layer_ranks(layer.affine, layer.batch, layer.active, seed=layer.index)
    assert found.agree
    assert found.modular.agree
    assert found.modular.failure < 1e-9
    assert found.gap > 10
    for name in ("gradient", "weight", "joint"):
        assert getattr(found.modular, name) <= getattr(found.structural, name)
    assert found.nullity == found.unknowns - found.modular.joint >= 0
    text = found.explain()
    assert f"{found.modular.joint} of {found.unknowns}" in text
    assert ("A matching cannot see them" in text) == (found.structural.joint > found.modular.joint)


@pytest.mark.parametrize("index", [1, 4, 6, 16, 22, 37])
def test_numerical_ranks_are_those_of_the_dense_matrix(index: int) -> None:
    layer = SAMPLE[index]
    generator = torch.Generator().manual_seed(5)
    shape = (layer.batch, *layer.affine.out_shape)
    k = torch.randn(shape, generator=generator, dtype=torch.float64) * layer.active
    found = layer_ranks(layer.affine, layer.batch, layer.active, cotangents=k, points=1)
    gradient, weight = dense_blocks(layer.affine, k, layer.active)
    blocks = (gradient, weight, torch.cat([gradient, weight]))
    dense = BlockRanks(*(int(torch.linalg.matrix_rank(block)) for block in blocks))
    assert found.numerical == dense


def test_published_layers() -> None:
    cnn6d = parse(rgap.models.cnn6d(seed=0), (3, 32, 32)).stages[1].affine
    found = modular_ranks(cnn6d, 1, points=1)
    assert (found.gradient, found.weight, found.joint) == (1968, 1620, 3188)
    assert prod(cnn6d.in_shape) - found.joint == 280
    lenet = parse(rgap.models.lenet(seed=0), (3, 32, 32)).stages[1].affine
    found = modular_ranks(lenet, 2, points=1)
    assert (found.gradient, found.weight, found.joint) == (3600, 1536, 4992)
    assert found.shared == 144  # F² for 12 filters
    assert found.failure < 1e-4


def small(weight: Tensor, **options: int) -> Affine:
    geometry = Geometry.of(tuple(weight.shape[2:]), **options)
    return convolution(
        "conv", weight, None, ("conv.weight", None), (weight.shape[1], 6, 6), geometry
    )


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def test_dependent_filters_are_named() -> None:
    weight = normal(4, 3, 3, 3)
    weight[3] = weight[0] - 2 * weight[1]
    found = layer_ranks(small(weight, stride=3), 1)
    assert found.numerical.weight == 12
    assert found.modular.weight == 16
    assert not found.agree
    assert "Some filters of this layer depend on each other" in found.explain()
    assert "Gradient block: rank" not in found.explain()


def test_cotangents_that_sum_to_zero_are_named() -> None:
    """Softmax: rows of k sum to 0, so six samples have five independent rows, not six."""
    head = linear("head", normal(6, 30), None, ("head.weight", None), (30,))
    k = normal(8, 6)
    found = layer_ranks(head, 8, cotangents=k - k.mean(1, keepdim=True))
    assert found.numerical.gradient == 30 * 5
    assert found.modular.gradient == 30 * 6
    assert "under a softmax they sum to 0" in found.explain()


def test_a_rank_that_rounding_decides_is_called_that() -> None:
    """A filter that repeats another one up to 1e-15: no cutoff can tell."""
    weight = normal(4, 3, 3, 3)
    weight[3] = weight[0]
    for power in range(10, 18):
        nearly = weight.clone()
        nearly[3] += 10.0**-power * normal(3, 3, 3)
        found = layer_ranks(small(nearly, stride=3), 1, points=1)
        assert found.modular.weight == 16  # whatever the weights are
        if found.numerical.weight < 16 and found.gap < 10:
            assert "rounding decides it" in found.explain()
    assert found.numerical.weight == 12


def test_seeds_are_reproducible_and_change_the_points() -> None:
    affine = small(normal(2, 3, 3, 3), padding=1)
    first, again, other = (modular_ranks(affine, 2, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.primes != other.primes
    assert (first.gradient, first.joint) == (other.gradient, other.joint) == (54, 194)
    assert len(set(modular_ranks(affine, 1, points=3).primes)) == 3


def test_everything_off_leaves_nothing() -> None:
    active = torch.zeros(2, 2, 6, 6, dtype=torch.bool)
    found = layer_ranks(small(normal(2, 3, 3, 3), padding=1), 2, active)
    assert found.numerical == found.structural == BlockRanks(0, 0, 0)
    assert (found.modular.joint, found.nullity, found.modular.failure) == (0, 216, 0.0)


def test_any_network_layer_by_layer() -> None:
    """ReLU, max-pool and a skip connection: masks from a probe, the model left as it was."""

    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(2, 4, 3, padding=1)
            self.second = nn.Conv2d(4, 4, 3, padding=1)
            self.head = nn.Linear(4 * 16, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.first(x))
            x = nn.functional.max_pool2d(torch.relu(x + self.second(x)), 2)
            return self.head(x.flatten(1))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Skip().eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = generic_ranks(model, (2, 8, 8), 2)
    assert [ranks.layer for ranks in found] == ["first", "second", "head"]
    audit = rgap.analysis.audit(model, (2, 8, 8), batch_sizes=(2,))
    for ranks, row in zip(found, audit.rows, strict=True):
        assert ranks.numerical == BlockRanks(row.gradient_rank, row.weight_rank, row.joint_rank)
        assert ranks.modular.joint <= ranks.structural.joint <= ranks.unknowns
        assert ranks.numerical.joint <= ranks.modular.joint
    # three quarters of the second layer's outputs lost the max-pool: their rows are unknown
    assert found[1].modular.weight <= 2 * 4 * 16
    assert found[2].modular == replace(
        found[2].modular, gradient=2 * 64, weight=2 * 5, joint=2 * 64
    )
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("loss", ["mse_loss", "binary_cross_entropy_with_logits"])
def test_other_losses_and_given_pictures(loss: str) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, 2)).eval()
    pictures = torch.rand(3, 6, generator=torch.Generator().manual_seed(1))
    found = generic_ranks(model, (6,), 3, loss=loss, inputs=pictures)
    assert [(r.modular.gradient, r.modular.weight, r.modular.joint) for r in found] == [
        (18, 15, 18),
        (10, 6, 6 + 10 - 4),
    ]


def test_malformed_input_is_refused() -> None:
    affine = small(normal(2, 3, 3, 3), padding=1)
    with pytest.raises(ValueError, match="expected points >= 1, got 0"):
        modular_ranks(affine, 1, points=0)
    with pytest.raises(ValueError, match="expected batch >= 1, got 0"):
        layer_ranks(affine, 0)
    with pytest.raises(TypeError, match="expected a boolean mask"):
        layer_ranks(affine, 1, torch.ones(1, 2, 6, 6))
    with pytest.raises(ValueError, match=r"expected cotangents of shape \[2, 2, 6, 6\]"):
        layer_ranks(affine, 2, cotangents=torch.ones(1, 2, 6, 6))
    wide = linear("fc", torch.ones(1, 9000), None, ("fc.weight", None), (9000,))
    with pytest.raises(ValueError, match="expected at most 8192 inputs per sample"):
        layer_ranks(wide, 1)
    model = rgap.models.lenet(seed=0)
    with pytest.raises(ValueError, match="expected batch_size >= 1, got 0"):
        generic_ranks(model, (3, 32, 32), 0)
    with pytest.raises(ValueError, match=r"expected inputs of shape \[2 or more, 3, 32, 32\]"):
        generic_ranks(model, (3, 32, 32), 2, inputs=torch.rand(1, 3, 32, 32))


def test_the_largest_of_several_points_counts() -> None:
    """Points are combined block by block: none of them can be too high."""
    low, high = BlockRanks(3, 4, 6), BlockRanks(2, 5, 6)
    assert low.largest(high) == BlockRanks(3, 5, 6)
    assert BlockRanks(3, 5, 6).shared == 2
    assert isinstance(modular_ranks(SAMPLE[0].affine, 1), ModularRanks)
