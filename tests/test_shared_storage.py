"""`yolo-sophia tune` on two machines that share a PostgreSQL server and no folder."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from yolo_sophia.tune.plan import parse
from yolo_sophia.tune.study import SharedStudy

pytestmark = [pytest.mark.slow, pytest.mark.extras]


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
