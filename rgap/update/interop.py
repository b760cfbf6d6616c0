"""Updates in other libraries' shapes, as keyword arguments of `rgap.Update`.

Plain dicts, lists and arrays in, so that neither breaching nor Flower is imported. Each function
answers three questions that the formats leave open: which tensor belongs to which name, which way
the sign points, and how many local steps lie between.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rgap.arithmetic.rounding import coherence
from rgap.update.quantisation import recognise
from rgap.update.sgd import Descent

__all__ = ["breaching_fields", "delta_fields", "ndarray_fields"]

# In a plain state dict nothing marks a buffer; these names are batch norm's.
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def delta_fields(
    before: nn.Module | Mapping[str, Tensor],
    after: nn.Module | Mapping[str, Tensor],
    step: Descent,
) -> dict[str, Any]:
    """The gradient between two sets of weights, by name; see `rgap.Update.from_delta`."""
    first_state, last_state = _state(before, "before"), _state(after, "after")
    names, buffer_names = _roles(before, after, first_state)
    for name, state in (("before", first_state), ("after", last_state)):
        absent = [key for key in names if key not in state]
        if absent:
            raise ValueError(
                f"{name}: {absent[0]!r} is missing, expected the same parameters before and "
                "after; write model.state_dict() of the same model twice."
            )
        for key in names:
            _weight(name, key, state[key])
    last_state = _as_stored(last_state, names)
    gradients, noise, still = {}, {}, {}
    for key in names:
        first, last = first_state[key], last_state[key]
        if first.shape != last.shape:
            raise ValueError(
                f"after: {key!r} has shape {tuple(last.shape)}, expected {tuple(first.shape)} as "
                "before."
            )
        last = last.to(first.device)
        gradients[key], noise[key] = step.gradient(first, last)
        still[key] = first.double() == last.double()
    _widen(noise, still)
    return {
        "gradients": gradients,
        # The gradient was taken at the statistics that the client started with.
        "buffers": {key: first_state[key] for key in buffer_names if key in first_state},
        "local_steps": step.steps,
        "dtype": _coarsest([s[key] for s in (first_state, last_state) for key in names]),
        "noise": noise,
    }


def _weight(argument: str, key: str, value: Any) -> None:
    """Raise unless an entry of a state dict is a tensor of weights."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument}: {key!r} is no tensor; write torch.as_tensor(array).")
    if not value.is_floating_point():
        raise TypeError(
            f"{argument}: {key!r} has dtype {value.dtype}, expected weights, of a floating dtype; "
            "write tensor.float() if they are whole numbers, step * tensor if they were quantised"
        )


def _as_stored(state: dict[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """The weights in the format whose numbers they all are: single precision sent as float64, say.

    Their rounding is that of the format in which the client kept them, whatever carried them.
    """
    shown = recognise({key: state[key] for key in names})
    if shown is None or shown.dtype is None or shown.scaled or len(shown.noise) < len(names):
        return state
    return {**state, **{key: state[key].to(shown.dtype) for key in names}}


def breaching_fields(
    server_payload: Any, shared_data: Any, model: nn.Module | None = None
) -> dict[str, Any]:
    """The fields in breaching's payload and shared data; see `rgap.Update.from_breaching`."""
    payload = _single(server_payload, "server_payload")
    shared = _single(shared_data, "shared_data")
    about = _get(shared, "metadata") or shared  # older versions keep it flat
    data = _get(payload, "metadata") or {}
    arrays = _require(shared, "gradients", "shared_data")
    names = _names(model, len(arrays))
    gradients = dict(zip(names, arrays, strict=True))
    fields: dict[str, Any] = {"gradients": gradients}

    hyper = _get(about, "local_hyperparams")
    if hyper:
        lr, steps = _require(hyper, "lr", "local_hyperparams"), int(_get(hyper, "steps") or 1)
        started = _started(payload, model, gradients)
        # breaching shares p_local - p_server, the opposite sign of a gradient.
        after = {n: (p.double() + gradients[n].double()).to(p.dtype) for n, p in started.items()}
        fields |= delta_fields(started, after, Descent.of(float(lr), steps))

    buffers = _get(payload, "buffers") or _get(shared, "buffers")
    if buffers and model is not None:
        kept = [name for name, _ in model.named_buffers()]
        if len(kept) != len(buffers):
            raise ValueError(
                f"server_payload: {len(buffers)} buffers, expected the model's {len(kept)}; give "
                "the model that the server distributed."
            )
        fields["buffers"] = dict(zip(kept, buffers, strict=True))
    points = _get(about, "num_data_points")
    count = None if points is None else int(points)
    ordered = _labels_in_order(_get(hyper, "labels"), count) if hyper else None
    fields["batch_size"] = count if ordered is None else len(ordered)
    fields["labels"] = _get(about, "labels") if ordered is None else ordered
    shape = _get(data, "shape")
    fields["input_shape"] = None if shape is None else tuple(int(n) for n in shape)
    fields["value_range"] = _normalised_range(data)
    return fields


def ndarray_fields(model: nn.Module, arrays: Any, step: Descent | None) -> dict[str, Any]:
    """The fields in a list of arrays in state-dict order; see `rgap.Update.from_ndarrays`."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected a torch.nn.Module, got {type(model).__name__}; write "
            "Update.from_ndarrays(model, arrays)"
        )
    tensors, known = arrays_by_name(model, arrays), dict(model.named_buffers())
    buffers = {name: tensor for name, tensor in tensors.items() if name in known}
    sent = {name: tensors[name] for name, _ in model.named_parameters() if name in tensors}
    if step is None:
        return {"gradients": sent, "buffers": buffers}
    before = {name: p.detach() for name, p in model.named_parameters()}
    # The client's buffers have moved on with training; the gradient was taken at the model's.
    return {**delta_fields(before, sent, step), "buffers": known}


def arrays_by_name(model: nn.Module, arrays: Any) -> dict[str, Tensor]:
    """The arrays of a list under the model's names: of its parameters, or of its state dict.

    Raises:
        TypeError: no list of arrays.
        ValueError: another number of them, or other shapes.

    >>> model = nn.Linear(2, 1)
    >>> list(arrays_by_name(model, [np.zeros((1, 2)), np.zeros(1)]))
    ['weight', 'bias']
    """
    arrays = _listed(arrays)
    parameters = dict(model.named_parameters())
    state = list(model.state_dict())
    if len(arrays) == len(parameters):
        names = list(parameters)
    elif len(arrays) == len(state):
        names = state
    else:
        entries = f" or {len(state)} (one per entry of model.state_dict())"
        raise ValueError(
            f"arrays: expected {len(parameters)} (one per parameter of the {type(model).__name__})"
            f"{entries if len(state) != len(parameters) else ''}, got {len(arrays)}; write "
            "[v.cpu().numpy() for v in model.state_dict().values()] on the client, or Update with "
            "the names of those that it sent"
        )
    expected = {**model.state_dict(), **parameters, **dict(model.named_buffers())}
    named = _by_shape(arrays, {name: tuple(expected[name].shape) for name in names})
    return {name: tensor_of(name, array) for name, array in named.items()}


def _listed(arrays: Any) -> list[Any]:
    """The arrays as a list; what people give instead of one is named."""
    mend = None
    if isinstance(arrays, Mapping):
        mend = "Update(gradients), Update.from_delta(model, weights, lr=0.01), or list(d.values())"
    elif isinstance(arrays, str | bytes | os.PathLike):
        mend = "list(np.load(path).values()) for an .npz file"
    elif hasattr(arrays, "tensors") or not isinstance(arrays, Iterable):
        mend = "flwr.common.parameters_to_ndarrays(parameters) for what Flower wraps"
    else:
        arrays = list(arrays)
        if any(isinstance(array, bytes) for array in arrays):
            mend = "[np.load(io.BytesIO(array)) for array in arrays] for arrays in Flower's bytes"
    if mend is not None:
        raise TypeError(
            f"arrays: expected a list of NumPy arrays, got {type(arrays).__name__}; write {mend}"
        )
    return list(arrays)


def _labels_in_order(by_step: Any, count: int | None) -> Tensor | None:
    """Labels of the samples in the order of the local steps that used them.

    The labels beside ``num_data_points`` are sorted, which is the order of no batch; those of every
    step are in ``local_hyperparams``.  The steps run through the samples again and again: the first
    round names each once.
    """
    if by_step is None or not len(by_step):
        return None
    rows = [torch.as_tensor(part).flatten() for part in by_step]
    joined = torch.cat(rows)
    return joined if count is None else joined[:count]


def _widen(noise: dict[str, Tensor], still: Mapping[str, Tensor]) -> None:
    """Widen, in place, rounding that follows the gradient (``rounding.coherence``)."""
    for name, std in noise.items():
        if std.ndim < 2:
            continue
        dead = still[name].flatten(1).all(1)
        bias = still.get(f"{name.rpartition('.')[0]}.bias".removeprefix("."))
        if bias is not None and bias.shape == dead.shape:
            dead = dead & bias
        noise[name] = std * coherence(still[name], dead).to(std)


def _by_shape(arrays: Sequence[Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The arrays by name: in the order of the names, or the one other that their shapes allow."""
    sent = [np.shape(array) for array in arrays]
    pairs = list(zip(shapes.items(), sent, strict=True))
    wrong = [
        place
        for place, ((_, shape), got) in enumerate(pairs)
        # a counter of batches has one entry, whatever its shape
        if got != shape and not prod(got) == prod(shape) == 1
    ]
    if not wrong:
        return dict(zip(shapes, arrays, strict=True))
    if sorted(sent) == sorted(shapes.values()) and len(set(sent)) == len(sent):
        placed = dict(zip(sent, arrays, strict=True))
        return {name: placed[shape] for name, shape in shapes.items()}
    place = wrong[0]
    name, shape = list(shapes.items())[place]
    twice = next((s for s in sent if sent.count(s) > 1), None)
    other = sorted(sent) == sorted(shapes.values()) and twice is not None
    why = f"; several have shape {twice}, so their order cannot be found" if other else ""
    raise ValueError(
        f"arrays: the one at place {place} has shape {sent[place]}, expected {shape} for "
        f"{name!r}{why}; send them in the order of model.state_dict(), as "
        "[v.numpy() for v in model.state_dict().values()] gives them."
    )


def _started(
    payload: Any, model: nn.Module | None, deltas: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The weights that a breaching client started from, by name."""
    sent = _get(payload, "parameters")
    if sent is None and model is not None:
        sent = list(model.parameters())
    if sent is None or len(list(sent)) != len(deltas):
        raise ValueError(
            f"server_payload: expected the {len(deltas)} parameters that the server sent out, "
            "from which the client's differences were taken; write "
            "server_payload['parameters'] = list(model.parameters())"
        )
    started = {n: p.detach() for n, p in zip(deltas, sent, strict=True)}
    for name, p in started.items():
        if p.shape != deltas[name].shape:
            raise ValueError(
                f"server_payload: parameter {name!r} has shape {tuple(p.shape)}, expected "
                f"{tuple(deltas[name].shape)} as its difference"
            )
    return started


def _state(state: nn.Module | Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    if isinstance(state, nn.Module):
        return {**dict(state.named_parameters()), **dict(state.named_buffers())}
    if not isinstance(state, Mapping):
        raise TypeError(
            f"{name}: expected a module or state dict, got {type(state).__name__}; write "
            "model.state_dict()."
        )
    return dict(state)


def _roles(
    before: nn.Module | Mapping[str, Tensor],
    after: nn.Module | Mapping[str, Tensor],
    state: dict[str, Tensor],
) -> tuple[list[str], list[str]]:
    """Names of the parameters, in order, and of the buffers."""
    for model in (before, after):
        if isinstance(model, nn.Module):
            return [n for n, _ in model.named_parameters()], [n for n, _ in model.named_buffers()]
    keys = [*state, *(key for key in after if key not in state)]  # type: ignore[union-attr]
    buffers = [key for key in keys if key.rpartition(".")[2] in _STATISTICS]
    return [key for key in keys if key not in buffers], buffers


def _coarsest(tensors: Iterable[Tensor]) -> torch.dtype | None:
    dtypes = [t.dtype for t in tensors if t.is_floating_point()]
    return max(dtypes, key=lambda d: torch.finfo(d).eps) if dtypes else None


def tensor_of(name: str, array: Any) -> Tensor:
    """An array of numbers as a tensor, of another machine's byte order too; a tensor as it is."""
    if isinstance(array, Tensor):
        return array.detach()
    values = np.asarray(array)
    if values.dtype.kind not in "fiub":
        raise TypeError(f"arrays: {name!r} has dtype {values.dtype}, expected real numbers.")
    values = values.astype(values.dtype.newbyteorder("="), copy=False)  # of another machine
    return torch.from_numpy(np.ascontiguousarray(values)).reshape(values.shape)


def _names(model: nn.Module | None, count: int) -> list[str]:
    if model is None:
        return [str(place) for place in range(count)]
    names = [name for name, _ in model.named_parameters()]
    if len(names) != count:
        raise ValueError(
            f"shared_data: {count} gradients, expected the {len(names)} parameters of the "
            f"{type(model).__name__}; give the model that the server distributed."
        )
    return names


def _get(holder: Any, key: str) -> Any:
    """``holder[key]`` of a dict or configuration object, None when absent."""
    if isinstance(holder, Mapping):
        return holder.get(key)
    return getattr(holder, key, None)


def _require(holder: Any, key: str, name: str) -> Any:
    value = _get(holder, key)
    if value is None:
        raise ValueError(f"{name}: the entry {key!r} is missing, expected breaching's own dict.")
    return value


def _single(item: Any, name: str) -> Any:
    """One dict, or breaching's list of one per query."""
    if isinstance(item, list | tuple):
        if len(item) != 1:
            raise ValueError(f"{name}: expected one query, got {len(item)}; pass {name}[i].")
        return item[0]
    return item


def _normalised_range(data: Any) -> tuple[float, float]:
    """Range of pictures in [0, 1] after breaching's normalisation by mean and std."""
    mean, std = _get(data, "mean"), _get(data, "std")
    if mean is None or std is None or _get(data, "normalize") is False:
        return (0.0, 1.0)
    pairs = list(zip(mean, std, strict=True))
    return min(-m / s for m, s in pairs), max((1.0 - m) / s for m, s in pairs)
