"""The update: what a client sent, and what is known about how it was computed."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rgap import validation
from rgap.arithmetic.doubles import blocks
from rgap.arithmetic.rounding import absent
from rgap.update import interop, storage
from rgap.update.losses import Loss
from rgap.update.naming import renamed, renaming
from rgap.update.quantisation import recognise, stored
from rgap.update.sgd import Descent

__all__ = ["Update", "view"]


@dataclass(frozen=True, eq=False)
class Update:
    """One client's gradient, by parameter name, with what the attacker knows of its origin.

    The tensors are copied on construction, so a later ``optimizer.zero_grad()`` or ``backward()``
    does not change an update. `dataclasses.replace` works and validates again.

    Args:
        gradients: gradient of the loss by parameter name, in the order of
            ``model.named_parameters()``; floating, finite.
        buffers: the model's buffers at capture (batch-norm running statistics); empty: the
            model's own are used.
        batch_size: number of samples, None when unknown.
        labels: targets the client shared, None when it kept them.
        loss: the loss that was differentiated, a name or a `Loss`.
        input_shape: shape of one sample, without the batch dimension.
        value_range: (low, high) that every input value lies in, None when unbounded.
        dtype: precision the client computed in; None takes the coarsest of the gradients' dtypes.
            Tensors in a coarser one were rounded to it when they were sent: what it costs them is
            known, and every reader takes it into account.
        noise: standard deviation of what else is wrong with each entry, by parameter name, of the
            parameter's shape: rounding of weights whose difference was sent, quantisation, added
            noise. A name that is missing has none; None: nothing of the kind. The float ``noise``
            of `rgap.invert` and `rgap.match` adds to it, in variance.
        local_steps: 1 for a gradient. More says that ``gradients`` is an average over that many
            local steps (FedAvg), which is no gradient at the model's parameters.

    Raises:
        TypeError: something that is no floating tensor where one is needed.
        ValueError: NaN or infinity, an empty update, a batch size below 1, an empty range.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 3)
        >>> loss = torch.nn.functional.cross_entropy(model(torch.ones(1, 4)), torch.tensor([2]))
        >>> loss.backward()
        >>> update = Update({n: p.grad for n, p in model.named_parameters()}, batch_size=1)
        >>> update
        Update(2 tensors, 15 numbers, float32, batch_size=1, loss='cross_entropy', labels unknown)
    """

    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor] = field(default_factory=dict)
    batch_size: int | None = None
    labels: Tensor | None = None
    loss: Loss = field(default_factory=Loss)
    input_shape: tuple[int, ...] | None = None
    value_range: tuple[float, float] | None = (0.0, 1.0)
    dtype: torch.dtype = None  # type: ignore[assignment]  # filled in by __post_init__
    local_steps: int = 1
    noise: Mapping[str, Tensor] | None = None

    def __post_init__(self) -> None:
        gradients = {
            name: validation.gradient(name, tensor)
            for name, tensor in validation.named(self.gradients, "gradients").items()
        }
        if not gradients:
            raise ValueError(
                "gradients: expected at least one tensor by parameter name, got none; write "
                "Update({name: p.grad for name, p in model.named_parameters()})."
            )
        buffers = {
            name: validation.buffer(name, tensor)
            for name, tensor in validation.named(self.buffers, "buffers").items()
        }
        dtype: torch.dtype | None = self.dtype
        if dtype is None:
            dtype = max((g.dtype for g in gradients.values()), key=lambda d: torch.finfo(d).eps)
        elif not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype: expected a floating torch.dtype, got {dtype!r}.")
        batch_size = (
            None if self.batch_size is None else validation.count("batch_size", self.batch_size)
        )
        shape = self.input_shape
        if shape is not None:
            shape = validation.shape(shape)
        self._fill(
            gradients=gradients,
            buffers=buffers,
            dtype=dtype,
            batch_size=batch_size,
            labels=validation.labels(self.labels, batch_size),
            loss=Loss.of(self.loss),
            input_shape=shape,
            value_range=validation.bounds(self.value_range),
            local_steps=validation.count("local_steps", self.local_steps),
            noise=validation.entrywise_noise(self.noise, gradients),
        )

    def _fill(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        numbers = sum(g.numel() for g in self.gradients.values())
        parts = [
            f"{len(self.gradients)} tensors",
            f"{numbers:,} numbers",
            str(self.dtype).removeprefix("torch."),
            f"batch_size={self.batch_size}",
            f"loss={self.loss.name!r}",
            "labels unknown" if self.labels is None else "labels shared",
        ]
        if self.local_steps > 1:
            parts.append(f"average of {self.local_steps} local steps")
        if self.noise is not None:
            total = sum(
                float(part.double().square().sum())
                for std in self.noise.values()
                for part in blocks(std)
            )
            parts.append(f"noise {(total / numbers) ** 0.5:.1e} rms")
        return f"Update({', '.join(parts)})"

    def fitted(self, model: nn.Module) -> Update:
        """This update under the names of ``model``, checked against it.

        Prefixes of wrappers (``module.``, ``_orig_mod.``, ``_module.``, or one that all names of a
        side share) are left out where the rest agrees, whichever side is wrapped. A counter such as
        ``num_batches_tracked`` may have any shape of one entry. Parameters that the model has
        frozen (``requires_grad=False``) need not be there: they get gradients of zero with the
        noise ``ABSENT``, so that no equation counts on them; and so do they if zeros were sent.

        Raises:
            ValueError: as `check`; and weights where gradients are expected.

        Example:
            >>> import torch
            >>> model = torch.nn.Linear(2, 1)
            >>> update = Update({"module.weight": torch.ones(1, 2), "module.bias": torch.ones(1)})
            >>> list(update.fitted(model).gradients)
            ['weight', 'bias']
        """
        parameters, own = dict(model.named_parameters()), dict(model.named_buffers())
        names = renaming(self.gradients, parameters)
        gradients, noise = renamed(self.gradients, names), renamed(self.noise or {}, names)
        buffers = renamed(self.buffers, renaming(self.buffers, own))
        for name, buffer in buffers.items():
            if name in own and own[name].numel() == buffer.numel() == 1:
                buffers[name] = buffer.reshape(own[name].shape)
        validation.refuse_weights(gradients, parameters)
        unsent = [
            name
            for name, p in parameters.items()
            if not p.requires_grad and (name not in gradients or not bool(gradients[name].any()))
        ]
        if unsent and len(unsent) < len(parameters):
            dtype = next(iter(gradients.values())).dtype
            for name in unsent:
                gradients[name] = torch.zeros_like(parameters[name], dtype=dtype)
                noise[name] = absent(gradients[name])
            given = [name for name in gradients if name not in unsent]
            if given == [name for name in parameters if name in given]:  # else the check says so
                gradients = {name: gradients[name] for name in parameters if name in gradients}
        fitted = view(self, gradients=gradients, buffers=buffers, noise=noise or None)
        fitted.check(model)
        return fitted

    def check(self, model: nn.Module) -> None:
        """Raise unless this update has the form of a gradient of ``model``.

        Names, order and shapes are compared with ``model.named_parameters()``, the buffers' with
        ``model.named_buffers()``. That the numbers come from this model is another question, which
        only the equations answer (status ``INCONSISTENT``).

        Raises:
            ValueError: a missing, extra, misplaced or misshapen tensor (named), NaN or infinity
                written into one since construction, or gradients that are zero everywhere. A
                single zero tensor passes: dead units make one.

        Example:
            >>> import torch
            >>> model = torch.nn.Linear(2, 1)
            >>> Update({"weight": torch.ones(1, 2)}).check(model)
            Traceback (most recent call last):
            ...
            ValueError: gradients: 'bias' is missing, ...
        """
        parameters = dict(model.named_parameters())
        validation.check_names(self.gradients, parameters, type(model).__name__)
        validation.check_shapes("gradients", self.gradients, parameters)
        buffers = dict(model.named_buffers())
        for name in self.buffers:
            if name not in buffers:
                raise ValueError(
                    f"buffers: {name!r} is not a buffer of the {type(model).__name__}; capture "
                    "from the model that is inverted, or write "
                    "dataclasses.replace(update, buffers={})."
                )
        validation.check_shapes("buffers", self.buffers, buffers)
        for name, tensor in self.gradients.items():  # they may have been written to since
            validation.finite_gradient(name, tensor)
        if all(not bool(g.any()) for g in self.gradients.values()):
            raise ValueError(
                f"gradients: every tensor is zero, from {next(iter(self.gradients))!r} on, so the "
                "update says nothing about the data. Expected a gradient, got zeros, as black "
                "pictures send them where no layer has a bias, and what underflows in float16; "
                "write p.grad.clone() before optimizer.zero_grad(), in float64 if it underflowed."
            )

    def as_rounded(self) -> tuple[Update, str | None]:
        """The update with the rounding of what was sent as noise, and in words what values show.

        Tensors in a coarser format than ``dtype``, in which the client computed, or than float32
        were rounded to it: the error of each entry adds to ``noise``. A gradient that went through
        float16, bfloat16 or 8-bit integers and came back as float32 is recognised by its grid
        (:func:`rgap.update.quantisation.recognise`), and so does its rounding. A floating format
        that is recognised becomes ``dtype`` as well, for whether the client computed in it or only
        sent it the values do not tell.
        """
        shown = recognise(self.gradients)
        rounding = stored(self.gradients, self.dtype) | dict(shown.noise if shown else {})
        if not rounding:
            return self, None
        noise, dtype = dict(self.noise or {}), self.dtype
        for name, std in rounding.items():
            noise[name] = torch.hypot(std, noise[name].to(std)) if name in noise else std
        if shown is not None and shown.dtype is not None:
            dtype = max(dtype, shown.dtype, key=lambda d: torch.finfo(d).eps)
        return view(self, dtype=dtype, noise=noise), shown.words if shown else None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file (no pickle), atomically; see `load`."""
        storage.write(path, {f.name: getattr(self, f.name) for f in dataclasses.fields(self)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Update:
        """Read a file that `save` wrote; names, order, dtypes and values come back unchanged.

        Raises:
            ValueError: a pickle (refused before anything is unpickled), a truncated file, or a
                safetensors file that is no update; the message says which call to write instead.
            FileNotFoundError: no such file.
        """
        return cls(**storage.read(path))

    @classmethod
    def from_delta(
        cls,
        before: nn.Module | Mapping[str, Tensor],
        after: nn.Module | Mapping[str, Tensor],
        lr: float | None = None,
        steps: int = 1,
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        nesterov: bool = False,
        dampening: float = 0.0,
        optimizer: Any = None,
        **fields: Any,
    ) -> Update:
        """Update from parameters before and after local SGD: ``(before - after) / (lr * steps)``.

        Plain SGD moves *against* the gradient, so the sign is opposite to the difference
        ``after - before`` that federated averaging sends. Weight decay and the first step of
        momentum are undone where they are declared. For ``steps > 1`` the result is an average of
        gradients at different parameters, recorded as ``local_steps=steps``.

        Rounding of ``after`` leaves an absolute error of up to half a spacing of its floating
        format over ``lr``, usually far above the gradient's own rounding. It is known entry by
        entry and becomes the update's ``noise``: at ``lr=1e-5`` an entry that moved by less
        than that did not move at all.

        Args:
            before: module or state dict that the client started with. Batch-norm statistics in a
                state dict become ``buffers``, with these values.
            after: the same, after training.
            lr: learning rate; None takes that of ``optimizer``.
            steps: local steps.
            weight_decay: λ of SGD, which adds ``λ p`` to the gradient.
            momentum: μ of SGD; its first step is a plain one.
            nesterov: the step was ``1 + μ`` times as long.
            dampening: of SGD, which leaves the first step alone.
            optimizer: what the client used, in place of these numbers: ``"sgd"``, a
                ``torch.optim.SGD``, its ``state_dict()`` or its ``param_groups``.
            **fields: any other field of `Update`, for instance ``batch_size=8``.

        Raises:
            ValueError: Adam or another optimiser whose step does not give the gradient back;
                momentum or weight decay over several steps.

        Example:
            >>> import torch
            >>> delta = Update.from_delta(
            ...     {"w": torch.tensor([1.0])}, {"w": torch.tensor([0.5])}, lr=0.25)
            >>> delta.gradients["w"]
            tensor([2.])
            >>> print(f"{delta.noise['w'].item():.1e}")
            9.7e-08
        """
        step = Descent.of(
            lr, steps, optimizer, weight_decay=weight_decay, momentum=momentum,
            nesterov=nesterov, dampening=dampening,
        )  # fmt: skip
        return cls(**{**interop.delta_fields(before, after, step), **fields})

    @classmethod
    def from_breaching(
        cls,
        server_payload: Any,
        shared_data: Any,
        *,
        model: nn.Module | None = None,
        **fields: Any,
    ) -> Update:
        """Update from what ``breaching`` hands to its attackers; breaching is not imported.

        Args:
            server_payload: its dict of ``parameters``, ``buffers`` and ``metadata`` (or a list of
                one such dict).
            shared_data: its dict of ``gradients``, ``buffers`` and ``metadata`` (or a list of
                one). With ``local_hyperparams`` in its metadata the gradients are a parameter
                difference after local steps, and are turned into `from_delta`'s average; the labels
                of every step there, in the order of the steps, win over the sorted ones.
            model: gives the tensors their names; without it they are called ``"0"``, ``"1"`` ...
            **fields: any other field of `Update`, for instance ``loss=...``.
        """
        return cls(**{**interop.breaching_fields(server_payload, shared_data, model), **fields})

    @classmethod
    def from_ndarrays(
        cls,
        model: nn.Module,
        arrays: Iterable[Any],
        *,
        lr: float | None = None,
        steps: int = 1,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        nesterov: bool = False,
        dampening: float = 0.0,
        optimizer: Any = None,
        **fields: Any,
    ) -> Update:
        """Update from a list of NumPy arrays in ``model.state_dict()``'s order, as Flower sends.

        Args:
            model: the model as the server sent it out.
            arrays: one per parameter, or one per entry of ``model.state_dict()``. In another order
                they are matched by shape where only one assignment fits.
            lr: None when the arrays are gradients. Flower's clients usually return their
                *parameters after training*: then give the learning rate, and the arrays are
                compared with the model's parameters as in `from_delta`.
            steps: local steps, where ``lr`` is given.
            weight_decay: as in `from_delta`, where ``lr`` is given.
            momentum: likewise.
            nesterov: likewise.
            dampening: likewise.
            optimizer: likewise; one with a learning rate stands for ``lr``.
            **fields: any other field of `Update`.
        """
        step = None
        if lr is not None or optimizer is not None:
            step = Descent.of(
                lr, steps, optimizer, weight_decay=weight_decay, momentum=momentum,
                nesterov=nesterov, dampening=dampening,
            )  # fmt: skip
        return cls(**{**interop.ndarray_fields(model, arrays, step), **fields})


def view(update: Update, **changes: Any) -> Update:
    """The update with other fields, on the same tensors: for reading, neither copied nor checked.

    ``dataclasses.replace`` copies and validates; an update of 138 million parameters takes 0.55 GB
    each time.

    >>> update = Update({"weight": torch.ones(1, 2)})
    >>> seen = view(update, batch_size=1)
    >>> seen.batch_size, seen.gradients["weight"] is update.gradients["weight"]
    (1, True)
    """
    seen = object.__new__(Update)
    seen._fill(**{f.name: getattr(update, f.name) for f in dataclasses.fields(update)} | changes)
    return seen
