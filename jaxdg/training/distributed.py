"""Several processes as one run: how they meet, decide together, and end together.

`jax.distributed` finds the processes and watches them; `docs/how-to/clusters.md` shows how to start
them. This module adds what a command needs: a single process starts nothing, one process writes,
all stop at the same step, and none waits for ever for another:

- A process that was killed, frozen or cut off sends no heartbeats. Jax notices within `HEARTBEAT`
  seconds, at once if the first process was killed, and aborts all others with a message.
- A process that fails prints its error and ends without waiting for the others. They then miss its
  heartbeats.
- If a process has another configuration, code or data than the first, or belongs to another run, an
  error names it and all end.
- A process that hangs, for instance in a read from a dead file system, still sends heartbeats, and
  all wait for it. Each process ends after `--patience` minutes without a step or batch, and prints
  where it stands.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import faulthandler
import hashlib
from importlib.metadata import version
import importlib.util
import itertools
import json
import math
import os
from pathlib import Path
import pickle
import platform
import socket
import sys
import threading
import time
from typing import Any

from absl import flags
import jax

# Nothing public reaches the service by which processes meet.
from jax._src.distributed import global_state as meeting
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

HEARTBEAT = 100  # seconds without a sign of life from another process
LINGER = 3  # seconds that a failed process has to print its error
DAY = 86_400_000  # milliseconds; `_watch` ends a process that waits so long
# The variables that name a run, by the variable that tells the launcher. Under `mpirun` Slurm's
# variables name the steps that started the processes, one a host, so Open MPI's come first.
RUN_NAMES = {
    "OMPI_COMM_WORLD_SIZE": ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
    "SLURM_STEP_NODELIST": ("SLURM_JOB_ID", "SLURM_STEP_ID"),
}
# Settings of jax that change the numbers that a program computes.
JAX_SETTINGS = (
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_default_matmul_precision",
    "jax_disable_jit",
)

_progress = time.monotonic()  # when the last step or batch ended


def define_flags() -> None:
    """The flags of commands that may run as several processes."""
    of_command: Any = {"module_name": sys.argv[0]}
    flags.DEFINE_string(
        "coordinator",
        None,
        "HOST:PORT that process 0 listens on; not needed under Slurm, Open MPI and Kubernetes.",
        **of_command,
    )
    help = "Number of processes; likewise."
    flags.DEFINE_integer("processes", None, help, lower_bound=1, **of_command)
    help = "Number of this process, from 0; likewise."
    flags.DEFINE_integer("process_id", None, help, lower_bound=0, **of_command)
    help = "Minutes without a step or batch after which all processes end."
    flags.DEFINE_float("patience", 30, help, lower_bound=0, **of_command)


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Joins the other processes of a run, if the flags or the launcher name any.

    Inside, jax sees all their devices.

    Raises:
        ValueError: see `start`.
    """
    f = flags.FLAGS
    if not start(f.coordinator, f.processes, f.process_id):
        yield
        return
    # Asking jax itself would start the devices; if versions differ, they may not find each other.
    me = f"process {meeting.process_id} of {meeting.num_processes} on {socket.gethostname()}"
    threading.Thread(target=_watch, args=(me, 60 * f.patience), daemon=True).start()
    try:
        if f.coordinator is None:
            launchers = (names for variable, names in RUN_NAMES.items() if variable in os.environ)
            agree(
                {name: os.environ.get(name) for name in next(launchers, ())},
                "two runs have met: give each a --coordinator HOST:PORT of its own",
            )
        agree(versions(), "install the same on all hosts and start all processes alike")
        devices = ", ".join(sorted(device.device_kind for device in jax.local_devices()))
        agree({"devices": devices}, "give each process the same devices")
        yield
    except Disagreement:
        jax.distributed.shutdown()  # all processes raise this, so all can shut down in order
        raise
    except BaseException:
        print(
            f"{me} ends by the error below, the others within {HEARTBEAT} seconds",
            file=sys.stderr,
            flush=True,
        )
        # At its exit the interpreter would wait for the others, which wait for this process.
        end = threading.Timer(LINGER, os._exit, [1])
        end.daemon = True
        end.start()
        raise
    jax.distributed.shutdown()  # the first process waits for the last


def start(coordinator: str | None, processes: int | None, process_id: int | None) -> bool:
    """Starts `jax.distributed`, before any other use of jax.

    Args:
        coordinator: HOST:PORT of process 0; None leaves it to the launcher, as do the others.
        processes: their number; 1 starts nothing, whatever the launcher says.
        process_id: of this process.

    Returns:
        Whether there are several processes.

    Raises:
        ValueError: an argument is missing and the launcher does not supply it. If the others do not
            come, jax aborts after 5 minutes.
    """
    if processes == 1 or (coordinator is processes is process_id is None and not launched()):
        return False
    if (
        coordinator is None
        and "OMPI_COMM_WORLD_SIZE" not in os.environ
        and "SLURM_STEP_NODELIST" in os.environ
    ):
        os.environ.setdefault("JAX_COORDINATOR_PORT", str(slurm_port()))
    # `cli.Interrupt` handles SIGTERM. It works in evaluation too, where this service has no steps.
    jax.config.update("jax_enable_preemption_service", False)
    ranks = os.environ.get("SLURM_PROCID"), os.environ.get("OMPI_COMM_WORLD_RANK")
    if process_id == 0 or (process_id is None and "0" in ranks):
        port = (coordinator or "").rpartition(":")[2]
        _check_port(port or os.environ.get("JAX_COORDINATOR_PORT"))
    try:
        jax.distributed.initialize(
            coordinator, processes, process_id, heartbeat_timeout_seconds=HEARTBEAT
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"the processes of the run did not find each other: {error} See docs/how-to/clusters.md"
        ) from error
    progress()
    return (meeting.num_processes or 1) > 1


def _check_port(port: str | None) -> None:
    """Refuses a port that is in use: if another run uses it, processes of both would mix."""
    if port is None or not port.isdigit():
        return
    with socket.socket() as trial:
        # The port of a run that has just ended is free.
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("", int(port)))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(
                f"port {port} is not free ({reason}), so the processes cannot meet there; give"
                " another --coordinator HOST:PORT to all, or set JAX_COORDINATOR_PORT"
            ) from error


def slurm_port() -> int:
    """The port of process 0 in a step of a Slurm job.

    Jax would derive it from the job only, and two steps on one node would meet.
    """
    environment = os.environ
    job = int(environment.get("SLURM_JOB_ID", 0))
    step = int(environment.get("SLURM_STEP_ID", 0))
    return 61_440 + (job + 1009 * step) % 4096  # as jax, in the upper range of ephemeral ports


def launched() -> bool:
    """Whether a launcher that jax knows has started several processes.

    Jax would join a single process as well, and would leave it only one GPU.
    """
    environment = os.environ
    if "OMPI_COMM_WORLD_SIZE" in environment:
        return int(environment["OMPI_COMM_WORLD_SIZE"]) > 1
    if "SLURM_STEP_NODELIST" in environment:
        return int(environment.get("SLURM_NTASKS", 1)) > 1
    # Under Kubernetes jax asks the cluster, through this package.
    has_package = importlib.util.find_spec("kubernetes") is not None
    return "JOB_COMPLETION_INDEX" in environment and has_package


def is_main() -> bool:
    """Whether this process writes and prints; one of them does."""
    return jax.process_index() == 0


def from_main(question: Callable[[], bool]) -> bool:
    """The first process's answer, on all processes.

    Files that are being written, for instance, could give each process another answer.
    """
    if jax.process_count() == 1:
        return question()
    return bool(multihost_utils.broadcast_one_to_all(np.array(is_main() and question())))


def from_main_list(question: Callable[[], list[str]]) -> list[str]:
    """As `from_main`, for a list of texts."""
    return gathered({0: question()} if is_main() else {})[0]


def gathered(mine: dict[Any, Any]) -> dict[Any, Any]:
    """The entries of all processes' dictionaries, on every process; pickled, so keep them small."""
    if jax.process_count() == 1:
        return mine
    data = np.frombuffer(pickle.dumps(mine), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(data.size))
    padded = multihost_utils.process_allgather(np.pad(data, (0, sizes.max() - data.size)))
    return {
        key: value
        for part, size in zip(padded, sizes, strict=True)
        for key, value in pickle.loads(part[:size].tobytes()).items()
    }


class Disagreement(ValueError):
    """A process differs from the first; all processes raise this at once."""


def agree(mine: Mapping[str, Any], remedy: str) -> None:
    """Compares values with those of process 0; all processes must call this, in the same order.

    Args:
        mine: values by name, such as fields of the configuration; their `repr` is compared.
        remedy: what to do about a difference.

    Raises:
        Disagreement: a process has other values; the message names it, its host, and up to three
            values with those of process 0.
    """
    client: Any = meeting.client
    if client is None:
        return
    here = socket.gethostname()
    known = {name: repr(value) for name, value in mine.items()}
    place = f"jaxdg/agree/{next(_calls)}"
    if meeting.process_id == 0:
        client.key_value_set(f"{place}/first", json.dumps([here, known]))
    there, wanted = json.loads(client.blocking_key_value_get(f"{place}/first", DAY))
    differing = [name for name in {**wanted, **known} if wanted.get(name) != known.get(name)]
    phrases = [f"{name} {known.get(name)} instead of {wanted.get(name)}" for name in differing[:3]]
    more = f" and {len(differing) - 3} more differences" if len(differing) > 3 else ""
    report = f"process {meeting.process_id} on {here} has {', '.join(phrases)}{more}"
    client.key_value_set(f"{place}/reports/{meeting.process_id:06d}", report if differing else "")
    client.wait_at_barrier(place, DAY)
    reports = [text for _, text in sorted(client.key_value_dir_get(f"{place}/reports/")) if text]
    if reports:
        others = f" (and {len(reports) - 1} other processes differ)" if len(reports) > 1 else ""
        raise Disagreement(f"{reports[0]} as process 0 on {there}{others}; {remedy}")


_calls = itertools.count()  # counts the calls of `agree`, which are the same in all processes


def versions() -> dict[str, str]:
    """Versions, a digest of this package's source, and settings of jax that change its numbers."""
    source = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        source.update(file.read_bytes())
    packages = {name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
    settings = {name.upper(): str(jax.config.values[name]) for name in JAX_SETTINGS}
    return {
        "the source of jaxdg": source.hexdigest()[:12],
        **packages,
        "Python": platform.python_version(),
        **settings,
    }


def progress() -> None:
    """Records that this process does not hang."""
    global _progress
    _progress = time.monotonic()


@contextlib.contextmanager
def patient() -> Iterator[None]:
    """Inside, `--patience` does not count: what happens there ends by itself."""
    global _progress
    _progress = math.inf
    try:
        yield
    finally:
        progress()


class Agreement:
    """Whether any process wishes something; all processes must ask equally often.

    No process waits: the answer is that of the call before, False at first. So a process must
    repeat its wish. A call counts as progress.
    """

    def __init__(self):
        """Wishes nothing yet."""
        mesh = Mesh(np.asarray(jax.devices()), "all")
        self._at = NamedSharding(mesh, PartitionSpec("all"))
        self._before = False
        self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self, wish: bool) -> bool:
        """Whether any process wished at the call before."""
        progress()
        if jax.process_count() == 1:
            return wish
        wishes = jax.make_array_from_process_local_data(
            self._at, np.full(jax.local_device_count(), wish)
        )
        answer = self._before
        self._before = self._any(wishes)
        return bool(answer)


def _watch(me: str, patience: float) -> None:
    """Ends this process after `patience` seconds without progress."""
    while (left := _progress + patience - time.monotonic()) > 0:
        time.sleep(min(left, 10))
    print(
        f"error: {me} has ended no step and no batch for {patience / 60:g} minutes (--patience), so"
        " a process hangs, this one or one that it waits for; this is where it stands:",
        file=sys.stderr,
        flush=True,
    )
    faulthandler.dump_traceback(all_threads=True)
    os._exit(1)
