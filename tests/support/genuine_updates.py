"""Genuine updates of random networks, losses and batches: no check should find anything."""

from __future__ import annotations

import random
from dataclasses import replace

import mistakes
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rgap import Loss, Update, capture

BINARY = "binary_cross_entropy_with_logits"
ACTIVATIONS = (nn.ReLU, nn.Tanh, nn.GELU, nn.Sigmoid, nn.ELU, nn.Softshrink, nn.Identity)


def own(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with a penalty on the logits."""
    return F.cross_entropy(outputs, targets) + 0.1 * outputs.square().mean()


def margin(outputs: Tensor, targets: Tensor) -> Tensor:
    """A hinge: cotangents vanish."""
    return F.multi_margin_loss(outputs, targets)


def drawn(seed: int) -> tuple[nn.Module, Update]:
    """A network, a loss, a batch and what a client without mistakes sends of it.

    Networks without a step between their layers, heads of one feature and batches of copies are
    among them: their updates have rank one whatever the size of the batch.
    """
    r = random.Random(seed)
    act, classes = r.choice(ACTIVATIONS), r.choice((1, 2, 3, 5, 10))
    size, dtype = r.choice((1, 1, 2, 3, 5)), r.choice((torch.float32, torch.float64))
    losses = ["nll_loss", "focal", "weight", "own", "margin", "cross_entropy", "mse_loss", BINARY]
    name = r.choice(losses) if classes > 1 else r.choice((BINARY, "mse_loss", "sigmoid_focal_loss"))
    narrow = r.choice((1, 2, 6, 24))

    last = [nn.LogSoftmax(1)] if name == "nll_loss" else []

    def build() -> nn.Module:
        start = r.random()
        if start < 0.1:
            return nn.Sequential(nn.Flatten(), nn.Linear(36, classes), *last)
        if start < 0.55:
            parts = [nn.Flatten(), nn.Linear(36, 18), act(), nn.Linear(18, narrow), act()]
        else:
            parts = [nn.Conv2d(1, 4, 3, 2, 1), act(), nn.Flatten(), nn.Linear(36, narrow), act()]
        return nn.Sequential(*parts, nn.Linear(narrow, classes), *last)

    model = mistakes.seeded(build, seed).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(size, 1, 6, 6, generator=generator).to(dtype)
    styles = {
        "plain": x, "binary": (x > 0.5).to(dtype), "wide": 20 * x - 10, "dark": x * (x > 0.7),
        "copies": x[:1].repeat(size, 1, 1, 1),
    }  # fmt: skip
    x = styles[r.choice(tuple(styles))]
    y = torch.randint(0, max(classes, 2), (size,), generator=generator)
    if r.random() < 0.3:
        y = y[:1].repeat(size)
    if name in (BINARY, "sigmoid_focal_loss"):
        y = torch.randint(0, 2, (size, classes), generator=generator).to(dtype)
    elif name == "mse_loss":
        y = torch.randn(size, classes, generator=generator).to(dtype)
    weight = tuple(r.uniform(0.3, 3.0) for _ in range(classes))
    given: dict[str, Loss] = {
        "own": Loss("own", function=own),
        "margin": Loss("margin", function=margin),
        "weight": Loss(weight=weight),
        "focal": Loss("focal_loss", weight=weight),
        "cross_entropy": Loss(reduction=r.choice(("mean", "sum"))),
    }
    if r.random() < 0.2 and len(model) > 3:
        model[1].requires_grad_(False)
    update = capture(model, x, y, given.get(name, name), value_range=None)
    if r.random() < 0.3:  # a weight difference rounds, and loses what is small
        rate = 10 ** r.uniform(-5, 0)
        before = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        after = {n: p - rate * update.gradients[n] for n, p in before.items()}
        options = {"loss": update.loss, "batch_size": size, "input_shape": (1, 6, 6)}
        update = Update.from_delta(before, after, rate, **options)  # type: ignore[arg-type]
    elif r.random() < 0.2:  # frozen layers sent as zeros
        gradients = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        update = replace(update, gradients=gradients | update.gradients)
    return model, update
