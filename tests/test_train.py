"""A run as a whole: interrupted at any moment it goes on to the same end, and what goes wrong is
said in one line.
"""

import contextlib
import functools
import json
import os
from pathlib import Path
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

from flax import nnx
import jax
import numpy as np
from PIL import Image
import pytest

import jaxdg
from jaxdg import config, segmentation, train, weights
from jaxdg.backbones import resizing
from jaxdg.commands import command_line as cli
from jaxdg.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    locks,
)
from jaxdg.data.datasets import FolderOptions, StreetsOptions
from jaxdg.data.domains import open_domain
from jaxdg.evaluation.overlap import TrainedOn
from jaxdg.tasks import run_state as tasks
from jaxdg.training import sharding
from jaxdg.training.checkpoint import Checkpoints
from jaxdg.training.metrics import read_metrics
from jaxdg.training.step import TrainState
from tests import forked

CONFIG = """
from jaxdg.config import Config
def get_config():
    c = Config(steps=16, batch_size=2, log_every=1, eval_every=8, checkpoint_every=3)
    c.data.crop = (32, 32)
    c.data.streets.size = (48, 96)
    c.data.streets.images = 12
    c.data.streets.val_images = 3
    c.model.taps = (3,)  # one scan over all blocks is traced soonest
    c.model.pyramid = "none"
    c.model.decoder = "segformer"  # has running statistics and dropout
    c.model.segformer.hidden = 16
    c.model.drop_path = 0.2
    c.optimizer.learning_rate = 1e-3
    c.evaluation.domains = ("clear", "fog")
    c.evaluation.stride = (32, 32)
    return c
"""


class Runs:
    """Starts `python -m jaxdg.*` as a user does, on one device; see `forked`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = folder / "tiny.py"
        self.config.write_text(CONFIG)
        # Every process compiles the same programs; the cache makes all but the first start in a
        # second.
        self.environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

    def arguments(self, workdir: str, *overrides: str) -> list[str]:
        return ["--config", str(self.config), "--workdir", str(self.folder / workdir), *overrides]

    def start(self, workdir: str, *overrides: str) -> forked.Command:
        """Starts training."""
        arguments = self.arguments(workdir, *overrides)
        return forked.Command("jaxdg.train", *arguments, environment=self.environment)

    def start_program(
        self, workdir: str, *overrides: str, terminal: int | None = None
    ) -> subprocess.Popen:
        """Starts training by a command line of its own, on a terminal of its own if given."""
        command = [sys.executable, "-m", "jaxdg.train", *self.arguments(workdir, *overrides)]
        if terminal is None:
            return subprocess.Popen(command, env=self.environment)
        # A new session takes the first terminal it opens for its own, whose closing ends in SIGHUP.
        name = os.ttyname(terminal)
        # Under nohup the tests ignore SIGHUP, and so would the command.
        heeds = (
            "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL);"
            " os.execv(sys.argv[1], sys.argv[1:])"
        )
        command = [sys.executable, "-c", heeds, *command]
        shell = ["sh", "-c", f'exec "$@" <{name} >{name} 2>{name}', "sh", *command]
        return subprocess.Popen(shell, env=self.environment, start_new_session=True)

    def module(self, name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        """Runs another command to its end."""
        own = self.environment | environment
        return forked.run(f"jaxdg.{name}", *arguments, environment=own)

    def run(self, workdir: str, *overrides: str) -> subprocess.CompletedProcess:
        """Trains to the end."""
        return self.module("train", *self.arguments(workdir, *overrides))

    def wait_for(self, workdir: str, process: subprocess.Popen | forked.Command, ready) -> None:
        """Returns once `ready(rows)` holds for the run's metrics, or the process has ended."""
        path = self.folder / workdir / "metrics.jsonl"
        while process.poll() is None and not (path.exists() and ready(read_metrics(path.parent))):
            time.sleep(0.002)

    def rows(self, workdir: str) -> list[dict]:
        """Its metrics without what depends on the clock."""
        clock = ("seconds_per_step", "images_per_second")
        return [
            {k: v for k, v in row.items() if k not in clock}
            for row in read_metrics(self.folder / workdir)
        ]

    @functools.cached_property
    def like(self) -> TrainState:
        """The shapes of all arrays of a run."""
        c = config.from_file(self.config)
        task = tasks.make_task(c)
        mesh = sharding.make_mesh(MeshConfig(1, 1), jax.devices()[:1])
        return tasks.abstract_state(tasks.Blueprint.of(task, c.model.freeze), c, mesh)[0]

    def state(self, workdir: str) -> list[np.ndarray]:
        """Every array of the last checkpoint."""
        checkpoints = Checkpoints(self.folder / workdir)
        state = checkpoints.restore(self.like, config.load(self.folder / workdir).steps)
        checkpoints.close()
        return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]

    def assert_same(self, one: str, other: str) -> None:
        """Both runs logged the same numbers and ended in the same bits."""
        assert self.rows(one) == self.rows(other)
        for a, b in zip(self.state(one), self.state(other), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished, uninterrupted run in `whole`, and the means to make others."""
    runs = Runs(tmp_path_factory.mktemp("runs"))
    done = runs.run("whole")
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in runs.rows("whole") if "loss" in row] == list(range(1, 17))
    return runs


def test_a_run_starts_from_another_runs_model(runs):
    """`model.start`: every parameter and statistic is the other run's, for other crops and
    freezing; a model of other parts is refused.
    """
    c = config.load(runs.folder / "whole")
    c.model.start = str(runs.folder / "whole")
    c.model.freeze = "first 2"
    c.data.crop = (48, 48)
    task = tasks.make_task(c)
    mesh = sharding.make_mesh(MeshConfig(1, 1), jax.devices()[:1])
    plan = tasks.Blueprint.of(task, c.model.freeze)
    like, optimizer = tasks.abstract_state(plan, c, mesh)
    state = train.initial_state(task, plan, like, optimizer)
    found = weights.tensors(nnx.merge(plan.graph, state.trained, state.frozen, state.statistics))
    stored = tasks.stored_tensors(runs.folder / "whole")
    assert found.keys() == stored.keys()
    assert "head.batch_norm.mean" in found
    for name in found.keys() - {"backbone.pos_embed"}:
        np.testing.assert_array_equal(found[name], stored[name])
    np.testing.assert_allclose(
        found["backbone.pos_embed"],
        resizing.resize_positions(stored["backbone.pos_embed"], (6, 6), 1),
        rtol=1e-5,
        atol=1e-6,
    )
    done = runs.run(
        "other", f"--config.model.start={runs.folder / 'whole'}", "--config.model.decoder=linear"
    )
    assert done.returncode == 1
    assert re.search(
        r"error: .*whole does not fit this Segmenter: .*unexpected \(head\.batch_norm\.bias,"
        r" head\.batch_norm\.mean",
        done.stderr,
    )


def test_killed_at_any_moment_a_run_goes_on_to_the_same_bits(runs):
    """By kill -9, before the first checkpoint, between two, while one is written, while evaluating:
    the same losses, the same end.
    """
    moments = (
        lambda rows: len(rows) >= 2,
        lambda rows: any(row["step"] >= 5 for row in rows),
        lambda rows: any(row["step"] >= 8 for row in rows),  # step 8 is saved and evaluated
        lambda rows: any(
            row.get("domain") == "clear" for row in rows
        ),  # and has been judged on one domain
        lambda rows: any(row["step"] >= 12 for row in rows),
    )
    killed = 0
    for ready in moments:
        process = runs.start("killed")
        runs.wait_for("killed", process, ready)
        killed += process.poll() is None
        process.kill()
        process.communicate()
    assert killed >= 4
    done = runs.run("killed")
    assert done.returncode == 0, done.stderr
    assert "resuming from step" in done.stdout
    runs.assert_same("killed", "whole")


def test_sigterm_saves_and_exits_0(runs):
    """A scheduler's signal costs nothing: the state is saved at once, and the same command goes on
    to the same end.
    """
    process = runs.start("stopped")
    runs.wait_for("stopped", process, lambda rows: any(row["step"] >= 4 for row in rows))
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "stopped at step" in out
    saved = Checkpoints(runs.folder / "stopped")
    assert f"stopped at step {saved.steps()[-1]};" in out
    saved.close()
    done = runs.run("stopped")
    assert done.returncode == 0, done.stderr
    runs.assert_same("stopped", "whole")


def test_worker_processes_change_nothing(runs):
    """Two workers feed the batches that none fed."""
    assert runs.run("workers", "--config.data.workers=2").returncode == 0
    runs.assert_same("workers", "whole")


def test_a_closed_terminal_and_a_schedulers_warning_save_too(runs):
    """SIGHUP, with a terminal that nothing can be printed to any more, and SIGUSR1 are heeded as
    SIGTERM is.
    """
    ours, terminal = pty.openpty()
    process = runs.start_program("hung_up", terminal=terminal)
    os.close(terminal)
    done = threading.Event()
    reader = threading.Thread(target=drain, args=(ours, done), daemon=True)
    reader.start()
    runs.wait_for("hung_up", process, lambda rows: any(row["step"] >= 3 for row in rows))
    done.set()
    reader.join()  # a terminal stays open while someone waits to read from it
    os.close(ours)
    assert process.wait(timeout=120) == 0
    saved = Checkpoints(runs.folder / "hung_up", read_only=True).steps()[-1]
    assert 3 <= saved < 16
    process = runs.start("hung_up")
    runs.wait_for("hung_up", process, lambda rows: any(row["step"] > saved for row in rows))
    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "stopped at step" in out
    assert Checkpoints(runs.folder / "hung_up", read_only=True).steps()[-1] > saved


def drain(terminal: int, done: threading.Event) -> None:
    """Reads what is printed, until the process has closed the terminal or nobody needs it."""
    with contextlib.suppress(OSError):
        while not done.is_set():
            ready, _, _ = select.select([terminal], [], [], 0.005)
            if ready and not os.read(terminal, 65536):
                return


def test_what_is_printed_to_a_terminal_that_is_gone_is_lost():
    """Nothing is raised, whether or not the signal that tells of it was handled yet."""
    ours, terminal = pty.openpty()
    with open(terminal, "w") as plain:
        stream = cli.LastingStream(plain)
        assert stream.isatty()
        os.close(ours)
        with pytest.raises(OSError, match="Input/output"):
            print("a line", file=plain, flush=True)
        print("a line", file=stream, flush=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), terminal)


def test_nohup_is_heeded():
    """Where SIGHUP is ignored from the start, it stays so, and the run goes on without its
    terminal.
    """
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        interrupt = cli.Interrupt()
        os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert not interrupt.asked
        os.kill(os.getpid(), signal.SIGUSR1)
        assert interrupt.asked
    finally:
        signal.signal(signal.SIGHUP, before)


def test_two_processes_in_one_workdir(runs):
    """The second is told who works there; judging beside it is fine; the lock of a process that was
    killed stops nobody.
    """
    # No checkpoint goes while it is judged, however slowly.
    first = runs.start_program(
        "shared",
        "--config.steps=4000",
        "--config.eval_every=0",
        "--config.keep_checkpoints=1000",
    )
    runs.wait_for("shared", first, lambda rows: any(row["step"] >= 4 for row in rows))
    other = runs.run("shared", "--config.steps=4000", "--config.eval_every=0")
    assert other.returncode == 1
    assert re.fullmatch(
        rf"error: workdir \S*shared is in use by process {first.pid} on host"
        rf" {re.escape(socket.gethostname())} since \S+ \S+ "
        r"\(\S*python\S* -m jaxdg\.train .*\); wait for its end, stop it, or give another folder"
        r" \(its lock is \S*shared/lock\)\n",
        other.stderr,
    ), other.stderr
    judged = runs.module(
        "evaluate", "--checkpoint", str(runs.folder / "shared"), "--domains", "fog"
    )
    assert judged.returncode == 0, judged.stderr
    assert "corrupted" not in judged.stdout + judged.stderr
    assert first.poll() is None
    first.kill()
    first.wait()
    assert (runs.folder / "shared" / "lock").is_file()
    assert (
        locks.holder(runs.folder / "shared" / "lock") is None
    )  # how a killed run goes on is tested above
    assert not (runs.folder / "killed" / "lock").exists()


def test_a_domain_added_to_a_finished_run(runs):
    """The new one alone is judged, the rest stays to the digit, the change is recorded; the means
    are those of all.
    """
    shutil.copytree(runs.folder / "whole", runs.folder / "longer")
    done = runs.run(
        "longer", "--config.evaluation.domains=clear,fog,night", "--config.evaluation.batch_size=2"
    )
    assert done.returncode == 0, done.stderr
    assert "evaluating step 16 on night\n" in done.stdout
    old, new = (
        json.loads((runs.folder / name / "results.json").read_text())
        for name in ("whole", "longer")
    )
    assert new["domains"].keys() == {"clear", "fog", "night"}
    assert {name: new["domains"][name] for name in ("clear", "fog")} == old["domains"]
    unseen = [new["domains"][name]["mIoU"] for name in ("fog", "night")]
    assert new["mean_unseen"] == pytest.approx(np.mean(unseen))
    changes = [
        json.loads(line)
        for line in (runs.folder / "longer" / "changes.jsonl").read_text().splitlines()
    ]
    assert [(change["step"], change["field"]) for change in changes] == [
        (16, "evaluation.batch_size"),
        (16, "evaluation.domains"),
    ]
    rows = [row["domain"] for row in runs.rows("longer") if row["step"] == 16 and "domain" in row]
    assert rows == ["clear", "fog", "night"]


def test_what_a_crash_breaks_is_named_and_made_again(runs):
    """All small files of a run at once, emptied, cut or full of zeros: the same command says so and
    ends with the same results.
    """
    broken = runs.folder / "broken"
    shutil.copytree(runs.folder / "whole", broken)
    (broken / "config.json").write_bytes(b"")
    (broken / "results.json").write_bytes((broken / "results.json").read_bytes()[:-40])
    (broken / "checkpoints" / "best.json").write_bytes(b"\0" * 30)
    rows = (broken / "metrics.jsonl").read_bytes().split(b"\n")
    (broken / "metrics.jsonl").write_bytes(
        b"\n".join([*rows[:3], b"\xff\xfe\0", *rows[3:]]) + b'{"step": 17, "lo'
    )
    judged = runs.module(
        "predict",
        "--checkpoint",
        str(broken),
        "--out",
        str(runs.folder / "nothing"),
        str(runs.folder / "tiny.py"),
    )
    assert judged.returncode == 1
    assert "config.json: broken (empty); run the command that trains it again" in judged.stderr
    done = runs.run("broken")
    assert done.returncode == 0, done.stderr
    for name in ("config.json", "results.json", "checkpoints/best.json"):
        assert f"{broken}/{name}: broken (" in done.stdout, done.stdout
        assert (broken / f"{name}.broken").is_file()
    assert (
        f"{broken}/metrics.jsonl: broken at line 4; it is kept as metrics.jsonl.broken"
        in done.stdout
    )
    for name in ("config.json", "results.json", "checkpoints/best.json"):
        assert json.loads((broken / name).read_text()) == json.loads(
            (runs.folder / "whole" / name).read_text()
        )
    runs.assert_same("broken", "whole")


def test_corrupted_last_checkpoint_falls_back_to_the_one_before(runs):
    """A cut file in the newest checkpoint is noticed and named; the run goes on from the one
    before, to the same end.
    """
    shutil.copytree(runs.folder / "whole", runs.folder / "corrupted")
    (runs.folder / "corrupted" / "results.json").unlink()
    files = [
        f
        for f in (runs.folder / "corrupted" / "checkpoints" / "16" / "model").rglob("*")
        if f.is_file()
    ]
    biggest = max(files, key=lambda f: f.stat().st_size)
    biggest.write_bytes(biggest.read_bytes()[: biggest.stat().st_size // 2])
    done = runs.run("corrupted")
    assert done.returncode == 0, done.stderr
    assert "checkpoints/16 is corrupted" in done.stdout
    assert "falling back to step 15" in done.stdout
    runs.assert_same("corrupted", "whole")


def test_finished_run_prints_its_results_and_trains_no_more(runs):
    """The same command on a finished workdir shows the table and exits 0, changing nothing."""
    before = {f: f.stat().st_mtime_ns for f in (runs.folder / "whole" / "checkpoints").rglob("*")}
    done = runs.run("whole", "--config.log_every=5", "--config.data.root=elsewhere")
    assert done.returncode == 0, done.stderr
    assert "mIoU" in done.stdout
    assert "finished" in done.stdout
    page = runs.folder / "whole" / "report" / "report.html"
    assert done.stdout.splitlines()[-1] == f"curves and pictures: {page}"
    assert "16 steps." in page.read_text()
    lines = (runs.folder / "whole" / "history.jsonl").read_text().splitlines()
    start, end = map(json.loads, lines)
    assert (start["event"], start["step"], start["processes"]) == ("start", 0, 1)
    assert start["command"].startswith("jaxdg train --config")
    assert (end["event"], end["step"]) == ("end", 16)
    assert before == {
        f: f.stat().st_mtime_ns for f in (runs.folder / "whole" / "checkpoints").rglob("*")
    }


def test_changed_configuration_is_refused_with_the_differences(runs):
    """Another learning rate in the same workdir would make the run unreadable."""
    done = runs.run("whole", "--config.optimizer.learning_rate=0.5")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "optimizer.learning_rate: 0.001 -> 0.5" in done.stderr


def test_misspelt_and_wrong_fields_on_the_command_line(runs):
    """One line says which field, and what was meant or is allowed."""
    done = runs.run("never", "--config.optimiser.clip=1")
    assert (done.returncode, done.stderr) == (
        1,
        "error: unknown field optimiser; did you mean optimizer?\n",
    )
    done = runs.run("never", "--config.model.dtype=int8")
    assert (done.returncode, done.stderr) == (
        1,
        "error: model.dtype is 'int8'; allowed: 'float32' or 'bfloat16'\n",
    )
    done = runs.run("never", "--workdir=az://bucket/run")
    assert done.returncode == 1
    assert re.fullmatch(r"error: --workdir is az://bucket/run, a URL; .*\n", done.stderr)
    assert not (runs.folder / "never").exists()


def test_full_disk_is_one_line_and_costs_nothing_saved(runs):
    """A real disk with room for two checkpoints: the run stops saying so, keeps them, and goes on
    from the last once there is room.
    """
    (runs.folder / "full").mkdir()

    def mount(*arguments):
        return subprocess.run(
            ["mount", *arguments, str(runs.folder / "full")], capture_output=True, text=True
        )

    made = mount("-t", "tmpfs", "-o", "size=24m", "tmpfs")
    if made.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {made.stderr.strip()}")
    try:
        done = runs.run("full")
        assert done.returncode == 1, done.stdout + done.stderr
        assert done.stderr.startswith("error: disk full: the checkpoint of step 8 needs "), (
            done.stderr
        )
        assert "the checkpoints before it are whole (3, 6)" in done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
        assert mount("-o", "remount,size=200m").returncode == 0
        again = runs.run("full")
        assert again.returncode == 0, again.stderr
        assert "resuming from step 6" in again.stdout
        runs.assert_same("full", "whole")
    finally:
        subprocess.run(["umount", str(runs.folder / "full")], check=True)


def test_results_are_what_the_loaded_model_predicts(runs):
    """results.json equals IoUs counted here, an image at a time, with `jaxdg.load(..).predict`."""
    results = json.loads((runs.folder / "whole" / "results.json").read_text())
    c = config.load(runs.folder / "whole")
    model = jaxdg.load(runs.folder / "whole")
    for domain in ("clear", "fog"):
        dataset = open_domain(domain, root="", train=False, streets=c.data.streets, folder=None)
        total = np.zeros((19, 19), np.int64)
        for i in range(len(dataset)):
            prediction = model.predict(dataset[i]["image"])
            assert prediction.shape == dataset.size(i)
            valid = dataset[i]["label"] != 255
            np.add.at(total, (dataset[i]["label"][valid], prediction[valid]), 1)
        expected = 100 * segmentation.iou(total)
        entry = results["domains"][domain]
        np.testing.assert_allclose(
            [np.nan if v is None else v for v in entry["IoU"].values()], expected, rtol=1e-9
        )
        assert entry["mIoU"] == pytest.approx(np.nanmean(expected))
        assert entry["images"] == 3
        assert entry["seen"] == (domain == "clear")
    unseen = results["domains"]["fog"]["mIoU"]
    assert results["mean_unseen"] == pytest.approx(unseen)
    assert results["rPD"] == pytest.approx(100 * unseen / results["domains"]["clear"]["mIoU"])
    assert (results["task"], results["source"], results["protocol"], results["step"]) == (
        "segmentation",
        "clear",
        "native",
        16,
    )


def test_evaluate_and_predict_commands(runs):
    """`evaluate` on one step of a workdir repeats its numbers; `predict` writes ids of the image's
    own size and an overlay.
    """

    def module(name, *rest):
        """With an environment that changes nothing."""
        step = str(runs.folder / "whole" / "checkpoints" / "16")
        return runs.module(name, "--checkpoint", step, *rest, JAX_ENABLE_X64="1")

    out = runs.folder / "evaluated"
    done = module("evaluate", "--domains", "fog", "--out", str(out), "--batch_size", "2")
    assert done.returncode == 0, done.stderr
    results = [
        json.loads((folder / "results.json").read_text()) for folder in (out, runs.folder / "whole")
    ]
    assert results[0]["domains"]["fog"] == results[1]["domains"]["fog"]
    assert (out / "pictures" / "fog_0.jpg").exists()
    again = module("evaluate", "--domains", "fog", "--protocol", "rein", "--out", str(out))
    assert again.returncode == 1
    told = (
        f"error: {out}/results.json holds other results (protocol: 'native' there, 'rein' now);"
        " give another --out\n"
    )
    assert again.stderr.endswith(told), again.stderr
    assert json.loads((out / "results.json").read_text()) == results[0]

    several = runs.folder / "several"
    done = module(
        "evaluate", "--domains", "fog", "--protocol", "native,vltseg", "--out", str(several)
    )
    assert done.returncode == 0, done.stderr
    both = {name: several / name / "results.json" for name in ("native", "vltseg")}
    both = {name: json.loads(path.read_text()) for name, path in both.items()}
    assert both["native"] == results[0]
    assert both["vltseg"]["protocol"] == "vltseg"
    rows = [line.split("│") for line in done.stdout.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row[1:3]] for row in rows] == [
        [name, f"{one['mean_unseen']:.1f}"] for name, one in both.items()
    ]

    image = np.random.default_rng(0).integers(0, 255, (37, 61, 3), np.uint8)
    (runs.folder / "images").mkdir()
    Image.fromarray(image).save(runs.folder / "images" / "odd.png")
    done = module("predict", "--out", str(runs.folder / "predicted"), str(runs.folder / "images"))
    assert done.returncode == 0, done.stderr
    ids = np.asarray(Image.open(runs.folder / "predicted" / "odd.png"))
    assert (ids.dtype, ids.shape) == (np.uint8, (37, 61))
    np.testing.assert_array_equal(ids, jaxdg.load(runs.folder / "whole").predict(image))
    with jax.enable_x64(True):  # in a program of one's own
        np.testing.assert_array_equal(ids, jaxdg.load(runs.folder / "whole").predict(image))
    assert (runs.folder / "predicted" / "odd_overlay.jpg").exists()

    done = module(
        "predict", "--out", str(runs.folder / "predicted"), str(runs.folder / "nowhere.jpg")
    )
    assert done.returncode == 1
    assert "nowhere.jpg does not exist" in done.stderr


def tiny(root: Path | str = "data", **data) -> Config:
    """A configuration that fails early or finishes in a second."""
    return config.validated(
        Config(
            steps=2,
            batch_size=2,
            log_every=1,
            eval_every=0,
            data=DataConfig(
                root=str(root),
                crop=(32, 32),
                streets=StreetsOptions(size=(48, 96), images=3, val_images=1),
                **data,
            ),
            model=ModelConfig(pyramid="none", taps=(3,)),
            optimizer=OptimizerConfig(),
            evaluation=EvaluationConfig(domains=("clear",), stride=(32, 32)),
        )
    )


def start(c: Config, workdir: Path, interrupt: cli.Interrupt | None = None) -> None:
    """Trains in this process, on one device."""
    first = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: first)
        train.train(c, workdir, cli.console(), interrupt or cli.Interrupt())


def folder_config(
    root: Path, image: bytes | None = None, label: np.ndarray | None = None
) -> Config:
    """A dataset of one pair of files below `root`, good unless another image or label is given."""
    for name in ("images/town", "labels/town"):
        (root / name).mkdir(parents=True, exist_ok=True)
    good = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    Image.fromarray(good).save(root / "images/town/a.jpg")
    if image is not None:
        (root / "images/town/a.jpg").write_bytes(image)
    Image.fromarray(np.zeros((40, 40), np.uint8) if label is None else label).save(
        root / "labels/town/a.png"
    )
    return tiny(root, source="town", folder=FolderOptions(classes=("one", "two")))


def test_bad_files_are_named(tmp_path):
    """Truncated image, label of another size, id outside the table, empty folder, missing root:
    each error names the file or folder.
    """
    c = folder_config(tmp_path / "cut")
    whole = (tmp_path / "cut/images/town/a.jpg").read_bytes()
    folder_config(tmp_path / "cut", image=whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"images/town/a\.jpg: truncated"):
        start(c, tmp_path / "run1")
    with pytest.raises(ValueError, match=r"labels/town/a\.png is 20x30 but its image is 40x40"):
        start(
            folder_config(tmp_path / "size", label=np.zeros((30, 20), np.uint8)), tmp_path / "run2"
        )
    with pytest.raises(ValueError, match=r"labels/town/a\.png: .*7"):
        start(
            folder_config(tmp_path / "id", label=np.full((40, 40), 7, np.uint8)), tmp_path / "run3"
        )
    empty = folder_config(tmp_path / "empty")
    (tmp_path / "empty/images/town/a.jpg").unlink()
    with pytest.raises((ValueError, FileNotFoundError), match="images/town"):
        start(empty, tmp_path / "run4")
    with pytest.raises(
        FileNotFoundError, match=r"nowhere does not exist; set JAXDG_DATA or --config\.data\.root"
    ):
        start(tiny(tmp_path / "nowhere", source="camvid"), tmp_path / "run5")


def test_a_run_that_goes_on_with_fewer_images_says_what_that_means(tmp_path, capsys):
    """An image and its label are taken away after the first step: the run goes on, and says that it
    is another one from here.
    """

    class AtOnce(cli.Interrupt):
        asked = True

    c = folder_config(tmp_path, label=np.eye(40, dtype=np.uint8))
    for kind, suffix in (("images", "jpg"), ("labels", "png")):
        shutil.copy(tmp_path / f"{kind}/town/a.{suffix}", tmp_path / f"{kind}/town/b.{suffix}")
    start(c, tmp_path / "run", AtOnce())
    assert "changed" not in capsys.readouterr().out
    for kind, suffix in (("images", "jpg"), ("labels", "png")):
        (tmp_path / f"{kind}/town/b.{suffix}").unlink()
    start(c, tmp_path / "run")
    out = capsys.readouterr().out
    assert (
        "warning: town has changed since the run's last start: 1 images instead of 2; from here on"
        " other images come in" in out
    )
    assert out.index("warning") < out.index("resuming from step 1") < out.index("finished")


def test_non_finite_loss_names_step_and_files(tmp_path):
    """A learning rate that blows up stops the run at the step, names its images, and saves nothing
    of it.
    """
    c = tiny()
    c.steps = 8
    c.optimizer.learning_rate = 1e30
    c.optimizer.clip = 0.0
    c.checkpoint_every = 1
    with pytest.raises(
        ValueError, match=r"the loss of step \d+ is (nan|inf); its batch: streets/clear/\d"
    ) as error:
        start(c, tmp_path)
    step = int(str(error.value).split("step ")[1].split()[0])
    checkpoints = Checkpoints(tmp_path)
    assert max(checkpoints.steps(), default=0) < step
    checkpoints.close()


def test_batch_that_devices_do_not_divide_is_refused(tmp_path):
    """Eight emulated devices cannot share six crops."""
    c = tiny()
    c.batch_size = 6
    with pytest.raises(
        ValueError, match=r"batch_size 6 .* not divisible by 8 devices; allowed: a multiple of 8"
    ):
        train.train(c, tmp_path, cli.console(), cli.Interrupt())


def test_missing_weights_are_refused_before_training(tmp_path):
    """The message says how to make the file."""
    c = tiny()
    c.model.weights = str(tmp_path / "absent.safetensors")
    with pytest.raises(
        FileNotFoundError, match=r"absent\.safetensors; convert a checkpoint with jaxdg convert"
    ):
        start(c, tmp_path / "run")


def test_weights_that_are_of_something_else_are_refused_before_training(tmp_path):
    """A file of another encoder of the zoo, and a download that was not converted: what it is and
    what to do, before data are opened.
    """
    c = tiny(root="absent")
    c.model.weights = str(tmp_path / "moco.safetensors")
    weights.save(
        {"cls_token": np.ones((1, 1, 768), np.float32)}, c.model.weights, {"model": "mocov3_b16"}
    )
    with pytest.raises(
        ValueError,
        match=(
            rf"weights of mocov3_b16, and the encoder is {c.model.encoder}: set"
            r" model.encoder=mocov3_b16"
        ),
    ):
        start(c, tmp_path / "run")
    c.model.weights = str(tmp_path / "mae.pth")
    Path(c.model.weights).write_bytes(b"PK")
    with pytest.raises(
        ValueError,
        match=r"mae.pth is a .pth file and no converted one.*jaxdg convert --checkpoint .*mae.pth",
    ):
        start(c, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_what_was_trained_on_is_named_kept_and_told(tmp_path, capsys):
    """A copy of the source and a domain without truth are named before the first step, kept in
    source.npz, and out of every mean.
    """
    rng = np.random.default_rng(0)
    labels = {"town": (0, 1), "copy": (0, 1), "other": (0, 1), "blank": (255,)}
    for name, ids in labels.items():
        for kind in ("images", "labels"):
            (tmp_path / kind / name).mkdir(parents=True)
        for i in range(2):
            image = rng.integers(0, 255, (40, 40, 3), np.uint8)
            Image.fromarray(image).save(tmp_path / "images" / name / f"{i}.png")
            Image.fromarray(rng.choice(ids, (40, 40)).astype(np.uint8)).save(
                tmp_path / "labels" / name / f"{i}.png"
            )
    shutil.copyfile(tmp_path / "images/town/1.png", tmp_path / "images/copy/0.png")
    c = tiny(tmp_path, source="town", folder=FolderOptions(classes=("one", "two")))
    c.eval_every = 2
    c.evaluation.domains = tuple(labels)
    start(c, tmp_path / "run")
    said = " ".join(capsys.readouterr().out.split())
    for line in (
        "town: all of its 2 images are trained on; it counts as seen",
        "copy: 1 of its 2 images is trained on; it counts as seen",
    ):
        assert said.index(line) < said.index("step 1/2")
    assert "blank no truth" in said
    assert "town: judged on images it was trained on (2 of 2)" in said
    assert "blank: no truth, so it has no score and is in no mean" in said
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    entries = results["domains"]
    assert {name: (e["seen"], e["trained_on"]) for name, e in entries.items()} == {
        "town": (True, 2), "copy": (True, 1), "other": (False, 0), "blank": (False, 0)
    }  # fmt: skip
    assert entries["blank"]["mIoU"] is None
    assert (results["mean_unseen"], results["seen_by"]) == (entries["other"]["mIoU"], "images")
    own = (entries["town"]["mIoU"] + entries["copy"]["mIoU"]) / 2  # both were trained on
    assert results["rPD"] == pytest.approx(100 * entries["other"]["mIoU"] / own)
    assert json.loads((tmp_path / "run" / "checkpoints" / "best.json").read_text())[
        "score"
    ] == pytest.approx(own)
    assert TrainedOn.load(tmp_path / "run").count == 2
    rows = {row["domain"]: row for row in read_metrics(tmp_path / "run") if "domain" in row}
    assert (rows["blank"]["mIoU"], rows["copy"]["trained_on"]) == (None, 1)


def wrong(tmp_path: Path) -> dict[str, tuple[Config, str]]:
    """Configurations that fail, each late in what is opened, with the message."""
    pictures = tiny()
    absent = tiny()
    strange = tiny()
    other = folder_config(tmp_path / "data")
    other.eval_every = 2
    other.evaluation.domains = ("town", "clear")
    pictures.data.pixmix = (1, 1.0)
    pictures.data.pictures = str(tmp_path / "nowhere")
    absent.model.weights = str(tmp_path / "absent.safetensors")
    strange.model.start = str(tmp_path / "no_run")
    return {
        "classes": (
            other,
            r"domain clear has the classes road, .*but the model was trained on one, two",
        ),
        "pictures": (pictures, r"nowhere, which data\.pictures names"),
        "weights": (absent, r"absent\.safetensors"),
        "start": (strange, r"no_run/config\.json does not exist"),
        "data": (tiny(tmp_path / "no_data", source="camvid"), r"no_data does not exist"),
    }


@pytest.mark.parametrize("what", ["classes", "pictures", "weights", "start", "data"])
def test_a_first_command_that_fails_leaves_nothing(tmp_path, what):
    """Whatever is wrong with it, and be it found last of all: the workdir was not made, so the
    corrected command is the first.
    """
    c, message = wrong(tmp_path)[what]
    (tmp_path / "runs").mkdir()
    with pytest.raises((ValueError, OSError), match=message):
        start(c, tmp_path / "runs" / "deep" / "run")
    assert not list((tmp_path / "runs").iterdir())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("broken_reads_forgotten")
def test_a_last_checkpoint_that_cannot_be_read_ends_in_an_error(tmp_path, monkeypatch):
    """What came to the disk is not what was saved: the run does not say finished and keeps it
    aside; the next start repairs it.
    """
    c = folder_config(tmp_path, label=np.eye(40, dtype=np.uint8))
    c.checkpoint_every = 1
    reread = Checkpoints.reread

    def damaged(self, like, step):
        self.wait()
        files = [f for f in (self.folder / str(step) / "model").rglob("d/*") if f.is_file()]
        biggest = max(files, key=lambda f: f.stat().st_size)
        biggest.write_bytes(biggest.read_bytes()[: biggest.stat().st_size // 2])
        return reread(self, like, step)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "reread", damaged)
        with pytest.raises(
            ValueError,
            match=(
                r"the checkpoint of step 2 cannot be read back .*corrupted_checkpoint_2; .*\(1\)$"
            ),
        ):
            start(c, tmp_path / "run")
    start(c, tmp_path / "run")
    assert (tmp_path / "run/checkpoints/2").is_dir()


def test_paths_with_special_characters(tmp_path):
    """A workdir, a data root and a folder of pictures whose names mean something to a search:
    trained, judged, loaded again.
    """
    place = tmp_path / "a [1]*?#%41 'é'"
    c = folder_config(place / "data [x]*", label=np.eye(40, dtype=np.uint8))
    c.data.pixmix = (1, 1.0)
    c.data.pictures = str(place / "data [x]*" / "images")
    c.eval_every = 2
    c.evaluation.domains = ("town",)
    start(c, place / "-run [2]")
    assert json.loads((place / "-run [2]" / "results.json").read_text())["step"] == 2
    assert jaxdg.load(place / "-run [2]").step == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [place.name]
    with pytest.raises(
        ValueError,
        match=r"holds .*, which the checkpoint library reads as something else; rename the folder$",
    ):
        start(c, place / "back\\slash")
    assert not (place / "back\\slash").exists()
