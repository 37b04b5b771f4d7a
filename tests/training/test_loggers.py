"""Loggers get what the writer writes, and neither slow a run nor end it."""

import importlib.util
import json
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxdg.training import history, loggers
from jaxdg.training.loggers import Logger
from jaxdg.training.writer import Writer

PICTURE = np.zeros((2, 3, 3), np.uint8)


class Kept:
    """A service that keeps what it gets, and does so at leisure."""

    def __init__(self, wait: float = 0.0):
        self.calls: list[Any] = []
        self.wait = wait

    def rows(self, rows):
        time.sleep(self.wait)
        self.calls.append([row["step"] for row in rows])

    def picture(self, name, image, step):
        self.calls.append((name, image.shape, step))

    def close(self):
        self.calls.append("closed")


def row(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": 1 / step, **more}


def test_a_service_gets_what_the_writer_writes(tmp_path):
    """Rows and pictures arrive complete and in order, and the end of the run waits for them."""
    service = Kept()
    writer = Writer(tmp_path, 0, loggers=[Logger("kept", lambda: service, pytest.fail)])
    for step in range(1, 40):
        writer.rows(row(step))
    writer.picture("night/0", PICTURE, 39)
    writer.rows(row(40), {"step": 40, "domain": "night", "mIoU": 1.5})
    writer.close()
    at = service.calls.index(("night/0", (2, 3, 3), 39))
    assert [s for call in service.calls[:at] for s in call] == list(range(1, 40))
    assert [s for call in service.calls[at + 1 : -1] for s in call] == [40, 40]
    assert service.calls[-1] == "closed"


def test_a_slow_service_does_not_slow_the_run_and_gets_rows_together(tmp_path):
    """Writing takes no longer while a service sleeps; what piled up goes in one call."""
    service = Kept(wait=0.5)
    writer = Writer(tmp_path, 0, loggers=[Logger("kept", lambda: service, pytest.fail)])
    began = time.monotonic()
    writer.rows(row(1))
    time.sleep(0.1)
    for step in range(2, 100):
        writer.rows(row(step))
    assert time.monotonic() - began < 0.5
    writer.close()
    assert service.calls == [[1], list(range(2, 100)), "closed"]


@pytest.mark.parametrize("place", ["start", "rows", "close"])
def test_a_failure_is_one_line(tmp_path, place):
    """Whatever a service raises, and wherever, the run goes on and says so once."""
    service: Any = Kept()

    def fail(*_: Any) -> Any:
        raise SystemExit("no network\nat all")

    if place != "start":
        setattr(service, place, fail)
    said: list[str] = []
    start = fail if place == "start" else lambda: service
    writer = Writer(tmp_path, 0, loggers=[Logger("kept", start, said.append)])
    for step in range(1, 5):
        writer.rows(row(step))
        time.sleep(0.02)
    writer.close()
    assert said == ["kept: no network at all; this run goes on without it"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_service_that_hangs_is_left(monkeypatch):
    """What does not fit into the queue is dropped with one line; the end waits for a while."""
    monkeypatch.setattr(loggers, "MOST", 8)
    monkeypatch.setattr(loggers, "PICTURES", 3)
    monkeypatch.setattr(loggers, "PATIENCE", 0.1)
    release = threading.Event()
    said: list[str] = []

    def hang() -> Kept:
        release.wait()
        return Kept()

    logger = Logger("kept", hang, said.append)
    for step in range(1, 20):
        logger.rows(row(step))
        logger.picture("x", PICTURE, step)
    logger.close()
    release.set()
    assert said == [
        "kept: does not keep up and misses rows or pictures of this run",
        "kept: not all was sent within 0 s; metrics.jsonl has everything",
    ]


def test_a_missing_package_is_told_before_the_run(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=None))
    with pytest.raises(ValueError, match=r'loggers has mlflow, .*`pip install "jaxdg\[mlflow\]"`'):
        loggers.check(["mlflow"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin="x.py"))
    loggers.check(["mlflow", "wandb"])


def send(workdir, resume_step: int, steps: list[int], names: list[str]) -> list[str]:
    """Sends rows and a picture as a run does; returns what was said."""
    said: list[str] = []
    config = {"data": {"source": "clear", "id_map": {7: 0}}, "steps": 9, "classes": ("a", "b")}
    opened = loggers.opened(names, workdir, resume_step, config, said.append)
    writer = Writer(workdir, resume_step, loggers=opened)
    for step in steps:
        writer.rows(row(step), {"step": step, "domain": "acdc/fog+x", "mIoU": 2.0, "score": None})
    writer.picture("acdc/fog/0", PICTURE, steps[-1])
    writer.close()
    return said


@pytest.mark.filterwarnings("ignore")  # of the packages
def test_mlflow_itself(tmp_path, monkeypatch):
    """MLflow's store has parameters, every number with its step, and the picture; a resumed run
    goes on with the same run, and its value of a step counts.
    """
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/store")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.chdir(tmp_path)
    workdir = tmp_path / "my_run"
    workdir.mkdir()
    said = send(workdir, 0, [1, 2, 3], ["mlflow"])
    assert len(said) == 1, said
    assert said[0].startswith("mlflow: run ")
    run_id = json.loads((workdir / loggers.FILE).read_text())["mlflow"]
    said = send(workdir, 2, [3, 4], ["mlflow"])
    assert json.loads((workdir / loggers.FILE).read_text())["mlflow"] == run_id
    client = mlflow.MlflowClient()
    run = client.get_run(run_id)
    assert (run.info.run_name, run.info.status) == ("my_run", "FINISHED")
    assert run.data.params["data.source"] == "clear"
    assert run.data.params["data.id_map.7"] == "0"
    losses = client.get_metric_history(run_id, "training/loss")
    assert sorted((m.step, m.value) for m in losses) == [
        (1, 1.0),
        (2, 1 / 2),
        (3, 1 / 3),
        (3, 1 / 3),
        (4, 1 / 4),
    ]
    assert len(client.get_metric_history(run_id, "evaluation/acdc/fog_x/mIoU")) == 5
    assert client.list_artifacts(run_id)
    send(workdir, 0, [1], ["mlflow"])
    assert json.loads((workdir / loggers.FILE).read_text())["mlflow"] != run_id


@pytest.mark.filterwarnings("ignore")  # of the packages
def test_wandb_itself_offline(tmp_path, monkeypatch):
    """Weights & Biases takes rows and pictures without a network, under one id after a resume."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    workdir = tmp_path / "my_run"
    workdir.mkdir()
    assert send(workdir, 0, [1, 2, 3], ["wandb"]) == []
    run_id = json.loads((workdir / loggers.FILE).read_text())["wandb"]
    assert send(workdir, 2, [3, 4], ["wandb"]) == []
    assert json.loads((workdir / loggers.FILE).read_text())["wandb"] == run_id
    stores = sorted((workdir / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert len(stores) >= 1
    content = b"".join(store.read_bytes() for store in stores)
    for name in (b"training/loss", b"evaluation/acdc/fog+x/mIoU", b"acdc/fog/0"):
        assert name in content
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    said = send(workdir, 4, [5], ["wandb"])
    assert said == [
        "wandb: no account is known; type `wandb login`, or set WANDB_API_KEY; this run goes on"
        " without it"
    ]


def test_device_hours(tmp_path):
    """Each step counts with the pace of its row and the devices that it ran on: 10 steps of 2 s on
    one device; 5 redone and 5 more of 3 s on four, which replaced others; a last one without a row.
    """
    notes = [
        {"event": "start", "step": 0, "devices": "1 x cpu"},
        {"event": "start", "step": 10, "devices": "8 x cpu"},
        {"event": "start", "step": 10, "devices": "4 x cpu"},
    ]
    (tmp_path / history.FILE).write_text("".join(json.dumps(note) + "\n" for note in notes))
    assert history.device_hours(tmp_path, 0) == 0.0
    assert history.device_hours(tmp_path, 1) is None
    rows = [
        {"step": 1, "loss": 1.0},
        {"step": 5, "loss": 1.0, "seconds_per_step": 2.0},
        {"step": 10, "loss": 1.0, "seconds_per_step": 2.0},
        {"step": 10, "domain": "night", "mIoU": 1.0},
        {"step": 15, "loss": 1.0, "seconds_per_step": 3.0},
        {"step": 20, "loss": 1.0, "seconds_per_step": 3.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    assert history.device_hours(tmp_path, 10) == 10 * 2 / 3600
    assert history.device_hours(tmp_path, 21) == (10 * 2 + 11 * 3 * 4) / 3600
