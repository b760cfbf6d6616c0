"""How far data are from what a generator draws: a generator as the prior of a completion.

With codes z ~ N(0, 1) and data x ~ N(G(z), s²) around what is drawn, the data are as likely as

    prior(x) = 1/n Σ_b min_z [ ‖x_b − G(z)‖² / (2 s²) + ‖z‖² / 2 ],

of n entries.  A search over codes alone can give nothing that G does not draw; here what equations
say of x stays, and what they leave open goes to the nearest drawing (Bora et al. 2017 have the
search, Dhar, Grover and Ermon 2018 data beside the range of a generator).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import inf

import torch
from torch import Tensor, nn
from torch.func import jvp, vmap

from rgap import validation
from rgap.priors.generator import Generator
from rgap.remedy import Remedy
from rgap.solvers.priors import Operator

__all__ = ["Drawn"]

STARTS = 256  # drawings that the first codes are chosen among
ROUNDS, MORE = 12, 3  # Levenberg–Marquardt steps for the first codes, and from codes near by
BEGUN, DAMPED = 1e-3, (1e-9, 1e6)  # the first damping, and where it is kept
STILL = 1e-3  # relative decrease that ends them
TOGETHER = 16  # directions that a generator is differentiated along at once
CODES = 512  # numbers of a code at most: the generator is differentiated along each of them
LAYERS = 6  # outputs of the largest layer that are held at a time, as measured
HELD = 4  # copies of all slopes that a step of the codes holds


INSTEAD = Remedy(
    "rgap.match(..., method='gifd', generator=...)",
    "rgap match MODEL UPDATE --method gifd --generator NETWORK",
)


@dataclass(frozen=True, eq=False)
class Fit:
    """The nearest drawings of some data.

    Attributes:
        data: that they belong to, [B, n].
        codes: z, [B, d].
        drawn: G(z), [B, n].
        slopes: ∂G/∂z there, [B, n, d].
        factor: of ``JᵀJ + s² 1``, lower, [B, d, d].
        cost: ``‖x − G(z)‖² + s² ‖z‖²``, [B].
        damping: that the next step begins with, [B].
    """

    data: Tensor
    codes: Tensor
    drawn: Tensor
    slopes: Tensor
    factor: Tensor
    cost: Tensor
    damping: Tensor


@dataclass(eq=False)
class _Last:
    """Where the codes were found last: the next ones begin there.

    Attributes:
        fit: of the last data; None: there were none.
        checked: that the generator has derivatives along directions.
    """

    fit: Fit | None = None
    checked: bool = False


@dataclass(frozen=True, eq=False)
class Drawn:
    """The prior above.

    Attributes:
        generator: fitted to the data (:meth:`~rgap.priors.generator.Generator.fitted`).
        spread: s, in units of the data.
        weight: a factor.
        seed: of the drawings that codes begin from.
        deadline: of ``time.perf_counter``, after which no step of the codes begins.

    Raises:
        ValueError: a spread or a weight that is no positive number, a generator of codes of more
            than ``CODES`` numbers, or one without derivatives along directions.

    Codes are searched until a step gains less than a thousandth: the value is then a little above
    the minimum, and the gradient is that of this bound, z held.  The codes of the last data are
    kept, and those of the next begin at them: what is kept belongs
    to one search, which begins with :meth:`cold` and can :meth:`hold` what an earlier one
    :meth:`held`.

    >>> from torch import nn
    >>> line = nn.Sequential(nn.Linear(1, 2, bias=False))
    >>> _ = line[0].weight.data.copy_(torch.tensor([[1.0], [1.0]]))
    >>> made = Generator.of(line).fitted((2,), None, torch.zeros(1))
    >>> prior = Drawn(made, spread=0.1)
    >>> beside, along = torch.tensor([[0.5, -0.5]]), torch.tensor([[0.5, 0.5]])
    >>> bool(prior.value(along) < 0.1 < prior.value(beside))
    True
    """

    generator: Generator
    spread: float
    weight: float = 1.0
    seed: int = 0
    deadline: float = inf
    last: _Last = field(default_factory=_Last, repr=False)

    def __post_init__(self) -> None:
        for name, value in (("spread", self.spread), ("weight", self.weight)):
            validation.real(name, value, 0.05)
            if not 0.0 < value < inf:
                raise ValueError(
                    f"{name}: expected a positive number, got {value!r}; write {name}=0.05"
                )
        if self._size > CODES:
            raise ValueError(
                f"generator: expected codes of at most {CODES} numbers, as the prior is "
                f"differentiated along each, got {self._size}; write "
                f"{INSTEAD}, which is not"
            )
        if self.last.checked:
            return
        code = torch.zeros(1, self._size).to(self.generator.like)
        try:
            self._at(self._drawn(code), code)
            self.last.checked = True
        except Exception as error:
            raise ValueError(
                "generator: as a prior it is differentiated along directions of its codes "
                f"(torch.func.jvp), and cannot be ({error}); write layers of torch, or "
                f"{INSTEAD}"
            ) from error

    def bytes(self, batch: int) -> float:
        """That the slopes of a batch take, and what the layers hold on the way to them."""
        held: list[int] = []

        def told(_: nn.Module, __: object, out: object) -> None:
            held.append(out.numel() if isinstance(out, Tensor) else 0)

        hooks = [m.register_forward_hook(told) for m in self.generator.blocks.modules()]
        made = self._drawn(torch.zeros(1, self._size).to(self.generator.like))
        for hook in hooks:
            hook.remove()
        slopes = HELD * batch * made.numel() * self._size
        layers = max(2 * TOGETHER * batch, TOGETHER) * max(held, default=0) * LAYERS
        return float((slopes + layers) * made.element_size())

    def cold(self, deadline: float = inf) -> Drawn:
        """The same, that remembers nothing."""
        return replace(self, deadline=deadline, last=_Last(checked=True))

    def held(self) -> dict[str, Tensor]:
        """What it remembers."""
        fit = self.last.fit
        return {} if fit is None else {n: getattr(fit, n) for n in ("data", "codes", "damping")}

    def hold(self, tensors: Mapping[str, Tensor]) -> None:
        """Remember what :meth:`held` gave."""
        if tensors:
            data, codes, damping = (
                tensors[n].to(self.generator.like) for n in ("data", "codes", "damping")
            )
            self.last.fit = replace(self._at(data, codes), damping=damping)

    def value(self, x: Tensor) -> Tensor:
        """The penalty, per entry."""
        return self._factor(x) * self.fit(x).cost.sum().to(x)

    def gradient(self, x: Tensor) -> Tensor:
        """``(x − G(z)) / (n s²)`` at the best z, by the envelope theorem."""
        off = x.flatten(1) - self.fit(x).drawn.to(x)
        return 2.0 * self._factor(x) * off.reshape(x.shape)

    def curvature(self, x: Tensor) -> Operator:
        """``(1 − J (JᵀJ + s² 1)⁻¹ Jᵀ) / (n s²)``: that of Gauss–Newton with z eliminated."""
        fit, factor = self.fit(x), 2.0 * self._factor(x)

        def apply(v: Tensor) -> Tensor:
            own = v.flatten(1).to(fit.slopes)
            codes = torch.cholesky_solve(fit.slopes.mT @ own[..., None], fit.factor)
            beside = own - (fit.slopes @ codes)[..., 0]
            return factor * beside.reshape(v.shape).to(v)

        return apply

    def smoothed(self, size: float) -> Drawn:
        """With s of at least a size: far from every drawing a step is no shorter for it."""
        return replace(self, spread=max(self.spread, size))

    def _factor(self, x: Tensor) -> float:
        return 0.5 * self.weight / (x.numel() * self.spread**2)

    def fit(self, x: Tensor) -> Fit:
        """The nearest drawings of x, [B, ...]."""
        data = x.detach().flatten(1).to(self.generator.like)
        held = self.last.fit
        if held is not None and held.data.shape == data.shape:
            if torch.equal(held.data, data):
                return self._at(data, held.codes, held)
            fit, rounds = replace(self._at(data, held.codes), damping=held.damping), MORE
        else:
            fit, rounds = self._at(data, self._begun(data)), ROUNDS
        self.last.fit = self._nearest(fit, rounds)
        return self.last.fit

    def _begun(self, data: Tensor) -> Tensor:
        """Of many codes the ones that are drawn nearest to each sample."""
        draw = torch.Generator().manual_seed(self.seed)
        codes = torch.randn(STARTS, self._size, generator=draw).to(data)
        with torch.no_grad():
            drawn = torch.cat([self._drawn(part) for part in torch.split(codes, TOGETHER)])
        costs = torch.cdist(data, drawn).square() + self.spread**2 * codes.square().sum(1)
        return codes[costs.nan_to_num(inf).argmin(1)]

    def _nearest(self, fit: Fit, rounds: int) -> Fit:
        """By Levenberg–Marquardt, every sample with its own damping."""
        for _ in range(rounds):
            if time.perf_counter() > self.deadline:
                break
            slope = fit.slopes.mT @ (fit.data - fit.drawn)[..., None]
            slope = slope[..., 0] - self.spread**2 * fit.codes
            normal = fit.slopes.mT @ fit.slopes
            ridge = self.spread**2 + fit.damping * normal.diagonal(dim1=1, dim2=2).mean(1)
            eye = torch.eye(self._size).to(fit.codes)
            step = torch.linalg.solve(normal + ridge[:, None, None] * eye, slope)
            trial = self._at(fit.data, fit.codes + step)
            better = trial.cost < fit.cost
            gained = float(((fit.cost - trial.cost) / fit.cost.clamp_min(1e-30)).max())
            damping = torch.where(better, 0.1 * fit.damping, 10.0 * fit.damping)
            fit = replace(_chosen(better, trial, fit), damping=damping.clamp(*DAMPED))
            if bool(better.all()) and gained < STILL:
                break
        return fit

    @property
    def _size(self) -> int:
        """Numbers of a code."""
        return torch.Size(self.generator.latent_shape).numel()

    def _drawn(self, codes: Tensor) -> Tensor:
        """G, flat, [B, n]."""
        made: Tensor = self.generator.blocks(codes.reshape(-1, *self.generator.latent_shape))
        return made.flatten(1)

    def _at(self, data: Tensor, codes: Tensor, held: Fit | None = None) -> Fit:
        """Drawings of some codes beside the data; what does not depend on s from an earlier fit."""

        def along(direction: Tensor) -> Tensor:
            moved: Tensor = jvp(self._drawn, (codes,), (direction.expand_as(codes),))[1]
            return moved

        if held is None:
            with torch.no_grad():
                drawn = self._drawn(codes)
                slopes = vmap(along, out_dims=2, chunk_size=TOGETHER)(
                    torch.eye(self._size).to(codes)
                )
        else:
            drawn, slopes = held.drawn, held.slopes
        eye = torch.eye(self._size).to(codes)
        factor = torch.linalg.cholesky(slopes.mT @ slopes + self.spread**2 * eye)
        off = (data - drawn).square().sum(1)
        cost = off + self.spread**2 * codes.square().sum(1)
        damping = torch.full_like(cost, BEGUN) if held is None else held.damping
        return Fit(data, codes, drawn, slopes, factor, cost, damping)


def _chosen(which: Tensor, one: Fit, other: Fit) -> Fit:
    """Sample by sample."""

    def of(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(which.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    names = ("codes", "drawn", "slopes", "factor", "cost", "damping")
    return Fit(one.data, *(of(getattr(one, name), getattr(other, name)) for name in names))
