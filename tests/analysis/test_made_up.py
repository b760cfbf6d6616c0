"""The share of a completed batch that no equation fixes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rgap
from rgap.recovery import Recovery

F64 = torch.float64


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
