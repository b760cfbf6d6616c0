"""A network from a string: a built-in name with options, or ``package.module:factory``.

What the command line accepts::

    lenet                              a built-in network
    lenet:activation=tanh,classes=100  with options
    mypackage.nets:build               whatever build() returns; the current directory is importable

The network comes back in eval mode.  Weights that no file gives are drawn with seed 0, so that two
commands which name the same network meet the same weights.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rgap.models.weights import listed, load_weights

if TYPE_CHECKING:
    from torch import nn

    from rgap.priors.generator import Generator

__all__ = ["expected", "resolve", "resolve_generator"]

SEED = 0
_WORDS = {"true": True, "false": False, "none": None}


def resolve(spec: str, weights: str | os.PathLike[str] | None = None) -> nn.Module:
    """Build the network that ``spec`` names and load ``weights`` into it.

    Args:
        spec: a built-in name, ``name:key=value,...``, or ``package.module:factory`` (a function,
            an ``nn.Module`` class, or a module object), optionally ``...:factory:key=value,...``.
            Lists of sizes are written ``512x512``, or ``512`` for one.
        weights: a safetensors file with exactly the network's tensors, or None.

    Returns:
        The network in eval mode.  The global random state is left as it was.

    Raises:
        ValueError: a name, option, factory or weights file that does not work; the message says
            what to write instead.

    >>> resolve("lenet:classes=7").training
    False
    >>> resolve("lenett")
    Traceback (most recent call last):
    ...
    ValueError: model: expected a built-in network ... got 'lenett'; did you mean 'lenet'?
    """
    import torch

    from rgap.priors.generator import Generator

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = _build(spec.strip())
    if isinstance(model, Generator):
        raise ValueError(f"model: expected a network, {spec.strip()!r} makes a Generator")
    _say_mode(spec.strip(), model)
    model.eval()
    if weights is not None:
        load_weights(model, weights)
    return model


def resolve_generator(
    spec: str, weights: str | os.PathLike[str] | None = None
) -> nn.Module | Generator:
    """Build the generator that ``spec`` names and load ``weights`` into it.

    Args:
        spec: as for :func:`resolve`; the factory may return a
            :class:`~rgap.priors.generator.Generator`, which says its codes and its range.
        weights: as for :func:`resolve`.

    Raises:
        ValueError: as :func:`resolve`.

    >>> resolve_generator("rgap.priors.generator:convolutional:shape=1x8x8,latent=3").latent_shape
    (3,)
    """
    import torch

    from rgap.priors.generator import Generator

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        made = _build(spec.strip())
    network = made.blocks if isinstance(made, Generator) else made
    network.eval()
    if weights is not None:
        load_weights(network, weights)
    return made


def _say_mode(spec: str, model: nn.Module) -> None:
    """Warn where a factory returns a network whose train mode, here left, is another function."""
    from rgap.network.agreement import by_mode

    for name, module in model.named_modules():
        if does := by_mode(module):
            warnings.warn(
                f"model: {spec!r} came in train mode, in which {name!r} "
                f"({type(module).__name__}) {does}; it is used in eval mode. Write "
                "`return model.eval()` in the factory, or rgap check where a client did train so",
                stacklevel=3,
            )
            return


def expected(spec: str) -> tuple[tuple[int, ...] | None, str]:
    """Input shape (None if unknown) and loss that the network of ``spec`` is usually used with.

    >>> expected("fcn3")
    ((1, 28, 28), 'binary_cross_entropy_with_logits')
    >>> expected("mypackage.nets:build")
    (None, 'cross_entropy')
    """
    from rgap.models.published import INPUT_SHAPES, LOSSES

    name, _, rest = spec.strip().partition(":")
    if name not in INPUT_SHAPES:
        return None, "cross_entropy"
    stated = dict(item.strip().partition("=")[::2] for item in rest.split(",")).get("input_shape")
    shape = INPUT_SHAPES[name] if stated is None else _value(stated)
    return shape, LOSSES[name]


def _build(spec: str) -> nn.Module | Generator:
    from rgap.models.published import NAMED

    name, _, rest = spec.partition(":")
    if name in NAMED:
        options = _options(rest, NAMED[name], name)
        if "seed" in (_parameters(NAMED[name]) or ()):
            options.setdefault("seed", SEED)
        return _call(NAMED[name], options, name)
    file = Path(name)
    if file.suffix == ".py":
        here = file.absolute().parent == Path.cwd()
        raise ValueError(
            f"model: expected a module, got the file {name!r}; write "
            f"{file.stem}:{rest or 'factory'} in {'this directory' if here else file.parent}, "
            "where factory is a function in it that returns the network"
        )
    if not rest or "=" in rest.partition(":")[0]:
        close = difflib.get_close_matches(name, NAMED, n=1)
        raise ValueError(
            f"model: expected a built-in network ({', '.join(NAMED)}) or package.module:factory, "
            f"got {spec!r}" + (f"; did you mean {close[0]!r}?" if close else "")
        )
    return _imported(name, rest)


def _imported(module_name: str, rest: str) -> nn.Module | Generator:
    from torch import nn

    from rgap.priors.generator import Generator

    attribute, _, text = rest.partition(":")
    where = f"{module_name}:{attribute}"
    with _current_directory_importable():
        made: Any = _attribute(_module(module_name), module_name, attribute)
        if not isinstance(made, nn.Module | Generator):
            if not callable(made):
                raise ValueError(
                    f"model: expected {where!r} to be a factory or a torch.nn.Module, got a "
                    f"{type(made).__name__}; name a function that returns the network"
                )
            made = _call(made, _options(text, made, where), where)
        elif text:
            raise ValueError(f"model: {where!r} is a network already, it takes no options")
    return made  # type: ignore[no-any-return]


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise ValueError(
                f"model: importing {name!r} failed: it needs the module {error.name!r}, which is "
                "not installed"
            ) from error
        here = [path.stem for path in Path.cwd().glob("*.py")]
        close = difflib.get_close_matches(name, here, n=1)
        raise ValueError(
            f"model: no module {error.name!r}, looked for in the current directory "
            f"({Path.cwd()}) and among the installed packages"
            + (f"; did you mean {close[0]!r}?" if close else "; write package.module:factory")
        ) from error
    except Exception as error:  # a user's module may raise anything while it is imported
        raise ValueError(
            f"model: importing {name!r} failed: {type(error).__name__}: {error}"
        ) from error


def _attribute(module: Any, name: str, attribute: str) -> Any:
    place = module
    for part in attribute.split("."):
        if not hasattr(place, part):
            names = [n for n, v in vars(place).items() if callable(v) and not n.startswith("_")]
            close = difflib.get_close_matches(part, names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {listed(names)}"
            raise ValueError(f"model: the module {name!r} has no {attribute!r}; {hint}")
        place = getattr(place, part)
    return place


def _call(factory: Callable[..., Any], options: dict[str, Any], name: str) -> nn.Module | Generator:
    from torch import nn

    from rgap.priors.generator import Generator

    try:
        made = factory(**options)
    except Exception as error:  # a user's factory may raise anything
        raise ValueError(
            f"model: {name}({_written(options)}) failed: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(made, nn.Module | Generator):
        raise ValueError(
            f"model: expected {name}() to return a torch.nn.Module, got a {type(made).__name__}; "
            "does the factory end in `return model`?"
        )
    return made


def _options(text: str, factory: Callable[..., Any], name: str) -> dict[str, Any]:
    """``key=value,...`` as keyword arguments of ``factory``."""
    options: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not value:
            before = next(reversed(options), "")
            if not equals and before in _sequences(factory):
                raise ValueError(
                    f"model: expected the sizes of {before!r} joined by x, got {item!r} after a "
                    f"comma; write {name}:{before}=64x{key}"
                )
            raise ValueError(
                f"model: expected options key=value for {name!r}, got {item!r}; write "
                f"{name}:{key or 'key'}=value"
            )
        options[key] = _value(value)
    accepted = _parameters(factory)
    unknown = [] if accepted is None else [key for key in options if key not in accepted]
    if unknown:
        close = difflib.get_close_matches(unknown[0], accepted or (), n=1)
        raise ValueError(
            f"model: {name!r} has no option {unknown[0]!r}"
            + (f"; did you mean {close[0]!r}?" if close else f"; it takes {listed(accepted or ())}")
        )
    for key in _sequences(factory) & options.keys():
        if type(options[key]) is int:  # a list of one size has no x in it
            options[key] = (options[key],)
    return options


def _parameters(factory: Callable[..., Any]) -> tuple[str, ...] | None:
    """Names of the keywords that ``factory`` takes; None where it takes any, or will not say."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except ValueError:
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return tuple(p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY)


def _sequences(factory: Callable[..., Any]) -> set[str]:
    """Names of the keywords whose default is a tuple or a list."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except ValueError:
        return set()
    return {p.name for p in parameters if isinstance(p.default, (tuple, list))}


def _value(text: str) -> Any:
    """A number, a truth value, sizes written ``512x512``, or the text itself."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    sizes = text.split("x")
    if all(part.isdigit() for part in sizes):
        return tuple(int(part) for part in sizes)
    return text


@contextlib.contextmanager
def _current_directory_importable() -> Iterator[None]:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the user's module may have changed sys.path
            sys.path.remove(here)


def _written(options: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in options.items())
