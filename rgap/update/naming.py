"""Names of tensors in a model and in an update that was taken from the same one, wrapped.

``DataParallel``, ``torch.compile``, Opacus' ``GradSampleModule``, FSDP and hand-made wrappers put a
word of their own before the names of what they hold, or into the middle of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

__all__ = ["canonical", "renamed", "renaming"]

# Words that wrappers of PyTorch and Opacus add; nobody's own layers bear the longer ones.
WRAPPERS = frozenset(
    ["module", "_orig_mod", "_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module",
     "_forward_module", "_fpw_module"]
)  # fmt: skip

Value = TypeVar("Value")


def canonical(name: str) -> str:
    """A name without the words of wrappers.

    >>> canonical("module._orig_mod.features.module.0.weight")
    'features.0.weight'
    """
    *path, last = name.split(".")
    return ".".join([*(part for part in path if part not in WRAPPERS), last])


def renaming(sent: Iterable[str], model: Iterable[str]) -> dict[str, str]:
    """The model's name of every tensor sent, where leaving out a wrapper's words finds all of them.

    Beside the known wrappers' words, words that all names of one side begin with may go.  Empty
    where nothing has to be renamed, or where names stay that the model does not have.

    Args:
        sent: names in the update.
        model: names in the model; it may have more.

    >>> renaming(["net.0.weight", "net.0.bias"], ["0.weight", "0.bias"])
    {'net.0.weight': '0.weight', 'net.0.bias': '0.bias'}
    >>> renaming(["0.weight"], ["model.0.weight", "model.0.bias"])
    {'0.weight': 'model.0.weight'}
    >>> renaming(["fc.weight"], ["head.weight"])
    {}
    """
    sent, model = list(sent), list(model)
    if not sent or set(sent) <= set(model):
        return {}
    plain = {name: canonical(name) for name in sent}
    known = {canonical(name): name for name in model}
    if len(set(plain.values())) < len(sent) or len(known) < len(model):
        return {}  # two names became one: the words do tell tensors apart
    pairs = [(head, "") for head in _heads(plain.values())]
    pairs += [("", head) for head in _heads(known)]  # one side is wrapped, never both
    for theirs, ours in pairs:
        matched = {n: known.get(ours + p.removeprefix(theirs)) for n, p in plain.items()}
        if all(matched.values()):
            return {n: own for n, own in matched.items() if own is not None}
    return {}


def renamed(tensors: Mapping[str, Value], names: Mapping[str, str]) -> dict[str, Value]:
    """The tensors under their new names; those without one keep theirs."""
    return {names.get(name, name): tensor for name, tensor in tensors.items()}


def _heads(names: Iterable[str]) -> list[str]:
    """Leading words, with their dots, that all names share: the shortest first, none at all too."""
    paths = [name.split(".")[:-1] for name in names]
    heads = [""]
    for words in zip(*paths, strict=False):
        if len(set(words)) > 1:
            break
        heads.append(f"{heads[-1]}{words[0]}.")
    return heads
