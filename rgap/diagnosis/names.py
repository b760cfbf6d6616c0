"""Names: prefixes of wrappers, another order, tensors of frozen layers left out.

Wrappers (``DataParallel``, ``torch.compile``, Opacus) put one prefix before every name.  Taking a
common prefix away, or sorting as the model does, is tried; it counts if the names then are the
model's and every shape fits.
"""

from __future__ import annotations

from dataclasses import replace
from math import inf

import torch
from torch import nn

from rgap.diagnosis.finding import Finding, Kind
from rgap.remedy import NAMED, NUMBERED, Remedy, frozen_where
from rgap.update.update import Update

WRAPPERS = ("module.", "_orig_mod.", "_module.", "model.", "net.", "network.", "backbone.")


def mended(model: nn.Module, update: Update) -> tuple[Update | None, Finding | None]:
    """The update under the model's names, and what had to be done for it.

    Returns:
        The update (None where its names cannot be the model's) and the finding (None where
        nothing was wrong).
    """
    wanted = {n: p.shape for n, p in model.named_parameters()}
    if not wanted:
        return None, None
    sent = update.gradients
    prefix, renamed = _stripped(list(sent), set(wanted))
    gradients = {renamed[n]: g for n, g in sent.items()}
    extra = [n for n in gradients if n not in wanted]
    missing = [n for n in wanted if n not in gradients]
    misshapen = [n for n, g in gradients.items() if n in wanted and g.shape != wanted[n]]
    if extra and missing and not prefix and len(sent) == len(wanted):
        return _numbered(model, update)
    if misshapen:
        name = misshapen[0]
        said = f"'{name}' has shape {list(gradients[name].shape)}, the model's {list(wanted[name])}"
        line = "rgap.check(model, update) with the model that the client trained"
        return None, Finding(Kind.NAMES, float(len(misshapen)), said, line, inf)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    if missing and frozen.issuperset(missing) and not extra and not prefix:
        return update.fitted(model), None  # nothing is sent of what the client did not train
    if missing:
        device = next(iter(gradients.values())).device
        rest = {n: torch.zeros(wanted[n], dtype=update.dtype, device=device) for n in missing}
        full = {n: rest[n] if n in rest else gradients[n] for n in wanted}
        said = f"{len(missing)} of {len(wanted)} parameters are missing, '{missing[0]}' first"
        untrained = str(frozen_where("n not in update.gradients"))
        if prefix:
            said += f", and every name begins with '{prefix}'"
        lacking = Finding(Kind.NAMES, float(len(missing)), said, untrained, inf)
        nothing = len(missing) == len(wanted)
        return None if nothing else replace(update, gradients=full), lacking
    ordered = replace(update, gradients={n: gradients[n] for n in wanted})
    if prefix:
        without = Remedy(
            f"dataclasses.replace(update, gradients={{n.removeprefix({prefix!r}): g for n, g in "
            "update.gradients.items()})",
            "rgap invert MODEL UPDATE, which leaves the prefix out",
        )
        said = f"every name begins with '{prefix}', without it they are the model's"
        return ordered, Finding(Kind.NAMES, float(len(sent)), said, str(without), inf)
    if extra:
        said = f"{len(extra)} tensors are no parameters of the model, '{extra[0]}' first"
        return ordered, Finding(Kind.NAMES, float(len(extra)), said, str(NAMED), inf)
    if list(gradients) != list(wanted):
        place = next(i for i, (a, b) in enumerate(zip(gradients, wanted, strict=True)) if a != b)
        said = f"the order differs from the model's at place {place}"
        return ordered, Finding(Kind.NAMES, float(place), said, str(NAMED), inf)
    return update, None


def _stripped(names: list[str], wanted: set[str]) -> tuple[str, dict[str, str]]:
    """The prefix that all names carry and the model's do not, and names without it."""
    prefix = ""
    rest = {n: n for n in names}
    while not wanted & set(rest.values()):
        first = next(iter(rest.values()))
        step = next((w for w in WRAPPERS if first.startswith(w)), first.split(".")[0] + ".")
        if "." not in first or not all(r.startswith(step) for r in rest.values()):
            return "", {n: n for n in names}
        prefix += step
        rest = {n: r.removeprefix(step) for n, r in rest.items()}
    return prefix, rest


def _numbered(model: nn.Module, update: Update) -> tuple[Update | None, Finding | None]:
    """Names say nothing: the order may still be the model's, if every shape agrees."""
    wanted = dict(model.named_parameters())
    tensors = list(update.gradients.values())
    first = next(iter(update.gradients))
    fits = all(g.shape == p.shape for g, p in zip(tensors, wanted.values(), strict=True))
    line = str(NUMBERED)
    said = f"'{first}' is no parameter of the model, expected '{next(iter(wanted))}'"
    if not fits:
        said += "; in this order the shapes do not fit either"
        return None, Finding(Kind.NAMES, float(len(wanted)), said, line, inf)
    said += "; in this order every shape fits"
    named = replace(update, gradients=dict(zip(wanted, tensors, strict=True)))
    return named, Finding(Kind.NAMES, float(len(wanted)), said, line, inf)
