"""What the trials look at: the update in float64, the model, and one run of it on random data."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rgap.arithmetic.rounding import ABSENT
from rgap.diagnosis.finding import Kind
from rgap.head.behind import behind, idle
from rgap.head.ending import folded
from rgap.jacobian.batch_loss import loss_scale
from rgap.network.affine import Affine, linear
from rgap.network.chain import Chain, parse
from rgap.network.fitting import fitting_shape
from rgap.network.isolation import untouched
from rgap.network.running import run
from rgap.network.watching import LayerCall, watched
from rgap.precision import Precision
from rgap.update.losses import Loss
from rgap.update.update import Update

PROBES = 4  # random inputs that the model is run on
AUDIBLE = 3.0  # times its noise that a tensor must be to say anything
CANCELLED = 100.0  # roundings of one sample's gradient that the sum over a batch must exceed


@dataclass(frozen=True)
class Call:
    """A leaf module as the model called it on the probes.

    Attributes:
        name: module path.
        module: the module.
        given: its input.
        made: its output.
        first: no parameter stands between the data and its input.
        alone: nothing else of the network reads its input.
        read_once: its output is read once.
    """

    name: str
    module: nn.Module
    given: Tensor
    made: Tensor
    first: bool = False
    alone: bool = True
    read_once: bool = True

    @property
    def weight_name(self) -> str:
        """Name of its weight in the update."""
        return f"{self.name}.weight"

    @property
    def bias_name(self) -> str:
        """Name of its bias in the update."""
        return f"{self.name}.bias"


@dataclass(frozen=True)
class Evidence:
    """A model and an update with the model's names, ready for trials.

    Attributes:
        model: in eval mode, with the buffers that the update brought.
        update: as declared, names and order those of the model.
        gradients: float64, by parameter name; tensors of zeros are left out, which frozen layers
            send, and those that are lost in their noise.
        batch: stated batch size, or None.
        labels: known targets of the batch, or None.
        precision: of the update, with the noise that was stated.
        chain: the model as a chain of stages, up to the logits; None where it is none.
        loss: of the logits: steps behind them and formulas of probabilities are folded into it.
        calls: of leaf modules that the model called once, in the order of the calls; their
            parameters enter nowhere else.
        outputs: of the model on the probes; None where it could not be run.
        deadline: ``time.perf_counter()`` after which no further trial begins.
        usual: root mean square of the gradients of one of several samples, by parameter name.
        presumed: the batch size is not stated, and 1 because the head shows one sample; copies of
            it, and samples whose cotangent vanishes, show none.
        mixed: parameters below the highest batch norm that is in train mode in the caller's model:
            copies of one sample leave their gradients rounding over √ε, which has any rank.
        tested: kinds that some trial could have shown.
        unrun: why trials did not run, a sentence each.
    """

    model: nn.Module
    update: Update
    gradients: Mapping[str, Tensor]
    batch: int | None
    labels: Tensor | None
    precision: Precision
    chain: Chain | None
    loss: Loss
    calls: tuple[Call, ...]
    outputs: Tensor | None
    deadline: float
    usual: Mapping[str, float] = field(default_factory=dict)
    presumed: bool = False
    mixed: frozenset[str] = frozenset()
    tested: set[Kind] = field(default_factory=set)
    unrun: list[str] = field(default_factory=list)

    @property
    def sent(self) -> dict[str, Tensor]:
        """Gradients of every parameter: zeros, with the noise ``ABSENT``, of those left out."""
        lost = {n: torch.zeros_like(e) for n, e in self.precision.entries.items()}
        return {**lost, **self.gradients}

    @property
    def terms(self) -> dict[str, int]:
        """Outer products that the gradient of a layer's weight is a sum of; {} without a batch."""
        counts = {}
        for call in self.calls:
            module, made = call.module, call.made
            if self.batch is None or not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
                continue
            wide = isinstance(module, nn.Linear)
            groups = 1 if isinstance(module, nn.Linear) else module.groups
            ends = [t.shape[1:-1] if wide else t.shape[2:] for t in (call.given, made)]
            counts[call.weight_name] = self.batch * groups * max(prod(e) for e in ends)
        return counts

    @property
    def late(self) -> bool:
        """True if the time is spent."""
        return time.perf_counter() > self.deadline

    @property
    def unit(self) -> float:
        """Unit roundoff of the client's arithmetic."""
        return self.precision.unit

    def added(self, name: str) -> float:
        """Root mean square of the noise that is known to be in a gradient."""
        like = self.gradients.get(name)
        return 0.0 if like is None else self.precision.noise_rms(name, like)

    @property
    def stated(self) -> float:
        """Largest share of any tensor of the update that the noise known to be in it may be."""
        if not self.precision.noisy:
            return 0.0
        sizes = ((n, g, float(g.norm())) for n, g in self.gradients.items())
        return max((self.precision.noise_length(n, g) / s for n, g, s in sizes if s), default=0.0)

    def affine(self, call: Call) -> Affine:
        """A fully connected layer as the equations see it."""
        module = self.model.get_submodule(call.name)
        assert isinstance(module, nn.Linear)
        bias = None if module.bias is None else f"{call.name}.bias"
        shape = (module.in_features,)
        return linear(call.name, module.weight, module.bias, (f"{call.name}.weight", bias), shape)

    def linear(self, call: Call) -> tuple[Tensor, Tensor | None] | None:
        """∂W and ∂b of a fully connected layer applied once a sample, or None."""
        if not isinstance(call.module, nn.Linear) or call.given.ndim != 2:
            return None
        if call.weight_name not in self.gradients:
            return None
        return self.gradients[call.weight_name], self.gradients.get(call.bias_name)

    @property
    def dense(self) -> list[tuple[Call, Tensor, Tensor | None]]:
        """Fully connected layers with ∂W and ∂b of samples that do not mix, in their order."""
        layers = []
        for call in self.calls:
            pair = None if call.weight_name in self.mixed else self.linear(call)
            if pair is not None:
                layers.append((call, *pair))
        return layers

    @property
    def head(self) -> tuple[Call, Tensor, Tensor | None] | None:
        """The fully connected layer that gives the logits, the argument of the loss, or None."""
        last = None if self.chain is None else self.chain.stages[-1]
        for call, weight, bias in reversed(self.dense):
            if last is not None and last.affine.weight_name == call.weight_name:
                if all(idle(op) for op in last.tail):
                    return call, weight, bias
            elif self.outputs is not None and torch.equal(call.made, self.outputs):
                return call, weight, bias
        return None

    @property
    def folded(self) -> bool:
        """True if the loss of the logits is another than that of the model's outputs."""
        return self.loss.name != self.update.loss.name or not self.loss.plain

    def feeds(self, made: Tensor, given: Tensor) -> bool:
        """True if a module's input is another's output, reshaped at most."""
        return made.data_ptr() == given.data_ptr() and made.numel() == given.numel()


def gather(
    model: nn.Module,
    update: Update,
    batch: int | None,
    labels: Tensor | None,
    input_shape: tuple[int, ...] | None,
    precision: Precision,
    deadline: float,
) -> Evidence:
    """Evidence of an update whose names are the model's.

    Raises:
        ValueError: the model takes no samples of the shape that was stated.
    """
    place = next(model.parameters()).device
    twin = copy.deepcopy(model).eval()
    own = dict(twin.named_buffers())
    for name, sent in update.buffers.items():
        if name in own and own[name].shape == sent.shape:
            own[name].copy_(sent)
    for parameter in twin.parameters():
        parameter.requires_grad_()
    stated = input_shape or update.input_shape
    shape = stated or _shape_of(twin)
    sizes = {} if shape is None or batch == 1 else usual(twin, shape, update.loss, batch)
    doubles = {n: g.detach().to(place, torch.float64) for n, g in update.gradients.items()}
    gradients = {n: g for n, g in doubles.items() if _audible(n, g, precision, sizes.get(n, 0.0))}
    lost = {n: torch.full_like(g, ABSENT) for n, g in doubles.items() if n not in gradients}
    if lost:
        precision = replace(precision, entries={**precision.entries, **lost})
    calls: tuple[Call, ...] = ()
    outputs: Tensor | None = None
    chain: Chain | None = None
    why = "the shape of a sample is not known; write input_shape=(3, 32, 32), or that of the client"
    if shape is not None:
        calls, outputs, why = _run(twin, shape)
        chain = _parsed(twin, shape, why if stated else "")
    loss = update.loss
    if chain is not None:
        chain, loss = behind(*folded(chain, loss, batch))
    return Evidence(
        twin,
        update,
        gradients,
        batch,
        labels,
        precision,
        chain,
        loss,
        calls,
        outputs,
        deadline,
        sizes,
        mixed=_mixed(model, calls),
        unrun=[f"those that run the network: {why}"] if why else [],
    )


def _mixed(model: nn.Module, calls: Sequence[Call]) -> frozenset[str]:
    """Parameters of the layers that are called before the last batch norm in train mode."""
    modes = {n for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.training}
    last = max((place for place, call in enumerate(calls) if call.name in modes), default=0)
    return frozenset(n for call in calls[:last] for n in (call.weight_name, call.bias_name))


def _parsed(model: nn.Module, shape: tuple[int, ...], failed: str) -> Chain | None:
    """The model as a chain, None where it is none.

    Args:
        model: in eval mode.
        shape: of a sample.
        failed: why the model does not run on samples of this shape, which somebody stated.

    Raises:
        ValueError: it does not, and runs on samples of another shape.
    """
    wrong = failed and fitting_shape(model, shape) is not None
    try:
        chain = parse(model, shape)
    except ValueError:
        if wrong:
            raise
        return None
    if wrong:
        raise ValueError(failed)
    return chain if chain.stages else None


def _audible(name: str, g: Tensor, precision: Precision, usual: float) -> bool:
    """False for a tensor of zeros, for one not sent, and for one beneath its noise or rounding."""
    size = float(g.square().mean()) ** 0.5 if g.numel() else 0.0
    noise = precision.noise_rms(name, g) if precision.noisy else 0.0
    return size > max(AUDIBLE * noise, CANCELLED * precision.unit * usual)


def usual(
    model: nn.Module, shape: tuple[int, ...], loss: Loss, batch: int | None
) -> dict[str, float]:
    """Root mean square of every gradient of one sample of a batch, by parameter name.

    That of random data with a cotangent of size one at the outputs, which most losses have before
    training.  The samples of a batch may cancel, what each of them rounds does not.
    """
    twin = copy.deepcopy(model).double()
    named = dict(twin.named_parameters())
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, *shape, generator=generator, dtype=torch.float64)
    try:
        with torch.enable_grad():
            outputs = twin(x.to(next(iter(named.values())).device))
            slopes = torch.autograd.grad(outputs.norm(), list(named.values()), allow_unused=True)
    except Exception:  # as in _run
        return {}
    scale = loss_scale(loss, batch or 1, outputs[0].numel())
    sizes = zip(named, slopes, strict=True)
    return {n: scale * float(g.square().mean()) ** 0.5 for n, g in sizes if g is not None}


def _shape_of(model: nn.Module) -> tuple[int, ...] | None:
    """The input shape that the first layer implies."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    first = next((m for m in model.modules() if isinstance(m, kinds)), None)
    if isinstance(first, nn.Linear):
        return (first.in_features,)
    if first is None:
        return None
    return fitting_shape(model, (first.in_channels, *(1,) * len(first.kernel_size)))


def _run(model: nn.Module, shape: tuple[int, ...]) -> tuple[tuple[Call, ...], Tensor | None, str]:
    """Leaf modules called once with parameters of their own, and the output, on random data.

    The last is why there are none, "" where there are.
    """
    twin = copy.deepcopy(model).double()
    like = next(twin.parameters())
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(PROBES, *shape, generator=generator, dtype=torch.float64).to(like.device)
    leaves = {n: m for n, m in twin.named_modules() if not list(m.children())}
    noted: list[tuple[Call, Any, Any]] = []

    def note(call: LayerCall) -> None:
        if call.args and call.tensors:
            u, z = call.tensors
            own = Call(call.name, call.module, u.detach(), z.detach(), first=not u.requires_grad)
            noted.append((own, u.grad_fn, z.grad_fn))

    try:
        with torch.enable_grad(), untouched(twin, hooks=False), watched(leaves, leave=note):
            outputs = run(twin, x)
    except (TypeError, ValueError) as error:  # other inputs than these are no mistake of the update
        return (), None, str(error)
    count = Counter(call.name for call, _, _ in noted)
    uses, readers = _uses(outputs)
    once = tuple(
        replace(call, alone=readers[given] <= 1, read_once=readers[made] <= 1)
        for call, given, made in noted
        if count[call.name] == 1 and all(uses[id(p)] <= 1 for p in call.module.parameters())
    )
    return once, outputs.detach(), ""


def _uses(outputs: Tensor) -> tuple[Counter[int], Counter[Any]]:
    """How often every parameter enters a computation, by ``id``, and every result of it is read.

    Tied parameters enter more than once; a result is known by its ``grad_fn``.
    """
    count, readers = Counter[int](), Counter[Any]()
    seen, left = set(), [outputs.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for below, _ in node.next_functions:
            parameter = getattr(below, "variable", None)  # of the node that ends at a leaf
            if parameter is not None:
                count[id(parameter)] += 1
            readers[below] += 1
            left.append(below)
    return count, readers
