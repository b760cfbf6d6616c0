"""What parse refuses: modes, shapes and models, each with what to write instead."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from written import Written

import rgap
from rgap.network.chain import parse

Lin = nn.Linear


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.BatchNorm1d(4), r"'1' \(BatchNorm1d\) is in train mode: it mixes the samples"),
        (nn.Dropout(0.5), r"'1' \(Dropout\) is in train mode: it draws random numbers"),
        (nn.AlphaDropout(0.2), "random numbers"),
        (nn.RReLU(), "random numbers"),
        (Written(lambda m, x: F.dropout(x)), "training=self.training"),
    ],
)
def test_train_mode_layers_are_errors(layer: nn.Module, words: str) -> None:
    model = nn.Sequential(Lin(4, 4), layer, Lin(4, 2))
    with pytest.raises(ValueError, match=words):
        parse(model, (4,))
    if not isinstance(layer, Written):
        assert parse(model.eval(), (4,)).complete


def test_train_mode_without_effect_is_fine() -> None:
    model = nn.Sequential(Lin(4, 4), nn.Dropout(0.0), nn.ReLU(), Lin(4, 2)).train()
    assert parse(model, (4,)).complete
    assert model.training


def pictures() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.Tanh(), nn.Flatten(), Lin(2 * 26 * 26, 4))


@pytest.mark.parametrize(
    ("make", "shape", "words"),
    [
        (pictures, (3, 32, 32), r"'3' \(linear\) expects \[B, 1352\].*\(3, 28, 28\) would fit"),
        (pictures, (1, 28, 28), r"expects \[B, 3, height, width\].*\(3, 28, 28\) would fit"),
        (pictures, (1, 3, 28, 28), r"without the batch dimension.*\(3, 28, 28\) would fit"),
        (pictures, (28, 28, 3), r"\(3, 28, 28\) would fit"),
        (lambda: nn.Sequential(Lin(784, 4)), (28, 28), r"input_shape=\(784,\) would fit"),
        (lambda: nn.Sequential(nn.Flatten(), Lin(784, 4)), (1, 32, 32), r"\(1, 28, 28\) would fit"),
        (lambda: nn.Sequential(nn.Conv1d(2, 3, 3)), (5, 20), r"\(2, 20\) would fit"),
        (lambda: nn.Sequential(nn.Conv2d(1, 1, 5)), (1, 4, 4), r"larger input_shape.*would fit"),
        (lambda: nn.Sequential(Lin(4, 4), nn.BatchNorm1d(3), Lin(4, 2)), (4,), "'1' .batch_norm1d"),
        (lambda: nn.Sequential(nn.ZeroPad2d(-2), nn.Conv2d(1, 1, 1)), (1, 4, 4), "to nothing"),
        (
            lambda: Written(
                lambda m, x: m.fc(m.stem(x).flatten(1) + 1), stem=nn.Conv2d(3, 1, 3), fc=Lin(16, 2)
            ),
            (1, 6, 6),
            r"'stem' \(conv2d\).*\(3, 6, 6\) would fit",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_errors_that_say_which_would(
    make: Callable[[], nn.Module], shape: tuple[int, ...], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        parse(make().eval(), shape)


@pytest.mark.parametrize(
    ("shape", "error"),
    [
        (784, TypeError), ("28", ValueError), ((), ValueError), ((3, 0, 4), ValueError),
        ((2.5,), ValueError), ((math.nan,), TypeError), ((math.inf,), TypeError), (None, TypeError),
    ],
)  # fmt: skip
def test_malformed_shapes_are_refused(shape: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"input_shape: expected whole numbers.*\(3, 32, 32\)"):
        parse(nn.Linear(4, 2), shape)


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        (F.relu, TypeError, "expected a torch.nn.Module, got function"),
        (nn.Sequential(nn.ReLU()), ValueError, "has no parameters"),
        (nn.Sequential(nn.LazyLinear(3)), ValueError, "'0.weight' of a lazy layer"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy")
def test_models_that_cannot_be_read_are_refused(
    model: object, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        parse(model, (4,))


class Texts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = nn.Embedding(20, 16), nn.Linear(16, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.last(self.table(tokens).mean(1))


def test_the_width_of_an_embedding_is_no_length_of_a_text() -> None:
    model = Texts()
    update = rgap.Update({n: torch.ones_like(p) for n, p in model.named_parameters()}, batch_size=1)
    with pytest.raises(ValueError, match=r"write input_shape=\(n,\) with the number n of tokens"):
        rgap.invert(model, update)
    with pytest.raises(ValueError, match=r"got Texts, which looks its inputs up") as told:
        rgap.analysis.symbolic(model, (6,))
    assert "argument #1" not in str(told.value)


@pytest.mark.parametrize("call", [rgap.labels.estimate, rgap.match])
def test_a_function_as_the_loss_has_no_label_identity(call: Callable[..., object]) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.rand(2, 4), torch.tensor([0, 2])
    update = rgap.capture(model, x, y, loss=lambda z, t: nn.functional.cross_entropy(z, t))
    with pytest.raises(ValueError, match=r"got the function '<lambda>'.* or state the labels"):
        call(model, update)
