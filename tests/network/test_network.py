"""Networks that are chains: every stage computes what the model computes, and the model stays."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from written import Written

from rgap.network.chain import Chain, parse


class Flagged(nn.Module):
    """Options with defaults, as users write them."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.fc = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(
        self, x: Tensor, squash: bool = True, mask: Tensor | None = None, *, sizes: tuple = (1, 2)
    ) -> Tensor:
        x = self.hidden(x)
        if squash:
            x = torch.tanh(x)
        if mask is not None:
            x = x * mask
        return self.fc(x)


def normed(channels: int, make: type[nn.Module] = nn.BatchNorm2d) -> nn.Module:
    """A batch norm that has seen data."""
    norm = make(channels)
    with torch.no_grad():
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
        norm.weight.uniform_(0.5, 2)
        norm.bias.uniform_(-1, 1)
    return norm


def functional(m: nn.Module, x: Tensor) -> Tensor:
    x = F.relu(m.one(x))
    x = F.avg_pool2d(x, 2)
    x = torch.sigmoid(F.conv2d(x, m.two.weight, m.two.bias, padding="same"))
    x = F.dropout(x, 0.5, m.training)
    x = torch.flatten(x, 1)
    return F.linear(F.leaky_relu(m.three(x), 0.2), m.four.weight)


def mobilenet() -> nn.Module:
    """Two depthwise-separable blocks, stride 2, ending in a global average."""

    def block(channels: int, out: int, stride: int) -> list[nn.Module]:
        return [
            nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False),
            normed(channels),
            nn.ELU(),
            nn.Conv2d(channels, out, 1, bias=False),
            normed(out),
            nn.ELU(inplace=True),
        ]

    return nn.Sequential(
        *block(3, 8, 2), *block(8, 12, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)
    )


def loop(m: nn.Module, x: Tensor) -> Tensor:
    for layer in m.layers:
        x = torch.tanh(layer(x))
    return m.head(x)


def unpacked(m: nn.Module, x: Tensor) -> Tensor:
    x = m.conv(x)
    batch, channels, height, width = x.shape
    return m.fc(x.view(batch, height * width * channels))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[str]]] = {
    "linear alone": (lambda: nn.Linear(4, 3), (4,), ["Linear"]),
    "mlp": (
        lambda: nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)), (8,), ["0", "2"],
    ),
    "nested": (
        lambda: nn.Sequential(
            nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.Sequential(nn.Tanh())),
            nn.Identity(), nn.Dropout(0.5), nn.Flatten(), nn.Sequential(nn.Linear(24, 3)),
        ),
        (2, 6), ["0.0", "4.0"],
    ),
    "conv3d": (
        lambda: nn.Sequential(nn.Conv3d(1, 2, 2), nn.Softplus(), nn.Flatten(), nn.Linear(16, 2)),
        (1, 3, 3, 3), ["0", "3"],
    ),
    "batch norm": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3), normed(4), nn.LeakyReLU(0.1), nn.AvgPool2d(2), nn.Flatten(),
            nn.Linear(16, 6), normed(6, nn.BatchNorm1d), nn.PReLU(6), nn.Linear(6, 3),
        ),
        (2, 6, 6), ["0", "5", "8"],
    ),
    "functional": (
        lambda: Written(
            functional, one=nn.Conv2d(2, 3, 3), two=nn.Conv2d(3, 4, 2), three=nn.Linear(16, 5),
            four=nn.Linear(5, 3),
        ),
        (2, 6, 6), ["one", "conv2d", "three", "linear"],
    ),
    "reshape, einops-like permute": (
        lambda: Written(
            lambda m, x: m.fc(m.c(x).permute(0, 2, 3, 1).contiguous().reshape(x.size(0), -1)),
            c=nn.Conv2d(1, 2, 3), fc=nn.Linear(8, 3),
        ),
        (1, 4, 4), ["c", "fc"],
    ),
    "sizes unpacked": (
        lambda: Written(unpacked, conv=nn.Conv2d(1, 2, 3), fc=nn.Linear(8, 3)),
        (1, 4, 4), ["conv", "fc"],
    ),
    "normalised by constants": (
        lambda: Written(
            lambda m, x: m.fc(((x - torch.tensor([0.5, 0.4]).view(1, 2, 1)) / m.std).flatten(1)),
            fc=nn.Linear(8, 3), std=torch.tensor([[0.2], [0.3]]),
        ),
        (2, 4), ["fc"],
    ),
    "arithmetic": (
        lambda: Written(lambda m, x: 2 - m.b((1 - m.a(x)) * 3 / 4) + 1e3,
                        a=nn.Linear(4, 4), b=nn.Linear(4, 2)),
        (4,), ["a", "b"],
    ),
    "module list": (
        lambda: Written(loop, layers=nn.ModuleList(nn.Linear(4, 4) for _ in range(3)),
                        head=nn.Linear(4, 2)),
        (4,), ["layers.0", "layers.1", "layers.2", "head"],
    ),
    "parameter list": (
        lambda: Written(lambda m, x: F.linear(x, m.p[0], m.p[1]),
                        p=nn.ParameterList([torch.rand(3, 4), torch.rand(3)])),
        (4,), ["linear"],
    ),
    "flags": (Flagged, (8,), ["hidden", "fc"]),
    "unflatten and upsample": (
        lambda: nn.Sequential(
            nn.Linear(6, 8), nn.Unflatten(1, (2, 2, 2)), nn.Sigmoid(), nn.Upsample(scale_factor=2),
            nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(48, 2),
        ),
        (6,), ["0", "4", "7"],
    ),
    "vgg": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(True), nn.MaxPool2d(2),
            nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(True), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(32, 10), nn.ReLU(True), nn.Dropout(), nn.Linear(10, 4),
        ),
        (3, 8, 8), ["0", "3", "7", "10"],
    ),
    "mobilenet": (mobilenet, (3, 8, 8), ["0", "3", "6", "9", "14"]),
    "softmax at the end": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.Softmax(dim=1)), (4,), ["0"],
    ),
    "one logit, squeezed": (
        lambda: Written(lambda m, x: torch.sigmoid(m.fc(x).squeeze(1) * 2), fc=nn.Linear(4, 1)),
        (4,), ["fc"],
    ),
    "global mean, functional prelu": (
        lambda: Written(lambda m, x: m.fc(F.prelu(m.c(x), m.slope).mean((2, 3))),
                        c=nn.Conv2d(1, 4, 3), slope=nn.Parameter(torch.full((4,), 0.3)),
                        fc=nn.Linear(4, 2)),
        (1, 5, 5), ["c", "fc"],
    ),
}  # fmt: skip


def made(name: str) -> tuple[nn.Module, tuple[int, ...], list[str]]:
    make, shape, stages = CASES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().double().eval(), shape, stages


def inputs(shape: tuple[int, ...], batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.rand(batch, *shape, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("name", CASES)
def test_chain_computes_what_the_model_computes(name: str) -> None:
    model, shape, stages = made(name)
    chain = parse(model, shape)
    assert chain.complete and chain.barrier is None
    assert [stage.name for stage in chain.stages] == stages
    for batch in (1, 2, 5):
        x = inputs(shape, batch)
        y = model(x).detach()
        torch.testing.assert_close(chain.forward(x), y, atol=1e-11, rtol=1e-11)
        assert chain.output_shape == tuple(y.shape[1:])


@pytest.mark.parametrize("name", CASES)
def test_stages_hold_one_map_each_and_fit_together(name: str) -> None:
    model, shape, _ = made(name)
    chain = parse(model, shape)
    assert chain.input_shape == shape == chain.stages[0].in_shape
    assert chain.parameters == tuple(n for n, _ in model.named_parameters())
    parameters = dict(model.named_parameters())
    for index, stage in enumerate(chain.stages):
        assert stage.index == index
        assert torch.equal(stage.affine.weight, parameters[stage.affine.weight_name])
        bias = stage.affine.bias_name
        assert (bias is None) == (stage.affine.bias is None)
        assert bias is None or torch.equal(stage.affine.bias, parameters[bias])
        above = chain.stages[index + 1].in_shape if index + 1 < len(chain.stages) else ()
        assert stage.out_shape == (above or chain.output_shape)
    x = inputs(shape)
    for (before, z), stage in zip(chain.trace(x), chain.stages, strict=True):
        torch.testing.assert_close(stage.forward(before)[0], z)


def test_activations_and_batch_norm_go_with_the_map_below() -> None:
    model, shape, _ = made("batch norm")
    stages = parse(model, shape).stages
    assert [[op.kind for op in s.lead] for s in stages] == [[], ["avg_pool2d", "flatten"], []]
    assert [[op.kind for op in s.tail] for s in stages] == [
        ["batch_norm2d", "leaky_relu"], ["batch_norm1d", "prelu"], [],
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["functional", "vgg", "mobilenet", "arithmetic"])
def test_float32_models_give_float64_chains(name: str) -> None:
    model, shape, _ = made(name)
    chain = parse(model.float(), shape)
    x = inputs(shape)
    torch.testing.assert_close(
        chain.forward(x), copy.deepcopy(model).double()(x).detach(), atol=1e-6, rtol=1e-6
    )
    assert {s.affine.weight.dtype for s in chain.stages} == {torch.float64}


def counting(m: nn.Module, x: Tensor) -> Tensor:
    """A forward with a memory: counters, a list and attributes."""
    m.calls += 1
    m.count = m.count + 1
    m.steps += 1
    m.log.append(x)
    m.last = x
    return m.fc(torch.tanh(m.hidden(x)) + torch.rand(4) * 0)


def test_parsing_leaves_the_model_as_it_was() -> None:
    model = Written(
        counting, hidden=nn.Linear(4, 4), fc=nn.Linear(4, 2), count=torch.zeros(()),
        steps=torch.zeros(1), extra=nn.Sequential(normed(2), nn.Linear(1, 1)),
    )  # fmt: skip
    model.calls, model.log, model.table = 0, ["kept"], {"a": 1}
    model.eval()
    model.extra[1].train()
    seen: list[int] = []
    model.hidden.register_forward_hook(lambda module, args, out: seen.append(1))
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    attributes = {n: set(vars(m)) for n, m in model.named_modules()}
    modes = [m.training for m in model.modules()]
    tensors = {n: id(t) for n, t in (*model.named_parameters(), *model.named_buffers())}
    hooks = dict(model.hidden._forward_hooks)
    random = torch.get_rng_state()

    chain = parse(model, (4,))

    assert [stage.name for stage in chain.stages] == ["hidden", "fc"]
    assert torch.equal(random, torch.get_rng_state())
    assert {n: id(t) for n, t in (*model.named_parameters(), *model.named_buffers())} == tensors
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
    assert [m.training for m in model.modules()] == modes
    assert (model.calls, model.log, model.table) == (0, ["kept"], {"a": 1})
    assert model.hidden._forward_hooks == hooks
    assert torch.equal(model.fc.weight.grad, torch.ones_like(model.fc.weight))
    assert model.hidden.weight.grad is None and model.hidden.weight.dtype == torch.float32
    assert len(seen) == 1  # the one run that compares the chain with the model


def test_weights_of_the_chain_are_its_own() -> None:
    model, shape, _ = made("mlp")
    chain = parse(model, shape)
    x = inputs(shape)
    before = chain.forward(x)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert torch.equal(chain.forward(x), before)
    moved = chain.to("meta")
    assert isinstance(moved, Chain) and moved.stages[0].affine.weight.is_meta
