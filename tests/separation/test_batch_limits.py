"""Batches at the edge: what no equation tells apart, what contradicts itself, what is malformed.

An expected failure here is an answer that is promised and not yet given.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from batched import certified, distance, expanded
from cases import SHAPE, labels, mlp, pictures
from torch import Tensor, nn

import rgap
from rgap.recovery import Recovery, Status
from rgap.update.losses import Loss

F32, F64 = torch.float32, torch.float64
BCE, MSE = "binary_cross_entropy_with_logits", "mse_loss"
X, Y = pictures(4, 1), torch.tensor([3, 3, 0, 4])


def targets(rows: int = 4) -> Tensor:
    return torch.randn(rows, 5, generator=torch.Generator().manual_seed(4), dtype=F64)


def sent(
    model: nn.Module, x: Tensor, y: Tensor, loss: str | Loss = "cross_entropy", known: bool = True
) -> Recovery:
    update = rgap.capture(model, x, y, loss=loss)
    return rgap.invert(model, update if known else replace(update, batch_size=None))


def refuses(recovery: Recovery, reason: str) -> None:
    """Silence where it is due: nothing certified, nothing returned, and why."""
    assert recovery.status is Status.UNDERDETERMINED and not recovery.certified
    assert recovery.inputs is None and recovery.error_bound is None
    assert reason in recovery.reason


@pytest.fixture(scope="module", params=["gelu", "relu"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return mlp(request.param, 7)


# -- pictures that are merged ---------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_only_the_mean_of_two_pictures_that_send_one_cotangent(activation: str) -> None:
    """x ± δ with W δ = 0 send, to the last bit, what two copies of x send: not ``EXACT``."""
    model = mlp(activation, 7)
    blind = torch.linalg.svd(model[1].weight.detach()).Vh[32:].sum(0).reshape(1, *SHAPE)
    delta = 0.2 * blind / blind.abs().max()
    x = torch.cat([0.25 + 0.5 * X[:1] + delta, 0.25 + 0.5 * X[:1] - delta, X[1:2]])
    y = torch.tensor([1, 1, 3])
    assert float(x.min()) > 0 and float(x.max()) < 1
    one = rgap.capture(model, x, y).gradients
    other = rgap.capture(model, torch.cat([x[:2].mean(0, True).expand(2, *SHAPE), x[2:]]), y)
    assert all(torch.allclose(g, other.gradients[n], atol=1e-15) for n, g in one.items())
    recovery = rgap.invert(model, rgap.capture(model, x, y))
    assert recovery.status is Status.AMBIGUOUS and not recovery.certified
    assert recovery.multiplicities.tolist() == [2, 1]
    means = torch.stack([x[:2].mean(0), x[2]])
    assert float((recovery.inputs - means).abs().max()) <= recovery.error_bound < 1e-5


def test_like_pictures_of_an_unknown_number_are_no_single_sample() -> None:
    """Float32 cannot tell them apart; their mean is within 1e-6, none of them is."""
    model = mlp("silu", 1147, widths=(24, 40), dtype=F32, gain=0.36)
    x, y = pictures(6, 3, F32, apart=1.4e-3), torch.zeros(6, dtype=torch.long)
    refuses(sent(model, x, y, known=False), "several pictures with one target")


def test_weights_that_no_batch_size_explains() -> None:
    """B/m of six pictures nearly alike reads 6, 6, 54.4, 22.7, 5.07, 6; a stated size is enough."""
    model = mlp("gelu", 887, widths=(), classes=12, dtype=F32, gain=1.3)
    x, y = pictures(6, 887, F32, 10**-1.25), labels("random", 6, 12, 887)
    loss = Loss(label_smoothing=0.1)
    refuses(sent(model, x, y, loss, known=False), "no batch size explains")
    assert certified(sent(model, x, y, loss), x, y)


@pytest.mark.parametrize(("reduction", "known"), [("sum", True), ("sum", False), ("mean", False)])
def test_copies_do_not_turn_into_another_target(reduction: str, known: bool) -> None:
    """Twice z − t is once z − t' for another t': the targets are not in the update."""
    x, t = X[[0, 0, 1, 2]], targets()[[0, 0, 1, 2]]
    recovery = sent(mlp("gelu", 7), x, t, Loss(MSE, reduction=reduction), known)
    refuses(recovery, "cannot be told apart" if known else "state batch_size")


@pytest.mark.parametrize("loss", [Loss(MSE), Loss(targets="probability")])
def test_copies_under_dense_targets_are_no_contradiction(loss: Loss) -> None:
    x, t = X[[0, 0, 1, 2]], targets()[[0, 0, 1, 2]]
    recovery = sent(mlp("gelu", 7), x, t if loss.function == MSE else t.softmax(1), loss)
    refuses(recovery, "a target and how often it occurs cannot be told apart")


# -- honest updates that must not be called a contradiction ---------------------------------------


HONEST = {
    "two labels, size unknown": lambda: (
        mlp("gelu", 7), X[[0, 0, 1, 2]], torch.tensor([1, 3, 0, 3]), Loss(), False,
        Status.UNDERDETERMINED,
    ),
    "two and nine copies, size unknown": lambda: (
        mlp("gelu", 7), X[[0] * 2 + [1] * 9], torch.tensor([0] * 2 + [3] * 9), Loss(), False,
        Status.AMBIGUOUS,
    ),
    "head near its limit, size unknown": lambda: (
        mlp("relu", 3, widths=(), classes=10), pictures(5, 5), labels("random", 5, 10, 5), Loss(),
        False, Status.EXACT,
    ),
    "two labels where all cotangents are nearly parallel": lambda: (
        mlp("sigmoid", 7, widths=(24, 40), classes=3, gain=0.3),
        pictures(7, 7)[[0, 0, 2, 3, 4, 5, 6]], labels("random", 7, 3, 7), Loss(), True,
        Status.UNDERDETERMINED,
    ),
    "many labels": lambda: (
        mlp("gelu", 7, classes=3), X, torch.tensor([[1, 0, 1], [0, 0, 1], [1, 1, 1], [0, 0, 0]]),
        Loss(BCE), True, Status.EXACT,
    ),
    "one pattern": lambda: (
        always_on(), pictures(2, 5), labels("random", 2, 5, 5), Loss(), True, Status.EXACT,
    ),
}  # fmt: skip


def always_on(layers: tuple[int, ...] = (1,)) -> nn.Module:
    model = mlp("relu", 5)
    with torch.no_grad():
        for layer in layers:
            model[layer].bias.fill_(5.0)
    return model


@pytest.mark.parametrize("case", list(HONEST))
def test_an_honest_update_is_not_called_inconsistent(case: str) -> None:
    model, x, y, loss, known, due = HONEST[case]()
    recovery = sent(model, x, y, loss, known)
    assert recovery.status is due
    if due is not Status.UNDERDETERMINED:
        assert distance(recovery, x, y) <= recovery.error_bound < 1e-4


# -- one direction for two labels -----------------------------------------------------------------


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_one_logit(activation: str) -> None:
    model, y = mlp(activation, 7, classes=1), torch.tensor([0, 1, 1, 0])
    assert certified(sent(model, X, y, BCE), X, y)


def test_two_classes() -> None:
    model, y = mlp("relu", 7, classes=2), torch.tensor([0, 1, 1, 0])
    assert certified(sent(model, X, y), X, y)


# -- what the equations do not reach --------------------------------------------------------------


@pytest.mark.parametrize("size", [5, 6, 8])
@pytest.mark.parametrize("known", [True, False])
def test_a_bare_head_separates_fewer_samples_than_classes(size: int, known: bool) -> None:
    model, x = mlp("relu", 3, widths=()), pictures(size, size)
    recovery = sent(model, x, labels("random", size, 5, size), known=known)
    assert recovery.status is Status.UNDERDETERMINED and recovery.inputs is None
    assert "5 classes" in recovery.reason


@pytest.mark.parametrize("kind", ["equal", "random"])
@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_a_bare_head_with_classes_to_spare(size: int, kind: str) -> None:
    model, x = mlp("relu", 3, widths=(), classes=20), pictures(size, size + 1)
    y = labels(kind, size, 20, size + 1)
    assert certified(sent(model, x, y), x, y)


def test_the_bound_holds_for_the_best_conditioned_batches() -> None:
    """Two samples of different classes at a head of twenty: errors of 1e-14 at most."""
    for seed in (0, 54, 78, 102, 108, 114, 126):
        model = mlp("relu" if seed % 4 < 2 else "gelu", seed, widths=(), classes=20)
        x, y = pictures(2, seed), labels("random", 2, 20, seed)
        assert certified(sent(model, x, y), x, y)


def test_a_batch_as_large_as_the_layer() -> None:
    x, y = pictures(8, 3), labels("random", 8, 5, 3)
    recovery = sent(mlp("gelu", 7, widths=(6, 6)), x, y)
    assert recovery.status is Status.UNDERDETERMINED and recovery.inputs is None
    assert "'3' with 6 inputs gives 0 equations a sample" in recovery.reason


def test_no_bias_in_the_first_layer() -> None:
    """The pair above it separates; ReLU passes the recursion down to the data, GELU does not."""
    y = torch.tensor([3, 3, 0, 4])
    assert certified(sent(mlp("relu", 7, bias=False), X, y), X, y)
    recovery = sent(mlp("gelu", 7, bias=False), X, y)
    assert recovery.status is Status.UNSUPPORTED and recovery.inputs is None
    assert recovery.layer("3").route == "separation"
    assert recovery.reason.startswith("'1' has no bias: nothing fixes the scale")
    assert "separated above: '2' (gelu) has no element-wise inverse" in recovery.reason


@pytest.mark.parametrize("layers", [(1,), (1, 3)])
def test_samples_of_one_pattern_are_named(layers: tuple[int, ...]) -> None:
    recovery = sent(always_on(layers), pictures(4, 5), labels("random", 4, 5, 5))
    assert recovery.status is Status.UNDERDETERMINED
    assert "4 of 4 points that satisfy the equations lie on lines" in recovery.reason
    assert "share a whole pattern of active units of '2' (relu)" in recovery.reason


@pytest.mark.parametrize(("factor", "seed"), [(1e-3, 0), (1e-3, 1), (1e-5, 2), (1e-5, 3)])
def test_two_samples_of_one_pattern_are_named(factor: float, seed: int) -> None:
    """Every mixture of x and (1 + factor) x is consistent; the middle would occur twice."""
    model, x = mlp("relu", seed), 0.9 * pictures(4, seed)
    x[1] = (1.0 + factor) * x[0]
    recovery = sent(model, x, torch.tensor([1, 1, 2, 3]))
    assert recovery.status is Status.UNDERDETERMINED and recovery.inputs is None
    assert "share a whole pattern of active units of '4' (relu)" in recovery.reason


def test_one_shared_pattern_is_never_a_mixture() -> None:
    for layers in ((1,), (1, 3)):
        for size in (2, 3, 4):
            x, y = pictures(size, 5), labels("random", size, 5, 5)
            recovery = sent(always_on(layers), x, y)
            if size < 4:
                assert certified(recovery, x, y)
            else:
                refuses(recovery, "samples that share a whole pattern")


# -- what contradicts itself ----------------------------------------------------------------------


@pytest.mark.cases(12)
@pytest.mark.parametrize("size", [1, 2, 3, 5, 6, 7])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_wrong_batch_size_is_never_exact(model: nn.Module, size: int, reduction: str) -> None:
    update = rgap.capture(model, X, Y, loss=Loss(reduction=reduction))
    recovery = rgap.invert(model, update, batch_size=size)
    assert not recovery.exact and recovery.inputs is None and recovery.multiplicities is None


@pytest.mark.parametrize("size", [2, 3])
def test_a_batch_below_the_rank_is_a_contradiction(model: nn.Module, size: int) -> None:
    recovery = rgap.invert(model, rgap.capture(model, X, Y), batch_size=size)
    assert recovery.status is Status.INCONSISTENT and "4" in recovery.reason


@pytest.mark.parametrize("times", [2, 3])
def test_a_mean_batch_stated_as_its_own_multiple(model: nn.Module, times: int) -> None:
    """Every picture twice has the same mean: as true an answer as the batch itself."""
    update = rgap.capture(model, X, Y)
    recovery = rgap.invert(model, update, batch_size=4 * times)
    assert recovery.multiplicities.tolist() == [times] * 4
    again = rgap.capture(model, *expanded(recovery))
    for name, gradient in update.gradients.items():
        assert torch.allclose(again.gradients[name], gradient, atol=1e-12), name
    summed = replace(update, loss=Loss(reduction="sum"), gradients={
        n: 4 * g for n, g in update.gradients.items()
    })  # fmt: skip
    assert rgap.invert(model, summed, batch_size=4 * times).status is Status.INCONSISTENT


def test_another_model_or_loss_is_never_exact(model: nn.Module) -> None:
    update = rgap.capture(model, X, Y)
    assert rgap.invert(mlp("gelu", 8), update).inputs is None
    recovery = rgap.invert(model, replace(update, loss=Loss(label_smoothing=0.1)))
    assert recovery.status is Status.INCONSISTENT and recovery.certified == {"inputs"}
    assert off(recovery) <= recovery.error_bound


@pytest.mark.cases(12)
@pytest.mark.parametrize("factor", [0.25, 3.7, 1e-3])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("seed", range(5, 12))
def test_another_reduction_is_a_factor(seed: int, activation: str, factor: float) -> None:
    """Known as far as the samples tell it: an error of the update, which the certificate counts."""
    made = mlp(activation, seed)
    update = rgap.capture(made, X, Y)
    if factor == 1 / len(X):
        recovery = rgap.invert(made, replace(update, loss=Loss(reduction="sum")))
    else:
        sent = {n: factor * g for n, g in update.gradients.items()}
        recovery = rgap.invert(made, replace(update, gradients=sent))
    assert certified(recovery, X, Y), recovery.reason
    assert recovery.scale == pytest.approx(factor, rel=1e-6)


@pytest.mark.cases(5)
@pytest.mark.parametrize("name", ["1.bias", "3.weight", "3.bias", "5.weight", "5.bias"])
def test_a_tampered_gradient_is_a_contradiction(model: nn.Module, name: str) -> None:
    update = rgap.capture(model, X, Y)
    gradients = dict(update.gradients)
    gradients[name] = gradients[name] * 1.01
    recovery = rgap.invert(model, replace(update, gradients=gradients))
    if name == "1.bias":  # the layer that separates: no start of its search reaches a sample
        refuses(recovery, "0 of the 4 samples of '1' found")
        return
    assert recovery.status is Status.INCONSISTENT
    # Two layers give the inputs without the head and its loss; then they are the client's.
    assert recovery.certified == ({"inputs"} if name[0] == "5" else set())
    assert recovery.inputs is None or off(recovery) <= recovery.error_bound


def off(recovery: rgap.Recovery) -> float:
    """Largest error of any picture that is returned, beside the nearest one of the batch."""
    apart = (recovery.inputs[:, None] - X.to(recovery.inputs)).flatten(2).abs().amax(-1).amin(1)
    return float(apart.max())


@pytest.mark.parametrize("last", [5, 9, -1])
def test_stated_labels_out_of_range(model: nn.Module, last: int) -> None:
    update = rgap.capture(model, X, torch.tensor([3, 1, 0, 2]))
    with pytest.raises(ValueError, match="labels"):
        rgap.invert(model, update, labels=torch.tensor([3, 1, 0, last]))


def test_malformed_batches(model: nn.Module) -> None:
    update = rgap.capture(model, X, Y)
    with pytest.raises(ValueError, match="one target per sample"):
        rgap.invert(model, update, labels=Y[:3])
    for size in (0, -2):
        with pytest.raises(ValueError, match="batch_size"):
            rgap.invert(model, update, batch_size=size)
    with pytest.raises(ValueError, match="C >= 2"):
        rgap.capture(mlp("gelu", 7, classes=1), X, torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="class indices 0 to 4"):
        rgap.capture(model, X, torch.tensor([0, 1, 2, 5]))


@pytest.mark.parametrize("others", [0, 1])
def test_samples_that_send_nothing_to_a_layer_refute_no_batch_size(others):
    """One sample is zero and one in the kernel of W: the same logits, and nothing in G of one."""
    for seed in (0,):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(6, 5)).double()
        x = torch.rand(2 + others, 6, dtype=torch.float64)
        x[0], x[1] = 0.0, torch.linalg.svd(net[0].weight.detach())[2][5]
        labels = torch.tensor([4, 0, seed])[: len(x)]
        for loss in (rgap.Loss(), rgap.Loss(reduction="sum"), rgap.Loss(label_smoothing=0.1)):
            update = rgap.capture(net, x, labels, loss, value_range=None)
            found = rgap.invert(net, update)
            assert found.status is not Status.INCONSISTENT, (seed, loss, found.reason)
            assert not found.certified
