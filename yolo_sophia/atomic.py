"""Atomic file replacement: after a crash at any moment, a file has either its old or its new content.

A file is written under a temporary name of its own in the same folder, flushed to the disk, and renamed. Processes and
threads that write the same file at once do not disturb each other; the last rename wins.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

_WAITS = (0.01, 0.1, 0.5, 2.0)
"""Seconds between attempts to replace a file on Windows."""

_DIGITS = 12
"""Hexadecimal digits at the end of a temporary name."""


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write a file atomically; text is encoded as UTF-8 and line ends are kept.

    Raises:
        OSError: The file cannot be written; the old one is unchanged.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def atomic_copy(source: Path, path: Path) -> None:
    """Copy a file atomically.

    Raises:
        OSError: As `atomic_write`.
    """
    with replacing(path) as temporary:
        shutil.copyfile(source, temporary)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a new name beside `path`; what is written there replaces `path`, or is removed after an error."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:_DIGITS]}")
    try:
        yield temporary
        flush_to_disk(temporary)
        replace_with_retry(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes left of attempts to replace `path`, which no other process may be writing."""
    for temporary in path.parent.glob(f".{path.name}.{'[0-9a-f]' * _DIGITS}"):
        temporary.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Wait until the content of a file is on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def replace_with_retry(source: Path, target: Path) -> None:
    """Rename a file, replacing the target.

    Windows refuses this while another process has the target open (a sharing violation), so it is tried again for 2.6
    seconds there.

    Raises:
        OSError: The target cannot be replaced.
    """
    for seconds in _WAITS if sys.platform == "win32" else ():
        try:
            os.replace(source, target)
            return
        except PermissionError:
            time.sleep(seconds)
    os.replace(source, target)
