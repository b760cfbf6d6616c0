"""A genuine update is never called contradictory, whatever it was sent in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rgap import Loss, Status, Update, capture, invert
from rgap.inversion.batch_rows import batch_of
from rgap.inversion.problem import prepare
from rgap.precision import Precision
from rgap.separation.identify import Identity
from rgap.separation.targets import loose
from rgap.update.preflight import ClientView
from rgap.update.quantisation import recognise


class Reversal(torch.autograd.Function):
    """Gradient reversal: the identity forwards, −λ backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: float) -> Tensor:
        """The identity."""
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Reversed."""
        return -ctx.weight * grads[0], None


class Halved(torch.autograd.Function):
    """The same written without a second argument, which tracing would take for the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """The identity."""
        return x * 1

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Reversed and halved."""
        return -0.5 * grads[0]


class Reversed(nn.Module):
    """One of the two as a module; the second by a name that it was bound to long before."""

    def __init__(self, *weight: float) -> None:
        super().__init__()
        self.weight, self.halved = weight, Halved.apply

    def forward(self, x: Tensor) -> Tensor:
        """One pass."""
        return Reversal.apply(x, *self.weight) if self.weight else self.halved(x)  # type: ignore


def sent(
    model: nn.Module, inputs: Tensor, targets: Tensor, loss: Loss | None = None, **fields: Any
) -> Update:
    return capture(model.eval(), inputs, targets, loss or Loss(), **fields)


@pytest.mark.parametrize("weight", [(0.3,), ()])
@pytest.mark.parametrize(("place", "batch"), [("first", 1), ("second", 2), ("convolution", 1)])
def test_a_gradient_reversal_is_named_and_what_lies_below_comes_back(
    weight: tuple[float, ...], batch: int, place: str
) -> None:
    torch.manual_seed(0)
    layer, data = Reversed(*weight), torch.rand(batch, 12)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 16), nn.Tanh())
    if place == "convolution":
        data = torch.rand(batch, 1, 6, 6)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), layer, nn.Flatten(), nn.Linear(64, 5))
    elif place == "first":
        model.insert(2, layer).append(nn.Linear(16, 5))
    else:
        model.append(nn.Linear(16, 5)).insert(4 if place == "second" else 5, layer)
    recovery = invert(model, sent(model, data, torch.arange(batch)))
    below = place != "convolution" and (batch == 1 or place != "first")
    assert ("inputs" in recovery.certified) is below
    due = {"first": "EXACT", "second": "UNDERDETERMINED", "convolution": "UNSUPPORTED"}
    assert recovery.status.name == due[place]
    assert "is a custom autograd function" in recovery.reason
    if batch == 1 and below:
        assert recovery.inputs is not None and recovery.error_bound is not None
        assert float((recovery.inputs - data).abs().max()) <= recovery.error_bound


def dense(
    batch: int, equal: bool, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(batch)
    model = nn.Sequential(
        nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 24), nn.Sigmoid(), nn.Linear(24, 8)
    ).to(dtype)
    targets = torch.randn(batch, 8, dtype=dtype)
    if equal:
        targets[1] = targets[0]
    return model, torch.rand(batch, 20, dtype=dtype), targets


def test_stated_real_valued_targets_are_those_of_the_batch_in_any_order() -> None:
    model, data, targets = dense(6, True)
    update = sent(model, data, targets, Loss("mse_loss"))
    recovery = invert(model, update, labels=targets)
    assert recovery.status is Status.EXACT, recovery.reason
    assert recovery.labels is not None and recovery.inputs is not None
    assert torch.allclose(recovery.labels.float(), targets, atol=1e-2)
    other = invert(model, update, labels=targets + 0.5 * torch.randn(6, 8))
    assert "labels" in other.reason and "contradict" in other.reason
    assert "targets" not in other.certified


def test_stated_targets_are_compared_at_the_precision_of_the_update() -> None:
    model, data, targets = dense(1, False)
    update = sent(model, data, targets, Loss("mse_loss", "sum"))
    coarse = {n: g.bfloat16().float() for n, g in update.gradients.items()}
    update = Update(
        coarse, loss=update.loss, batch_size=1, input_shape=(20,), value_range=(0.0, 1.0)
    )
    assert invert(model, update, labels=targets).exact
    wrong = invert(model, update, labels=targets + 1.0)
    assert wrong.status is Status.INCONSISTENT and "stated labels" in wrong.reason


def int8(gradient: Tensor) -> Tensor:
    step = gradient.abs().max() / 127
    return (gradient / step).round() * step


def test_integers_of_one_sign_do_not_hide_the_width_of_the_others() -> None:
    rng = torch.Generator().manual_seed(0)
    update = {
        "w": int8(torch.rand(20, 10, generator=rng)),
        "v": int8(torch.randn(20, 10, generator=rng)),
    }
    found = recognise(update)
    assert found is not None and found.kind == "8-bit integers"
    assert set(found.noise) == {"w", "v"}


@pytest.mark.parametrize("seed", range(3))
def test_no_rounding_leaves_more_beyond_a_rank_than_its_length(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(n, 3, generator=rng) for n in (10, 64))
    sent_as = {"w": int8(left * torch.tensor([1.0, 0.1, 0.01]) @ right.T)}
    found = recognise(sent_as)
    assert found is not None
    allowed = Precision(entries=found.noise).noise_length("w", sent_as["w"])
    rest = torch.linalg.svdvals(sent_as["w"])[3:].norm()
    assert 0.1 * allowed < float(rest) < allowed
    model = nn.Sequential(nn.Linear(20, 24), nn.Tanh(), nn.Linear(24, 10))
    more = sent(model, torch.rand(4, 20, generator=rng), torch.arange(4))
    refused = invert(model, more, batch_size=2)
    assert refused.status is Status.INCONSISTENT, refused.reason


def test_small_units_that_int8_hides_contradict_nothing() -> None:
    """A ReLU is on by less than the error of its output: its cotangent was taken for 0."""
    torch.manual_seed(23)
    layers: list[nn.Module] = []
    for channels, stride in ((3, 2), (12, 2), (12, 1)):
        layers += [nn.Conv2d(channels, 12, 5, stride, 2), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(192, 10))
    update = sent(model, torch.rand(2, 3, 16, 16), torch.randint(10, (2,)))
    coarse = {n: int8(g) for n, g in update.gradients.items()}
    update = Update(coarse, batch_size=2, input_shape=(3, 16, 16), value_range=(0.0, 1.0))
    recovery = invert(model, update)
    assert recovery.status is Status.UNDERDETERMINED


def test_a_head_whose_signs_drown_in_stated_noise_refutes_no_target() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 40, bias=False), nn.Tanh(), nn.Linear(40, 10, bias=False))
    loss = Loss("binary_cross_entropy_with_logits", "sum")
    update = sent(model, torch.rand(1, 16), torch.randint(2, (1, 10)).float(), loss)
    small = update.gradients["2.weight"].abs().amax(1).min()
    noisy = {n: g + small * torch.randn_like(g) for n, g in update.gradients.items()}
    update = Update(noisy, loss=loss, batch_size=1, input_shape=(16,), value_range=(0.0, 1.0))
    recovery = invert(model, update, noise=float(small))
    assert recovery.status is Status.UNDERDETERMINED, recovery.reason
    assert "2 batches fit within their errors" in recovery.reason


def test_a_cotangent_of_many_roots_contradicts_no_batch_size() -> None:
    """Where p is 0 or 1 all samples of a label share κ, and their mixtures weigh anything."""
    kappa = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
    one = Identity(kappa, kappa, 0.75, 1e-9, 1.0, 2)
    batch = batch_of(prepare_problem())
    assert loose(batch, [one, replace(one, share=0.6)])
    assert not loose(batch, [one, replace(one, share=0.7501)])
    other = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)
    assert not loose(batch, [one, replace(one, share=0.6, kappa=other)])


def prepare_problem() -> Any:
    model = nn.Linear(4, 3)
    update = sent(model, torch.rand(2, 4), torch.arange(2))
    return prepare(ClientView.of(model, update))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kink", [nn.ReLU, nn.LeakyReLU, nn.Hardtanh])
def test_outputs_that_are_exactly_at_a_kink_refute_nothing(
    kink: type[nn.Module], dtype: torch.dtype
) -> None:
    """Weights in halves under pictures of whole numbers: some z are 0, and x̂ is off by rounding."""
    told = []
    for seed in range(3):
        torch.manual_seed(seed)
        layers = nn.Conv2d(1, 3, 3, padding=1), kink(), nn.Flatten(), nn.Linear(75, 6)
        model = nn.Sequential(*layers).to(dtype)
        with torch.no_grad():
            for weight in model[0].parameters():
                weight.copy_(torch.randint(-2, 3, weight.shape) / 2)
        x = torch.randint(-2, 3, (1, 1, 5, 5)).to(dtype)
        recovery = invert(model, capture(model, x, torch.tensor([1]), value_range=None))
        assert recovery.status is not Status.INCONSISTENT, (seed, recovery.reason)
        told.append("lie within their error of a kink" in recovery.reason)
    assert any(told) or kink is nn.Hardtanh  # whose limits nothing tells from beyond them


@pytest.mark.parametrize(("outputs", "told"), [(3, True), (10, False)])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse_loss"])
def test_a_head_without_bias_that_takes_in_zeros_leaves_its_cotangent_to_the_layers_below(
    outputs: int, told: bool, loss: str
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 12), nn.Linear(12, 6), nn.Linear(6, outputs, bias=False))
    nn.init.zeros_(net[1].weight)
    nn.init.zeros_(net[1].bias)
    x, y = (
        torch.rand(1, 4),
        torch.tensor([1]) if loss == "cross_entropy" else torch.rand(1, outputs),
    )
    found = invert(net, capture(net, x, y, loss=loss))
    assert float((found.inputs - x).abs().max()) <= found.error_bound
    assert found.certified == ({"inputs", "targets"} if told else {"inputs"})
    if told:  # ten cotangents are not told apart by six numbers
        assert float((found.labels - y).abs().max()) <= (found.targets_error_bound or 0.0)


@pytest.mark.parametrize("loss", ["binary_cross_entropy_with_logits", "cross_entropy", "mse_loss"])
def test_samples_that_nearly_cancel_round_by_their_own_size(loss: str) -> None:
    torch.manual_seed(0)
    outputs = 2 if loss == "cross_entropy" else 1
    net = nn.Sequential(nn.Linear(9, 27), nn.Tanh(), nn.Linear(27, 27), nn.Tanh())
    net.append(nn.Linear(27, outputs)).eval()
    nn.init.zeros_(net[4].bias)
    with torch.no_grad():
        net[4].weight.mul_(1e-3)  # the model is sure of nothing: p = 1/2
    targets = torch.tensor([0, 1]) if outputs == 2 else torch.tensor([[0.0], [1.0]])
    found = invert(net, capture(net, torch.rand(1, 9).repeat(2, 1), targets, loss=loss))
    assert found.status is Status.UNDERDETERMINED, found.reason


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("off", [0, 1, 2])
def test_samples_that_switch_all_units_off_contradict_no_batch_size(
    off: int, reduction: str
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(9, 27), nn.Tanh(), nn.Linear(27, 24), nn.ReLU())
    net.extend([nn.Linear(24, 24), nn.Sigmoid(), nn.Linear(24, 3)]).eval()
    x = torch.rand(3, 9)
    with torch.no_grad():
        hidden = net[:2](x)
        if off:
            net[2].weight.add_(20 * torch.rand(24, 1) * (hidden[:1] - hidden[1:].mean(0)))
            net[2].bias.copy_(-0.1 - (hidden[3 - off :] @ net[2].weight.T).amax(0))
        assert int((net[:4](x) == 0).all(1).sum()) == off
    update = capture(net, x, torch.arange(3), loss=Loss(reduction=reduction), dtype=torch.float64)
    found = invert(net, update)
    assert found.status is (Status.UNDERDETERMINED if off else Status.EXACT), found.reason
    assert ("the others left nothing here" in found.reason) == bool(off)
    if not off:  # no ReLU hides what the head does not hold either
        assert invert(net, update, batch_size=4).status is Status.INCONSISTENT


@pytest.mark.parametrize("seed", [1, 2, 5, 9])
def test_two_layers_with_nothing_between_them_tell_no_samples_apart(seed: int) -> None:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(9, 18), nn.Linear(18, 18), nn.Tanh(), nn.Linear(18, 4)).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randint(-2, 3, p.shape) / 2)
    x, y = torch.rand(2, 9), torch.tensor([3, 1])
    update = capture(net, x, y)
    halved = {name: g.half() for name, g in update.gradients.items()}
    found = invert(net, replace(update, gradients=halved), labels=y)
    assert found.status is Status.EXACT, found.reason
    assert float((found.inputs - x).abs().max()) <= found.error_bound


@pytest.mark.parametrize("seed", [62, 86, 111])
def test_samples_on_lines_of_solutions_that_are_contradicted_refute_nothing(seed: int) -> None:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(2, 12), nn.ReLU(), nn.Linear(12, 12), nn.LeakyReLU(0.2))
    net.append(nn.Linear(12, 4)).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randint(-2, 3, p.shape) / 2)
    x, y = torch.tensor([[0.0, 1.0], [0.0, 0.0], [1.0, 1.0]]), torch.tensor([0, 3, 2])
    found = invert(net, capture(net, x, y, loss=Loss(reduction="sum")))
    assert found.status is Status.UNDERDETERMINED, found.reason
    lines = "lie on lines of such points" in found.reason
    assert lines or (seed != 62 and "another model" not in found.reason)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("apart", [1e-3, 1e-4])
def test_three_samples_on_a_line_weigh_what_two_do_and_refute_no_batch_size(
    apart: float, reduction: str
) -> None:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(6, 18), nn.Tanh(), nn.Linear(18, 18), nn.Sigmoid())
    net.append(nn.Linear(18, 6)).double().eval()
    x, d = torch.rand(2, 1, 6, dtype=torch.float64)
    x = torch.cat([x, x + apart * d, x - apart * d])
    update = capture(net, x.clamp(0, 1), torch.full((3,), 3), loss=Loss(reduction=reduction))
    found = invert(net, update)
    assert found.status is Status.UNDERDETERMINED, found.reason
    # Two that are apart by as much as others are do refute it.
    two = capture(net, torch.rand(2, 6).double(), torch.tensor([3, 3]), loss=Loss(reduction="mean"))
    assert invert(net, two, batch_size=3).status is Status.INCONSISTENT


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_targets_that_all_fit_one_unit_refute_no_batch_size(seed: int, reduction: str) -> None:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(9, 27), nn.ReLU(), nn.Linear(27, 6)).eval()
    x = torch.rand(3, 9)
    with torch.no_grad():
        x = x[net[0](x)[:, 4].argsort(descending=True)]
        z = net[0](x)
        net[0].bias.sub_(z.amax(0) + 3.0)
        net[0].bias[4] += z[:, 4].amax() - z[:, 4].median() + 3.1  # one unit, for two samples
        net[2].weight[:, 4] = torch.tensor([-0.25, -0.06, 0.5, -0.06, -0.06, -0.07])
    found = invert(net, capture(net, x, torch.tensor([2, 0, 5]), loss=Loss(reduction=reduction)))
    assert found.status is Status.UNDERDETERMINED, found.reason


@pytest.mark.parametrize("seed", [0, 10, 12, 28])
def test_two_turns_of_three_samples_of_one_label_fit_the_head(seed: int) -> None:
    """The layers below tell which of them is the batch; the one found first refutes nothing."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.LeakyReLU(0.1), nn.Conv2d(8, 16, 3, 2, 1))
    net.extend([nn.LeakyReLU(0.1), nn.Flatten(), nn.Linear(64, 4)]).eval()
    x = torch.rand(3, 1, 5, 5)
    found = invert(net, capture(net, x, torch.ones(3, dtype=torch.long), value_range=None))
    if seed == 28:  # a second batch fits that is not known well enough to be followed
        assert found.status is Status.UNDERDETERMINED, found.reason
        return
    assert found.status is Status.EXACT, found.reason
    assert found.inputs is not None
    assert found.error_bound is not None
    gaps = (found.inputs[:, None] - x[None]).abs().flatten(2).amax(2).amin(1)
    assert float(gaps.max()) <= found.error_bound
