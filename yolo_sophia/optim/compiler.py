"""Compiles the C++ files of this folder with the compiler of the machine, once per user; loads no library itself."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

FLAGS = ["-O3", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno", "-ffp-contract=off"]
"""Whoever wants a fused multiply-add writes it: the rounding is then the same with every compiler."""

VECTORS = {"AVX2": ["-mavx2", "-mfma", "-mf16c"], "AVX512": ["-mavx2", "-mfma", "-mf16c"]}
"""By torch's name of what the processor can do. Wider vectors than AVX2's do not help where memory is the limit."""


def build(source: str, **macros: str) -> Path:
    """Compile a file of this folder into a shared library, unless it is in the cache.

    Args:
        source: Name of the file.
        macros: What to define.

    Returns:
        The library, below $XDG_CACHE_HOME (by default ~/.cache).

    Raises:
        RuntimeError: There is no compiler, or it failed.
    """
    path = Path(__file__).with_name(source)
    words = [*command(), *(f"-D{name}={value}" for name, value in macros.items())]
    key = hashlib.sha256("\0".join([path.read_text(), platform.machine(), *words]).encode()).hexdigest()[:16]
    library = cache_folder() / f"{path.stem}-{key}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:  # several processes may do this at once
            made = Path(folder, library.name)
            run = subprocess.run([*words, str(path), "-o", str(made)], capture_output=True, text=True)
            if run.returncode:
                raise RuntimeError(
                    f"fused=True: {words[0]} could not compile {path}:\n{run.stderr[-2000:].strip()}\n"
                    "Set CXX to a C++17 compiler that works (g++ 12, clang++ 15 or newer), or leave fused out."
                )
            made.replace(library)
    return library


def command() -> list[str]:
    """The compiler and its options on this machine.

    Raises:
        RuntimeError: There is no compiler.
    """
    # On Linux the threads are torch's own: its libgomp has the name that the compiler links against.
    threads = ["-fopenmp"] if sys.platform == "linux" else []
    return [*compiler(), *FLAGS, *VECTORS.get(torch.backends.cpu.get_cpu_capability(), []), *threads]


def compiler() -> list[str]:
    """The command of the C++ compiler: $CXX, or what is found on the path.

    Raises:
        RuntimeError: None is found.
    """
    words = os.environ.get("CXX", "").split()
    for candidate in [words] if words else [["c++"], ["g++"], ["clang++"]]:
        if found := shutil.which(candidate[0]):
            return [found, *candidate[1:]]
    raise RuntimeError(
        f"fused=True needs a C++ compiler, found none ({f'CXX={words[0]}' if words else 'tried c++, g++, clang++'}). "
        "Install one (Debian, Ubuntu: apt install g++), set CXX to it, or leave fused out: the default needs none."
    )


def cache_folder() -> Path:
    """Where compiled libraries are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "yolo_sophia"
