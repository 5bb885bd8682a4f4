"""`yolo-sophia tune` on two machines that share a PostgreSQL server and no folder."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from yolo_sophia.runs.results import MAP50_95
from yolo_sophia.runs.worker import CHECKPOINT, RECEIPT, read_curve
from yolo_sophia.tune.plan import parse
from yolo_sophia.tune.study import SharedStudy

pytestmark = [pytest.mark.slow, pytest.mark.extras]

HANGS = 1200
"""Seconds after which a process counts as hanging, on a busy machine too."""

# The command with heartbeats every second instead of every minute.
COMMAND = """
import sys
from yolo_sophia.tune import study
study.BEAT, study.GRACE = 1, 5
from yolo_sophia.cli import main
sys.exit(main(["tune", *sys.argv[1:]]))
"""


def program(name: str) -> str:
    """A program of PostgreSQL's server, which Debian does not put on the path."""
    places = [str(path) for path in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    found = shutil.which(name) or shutil.which(name, path=os.pathsep.join(places))
    if found is None:
        pytest.skip("no PostgreSQL here: apt-get install postgresql")
    return found


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """URL of a server, which runs as an unprivileged user: PostgreSQL refuses to be started by root."""
    psycopg2 = pytest.importorskip("psycopg2")
    initdb, postgres = program("initdb"), program("postgres")
    user = {"user": "nobody", "group": "nogroup", "extra_groups": []} if os.geteuid() == 0 else {}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))  # tmp_path lies in a folder that only its owner may enter
    data = folder / "data"
    if user:
        shutil.chown(folder, user["user"], user["group"])
    log = (folder / "log").open("wb")
    options = {"cwd": folder, "stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, **user}
    process = None
    try:
        line = [initdb, "-D", data, "-U", "tests", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"]
        subprocess.run(line, check=True, timeout=120, **options)
        line = [
            postgres,
            "-D",
            data,
            "-p",
            str(port),
            "-k",
            folder,
            "-c",
            "fsync=off",
            "-c",
            "listen_addresses=127.0.0.1",
        ]
        process = subprocess.Popen(line, **options)
        end = time.monotonic() + 60
        while True:
            try:
                psycopg2.connect(host="127.0.0.1", port=port, user="tests", dbname="postgres").close()
                break
            except psycopg2.OperationalError:
                assert process.poll() is None and time.monotonic() < end, (folder / "log").read_text()
                time.sleep(0.1)
        yield f"postgresql+psycopg2://tests@127.0.0.1:{port}/postgres"
    finally:
        if process is not None:
            process.send_signal(signal.SIGQUIT)  # at once
            process.wait(timeout=60)
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def states(url: str, study: str) -> list[FrozenTrial]:
    return optuna.load_study(study_name=study, storage=url).get_trials()


def test_machines_that_claim_at_once_share_the_trials(server, tmp_path):
    """No trial too many, and none with the settings of another."""
    machines, trials = 3, 12
    words = ["data=coco8.yaml", "model=yolov8n.yaml", "epochs=1", f"trials={trials}", "sampler=random", "study=claims"]
    studies = [SharedStudy(parse([*words, f"storage={server}", f"out={tmp_path / str(i)}"])) for i in range(machines)]
    gate, errors = threading.Barrier(machines), []

    def work(study: SharedStudy) -> None:
        try:
            gate.wait()
            while (claim := study.claim()) is not None:
                study.end(claim, TrialState.COMPLETE, 0.5)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(study,)) for study in studies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    found = states(server, "claims")
    assert [trial.state for trial in found] == [TrialState.COMPLETE] * trials
    assert len({tuple(trial.params.items()) for trial in found}) == trials


def test_the_trials_of_a_machine_that_is_gone_are_finished_by_the_other(server, tiny_data, tiny_model, tmp_path):
    trials = 3
    words = [f"data={tiny_data}", f"model={tiny_model}", "imgsz=64", "batch=8", "nbs=8", "epochs=2", "device=cpu",
             f"trials={trials}", "sampler=random", "pruner=none", f"storage={server}", "study=machines"]  # fmt: skip

    def start(machine: str) -> subprocess.Popen[str]:
        (tmp_path / machine).mkdir()
        line = [sys.executable, "-c", COMMAND, *words, f"out={tmp_path / machine / 'out'}"]
        return subprocess.Popen(
            line,
            cwd=tmp_path / machine,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    gone, other = start("gone"), start("other")
    try:
        end = time.monotonic() + HANGS
        while not list((tmp_path / "gone/out").glob(f"runs/*/{CHECKPOINT}")):
            assert gone.poll() is None and time.monotonic() < end, "no checkpoint"
            time.sleep(0.02)
        os.killpg(gone.pid, signal.SIGKILL)  # with its training
        shown, error = other.communicate(timeout=HANGS)
    finally:
        for process in (gone, other):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert other.returncode == 0 and "Traceback" not in error, error[-3000:]
    found = states(server, "machines")
    assert {trial.state for trial in found} == {TrialState.COMPLETE, TrialState.FAIL}
    finished = Counter(tuple(trial.params.items()) for trial in found if trial.state == TrialState.COMPLETE)
    lost = {tuple(trial.params.items()) for trial in found if trial.state == TrialState.FAIL}
    assert len(finished) == trials and set(finished.values()) == {1}  # none is lost, none is repeated
    assert len(lost) == 1 and lost <= set(finished)
    # Each value is that of a training that one of the machines has finished.
    receipts = list(tmp_path.glob(f"*/out/runs/*/{RECEIPT}"))
    values = sorted(read_curve(receipt.parent)[-1][MAP50_95] for receipt in receipts)
    assert values == pytest.approx(sorted(trial.value for trial in found if trial.value is not None), abs=1e-12)
    # All values of so short a training may be equal: any of the best is right, a trial that is gone is not.
    complete = {trial.number: trial.value for trial in found if trial.state == TrialState.COMPLETE}
    assert any(f"best: trial {n}," in shown for n, value in complete.items() if value == max(complete.values()))
