"""Networks that are no chains: the node that stops the recursion is named, and nothing is wrong."""

from __future__ import annotations

import re
import types
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from written import Written

from rgap.network.chain import Chain, parse

Lin = nn.Linear


def residual() -> nn.Module:
    """A ResNet block between a stem and a head."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = F.relu(m.stem(x))
        y = m.bn2(m.conv2(F.relu(m.bn1(m.conv1(x)))))
        return m.fc(m.pool(F.relu(y + x)).flatten(1))

    return Written(
        forward, stem=nn.Conv2d(3, 4, 3, padding=1), conv1=nn.Conv2d(4, 4, 3, padding=1),
        bn1=nn.BatchNorm2d(4), conv2=nn.Conv2d(4, 4, 3, padding=1), bn2=nn.BatchNorm2d(4),
        pool=nn.AdaptiveAvgPool2d(2), fc=Lin(16, 5),
    )  # fmt: skip


def unet() -> nn.Module:
    """One level of a U-Net."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        down = torch.tanh(m.down(x))
        up = m.up(torch.tanh(m.middle(F.avg_pool2d(down, 2))))
        return m.fc(torch.tanh(m.out(torch.cat([down, up], 1))).flatten(1))

    return Written(
        forward, down=nn.Conv2d(1, 2, 3, padding=1), middle=nn.Conv2d(2, 4, 3, padding=1),
        up=nn.ConvTranspose2d(4, 2, 2, 2), out=nn.Conv2d(4, 2, 3, padding=1), fc=Lin(32, 3),
    )  # fmt: skip


def branching(m: nn.Module, x: Tensor) -> Tensor:
    if x.sum() > 0:
        x = -x
    return m.fc(x)


def thrown_away(call: Callable[[nn.Module, Tensor], object]) -> nn.Module:
    """``call`` changes the hidden tensor in place, and its result is not used."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = m.hidden(x)
        call(m, x)
        return m.fc(x)

    return Written(forward, hidden=Lin(4, 4), act=nn.ReLU(inplace=True), fc=Lin(4, 2))


def patched(place: int | None) -> nn.Module:
    model = nn.Sequential(Lin(4, 4), nn.ReLU(), Lin(4, 2))
    if place is None:
        inner = model[0]
        model.forward = types.MethodType(lambda self, x: self[2](inner(x).sin()), model)
    else:
        model[place].forward = torch.tanh
    return model


def hooked(place: str) -> nn.Module:
    model = nn.Sequential(nn.Sequential(Lin(4, 4), nn.ReLU()), Lin(4, 2))
    model.get_submodule(place).register_forward_hook(lambda module, args, out: out * 2)
    return model


def tied() -> nn.Module:
    model = nn.Sequential(Lin(4, 4), nn.Tanh(), Lin(4, 4), nn.Tanh(), Lin(4, 2))
    model[2].weight = model[0].weight
    return model


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        middle = nn.utils.weight_norm(Lin(4, 4))
    return nn.Sequential(Lin(4, 4), nn.Tanh(), middle, nn.Tanh(), Lin(4, 2))


def around(middle: nn.Module, width: int = 4) -> nn.Module:
    return nn.Sequential(Lin(4, 4), nn.Tanh(), middle, nn.Tanh(), Lin(width, 2))


def after(forward: Callable[[nn.Module, Tensor], Tensor], **parts: object) -> nn.Module:
    """fc of ``forward``, with a layer ``hidden`` for it to use."""
    return Written(
        lambda m, x: m.fc(forward(m, x)), **{"hidden": Lin(4, 4), "fc": Lin(4, 2)} | parts
    )


def attention() -> nn.Module:
    mix = nn.MultiheadAttention(4, 2, batch_first=True)
    return Written(lambda m, x: m.fc(m.mix(x, x, x)[0].mean(1)), mix=mix, fc=Lin(4, 2))


# name → (model, input shape, node that stops, words of the reason, stages above it)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str, str, list[str]]] = {
    "residual block": (residual, (3, 6, 6), "add", "skip connection", ["fc"]),
    "u-net": (unet, (1, 4, 4), "cat", "concatenates", ["out", "fc"]),
    "x + x": (lambda: after(lambda m, x: x + x), (4,), "add", "adds two branches", ["fc"]),
    "called twice": (lambda: after(lambda m, x: m.hidden(torch.tanh(m.hidden(x)))), (4,), "hidden",
                     "called more than once.*sum of both gradients", ["fc"]),
    "tied weights": (tied, (4,), "2", "'0.weight' and '2.weight' are the same parameter", ["4"]),
    "control flow": (lambda: Written(branching, fc=Lin(4, 2)), (4,), "Written", "control flow", []),
    "LayerNorm": (lambda: around(nn.LayerNorm(4)), (4,), "2", "own input", ["4"]),
    "transformer block": (
        lambda: Written(lambda m, x: m.fc(m.block(x).mean(1)), fc=Lin(4, 2),
                        block=nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)),
        (3, 4), "block", "TransformerEncoderLayer is not among", ["fc"],
    ),
    "attention": (attention, (3, 4), "mix", "several tensors", ["fc"]),
    "LSTM": (lambda: Written(lambda m, x: m.fc(m.cell(x)[0][:, -1]), fc=Lin(4, 2),
                             cell=nn.LSTM(3, 4, batch_first=True)),
             (5, 3), "cell", "LSTM is not among", ["fc"]),
    "LSTM, its state": (lambda: Written(lambda m, x: m.fc(m.cell(x)[1][0][-1]), fc=Lin(4, 2),
                                        cell=nn.LSTM(3, 4, batch_first=True)),
                        (5, 3), "cell", "LSTM is not among", ["fc"]),
    "embedding": (lambda: nn.Sequential(nn.Embedding(9, 2), nn.Flatten(), Lin(6, 4), nn.Tanh(),
                                        Lin(4, 2)), (3,), "0", "Embedding takes whole", ["2", "4"]),
    "transposed convolution": (
        lambda: nn.Sequential(nn.ConvTranspose2d(1, 2, 2, 2), nn.Tanh(), nn.Flatten(), Lin(32, 2)),
        (1, 2, 2), "0", "ConvTranspose2d is not", ["3"],
    ),
    "linear along positions": (lambda: nn.Sequential(Lin(4, 4), nn.Flatten(), Lin(12, 2)), (3, 4),
                               "0", "once for every position", ["2"]),
    "weight norm": (lambda: around(parametrizations.weight_norm(Lin(4, 4))), (4,), "2",
                    "computed from others", ["4"]),
    "weight norm, old": (old_weight_norm, (4,), "2", "computed from others", ["4"]),
    "spectral norm": (lambda: around(parametrizations.spectral_norm(Lin(4, 4))), (4,), "2",
                      "computed from others", ["4"]),
    "matmul": (lambda: after(lambda m, x: x @ m.w, w=nn.Parameter(torch.eye(4))), (4,), "matmul",
               "not among the steps", ["fc"]),
    "scale by a parameter": (lambda: after(lambda m, x: x * m.g, g=nn.Parameter(torch.ones(4))),
                             (4,), "mul", "parameter 'g'", ["fc"]),
    "frozen statistics": (lambda: around(nn.BatchNorm1d(4, track_running_stats=False)), (4,), "2",
                          "mixes the samples", ["4"]),
    "gradient cut": (lambda: after(lambda m, x: m.hidden(x).detach()), (4,), "detach", "", ["fc"]),
    "gradient cut by data": (lambda: after(lambda m, x: m.hidden(x).data), (4,), "getattr_1",
                             "cuts the gradient", ["fc"]),
    "half precision": (lambda: after(lambda m, x: m.hidden(x).to(torch.float16).float()), (4,),
                       "to", "rounds the data to torch.float16", ["fc"]),
    "whole numbers": (lambda: after(lambda m, x: m.hidden(x).to(torch.int).float()), (4,), "to",
                      "rounds the data", ["fc"]),
    "batch mixed": (lambda: after(lambda m, x: m.hidden(x)[:3]), (4,), "getitem", "mixes the batch",
                    []),
    "pad along the batch": (lambda: nn.Sequential(nn.ZeroPad2d(1), Lin(6, 2)), (4,), "0",
                            "along the batch", []),
    "softmax over the batch": (lambda: around(nn.Softmax(dim=0)), (4,), "2", "needs dim=1", ["4"]),
    "pool with places": (
        lambda: after(lambda m, x: F.max_pool1d(m.hidden(x), 2, return_indices=True)[0],
                      fc=Lin(2, 2)),
        (4,), "max_pool1d_with_indices", "", ["fc"],
    ),
    "chunk": (lambda: after(lambda m, x: m.hidden(x).chunk(2, 1)[0], fc=Lin(2, 2)), (4,), "chunk",
              "", ["fc"]),
    "in place, method": (lambda: thrown_away(lambda m, x: x.mul_(2)), (4,), "hidden",
                         "'mul_' changes it in place", ["fc"]),
    "in place, view": (lambda: thrown_away(lambda m, x: x.view(-1).clamp_(0)), (4,), "hidden",
                       "'clamp_' changes it in place", ["fc"]),
    "in place, module": (lambda: thrown_away(lambda m, x: m.act(x)), (4,), "hidden",
                         "'act' changes it in place", ["fc"]),
    "in place, function": (lambda: thrown_away(lambda m, x: F.relu(x, inplace=True)), (4,),
                           "hidden", "changes it in place", ["fc"]),
    "a tuple": (lambda: Written(lambda m, x: (m.fc(x), x), fc=Lin(4, 2)), (4,), "output",
                "returns a tuple", []),
    "a dict": (lambda: Written(lambda m, x: {"logits": m.fc(x)}, fc=Lin(4, 2)), (4,), "output",
               "returns a dict", []),
    "complex weights": (
        lambda: Written(lambda m, x: F.linear(x, m.w),
                        w=nn.Parameter(torch.zeros(2, 4, dtype=torch.complex64))),
        (4,), "linear", "complex64: it needs real numbers", [],
    ),
    "forward replaced": (lambda: patched(1), (4,), "1", "forward was replaced", ["2"]),
    "root forward replaced": (lambda: patched(None), (4,), "Sequential", "output differs", []),
    "hook on a layer": (lambda: hooked("0.0"), (4,), "Sequential", "hooks are on '0.0'", []),
    "hook on a container": (lambda: hooked("0"), (4,), "Sequential", "hooks are on '0'", []),
    "random numbers": (lambda: after(lambda m, x: x + torch.randn(4)), (4,), "Written",
                       "random number", []),
    "decision by type": (lambda: after(lambda m, x: x if isinstance(x, Tensor) else -x), (4,),
                         "Written", "output differs", []),
    "wrapped": (lambda: nn.DataParallel(nn.Sequential(Lin(4, 2))), (4,), "DataParallel",
                "write model.module", []),
    "no layer": (lambda: nn.Sequential(nn.PReLU()), (4,), "Sequential", "no linear", []),
}  # fmt: skip


def made(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CASES[name][0]().eval()


def parsed(name: str) -> Chain:
    return parse(made(name), CASES[name][1])


@pytest.mark.parametrize("name", CASES)
def test_barrier_names_the_node_the_reason_and_what_is_left(name: str) -> None:
    _, shape, node, words, stages = CASES[name]
    chain = parsed(name)
    assert not chain.complete and chain.barrier is not None
    assert chain.barrier.node == node
    assert re.search(words, chain.barrier.reason), chain.barrier.reason
    assert chain.barrier.kind
    matches = "matching the whole update still works" in chain.barrier.advice
    assert matches != (chain.barrier.kind == "Embedding")  # no search moves a token
    assert ("layers above it" in chain.barrier.advice) == bool(stages)
    assert [stage.name for stage in chain.stages] == stages
    assert chain.input_shape == shape


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][4]])
def test_the_part_above_a_barrier_is_the_models(name: str) -> None:
    """Fed with what the model hands to its first layer there, it gives the model's output."""
    model = made(name)
    _, shape, _, _, (first, *_) = CASES[name]
    chain = parse(model, shape)
    seen: list[Tensor] = []
    model.get_submodule(first).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    y = model(torch.arange(6).reshape(2, 3) if name == "embedding" else torch.rand(5, *shape))
    x = chain.stages[0].affine.forward(seen[0].double())
    for op in chain.stages[0].tail:
        x = op.forward(x)
    for stage in chain.stages[1:]:
        x = stage.forward(x)[1]
    torch.testing.assert_close(x.float(), y.detach(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["a tuple", "control flow", "wrapped"])
def test_a_chain_without_stages_says_so(name: str) -> None:
    chain = parsed(name)
    with pytest.raises(ValueError, match=r"has no stages: .*call the model itself"):
        chain.forward(torch.zeros(1, 4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (torch.compile, "write model._orig_mod"),
        (torch.jit.script, "TorchScript"),
        (lambda model: nn.Sequential(torch.jit.script(model), Lin(2, 2)), "TorchScript"),
        (lambda model: torch.jit.trace(model, torch.zeros(1, 4)), "TorchScript"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_compiled_models_are_named(wrap: Callable[..., nn.Module], words: str) -> None:
    barrier = parse(wrap(nn.Sequential(Lin(4, 4), nn.ReLU(), Lin(4, 2)).eval()), (4,)).barrier
    assert barrier is not None and words in barrier.reason
