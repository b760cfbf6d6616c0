"""Updates with a mistake made on purpose, and small networks to make it on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from cases import dense
from torch import Tensor, nn
from torch.nn import functional as F

from rgap import Loss, Update, capture


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().eval()


def mlp(seed: int, act: Callable[[], nn.Module] = nn.Tanh, classes: int = 5) -> nn.Module:
    return seeded(lambda: dense(72, 32, 24, classes, act=act, seed=seed), seed)


def lenet(seed: int, act: Callable[[], nn.Module] = nn.Sigmoid, classes: int = 10) -> nn.Module:
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(2, 6, 3, 1, 1), act(), nn.Conv2d(6, 6, 3, 1, 1), act(), nn.Flatten(),
            nn.Linear(216, classes),
        ),
        seed,
    )  # fmt: skip


def normed(
    seed: int, act: Callable[[], nn.Module] = nn.LeakyReLU, classes: int = 10, bias: bool = True
) -> nn.Module:
    def build() -> nn.Module:
        model = nn.Sequential(
            nn.Conv2d(2, 6, 3, 1, 1, bias=bias), nn.BatchNorm2d(6), act(),
            nn.Conv2d(6, 6, 3, 1, 1, bias=bias), nn.BatchNorm2d(6), act(), nn.Flatten(),
            nn.Linear(216, classes),
        )  # fmt: skip
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.1)
        return model

    return seeded(build, seed)


NETS = {"mlp": mlp, "lenet": lenet, "normed": normed}


@dataclass(frozen=True)
class Case:
    """A network, a batch and the update that a client without mistakes would send."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    loss: Loss
    update: Update

    @property
    def batch(self) -> int:
        return len(self.inputs)


def case(
    name: str,
    batch: int,
    loss: str = "cross_entropy",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    trained: int = 0,
    **options: object,
) -> Case:
    outputs = {"cross_entropy": 10, "mse_loss": 5, "binary_cross_entropy_with_logits": 1}[loss]
    model = NETS[name](seed, **{"classes": outputs, **options})  # type: ignore[arg-type]
    outputs = int(options.get("classes", outputs))  # type: ignore[call-overload]
    generator = torch.Generator().manual_seed(1000 + seed)
    x = torch.rand(batch, 2, 6, 6, generator=generator)
    if loss == "cross_entropy":
        y = torch.randperm(outputs, generator=generator).repeat(batch)[:batch]
    elif loss == "mse_loss":
        y = F.one_hot(torch.randperm(outputs, generator=generator).repeat(batch)[:batch], outputs)
        y = y.float()
    else:
        y = torch.randint(0, 2, (batch,), generator=generator)
    if trained:
        train(model, loss, trained, generator)
    sent = capture(model, x, y, Loss(loss), dtype=dtype)
    return Case(model, x, y, sent.loss, sent)


def train(model: nn.Module, loss: str, steps: int, generator: torch.Generator) -> None:
    """Plain training on random pictures whose class is a band of brightness."""
    outputs = model(torch.zeros(2, 2, 6, 6)).shape[1]
    optimiser = torch.optim.SGD(model.parameters(), lr=0.2)
    for _ in range(steps):
        y = torch.randint(0, max(outputs, 2), (16,), generator=generator)
        x = torch.rand(16, 2, 6, 6, generator=generator) + y[:, None, None, None] / 10
        t = F.one_hot(y, outputs).float() if loss == "mse_loss" else y
        optimiser.zero_grad()
        Loss(loss)(model(x), t).backward()
        optimiser.step()
    model.zero_grad()


def changed(update: Update, how: Callable[[Tensor], Tensor]) -> Update:
    return replace(update, gradients={n: how(g) for n, g in update.gradients.items()})


def scaled(update: Update, factor: float) -> Update:
    return changed(update, lambda g: g * factor)


def noisy(update: Update, level: float, seed: int = 0) -> Update:
    generator = torch.Generator().manual_seed(seed)
    return changed(
        update, lambda g: g + level * torch.randn(g.shape, generator=generator, dtype=g.dtype)
    )


def trained_locally(given: Case, steps: int, rate: float, *, apart: bool = False) -> Update:
    """(θ_0 − θ_T)/(η T), declared as one gradient; float64.

    Every step is one on the whole batch, or on samples of its own (``apart``).
    """
    twin = copy.deepcopy(given.model).double()
    before = {n: p.detach().clone() for n, p in twin.named_parameters()}
    for step in range(steps):
        rows = slice(step, None, steps) if apart else slice(None)
        twin.zero_grad()
        t = given.targets.double() if given.targets.is_floating_point() else given.targets
        given.loss(twin(given.inputs[rows].double()), t[rows]).backward()
        with torch.no_grad():
            for p in twin.parameters():
                p -= rate * p.grad
    after = dict(twin.named_parameters())
    sent = {n: (before[n] - after[n].detach()) / (rate * steps) for n in before}
    return replace(given.update, gradients=sent, dtype=torch.float64)


def in_train_mode(given: Case, model: nn.Module | None = None, seed: int = 0) -> Update:
    """The gradient with batch norm and dropout in train mode."""
    dtype = given.update.dtype
    twin = copy.deepcopy(model or given.model).to(dtype).train()
    t = given.targets.to(dtype) if given.targets.is_floating_point() else given.targets
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        given.loss(twin(given.inputs.to(dtype)), t).backward()
    sent = {n: p.grad for n, p in twin.named_parameters()}
    return replace(given.update, gradients=sent)


def accumulated(given: Case, sizes: tuple[int, ...]) -> Update:
    """The plain average of the gradients of micro-batches of these sizes."""
    total: dict[str, Tensor] = {}
    start = 0
    for size in sizes:
        rows = slice(start, start + size)
        own = capture(
            given.model, given.inputs[rows], given.targets[rows], given.loss,
            dtype=given.update.dtype,
        ).gradients  # fmt: skip
        total = {n: total.get(n, 0) + g / len(sizes) for n, g in own.items()}
        start += size
    return replace(given.update, gradients=total)


def clipped(update: Update, bound: float) -> Update:
    """As torch.nn.utils.clip_grad_norm_ leaves it."""
    norm = sum(float(g.double().square().sum()) for g in update.gradients.values()) ** 0.5
    assert norm > bound
    return scaled(update, bound / (norm + 1e-6))


def moved(model: nn.Module, size: float, seed: int = 0) -> nn.Module:
    """The model with other weights, by a relative ``size``."""
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in twin.parameters():
            p += size * p.abs().mean() * torch.randn(p.shape, generator=generator)
    return twin
