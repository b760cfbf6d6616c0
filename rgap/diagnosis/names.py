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

from rgap.arithmetic.rounding import absent
from rgap.diagnosis.finding import Finding, Kind
from rgap.remedy import GRADIENTS, NAMED, NUMBERED, Remedy, frozen_where
from rgap.update.update import Update

WRAPPERS = ("module.", "_orig_mod.", "_module.", "model.", "net.", "network.", "backbone.")
OTHER = Remedy("rgap.check(model, update) with the model that the client trained", GRADIENTS.option)


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
    if extra and missing and not prefix and _in_order(update, wanted):
        return _numbered(update, wanted, _foreign(extra, missing))
    if misshapen:
        name = misshapen[0]
        said = f"'{name}' has shape {list(gradients[name].shape)}, the model's {list(wanted[name])}"
        return None, Finding(Kind.NAMES, float(len(misshapen)), said, str(OTHER), inf)
    if extra and missing:
        return None, Finding(
            Kind.NAMES, float(len(extra)), _foreign(extra, missing), str(OTHER), inf
        )
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    if missing and frozen.issuperset(missing) and not extra and not prefix:
        return update.fitted(model), None  # nothing is sent of what the client did not train
    if missing:
        device = next(iter(gradients.values())).device
        rest = {n: torch.zeros(wanted[n], dtype=update.dtype, device=device) for n in missing}
        full = {n: rest[n] if n in rest else gradients[n] for n in wanted}
        noise = {renamed[n]: s for n, s in (update.noise or {}).items()}
        noise |= {n: absent(zeros) for n, zeros in rest.items()}
        said = f"{len(missing)} of {len(wanted)} parameters are missing, '{missing[0]}' first"
        untrained = str(frozen_where("n not in update.gradients"))
        if prefix:
            said += f", and every name begins with '{prefix}'"
        lacking = Finding(Kind.NAMES, float(len(missing)), said, untrained, inf)
        nothing = len(missing) == len(wanted)
        return None if nothing else replace(update, gradients=full, noise=noise), lacking
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


def _foreign(extra: list[str], missing: list[str]) -> str:
    """Names of another model, in words."""
    return (
        f"{len(extra)} tensors, '{extra[0]}' first, are no parameters of the model, and "
        f"{len(missing)} of its own, '{missing[0]}' first, are missing"
    )


def _in_order(update: Update, wanted: dict[str, torch.Size]) -> bool:
    """True if the tensors have the shapes of the model's parameters one by one."""
    return [g.shape for g in update.gradients.values()] == list(wanted.values())


def _numbered(update: Update, wanted: dict[str, torch.Size], said: str) -> tuple[Update, Finding]:
    """Names say nothing: the order may still be the model's, if every shape agrees."""
    named = replace(update, gradients=dict(zip(wanted, update.gradients.values(), strict=True)))
    said += "; in the order sent every shape fits"
    return named, Finding(Kind.NAMES, float(len(wanted)), said, str(NUMBERED), inf)
