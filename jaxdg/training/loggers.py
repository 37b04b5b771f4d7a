"""Weights & Biases and MLflow, beside `metrics.jsonl` and TensorBoard.

A service is fed by a thread of its own from a queue that never blocks. So it neither slows a run
nor ends it: where it fails, or does not keep up, one line says so and the run goes on. A resumed
run goes on with the run of the service, whose id `loggers.json` in the workdir keeps. Neither
service can take back what was sent. So the rows past the restored step are sent once more, each
with its step: MLflow's latest value of a step is the one of the resumed run, and Weights & Biases
draws both over `step`.

Project, account and server are the services' own settings, such as WANDB_PROJECT, WANDB_MODE,
MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import importlib.util
import json
import os
from pathlib import Path
import queue
import re
import secrets
import threading
import time
from typing import Any, Protocol

import numpy as np

from jaxdg import files

FILE = "loggers.json"
MOST = 10_000  # rows and pictures that may wait
PICTURES = 100  # what may wait when a picture comes, as pictures are large
PATIENCE = 30.0  # seconds to send the rest at the end of a run
BATCH = 1000  # numbers that MLflow takes at once
PARAMETERS = 100  # texts that MLflow takes at once
TEXT = 500  # letters of a text that every MLflow server takes

Row = Mapping[str, Any]


class Service(Protocol):
    """A service that is ready to take a run's rows; any method may raise anything."""

    def rows(self, rows: Sequence[Row]) -> None:
        """Sends rows as `Writer.rows` takes them."""
        ...

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        """Sends an RGB picture [h, w, 3] uint8."""
        ...

    def close(self) -> None:
        """Ends the run in the service."""
        ...


class Logger:
    """Feeds a service from a thread, so that it neither slows nor ends a run."""

    def __init__(self, name: str, start: Callable[[], Service], say: Callable[[str], None]):
        """Starts the thread.

        Args:
            name: of the service, for messages.
            start: opens the service; the thread calls it.
            say: receives a line about the first failure.
        """
        self._name = name
        self._start = start
        self._say = say
        self._waiting: queue.Queue[Callable[[Service], None] | Row | None] = queue.Queue(MOST)
        self._over = False  # nothing is taken any more
        self._full = False
        self._thread = threading.Thread(target=self._work, name=f"{name} logger", daemon=True)
        self._thread.start()

    def rows(self, *rows: Row) -> None:
        """Takes rows; never waits and raises nothing."""
        for row in rows:
            self._put(dict(row))

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        """Takes a picture; never waits and raises nothing."""
        if self._waiting.qsize() < PICTURES:
            self._put(lambda service: service.picture(name, image, step))
        else:
            self._fell_behind()

    def close(self) -> None:
        """Sends the rest, as far as `PATIENCE` allows."""
        if self._over:
            return
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(None)
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            self._say(
                f"{self._name}: not all was sent within {PATIENCE:.0f} s; metrics.jsonl has"
                " everything"
            )
        self._over = True

    def _put(self, item: Callable[[Service], None] | Row) -> None:
        if self._over:
            return
        try:
            self._waiting.put_nowait(item)
        except queue.Full:
            self._fell_behind()

    def _fell_behind(self) -> None:
        if not (self._full or self._over):
            self._full = True
            self._say(f"{self._name}: does not keep up and misses rows or pictures of this run")

    def _work(self) -> None:
        try:
            service = self._start()
            while (item := self._waiting.get()) is not None:
                rows, last = self._gathered(item)
                if rows:
                    service.rows(rows)
                if last is None:
                    break
                if callable(last):
                    last(service)
            service.close()
        except BaseException as error:  # a service may even call sys.exit
            self._over = True
            reason = " ".join(str(error).split()) or type(error).__name__
            self._say(f"{self._name}: {reason}; this run goes on without it")

    def _gathered(
        self, item: Callable[[Service], None] | Row
    ) -> tuple[list[Row], Callable[[Service], None] | Row | None]:
        """All rows that wait up to the first other item, and that item; else the last row."""
        rows: list[Row] = []
        last: Callable[[Service], None] | Row | None = item
        while isinstance(last, dict):
            rows.append(last)
            try:
                last = self._waiting.get_nowait()
            except queue.Empty:
                break
        return rows, last


def check(names: Sequence[str]) -> None:
    """Looks whether the packages of some loggers are installed.

    Raises:
        ValueError: one is not.
    """
    for name in names:
        spec = importlib.util.find_spec(name)
        # A folder of that name, as wandb makes, is no package.
        if spec is None or spec.origin is None:
            raise ValueError(
                f'loggers has {name}, which is not installed: `pip install "jaxdg[{name}]"`, or'
                " take it off the list, which changes nothing in the run"
            )


def opened(
    names: Sequence[str],
    workdir: Path,
    resume_step: int,
    config: Mapping[str, Any],
    say: Callable[[str], None],
) -> list[Logger]:
    """Starts loggers.

    Args:
        names: keys of `SERVICES`.
        workdir: of the run.
        resume_step: step from which the run resumes; from 0 it is a new run of the service.
        config: the run's configuration, as nested dicts.
        say: receives a line about a failure.
    """
    ids = _Ids(workdir / FILE, resume_step > 0)
    title = workdir.absolute().name
    config = json.loads(json.dumps(config))
    return [
        Logger(name, lambda start=SERVICES[name]: start(ids, title, config, say), say)
        for name in names
    ]


class _Ids:
    """The ids of the run in each service, kept in the workdir."""

    def __init__(self, path: Path, resumes: bool):
        self.path = path
        self._lock = threading.Lock()
        self._known: dict[str, str] = {}
        if resumes:
            with contextlib.suppress(OSError, ValueError):
                found = json.loads(path.read_text())
                self._known = {str(key): str(value) for key, value in found.items()}

    def get(self, name: str) -> str | None:
        """The id of an earlier start, if there is one."""
        return self._known.get(name)

    def keep(self, name: str, run_id: str) -> None:
        """Keeps an id for later starts."""
        with self._lock:
            self._known[name] = run_id
            files.write(self.path, json.dumps(self._known, indent=2) + "\n")


def _numbers(row: Row) -> Iterator[tuple[str, float]]:
    """The numbers of a row under the names that TensorBoard shows."""
    group = f"evaluation/{row['domain']}" if "domain" in row else "training"
    for key, value in row.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and key != "step":
            yield f"{group}/{key}", float(value)


class _Wandb:
    """A run of Weights & Biases."""

    def __init__(
        self, ids: _Ids, title: str, config: Mapping[str, Any], say: Callable[[str], None]
    ):
        import wandb  # pyright: ignore[reportMissingImports]

        online = os.environ.get("WANDB_MODE", "online") == "online"
        if online and not wandb.login(prompt=False, verify=False):  # it would wait for an answer
            raise ValueError("no account is known; type `wandb login`, or set WANDB_API_KEY")
        self._image = wandb.Image
        run_id = ids.get("wandb") or secrets.token_hex(4)
        self._run = wandb.init(
            id=run_id,
            resume="allow",
            name=title,
            dir=str(ids.path.parent),
            config=dict(config),
            # Its own lines would break the progress bar.
            settings=wandb.Settings(console="off", silent=True),
        )
        ids.keep("wandb", run_id)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        if online and self._run.url:
            say(f"wandb: {self._run.url}")

    def rows(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._run.log({**dict(_numbers(row)), "step": row["step"]})

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        self._run.log({name: self._image(image), "step": step})

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    """A run of MLflow."""

    def __init__(
        self, ids: _Ids, title: str, config: Mapping[str, Any], say: Callable[[str], None]
    ):
        import mlflow  # pyright: ignore[reportMissingImports]
        from mlflow.entities import Metric, Param  # pyright: ignore[reportMissingImports]

        self._metric = Metric
        self._client = mlflow.MlflowClient()
        run_id = ids.get("mlflow")
        if run_id is None:
            run = self._client.create_run(self._experiment(), run_name=title)
            run_id = run.info.run_id
            ids.keep("mlflow", run_id)
            texts = [Param(key, text[:TEXT]) for key, text in _texts(config)]
            for i in range(0, len(texts), PARAMETERS):
                self._client.log_batch(run_id, params=texts[i : i + PARAMETERS])
        else:
            self._client.update_run(run_id, status="RUNNING")
        self._id = run_id
        say(f"mlflow: run {run_id} in {mlflow.get_tracking_uri()}")

    def _experiment(self) -> str:
        if own := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return own
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "Default")
        found = self._client.get_experiment_by_name(name)
        return found.experiment_id if found else self._client.create_experiment(name)

    def rows(self, rows: Sequence[Row]) -> None:
        now = int(time.time() * 1000)
        metrics = [
            self._metric(_key(key), value, now, row["step"])
            for row in rows
            for key, value in _numbers(row)
        ]
        for i in range(0, len(metrics), BATCH):
            self._client.log_batch(self._id, metrics=metrics[i : i + BATCH])

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        self._client.log_image(self._id, image, key=_key(name), step=step)

    def close(self) -> None:
        self._client.set_terminated(self._id)


SERVICES: dict[str, Callable[[_Ids, str, Mapping[str, Any], Callable[[str], None]], Service]] = {
    "wandb": _Wandb,
    "mlflow": _Mlflow,
}


def _key(name: str) -> str:
    """A name as MLflow allows it; domains may have other signs, as `gta5+synthia`."""
    return re.sub(r"[^\w\-. /]", "_", name, flags=re.ASCII)


def _texts(tree: Mapping[str, Any], start: str = "") -> Iterator[tuple[str, str]]:
    """The fields of a configuration and their values as texts."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _texts(value, f"{start}{key}.")
        else:
            yield f"{start}{_key(str(key))}", str(value)
