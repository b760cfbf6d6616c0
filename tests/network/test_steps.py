"""Networks written by hand: steps before the first layer, and around a pooling, end to end."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import picture
from torch import Tensor, nn
from torch.nn import functional as F
from written import Written

from rgap import Recovery, Status, capture, invert

X = picture((2, 4, 4), 5)


def recovered(step: Callable[[Tensor], Tensor], *, bias: bool = True) -> Recovery:
    """The answer for ``fc(tanh(hidden(step(x))))``, whose update is truly of float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        model = Written(
            lambda m, x: m.fc(torch.tanh(m.hidden(step(x).flatten(1)))),
            hidden=nn.Linear(32, 40, bias=bias), fc=nn.Linear(40, 4, bias=bias),
        ).eval()  # fmt: skip
    return invert(model, capture(model, X, torch.tensor([2])))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "step",
    [
        torch.tanh, torch.sigmoid, F.relu, F.softplus, lambda x: F.leaky_relu(x - 0.5, 0.1),
        lambda x: F.elu(x - 0.5, 0.3), lambda x: torch.sigmoid((2 * x - 1).flip(-1)),
        lambda x: 1 - x,
    ],
    ids=["tanh", "sigmoid", "relu", "softplus", "leaky_relu", "elu", "three steps", "1 - x"],
)  # fmt: skip
def test_steps_of_the_data_are_undone(step: Callable[[Tensor], Tensor], bias: bool) -> None:
    """What a function makes of the data before any layer is inverted with the rest."""
    recovery = recovered(step, bias=bias)
    assert recovery.status is Status.EXACT, recovery.reason
    assert recovery.inputs is not None and recovery.error_bound is not None
    assert float((recovery.inputs - X).abs().max()) <= recovery.error_bound < 1e-2


@pytest.mark.parametrize("bias", [True, False])
def test_a_relu_of_the_data_says_how_many_values_it_cut(bias: bool) -> None:
    """The values that a ReLU sets to 0 are in no equation: counted, and nothing is returned."""
    recovery = recovered(lambda x: F.relu(x - 0.5), bias=bias)
    assert recovery.status is Status.UNDERDETERMINED and recovery.inputs is None
    assert f"sets {int((X <= 0.5).sum())} values of the data to 0" in recovery.reason


@pytest.mark.parametrize(
    ("pool", "status", "words"),
    [
        (F.max_pool2d, Status.UNSUPPORTED, "keeps the winner"),
        (F.avg_pool2d, Status.UNDERDETERMINED, "60 equations are missing"),
    ],
)
def test_an_activation_after_the_pooling(
    pool: Callable[[Tensor, int], Tensor], status: Status, words: str
) -> None:
    """relu(pool(conv(x))), as PyTorch's own example is written, stops at the pooling."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Written(
            lambda m, x: m.fc(F.relu(pool(m.conv(x), 2)).flatten(1)),
            conv=nn.Conv2d(1, 5, 3), fc=nn.Linear(20, 10),
        ).eval()  # fmt: skip
    recovery = invert(model, capture(model, picture((1, 6, 6), 1), torch.tensor([3])))
    assert recovery.status is status and words in recovery.reason


@pytest.mark.parametrize("activation", [nn.Softplus, nn.Tanh, nn.LeakyReLU])
def test_a_cotangent_that_nearly_cancels_is_not_taken_for_a_contradiction(
    activation: Callable[[], nn.Module],
) -> None:
    """W^T k rounds by its terms, not by what they cancel to: float32 updates keep the certificate.

    Softplus misfitted by up to 28 standard errors here as long as only the result's rounding
    was counted.
    """
    for seed in range(20):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers = [nn.Flatten(), nn.Linear(32, 16), activation(), nn.Linear(16, 16)]
            model = nn.Sequential(*layers, activation(), nn.Linear(16, 10)).eval()
        x = picture((2, 4, 4), seed)
        recovery = invert(model, capture(model, x, torch.tensor([seed % 10])))
        assert recovery.status is Status.EXACT, (seed, recovery.reason)
        assert recovery.inputs is not None and recovery.error_bound is not None
        assert float((recovery.inputs - x).abs().max()) <= recovery.error_bound


def test_rows_that_underflowed_are_no_contradiction() -> None:
    """Logits of a binary loss that are sure of themselves send rows of zeros: open, no more."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        layers = [nn.Flatten(), nn.Linear(32, 40, bias=False), nn.Tanh()]
        model = nn.Sequential(*layers, nn.Linear(40, 10, bias=False)).eval()
        nn.init.uniform_(model[3].weight, -100, 100)
        y = (model(X) > 0).float()
        y[0, 0] = 1 - y[0, 0]  # one wrong answer, so that something is sent
    update = capture(model, X, y, "binary_cross_entropy_with_logits")
    assert bool((update.gradients["3.weight"] == 0).all(1).any())
    recovery = invert(model, update)
    assert recovery.status is Status.UNDERDETERMINED and "underflowed to 0" in recovery.reason


def test_a_model_without_values_is_refused_by_name() -> None:
    """On the meta device there is nothing to solve with."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(32, 3))
    update = capture(model, X, torch.tensor([1]))
    with pytest.raises(ValueError, match=r"'1\.weight' is on the meta device"):
        invert(model.to("meta"), update)


class Casting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(32, 48), nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.fc1(x.to(torch.float32).flatten(1))))


def test_a_forward_with_a_precision_of_its_own_is_replayed_in_it() -> None:
    torch.manual_seed(0)
    model, x = Casting().eval(), torch.rand(1, 2, 4, 4)
    recovery = invert(model, capture(model, x, torch.tensor([1])))
    assert recovery.status is Status.EXACT, recovery.reason
    assert recovery.inputs is not None
    assert recovery.error_bound is not None
    assert float((recovery.inputs - x).abs().max()) <= recovery.error_bound < 0.01
