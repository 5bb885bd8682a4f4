"""Facts about this machine and this source tree, for reports; each is left out where it cannot be had."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import psutil  # a dependency of Ultralytics

PACKAGE = Path(__file__).resolve().parent.parent


def hardware() -> dict[str, str]:
    """Processor, cores, memory, graphics processors and system, in words."""
    facts = {
        "processor": _processor(),
        "cores": str(os.cpu_count() or ""),
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "GPU": _gpus(),
    }
    return {name: value for name, value in {**facts, "system": platform.platform()}.items() if value}


def commits() -> dict[str, str]:
    """Git commits of the package's source tree and of the working folder, where they are in one."""
    found = {}
    # An installed package may lie in an environment inside somebody's repository: only files that git tracks count.
    if _output("git", "-C", str(PACKAGE), "ls-files", "__init__.py"):
        found["yolo_sophia's source"] = _commit(PACKAGE)
    top = _output("git", "rev-parse", "--show-toplevel")
    if top and top != _output("git", "-C", str(PACKAGE), "rev-parse", "--show-toplevel"):
        found["working folder"] = _commit(Path.cwd())
    return {name: commit for name, commit in found.items() if commit}


def _commit(folder: Path) -> str:
    commit = _output("git", "-C", str(folder), "rev-parse", "HEAD")
    changed = _output("git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no")
    return commit + (" with local changes" if commit and changed else "")


def _processor() -> str:
    try:
        listed = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.M)
    except OSError:
        listed = None
    name = listed[1] if listed else _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor()
    return " ".join((name or platform.machine()).split())


def _gpus() -> str:
    """Names from NVIDIA's tool: the report does not import torch for this."""
    names = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()
    counts = {name: names.count(name) for name in dict.fromkeys(names)}
    return ", ".join(f"{count} x {name}" if count > 1 else name for name, count in counts.items())


def _output(*command: str) -> str:
    if not (program := shutil.which(command[0])):
        return ""
    try:
        done = subprocess.run([program, *command[1:]], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
