"""The gradient of a loss by the parameters of any module, as a function of the data.

``g(x) = ∂L(f_θ(x), t)/∂θ``.  No chain of layers is needed, only activations with a second
derivative worth following.

Where closed forms found something of the input u of some layer, and the cotangent k there, the
layers above drop out: ``g_j(x) = ∂⟨k, u(x)⟩/∂θ_j`` for every parameter below.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rgap.constraints.known_input import Equations
from rgap.jacobian.products import GraphProducts
from rgap.network.isolation import plain_kernels
from rgap.network.running import run
from rgap.network.watching import LayerCall, watched
from rgap.update.local_training import LocalTraining, average
from rgap.update.losses import Loss

WHOLE = slice(None)


@dataclass(frozen=True)
class KnownFeatures:
    """What closed forms found inside the network.

    Attributes:
        layer: module path.
        shape: of the layer's input for the batch, [B, *in_shape].
        known: equations of that input.
        cotangent: k = ∂L/∂u of that input u, of its shape.
        blur: relative error of the cotangent.
    """

    layer: str
    shape: tuple[int, ...]
    known: Equations
    cotangent: Tensor
    blur: float = 0.0


@dataclass(frozen=True)
class ClientLoss:
    """The loss itself, where no closed form began.

    Attributes:
        loss: the client's.
        targets: of the batch, as the loss wants them; None where a search finds them.
        local: how the client trains between two rounds; None: it sends one gradient.
        steps: of its training.
    """

    loss: Loss
    targets: Tensor | None
    local: LocalTraining | None = None
    steps: int = 1


def watchable(model: nn.Module, layer: str) -> bool:
    """True if a layer is a module of the model: then a hook sees its input.

    A call of ``F.linear`` is a stage of the network, but no module.

    >>> watchable(nn.Sequential(nn.Linear(2, 2)), "0"), watchable(nn.Linear(2, 2), "linear")
    (True, False)
    """
    return any(name == layer for name, _ in model.named_modules(remove_duplicate=False))


class ModuleGradient:
    """``x ↦ g(x)`` of one module, with the products of its Jacobian ``∂g/∂x``.

    Args:
        model: it is kept and its ``requires_grad`` set, so give a copy: one whose forward writes
            nothing (:func:`rgap.network.batch_statistics.without_running_statistics`).
        source: the loss, or what is known inside.
        names: of the parameters θ by which the derivative is taken, in the model's order.
        watch: paths of modules whose calls are noted in every forward.
        beside: what to compute of those calls; see :meth:`gradient`.

    Raises:
        ValueError: the source is a layer that is no module of the model (see :func:`watchable`).

    >>> net = nn.Linear(2, 1, bias=False).eval()
    >>> own = ModuleGradient(net, ClientLoss(Loss("mse_loss"), torch.zeros(1, 1)), ["weight"])
    >>> x = torch.tensor([[1.0, 2.0]])
    >>> bool(torch.allclose(own.rows(x), 2 * net(x) * x))
    True
    """

    def __init__(
        self,
        model: nn.Module,
        source: KnownFeatures | ClientLoss,
        names: Collection[str],
        watch: Collection[str] = (),
        beside: Callable[[list[LayerCall]], Tensor] | None = None,
    ) -> None:
        self.model = model.requires_grad_(False)
        self.source = source
        own = {n: p for n, p in model.named_parameters() if n in names}
        self.parameters = {n: p.requires_grad_() for n, p in own.items()}
        self.calls: list[LayerCall] = []
        self._beside = beside
        if isinstance(source, KnownFeatures):
            if not watchable(model, source.layer):
                raise ValueError(
                    f"source: expected a module of the model, whose input can be watched, got "
                    f"{source.layer!r}; write the path of one of model.named_modules()"
                )
            watch = {source.layer, *watch}
        self._watched = {name: model.get_submodule(name) for name in watch}

    def rows(self, x: Tensor) -> Tensor:
        """g(x) of all parameters after one another, [m], as part of the graph of x."""
        return torch.cat([g.flatten() for g in self.gradient(x)[0].values()])

    def at(self, x: Tensor) -> GraphProducts:
        """:meth:`rows` at x [B, *input_shape], with the products of its Jacobian."""
        return GraphProducts(self.rows, x)

    def gradient(
        self, x: Tensor, targets: Tensor | None = None, *, graph: bool = True
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """g(x) by parameter name; zeros for a parameter that the loss does not depend on.

        Args:
            x: [B, *input_shape].
            targets: in place of those of the source.
            graph: by PyTorch's graph, of which reverse passes give further derivatives; else by
                function transforms, which can be batched and differentiated forwards.

        Returns:
            The gradient, and what ``beside`` gave after every forward (one a local step).
        """
        beside: list[Tensor] = []

        def step(parameters: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
            def value(at: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
                loss = self._value(x[rows], at, targets, rows)
                more = self._beside(self.calls) if self._beside else loss.new_zeros(())
                return loss, more

            if graph:
                loss, more = value(parameters)
                slopes = torch.autograd.grad(
                    loss, list(parameters.values()), create_graph=True, materialize_grads=True
                )
                own = dict(zip(parameters, slopes, strict=True))
            else:
                own, more = torch.func.grad(value, has_aux=True)(parameters)
            beside.append(more)
            return own

        parameters, source = self.parameters, self.source
        if not graph:
            parameters = {n: p.detach() for n, p in parameters.items()}
        with torch.enable_grad():
            if not parameters:
                self.run(x)
                return {}, beside
            if isinstance(source, KnownFeatures) or source.local is None:
                return step(parameters, WHOLE), beside
            return average(step, parameters, source.local, source.steps, len(x)), beside

    def reached(self, x: Tensor) -> list[str]:
        """The parameters on which the loss depends at x; after local steps, all of them."""
        names = list(self.parameters)
        if isinstance(self.source, ClientLoss) and self.source.local is not None:
            return names
        with torch.enable_grad():
            value = self._value(x, self.parameters)
            if not names or not value.requires_grad:
                return []
            leaves = [self.parameters[n] for n in names]
            slopes = torch.autograd.grad(value, leaves, allow_unused=True)
        return [n for n, slope in zip(names, slopes, strict=True) if slope is not None]

    def run(self, x: Tensor, parameters: dict[str, Tensor] | None = None) -> Tensor:
        """The outputs, with other values in the place of θ where some are given."""
        with plain_kernels(), watched(self._watched) as self.calls:
            return run(self.model, x, None if parameters is self.parameters else parameters)

    @property
    def seen(self) -> Tensor:
        """The input u at the last :meth:`run`, [B, *in_shape]."""
        assert isinstance(self.source, KnownFeatures)
        own = next(call for call in self.calls if call.name == self.source.layer)
        u: Tensor = own.given.reshape(self.source.shape)
        return u

    def _value(
        self,
        x: Tensor,
        parameters: dict[str, Tensor],
        targets: Tensor | None = None,
        rows: slice = WHOLE,
    ) -> Tensor:
        """``L(f_θ(x), t)`` for some rows of the batch, or ``⟨k, u(x)⟩``."""
        outputs, source = self.run(x, parameters), self.source
        if isinstance(source, KnownFeatures):
            return (source.cotangent * self.seen).sum()
        targets = source.targets if targets is None else targets
        if targets is None:
            raise ValueError("targets: expected those of the batch, got none; write targets=...")
        return source.loss(outputs, targets if rows == WHOLE else targets[rows])
