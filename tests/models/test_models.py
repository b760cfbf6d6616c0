"""The reference networks: the shapes that the papers state, and weights that a seed reproduces."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import rgap
from rgap import models
from rgap.models.build import Plan, Residual

EVERY = pytest.mark.parametrize("name", sorted(models.BUILTIN))


def convolutions(model: nn.Module) -> list[tuple[int, ...]]:
    return [
        (m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0], int(m.padding[0]))
        for m in model.modules()
        if isinstance(m, nn.Conv2d)
    ]


def linears(model: nn.Module) -> list[tuple[int, int]]:
    return [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)]


def activations(model: nn.Module) -> list[nn.Module]:
    layers = (nn.Conv2d, nn.Linear, nn.Flatten, nn.MaxPool2d)
    return [m for m in model.children() if not isinstance(m, layers)]


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_lenet_is_the_one_of_dlg() -> None:
    model = models.lenet(classes=100, seed=0)
    assert convolutions(model) == [(3, 12, 5, 2, 2), (12, 12, 5, 2, 2), (12, 12, 5, 1, 2)]
    assert linears(model) == [(768, 100)]
    assert [type(m) for m in activations(model)] == [nn.Sigmoid] * 3
    assert parameters(model) == (900 + 12) + 2 * (3600 + 12) + 76800 + 100
    assert convolutions(models.lenet(channels=16))[1:] == [(16, 16, 5, 2, 2), (16, 16, 5, 1, 2)]


@pytest.mark.parametrize(("make", "middle"), [(models.cnn6, 36), (models.cnn6d, 20)])
def test_cnn6_is_the_one_of_r_gap(make: Callable[..., nn.Module], middle: int) -> None:
    model = make(seed=0)
    assert convolutions(model) == [
        (3, 12, 4, 2, 2),
        (12, middle, 3, 2, 1),
        (middle, 36, 3, 1, 1),
        (36, 36, 3, 1, 1),
        (36, 64, 3, 2, 1),
        (64, 128, 3, 1, 1),
    ]
    assert linears(model) == [(3200, 1)]
    assert not [n for n, _ in model.named_parameters() if n.endswith("bias")]
    slopes = [m.negative_slope for m in activations(model) if isinstance(m, nn.LeakyReLU)]
    assert slopes == [0.2] * 6 == [0.2] * len(activations(model))


def test_fcn3_is_the_one_of_r_gap() -> None:
    model = models.fcn3(seed=0)
    assert linears(model) == [(784, 1000), (1000, 100), (100, 1)]
    assert parameters(model) == 784 * 1000 + 1000 * 100 + 100
    assert [m.negative_slope for m in activations(model) if isinstance(m, nn.LeakyReLU)] == [
        0.2
    ] * 2
    assert linears(models.fcn3(input_shape=(3, 32, 32)))[0] == (3072, 1000)


def test_mlp_flattens_first_and_has_biases() -> None:
    model = models.mlp([64, 32], 7, "gelu", input_shape=(2, 5, 5), seed=0)
    assert isinstance(model[0], nn.Flatten)
    assert linears(model) == [(50, 64), (64, 32), (32, 7)]
    assert all(m.bias is not None for m in model if isinstance(m, nn.Linear))
    assert linears(models.mlp((), 3)) == [(3072, 3)]
    assert len(linears(models.mlp())) == 4


def test_networks_the_recursion_cannot_pass_have_what_stops_it() -> None:
    lenet5, vgg, resnet = models.lenet5(), models.vgg(), models.resnet()
    assert linears(lenet5) == [(400, 120), (120, 84), (84, 10)]
    assert sum(isinstance(m, nn.MaxPool2d) for m in lenet5.modules()) == 2
    assert {type(m) for m in activations(lenet5)} == {nn.ReLU}
    assert linears(vgg) == [(1024, 256), (256, 10)] and len(convolutions(vgg)) == 6
    assert sum(isinstance(m, Residual) for m in resnet.modules()) == 3


def test_residual_block_adds_its_input() -> None:
    block = models.resnet(seed=0).block1
    assert isinstance(block, Residual) and isinstance(block.shortcut, nn.Identity)
    x = torch.rand(2, 16, 6, 6, generator=torch.Generator().manual_seed(1))
    for parameter in (block.norm2.weight, block.norm2.bias):
        nn.init.zeros_(parameter)  # the branch is then zero, and only the skip connection is left
    torch.testing.assert_close(block(x), x)
    narrowing = models.resnet(seed=0).block2
    assert tuple(narrowing(x).shape) == (2, 32, 3, 3)


@EVERY
def test_every_network_runs_in_eval_mode_on_its_own_shape(name: str) -> None:
    model = models.BUILTIN[name](seed=0)
    assert not any(m.training for m in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in model.parameters())
    shape = models.INPUT_SHAPES[name]
    assert shape == ((1, 28, 28) if name == "fcn3" else (3, 32, 32))
    logits = model(torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)))
    one = name in ("cnn6", "cnn6d", "fcn3")
    assert tuple(logits.shape) == (2, 1 if one else 10)
    assert models.LOSSES[name] == ("binary_cross_entropy_with_logits" if one else "cross_entropy")
    assert not torch.equal(logits[0], logits[1])  # the input reaches the output


@EVERY
def test_its_update_can_be_captured_with_its_loss(name: str) -> None:
    model = models.BUILTIN[name](seed=0)
    inputs = torch.rand(1, *models.INPUT_SHAPES[name], generator=torch.Generator().manual_seed(0))
    update = rgap.capture(model, inputs, torch.tensor([1]), loss=models.LOSSES[name])
    assert list(update.gradients) == [n for n, _ in model.named_parameters()]
    assert all(float(g.abs().max()) > 0 for g in update.gradients.values())


@EVERY
def test_other_input_shapes_reach_every_layer(name: str) -> None:
    shape = (2, 24, 36)
    logits = models.BUILTIN[name](input_shape=shape)(torch.zeros(3, *shape))
    assert logits.shape[0] == 3 and logits.ndim == 2


@EVERY
@pytest.mark.parametrize("weights", ["default", "uniform"])
def test_a_seed_decides_the_weights_and_nothing_else(name: str, weights: str) -> None:
    make = models.BUILTIN[name]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = make(seed=5, weights=weights).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(17)
    again, other = (make(seed=s, weights=weights).state_dict() for s in (5, 6))
    assert all(torch.equal(first[k], again[k]) for k in first)
    weight = next(k for k in first if k.endswith("weight"))
    assert not torch.equal(first[weight], other[weight])


def test_a_seed_outlives_a_global_dtype() -> None:
    wanted = models.lenet(activation=nn.PReLU, seed=1).state_dict()
    torch.set_default_dtype(torch.float64)
    try:
        got = models.lenet(activation=nn.PReLU, seed=1).state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(got[k], wanted[k]) and got[k].dtype == torch.float32 for k in wanted)


def test_the_state_comes_back_when_building_fails() -> None:
    def activation() -> nn.Module:
        torch.rand(5)
        raise RuntimeError("no activation today")

    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="no activation today"):
        models.lenet(activation=activation, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_seed_weights_are_torchs_own() -> None:
    torch.manual_seed(11)
    model = models.mlp((8,), 4, input_shape=(6,))
    torch.manual_seed(11)
    first, head = nn.Linear(6, 8), nn.Linear(8, 4)
    assert torch.equal(model.fc1.weight, first.weight) and torch.equal(model.fc1.bias, first.bias)
    assert torch.equal(model.head.weight, head.weight)
    assert not torch.equal(models.mlp((8,), 4, input_shape=(6,)).fc1.weight, first.weight)


def test_uniform_weights_fill_their_interval() -> None:
    for make in (models.lenet, models.resnet):
        model = make(seed=0, weights="uniform")
        assert all(bool((p.abs() <= 0.5).all()) for p in model.parameters())
        flat = torch.cat([p.detach().flatten() for p in model.parameters()])
        assert float(flat.min()) < -0.49 and float(flat.max()) > 0.49
        assert abs(float(flat.std()) - 12**-0.5) < 0.01
        biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
        assert biases and all(float(b.detach().std()) > 0.1 for b in biases)


def test_uniform_weights_leave_a_slope_alone() -> None:
    model = models.lenet(activation="prelu", seed=0, weights="uniform")
    assert [m.weight.item() for m in activations(model) if isinstance(m, nn.PReLU)] == [0.25] * 3


@pytest.mark.parametrize("name", sorted(models.ACTIVATIONS))
def test_activations_by_name(name: str) -> None:
    made = models.lenet(activation=name, seed=0).act1
    function: Any = {"identity": lambda x: x}.get(name) or getattr(nn.functional, name)
    options = {"leaky_relu": {"negative_slope": 0.2}, "prelu": {"weight": torch.tensor([0.25])}}
    x = torch.linspace(-3, 3, 25)
    torch.testing.assert_close(made(x), function(x, **options.get(name, {})))


def test_activations_are_separate_modules() -> None:
    model = models.lenet(activation=lambda: nn.ELU(0.5), seed=0)
    assert model.act1 is not model.act2 and model.act1.alpha == 0.5


@pytest.mark.parametrize(
    ("activation", "kind", "words"),
    [
        ("sigmoud", ValueError, "got 'sigmoud'; write 'sigmoid'"),
        ("LeakyReLU", ValueError, "got 'LeakyReLU'; write 'leaky_relu'"),
        ("?", ValueError, "torch.nn.Sigmoid"),
        (nn.ELU(0.5), TypeError, r"write lambda: torch.nn.ELU\(alpha=0.5\)"),
        (nn.functional.relu, TypeError, "without arguments failed"),
        (lambda: 3, TypeError, "returned int"),
        (7, TypeError, "got 7"),
    ],
)
def test_a_wrong_activation_is_named(activation: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=f"^activation: .*{words}"):
        models.lenet(activation=activation)


@EVERY
def test_wrong_weights_and_seeds_are_named(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"^weights: expected 'default' or 'uniform', got 'normal'"
    ):
        models.BUILTIN[name](weights="normal")
    with pytest.raises(TypeError, match=r"^seed: expected a whole number or None, got 0\.5"):
        models.BUILTIN[name](seed=0.5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: models.lenet5(input_shape=(3, 8, 8)), "too small .* max-pool|too small"),
        (lambda: models.vgg(input_shape=(3, 4, 4)), "max-pool of 2×2 finds only 1×1"),
        (lambda: models.lenet(input_shape=(784,)), r"expected \[C, H, W\]"),
        (lambda: models.lenet(classes=0), "classes: expected at least 1"),
        (lambda: models.lenet(channels=0), "channels: expected at least 1"),
        (lambda: models.mlp((16, 0)), "widths: expected at least 1"),
        (lambda: models.mlp(input_shape=(3, 0)), "input_shape: expected at least 1"),
        (lambda: models.resnet(channels=()), "channels: expected one number per block"),
    ],
)
def test_impossible_shapes_are_named(make: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_a_shape_must_be_a_sequence() -> None:
    with pytest.raises(TypeError, match="input_shape: expected the shape of one sample"):
        models.lenet(input_shape=32)  # type: ignore[arg-type]


def test_every_factory_takes_the_same_keywords() -> None:
    for name, make in (models.BUILTIN | models.IMAGENET).items():
        signature = inspect.signature(make).parameters
        for keyword in ("input_shape", "seed", "weights"):
            assert signature[keyword].kind is inspect.Parameter.KEYWORD_ONLY, (name, keyword)
        assert make is getattr(models, name) and name in models.__all__
    named = models.BUILTIN.keys() | models.IMAGENET.keys()
    assert models.INPUT_SHAPES.keys() == models.LOSSES.keys() == named


def test_a_plan_follows_the_shapes_that_torch_computes() -> None:
    for kernel, stride, padding in [(5, 2, 2), (4, 2, 2), (3, 3, 0), (2, 1, 1)]:
        plan = Plan((2, 17, 12), "relu")
        plan.conv(5, kernel, stride, padding)
        plan.max_pool(2)
        assert tuple(plan.build(0)(torch.zeros(1, 2, 17, 12)).shape[1:]) == plan.shape
