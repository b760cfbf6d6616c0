"""What mends an update on the command line: the option for every finding of ``rgap check``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from rgap.cli.options import Reduction, either, optional

if TYPE_CHECKING:
    from torch import nn

    from rgap.update.update import Update

__all__ = ["Mending"]


@dataclass(frozen=True, kw_only=True)
class Mending:
    """What the update is that it does not say, as ``rgap check`` finds it."""

    panel: ClassVar[str] = "Where the update is not what it says"
    factor: Annotated[
        float | None,
        optional(
            "It is that many times the gradient: -1 where before and after were exchanged.", "X"
        ),
    ] = None
    loss: Annotated[
        str | None, optional("Of the client, where it is another than stated.", "NAME")
    ] = None
    reduction: Annotated[
        Reduction | None, optional(f"Of the client's loss: {either(Reduction)}.", "NAME")
    ] = None
    label_smoothing: Annotated[float | None, optional("Of the client's loss.", "X")] = None
    class_weights: Annotated[
        str | None, optional("Of the client's loss, as in 1,2.5,1.", "X,X,…")
    ] = None
    weight_decay: Annotated[
        float | None, optional("It contains that many times the weights.", "X")
    ] = None
    after_step: Annotated[
        float | None,
        optional("It holds the weights after a step of SGD at this rate, no gradients.", "RATE"),
    ] = None
    frozen: Annotated[
        bool,
        typer.Option(
            "--frozen", help="Parameters without a gradient were not trained.", metavar=""
        ),
    ] = False

    def mended(self, update: Update, network: nn.Module) -> Update:
        """The update as it is; with ``frozen`` the network's parameters are made so."""
        from rgap.update.update import Update as Sent

        if self.after_step is not None:
            names = ("loss", "batch_size", "input_shape", "labels", "value_range", "buffers")
            kept = {name: getattr(update, name) for name in names}
            update = Sent.from_delta(network, update.gradients, lr=self.after_step, **kept)
        if self.weight_decay is not None:
            weights = {n: p.detach() for n, p in network.named_parameters()}
            update = replace(
                update,
                gradients={
                    n: g - self.weight_decay * weights[n].to(g) if n in weights else g
                    for n, g in update.gradients.items()
                },
            )
        if self.factor is not None:
            if not 0.0 < abs(self.factor) < inf:
                raise ValueError(f"--factor: expected a number that is not 0, got {self.factor}")
            update = replace(
                update,
                gradients={n: g / self.factor for n, g in update.gradients.items()},
                noise={n: s / abs(self.factor) for n, s in (update.noise or {}).items()} or None,
            )
        if self.frozen:
            for name, parameter in network.named_parameters():
                gradient = update.gradients.get(name)
                if gradient is None or not gradient.any():
                    parameter.requires_grad_(False)
        loss = self._declared(update)
        return update if loss == update.loss else replace(update, loss=loss)

    def _declared(self, update: Update) -> Any:
        """The loss of an update with what is given of it."""
        from rgap.update.losses import Loss

        given: dict[str, Any] = {}
        if self.reduction is not None:
            given["reduction"] = self.reduction.value
        if self.label_smoothing is not None:
            given["label_smoothing"] = self.label_smoothing
        if self.class_weights is not None:
            try:
                given["weight"] = tuple(float(part) for part in self.class_weights.split(","))
            except ValueError:
                raise ValueError(
                    f"--class-weights: expected numbers such as 1,2.5,1, got {self.class_weights!r}"
                ) from None
        if self.loss is None:
            return replace(update.loss, **given)
        return Loss(self.loss, **({"reduction": update.loss.reduction} | given))
