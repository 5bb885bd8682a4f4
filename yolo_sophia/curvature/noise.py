"""Noise of an estimate that depends on a seed and a count alone, and leaves the global random states as they were."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def noise_seed(*parts: int) -> int:
    """Seed of one estimate's noise; its parts (run's seed, rank, number of the estimate) are all the state it needs."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def forked(seed: int) -> Iterator[None]:
    """Seed the global random states of PyTorch, Python and NumPy; give them back as they were at the end.

    Whatever runs inside, dropout, a shuffling loader or an estimator written by a user, then draws reproducible noise
    and changes nothing for the training.
    """
    # Not torch.manual_seed: where CUDA is not in use yet, it would leave this seed to its start.
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    python, numpy = random.getstate(), sys.modules.get("numpy")
    arrays = numpy.random.get_state() if numpy else None
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(seed)
        random.seed(seed)
        if numpy:
            numpy.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            if numpy:
                numpy.random.set_state(arrays)
