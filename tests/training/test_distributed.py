"""Several processes as one run: found by flags or launcher, stopped together, and ended in bounded
time by whatever happens to one.
"""

import contextlib
import json
import os
from pathlib import Path
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from typing import NamedTuple

import jax
from PIL import Image
import pytest
import yaml

from jaxdg import config as config_lib
from jaxdg import train
from jaxdg.commands import command_line as cli
from jaxdg.training import distributed
from jaxdg.training.metrics import read_metrics
from tests import forked

ROOT = Path(__file__).resolve().parents[2]
HEARTBEAT = 10  # seconds here
HOST = f"""
import sys, time
import jax
from jaxdg.commands import command_line as cli
from jaxdg.training import distributed
distributed.HEARTBEAT = {HEARTBEAT}
trouble = sys.argv.pop(1)
distributed.define_flags()

@distributed.joined()
def main(_):
    seed = jax.process_index() if trouble == "differs" else 0
    distributed.agree({{"steps": 3, "seed": seed}}, "start them alike")
    interrupt = cli.Interrupt(distributed.Agreement())
    step = 0
    print(distributed.gathered({{jax.process_index(): "x" * 10 ** jax.process_index()}}))
    print(distributed.from_main(lambda: jax.process_index() == 0))
    while not interrupt.asked:
        step += 1
        print(step, flush=True)
        if step == 5 and jax.process_index() == 1:
            if trouble == "fails":
                raise ValueError("town/07.png: truncated")
            if trouble == "hangs":
                time.sleep(1000)
        time.sleep(0.1)
    print("stopped at", step)

cli.run(main)
"""


def by_flags(port: int, i: int) -> tuple[list[str], dict[str, str]]:
    """What tells process `i` of two of the other: flags and environment."""
    return [f"--coordinator=localhost:{port}", "--processes=2", f"--process_id={i}"], {}


def by_slurm(port: int, i: int) -> tuple[list[str], dict[str, str]]:
    """As `srun` does."""
    step = {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": f"{i}",
        "SLURM_LOCALID": f"{i}",
    }
    step |= {"SLURM_STEP_ID": "0"}
    return [], {"JAX_COORDINATOR_PORT": f"{port}", **step}


def by_open_mpi(port: int, i: int) -> tuple[list[str], dict[str, str]]:
    """As `mpirun` of Open MPI 4 does."""
    rank = {
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": f"{i}",
        "OMPI_COMM_WORLD_LOCAL_RANK": f"{i}",
    }
    return [], {
        "JAX_COORDINATOR_PORT": f"{port}",
        "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://127.0.0.1:9",
        **rank,
    }


class Two:
    """Two processes of a run of `command`, one device each; leaves none behind. See `forked`."""

    def __init__(self, command: list[str], folder: Path, launcher=by_flags, **environment: str):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        common = {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
            "OMP_NUM_THREADS": "1",
        }
        place = Path(tempfile.mkdtemp(dir=folder))
        self.outputs = [place / f"{i}" for i in range(2)]
        self.processes = []
        for i, path in enumerate(self.outputs):
            flags, own = launcher(port, i)
            path.touch()
            program, *arguments = command[command[0] == "-m" :]
            self.processes.append(
                forked.Command(
                    program,
                    *arguments,
                    *flags,
                    environment=os.environ | common | environment | own,
                    printed=path,
                )
            )

    def __enter__(self) -> "Two":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def printed(self) -> list[str]:
        """By each, so far."""
        return [path.read_text() for path in self.outputs]

    def wait_until(self, ready) -> None:
        """Returns when `ready()`, or a process has ended."""
        until = time.monotonic() + 120
        while not ready() and all(process.poll() is None for process in self.processes):
            assert time.monotonic() < until
            time.sleep(0.02)


@pytest.fixture
def host(tmp_path):
    """`host("hangs")`: two processes count steps together until the second meets that trouble."""
    (tmp_path / "host.py").write_text(HOST)
    return lambda trouble, *flags, **how: Two(
        [str(tmp_path / "host.py"), trouble, *flags], tmp_path, **how
    )


class End(NamedTuple):
    """How two processes ended: codes of those that were not stopped, seconds since the trouble."""

    codes: list[int]
    seconds: float
    printed: list[str]


def ends(folder: Path, *cases: tuple[str, int]) -> list[End]:
    """What became of the processes of each case, a trouble and whose it is; all run at once."""
    (folder / "host.py").write_text(HOST)
    met: dict[int, float] = {}
    found: dict[int, End] = {}
    with contextlib.ExitStack() as stack:
        pairs = []
        for trouble, _ in cases:
            patience = ["--patience=0.1"] if trouble == "hangs" else []
            command = [str(folder / "host.py"), trouble, *patience]
            pairs.append(stack.enter_context(Two(command, folder)))
        until = time.monotonic() + 180
        while len(found) < len(cases):
            assert time.monotonic() < until, [two.printed() for two in pairs]
            time.sleep(0.02)
            for i, ((trouble, who), two) in enumerate(zip(cases, pairs, strict=True)):
                lost = trouble in ("killed", "frozen")
                waited = [p for k, p in enumerate(two.processes) if k != who or not lost]
                codes = [code for p in waited if (code := p.poll()) is not None]
                if i not in met and ("5\n" in two.printed()[1] or codes):
                    met[i] = time.monotonic()
                    if lost:
                        number = signal.SIGKILL if trouble == "killed" else signal.SIGSTOP
                        two.processes[who].send_signal(number)
                if i in met and i not in found and len(codes) == len(waited):
                    found[i] = End(codes, time.monotonic() - met[i], two.printed())
    return [found[i] for i in range(len(cases))]


@pytest.fixture(scope="module")
def at_once(tmp_path_factory):
    """The ends of the quicker cases, which mostly wait."""
    cases = [(trouble, 1) for trouble in ("killed", "frozen", "fails", "hangs")]
    return dict(zip(cases, ends(tmp_path_factory.mktemp("ends"), *cases), strict=True))


@pytest.mark.parametrize(
    ("trouble", "who", "said"),
    [
        pytest.param("killed", 1, r"heartbeat timeout|Connection closed by peer", id="killed"),
        pytest.param("killed", 0, "another task died", id="first killed", marks=pytest.mark.slow),
        pytest.param("frozen", 1, r"stopped sending heartbeats\):\n1\n", id="frozen"),
        pytest.param("frozen", 0, "another task died", id="first frozen", marks=pytest.mark.slow),
        pytest.param(
            "fails",
            1,
            r"process 1 of 2 on .* ends by the error below.*\nerror: town/07\.png: truncated\n",
            id="fails",
        ),
        pytest.param(
            "hangs",
            1,
            r"has ended no step and no batch for 0\.1 minutes .*, line \d+ in main",
            id="hangs",
        ),
    ],
)
def test_no_process_waits_for_ever(at_once, tmp_path, trouble, who, said):
    """Whatever becomes of one of two processes: within the bound the other has ended with an error
    and has said why.
    """
    end = at_once.get((trouble, who)) or ends(tmp_path, (trouble, who))[0]
    assert end.seconds < HEARTBEAT + distributed.LINGER + 5
    assert 0 not in end.codes
    assert re.search(said, "".join(end.printed), re.DOTALL), end.printed


def test_asked_one_all_stop_together(host):
    """Started as by Slurm: SIGTERM to the second process ends both in order after the same step.

    On the way: what they tell each other.
    """
    with host("stops", launcher=by_slurm) as two:
        two.wait_until(lambda: "5\n" in two.printed()[1])
        two.processes[1].send_signal(signal.SIGTERM)
        assert [process.wait(timeout=60) for process in two.processes] == [0, 0], two.printed()
    lines = [
        [line for line in text.splitlines() if not line.startswith("[Gloo]")]
        for text in two.printed()
    ]
    assert lines[0] == lines[1]
    assert lines[0][:2] == ["{0: 'x', 1: 'xxxxxxxxxx'}", "True"]
    assert re.fullmatch(r"stopped at \d+", lines[0][-1])


def differing(launcher, **second: str):
    """A launcher whose second process has other variables besides."""
    return lambda port, i: (launcher(port, i)[0], launcher(port, i)[1] | (second if i else {}))


@pytest.mark.parametrize(
    ("trouble", "launcher", "said"),
    [
        ("differs", by_flags, "seed 1 instead of 0 as process 0 on {host}; start them alike"),
        (
            "meet",
            differing(by_slurm, SLURM_STEP_ID="1"),
            "SLURM_STEP_ID '1' instead of '0' as process 0 on {host}; two runs have met: ",
        ),
        (
            "sets",
            differing(by_open_mpi, JAX_DEFAULT_PRNG_IMPL="rbg"),
            "JAX_DEFAULT_PRNG_IMPL 'rbg' instead of 'threefry2x32' as process",
        ),
    ],
)
def test_processes_that_are_not_alike_end_together(host, trouble, launcher, said):
    """Another value, another step of a job on the same port, another setting of jax: one line, the
    same in all processes; exit code 1.
    """
    with host(trouble, launcher=launcher) as two:
        assert [process.wait(timeout=60) for process in two.processes] == [1, 1], two.printed()
    expected = f"error: process 1 on {socket.gethostname()} has " + said.format(
        host=socket.gethostname()
    )
    for text in two.printed():
        lines = [line for line in text.splitlines() if not line.startswith("[Gloo]")]
        assert len(lines) == 1, text
        assert lines[0].startswith(expected), text


def train_command(folder: Path) -> list[str]:
    """A run on pairs of images below two roots; the second lacks one."""
    (folder / "tiny.py").write_text(CONFIG)
    for root in ("r0", "r1"):
        for kind in ("images", "labels"):
            (folder / root / kind / "town").mkdir(parents=True)
            for k in range(4 if root == "r0" else 3):
                Image.new("L" if kind == "labels" else "RGB", (48, 48)).save(
                    folder / root / kind / "town" / f"{k}.png"
                )
    return ["-m", "jaxdg.train", f"--config={folder}/tiny.py", f"--workdir={folder}/run"]


def evaluate_command(folder: Path) -> list[str]:
    """Of a run that has been claimed."""
    config_lib.save(config_lib.validated(config_lib.Config()), folder)
    return ["-m", "jaxdg.evaluate", f"--checkpoint={folder}"]


@pytest.mark.parametrize(
    ("command", "own", "said"),
    [
        (
            train_command,
            ([], ["--config.seed=1", "--config.optimizer.clip=2"]),
            "seed 1 instead of 0, optimizer.clip 2.0 instead of 0.01 as",
        ),
        (
            train_command,
            tuple(
                [
                    "--config.data.source=town",
                    "--config.data.folder.images=images/{domain}",
                    f"--config.data.root={r}",
                ]
                for r in ("r0", "r1")
            ),
            "images of the source town '3 (",
        ),
        (
            evaluate_command,
            ([], ["--domains=fog"]),
            "evaluation.domains ('fog',) instead of ('clear', 'night', ",
        ),
    ],
    ids=["another configuration", "other images", "another evaluation"],
)
def test_commands_compare_before_they_begin(tmp_path, command, own, said):
    """What is compared: the configuration and flags of `train` and `evaluate`, and the images once
    they are open, wherever they lie.
    """

    def launcher(port, i):
        flags, environment = by_flags(port, i)
        return (
            flags
            + [flag.replace("=r", f"={tmp_path}/r") if "root" in flag else flag for flag in own[i]],
            environment,
        )

    with Two(command(tmp_path), tmp_path, launcher, JAXDG_CACHE=str(tmp_path / "cache")) as two:
        assert [process.wait(timeout=120) for process in two.processes] == [1, 1], two.printed()
    for text in two.printed():
        assert f"error: process 1 on {socket.gethostname()} has {said}" in text, text
        assert len([line for line in text.splitlines() if "error" in line]) == 1, text


def test_a_port_in_use_is_refused(monkeypatch):
    """By the first process, in one line; two services on one port would share the processes of both
    runs, or crash.
    """
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda *_, **__: pytest.fail("it was started")
    )
    preemption = jax.config.values["jax_enable_preemption_service"]
    with socket.socket() as other:
        other.bind(("localhost", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(
            ValueError,
            match=(
                rf"port {port} is not free \(Address already in use\), .*; give another"
                r" --coordinator"
            ),
        ):
            distributed.start(f"localhost:{port}", 2, 0)
        for name, value in by_slurm(port, 0)[1].items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("OMPI_COMM_WORLD_SIZE", raising=False)
        with pytest.raises(ValueError, match=rf"port {port} is not free"):
            distributed.start(None, None, None)
    jax.config.update("jax_enable_preemption_service", preemption)


def test_steps_of_a_job_have_ports_of_their_own(monkeypatch):
    """Neighbouring jobs and steps do not share one; the port of Open MPI is jax's, and one that was
    chosen is kept.
    """
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "JAX_COORDINATOR")):
            monkeypatch.delenv(name)
    found = []
    monkeypatch.setattr(
        jax.distributed,
        "initialize",
        lambda *_, **__: found.append(os.environ.get("JAX_COORDINATOR_PORT")),
    )
    preemption = jax.config.values["jax_enable_preemption_service"]
    monkeypatch.setenv("SLURM_STEP_NODELIST", "a[1-2]")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    for job, step in [(job, step) for job in range(12345, 12355) for step in range(10)]:
        monkeypatch.setenv("JAX_COORDINATOR_PORT", "")
        monkeypatch.delenv("JAX_COORDINATOR_PORT")
        monkeypatch.setenv("SLURM_JOB_ID", str(job))
        monkeypatch.setenv("SLURM_STEP_ID", str(step))
        distributed.start(None, None, None)
    assert len(set(found)) == 100
    assert all(61_440 <= int(port) < 65_536 for port in found)
    monkeypatch.setenv("JAX_COORDINATOR_PORT", "7")
    distributed.start(None, None, None)
    assert found[-1] == "7"
    monkeypatch.delenv("JAX_COORDINATOR_PORT")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    distributed.start(None, None, None)
    assert found[-1] is None
    jax.config.update("jax_enable_preemption_service", preemption)


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        (
            {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"},
            False,
        ),  # a batch script or salloc, without srun
        ({"SLURM_STEP_NODELIST": "a", "SLURM_NTASKS": "1"}, False),
        ({"SLURM_STEP_NODELIST": "a[1-4]", "SLURM_NTASKS": "8"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1", "SLURM_STEP_NODELIST": "a", "SLURM_NTASKS": "8"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
    ],
)
def test_nothing_starts_for_a_single_process(monkeypatch, environment, several):
    """Launchers of several processes are told from those of one; `--processes 1` wins over them,
    and a lone flag is refused.
    """
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "JOB_")):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    started = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given, **_: started.append(given))
    preemption = jax.config.values["jax_enable_preemption_service"]
    assert distributed.start(None, 1, None) is False
    assert not started
    distributed.start(None, None, None)
    assert started == [(None, None, None)] * several
    monkeypatch.undo()
    with pytest.raises(
        ValueError, match=r"did not find each other: .* See docs/how-to/clusters\.md"
    ):
        distributed.start(None, 2, None)
    jax.config.update("jax_enable_preemption_service", preemption)


def test_launchers_are_well_formed():
    """Bash accepts the Slurm script; the JobSet is YAML with as many processes as pods, the first
    of which is the coordinator.
    """
    subprocess.run(["bash", "-n", ROOT / "scripts/slurm.sh"], check=True)
    jobset = yaml.safe_load((ROOT / "scripts/kubernetes.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert job["replicas"] == 1
    assert spec["completionMode"] == "Indexed"
    assert spec["parallelism"] == spec["completions"]
    (container,) = spec["template"]["spec"]["containers"]
    name = jobset["metadata"]["name"]
    command = " ".join([*container["command"], *container["args"]])
    assert f"--coordinator={name}-{job['name']}-0-0.{name}:" in command
    assert f"--processes={spec['parallelism']} " in command
    assert "--process_id=$(JOB_COMPLETION_INDEX)" in command


CONFIG = """
from jaxdg.config import Config
def get_config():
    c = Config(steps=60, batch_size=4, log_every=1, eval_every=60, checkpoint_every=50)
    c.data.crop = c.evaluation.stride = (32, 32)
    c.data.streets.size = (48, 96)
    c.data.streets.images = 12
    c.data.streets.val_images = 5
    c.model.pyramid = "batch"
    c.optimizer.learning_rate = 1e-3
    c.evaluation.domains = ("clear", "fog")
    return c
"""


@pytest.mark.slow
def test_two_processes_are_one(tmp_path, monkeypatch):
    """Two processes, stopped by SIGTERM to one and started again, train, normalise and judge as one
    process with two devices does.

    The starts are told of each other in three ways. Only the first process writes and prints. A
    checkpoint that cannot be read ends both.
    """
    (tmp_path / "tiny.py").write_text(CONFIG)
    environment = {"JAXDG_CACHE": str(tmp_path)}
    command = ["-m", "jaxdg.train", f"--config={tmp_path}/tiny.py", f"--workdir={tmp_path}/two"]
    metrics = tmp_path / "two" / "metrics.jsonl"
    with Two(command, tmp_path, **environment) as first:
        first.wait_until(lambda: metrics.exists() and read_metrics(metrics.parent))
        first.processes[1].send_signal(signal.SIGTERM)
        assert [process.wait(timeout=300) for process in first.processes] == [0, 0], first.printed()
    shutil.copytree(tmp_path / "two", tmp_path / "damaged")
    damaged = max(
        (tmp_path / "damaged" / "checkpoints").rglob("d/*"), key=lambda path: path.stat().st_size
    )
    damaged.write_bytes(b"")
    with Two([*command[:-1], f"--workdir={tmp_path}/damaged"], tmp_path, **environment) as refused:
        assert 0 not in [process.wait(timeout=300) for process in refused.processes]
    assert re.search(
        r"error: checkpoint .*checkpoints/\d+ cannot be read by process .*; move this folder away",
        "".join(refused.printed()),
    )
    with Two(command, tmp_path, by_slurm, **environment) as second:
        assert [process.wait(timeout=300) for process in second.processes] == [
            0,
            0,
        ], second.printed()
    command = ["-m", "jaxdg.evaluate", f"--checkpoint={tmp_path}/two", f"--out={tmp_path}/again"]
    with Two(command, tmp_path, by_open_mpi, **environment) as third:
        assert [process.wait(timeout=300) for process in third.processes] == [0, 0], third.printed()
    stopped = int(
        re.search(r"\nstopped at step (\d+); run the same command to go on", first.printed()[0])[1]
    )
    assert 0 < stopped < 60
    assert f"resuming from step {stopped}\n" in second.printed()[0]
    assert all(
        line.startswith("[Gloo]")
        for start in (first, second, third)
        for line in start.printed()[1].splitlines()
    )
    assert len(list((tmp_path / "two" / "tensorboard").iterdir())) == 2  # one file a start

    devices = jax.devices()[:2]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setenv("JAXDG_CACHE", str(tmp_path))
    train.train(
        config_lib.from_file(tmp_path / "tiny.py"),
        tmp_path / "one",
        cli.console(quiet=True),
        cli.Interrupt(),
    )
    losses = [
        [row["loss"] for row in read_metrics(tmp_path / name) if "loss" in row]
        for name in ("one", "two")
    ]
    assert len(losses[0]) == 60
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    one, two, again = (
        json.loads((tmp_path / name / "results.json").read_text())
        for name in ("one", "two", "again")
    )
    del again["model"]  # by which results of one model are told from another's
    assert min(run.pop("device_hours") for run in (one, two)) > 0  # they took different times
    assert one == two == again

    def files(name):
        return sorted(
            str(path.relative_to(tmp_path / name))
            for path in (tmp_path / name).rglob("qualitative/*")
        )

    assert len(files("one")) == 4  # two images of each domain, whichever process has judged them
    assert files("one") == files("two") == files("again")
