"""The share of a completed batch that no equation fixes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import rgap
from rgap.recovery import Recovery

F64 = torch.float64
REST = rgap.Status.COMPLETED, (), 0.0, None, None, ""


def few(seed: int = 0, batch: int = 2) -> tuple[nn.Module, Tensor, Tensor]:
    """Three units below a head: far fewer equations than pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = nn.AvgPool2d(2), nn.Flatten(), nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 3)
        model = nn.Sequential(*layers).double().eval()
        return model, torch.rand(batch, 1, 6, 6, dtype=F64), torch.arange(batch) % 3


def completed(seed: int = 0, batch: int = 2) -> tuple[nn.Module, Tensor, Recovery]:
    model, x, y = few(seed, batch)
    update = rgap.capture(model, x, y, dtype=F64)
    return model, x, rgap.invert(model, update, labels=y, complete=True, time_limit=20.0)


@pytest.mark.parametrize("seed", range(3))
def test_share_is_the_diagonal_of_the_null_space_of_a_dense_jacobian(seed: int) -> None:
    model, _, recovery = completed(seed)
    made = rgap.analysis.made_up(model, recovery)
    assert recovery.nearest is not None and recovery.nearest_labels is not None

    def sent(x: Tensor) -> Tensor:
        logits = model(x)
        loss = nn.functional.cross_entropy(logits, recovery.nearest_labels)
        parts = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        return torch.cat([p.flatten() for p in parts])

    jacobian = torch.autograd.functional.jacobian(sent, recovery.nearest).flatten(1)
    _, values, vh = torch.linalg.svd(jacobian, full_matrices=True)
    null = vh[int((values > 1e-9 * values[0]).sum()) :]
    expected = null.square().sum(0).reshape(recovery.nearest.shape)
    torch.testing.assert_close(made.share, expected, atol=1e-6, rtol=0.0)
    assert float(made.samples.mean()) == pytest.approx(len(null) / vh.shape[1])


@pytest.mark.parametrize("seed", range(3))
def test_errors_fall_apart(seed: int) -> None:
    """Means over blocks of four pixels are fixed; what a block looks like is not."""
    model, x, recovery = completed(seed)
    made = rgap.analysis.made_up(model, recovery)
    fixed, free = made.apart(x)
    whole = rgap.analysis.score(recovery, x)
    total = (fixed.square() + free.square()).sqrt()
    torch.testing.assert_close(-20.0 * total.log10(), whole.psnr, atol=1e-6, rtol=0.0)
    assert float(fixed.max()) < 1e-4 < 1e-2 < float(free.min())
    torch.testing.assert_close(made.share, torch.full_like(made.share, 0.75), atol=1e-6, rtol=0.0)
    back = made.apart(x.flip(0))
    torch.testing.assert_close(back[1].flip(0), free)
    assert "75.0%" in made.explain() and "row 1" in made.explain()
    assert len(made.plot().axes) == 5


def test_nothing_is_made_up_where_equations_decide() -> None:
    model = rgap.models.lenet(channels=4, input_shape=(1, 8, 8), seed=0)
    x, y = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([2])
    recovery = rgap.invert(model, rgap.capture(model, x, y))
    assert recovery.status is rgap.Status.EXACT
    made = rgap.analysis.made_up(model, recovery)
    assert float(made.share.max()) < 1e-9
    assert float(made.apart(x)[1].max()) < 1e-9


def test_a_batch_that_is_no_answer_says_so() -> None:
    model, x, y = few()
    far = rgap.match(model, rgap.capture(model, x, y), labels=y, method="ig", iterations=1)
    assert far.inputs is None
    assert (
        "does not answer the update (UNDERDETERMINED)"
        in rgap.analysis.made_up(model, far).explain()
    )


def test_copies_that_are_known_to_be_copies_are_one_picture() -> None:
    """Their share is that of one of them alone; the null space itself has their differences."""
    model, x, y = few(3, 1)
    single = rgap.analysis.made_up(model, Recovery(x, y, *REST))
    twice = x.repeat(3, 1, 1, 1), y.repeat(3)
    made = rgap.analysis.made_up(model, Recovery(*twice, *REST))
    assert made.found.joint_nullity == single.found.joint_nullity + 2 * x.numel()
    for row in range(3):
        torch.testing.assert_close(made.share[row], single.share[0], atol=1e-7, rtol=0.0)
    assert made.explain().splitlines()[:2] == [
        single.explain().splitlines()[0],
        "  rows 0, 1, 2 are copies of one picture, counted once",
    ]
    other = rgap.analysis.made_up(model, Recovery(twice[0], torch.arange(3), *REST))
    assert "copies" not in other.explain()


def test_an_update_says_which_model_and_loss() -> None:
    model, x, y = few(1)
    sums = rgap.Loss(reduction="sum")
    update = rgap.capture(model, x - 3.0, y, loss=sums, value_range=(-3.0, -2.0), dtype=F64)
    found = rgap.match(model, update, iterations=60)
    made = rgap.analysis.made_up(model, found, update=update)
    assert made.value_range == (-3.0, -2.0)
    assert float(made.plot().axes[0].images[0].get_array().max()) > 0.3
    other, _, _ = few(2)
    for wrong in ({"model": other, "update": update}, {"model": model, "update": replace(
        update, loss=rgap.Loss("focal_loss", reduction="sum", gamma=2.0)
    )}):  # fmt: skip
        with pytest.raises(ValueError, match="expected one of this model and update"):
            rgap.analysis.made_up(recovery=found, **wrong)  # type: ignore[arg-type]
    outside = rgap.analysis.made_up(model, found, loss=sums)
    drawn = [axes.images[0].get_array() for axes in outside.plot().axes[: len(x)]]
    assert max(map(float, (d.max() for d in drawn))) == 1.0, "stretched, not cut"


def test_frozen_parameters_and_factors_are_no_other_model() -> None:
    model, x, y = few(4)
    model[2].bias.requires_grad_(False)
    update = rgap.capture(model, x, y, dtype=F64)
    found = rgap.match(model, update, labels=y, time_limit=5.0)
    assert rgap.analysis.made_up(model, found, update=update).share.shape == x.shape
    mlp = rgap.models.mlp((12,), 4, "tanh", input_shape=(1, 3, 3), seed=0)
    sent = rgap.capture(mlp, x[:1, :, :3, :3].float(), torch.tensor([1]))
    half = replace(sent, gradients={n: 0.5 * g for n, g in sent.gradients.items()})
    recovery = rgap.invert(mlp, half)
    assert recovery.nearest is not None
    assert rgap.analysis.made_up(mlp, recovery, update=half).found.joint_nullity == 0
    with pytest.raises(TypeError, match=r"update: expected an rgap\.Update"):
        rgap.analysis.made_up(mlp, recovery, update="x")  # type: ignore[arg-type]
    other = rgap.models.mlp((12,), 4, "tanh", input_shape=(1, 3, 3), seed=1)
    with pytest.raises(ValueError, match="expected one of this model and update"):
        rgap.analysis.made_up(other, replace(recovery, residual=float("nan")), update=sent)


def test_bad_input() -> None:
    model, x, recovery = completed()
    for wrong in (x[:1], x * float("nan")):
        with pytest.raises(ValueError, match="as recovered, got"):
            rgap.analysis.made_up(model, recovery).apart(wrong)
    with pytest.raises(TypeError, match="expected a Recovery, got Tensor"):
        rgap.analysis.made_up(model, x)  # type: ignore[arg-type]
    y = torch.tensor([0, 1])
    empty = rgap.invert(model, rgap.capture(model, x, y), labels=y)
    if empty.nearest is None:
        with pytest.raises(ValueError, match="the recovery holds no batch"):
            rgap.analysis.made_up(model, empty)
