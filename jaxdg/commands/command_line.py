"""What the commands share: flags that end in a configuration, errors of one line, signals that end
a run in order.
"""

from collections.abc import Callable, Iterator
import contextlib
import errno
import functools
import io
import itertools
import os
import re
import shutil
import signal
import sys
from typing import Any, TextIO

from absl import app, flags, logging
from rich.console import Console

from jaxdg import config as config_lib
from jaxdg.commands.closed_pipe import ends_quietly
from jaxdg.config import overrides, paths


class Experiment:
    """What --config FILE and --config.FIELD=VALUE say, after `run` has read the arguments.

    Attributes:
        file: the experiment file, perhaps with `:ARGUMENT` behind it; empty if none was given.
        given: what is changed in the file's configuration, by dotted field.
    """

    def __init__(self, fields_in_help: bool):
        """See `define_config`."""
        self.file = ""
        self.given: dict[str, Any] = {}
        self._config: Any = None
        self._fields_in_help = fields_in_help

    @functools.cached_property
    def value(self) -> Any:
        """The checked configuration; None if no file was given."""
        return None if self._config is None else config_lib.validated(self._config)

    def read(self, arguments: list[str]) -> list[str]:
        """Reads the file and its changes; returns the arguments without the changes."""
        name = _value_of("config", arguments)
        if name is not None:
            path, colon, argument = name.partition(":")
            self.file = f"{config_lib.experiment_file(path)}{colon}{argument}"
            get_config = config_lib.experiment(path).get_config
            self._config = get_config(argument) if colon else get_config()
        kind = None if self._config is None else type(self._config)
        arguments, given = overrides.take(arguments, kind)
        if self._config is not None:
            self._config = overrides.applied(self._config, given)
            self.given = {field: config_lib.get(self._config, field) for field in given}
        elif given:
            raise ValueError(
                f"--config.{next(iter(given))} changes a configuration, but there is none; give"
                " --config FILE"
            )
        return arguments

    def print_fields(self) -> None:
        """Prints every field with its documentation, where the command's help shows them."""
        if not self._fields_in_help:
            return
        from jaxdg.config import listing  # needs all model code

        print(
            "\nFields of the configuration and their"
            f" {f'values in {self.file}' if self.file else 'defaults'}:"
        )
        config = config_lib.Config() if self._config is None else self._config
        print(listing.help_text(config, shutil.get_terminal_size((100, 24)).columns))


def _value_of(flag: str, arguments: list[str]) -> str | None:
    """The last value given to a flag."""
    value = None
    for argument, following in itertools.zip_longest(arguments, arguments[1:]):
        if argument == "--":
            break
        if argument in (f"--{flag}", f"-{flag}"):
            value = following
        elif argument.startswith((f"--{flag}=", f"-{flag}=")):
            value = argument.partition("=")[2]
    return value


_experiment: Experiment | None = None  # of the command that runs


def define_config(fields_in_help: bool = False) -> Experiment:
    """The flag --config FILE, with --config.FIELD=VALUE overrides.

    Args:
        fields_in_help: --help lists all fields.
    """
    global _experiment
    _experiment = Experiment(fields_in_help)
    where = "listed below" if fields_in_help else "see python -m jaxdg.train --help"
    flags.DEFINE_string(
        "config",
        None,
        "Experiment file below configs/, or the name of a recipe; override any field with"
        f" --config.FIELD=VALUE ({where}).",
        module_name=sys.argv[0],
    )
    return _experiment


class _PathParser(flags.ArgumentParser):
    """Reads the value of a flag that names a file or a folder, see `paths.given`."""

    def __init__(self, flag: str, urls: bool, hub: bool):
        self._what = f"--{flag}"
        self._urls = urls
        self._hub = hub

    def parse(self, argument: str) -> str:
        # Not as a ValueError, in front of which the flags would put words of their own.
        try:
            return paths.given(argument, self._what, urls=self._urls, hub=self._hub)
        except ValueError as error:
            raise flags.Error(str(error)) from None


def define_path(
    name: str,
    help: str,
    *,
    default: str | None = None,
    required: bool = False,
    urls: bool = False,
    hub: bool = False,
) -> flags.FlagHolder:
    """A flag that names a file or a folder.

    Args:
        name: of the flag.
        help: what it is for.
        default: if it is left out.
        required: it must not be left out.
        urls: whether it may be a URL.
        hub: whether it may be a file of the Hugging Face hub.
    """
    parser = _PathParser(name, urls=urls, hub=hub)
    serializer = flags.ArgumentSerializer()
    return flags.DEFINE(
        parser,
        name,
        default,
        help,
        serializer=serializer,
        required=required,
        module_name=sys.argv[0],
    )


def define_checkpoint(*, required: bool = True) -> flags.FlagHolder:
    """The flag --checkpoint, which names a trained model as `tasks.run_state.opened` takes it."""
    return define_path(
        "checkpoint",
        "A workdir, one step in it such as DIR/checkpoints/500, or a file of jaxdg pack, also"
        " hf://OWNER/REPO/FILE.",
        required=required,
        hub=True,
    )


class _ListParser(flags.ArgumentParser):
    """Reads several texts as overrides do, see `overrides`."""

    def __init__(self, flag: str):
        self._what = f"--{flag}"

    def parse(self, argument: str) -> tuple[str, ...]:
        try:
            found = tuple(map(str, overrides.parse(argument, tuple[str, ...], self._what)))
            if not found or not all(text.strip() for text in found):
                raise ValueError(
                    f"{self._what} is {argument!r}; allowed: names parted by commas, none of them"
                    " empty"
                )
            return found
        except ValueError as error:
            raise flags.Error(str(error)) from None


def define_list(name: str, help: str) -> flags.FlagHolder:
    """A flag of texts parted by commas; one that holds commas is in quotes.

    None if it is left out.
    """
    return flags.DEFINE(
        _ListParser(name),
        name,
        None,
        help,
        serializer=flags.ArgumentSerializer(),
        module_name=sys.argv[0],
    )


def run(main: Callable[[list[str]], None]) -> None:
    """Parses flags and runs `main`; an error that the user can mend is one line and exit code 1."""
    debug = flags.DEFINE_bool(
        "debug", False, "Show the traceback of errors.", module_name=sys.argv[0]
    )
    logging.set_verbosity(logging.WARNING)
    logging.set_stderrthreshold("warning")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(
                errors="backslashreplace"
            )  # a file name that is no text must not end a run by being printed

    app.define_help_flags()

    def parse(arguments: list[str]) -> list[str]:
        arguments = flags.FLAGS.read_flags_from_files(arguments, force_gnu=False)
        if _experiment is None:
            return flags.FLAGS(arguments)
        arguments = _experiment.read(arguments)
        try:
            return flags.FLAGS(arguments)
        except SystemExit:  # after --help
            _experiment.print_fields()
            raise

    def guarded(arguments: list[str]) -> None:
        try:
            main(arguments)
        except (ValueError, OSError) as error:
            if debug.value:
                raise
            _fail(error)

    with ends_quietly():
        try:
            positional = parse(sys.argv)
        except (flags.Error, ValueError, OSError) as error:
            _fail(error)
        else:
            app.run(guarded, argv=sys.argv, flags_parser=lambda _: positional)


def _fail(error: Exception) -> None:
    if isinstance(error, BrokenPipeError):
        raise error  # `ends_quietly` says nothing where it is of standard output
    print("error: " + re.sub(r"\s*\n\s*", " ", str(error).strip()), file=sys.stderr, flush=True)
    sys.exit(1)


def parse_size(flag: str, text: str) -> tuple[int, int]:
    """`512x1024`, the value of a flag, as (height, width).

    Raises:
        ValueError: anything else.
    """
    if not (match := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)):
        allowed = "height x width in pixels, such as 512x1024"
        raise ValueError(f"--{flag} is {text!r}; allowed: {allowed}")
    return int(match[1]), int(match[2])


def console(quiet: bool = False) -> Console:
    """Where commands print, if not `quiet`: lines are never wrapped, so that paths can be copied,
    and no text is markup.
    """
    made = Console(soft_wrap=True, highlight=False, markup=False, emoji=False, quiet=quiet)
    if not made.is_terminal:
        made.width = 240  # a log file: no table is cut off
    return made


class LastingStream:
    """A terminal's output that raises no error once the terminal is gone; what is printed is lost.

    SIGHUP tells of it, but something may be printed just before the signal is handled.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        """See `TextIO.write`."""
        with _without_terminal():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """See `TextIO.flush`."""
        with _without_terminal():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _without_terminal() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise


class Stop(Exception):
    """The run was asked to stop, by one of the signals of `Interrupt`."""


class Interrupt:
    """Notes the signals that ask a run to save and stop; a second Ctrl-C ends the program at once.

    They are SIGTERM, the first Ctrl-C, SIGUSR1 (Slurm's `--signal=USR1@120`) and SIGHUP (the
    terminal was closed), which is ignored where it was ignored from the start, as under nohup.
    """

    def __init__(self, agree: Callable[[bool], bool] = bool):
        """Args:
        agree: makes of whether this process was asked to stop whether any of a run was; see
            `distributed.Agreement`.
        """
        self._agree = agree
        self._noted = False
        self._terminals = [number for number in (1, 2) if os.isatty(number)]
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream.isatty():
                setattr(sys, name, LastingStream(stream))
        self._before = {}  # the handlers of the signals that this notes
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)

    def _note(self, number: int, _) -> None:
        if self._noted and number == signal.SIGINT:
            sys.exit(130)
        if (
            number == signal.SIGHUP
        ):  # what is printed from now on would be an error, and the run has yet to save
            null = os.open(os.devnull, os.O_WRONLY)
            for terminal in self._terminals:
                os.dup2(null, terminal)
            os.close(null)
        self._noted = True

    @contextlib.contextmanager
    def lifted(self) -> Iterator[None]:
        """Inside, the signals end the program at once, for work that leaves nothing to be saved."""
        for number, before in self._before.items():
            signal.signal(number, before)
        try:
            yield
        finally:
            for number in self._before:
                signal.signal(number, self._note)

    @property
    def asked(self) -> bool:
        """Whether the run was asked to stop; all its processes must look equally often."""
        return self._agree(self._noted)

    def check(self) -> None:
        """Raises `Stop` if the run was asked to stop."""
        if self.asked:
            raise Stop
