"""What mends an update on the command line: the option for every finding of ``rgap check``."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from math import inf
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from rgap.cli.options import Reduction, either

if TYPE_CHECKING:
    from torch import nn

    from rgap.update.update import Update

__all__ = ["Mending", "remedied"]

_ITEMS = r" for n, g in update\.gradients\.items\(\)\}"
_NUMBER = r"([\d.e+-]+)"
_NAMED = "the tensors of UPDATE under the names and in the order of the model's parameters"

# Remedies in Python, and what they are on the command line; both follow the word "write".
_REMEDIES: tuple[tuple[str, str], ...] = (
    (rf"rgap\.match\(model, dataclasses\.replace\(update, gradients=\{{n: g / (\w+){_ITEMS}, "
     rf"local_steps=(\w+)\), local=rgap\.LocalTraining\((\w+|{_NUMBER})\)\)",
     r"rgap match MODEL UPDATE --factor \1 --local-steps \2 --local-rate \3"),
    (rf"rgap\.match\(model, dataclasses\.replace\(update, local_steps=(\w+)\), "
     rf"local=rgap\.LocalTraining\((\w+|{_NUMBER})\)\)",
     r"rgap match MODEL UPDATE --local-steps \1 --local-rate \2"),
    (rf"dataclasses\.replace\(update, gradients=\{{n: -g{_ITEMS}\)", "--factor -1"),
    (rf"dataclasses\.replace\(update, gradients=\{{n: g / {_NUMBER}{_ITEMS}(?:, noise=\{{.*?\}})?"
     r"(?: or \{\}\)\.items\(\)\})?\)", r"--factor \1"),
    (rf"dataclasses\.replace\(update, gradients=\{{n: g - {_NUMBER} \* "
     rf"model\.get_parameter\(n\)\.detach\(\){_ITEMS}\)", r"--weight-decay \1"),
    (r"; Update\.from_delta\(\.\.\., weight_decay=\) undoes it too", ""),
    (r"dataclasses\.replace\(update, loss=dataclasses\.replace\(update\.loss, "
     r'reduction="(\w+)"\)\)', r"--reduction \1"),
    (rf'dataclasses\.replace\(update, loss=rgap\.Loss\("(\w+)", reduction="(\w+)", '
     rf"label_smoothing={_NUMBER}\)\)", r"--loss \1 --reduction \2 --label-smoothing \3"),
    (r'dataclasses\.replace\(update, loss=rgap\.Loss\("(\w+)", reduction="(\w+)"\)\)',
     r"--loss \1 --reduction \2"),
    (r"dataclasses\.replace\(update, loss=rgap\.Loss\(weight=weights\)\)", "--class-weights X,X,…"),
    (r"dataclasses\.replace\(update, labels=torch\.tensor\(\[(\d+)\]\)\)", r"--labels \1"),
    (r"rgap\.Update\.from_delta\(model, update\.gradients, lr=0\.01\)|Update\.from_ndarrays\("
     r"model, arrays, lr=0\.01\) or Update\.from_delta\(model, weights, lr=0\.01\)",
     "--after-step 0.01"),
    (rf"dataclasses\.replace\(update, gradients=\{{n\.removeprefix\('[^']*'\): g{_ITEMS}\)",
     "rgap invert MODEL UPDATE, which leaves the prefix out"),
    (r"dataclasses\.replace\(update, gradients=\{n: update\.gradients\[n\] for n, _ in "
     r"model\.named_parameters\(\)\}\)", _NAMED),
    (r"dataclasses\.replace\(update, gradients=dict\(zip\(dict\(model\.named_parameters\(\)\), "
     r"update\.gradients\.values\(\)\)\)\)", _NAMED),
    (r"\[p\.requires_grad_\(False\) for n, p in model\.named_parameters\(\) if not "
     r"update\.gradients\[n\]\.any\(\)\]  # |\[p\.requires_grad_\(False\) for n, p in "
     r"model\.named_parameters\(\) if n not in update\.gradients\]  # ", "--frozen "),
    (r"update\.as_rounded\(\)\[0\](, or dataclasses\.replace\(update, dtype=[\w.]+\))?",
     "rgap invert MODEL UPDATE, which counts the rounding as noise"),
    (r"rgap\.Update\(\{n: (optimizer\.state\[p\]\['exp_avg'\] / \(1 - beta1\)) for n, p in "
     r"model\.named_parameters\(\)\}\)", r"\1 of every parameter into the update"),
    (r"model\.load_state_dict\(weights\)", "--weights FILE"),
)  # fmt: skip


def remedied(text: str) -> str:
    """A sentence with the options of :class:`Mending` where the library writes Python.

    >>> remedied("write dataclasses.replace(update, gradients={n: -g for n, g in "
    ...          "update.gradients.items()})")
    'write --factor -1'
    """
    for python, words in _REMEDIES:
        text = re.sub(python, words, text)
    return text


@dataclass(frozen=True, kw_only=True)
class Mending:
    """What the update is that it does not say, as ``rgap check`` finds it."""

    panel: ClassVar[str] = "Where the update is not what it says"
    factor: Annotated[
        float | None,
        typer.Option(
            help="It is that many times the gradient: -1 where before and after were exchanged.",
            metavar="X",
            show_default=False,
        ),
    ] = None
    loss: Annotated[
        str | None,
        typer.Option(
            help="Of the client, where it is another than stated.",
            metavar="NAME",
            show_default=False,
        ),
    ] = None
    reduction: Annotated[
        Reduction | None,
        typer.Option(
            help=f"Of the client's loss: {either(Reduction)}.", metavar="NAME", show_default=False
        ),
    ] = None
    label_smoothing: Annotated[
        float | None,
        typer.Option(help="Of the client's loss.", metavar="X", show_default=False),
    ] = None
    class_weights: Annotated[
        str | None,
        typer.Option(
            help="Of the client's loss, as in 1,2.5,1.", metavar="X,X,…", show_default=False
        ),
    ] = None
    weight_decay: Annotated[
        float | None,
        typer.Option(
            help="It contains that many times the weights.", metavar="X", show_default=False
        ),
    ] = None
    after_step: Annotated[
        float | None,
        typer.Option(
            help="It holds the weights after a step of SGD at this rate, no gradients.",
            metavar="RATE",
            show_default=False,
        ),
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

        weights = {n: p.detach() for n, p in network.named_parameters()}
        if self.after_step is not None:
            names = ("loss", "batch_size", "input_shape", "labels", "value_range", "buffers")
            kept = {name: getattr(update, name) for name in names}
            update = Sent.from_delta(network, update.gradients, lr=self.after_step, **kept)
        if self.weight_decay is not None:
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
        return replace(update, loss=self._declared(update))

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
