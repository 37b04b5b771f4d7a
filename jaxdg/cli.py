"""What the commands share: flags that end in a configuration, errors of one line, signals that end a run in order."""

from collections.abc import Callable
import os
import signal
import sys

from absl import app, flags, logging
from ml_collections import config_flags
from rich.console import Console

from jaxdg import config as config_lib


def define_config() -> flags.FlagHolder:
    """The flag --config FILE, with --config.FIELD=VALUE overrides."""
    return config_flags.DEFINE_config_file("config", None, "Experiment file below configs/; override any field with --config.FIELD=VALUE.")


def run(main: Callable[[list[str]], None]) -> None:
    """Parses flags, runs `main` and exits; an error a person can mend is one line and exit code 1."""
    debug = flags.DEFINE_bool("debug", False, "Show the traceback of errors.", module_name=sys.argv[0])
    logging.set_verbosity(logging.WARNING)
    logging.set_stderrthreshold("warning")

    app.define_help_flags()

    def parse(arguments: list[str]) -> list[str]:
        config_lib.check_overrides(arguments)
        for name in ("--config", "-config"):
            for i, argument in enumerate(arguments):
                path = argument.removeprefix(name + "=") if argument.startswith(name + "=") else None
                path = arguments[i + 1] if argument == name and i + 1 < len(arguments) else path
                if path is None:
                    continue
                path = path.split(":")[0]  # what stands behind the colon is handed to its get_config
                if not os.path.isfile(path):
                    raise FileNotFoundError(f"no config file {path}; see configs/ for those that exist")
                config_lib.let_import(path)
        return flags.FLAGS(arguments)

    def guarded(arguments: list[str]) -> None:
        try:
            main(arguments)
        except (ValueError, OSError) as error:
            if debug.value:
                raise
            _fail(error)

    try:
        positional = parse(sys.argv)
    except (flags.Error, ValueError, OSError) as error:
        _fail(error)
    else:
        app.run(guarded, argv=sys.argv, flags_parser=lambda _: positional)


def _fail(error: Exception) -> None:
    print("error: " + " ".join(str(error).split()), file=sys.stderr, flush=True)
    sys.exit(1)


def console(quiet: bool = False) -> Console:
    """Where commands print, if not `quiet`: lines are never wrapped, so that paths can be copied."""
    made = Console(soft_wrap=True, highlight=False, quiet=quiet)
    if not made.is_terminal:
        made.width = 240  # a log file: no table is cut off
    return made


class Stop(Exception):
    """The run was asked to stop (SIGTERM or Ctrl-C)."""


class Interrupt:
    """Notes SIGTERM and the first Ctrl-C; a second Ctrl-C ends the program at once."""

    def __init__(self, agree: Callable[[bool], bool] = bool):
        """Args:
        agree: makes of whether this process was asked to stop whether any of a run was; see `distributed.Agreement`.
        """
        self._agree, self._noted = agree, False
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, _) -> None:
        if self._noted and number == signal.SIGINT:
            sys.exit(130)
        self._noted = True

    @property
    def asked(self) -> bool:
        """Whether the run was asked to stop; all its processes must look equally often."""
        return self._agree(self._noted)

    def check(self) -> None:
        """Raises `Stop` if the run was asked to stop."""
        if self.asked:
            raise Stop
