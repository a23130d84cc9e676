"""timm imports torchvision, which beside a CPU build of torch pulls CUDA packages: names that do nothing stand in for
it."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types


class _Names(type):
    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Stub(types.ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Names(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Stub(spec.name)

    def exec_module(self, module) -> None: ...


def import_timm():
    """timm, with or without torchvision; ImportError where timm is not installed."""
    finder = _Finder()
    sys.meta_path.append(finder)  # last: a real torchvision would be found before
    try:
        import timm
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if isinstance(module, _Stub)]:
            del sys.modules[name]
    return timm
