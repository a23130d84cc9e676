"""Patching a library, and taking the patch away."""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from ..reference import checks
from .replacement import Found, Replacement, find

LIBRARIES = ("domainbed", "easyfsl", "learn2learn", "pytorch_adapt", "tllib", "torchmeta")

_logger = logging.getLogger("fastda")
_active: dict[str, patch] = {}


@dataclass(frozen=True)
class Replaced:
    """A function that was replaced.

    Attributes:
        name: the function, with its module.
        op: of fastda, which computes it now.
        elsewhere: other names under which it had been imported, and which are replaced too.
    """

    name: str
    op: str
    elsewhere: tuple[str, ...] = ()


class patch:
    r"""Let fastda compute what another library computes: `fastda.patch("easyfsl")`, for good or in a `with` block.

    The functions keep the library's names, arguments and conventions; so do its results, but for rounding and for what
    fastda's ops do better: half precision accumulates in float32 and gives losses and distances in float32, second
    derivatives exist, bad input has an error that names the argument. Names that were imported before are replaced too.
    What fastda has no op for is left alone, and so are calls that its op does not serve. Whatever the global random
    numbers would have been, they stay.

    Before anything is changed each function is compared with its replacement: arguments and defaults, and values and
    gradients on small random inputs in float64. So a version of the library that computes something else is found, and
    one that was merely edited is not refused.

    Args:
        library: "domainbed", "easyfsl", "learn2learn", "pytorch_adapt", "tllib" or "torchmeta".

    Attributes:
        version: of the library that is installed; empty where it does not say.
        replaced: one entry a function: its name, the op that computes it now, and where else it had been imported.

    Raises:
        ValueError: a library that is not known.
        ModuleNotFoundError: the library is not installed.
        RuntimeError: the library is not as expected; says which functions differ and how. Nothing is changed then.

    Printed, it is a report of what was replaced. Patching twice changes nothing more.

    Example:
        >>> import fastda
        >>> with fastda.patch("easyfsl") as patched:  # doctest: +SKIP
        ...     train()
        >>> print(patched)  # doctest: +SKIP
        easyfsl 1.5.0: 2 functions are computed by fastda
          easyfsl.methods.utils.compute_prototypes: class_means
          easyfsl.methods.few_shot_classifier.FewShotClassifier.l2_distance_to_prototypes: pairwise_distance
    """

    def __init__(self, library: str) -> None:
        self.library = checks.option("library", library, LIBRARIES)
        self._began = library not in _active
        if self._began:
            self.version, self._found = _inspect(library)
            self.replaced = _replace(self._found)
            _active[library] = self
            _logger.info("%s", self)
        else:
            self.version, self.replaced = _active[library].version, _active[library].replaced

    def __enter__(self) -> patch:
        return self

    def __exit__(self, *exception) -> None:
        if self._began:
            unpatch(self.library)

    def __repr__(self) -> str:
        count = f"{len(self.replaced)} function{'s are' if len(self.replaced) != 1 else ' is'}"
        lines = [f"{self.library} {self.version}".rstrip() + f": {count} computed by fastda"]
        for one in self.replaced:
            elsewhere = f" (also {', '.join(one.elsewhere)})" if one.elsewhere else ""
            lines.append(f"  {one.name}: {one.op}{elsewhere}")
        return "\n".join(lines)


def unpatch(library: str | None = None) -> None:
    """Give a library its own functions back, wherever they are held; names imported since the patch too.

    Args:
        library: as for :func:`fastda.patch`; None for all that are patched. One that is not patched stays as it is.

    Raises:
        ValueError: a library that is not known.

    Example:
        >>> import fastda
        >>> fastda.unpatch()
    """
    if library is not None:
        checks.option("library", library, LIBRARIES)
    for name in list(_active) if library is None else [library]:
        if name in _active:
            _restore(_active.pop(name)._found)


def replacements_of(library: str) -> tuple[Replacement, ...]:
    return importlib.import_module(f"{__package__}.{library}").REPLACEMENTS


def _inspect(library: str) -> tuple[str, list[Found]]:
    """The version that is installed, and what there is to replace; raises where it is not as expected."""
    try:
        importlib.import_module(library)
    except ModuleNotFoundError as error:
        if error.name != library:
            raise
        raise ModuleNotFoundError(
            f"library: expected {library} to be installed, got none; install it, or leave the patch out", name=library
        ) from None
    version = _version(library)
    looked_up = [find(replacement) for replacement in replacements_of(library)]
    differences = [f"  {difference}" for difference in looked_up if isinstance(difference, str)]
    if differences:
        known = importlib.import_module(f"{__package__}.{library}").KNOWN
        raise RuntimeError(
            f"library: expected {library} as fastda knows it ({known}), got version {version or 'unknown'}, in which\n"
            + "\n".join(differences)
            + f"\nNothing is changed; install a version that fastda knows, or leave {library} unpatched"
        )
    return version, [found for found in looked_up if found is not None]


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(sys.modules[library], "__version__", ""))


def _replace(found: list[Found]) -> tuple[Replaced, ...]:
    for one in found:
        setattr(one.owner, one.attribute, one.as_attribute(one.successor))
    names = _exchange([(one.original, one.successor) for one in found], _classes(found))
    return tuple(
        Replaced(
            one.replacement.path, one.replacement.op, tuple(x for x in dict.fromkeys(held) if x != one.replacement.path)
        )
        for one, held in zip(found, names)
    )


def _restore(found: list[Found]) -> None:
    for one in found:
        setattr(one.owner, one.attribute, one.as_attribute(one.original))
    _exchange([(one.successor, one.original) for one in found], _classes(found))


def _classes(found: list[Found]) -> tuple[type, ...]:
    return tuple(one.owner for one in found if isinstance(one.owner, type))


def _exchange(pairs: list[tuple[Callable, Callable]], classes: tuple[type, ...]) -> list[list[str]]:
    """Wherever a module or an object of these classes holds the first of a pair, put the second; the names, by pair."""
    place_of = {id(old): place for place, (old, _) in enumerate(pairs)}
    namespaces = [(name, vars(x)) for name, x in list(sys.modules.items()) if isinstance(x, ModuleType)]
    objects = (x for x in gc.get_objects() if issubclass(type(x), classes)) if classes else ()
    namespaces += [(f"an object of {type(x).__qualname__}", vars(x)) for x in objects]
    names: list[list[str]] = [[] for _ in pairs]
    for owner, namespace in namespaces:
        for name, value in list(namespace.items()):
            place = place_of.get(id(value))
            if place is not None:
                namespace[name] = pairs[place][1]
                names[place].append(f"{owner}.{name}")
    return names
