"""Commands as processes of their own that need not import anything.

`python -m jaxdg.train` imports for seconds before it reads its flags. A server has imported it all,
and a command is a fork of that server: a process with a pid, an environment and an exit code. Only
the command line that `ps` shows is the server's. No JAX backend exists before the fork.
"""

import atexit
import functools
import importlib
import json
import os
from pathlib import Path
import runpy
import signal
import subprocess
import sys
import tempfile
import time

import jax

ROOT = Path(__file__).resolve().parents[1]
IMPORTED = (
    "jaxdg.train",
    "jaxdg.evaluate",
    "jaxdg.predict",
    "jaxdg.commands.submit",
    "jaxdg.commands.check",
    "jaxdg.commands.prepare",
    "jaxdg.commands.export",
    "jaxdg.studies.seeds",
)


class Command:
    """A command that runs, with the part of `subprocess.Popen` that tests use."""

    def __init__(
        self,
        program: str,
        *arguments: str,
        folder: Path | None = None,
        environment: dict[str, str] | None = None,
        printed: Path | None = None,
    ):
        """Starts `python -m program`, or `python program` if that is a file.

        Args:
            program: name of a module, or a path that ends in .py.
            *arguments: its own.
            folder: it runs in; this process's if None.
            environment: all of it; this process's if None.
            printed: a file for both outputs, to be read while it runs; None keeps them for
                `communicate`.
        """
        self.args = (program, *arguments)
        self.returncode: int | None = None
        self._printed = (
            [Path(tempfile.mkstemp()[1]) for _ in range(2)] if printed is None else 2 * [printed]
        )
        self.pid = _ask(
            program=program,
            arguments=arguments,
            environment=dict(os.environ if environment is None else environment),
            folder=str(folder or Path.cwd()),
            printed=[str(path) for path in self._printed],
        )

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _ask(ended=self.pid)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """What it printed, once it has ended."""
        self.wait(timeout)
        out, err = (path.read_text() for path in self._printed)
        for path in self._printed:
            path.unlink()
        return out, err

    def wait(self, timeout: float = 300) -> int:
        """Its exit code, once it has ended."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"{' '.join(self.args)} takes more than {timeout} s")
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode


def run(
    program: str,
    *arguments: str,
    folder: Path | None = None,
    environment: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs a `Command` to its end."""
    command = Command(program, *arguments, folder=folder, environment=environment)
    out, err = command.communicate()
    assert command.returncode is not None
    return subprocess.CompletedProcess(command.args, command.returncode, out, err)


@functools.cache
def _server() -> subprocess.Popen[str]:
    # What JAX reads from the environment on import is set for each command, see `_become`.
    environment = {name: value for name, value in os.environ.items() if not _of_jax(name)}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    server = subprocess.Popen(
        [sys.executable, __file__],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.communicate)  # it ends with its input
    return server


def _ask(**request):
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    print(json.dumps(request), file=server.stdin, flush=True)
    return json.loads(server.stdout.readline())


def _of_jax(name: str) -> bool:
    return name.lower() in jax.config.values


def _become(request: dict) -> None:
    """Makes this fork the command."""
    for descriptor, path in enumerate((os.devnull, *request["printed"])):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for name, text in request["environment"].items():
        if _of_jax(name):
            value = jax.config.values[name.lower()]
            parse = json.loads if isinstance(value, (bool, int, float)) else str
            jax.config.update(name.lower(), parse(text.lower() if parse is not str else text))
    program = request["program"]
    sys.argv = [program, *request["arguments"]]
    script = program.endswith(".py")
    sys.path[0] = str(Path(program).parent) if script else request["folder"]
    if script:
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


def _serve() -> None:
    sys.path[0] = str(ROOT)  # tests/ is no place to import from
    for name in IMPORTED:
        importlib.import_module(name)
    for name in IMPORTED:
        del sys.modules[name]  # a command is imported once more, as __main__
    while line := sys.stdin.readline():
        request = json.loads(line)
        if "ended" in request:
            pid, status = os.waitpid(request["ended"], os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
        elif pid := os.fork():
            print(pid, flush=True)
        else:
            _become(request)
            return


if __name__ == "__main__":
    _serve()
