"""Noise of an estimate that depends on a seed and a count alone, and leaves the global random states as they were."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


def noise_seed(*parts: int) -> int:
    """Seed of one estimate's noise; its parts (run's seed, rank, number of the estimate) are all the state it needs."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def preserved(devices: Sequence[torch.device] = ()) -> Iterator[None]:
    """Give PyTorch's global random states back as they were at the end: that of the CPU, and of the devices named."""
    mps = torch.mps.get_rng_state() if any(device.type == "mps" for device in devices) else None
    with torch.random.fork_rng([device for device in devices if device.type == "cuda"]):
        try:
            yield
        finally:
            if mps is not None:
                torch.mps.set_rng_state(mps)


@contextmanager
def forked(seed: int) -> Iterator[None]:
    """Seed the global random states of PyTorch, Python and NumPy; give them back as they were at the end.

    Whatever runs inside, dropout, a shuffling loader or an estimator written by a user, then draws reproducible noise
    and changes nothing for the training.
    """
    # Not torch.manual_seed: where CUDA is not in use yet, it would leave this seed to its start.
    cuda = range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)
    devices = [torch.device("cuda", i) for i in cuda] + [torch.device("mps")] * torch.backends.mps.is_available()
    python, numpy = random.getstate(), sys.modules.get("numpy")
    arrays = numpy.random.get_state() if numpy else None
    with preserved(devices):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            if device.type == "mps":
                torch.mps.manual_seed(seed)
            else:
                torch.cuda.default_generators[device.index].manual_seed(seed)
        random.seed(seed)
        if numpy:
            numpy.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            if numpy:
                numpy.random.set_state(arrays)
