"""The compiled core, fastda._C. All else is in pyproject.toml; csrc/build_backend.py runs before this."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent

WITHOUT_COMPILING = {"egg_info", "dist_info", "sdist"}

# Apple's clang has no OpenMP: the kernels use one thread there, and `fastda doctor` says so.
OPENMP = {"win32": ["/openmp"], "darwin": []}.get(sys.platform, ["-fopenmp"])
# Nobody asks the kernels for errno or for floating-point exceptions; NaN and Inf stay what they are.
VECTORISED = ["-O3", "-fno-math-errno", "-fno-trapping-math"]
OPTIONS = ["/O2"] if sys.platform == "win32" else [*VECTORISED, "-g0", "-Wall", "-fvisibility=hidden"]
LINKED = [] if sys.platform == "win32" else OPENMP
VECTOR_BYTES = {"default": 16, "avx2": 32, "avx512": 64}
SANITIZE = os.environ.get("FASTDA_SANITIZE")  # tests/sanitize.sh: 1, or an instruction set, which alone is compiled
if SANITIZE == "1" or SANITIZE in VECTOR_BYTES:  # vptr would need the type information of PyTorch
    SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
    OPTIONS = [*OPTIONS, "-O1", "-g1", "-fno-omit-frame-pointer", *SANITIZERS]
    LINKED = [*LINKED, *SANITIZERS]


# Where no architectures are chosen and none can be asked for: those that most machines have, and code for newer ones.
ARCHITECTURES = "7.5;8.0;8.6;9.0+PTX"


def without_cuda() -> str:
    """Why the kernels for CUDA are left out; empty where they are built. Whether a GPU is there does not matter."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if CUDA_HOME is None or not any(Path(CUDA_HOME, "bin", name).is_file() for name in ("nvcc", "nvcc.exe")):
        cure = f"install one of version {torch.version.cuda} and set CUDA_HOME"
        return f"no CUDA toolkit found (CUDA_HOME is {CUDA_HOME}); {cure}"
    release = subprocess.check_output([Path(CUDA_HOME, "bin", "nvcc"), "--version"], text=True)
    version = re.search(r"release (\d+)\.", release).group(1)
    if version != torch.version.cuda.partition(".")[0]:
        cure = "set CUDA_HOME to one that fits"
        return f"the toolkit at {CUDA_HOME} is of CUDA {version}, torch of {torch.version.cuda}; {cure}"
    return ""


def compiled_core() -> dict:
    """What setup() needs to build the extension and, beside it, the stamp that says what it was built for."""
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    no_cuda = without_cuda()
    if no_cuda and os.environ.get("FASTDA_FORCE_CUDA") == "1":
        raise SystemExit(f"fastda cannot compile its kernels for CUDA, which FASTDA_FORCE_CUDA=1 asks for: {no_cuda}")
    if not no_cuda and torch.cuda.device_count() == 0:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    Extension = CppExtension if no_cuda else CUDAExtension

    version = runpy.run_path(str(ROOT / "fastda" / "version.py"))["__version__"]
    stamp = runpy.run_path(str(ROOT / "fastda" / "kernels" / "stamp.py"))
    stamp_file = os.path.join("fastda", stamp["FILE"])
    suffixes = (".cpp",) if no_cuda else (".cpp", ".cu")
    files = (path for path in (ROOT / "csrc").rglob("*") if path.suffix in suffixes)
    sources = sorted(path.relative_to(ROOT).as_posix() for path in files)

    class BuildWithStamp(BuildExtension):
        def build_extensions(self) -> None:
            super().build_extensions()
            content = stamp["make"](ROOT / "csrc", version, torch.__version__, torch.version.cuda, no_cuda)
            Path(self.build_lib, stamp_file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

        def copy_extensions_to_source(self) -> None:  # pip install -e
            super().copy_extensions_to_source()
            self.copy_file(os.path.join(self.build_lib, stamp_file), stamp_file)

        def get_outputs(self) -> list[str]:
            return [*super().get_outputs(), os.path.join(self.build_lib, stamp_file)]

        def get_output_mapping(self) -> dict[str, str]:
            in_tree = {os.path.join(self.build_lib, stamp_file): stamp_file} if self.inplace else {}
            return {**super().get_output_mapping(), **in_tree}

    core = Extension(
        "fastda._C",
        sources,
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[
            ("FASTDA_VERSION", version),
            ("FASTDA_TORCH_VERSION", torch.__version__),
            ("FASTDA_CUDA_VERSION", torch.version.cuda or ""),
            *([] if no_cuda else [("FASTDA_WITH_CUDA", None)]),
            *([("FASTDA_ONLY", str(VECTOR_BYTES[SANITIZE]))] if SANITIZE in VECTOR_BYTES else []),
        ],
        extra_compile_args={"cxx": [*OPTIONS, *OPENMP], "nvcc": ["-O3"]},
        extra_link_args=LINKED,
    )
    return {"ext_modules": [core], "cmdclass": {"build_ext": BuildWithStamp}}


wanted = os.environ.get("FASTDA_NO_KERNELS") != "1" and not WITHOUT_COMPILING.intersection(sys.argv)
setup(**(compiled_core() if wanted else {}))
