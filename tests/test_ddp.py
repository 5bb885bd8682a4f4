"""Two processes: Ultralytics' own script and loop under gloo, with the real hooks (`two_processes.py`)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import ultralytics.utils.dist as launch
from two_processes import RANKS, TwoProcesses
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import DEFAULT_CFG_DICT

from yolo_sophia.curvature import GaussNewtonBartlett
from yolo_sophia.curvature.noise import noise_seed
from yolo_sophia.integration.criteria import recorder_for
from yolo_sophia.integration.subsample import take_part

pytestmark = [pytest.mark.slow, pytest.mark.compat]
BATCH = 8  # of each rank


@pytest.fixture(scope="module")
def train(tiny_data, tiny_model, tmp_path_factory, python) -> Callable[..., SimpleNamespace]:
    """What the ranks saw of a training; with beta2 = 0, h is the estimate that was committed last."""

    def run(spoil: int = -1, edit: str = "", **settings) -> SimpleNamespace:
        folder = tmp_path_factory.mktemp("ranks")
        given = {
            "model": str(tiny_model),
            "data": str(tiny_data),
            "imgsz": 64,
            "batch": RANKS * BATCH,  # a step each epoch
            "nbs": RANKS * BATCH,
            "device": "cpu",
            "plots": False,
            "val": False,
            "save": False,
            "amp": False,
            "seed": 3,
            "project": str(folder),
            "name": "run",
            "optimizer": "SophiaG",
            "warmup_epochs": 0,
            "beta2": 0.0,
            "hessian_average": "element",
            "hessian_warmup": 0,
            "hessian_interval": 2,
            "hessian_fraction": 0.5,
            "lr0": 0.001,
            "lr_factors": {"new": "auto"},  # decided by each rank for itself: 10
        }
        parent = TwoProcesses(overrides={**given, **settings})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch, "USER_CONFIG_DIR", folder)
            script = launch.generate_ddp_file(parent)
        port, tests = launch.find_free_network_port(), Path(__file__).parent
        command = ["-m", "torch.distributed.run", "--nproc_per_node", RANKS, "--master_port", port, script]
        done = python(*command, SEEN=str(folder), SPOIL=str(spoil), EDIT=edit, PYTHONPATH=f"{tests}:{tests.parent}")
        seen = [torch.load(folder / f"rank{r}.pt", weights_only=False) for r in range(RANKS)]
        return SimpleNamespace(args=parent.args, seen=seen, folder=folder / "run", said=done.stdout + done.stderr)

    return run


@pytest.fixture(scope="module")
def run(train) -> SimpleNamespace:
    """Fifty steps with a refresh at every other one; the eleventh estimate of the second rank is not finite."""
    return train(spoil=10, epochs=50)


def check_window(run: SimpleNamespace, index: int, images: int) -> None:
    """Gradient and h are those of the sum of both losses, computed here in one process with the labels of each rank."""
    windows = [seen["windows"][index] for seen in run.seen]
    assert not torch.equal(*(window["batch"]["img"] for window in windows))
    gradients, estimates = [], []
    for rank, window in enumerate(windows):
        for size in (BATCH, images):
            model = DetectionModel(run.args.model, nc=6, verbose=False)
            model.args = run.args
            model.load_state_dict(window["start"])
            model.train()
            model.criterion = model.init_criterion()
            (recorder := recorder_for(model, model.criterion)).start()
            loss, _ = model(take_part(window["batch"], size))
            params = {n: p for n, p in model.named_parameters() if ".dfl." not in n}
            gradient = torch.autograd.grad(loss.sum(), params.values(), retain_graph=True)
            generator = torch.Generator().manual_seed(noise_seed(run.args.seed, rank, index))
            found = GaussNewtonBartlett()(recorder.terms(), list(params.values()), generator)
            if size == BATCH:
                whole = gradient
        gradients.append(whole)
        estimates.append([torch.zeros_like(p) if e is None else e for p, e in zip(params.values(), found)])
    for window in windows:
        assert set(params) == set(window["h"])
        for i, name in enumerate(params):
            h = (estimates[0][i] + estimates[1][i]) * (BATCH / images)
            assert torch.equal(window["h"][name], h), name
            torch.testing.assert_close(window["grad"][name], gradients[0][i] + gradients[1][i], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("index", "images"), [(0, BATCH), (1, BATCH // 2)], ids=["whole", "part"])
def test_gradient_and_h_are_those_of_the_sum_of_both_losses(run, index, images):
    check_window(run, index, images)


@pytest.mark.requires("compile" in DEFAULT_CFG_DICT, reason="this Ultralytics has no compile=")
def test_compiled_ranks(train, small_model):
    """Ultralytics makes the graph of DistributedDataParallel static then."""
    compiled = train(model=str(small_model), compile=True, epochs=3)
    check_window(compiled, 0, BATCH)
    for (a, counters), (b, others) in zip(*(seen["steps"] for seen in compiled.seen)):
        assert torch.equal(a, b) and counters == others and counters["hessian_updates"] > 0


def test_ranks_stay_identical(run):
    first, second = (seen["steps"] for seen in run.seen)
    assert len(first) == len(second) == 50
    for (a, counters), (b, others) in zip(first, second):
        assert torch.equal(a, b) and counters == others
        assert a.isfinite().all()
    assert not torch.equal(first[0][0], first[-1][0])
    assert first[-1][1]["rho_measurements"] == first[-1][1]["hessian_updates"] == 25


def test_the_first_rank_fits_new_class_rows_for_all(train, four_classes):
    fitted = train(model=str(four_classes), fit_head=True, epochs=1)
    first, second = (seen["steps"] for seen in fitted.seen)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, second, strict=True))
    assert fitted.said.count("18 new class rows in 3 layers") == 1, fitted.said


def test_noise_differs_per_rank(run):
    first, second = (seen["seeds"] for seen in run.seen)
    assert len(first) == len(second) and len({*first, *second}) == 2 * len(first)


def test_what_is_not_finite_on_one_rank_is_dropped_on_both(run):
    """It is due again at the next step, so one more estimate than refreshes."""
    for seen in run.seen:
        dropped = [counters["hessian_dropped"] for _, counters in seen["steps"]]
        assert dropped == [0] * 20 + [1] * 30
        assert seen["steps"][-1][1]["refresh_index"] == len(seen["seeds"]) == 26
        assert not torch.equal(seen["steps"][20][0], seen["steps"][19][0])  # the step was made all the same


def test_ranks_decide_together_that_a_loss_is_not_known(train):
    """The criterion is edited on the second rank alone. The first estimate is dropped, the others are signed."""
    run = train(edit="yes", epochs=4, hessian_interval=1)
    for seen in run.seen:
        assert seen["known"] is False
        assert [counters["hessian_dropped"] for _, counters in seen["steps"]] == [1] * 4
        assert seen["steps"][-1][1]["hessian_updates"] == 3
    assert torch.equal(*(seen["steps"][-1][0] for seen in run.seen))
    assert run.said.count("is not known here (found on another rank)") == 1


def test_rank_0_logs(run):
    # The rates by part, the preset and its origins, as on one device; and the drop.
    assert run.said.count("SophiaG:") == 3, run.said
    assert len(re.findall(r"\n    new +\d+ +[\d,]+  0\.01\n", run.said)) == 1
    assert run.said.count("dropped a Hessian estimate that is not finite (1 so far)") == 1
    assert (run.folder / "weights" / "last.pt").is_file()
    rows = (run.folder / "results.csv").read_text().splitlines()
    assert len(rows) == 51 and "sophia/refreshes" in rows[0]
    assert run.seen[1]["samples"] == 0
