"""`yolo-sophia compare engine=ray` on a cluster of two nodes of one processor each, on this machine.

One comparison has an arm that crashes; another one is interrupted by Ctrl-C and taken up again.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock, Timeout

from yolo_sophia.compare.plan import parse, runs
from yolo_sophia.runs import ray_executor
from yolo_sophia.runs.worker import CHECKPOINT, FAILURE, LOG, ORDER, RECEIPT, read_curve

pytestmark = [pytest.mark.slow, pytest.mark.extras]

HANGS = 1200
"""Seconds after which a process counts as hanging, on a busy machine too."""

CRASHING = """
import torch


class Crashing(torch.optim.AdamW):
    def step(self, closure=None):
        raise FloatingPointError("the first step is one too many")
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Address of the cluster."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")
        patch.setenv("RAY_DISABLE_MEMORY_MONITOR", "1")
        patch.setenv("RAY_worker_niceness", "0")  # by default 15: they would wait for any other program
        node = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 80 * 2**20, "include_dashboard": False}
        made = Cluster(initialize_head=True, head_node_args=node)
        try:
            made.add_node(**{key: value for key, value in node.items() if key != "include_dashboard"})
            yield made.address
        finally:
            made.shutdown()


@pytest.fixture
def connected(cluster) -> Iterator[str]:
    """Connect this process to the cluster."""
    import ray

    ray.init(address=cluster, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()


class Comparison:
    """A comparison with its folder."""

    def __init__(self, folder: Path, address: str, *words: str):
        self.folder, self.address, self.command = folder, address, "compare"
        self.words = [*words, "engine=ray", "seeds=[3]", "batch=4", "nbs=4", "imgsz=64", "device=cpu", "out=out"]

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "yolo_sophia.cli", self.command, *self.words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
            env={**os.environ, "RAY_ADDRESS": self.address},
        )

    def run(self) -> SimpleNamespace:
        process = self.start()
        out, err = process.communicate(timeout=HANGS)
        return SimpleNamespace(code=process.returncode, out=out, err=err)

    def folders(self) -> dict[str, Path]:
        made = sorted((self.folder / "out" / "runs").iterdir())
        return {json.loads((folder / ORDER).read_text())["arm"]: folder for folder in made}

    def snapshot(self) -> dict[str, int]:
        made = [path for folder in self.folders().values() for path in folder.rglob("*") if path.is_file()]
        return {str(path): path.stat().st_mtime_ns for path in made if path.name != ".lock"}


def nodes(folder: Path) -> list[str]:
    """Nodes that have worked on a run."""
    return re.findall(r"^node (\w+) ", (folder / LOG).read_text(), re.MULTILINE)


def wait_for(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + HANGS
    while not condition():
        assert time.monotonic() < end, f"waited {HANGS} s for {what}"
        time.sleep(0.02)


def is_locked(folder: Path) -> bool:
    try:
        with FileLock(folder / ".lock", timeout=0):
            return False
    except Timeout:
        return True


@pytest.fixture(scope="module")
def crashed(cluster, tiny_data, tiny_model, tmp_path_factory) -> SimpleNamespace:
    """A comparison with an arm that fails, run twice."""
    folder = tmp_path_factory.mktemp("crashed")
    (folder / "crashing.py").write_text(CRASHING)  # found in the working directory, on the nodes too
    words = (f"data={tiny_data}", f"model={tiny_model}", "optimizers=crashing.Crashing,AdamW", "epochs=2")
    made = Comparison(folder, cluster, *words)
    first, before = made.run(), made.snapshot()
    second = made.run()
    return SimpleNamespace(first=first, second=second, before=before, after=made.snapshot(), folders=made.folders())


def test_a_crash_is_told_and_the_other_arm_finishes(crashed):
    assert crashed.first.code == 1 and "Traceback (most recent call last)" not in crashed.first.out
    failed, finished = crashed.folders["crashing.Crashing"], crashed.folders["AdamW"]
    assert "FloatingPointError: the first step is one too many" in crashed.first.err
    assert "the first step is one too many" in (failed / FAILURE).read_text()
    assert not (failed / RECEIPT).exists() and not (finished / FAILURE).exists()
    receipt = json.loads((finished / RECEIPT).read_text())
    assert receipt["epochs"] == 2 and len(read_curve(finished)) == 2
    assert "AdamW-s3-h1" in crashed.first.err and "running" in crashed.first.err  # the board follows the tasks


def test_both_nodes_are_used(crashed):
    assert len({nodes(folder)[0] for folder in crashed.folders.values()}) == 2


def test_threads_are_those_that_ray_sets_apart(crashed):
    assert {json.loads((folder / ORDER).read_text())["threads"] for folder in crashed.folders.values()} == {1}


def test_run_again_only_what_is_missing_runs(crashed):
    finished = str(crashed.folders["AdamW"])
    same = {path: time for path, time in crashed.before.items() if path.startswith(finished)}
    assert same and same.items() <= crashed.after.items()
    assert crashed.second.code == 1
    assert [len(nodes(folder)) for folder in crashed.folders.values()] == [
        1 if arm == "AdamW" else 2 for arm in crashed.folders
    ]


def test_ctrl_c_leaves_everything_resumable_and_company_is_let_be(cluster, tiny_data, tiny_model, tmp_path):
    words = (f"data={tiny_data}", f"model={tiny_model}", "optimizers=SGD,AdamW,RMSProp", "epochs=4")
    made = Comparison(tmp_path, cluster, *words)
    planned = {run.arm: tmp_path / "out" / "runs" / run.key for run in runs(parse(made.words))}
    command = made.start()
    wait_for(lambda: any((folder / CHECKPOINT).is_file() for folder in planned.values()), "a checkpoint")
    command.send_signal(signal.SIGINT)
    _, err = command.communicate(timeout=HANGS)
    assert command.returncode == 130, err
    assert "rerun the command to resume" in err and "Traceback" not in err
    assert not any(is_locked(folder) for folder in planned.values())  # no worker is left
    cut = {arm for arm, folder in planned.items() if not (folder / RECEIPT).is_file()}
    assert cut and not any((folder / FAILURE).exists() for folder in planned.values())
    taken = planned[sorted(cut)[0]]
    with FileLock(taken / ".lock"):  # another process trains this one
        command = made.start()
        others = [folder for folder in planned.values() if folder != taken]
        wait_for(lambda: all((folder / RECEIPT).is_file() for folder in others), "the others")
        assert not (taken / RECEIPT).exists()
    out, err = command.communicate(timeout=HANGS)
    assert command.returncode == 0, f"{out}\n{err}"
    assert f"{taken.name} elsewhere" in err
    for folder in planned.values():
        assert [row["epoch"] for row in read_curve(folder)] == [1, 2, 3, 4]


def test_a_study_runs_on_the_cluster(cluster, tiny_data, tiny_model, tmp_path):
    made = Comparison(tmp_path, cluster, f"data={tiny_data}", f"model={tiny_model}", "epochs=1", "trials=2")
    made.command, made.words = "tune", [*made.words, "pruner=none"]
    done = made.run()
    assert done.code == 0 and "best: trial " in done.out, done.err
    found = list((tmp_path / "out" / "runs").iterdir())
    assert len(found) == 2 and all((folder / RECEIPT).is_file() and nodes(folder) for folder in found)


def test_places(connected):
    assert ray_executor.RayExecutor(address=connected, queue_all=False).places == 2
    with pytest.raises(ValueError, match=r"cpus=2 gpus=0: no node .* has as much; found 1 CPUs and 0 GPUs, 1 CPUs"):
        ray_executor.RayExecutor(2, address=connected)
    with pytest.raises(ValueError, match=r"gpus=0\.5: no node"):
        ray_executor.RayExecutor(gpus=0.5, address=connected)


def test_a_node_that_does_not_see_the_folder_says_so(connected, tmp_path):
    import ray

    code, why = ray.get(ray.remote(ray_executor._work).remote(str(tmp_path / "elsewhere"), str(tmp_path), "mark", 1))
    assert code == 1
    assert re.search(r"node \w+ .* does not see .*/elsewhere: choose project=... on storage that all nodes see", why)


def test_no_cluster_is_one_line(tmp_path, tiny_data, tiny_model):
    made = Comparison(tmp_path, "127.0.0.1:9", f"data={tiny_data}", f"model={tiny_model}", "optimizers=SGD", "epochs=1")
    done = made.run()
    assert (done.code, done.out) == (2, "")
    line = done.err.strip().splitlines()[-1]
    assert line.startswith(
        "yolo-sophia: engine=ray: no Ray cluster at '127.0.0.1:9': start one with `ray start --head`"
    )
    assert "Traceback" not in done.err


def test_ray_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r'Ray is not installed: pip install "yolo-sophia\[ray\]"'):
        ray_executor.RayExecutor()
