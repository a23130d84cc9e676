"""Patching libraries when a program imports them."""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Callable, Sequence

from .libraries import replacements_of


def when_imported(libraries: Sequence[str], patch: Callable[[str], None], failed: Callable[[str], None]) -> None:
    """Call `patch` with the name of each library, once, when a program has imported modules that it concerns.

    That is when the outermost import of the library ends, before the program goes on: nothing is half imported then.
    `failed` is called with the name of a library one of whose modules raises while it is imported.
    """
    sys.meta_path.insert(0, _Watch(libraries, patch, failed))


class _Watch(importlib.abc.MetaPathFinder):
    """Finds what others find, and sees it being executed."""

    def __init__(self, libraries: Sequence[str], patch: Callable[[str], None], failed: Callable[[str], None]) -> None:
        self.concerned = {library: {x.module for x in replacements_of(library)} for library in libraries}
        self.depth = dict.fromkeys(libraries, 0)
        self.patch, self.failed = patch, failed

    def find_spec(self, name, path=None, target=None):
        library = name.partition(".")[0]
        if library not in self.concerned:
            return None
        others = (x for x in sys.meta_path if x is not self and hasattr(x, "find_spec"))
        spec = next((spec for x in others if (spec := x.find_spec(name, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, lambda module: self.execute(library, spec.loader, module))
        return spec

    def execute(self, library: str, loader: _Loader, module) -> None:
        self.depth[library] += 1
        try:
            loader.loader.exec_module(module)
        except Exception:
            if self.depth[library] == 1:  # what the program itself imports; a library may do without a part of its own
                self.failed(library)
            raise
        finally:
            self.depth[library] -= 1
        if self.depth[library] == 0 and self.concerned.get(library, set()) & sys.modules.keys():
            del self.concerned[library]
            self.patch(library)


class _Loader(importlib.abc.Loader):
    """A loader but for `exec_module`, which is given."""

    def __init__(self, loader, execute: Callable) -> None:
        self.loader, self.exec_module = loader, execute

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def __getattr__(self, name: str):
        if name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)
