"""Several processes as one run: how they meet, decide together, and end together.
`docs/how-to/clusters.md` shows how they are started.

`jax.distributed` finds the processes and watches over them. Around it there is here what a command
needs: nothing is started for a single process, one process writes, all stop at the same step, and
none waits for ever for another:

- A process that was killed, frozen or cut off sends no heartbeats. Jax notices within `HEARTBEAT`
  seconds, at once if the first process was killed, and aborts all others with a message.
- A process that fails prints its error and ends without waiting for the others, which then miss it.
- A process that was started otherwise than the first, by another configuration, code or data, or
  that belongs to another run, is named, and all end.
- A process that hangs, in a read from a dead file system for instance, still sends heartbeats. All
  get stuck with it, and each ends when for `--patience` minutes no step and no batch has, printing
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
from jax._src.distributed import (
    global_state as meeting,
)  # nothing public reaches the service by which processes meet
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

HEARTBEAT = 100  # seconds without a sign of life from another process
LINGER = 3  # seconds that a failed process has for its last words
DAY = 86_400_000  # milliseconds; whoever waits so long has been ended by `_watch` before
# What launchers call a run. Under `mpirun` Slurm's names are those of the steps by which it has
# started processes, one a host.
RUN_NAMES = {
    "OMPI_COMM_WORLD_SIZE": ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
    "SLURM_STEP_NODELIST": ("SLURM_JOB_ID", "SLURM_STEP_ID"),
}
# Settings of jax by which equal programs compute different numbers.
JAX_SETTINGS = (
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_default_matmul_precision",
    "jax_disable_jit",
)

_progress = time.monotonic()  # when a step or a batch has ended last


def define_flags() -> None:
    """The flags of commands that may run as several processes."""
    of_command: Any = {"module_name": sys.argv[0]}
    flags.DEFINE_string(
        "coordinator",
        None,
        "HOST:PORT that process 0 listens on; Slurm, Open MPI and Kubernetes say it.",
        **of_command,
    )
    flags.DEFINE_integer(
        "processes", None, "How many there are; likewise.", lower_bound=1, **of_command
    )
    flags.DEFINE_integer(
        "process_id", None, "Which of them this is, from 0; likewise.", lower_bound=0, **of_command
    )
    flags.DEFINE_float(
        "patience",
        30,
        "Minutes without a step or batch after which all processes end.",
        lower_bound=0,
        **of_command,
    )


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Joins the other processes of a run, if there are any, as the flags or the launcher say;
    inside, they are one machine to jax.

    Raises:
        ValueError: see `start`.
    """
    f = flags.FLAGS
    if not start(f.coordinator, f.processes, f.process_id):
        yield
        return
    # What would ask jax itself would start the devices, which versions that differ may keep from
    # finding each other.
    me = f"process {meeting.process_id} of {meeting.num_processes} on {socket.gethostname()}"
    threading.Thread(target=_watch, args=(me, 60 * f.patience), daemon=True).start()
    try:
        if f.coordinator is None:
            launcher = next(
                (names for variable, names in RUN_NAMES.items() if variable in os.environ), ()
            )
            agree(
                {name: os.environ.get(name) for name in launcher},
                "two runs have met: give each a --coordinator HOST:PORT of its own",
            )
        agree(versions(), "install the same on all hosts and start all processes alike")
        agree(
            {"devices": ", ".join(sorted(device.device_kind for device in jax.local_devices()))},
            "give each process the same devices",
        )
        yield
    except Disagreement:
        jax.distributed.shutdown()  # in order, as all end by it
        raise
    except BaseException:
        print(
            f"{me} ends by the error below, the others within {HEARTBEAT} seconds",
            file=sys.stderr,
            flush=True,
        )
        # Left to itself, the interpreter would wait at its exit for the others, who wait for this
        # one.
        end = threading.Timer(LINGER, os._exit, [1])
        end.daemon = True
        end.start()
        raise
    jax.distributed.shutdown()  # the first process waits for the last


def start(coordinator: str | None, processes: int | None, process_id: int | None) -> bool:
    """Starts `jax.distributed`, before anything else is asked of jax.

    Args:
        coordinator: HOST:PORT of process 0; None leaves it to the launcher, as the others.
        processes: how many there are; 1 starts nothing, whatever the launcher says.
        process_id: which this is.

    Returns:
        Whether there are several processes.

    Raises:
        ValueError: something was not given and the launcher does not say it. Where the others do
            not come, jax aborts after 5 minutes.
    """
    if processes == 1 or (coordinator is processes is process_id is None and not launched()):
        return False
    if (
        coordinator is None
        and "OMPI_COMM_WORLD_SIZE" not in os.environ
        and "SLURM_STEP_NODELIST" in os.environ
    ):
        os.environ.setdefault("JAX_COORDINATOR_PORT", str(slurm_port()))
    # `cli.Interrupt` listens to SIGTERM, and in evaluation too, where this service has no steps to
    # agree on.
    jax.config.update("jax_enable_preemption_service", False)
    if process_id == 0 or (
        process_id is None
        and "0" in (os.environ.get("SLURM_PROCID"), os.environ.get("OMPI_COMM_WORLD_RANK"))
    ):
        _check_port(
            (coordinator or "").rpartition(":")[2] or os.environ.get("JAX_COORDINATOR_PORT")
        )
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
    """Refuses a port that another program listens on: if that is another run, processes of both
    would join either.
    """
    if port is None or not port.isdigit():
        return
    with socket.socket() as trial:
        trial.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # a run that has just ended does not count
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

    Jax would derive it from the job alone, and two steps on one node would meet.
    """
    environment = os.environ
    job = int(environment.get("SLURM_JOB_ID", 0))
    step = int(environment.get("SLURM_STEP_ID", 0))
    return 61_440 + (job + 1009 * step) % 4096  # as jax, in the upper range of ephemeral ports


def launched() -> bool:
    """Whether a launcher that jax knows has started several processes.

    Asked first, because jax would join a single one as well, and leave it one GPU of all that there
    are.
    """
    environment = os.environ
    if "OMPI_COMM_WORLD_SIZE" in environment:
        return int(environment["OMPI_COMM_WORLD_SIZE"]) > 1
    if "SLURM_STEP_NODELIST" in environment:
        return int(environment.get("SLURM_NTASKS", 1)) > 1
    # Jax asks the cluster itself for everything else, through this package.
    return (
        "JOB_COMPLETION_INDEX" in environment and importlib.util.find_spec("kubernetes") is not None
    )


def is_main() -> bool:
    """Whether this process writes and prints; a single one does."""
    return jax.process_index() == 0


def from_main(question: Callable[[], bool]) -> bool:
    """The first process's answer, on all, for what must not be decided differently, such as by
    files that are being written.
    """
    if jax.process_count() == 1:
        return question()
    return bool(multihost_utils.broadcast_one_to_all(np.array(is_main() and question())))


def from_main_list(question: Callable[[], list[str]]) -> list[str]:
    """As `from_main`, for a list of texts."""
    return gathered({0: question()} if is_main() else {})[0]


def gathered(mine: dict[Any, Any]) -> dict[Any, Any]:
    """The entries of every process's dictionary, on all; what they hold is pickled and should be
    small.
    """
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
    """A process is not like the first; raised by all processes at once."""


def agree(mine: Mapping[str, Any], remedy: str) -> None:
    """Holds what is known here against what process 0 knows; all processes must ask, in the same
    order.

    Args:
        mine: values by what they are, such as fields of the configuration; they are compared as
            `repr` shows them.
        remedy: what to do about a difference.

    Raises:
        Disagreement: some process has other values; names it, its host, and up to three values with
            those of process 0.
    """
    client: Any = meeting.client
    if client is None:
        return
    here = socket.gethostname()
    known = {name: repr(value) for name, value in mine.items()}
    place = f"jaxdg/agree/{next(_asked)}"
    if meeting.process_id == 0:
        client.key_value_set(f"{place}/first", json.dumps([here, known]))
    there, wanted = json.loads(client.blocking_key_value_get(f"{place}/first", DAY))
    differing = [name for name in {**wanted, **known} if wanted.get(name) != known.get(name)]
    phrases = [f"{name} {known.get(name)} instead of {wanted.get(name)}" for name in differing[:3]]
    more = f" and {len(differing) - 3} more differences" if len(differing) > 3 else ""
    found = (
        f"process {meeting.process_id} on {here} has {', '.join(phrases)}{more}"
        if differing
        else ""
    )
    client.key_value_set(f"{place}/found/{meeting.process_id:06d}", found)
    client.wait_at_barrier(place, DAY)
    told = [text for _, text in sorted(client.key_value_dir_get(f"{place}/found/")) if text]
    if told:
        others = f" (and {len(told) - 1} other processes differ)" if len(told) > 1 else ""
        raise Disagreement(f"{told[0]} as process 0 on {there}{others}; {remedy}")


_asked = itertools.count()  # how often `agree` has been called, the same in all processes


def versions() -> dict[str, str]:
    """What a process runs: versions, the source of this package, and settings of jax that change
    what is computed.
    """
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
    """Notes that this process does not hang."""
    global _progress
    _progress = time.monotonic()


class Agreement:
    """Whether any process wishes something; all must ask the same number of times. It is a sign of
    progress, too.

    Nobody waits: the answer is that to the question before, False at first. So whoever wishes
    something keeps on wishing it.
    """

    def __init__(self):
        """Asks for nothing yet."""
        mesh = Mesh(np.asarray(jax.devices()), "all")
        self._at = NamedSharding(mesh, PartitionSpec("all"))
        self._before = False
        self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self, wish: bool) -> bool:
        """Whether any process wished when it asked before."""
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
    """Ends this process when it has made no progress for `patience` seconds."""
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
