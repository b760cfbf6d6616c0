"""Batch norm in train mode: ranks of a layer and of the whole update, statistics differentiated."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from train_mode import SHAPE, buffers, mixing_conv, mixing_mlp, passed, untouched

from rgap.analysis import audit, identifiability
from rgap.analysis.discard.coupled import BOUNDED, COUPLED
from rgap.analysis.joint_rank.largest_batch import largest_identifiable_batch
from rgap.analysis.probe import probe_layers, probe_targets
from rgap.constraints import gradient_constraint
from rgap.update.losses import Loss

NETWORKS = {
    "sigmoid": (lambda: mixing_conv(width=4), SHAPE),
    "relu": (lambda: mixing_conv(nn.ReLU, width=4), SHAPE),
    "mlp": (lambda: mixing_mlp((12, 16, 14)), (12,)),
}
BATCHES = [
    (name, count) for name, count in product(NETWORKS, (1, 2, 4)) if (name, count) != ("mlp", 1)
]


def rank(matrix: Tensor) -> int:
    """By singular values, relative to the size of the matrix."""
    values = torch.linalg.svdvals(matrix)
    return int((values > max(matrix.shape) * 2.3e-16 * values[0]).sum())


def dense(x: Tensor, rows: Tensor) -> Tensor:
    """Jacobian of ``rows`` by x, an entry at a time by reverse passes."""
    parts = [
        torch.autograd.grad(entry, x, retain_graph=True, materialize_grads=True)[0].flatten()
        for entry in rows.flatten()
    ]
    return torch.stack(parts)


def drawn(name: str, count: int) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A network in train mode, a batch in float64 and its labels."""
    build, shape = NETWORKS[name]
    generator = torch.Generator().manual_seed(count)
    x = torch.rand(count, *shape, generator=generator, dtype=torch.float64)
    return build(), x, torch.arange(count)


@pytest.mark.cases(3)
@pytest.mark.parametrize(("name", "count"), BATCHES)
def test_the_joint_rank_is_that_of_a_dense_jacobian(name: str, count: int) -> None:
    network, x, y = drawn(name, count)
    before = buffers(network)
    found = identifiability(network, x, labels=y, sequential=False)
    sketched = identifiability(network, x, labels=y, sequential=False, method="sketch")
    assert untouched(network, before)
    twin = copy.deepcopy(network).double()
    data = x.clone().requires_grad_()
    loss = F.cross_entropy(twin(data), y)
    slopes = torch.autograd.grad(loss, list(twin.parameters()), create_graph=True)
    blocks = [dense(data, slope) for slope in slopes if float(slope.detach().norm()) > 1e-12]
    reference = rank(torch.cat([block / block.norm() for block in blocks]))
    assert found.joint_rank == sketched.joint_rank == reference
    if name == "mlp":  # the same shift of all samples changes no difference between them
        assert reference == x.numel() - x[0].numel()
    with pytest.raises(ValueError, match=r"'.' .* is no link of a chain"):
        identifiability(network, x, labels=y, sequential=False, method="structured")


@pytest.mark.cases(3)
@pytest.mark.parametrize(("name", "count"), BATCHES)
def test_layers_below_a_batch_norm_are_counted_as_one_system(name: str, count: int) -> None:
    """Against y where its cotangent is not 0 and ∂⟨k, y⟩/∂W, by reverse passes."""
    network, x, _ = drawn(name, count)
    before = buffers(network)
    table = audit(network, tuple(x.shape[1:]), (count,), inputs=x)
    assert untouched(network, before)
    twin, values, cotangents = passed(network, x)
    for place, module in enumerate(twin):
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        row = table.row(str(place), count)
        if place == len(twin) - 1:
            assert row.route != COUPLED and row.exact
            continue
        u, k = values[place].detach().requires_grad_(), cotangents[place + 1]
        y = twin[place + 1](module(u))
        [slope] = torch.autograd.grad((k * y).sum(), [module.weight], create_graph=True)
        gradient, weight = dense(u, slope), dense(u, y[k != 0])
        both = torch.cat([gradient / gradient.norm(), weight / weight.norm()])
        assert (row.route, row.exact) == (COUPLED, True)
        assert (row.gradient_rank, row.weight_rank) == (rank(gradient), rank(weight))
        assert row.joint_rank == rank(both)
        assert row.by_gradient is None and row.by_shifts is None
    assert any("takes the statistics of the batch" in note for note in table.notes)


@pytest.mark.parametrize(("name", "count"), BATCHES)
def test_a_bound_is_never_below_what_is_counted(name: str, count: int) -> None:
    network, x, _ = drawn(name, count)
    shape = tuple(x.shape[1:])
    exact = audit(network, shape, (count,), inputs=x)
    bound = audit(network, shape, (count,), inputs=x, method="sketch")
    for row in bound.rows[:-1]:
        assert (row.route, row.exact) == (BOUNDED, False)
        assert row.joint_rank >= exact.row(row.layer, count).joint_rank
    assert bound.largest_exact_batch == 0
    if name == "mlp":
        assert [row.nullity for row in bound.rows[:2]] == [12, 16]
        assert [row.nullity for row in exact.rows[:2]] == [12, 16]


@pytest.mark.parametrize(("name", "count"), BATCHES)
def test_cotangents_below_a_batch_norm_satisfy_two_relations(name: str, count: int) -> None:
    """Σκ = 0, so that K has rank r − 1 at most; Σκx̂ = γ/σ Σk x̂ ε/σ², next to 0."""
    network, x, _ = drawn(name, count)
    twin, values, cotangents = passed(network, x)
    for place, norm in enumerate(twin):
        if not isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            continue
        axes = [d for d in range(values[place].ndim) if d != 1]
        s, kappa, k = values[place], cotangents[place - 1], cotangents[place]
        variance, mean = torch.var_mean(s, axes, correction=0, keepdim=True)
        sigma = (variance + norm.eps).sqrt()
        normed = (s - mean) / sigma
        size = k.abs().sum(axes) * norm.weight.abs() / sigma.flatten()
        assert bool((kappa.sum(axes).abs() <= 1e-12 * size).all())
        left = norm.weight / sigma.flatten() ** 3 * norm.eps * (k * normed).sum(axes)
        assert torch.allclose((kappa * normed).sum(axes), left, rtol=1e-6, atol=1e-13)
        targets = probe_targets(network, x, Loss(), None, 0)
        probe = probe_layers(network, x, targets, Loss())[place // 3]
        assert torch.allclose(probe.cotangents, kappa, atol=1e-12)
        if name == "mlp":
            found = gradient_constraint(probe.affine, probe.sent).rank().rank
            assert found == probe.affine.in_shape[0] * (count - 1)


def test_statistics_are_those_of_the_batch_without_running_ones_in_eval_mode() -> None:
    network, x, y = drawn("mlp", 3)
    norms = [m for m in network if isinstance(m, nn.BatchNorm1d)]
    for norm in norms:
        norm.track_running_stats, norm.num_batches_tracked = False, None
        norm.running_mean = norm.running_var = None
    network.eval()
    table = audit(network, (12,), (3,), inputs=x)
    assert [row.route for row in table.rows[:2]] == [COUPLED, COUPLED]
    assert [row.nullity for row in table.rows[:2]] == [12, 16]
    assert identifiability(network, x, labels=y, sequential=False).joint_nullity == 12


def test_a_norm_of_the_data_and_one_behind_an_activation_are_bounds() -> None:
    network = nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8),
        nn.Flatten(), nn.Linear(288, 5),
    ).train()  # fmt: skip
    table = audit(network, SHAPE, (1, 2))
    for count in (1, 2):
        first, conv, head = (table.row(layer, count) for layer in ("0", "1", "5"))
        assert (first.nullity, first.exact, first.kind) == (3, False, "step")
        assert (conv.route, conv.exact) == (BOUNDED, False)
        assert head.exact
    assert table.largest_exact_batch == 0
    assert "Behind '1' a batch norm" in table.explain()
    assert "No gradient at all" not in table.explain()


def test_branches_below_batch_norms_are_bounds() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
            self.skip, self.skip_norm = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)
            self.head = nn.Linear(384, 5)

        def forward(self, x: Tensor) -> Tensor:
            out = self.norm(self.first(x)) + self.skip_norm(self.skip(x))
            logits: Tensor = self.head(out.relu().flatten(1))
            return logits

    table = audit(Block().train(), SHAPE, (2,))
    assert [(row.route, row.exact) for row in table.rows[:2]] == [(BOUNDED, False)] * 2
    assert table.row("head", 2).exact


def test_what_counts_samples_by_themselves_still_refuses() -> None:
    network = mixing_conv()
    with pytest.raises(ValueError, match=r"method='formula'.*'1' \(BatchNorm2d\).*model.eval\(\)"):
        audit(network, SHAPE, (1,), method="formula")
    with pytest.raises(ValueError, match="train mode"):
        largest_identifiable_batch(network, SHAPE)
    with pytest.raises(ValueError, match="write a batch of B >= 2"):
        audit(mixing_mlp(), (12,), (1,))
    with pytest.raises(ValueError, match="write a batch of B >= 2"):
        identifiability(mixing_mlp(), (12,))
