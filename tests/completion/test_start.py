"""A batch that a completion begins with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rgap
from rgap.completion.complete import beginning
from rgap.constraints.known_input import Whole
from rgap.jacobian.module_update import KnownFeatures, ModuleUpdate
from rgap.recovery import Recovery

F64 = torch.float64


def client(seed: int = 0) -> nn.Module:
    """Few units above a convolution: its input is open, and what is above it is known."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = nn.Conv2d(1, 4, 3, 2), nn.Sigmoid(), nn.Flatten(), nn.Linear(36, 6)
        return nn.Sequential(*layers).double().eval()


def sent(batch: int = 3) -> tuple[nn.Module, Tensor, Tensor, rgap.Update]:
    model, draw = client(), torch.Generator().manual_seed(1)
    x, y = torch.rand(batch, 1, 8, 8, generator=draw, dtype=F64), torch.tensor([4, 1, 1, 0, 2])
    y = y[:batch]
    return model, x, y, rgap.capture(model, x, y, dtype=F64)


def completed(start: Tensor | Recovery | None, batch: int = 3, **more: object) -> Recovery:
    model, _, y, update = sent(batch)
    return rgap.invert(model, update, labels=y, complete=True, start=start, time_limit=30.0, **more)  # type: ignore[arg-type]


def error(found: Recovery, x: Tensor) -> float:
    return float(-rgap.analysis.score(found, x).psnr.min())


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1, 2, 0], [2, 2, 0, 1]])
def test_rows_of_a_start_are_paired_with_what_is_known(order: list[int]) -> None:
    """Copies in the start are left over."""
    model, x, _, update = sent()
    features = model[1](model[0](x)).detach()
    known = KnownFeatures("2", tuple(features.shape), Whole(features), torch.zeros_like(features))
    equations = ModuleUpdate(model, update.gradients, known, tuple(x.shape))
    near = x + 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=F64)
    assert torch.equal(beginning(equations, near[order]), near)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_a_completion_begins_with_it(order: list[int]) -> None:
    _, x, _, _ = sent()
    found = completed(x[order])
    assert found.status is rgap.Status.COMPLETED and found.inputs is not None
    assert not torch.equal(found.inputs, completed(None).inputs)  # type: ignore[arg-type]


def test_a_start_does_not_change_what_equations_decide() -> None:
    model = rgap.models.lenet(channels=4, input_shape=(1, 8, 8), seed=0)
    x, y = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([2])
    update = rgap.capture(model, x, y)
    found = rgap.invert(model, update, complete=True, start=torch.rand(1, 1, 8, 8))
    assert found.status is rgap.Status.EXACT
    assert torch.equal(found.inputs, rgap.invert(model, update).inputs)  # type: ignore[arg-type]


def test_an_answer_is_an_answer_still() -> None:
    """The client's batch, in any order, and what a completion gave."""
    _, x, y, _ = sent()
    first = completed(None)
    assert first.status is rgap.Status.COMPLETED
    for start in (x, x[[1, 2, 0]], x.float().double(), first):
        again = completed(start)
        assert again.status is rgap.Status.COMPLETED, again.reason
        assert again.labels is not None and again.labels.tolist() == y.tolist()


def test_nothing_worse_than_the_start_comes_back() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        layers = nn.Conv2d(1, 2, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
        model = nn.Sequential(*layers, nn.Linear(32, 12), nn.ReLU(), nn.Linear(12, 4))
        model, x = model.eval().double(), torch.rand(1, 1, 8, 8, dtype=F64)
    update = rgap.capture(model, x, torch.tensor([0]), dtype=F64)
    found = rgap.invert(model, update, complete=True, start=x, time_limit=6.0)
    assert found.inputs is not None and torch.equal(found.inputs, x)
    assert "the start is nearer than any step" in found.reason


def test_of_a_batch_of_unknown_size_any_start_is_taken() -> None:
    model, x, _, update = sent()
    unknown = rgap.Update(update.gradients, loss="cross_entropy", input_shape=(1, 8, 8))
    found = rgap.invert(model, unknown, complete=True, start=x, time_limit=10.0)
    assert found.status in (rgap.Status.COMPLETED, rgap.Status.UNDERDETERMINED)


def test_a_recovery_is_a_start() -> None:
    _, x, _, _ = sent()
    first = completed(None)
    again = completed(first)
    assert again.status is first.status
    assert error(again, x) <= error(first, x) + 1.0


def test_where_the_whole_update_is_matched_it_begins_there_too() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.GELU(), nn.Linear(12, 3)).eval()
    x, y = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(4) % 3
    update = rgap.capture(model, x, y)
    found = rgap.invert(
        model, update, labels=y, complete=True, start=x[y.argsort(stable=True)], time_limit=10.0
    )
    assert found.nearest is not None


def test_bad_starts() -> None:
    _, x, _, _ = sent()
    with pytest.raises(ValueError, match="start has NaN or infinity in 192 of 192"):
        completed(x * float("nan"))
    for wrong in (x[:2], x[..., :7]):
        with pytest.raises(ValueError, match="start: expected a batch of 3"):
            completed(wrong)
    with pytest.raises(TypeError, match="start: expected a tensor or a Recovery"):
        completed([0.0])  # type: ignore[arg-type]
    model, _, y, update = sent()
    with pytest.raises(ValueError, match="write complete=True as well"):
        rgap.invert(model, update, labels=y, start=x)
