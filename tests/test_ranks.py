"""Several processes outside Ultralytics: equal weights on all ranks, and h is that of the mean loss."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from yolo_sophia import DecoupledSophia, Sophia, SophiaG, SophiaH

WORLD, LOSS = 2, nn.MSELoss()
KINDS = ("grad", "estimates", "SophiaH", "Sophia", "DecoupledSophia", "not finite", "None on a rank")


def batch(rank: int) -> tuple[Tensor, Tensor]:
    noise = torch.Generator().manual_seed(rank)
    return torch.randn(6, 3, generator=noise), torch.randn(6, 2, generator=noise)


def net() -> nn.Module:
    model = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.arange(6.0).reshape(2, 3) / 6)
    return model


def diagonal(x: Tensor) -> Tensor:
    """The Hessian's diagonal of the mean squared error with respect to the weight."""
    return x.square().mean(0).expand(2, 3)


def train(kind: str, rank: int, x: Tensor, y: Tensor, steps: int = 3) -> list[Tensor]:
    """Weights and h after a few steps; `rank` only spoils the cases whose ranks differ on purpose."""
    model = net()
    outer = DistributedDataParallel(model) if dist.is_initialized() else model
    params, shared = list(model.parameters()), {"lr": 0.01, "betas": (0.9, 0.5)}
    if kind == "SophiaH":
        optimizer = SophiaH(params, hessian_interval=1, n_samples=400, **shared)
    elif kind == "Sophia":
        estimator = "Gauss-Newton-Bartlett"
        optimizer = Sophia(model, [(x, y)], params, k=1, estimator=estimator, loss_function=LOSS, **shared)
    elif kind == "DecoupledSophia":
        optimizer = DecoupledSophia(params, lambda _: [diagonal(x)], k=1, **shared)
    elif kind == "not finite":
        optimizer = DecoupledSophia(params, lambda _: [diagonal(x) * (torch.nan if rank else 1)], k=1, **shared)
    else:
        optimizer = SophiaG(params, rho="auto", **shared)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = LOSS(outer(x), y)
        if kind == "SophiaH" and optimizer.refresh_due:
            optimizer.refresh(loss)
        loss.backward()
        if kind == "grad":
            optimizer.update_hessian()
        elif kind == "estimates":
            optimizer.update_hessian([diagonal(x)])
        elif kind == "None on a rank":
            optimizer.update_hessian([None if rank else diagonal(x)])
        optimizer.step(**({"bs": 4} if kind == "grad" else {}))
    state = optimizer.state[params[0]]
    return [params[0].detach().clone(), state["hessian"].clone()]


def main(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    torch.save({kind: train(kind, rank, *batch(rank)) for kind in KINDS}, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, list[Tensor]]]:
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        torch.multiprocessing.spawn(main, (port, folder), WORLD)
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.skipif(sys.platform == "win32", reason="gloo over TCP is set up for POSIX here")
@pytest.mark.parametrize("kind", KINDS)
def test_the_ranks_stay_equal(kind, ranks):
    for first, second in zip(ranks[0][kind], ranks[1][kind]):
        assert torch.equal(first, second) and first.isfinite().all()


@pytest.mark.skipif(sys.platform == "win32", reason="gloo over TCP is set up for POSIX here")
@pytest.mark.parametrize("kind", ["grad", "estimates", "DecoupledSophia", "SophiaH"])
def test_h_and_weights_are_those_of_one_process_with_all_data(kind, ranks):
    x, y = (torch.cat(parts) for parts in zip(*(batch(rank) for rank in range(WORLD))))
    for found, expected in zip(ranks[0][kind], train(kind, 0, x, y)):
        # Random signs differ from those of one process; the diagonal is theirs within the noise of 400 samples.
        tolerance = 0.2 if kind == "SophiaH" else 1e-5
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance / 5)


@pytest.mark.skipif(sys.platform == "win32", reason="gloo over TCP is set up for POSIX here")
def test_an_estimate_is_dropped_by_all_ranks_and_missing_ones_count_as_zero(ranks):
    assert not ranks[0]["not finite"][1].any()
    expected = diagonal(batch(0)[0]) / WORLD * (1 - 0.5**3)
    torch.testing.assert_close(ranks[1]["None on a rank"][1], expected)
