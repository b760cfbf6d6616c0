"""The parts of the separation one by one: targets, copies, roots, routes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from batched import batch_of, true_roots
from cases import KINDS, mlp, pictures
from torch import Tensor, nn

import rgap
from rgap.precision import Precision
from rgap.separation.batch import Batch, Separated, Unseparated
from rgap.separation.counts import multiplicity, smallest_batch
from rgap.separation.identify import LISTED, Identity, continuous, identify, rise
from rgap.separation.pair import Between, steps_between
from rgap.separation.peeling import Collected, Starts, collect
from rgap.separation.route import mixed, separate
from rgap.separation.softmax.equations import AtHead
from rgap.separation.softmax.separate import identify_classes, likely, separate_head
from rgap.separation.subspace import restricted
from rgap.separation.targets import batch_loss, contradicted, refuting
from rgap.update.losses import Loss

F64 = torch.float64
MSE = "mse_loss"


def between(batch: Batch) -> Between:
    steps = steps_between(batch.chain, 0)
    assert not isinstance(steps, str)
    return Between.of(batch.mixture(0), batch.mixture(1), steps, batch.precision)


def named(batch: Batch, roots: Tensor) -> list[Identity]:
    return identify(batch.chain, batch.mixture(0), batch.mixture(len(batch.chain.stages) - 1),
                    roots, batch.loss)  # fmt: skip


# -- targets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("activation", list(KINDS))
def test_a_true_root_has_its_class_and_weight(
    activation: str, smoothing: float, reduction: str
) -> None:
    x, y = pictures(4, 2), torch.tensor([4, 0, 4, 2])
    loss = Loss(label_smoothing=smoothing, reduction=reduction)
    batch = batch_of(mlp(activation, 6), x, y, loss)
    found = named(batch, true_roots(batch, x))
    duals = torch.stack([i.dual for i in found])
    assert [i.label for i in found] == y.tolist()
    assert all(i.accepted and i.outside < 1e-6 and i.next > 1e3 * i.outside for i in found)
    expected = 4.0 if reduction == "mean" else 1.0
    assert all(i.share == pytest.approx(expected, rel=1e-6) for i in found)
    assert torch.allclose(duals @ true_roots(batch, x).T, torch.eye(4, dtype=F64), atol=1e-7)


@pytest.mark.parametrize("copies", [2, 3, 5])
def test_the_weight_of_copies(copies: int) -> None:
    x, y = pictures(3, 2), torch.tensor([4, 0, 4])
    index = [0] * copies + [1, 2]
    batch = batch_of(mlp("gelu", 6), x[index], y[index])
    found = named(batch, true_roots(batch, x))
    expected = [len(index) / copies, len(index), len(index)]
    assert [i.share for i in found] == pytest.approx(expected, rel=1e-6)
    shares = [i.share for i in found]
    assert smallest_batch(shares, batch.loss, 5) == len(index)
    assert [round(multiplicity(s, batch.loss, len(index), 5)) for s in shares] == [copies, 1, 1]


def test_many_classes_are_shortlisted() -> None:
    classes = 3 * LISTED
    x, y = pictures(4, 3), torch.tensor([70, 2, 70, 31])
    batch = batch_of(mlp("gelu", 1, widths=(40,), classes=classes), x, y)
    found = named(batch, true_roots(batch, x))
    assert [i.label for i in found] == y.tolist()
    assert all(i.accepted for i in found)


def test_a_point_that_is_no_sample_has_no_target() -> None:
    x, y = pictures(4, 2), torch.tensor([4, 0, 1, 2])
    batch = batch_of(mlp("gelu", 6), x, y)
    roots = true_roots(batch, x)
    for q in (roots.mean(0), roots[0] + 0.3 * (roots[1] - roots[2])):
        assert not named(batch, q[None])[0].accepted


def test_one_picture_with_two_labels_has_the_sum_of_both_cotangents() -> None:
    x = pictures(3, 2)
    batch = batch_of(mlp("gelu", 6), x[[0, 0, 1, 2]], torch.tensor([1, 3, 0, 3]))
    roots = true_roots(batch, x)
    single = named(batch, roots)
    assert not single[0].accepted and single[1].accepted and single[2].accepted
    free = continuous(batch.chain, batch.mixture(0), roots[:1], batch.loss)[0]
    assert free.accepted and free.label is None
    z = rise(batch.chain, 0, batch.chain.stages[0].affine.forward(x.flatten(1)))
    found = batch_loss(batch, z, [free, *single[1:]])
    assert not isinstance(found, Unseparated)
    assert found.targets[0].tolist() == [0.0, 0.5, 0.0, 0.5, 0.0]
    assert found.copies.tolist() == [2.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "loss", [Loss(MSE), Loss(MSE, reduction="sum"), Loss(targets="probability")], ids=str
)
def test_continuous_targets_below_a_pair(loss: Loss) -> None:
    x = pictures(3, 4)
    t = torch.randn(3, 5, generator=torch.Generator().manual_seed(9), dtype=F64)
    t = t.softmax(1) if loss.targets == "probability" else t
    batch = batch_of(mlp("tanh", 6), x, t, loss)
    found = separate(batch)
    assert isinstance(found, Separated), found
    gaps = torch.cdist(found.features.value.flatten(1), x.flatten(1))
    assert float(gaps.amin(1).max()) < 1e-8
    assert torch.allclose(found.head.targets, t[gaps.argmin(1)], atol=1e-7)


# -- roots ----------------------------------------------------------------------------------------


def collected(batch: Batch, seed: int = 0) -> Collected:
    consistency = between(batch)
    return collect(
        consistency, lambda roots, _: named(batch, roots), lambda i, _: i.accepted, Starts(seed)
    )


@pytest.mark.parametrize("kind", ["distinct", "equal"])
@pytest.mark.parametrize("activation", list(KINDS))
def test_all_samples_are_collected_once(activation: str, kind: str) -> None:
    x = pictures(5, 7)
    y = torch.arange(5) if kind == "distinct" else torch.full((5,), 3)
    batch = batch_of(mlp(activation, 8), x, y)
    found = collected(batch)
    assert found.complete
    gaps = torch.cdist(found.roots @ batch.mixture(0).right.T, x.flatten(1))
    order = gaps.argmin(1)
    assert sorted(order.tolist()) == [0, 1, 2, 3, 4]
    assert float(gaps.amin(1).max()) < 1e-6
    assert [i.label for i in found.identities] == y[order].tolist()


def test_nothing_that_no_target_fits_is_collected() -> None:
    batch = batch_of(mlp("gelu", 8), pictures(3, 7), torch.tensor([0, 1, 1]))
    found = collect(between(batch), lambda roots, _: named(batch, roots), lambda *_: False)
    assert not found.complete and len(found.roots) == 0 and found.identities == []
    assert found.starts > 100


def test_a_found_sample_leaves_one_dimension_less() -> None:
    x = pictures(4, 7)
    batch = batch_of(mlp("gelu", 8), x, torch.tensor([0, 1, 1, 2]))
    roots, consistency = true_roots(batch, x), between(batch)
    duals = torch.stack([i.dual for i in named(batch, roots[:2])])
    left = restricted(consistency, duals)
    assert left.directions.shape == (4, 1)
    assert torch.allclose(left.rows(left.coordinates(roots[2:])), roots[2:], atol=1e-7)
    assert float((left.rows(left.coordinates(roots[:1])) - roots[:1]).norm()) > 0.1
    done = restricted(consistency, torch.stack([i.dual for i in named(batch, roots[:3])]))
    assert done.directions.shape == (4, 0)
    assert torch.allclose(done.origin, roots[3], atol=1e-6)


def test_the_classes_of_a_head_are_guessed_and_told_apart() -> None:
    x, y = pictures(4, 6), torch.tensor([1, 30, 30, 77])
    batch = batch_of(mlp("relu", 4, widths=(), classes=100), x, y)
    head = batch.mixture(0)
    pool, clear = likely(head)
    assert set(y.tolist()) <= set(pool[:clear].tolist())
    at = AtHead.of(head, 0.0, pool, clear, batch.precision).labelled(y)
    found = identify_classes(head, true_roots(batch, x), at)
    assert [i.label for i in found] == y.tolist()
    assert all(i.accepted and i.share == pytest.approx(4.0, rel=1e-6) for i in found)
    wrong = identify_classes(head, true_roots(batch, x), at.labelled(torch.tensor([2, 3, 4, 5])))
    assert not any(i.accepted for i in wrong)


# -- routes ---------------------------------------------------------------------------------------


def lower_convolution() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 20), nn.GELU(), nn.Linear(20, 5)
    ).double().eval()  # fmt: skip


@pytest.mark.parametrize(
    ("build", "stage", "words"),
    [
        (lambda: mlp("gelu", 0), "1", "must map into the row space of '3'"),
        (lambda: mlp("gelu", 0, bias=False), "3", "must map into the row space of '5'"),
        (lower_convolution, "3", "must map into the row space of '5'"),
        (lambda: mlp("gelu", 0, widths=(), classes=12), "1", "p − e_c must lie in the range"),
    ],
)
def test_the_lowest_stage_that_can(build: Callable[[], nn.Module], stage: str, words: str) -> None:
    torch.manual_seed(1)
    batch = batch_of(build(), pictures(3, 1), torch.tensor([0, 1, 3]))
    found = separate(batch)
    assert isinstance(found, Separated), found
    assert found.stage.name == stage and words in found.route
    assert mixed(batch)


def test_the_features_are_the_stages_input() -> None:
    torch.manual_seed(1)
    model, x = lower_convolution(), pictures(3, 1)
    found = separate(batch_of(model, x, torch.tensor([0, 1, 3])))
    assert isinstance(found, Separated)
    expected = model[:3](x).detach()
    gaps = torch.cdist(found.features.value, expected)
    assert float(gaps.amin(1).max()) < 1e-9
    spread = found.features.std.amax(1)
    true = (found.features.value - expected[gaps.argmin(1)]).abs().amax(1)
    assert bool((true < 30 * spread).all())


def test_copies_at_the_first_layer_are_one_row() -> None:
    x = pictures(3, 1)[[0, 1, 1, 2]]
    found = separate(batch_of(mlp("gelu", 0), x, torch.tensor([0, 1, 1, 3])))
    assert isinstance(found, Separated)
    assert len(found.features.value) == 3
    assert sorted(found.head.copies.tolist()) == [1.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("build", "loss", "size", "words"),
    [
        (lambda: mlp("gelu", 0, widths=()), Loss(), 6, "rank at most 4"),
        (lambda: mlp("gelu", 0, widths=()), Loss(targets="probability"), 2, "free to mix"),
        (lambda: mlp("gelu", 0, widths=()), Loss(MSE), 2, "free to mix"),
        (lambda: mlp("gelu", 0, widths=(), bias=False), Loss(), 2, "has no bias"),
        (lambda: mlp("gelu", 0, widths=(6, 6)), Loss(MSE), 4, "2 equations a sample for 3"),
    ],
)
def test_what_cannot_be_separated_is_said_and_no_contradiction(
    build: Callable[[], nn.Module], loss: Loss, size: int, words: str
) -> None:
    y: Tensor = torch.arange(size) % 5
    if loss.targets != "index":
        y = torch.randn(size, 5, generator=torch.Generator().manual_seed(0), dtype=F64).softmax(1)
    found = separate(batch_of(build(), pictures(size, 1), y, loss))
    assert isinstance(found, Unseparated)
    assert words in found.reason and found.consistent


def test_a_line_of_solutions_is_no_answer() -> None:
    """Where all samples share one pattern of a ReLU layer, every affine mixture is consistent."""
    model = mlp("relu", 5)
    with torch.no_grad():
        model[1].bias.fill_(5.0)
        model[3].bias.fill_(5.0)
    found = separate(batch_of(model, pictures(4, 5), torch.tensor([0, 0, 1, 3])))
    assert isinstance(found, Unseparated)


def test_one_sample_is_no_mixture() -> None:
    assert not mixed(batch_of(mlp("gelu", 0), pictures(1, 1), torch.tensor([2])))


def test_a_stated_size_that_the_weights_contradict() -> None:
    batch = batch_of(mlp("gelu", 0), pictures(3, 1), torch.tensor([0, 1, 3]))
    for size in (2, 4, 5, 7):
        assert isinstance(separate(replace(batch, size=size)), Unseparated), size
    doubled = separate(replace(batch, size=6))  # the mean of a batch sent twice is its own
    assert isinstance(doubled, Separated)
    assert doubled.head.copies.tolist() == [2.0, 2.0, 2.0]
    assert isinstance(separate(replace(batch, size=None)), Separated)


def test_watching() -> None:
    said: list[str] = []
    separate(batch_of(mlp("gelu", 0), pictures(3, 1), torch.tensor([0, 1, 3])), said.append)
    assert said and said[-1] == "separating samples: 3 of 3"


@pytest.mark.parametrize(
    ("outside", "after", "weight", "speaks"),
    [
        (0.2, 1e-1, 0.6, True),
        (9.0, 1e-1, 0.6, False),  # probabilities that are alike: nearly a root
        (1e10, 4e10, 0.6, False),  # every class fits as well: no sign of a sample
        (0.2, 1e-1, 1e-3, False),  # a saturated softmax has hardly any weight
        (1e13, 1.0, 0.6, False),
    ],
)
def test_only_a_sample_beyond_doubt_contradicts_a_batch_size(
    outside: float, after: float, weight: float, speaks: bool
) -> None:
    """``outside`` in standard errors of the range, 1e-16 or so of a cotangent."""
    batch = batch_of(mlp("gelu", 0), pictures(2, 1), torch.tensor([0, 3]))
    head, nothing = batch.mixture(2), torch.zeros(2, dtype=F64)
    kappa = head.left.sum(1)
    outside *= head.blurred(kappa)
    after = after * head.blurred(kappa) if after > 1.0 else after
    share = 2.0 / weight
    identity = Identity(kappa, nothing, share, outside, after, 1)
    found = Collected(nothing.new_zeros(0, 2), [], 1, 1.0, 0, (identity,))
    said = contradicted(batch, head, found)
    assert (said is not None) is speaks
    assert said is None or not said.consistent
    coarse = replace(batch, precision=Precision(torch.bfloat16))
    assert contradicted(coarse, head, found) is None  # its rounding explains any weight


@pytest.mark.parametrize(("classes", "speaks"), [(6, False), (7, True)])
def test_a_root_refutes_only_where_equations_outnumber_its_unknowns(
    classes: int, speaks: bool
) -> None:
    """C − 1 − r equations outside the range and one weight, for r unknowns: C > 2r."""
    batch = batch_of(mlp("gelu", 0, classes=classes), pictures(3, 1), torch.tensor([0, 1, 3]))
    assert refuting(batch, batch.mixture(2)) is speaks


@pytest.mark.parametrize(("more", "words"), [(0, "near the rounding"), (3, "hides the others")])
def test_what_rounding_hides_in_a_large_batch_is_not_searched_for(more: int, words: str) -> None:
    """Forty samples of one label, resolved to a few ε only: said at once, and no contradiction."""
    size = 40
    y = torch.zeros(size, dtype=torch.long)
    x = torch.rand(size, 48, generator=torch.Generator().manual_seed(1), dtype=F64)
    batch = batch_of(mlp("gelu", 0, widths=(64,), classes=60), x.reshape(size, 3, 4, 4), y)
    head = batch.mixture(1)
    batch = replace(batch, size=size + more, precision=Precision(torch.float32))
    assert head.rank == size and head.ratio < 5.0 * torch.finfo(torch.float32).eps
    found = separate_head(batch, head)
    assert isinstance(found, Unseparated) and found.consistent and words in found.reason


def test_a_head_of_rank_one_speaks_of_its_equations_and_not_of_unknowns() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 10)).eval()
    x = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    update = rgap.capture(model, x, torch.tensor([3, 7, 1, 3]))
    ones = {name: g.sign() for name, g in update.gradients.items()}
    ones["1.weight"] = torch.outer(ones["1.bias"], torch.ones(48))
    reason = rgap.invert(model, replace(update, gradients=ones)).reason
    assert "has rank one" in reason and "8 equations" in reason and "unknowns" not in reason


def test_a_head_of_more_rank_than_samples_is_not_said_to_tell_them_apart() -> None:
    batch = batch_of(mlp("gelu", 0), pictures(3, 1), torch.tensor([0, 1, 3]))
    said = separate_head(replace(batch, size=2), batch.mixture(2))
    assert isinstance(said, Unseparated) and said.consistent
    assert "has rank 3, more than the stated batch_size=2 sends" in said.reason
