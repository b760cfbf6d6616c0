"""Mistakes, networks and batches: what a check should say first of each."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import mistakes
import torch
from mistakes import Case, changed, clipped, noisy, scaled
from torch import Tensor, nn

from rgap import Check, Loss, Update, capture, check
from rgap.diagnosis import Kind

SHAPE = (2, 6, 6)
RATE = 1e-2  # of the weight differences
DROPPED = 0.4


class Residual(nn.Module):
    """x + convolution of x."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(6, 6, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """One pass."""
        return x + torch.tanh(self.inner(x))


def _mlp(act: Callable[[], nn.Module], bias: bool = True) -> list[nn.Module]:
    return [nn.Flatten(), nn.Linear(72, 40, bias), act(), nn.Linear(40, 24, bias), act()]


def _normed() -> list[nn.Module]:
    return list(mistakes.normed(0))[:-1]


BODIES: dict[str, tuple[Callable[[], list[nn.Module]], int]] = {
    "mlp": (lambda: _mlp(nn.Tanh), 24),
    "lenet": (lambda: list(mistakes.lenet(0))[:-1], 216),
    "cnn relu": (
        lambda: [
            nn.Conv2d(2, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 24),
            nn.ReLU(),
        ],
        24,
    ),
    "residual": (lambda: [nn.Conv2d(2, 6, 3, 2, 1), nn.Tanh(), Residual(), nn.Flatten()], 54),
    "normed": (_normed, 216),
    "bias-free": (lambda: _mlp(nn.Sigmoid, False), 24),
}  # fmt: skip


def network(name: str, classes: int, seed: int, middle: nn.Module | None = None) -> nn.Module:
    """A network in eval mode, with a module of one's own before its head."""
    body, width = BODIES[name]

    def build() -> nn.Module:
        steps = body()
        between = [] if middle is None else [middle]
        return nn.Sequential(*steps, *between, nn.Linear(width, classes, name != "bias-free"))

    model = mistakes.seeded(build, seed)
    with torch.no_grad():  # bodies that come from a builder have its weights
        generator = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p *= 1 + 0.1 * torch.rand(p.shape, generator=generator)
    return model


def stepped(
    given: Case,
    optimiser: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    steps: int = 1,
) -> Update:
    """Steps of an optimiser, read as one of SGD."""
    twin = copy.deepcopy(given.model)
    rule = optimiser(list(twin.parameters()))
    for _ in range(steps):
        rule.zero_grad()
        given.loss(twin(given.inputs), given.targets).backward()
        rule.step()
    return Update.from_delta(
        given.model, twin, RATE, loss=given.loss, batch_size=given.batch, input_shape=SHAPE
    )


def signed(given: Case, decay: float = 0.0) -> Update:
    """A step of signSGD or Lion, read as a step of SGD."""
    before = {n: p.detach() for n, p in given.model.named_parameters()}
    after = {
        n: p - RATE * (given.update.gradients[n].sign() + decay * p) for n, p in before.items()
    }
    return Update.from_delta(
        before, after, RATE, loss=given.loss, batch_size=given.batch, input_shape=SHAPE
    )


def one_by_one(given: Case, bound: float) -> Update:
    """Every sample's gradient clipped to a norm, as DP-SGD does, without noise."""
    total: dict[str, Tensor] = {}
    for row in range(given.batch):
        own = capture(given.model, given.inputs[row : row + 1], given.targets[row : row + 1])
        norm = sum(float(g.square().sum()) for g in own.gradients.values()) ** 0.5
        factor = min(1.0, bound / norm) / given.batch
        total = {n: total.get(n, 0) + factor * g for n, g in own.gradients.items()}
    return replace(given.update, gradients=total)


def _bound(given: Case, share: float) -> float:
    """A round bound below the norm of the whole update."""
    sent = given.update.gradients.values()
    return float(f"{share * sum(float(g.square().sum()) for g in sent) ** 0.5:.1e}")


def amp(given: Case, unscaled: bool) -> Update:
    """Gradients of float16 with a loss scale of 1024, as they are or divided by it."""
    half = changed(scaled(given.update, 1024.0), lambda g: g.half().float())
    return scaled(half, 1 / 1024) if unscaled else half


def quantised(g: Tensor) -> Tensor:
    step = g.abs().max() / 127
    return (g / step).round() * step


def pruned(g: Tensor) -> Tensor:
    least = g.abs().flatten().topk(max(1, g.numel() // 10)).values[-1]
    return torch.where(g.abs() >= least, g, torch.zeros_like(g))


def raised(given: Case) -> Update:
    """One entry of one weight is raised by ten times the largest of it."""
    names = [n for n, g in given.update.gradients.items() if g.ndim > 1]
    name = names[given.batch % len(names)]
    changed_one = given.update.gradients[name].clone().flatten()
    changed_one[7 % len(changed_one)] += 10.0 * changed_one.abs().max()
    sent = {**given.update.gradients, name: changed_one.reshape(given.update.gradients[name].shape)}
    return replace(given.update, gradients=sent)


def silent(given: Case) -> Update:
    """One layer's gradient is zero, that of the first with a weight after the input's."""
    names = [n for n in given.update.gradients if n.endswith("weight")]
    prefix = names[len(names) // 2].removesuffix("weight")
    sent = {
        n: torch.zeros_like(g) if n.startswith(prefix) else g
        for n, g in given.update.gradients.items()
    }
    return replace(given.update, gradients=sent)


def _decayed(given: Case) -> Update:
    weights = {n: p.detach() for n, p in given.model.named_parameters()}
    sent = {n: g + 1e-2 * weights[n] for n, g in given.update.gradients.items()}
    return replace(given.update, gradients=sent)


def _summed(given: Case) -> Update:
    sent = capture(given.model, given.inputs, given.targets, Loss(reduction="sum"))
    return replace(sent, loss=given.loss)


def _smoothed(given: Case) -> Update:
    sent = capture(given.model, given.inputs, given.targets, Loss(label_smoothing=0.1))
    return replace(sent, loss=given.loss)


def _trained(given: Case) -> Update:
    return mistakes.trained_locally(given, 2 if given.batch == 1 else 3, 0.05)


def _wrapped(given: Case) -> Update:
    sent = {"module." + n: g for n, g in given.update.gradients.items()}
    return replace(given.update, gradients=sent)


def _weights(given: Case) -> Update:
    sent = {n: p.detach() * 0.99 for n, p in given.model.named_parameters()}
    return replace(given.update, gradients=sent)


def _rms(given: Case) -> float:
    sent = given.update.gradients.values()
    return (sum(float(g.square().sum()) for g in sent) / sum(g.numel() for g in sent)) ** 0.5


Maker = Callable[[Case], Update]
RULES = torch.optim


@dataclass(frozen=True)
class Mistake:
    """What goes wrong, and the kinds that name it."""

    make: Maker
    kinds: tuple[Kind, ...]
    batches: tuple[int, ...] = (1, 4)


K = Kind
MISTAKES: dict[str, Mistake] = {
    "none": Mistake(lambda c: c.update, ()),
    "sign": Mistake(lambda c: scaled(c.update, -1.0), (K.SIGN,)),
    "rate": Mistake(lambda c: scaled(c.update, 2.7), (K.SCALE,)),
    "sum": Mistake(_summed, (K.REDUCTION,), (4,)),
    "micro-batches": Mistake(lambda c: mistakes.accumulated(c, (3, 1)), (K.ACCUMULATION,), (4,)),
    "clipped": Mistake(lambda c: clipped(c.update, _bound(c, 0.1)), (K.CLIPPING,)),
    "clipped each": Mistake(lambda c: one_by_one(c, _bound(c, 0.6)), (K.CLIPPING,), (4,)),
    "squared error": Mistake(lambda c: replace(c.update, loss=Loss("mse_loss")), (K.LOSS,)),
    "smoothing": Mistake(_smoothed, (K.LOSS,)),
    "steps": Mistake(_trained, (K.STEPS,)),
    "steps apart": Mistake(
        lambda c: mistakes.trained_locally(c, 2, 0.05, apart=True), (K.STEPS,), (4,)
    ),
    "batch 8": Mistake(lambda c: replace(c.update, batch_size=8), (K.BATCH_SIZE, K.SCALE), (4,)),
    "batch 2": Mistake(lambda c: replace(c.update, batch_size=2), (K.BATCH_SIZE,), (4,)),
    "decay": Mistake(_decayed, (K.DECAY,)),
    "noise": Mistake(lambda c: noisy(c.update, 0.03 * _rms(c)), (K.NOISE,)),
    "prefix": Mistake(_wrapped, (K.NAMES,)),
    "parameters": Mistake(_weights, (K.PARAMETERS,)),
    "half": Mistake(lambda c: changed(c.update, lambda g: g.half().float()), (K.PRECISION,)),
    "amp": Mistake(lambda c: amp(c, False), (K.SCALE, K.PRECISION)),
    "amp unscaled": Mistake(lambda c: amp(c, True), (K.PRECISION,)),
    "int8": Mistake(lambda c: changed(c.update, quantised), (K.COMPRESSION,)),
    "pruned": Mistake(lambda c: changed(c.update, pruned), (K.COMPRESSION,)),
    "signs": Mistake(lambda c: changed(c.update, torch.sign), (K.COMPRESSION,)),
    "silent": Mistake(silent, (K.ABSENT,)),
    "raised": Mistake(raised, (K.ENTRY,)),
    "Adam": Mistake(lambda c: stepped(c, lambda p: RULES.Adam(p, RATE)), (K.OPTIMISER,)),
    "AdamW": Mistake(
        lambda c: stepped(c, lambda p: RULES.AdamW(p, RATE, weight_decay=0.05)), (K.OPTIMISER,)
    ),
    "Adagrad": Mistake(
        lambda c: stepped(c, lambda p: RULES.Adagrad(p, 0.1 * RATE)), (K.OPTIMISER,)
    ),
    "RMSprop": Mistake(lambda c: stepped(c, lambda p: RULES.RMSprop(p, RATE)), (K.OPTIMISER,)),
    "Adam, 3 steps": Mistake(
        lambda c: stepped(c, lambda p: RULES.Adam(p, RATE), 3), (K.OPTIMISER,)
    ),
    "Adagrad, 8 steps": Mistake(
        lambda c: stepped(c, lambda p: RULES.Adagrad(p, 0.1 * RATE), 8), (K.OPTIMISER,)
    ),
    "RMSprop, 2 steps": Mistake(
        lambda c: stepped(c, lambda p: RULES.RMSprop(p, RATE), 2), (K.OPTIMISER,)
    ),
    "Adamax": Mistake(lambda c: stepped(c, lambda p: RULES.Adamax(p, RATE)), (K.OPTIMISER,)),
    "signSGD": Mistake(signed, (K.OPTIMISER,)),
    "Lion": Mistake(lambda c: signed(c, 0.1), (K.OPTIMISER,)),
    "weights": Mistake(lambda c: c.update, (K.WEIGHTS,)),
    "dropout": Mistake(lambda c: mistakes.in_train_mode(c, seed=3), (K.DROPOUT,)),
    "mode": Mistake(mistakes.in_train_mode, (K.MODE,)),
}


# The values themselves, or a comparison of all tensors, show these on any network.
ALWAYS = {
    "prefix", "parameters", "half", "amp", "amp unscaled", "int8", "signs", "Adam", "AdamW",
    "Adagrad", "RMSprop", "Adamax", "signSGD", "Lion",
}  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """One mistake on one network and batch."""

    mistake: str
    network: str
    batch: int
    classes: int
    trained: bool
    seed: int
    stated: bool = True  # the batch size

    def made(self) -> tuple[nn.Module, Update]:
        """The model of the server and what it gets."""
        middle = nn.Dropout(DROPPED) if self.mistake == "dropout" else None
        model = network(self.network, self.classes, self.seed, middle)
        generator = torch.Generator().manual_seed(self.seed)
        if self.trained:
            mistakes.train(model, "cross_entropy", 30, generator)
        x = torch.rand(self.batch, *SHAPE, generator=generator)
        y = torch.randint(0, self.classes, (self.batch,), generator=generator)
        update = capture(model, x, y)
        given = Case(model, x, y, update.loss, update)
        sent = MISTAKES[self.mistake].make(given)
        if self.mistake == "weights":
            model = mistakes.moved(model, 0.2, self.seed)
        return model, sent if self.stated else replace(sent, batch_size=None)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Kinds that name the mistake: train mode switches batch norms too."""
        both = self.mistake == "dropout" and self.network == "normed"
        return (*MISTAKES[self.mistake].kinds, *((Kind.MODE,) if both else ()))

    def outcome(self) -> tuple[str, str, Check]:
        """Right, open, rival, silent or wrong; the first finding; everything."""
        found = check(*self.made())
        kinds = self.kinds
        best = found.best
        first = "-" if best is None else best.kind.value
        if best is None:
            return ("silent" if kinds else "right"), first, found
        if best.kind in kinds:
            return "right", first, found
        if not set(kinds) & set(best.rivals):
            return "wrong", first, found
        return ("open" if best.kind is Kind.UNDECIDED else "rival"), first, found


def trials(seed: int, names: tuple[str, ...] = (), stated: bool = True) -> Iterator[Trial]:
    """All of them; without a stated batch size those that do not misstate it."""
    for name, one in MISTAKES.items():
        for net, batch, classes, trained in itertools.product(
            BODIES, one.batches, (2, 10), (False, True)
        ):
            if (name == "mode" and net != "normed") or (names and name not in names):
                continue
            if not stated and Kind.BATCH_SIZE in one.kinds:
                continue
            yield Trial(name, net, batch, classes, trained, seed, stated)
