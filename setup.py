"""The compiled core, fastda._C. All else is in pyproject.toml; csrc/build_backend.py runs before this."""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent

WITHOUT_COMPILING = {"egg_info", "dist_info", "sdist"}

# Apple's clang has no OpenMP: the kernels use one thread there, and `fastda doctor` says so.
OPENMP = {"win32": ["/openmp"], "darwin": []}.get(sys.platform, ["-fopenmp"])
OPTIONS = ["/O2"] if sys.platform == "win32" else ["-O3", "-g0", "-Wall", "-fvisibility=hidden"]


def compiled_core() -> dict:
    """What setup() needs to build the extension and, beside it, the stamp that says what it was built for."""
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    version = runpy.run_path(str(ROOT / "fastda" / "version.py"))["__version__"]
    stamp = runpy.run_path(str(ROOT / "fastda" / "kernels" / "stamp.py"))
    stamp_file = os.path.join("fastda", stamp["FILE"])
    sources = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.cpp"))

    class BuildWithStamp(BuildExtension):
        def build_extensions(self) -> None:
            super().build_extensions()
            content = stamp["make"](ROOT / "csrc", version, torch.__version__, torch.version.cuda)
            Path(self.build_lib, stamp_file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

        def copy_extensions_to_source(self) -> None:  # pip install -e
            super().copy_extensions_to_source()
            self.copy_file(os.path.join(self.build_lib, stamp_file), stamp_file)

        def get_outputs(self) -> list[str]:
            return [*super().get_outputs(), os.path.join(self.build_lib, stamp_file)]

        def get_output_mapping(self) -> dict[str, str]:
            in_tree = {os.path.join(self.build_lib, stamp_file): stamp_file} if self.inplace else {}
            return {**super().get_output_mapping(), **in_tree}

    core = CppExtension(
        "fastda._C",
        sources,
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[
            ("FASTDA_VERSION", version),
            ("FASTDA_TORCH_VERSION", torch.__version__),
            ("FASTDA_CUDA_VERSION", torch.version.cuda or ""),
        ],
        extra_compile_args=[*OPTIONS, *OPENMP],
        extra_link_args=[] if sys.platform == "win32" else OPENMP,
    )
    return {"ext_modules": [core], "cmdclass": {"build_ext": BuildWithStamp}}


wanted = os.environ.get("FASTDA_NO_KERNELS") != "1" and not WITHOUT_COMPILING.intersection(sys.argv)
setup(**(compiled_core() if wanted else {}))
