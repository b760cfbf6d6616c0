"""What one kind of thing is called by: built in, registered here, or offered by a distribution.

Layer kinds, label methods, priors, search presets and defences each have one :class:`Registry`.  A
distribution adds to one by an entry point of its group, in its ``pyproject.toml``::

    [project.entry-points."rgap.labels"]
    mine = "my_package:mine"

The metadata of what is installed are read once, at the first name that is not built in, and what
an entry point names is imported when it is asked for.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

__all__ = ["PluginError", "PluginWarning", "Registry", "offered"]

T = TypeVar("T")


class PluginError(ValueError):
    """What a distribution offers does not load, or is not what it is offered as."""


class PluginWarning(UserWarning):
    """The same, where the work goes on without it."""


class Registry(Mapping[str, T], Generic[T]):
    """Names of one kind and what they stand for; built-in names come first.

    Args:
        group: of entry points, ``"rgap.labels"``.
        kind: what one is called, ``"label method"``.
        expected: what an entry has to be, in words.
        fits: whether a value is that.

    >>> squares = Registry("rgap.example", "example", "a function", callable)
    >>> _ = squares.register("half", lambda x: x / 2)
    >>> squares["half"](3.0), list(squares), "third" in squares
    (1.5, ['half'], False)
    """

    def __init__(
        self, group: str, kind: str, expected: str, fits: Callable[[object], bool]
    ) -> None:
        self.group, self.kind, self._expected, self._fits = group, kind, expected, fits
        self._own: dict[str, T] = {}
        self._loaded: dict[EntryPoint, T] = {}

    def register(self, name: str, value: T) -> T:
        """Let a name stand for a value from now on, and hand the value back.

        Raises:
            TypeError: the value is not of this kind.
        """
        if not self._fits(value):
            raise TypeError(f"{self.kind} {name!r}: expected {self._expected}, got {value!r}")
        self._own[name] = value
        return value

    def __getitem__(self, name: str) -> T:
        """What a name stands for, imported if need be.

        Raises:
            KeyError: nothing has that name.
            PluginError: what a distribution offers under it does not load.
        """
        return self._own[name] if name in self._own else self._load(offered(self.group)[name])

    def __contains__(self, name: object) -> bool:
        return name in self._own or name in offered(self.group)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self._own, *offered(self.group))))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def chosen(self, argument: str, name: str) -> T:
        """What a name stands for that somebody wrote as an argument.

        Raises:
            ValueError: nothing has that name, or it does not load (:class:`PluginError`).
        """
        if name not in self:
            first = next(iter(self), "")
            raise ValueError(
                f"{argument}: expected one of {', '.join(map(repr, self))}, got {name!r}; write "
                f"{argument}={first!r}"
            )
        return self[name]

    def working(self) -> dict[str, T]:
        """Every name that loads; each of the others is a :class:`PluginWarning`."""
        values = {}
        for name in self:
            try:
                values[name] = self[name]
            except PluginError as error:
                warnings.warn(str(error), PluginWarning, stacklevel=2)
        return values

    def _load(self, point: EntryPoint) -> T:
        if point in self._loaded:
            return self._loaded[point]
        named = f"the {self.kind} {point.name!r} of {_distribution(point)}"
        try:
            value = point.load()
        except Exception as error:  # whatever a foreign module raises while it is imported
            reason = str(error).partition("\n")[0]
            raise PluginError(
                f"{named} does not load ({point.value}: {type(error).__name__}: {reason}); mend or "
                "uninstall that distribution"
            ) from error
        if not self._fits(value):
            raise PluginError(
                f"{named} is no {self.kind} ({point.value}: expected {self._expected}, got "
                f"{type(value).__name__}); mend or uninstall that distribution"
            )
        self._loaded[point] = value
        return self._loaded[point]


@cache
def offered(group: str) -> dict[str, EntryPoint]:
    """Entry points of a group by name, read once; of two of one name the first.

    ``offered.cache_clear()`` after something was installed in a running process.
    """
    points: dict[str, EntryPoint] = {}
    for point in entry_points(group=group):
        other = points.setdefault(point.name, point)
        if other != point:
            warnings.warn(
                f"{point.name!r} of the group {group} is offered by {_distribution(other)} and by "
                f"{_distribution(point)}; the first is used",
                PluginWarning,
                stacklevel=3,
            )
    return points


def _distribution(point: EntryPoint) -> str:
    dist = point.dist
    return "an unnamed distribution" if dist is None else f"{dist.name} {dist.version}"
