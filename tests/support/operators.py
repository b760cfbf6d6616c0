"""One row for every linear operator of the library: the object, its products, its reference.

A row makes the operators by which a class (or function) is tried: small ones, each with the
dense matrix that it stands for, or a function whose Jacobian it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from batched import batch_of
from cases import mlp, pictures
from reference import dense_blocks, dense_jacobian
from shifted import random_convolution
from torch import Tensor, nn
from torch.nn import functional as F

from rgap.analysis.joint_rank.inverses import GradientInverse, WeightInverse
from rgap.analysis.noise_bound.channel import channel
from rgap.analysis.noise_bound.defences import Clip, DifferentialPrivacy, Prune
from rgap.analysis.noise_bound.fisher import WeighedJacobian
from rgap.analysis.probe import ProbePoint
from rgap.constraints import gradient_constraint, weight_constraint
from rgap.constraints.known_input import KnownPart
from rgap.constraints.nullspace import null_directions
from rgap.constraints.partial import kept
from rgap.jacobian import layer
from rgap.jacobian.batch_loss import BatchLoss, loss_scale
from rgap.jacobian.eliminated import Eliminated
from rgap.jacobian.frontier import Frontier, Tangent
from rgap.jacobian.layer import Bilinear
from rgap.jacobian.linearisation import Linearisation
from rgap.jacobian.module_gradient import ClientLoss, ModuleGradient
from rgap.jacobian.module_update import ModuleUpdate
from rgap.jacobian.normal import Normal
from rgap.jacobian.products import GraphProducts
from rgap.network import activations as act
from rgap.network import pooling, reshape, scaling
from rgap.network.affine import Affine
from rgap.network.chain import parse
from rgap.network.flow import Flow, flow_of
from rgap.network.modules import build
from rgap.precision import Estimate, Precision
from rgap.priors.denoiser import DenoiserPrior, Features
from rgap.priors.drawn import Drawn
from rgap.priors.generator import Generator
from rgap.priors.patches import PatchPrior, Shapes
from rgap.recursion.matrix_free import MatrixFree
from rgap.separation.headless import Held
from rgap.separation.pair import Between, steps_between
from rgap.separation.shifts.refined import Linearised
from rgap.separation.softmax.coupled import Coupled
from rgap.separation.softmax.equations import AtHead
from rgap.separation.softmax.separate import likely
from rgap.separation.softmax.turns import Turns
from rgap.solvers.kronecker import Factor, Kronecker, factor
from rgap.solvers.linear import Stacked, null_projection
from rgap.solvers.positive import transposed_product
from rgap.solvers.priors import Squares, Sum, TotalVariation
from rgap.solvers.square import factored
from rgap.testing import dense
from rgap.update import loss_forms
from rgap.update.capture import capture
from rgap.update.formula import Formula, Own
from rgap.update.losses import Loss
from rgap.update.reduction import Reduction

Map = Callable[[Any], Any]


@dataclass
class Case:
    """An operator with its adjoint, its domain and what to compare it with."""

    operator: Any
    apply: Map
    adjoint: Map
    domain: Any
    reference: Tensor | Map
    at: Any = None
    slack: float = 1.0


Row = Callable[[], Iterator[Case]]
ROWS: dict[str, Row] = {}


def row(*names: str) -> Callable[[Row], Row]:
    """Register the row of classes or functions, as ``folder/file.py:Name``."""

    def add(made: Row) -> Row:
        for name in names:
            ROWS[name] = made
        return made

    return add


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def affine_of(module: nn.Module, shape: tuple[int, ...]) -> Any:
    return build(module.double(), "m", shape, {id(p): n for n, p in module.named_parameters()})


def layers() -> Iterator[tuple[nn.Module, Any]]:
    """A matrix and convolutions with stride, dilation, groups and padding on one side."""
    torch.manual_seed(0)
    for module, shape in (
        (nn.Linear(5, 4), (5,)),
        (nn.Conv1d(2, 3, 3, 2, 1), (2, 7)),
        (nn.Conv2d(4, 2, (3, 2), (2, 1), (0, 1), (1, 2), groups=2), (4, 5, 4)),
        (nn.Conv2d(2, 3, 2, padding="same", bias=False), (2, 4, 3)),
        (nn.Conv3d(1, 2, 2), (1, 3, 2, 3)),
    ):
        yield module, affine_of(module, shape)


# --- solvers -------------------------------------------------------------------------------------


class Coupling:
    """A dense second block, the simplest thing that satisfies the protocol."""

    def __init__(self, matrix: Tensor, channels: int) -> None:
        self.matrix, self.channels, self.rows = matrix, channels, matrix.shape[0]

    def apply(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.matrix.T

    def adjoint(self, y: Tensor) -> Tensor:
        return (y @ self.matrix).reshape(len(y), self.channels, -1)

    def add_gram(self, weights: Tensor, into: Tensor) -> None:
        into += ((self.matrix.T * weights) @ self.matrix).reshape(into.shape)


def blocks(groups: int = 2, rows: int = 4) -> tuple[Kronecker, Coupling, Tensor]:
    """K of four channels with five positions, six coupling rows, and both as one matrix."""
    k = Kronecker(draw(groups, rows, 5), 4)
    w = Coupling(draw(6, 20, seed=1), 4)
    own = torch.block_diag(*[k.matrix[c * groups // 4] for c in range(4)])
    return k, w, torch.cat([own, w.matrix])


@row("solvers/kronecker.py:Kronecker")
def _() -> Iterator[Case]:
    for groups in (1, 2, 4):
        k, _, matrix = blocks(groups)
        yield Case(k, k.apply, k.adjoint, (1, 4, 5), matrix[:16])


@row("solvers/linear.py:Stacked")
def _() -> Iterator[Case]:
    k, w, matrix = blocks()
    weights = draw(6).abs()
    own = Stacked(k, w, weights)
    scale = torch.cat([torch.ones(16), weights])
    yield Case(own, own.apply, own.adjoint, (20,), scale[:, None] * matrix)


def factor_of() -> tuple[Factor, Tensor]:
    k, w, matrix = blocks()
    weights = draw(6).abs()
    made = factor(k, torch.ones(2, 4, dtype=torch.float64), w, weights)
    assert isinstance(made, Factor)
    return made, torch.cat([torch.ones(16), weights])[:, None] * matrix


@row("solvers/kronecker.py:Factor")
def _() -> Iterator[Case]:
    own, matrix = factor_of()
    yield Case(own, own.apply, own.adjoint, (1, 4, 5), matrix)
    inverse = torch.linalg.inv(matrix.T @ matrix)
    slack = float(torch.linalg.cond(matrix)) ** 2
    yield Case(own, own.precondition, own.precondition, (1, 4, 5), inverse, slack=slack)


@row("rgap/constraints/partial.py:Kept")
def _() -> Iterator[Case]:
    whole, matrix = factor_of()
    values = torch.linalg.eigvalsh(matrix.T @ matrix)
    error = float((values[5] * values[6]) ** -0.25)  # between two of the directions
    own = kept(whole, matrix.T @ matrix, error)
    assert own is not None
    assert 0 < own.basis.shape[1] < 20
    yield Case(own, own.apply, own.adjoint, (1, 4, 5), matrix)
    _, s, vh = torch.linalg.svd(matrix)
    fixed = s > 1 / error
    inverse = (vh[fixed].T / s[fixed] ** 2) @ vh[fixed]
    slack = float(s[0] / s[-1]) ** 2
    yield Case(own, own.precondition, own.precondition, (1, 4, 5), inverse, slack=slack)


@row("solvers/linear.py:null_projection")
def _() -> Iterator[Case]:
    k, w, _ = blocks(rows=3)
    own = Stacked(k, w, torch.ones(6, dtype=torch.float64))
    matrix = dense(own.apply, (20,))
    basis = null_projection(own, draw(2, 20))
    projector = torch.eye(20).double() - torch.linalg.pinv(matrix) @ matrix
    assert len(basis) == 2

    def project(v: Tensor) -> Tensor:
        return basis.T @ (basis @ v)

    yield Case(null_projection, project, project, (20,), projector, slack=1e4)  # LSMR to 1e-13


@row("solvers/positive.py:transposed_product")
def _() -> Iterator[Case]:
    a = draw(6, 4)
    yield Case(transposed_product, lambda y: transposed_product(a, y), lambda x: a @ x, (6, 1), a.T)


@row("solvers/square.py:Square")
def _() -> Iterator[Case]:
    a = draw(6, 6)
    own = factored(a)
    assert own is not None
    slack = float(torch.linalg.cond(a))
    inverse = torch.linalg.inv(a)
    yield Case(own, own.solve, own.solve_transposed, (6, 1), inverse, slack=slack)


@row("solvers/priors.py:Squares")
def _() -> Iterator[Case]:
    own, x = Squares(2.0, 0.3), draw(2, 1, 3, 4)
    bend = own.curvature(x)
    yield Case(own, bend, bend, x.shape, torch.func.grad(own.value), at=x)


def lagged(prior: TotalVariation, x: Tensor) -> Tensor:
    """Dᵀ diag(factor) D of the differences and their weights at x."""
    differences = dense(prior._bends, x.shape)
    bends = prior._bends(x)
    factors = prior._factor(prior._squares(bends)).expand(bends.shape).flatten()
    return differences.T @ (factors[:, None] * differences)


@row("solvers/priors.py:TotalVariation")
def _() -> Iterator[Case]:
    for own in (
        TotalVariation(),
        TotalVariation(isotropic=False, power=0.5),
        TotalVariation(order=2, chroma=3.0),
    ):
        x = draw(2, 3, 4, 3)
        bend = own.curvature(x)
        yield Case(own, bend, bend, x.shape, lagged(own, x))


@row("solvers/priors.py:Sum")
def _() -> Iterator[Case]:
    parts, x = (TotalVariation(0.5), Squares(2.0)), draw(1, 1, 3, 4)
    own = Sum(parts)
    bend = own.curvature(x)
    expected = lagged(parts[0], x) + 2.0 / 12 * torch.eye(12).double()
    yield Case(own, bend, bend, x.shape, expected)


@row("rgap/priors/patches.py:PatchPrior")
def _() -> Iterator[Case]:
    roots, x = draw(2, 4, 4), draw(1, 1, 4, 3)
    weights = torch.full((2, 2), 0.25).double()
    shapes = Shapes.of(roots @ roots.mT, torch.tensor([0.5, 2.0]), weights, 1, 0.1)
    own = PatchPrior(shapes)
    bend, n = own.curvature(x), 6 * 4
    expected = torch.zeros(12, 12).double()
    cut = dense(own._patches, x.shape).reshape(6, 4, 12)
    back, members = own._assigned(own._patches(x))
    inner = torch.cat([m.basis * m.bends[:, None] @ m.basis.T for m in members])[back]
    for rows, middle in zip(cut, inner, strict=True):
        expected += rows.T @ middle @ rows / n
    yield Case(own, bend, bend, x.shape, expected)


def seen(own: DenoiserPrior) -> Callable[[Tensor], Tensor]:
    """f of pictures as the prior sees them."""
    return lambda x: own._seen(x)[0]


def small_features() -> Features:
    """Of pictures with two channels."""
    kernels = [draw(3, 2, 4, 4), draw(2, 3, 3, 3, seed=1)]
    return Features(kernels, [draw(3), draw(2)], [draw(3, seed=2), draw(2, seed=3)])


@row("rgap/priors/denoiser.py:Features")
def _() -> Iterator[Case]:
    own, x, sigma = small_features(), draw(1, 2, 5, 4), torch.tensor([0.1]).double()
    _, slopes = own.layers(x, sigma)
    j = torch.autograd.functional.jacobian(lambda u: own.layers(u, sigma)[0], x).reshape(-1, 40)

    def push(v: Tensor) -> Tensor:
        return own.push(v, slopes)

    def pull(w: Tensor) -> Tensor:
        return own.pull(w, slopes, x.shape)

    yield Case(own, push, pull, x.shape, j)


@row("rgap/priors/denoiser.py:DenoiserPrior")
def _() -> Iterator[Case]:
    own, x = DenoiserPrior(small_features(), 2.0).smoothed(0.1), draw(1, 2, 5, 4)
    bend = own.curvature(x)
    j = torch.autograd.functional.jacobian(seen(own), x).reshape(-1, 40)
    yield Case(own, bend, bend, x.shape, 2.0 / 40 * j.T @ j)


@row("rgap/priors/drawn.py:Drawn")
def _() -> Iterator[Case]:
    line, spread, x = nn.Linear(3, 8, bias=False).double(), 0.3, draw(2, 8)
    line.weight.data.copy_(draw(8, 3, seed=1))
    own = Drawn(Generator(nn.Sequential(line), (3,)), spread, weight=2.0)
    bend = own.curvature(x)
    a = line.weight.detach()
    one = torch.linalg.inv(a @ a.T + spread**2 * torch.eye(8).double())
    yield Case(own, bend, bend, x.shape, 2.0 / 16 * torch.block_diag(one, one))


# --- the network ---------------------------------------------------------------------------------


@row("rgap/network/affine.py:Affine")
def _() -> Iterator[Case]:
    for module, affine in layers():
        shape = (2, *affine.in_shape)
        yield Case(affine, affine.linear, affine.adjoint, shape, module)


@cache
def steps() -> list[tuple[reshape.Op, Map]]:
    """Steps, with the function of [B, ...] that each stands for."""
    return list(_steps())


def _steps() -> Iterator[tuple[reshape.Op, Map]]:
    x = (3, 4, 4)
    scale, shift = draw(3, 1, 1), draw(3, 4, 4, seed=1)
    norm = nn.BatchNorm2d(3).double().eval()
    norm.running_var.copy_(draw(3).abs() + 0.1)
    yield reshape.Reshape("s", "flatten", x, (48,)), lambda u: u.flatten(1)
    index = torch.tensor([[1, 1], [0, 4]])
    yield reshape.Rearrange("s", "slice", (5,), index), lambda u: u[:, index]
    yield reshape.Pad("s", x, (1, 0, -1, 2), 0.5), lambda u: F.pad(u, (1, 0, -1, 2), value=0.5)
    yield scaling.Scale("s", "scale", x, scale, shift), lambda u: scale * u + shift
    yield affine_of(norm, x), norm
    for module in (
        nn.AvgPool2d(2), nn.AvgPool2d(3, 2, 1, True, False), nn.AdaptiveAvgPool2d((3, 2)),
        nn.MaxPool2d(3, 2, 1), nn.LPPool2d(2, 2), nn.AdaptiveMaxPool2d(2), nn.Softmax(1),
        nn.ReLU(), nn.LeakyReLU(0.2), nn.Sigmoid(), nn.Tanh(), nn.ELU(0.7), nn.CELU(0.5), nn.SELU(),
        nn.Softplus(2.0), nn.Softsign(), nn.LogSigmoid(), nn.GELU(), nn.Hardtanh(), nn.PReLU(3),
    ):  # fmt: skip
        yield affine_of(module, x), module
    yield act.Identity("s", x), lambda u: u


def of_kind(kind: type[reshape.Op]) -> Row:
    """The row of a step: its transpose at a point, and that of its linear part."""

    def made() -> Iterator[Case]:
        for op, function in steps():
            if type(op) is not kind:
                continue
            x = draw(1, *op.in_shape)

            def push(dx: Tensor, op: Any = op, x: Tensor = x) -> Tensor:
                return torch.func.jvp(op.forward, (x,), (dx,))[1]

            def pull(k: Tensor, op: Any = op, x: Tensor = x) -> Tensor:
                return op.pull(x, k)

            yield Case(op, push, pull, x.shape, function, at=x)
            if op.affine:
                yield Case(op, op.linear, op.adjoint, x.shape, function)

    return made


STEPS = {
    "rgap/network/reshape.py": (reshape.Reshape, reshape.Rearrange, reshape.Pad),
    "rgap/network/scaling.py": (scaling.Scale, scaling.BatchNorm),
    "rgap/network/pooling.py": (pooling.LinearMap, pooling.MaxPool, pooling.Opaque, pooling.Pool),
    "rgap/network/activations/piecewise.py": (
        act.Identity, act.ReLU, act.LeakyReLU, act.PReLU, act.Opaque,
    ),
    "rgap/network/activations/smooth.py": (
        act.Sigmoid, act.Tanh, act.ELU, act.CELU, act.SELU, act.Softplus, act.Softsign,
        act.LogSigmoid,
    ),
}  # fmt: skip
ROWS |= {
    f"{file}:{kind.__name__}": of_kind(kind) for file, kinds in STEPS.items() for kind in kinds
}


# --- one layer -----------------------------------------------------------------------------------


def coupled(linear: bool) -> Iterator[Case]:
    for module, affine in layers():
        if (affine.geometry is None) is not linear:
            continue
        own = weight_constraint(affine, 2)
        table = own.unfold(draw(2, *affine.in_shape))
        rows = dense_blocks(module, draw(2, *affine.out_shape), affine.in_shape)[1]
        order = dense(own.fold, table.shape)
        yield Case(own, own.apply, own.adjoint, table.shape, rows @ order)
        yield Case(own, own.fold, own.unfold, table.shape, order)


@row("rgap/constraints/linear.py:WeightConstraint")
def _() -> Iterator[Case]:
    return coupled(True)


@row("rgap/constraints/convnd.py:WeightConstraint")
def _() -> Iterator[Case]:
    return coupled(False)


@row("rgap/recursion/matrix_free.py:MatrixFree")
def _() -> Iterator[Case]:
    for module, affine in layers():
        k = draw(2, *affine.out_shape)
        ones = torch.ones(2, *affine.in_shape).double()
        rows, weight, scale = draw(len(affine.weight)).abs(), draw(*k.shape, seed=1), 2.0 * ones
        own = MatrixFree(
            affine, k, rows.reshape(-1, *[1] * (affine.weight.ndim - 1)), weight, scale
        )
        first, second = dense_blocks(module, k, affine.in_shape)
        each = rows.repeat_interleave(affine.weight[0].numel())
        matrix = torch.cat([each[:, None] * first, weight.flatten()[:, None] * second])
        yield Case(own, own.apply, own.adjoint, (ones.numel(),), 2.0 * matrix)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.d = nn.Conv2d(2, 3, 3, 1, 1), nn.Conv2d(3, 3, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.c(x))
        return torch.cat([torch.tanh(self.d(h)) - h, h], 1)


@row("rgap/jacobian/frontier.py:Tangent")
def _() -> Iterator[Case]:
    torch.manual_seed(0)
    flow = flow_of(Branches().double(), (2, 4, 4))
    assert isinstance(flow, Flow)
    last, h = len(flow.nodes) - 1, flow.users(1)[0]
    shapes = {place: flow.nodes[place].shape for place in (h, last)}
    known = {p: Estimate(draw(1, *s), draw(3, 1, *s)) for p, s in shapes.items()}
    function, x = Frontier(flow, [h, last], known), draw(1, 2, 4, 4)
    sigma = [1.0 + draw(*s, seed=1).abs() for s in shapes.values()]
    own = Tangent(function, sigma, x)

    def scaled(x: Tensor) -> Tensor:
        parts = zip(function(x), sigma, strict=True)
        return torch.cat([(f[0] / s).flatten() for f, s in parts]) * own.unit

    matrix = torch.autograd.functional.jacobian(scaled, x).flatten(1)
    yield Case(own, lambda v: own.push(v)[0], lambda r: own.pull(r[None]), x.shape, matrix)


def known_part(affine: Affine, u: Tensor, k: Tensor) -> KnownPart:
    """What a layer knows of its input u from its weight gradient, the true z = A u + b and k."""
    z, precision = affine.forward(u), Precision(u.dtype)
    known = [Estimate(t, precision.rounding(t)) for t in (z, k)]
    return KnownPart.of(affine, affine.weight_gradient(u, k), *known, precision)


@row("rgap/constraints/known_input.py:KnownPart")
def _() -> Iterator[Case]:
    for _, affine in layers():
        u, k = draw(2, *affine.in_shape), draw(2, *affine.out_shape, seed=1)
        own = known_part(affine, u, k)
        amplified = float(1 + own.rest.norm() * dense(affine.linear, u.shape).norm())
        yield Case(own, own.push, own.pull, u.shape, own.misfit, slack=amplified)


@row("rgap/constraints/nullspace.py:null_directions")
def _() -> Iterator[Case]:
    torch.manual_seed(0)
    module = nn.Conv2d(2, 2, 3, 2)
    affine = affine_of(module, (2, 5, 5))
    k = draw(1, *affine.out_shape)
    rows = torch.cat(dense_blocks(module, k, affine.in_shape))
    null = torch.eye(50).double() - torch.linalg.pinv(rows) @ rows
    count = round(float(null.trace()))
    active = torch.ones_like(k, dtype=torch.bool)
    basis = null_directions(affine, k, active, count, count).flatten(1)
    assert len(basis) == count > 0

    def project(v: Tensor) -> Tensor:
        return basis.T @ (basis @ v)

    yield Case(null_directions, project, project, (50,), null, slack=1e6)  # LSMR to 1e-13


@row("rgap/jacobian/layer.py:Bilinear")
def _() -> Iterator[Case]:
    for module, affine in layers():
        u, k = draw(2, *affine.in_shape), draw(2, *affine.out_shape, seed=1)
        own = Bilinear(affine, u, k)
        values = {name: p.detach() for name, p in module.named_parameters()}

        def gradient(at: Any, module: nn.Module = module, values: Any = values) -> Any:
            def value(parameters: dict[str, Tensor]) -> Tensor:
                out = torch.func.functional_call(module, parameters, (at[0][0],))
                return (out * at[1][0]).sum()

            return torch.func.grad(value)(values)

        yield Case(
            own,
            lambda v, own=own: own.push(*v),
            lambda y, own=own: (own.pull_u(y), own.pull_k(y)),
            (u[None], k[None]),
            gradient,
            at=(u[None], k[None]),
        )


@row("rgap/separation/softmax/turns.py:State")
def _() -> Iterator[Case]:
    for size, classes in ((4, 9), (6, 12)):
        head = nn.Linear(16, classes).double()
        x, y = draw(size, 16).clamp(0.0, 1.0), torch.ones(size, dtype=torch.long)
        batch = batch_of(nn.Sequential(head), x, y)
        top, scale = batch.mixture(0), loss_scale(batch.loss, size, classes)
        problem = Coupled(top, y, scale, 0.0, batch.precision)
        truth = (x @ top.right - problem.origin) @ problem.directions
        state = Turns.of(problem, truth).at(truth + 0.2)
        inside = torch.eye(size).double() - torch.ones(size, size).double() / size  # P 1 = 0
        rows = [
            state.push((unit.reshape(size, size)) @ inside).flatten()
            for unit in torch.eye(size * size).double()
        ]
        yield Case(
            state,
            lambda v, s=state, n=size, q=inside: s.push(v.reshape(n, n) @ q).flatten(),
            lambda r, s=state, n=size: s.pull(r.reshape(-1, n)).flatten(),
            (size * size,),
            torch.stack(rows, 1),
        )


# --- the whole update ----------------------------------------------------------------------------


def linearised(loss: bool) -> tuple[nn.Module, Tensor, Tensor, Linearisation]:
    """A small network, its batch, targets, and the linearised update."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))
    model = model.double().eval()
    x, y = draw(2, 1, 3, 3).sigmoid(), torch.tensor([2, 0])
    chain = parse(model, (1, 3, 3))
    one_hot = F.one_hot(y, 3).double()
    head: Tensor | BatchLoss = draw(2, 3, seed=1)
    if loss:
        head = BatchLoss(Loss(), one_hot, torch.ones(2).double())
    return model, x, y, Linearisation(chain, x, head)


def update_jacobian() -> Tensor:
    """∂(∂L/∂θ)/∂x of :func:`linearised` by autograd, [equations, unknowns]."""
    model, x, y, _ = linearised(True)
    return torch.cat(list(dense_jacobian(model, x, y, "cross_entropy").values()))


@row("rgap/jacobian/linearisation.py:Linearisation")
def _() -> Iterator[Case]:
    model, x, _, held = linearised(False)
    values = {name: p.detach() for name, p in model.named_parameters()}

    def gradient(at: Any) -> Any:
        def value(parameters: dict[str, Tensor]) -> Tensor:
            out = torch.func.functional_call(model, parameters, (at[0][0],))
            return (out * at[1][0]).sum()

        return torch.func.grad(value)(values)

    both = (x[None], held.kappa[None])
    yield Case(held, lambda v: held.jvp(*v), held.pulls, both, gradient, at=both)
    own = linearised(True)[3]
    yield Case(own, own.jvp, own.vjp, x[None], update_jacobian())


def weights_of(point: Linearisation) -> dict[str, Tensor]:
    return {
        n: 0.5 + draw(len(g)).abs().reshape(-1, *[1] * (g.ndim - 1))
        for n, g in point.gradients().items()
    }


def weight_vector(point: Linearisation) -> Tensor:
    weights, rows = weights_of(point), point.gradients()
    return torch.cat([weights[n].expand(rows[n].shape).flatten() for n in rows])


@row("rgap/jacobian/normal.py:Normal")
def _() -> Iterator[Case]:
    point = linearised(True)[3]
    own, matrix = Normal(point, weights_of(point)), update_jacobian()
    weighed = weight_vector(point)[:, None] ** 2 * matrix
    rows = {n: g[None] for n, g in point.gradients().items()}
    yield Case(own, own.apply, own.apply, point.x[None], matrix.T @ weighed)

    def back(v: Tensor) -> dict[str, Tensor]:
        return {n: weights_of(point)[n] ** 2 * r for n, r in point.jvp(v).items()}

    yield Case(own, own.adjoint, back, rows, weighed.T)


@row("rgap/jacobian/normal.py:Factored")
def _() -> Iterator[Case]:
    point = linearised(True)[3]
    own = Normal(point, weights_of(point)).factored()
    assert own is not None
    matrix = weight_vector(point)[:, None] * update_jacobian()
    inverse = torch.linalg.inv(matrix.T @ matrix)
    slack = float(torch.linalg.cond(matrix)) ** 2
    yield Case(own, own.inverse, own.inverse, point.x[None], inverse, slack=slack)


@row("rgap/jacobian/eliminated.py:Eliminated")
def _() -> Iterator[Case]:
    point = linearised(False)[3]
    weights = weights_of(point)
    own = Eliminated.of(point, weights)
    assert own is not None
    u = dense(lambda dk: point.jvp(None, dk), point.kappa[None])
    inner = weight_vector(point)[:, None] ** 2 * u
    left = torch.eye(len(u)).double() - u @ torch.linalg.solve(inner.T @ u, inner.T)

    def transposed(y: dict[str, Tensor]) -> dict[str, Tensor]:
        part = own.explained({n: r / weights[n] ** 2 for n, r in y.items()})[1]
        return {n: r * weights[n] ** 2 for n, r in part.items()}

    rows = {n: g[None] for n, g in point.gradients().items()}
    yield Case(own, lambda r: own.explained(r)[1], transposed, rows, left, slack=10)


@row("rgap/jacobian/batch_loss.py:BatchLoss", "rgap/separation/headless.py:Held")
def _() -> Iterator[Case]:
    z, share = draw(3, 4), torch.tensor([1.0, 2.0, 1.0]).double()
    for loss in (Loss(), Loss(label_smoothing=0.2), Loss("mse_loss"), Loss("mse_loss", "sum")):
        own = BatchLoss(loss, F.one_hot(torch.tensor([1, 3, 1]), 4).double(), share)
        yield Case(own, *[lambda v, own=own: own.curvature(z, v)] * 2, (1, 3, 4), own.cotangent, z)
    held = Held.of(z)
    yield Case(held, *[lambda v: held.curvature(z, v)] * 2, (1, 3, 4), torch.zeros(12, 12))


def loss_form(kind: type) -> Row:
    def made() -> Iterator[Case]:
        y = torch.softmax(draw(3, 4, seed=1), 1)
        if kind in (loss_forms.Focal, loss_forms.SigmoidFocal):
            y = F.one_hot(torch.tensor([1, 3, 1]), 4).double()
        z = draw(3, 4)
        if kind is loss_forms.LogProbabilities:
            z = torch.log_softmax(z, 1)
        if kind is loss_forms.BinaryProbabilities:
            z = torch.sigmoid(z)
        form, options = kind(), loss_forms.Options(None, None, 0.0, 2.0, None)

        def value(at: Tensor) -> Tensor:
            if kind is loss_forms.BinaryProbabilities:  # PyTorch's own bends at 1e-12
                return -(y * at.log() + (1 - y) * (1 - at).log()).sum()
            return form.value(at, y, options)

        slope = torch.func.grad(value)

        yield Case(form, *[lambda v: form.curvature(z, y, v, options)] * 2, z.shape, slope, at=z)

    return made


ROWS |= {
    f"rgap/update/loss_forms.py:{name}": loss_form(getattr(loss_forms, name))
    for name in (
        "CrossEntropy", "LogProbabilities", "Focal", "BinaryLogits", "BinaryProbabilities",
        "SigmoidFocal", "Squared",
    )
}  # fmt: skip


@row("rgap/update/formula.py:Formula", "rgap/update/formula.py:Own")
def _() -> Iterator[Case]:
    z, y = draw(3, 4), torch.softmax(draw(3, 4, seed=1), 1)
    by_samples, by_weight = Reduction(True, True), Reduction(True, True, (1.0, 2.0, 1.0, 3.0))
    for own in (
        Formula("cross_entropy", by_samples, smoothing=0.2),
        Formula("cross_entropy", by_weight, weight=by_weight.weight),
        Formula("mse_loss", Reduction(False, False)),
        Own("fourth powers", lambda z, y: (z - y).pow(4).sum()),
    ):
        slope = torch.func.grad(lambda at, own=own: own.value(at, y))
        yield Case(own, *[lambda v, own=own: own.curvature(z, y, v)] * 2, z.shape, slope, at=z)


@row("rgap/jacobian/layer.py:pull")
def _() -> Iterator[Case]:
    for op, function in steps():
        if not (op.affine or isinstance(op, (act.Tanh, act.Opaque))):
            continue
        x = draw(1, *op.in_shape)
        yield Case(
            layer.pull,
            lambda v, op=op, x=x: layer.push(op, x, v),
            lambda k, op=op, x=x: layer.pull(op, x, k),
            x[None],
            lambda at, function=function: function(at[0]),
            at=x[None],
        )


@row("rgap/jacobian/products.py:GraphProducts")
def _() -> Iterator[Case]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.GELU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3)
    )
    x, y = draw(2, 1, 5, 5).sigmoid(), torch.tensor([1, 2])
    sent = capture(model.double().eval(), x, y).gradients
    update = ModuleUpdate(model, sent, ClientLoss(Loss(), y), tuple(x.shape))
    own = GraphProducts(update.rows, x + 0.1)
    yield Case(own, own.push, own.pull, x.shape, update.rows, at=x + 0.1)
    yield Case(own, own.push, lambda y: own.pulls(y[None])[0], x.shape, update.rows, at=x + 0.1)
    module, x, y, _ = linearised(True)
    names = [name for name, _ in module.named_parameters()]
    at = ModuleGradient(copy.deepcopy(module), ClientLoss(Loss(), y), names).at(x)
    yield Case(at, at.push, at.pull, x.shape, update_jacobian())


def probe() -> ProbePoint:
    model, x, y, _ = linearised(True)
    return ProbePoint.of(model, x, Loss(), y)


@row("rgap/jacobian/update_map.py:UpdateMap")
def _() -> Iterator[Case]:
    for forward in (True, False):
        own = probe().update
        own.forward_mode = forward
        yield Case(own, own.columns, own.pulls, own.inputs[None], update_jacobian())


# --- separation ----------------------------------------------------------------------------------


@row("rgap/separation/shifts/refined.py:Linearised")
def _() -> Iterator[Case]:
    for seed in (0, 3):
        case = random_convolution(seed, 24)
        affine, k, x = case.affine, case.cotangents, case.inputs
        own = Linearised(affine, k, x)

        def gradient(v: Tensor, own: Any = own) -> Tensor:
            dk, dx = own.moved(v)
            return own.affine.weight_gradient(own.x + dx[0], own.k + dk[0])[None]

        def push(v: Tensor, own: Any = own) -> Tensor:
            dk, dx = own.moved(v)
            by_k = own.affine.weight_gradient(own.x, dk[0])
            return (by_k + own.affine.weight_gradient(dx[0], own.k))[None]

        def pull(g: Tensor, own: Any = own) -> Tensor:
            return own.adjoint(g[0])[None]

        zeros = torch.zeros(1, own.size, dtype=torch.float64)
        yield Case(own, push, pull, zeros, gradient, at=zeros)


def projections(own: Any) -> Iterator[Case]:
    size = len(own.basis)
    projector = torch.eye(size).double() - own.basis @ own.basis.T
    yield Case(own, own.project, own.project, (1, size), projector)


@row("rgap/separation/pair.py:Between")
def _() -> Iterator[Case]:
    batch = batch_of(mlp("gelu", 1, widths=(12, 10)), pictures(3, 1), torch.tensor([0, 1, 1]))
    at = steps_between(batch.chain, 0)
    assert not isinstance(at, str)
    yield from projections(Between.of(batch.mixture(0), batch.mixture(1), at, batch.precision))


@row("rgap/separation/softmax/equations.py:AtHead")
def _() -> Iterator[Case]:
    y = torch.tensor([3, 20, 7])
    batch = batch_of(mlp("gelu", 2, widths=(10,), classes=30), pictures(3, 1), y)
    head = batch.mixture(1)
    own = AtHead.of(head, 0.0, *likely(head), batch.precision).labelled(y)
    yield from projections(own)
    small = own.sketched()
    assert small.sketch is not None
    rows = small.sketch.rows
    yield Case(small, small.project, lambda f: f @ rows.T, (1, 30), rows.T)


# --- analysis ------------------------------------------------------------------------------------


@row("analysis/joint_rank/inverses.py:WeightInverse")
def _() -> Iterator[Case]:
    torch.manual_seed(0)
    for width, out in ((4, 4), (4, 7), (7, 4)):
        module = nn.Linear(width, out)
        own = WeightInverse(affine_of(module, (width,)))
        weight = module.weight.detach()
        inverse = torch.linalg.pinv(weight)
        slack = float(torch.linalg.cond(weight)) ** 2

        def solved(z: Tensor, own: WeightInverse = own) -> tuple[Tensor, Tensor]:
            return own.solve(z)

        def back(y: Any, inverse: Tensor = inverse, weight: Tensor = weight) -> Tensor:
            return y[0] @ inverse + y[1] - y[1] @ (weight @ inverse)

        left = torch.eye(out).double() - weight @ inverse
        yield Case(own, solved, back, (1, out), torch.cat([inverse, left]), slack=slack)


@row("analysis/joint_rank/inverses.py:GradientInverse")
def _() -> Iterator[Case]:
    for _, affine in layers():
        k = draw(2, *affine.out_shape)
        kronecker = gradient_constraint(affine, k)
        own = GradientInverse(affine, 2, kronecker.matrix, None, 0.0, torch.float64)
        _, rows, size = kronecker.matrix.shape
        coupling = weight_constraint(affine, 2)
        channels = kronecker.channels
        table = dense(kronecker.apply, (1, channels, size))
        inverse = torch.linalg.pinv(table, rtol=1e-10)
        left = torch.eye(len(table)).double() - table @ inverse
        order = dense(coupling.fold, (1, channels, size))
        matrix = torch.cat([order @ inverse, left])

        def back(y: Any, matrix: Tensor = matrix, shape: Any = (1, channels, rows)) -> Tensor:
            return (torch.cat([part.flatten() for part in y]) @ matrix).reshape(shape)

        slack = float(torch.linalg.cond(kronecker.matrix).max()) + 10
        yield Case(own, own.split, back, (1, channels, rows), matrix, slack=slack)


CHAINS = ((Clip(0.1), Prune(0.5)), (DifferentialPrivacy(0.1, 0.2, True),))


@row("analysis/noise_bound/channel.py:Channel")
def _() -> Iterator[Case]:
    point = probe()
    for chain in CHAINS:
        own = channel(point, 1e-3, chain)
        for part in range(own.parts):
            matrix = torch.eye(point.update.equations).double()
            if own.units is not None:
                unit = own.units[part]
                matrix = own.scales[part] * (matrix - unit[:, None] * unit)

            def clipped(r: Tensor, own: Any = own, part: int = part) -> Tensor:
                return own.clipped(r, part)

            yield Case(own, clipped, clipped, (1, point.update.equations), matrix)


@row("analysis/noise_bound/fisher.py:WeighedJacobian")
def _() -> Iterator[Case]:
    point = probe()
    for chain in CHAINS:
        own = WeighedJacobian(point.update, channel(point, 1e-3, chain))
        total = 0.0
        for b in range(own.channel.parts):
            rows = update_jacobian().T.clone()
            if own.channel.parts > 1:
                kept_rows = torch.zeros(2, 9).double()
                kept_rows[b] = 1.0
                rows = rows * kept_rows.flatten()[:, None]
            total = total + own.channel.clipped(rows, b)
        matrix = (total * own.channel.weights.sqrt()).T
        yield Case(own, own.columns, own.rows, point.inputs[None], matrix, slack=10)
