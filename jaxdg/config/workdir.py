"""The folder of a run: whose it is, who works in it, and what may change when the run goes on.

config.json      the configuration as the run was last started changes.jsonl    what was changed
when it was gone on with, one object a change: step, field, old, new skip.txt         the files that
`data.skip` leaves out, as the run was last started lock             held by the process that trains
checkpoints/ metrics.jsonl tensorboard/ results.json
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from jaxdg import config as config_lib
from jaxdg import files
from jaxdg.config import Config, locks
from jaxdg.data import skip

# Changing these leaves the run the same, so a resumed run may differ in them.
FREE_FIELDS = (
    "mesh.",
    "data.workers",
    "data.root",
    "log_every",
    "eval_every",
    "checkpoint_every",
    "loggers",
)
# Changing these leaves the same what its results mean; that they changed is recorded.
RECORDED_FIELDS = (
    "keep_checkpoints",
    "model.remat",
    "model.unroll",
    "model.mask2former.unroll",
    "model.tqdm.unroll",
    "optimizer.accumulate",
    "evaluation.batch_size",
    "evaluation.windows_per_call",
)

Say = Callable[[str], None]


@contextlib.contextmanager
def reserved(workdir: Path, say: Say) -> Iterator[None]:
    """Holds the lock of a workdir inside, so that no other process trains there; if no run claims
    it, nothing is left behind.

    Args:
        workdir: need not exist.
        say: receives a line where the file system has no locks.

    Raises:
        InUse: another process trains there; the message names it and its host.
        OSError: the folder cannot be made or written to.
    """
    made = [path for path in (workdir, *workdir.parents) if not path.exists()]
    workdir.mkdir(parents=True, exist_ok=True)
    try:
        with locks.held(workdir / "lock", f"workdir {workdir}", say):
            yield
    finally:
        if not (workdir / "config.json").exists():
            for path in (workdir / "checkpoints", *made):
                with contextlib.suppress(OSError):  # it is not there, or another holds something
                    path.rmdir()


def check(config: Config, workdir: Path) -> None:
    """Looks, without a change, whether a run of `config` may start or go on in `workdir`.

    Raises:
        ValueError: it holds a run of another configuration that has saved something; the message
            lists the differences.
    """
    old = stored(workdir, kind=type(config))
    changed = (
        []
        if old is None
        else [*differences(old, config), *_no_longer_skipped(old, config, workdir)]
    )
    if changed and saved(workdir):
        raise ValueError(
            f"{workdir} holds another run: {'; '.join(changed)}; give another --workdir or the same"
            " settings"
        )


def claim(config: Config, workdir: str | Path, step: int = 0, say: Say = lambda line: None) -> None:
    """Makes `workdir` the folder of this run, or checks that it is, and records what changed.

    Args:
        config: of the run.
        workdir: made if needed.
        step: that the run goes on from.
        say: receives a line for what is mended or replaced.

    Raises:
        ValueError: see `check`.
    """
    workdir = Path(workdir)
    check(config, workdir)
    old = stored(workdir, say, type(config))
    workdir.mkdir(parents=True, exist_ok=True)
    if old is not None and not saved(workdir) and (changed := differences(old, config)):
        say(
            f"{workdir} held a run that had saved nothing; it begins anew, with"
            f" {'; '.join(changed)}"
        )
        (workdir / "changes.jsonl").unlink(missing_ok=True)
    elif old is not None and (changes := recorded(old, config, workdir)):
        for change in changes:
            say(
                f"changed from step {step} on: {change['field']}: {change['old']!r} ->"
                f" {change['new']!r}"
            )
        with files.naming(workdir / "changes.jsonl"), (workdir / "changes.jsonl").open("a") as file:
            file.write("".join(json.dumps({"step": step, **change}) + "\n" for change in changes))
    config_lib.save(config, workdir)
    if config.data.skip is not None:
        files.write(workdir / "skip.txt", "".join(line + "\n" for line in sorted(_skipped(config))))


def saved(workdir: Path) -> bool:
    """Whether a workdir holds a checkpoint."""
    folder = workdir / "checkpoints"
    return folder.is_dir() and any(name.isdigit() for name in os.listdir(folder))


def stored(workdir: Path, say: Say | None = None, kind: type[Config] = Config) -> Config | None:
    """The configuration that a workdir holds, None if there is none or it is broken.

    Args:
        workdir: of a run.
        say: receives a line where it is broken, which then is set aside.
        kind: of the configuration, see `config.load`.

    Raises:
        ValueError: it is not broken, and no valid configuration.
    """
    try:
        return config_lib.load(workdir, kind)
    except FileNotFoundError:
        return None
    except files.Broken as error:
        if say is not None:
            aside = files.set_aside(workdir / "config.json").name
            say(
                f"{str(error).split(';')[0]}; it is kept as {aside}; written anew from the settings"
                " of this command"
            )
        return None


def results(path: Path, say: Say | None = None) -> dict[str, Any] | None:
    """The contents of a results.json, None if there is none or it is broken; `say` as for
    `files.recall`.
    """

    def good(r):
        return (
            isinstance(r, dict)
            and isinstance(r.get("step"), int)
            and isinstance(r.get("domains"), dict)
        )

    return files.recall(path, good, say, "the evaluation makes it again")


def differences(old: Config, new: Config) -> list[str]:
    """Fields that differ between two configurations and would make them different runs, one phrase
    each.
    """
    a = config_lib.flat(dataclasses.asdict(old))
    b = config_lib.flat(dataclasses.asdict(new))
    changed = [
        key
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key) and not key.startswith(FREE_FIELDS)
    ]
    return [
        f"{key}: {a.get(key)!r} -> {b.get(key)!r}"
        for key in changed
        if not _harmless(key, a.get(key), b.get(key))
    ]


def recorded(old: Config, new: Config, workdir: Path) -> list[dict[str, Any]]:
    """What changed between two configurations of one run and is recorded: the field, what it was
    and what it is.
    """
    a = config_lib.flat(dataclasses.asdict(old))
    b = config_lib.flat(dataclasses.asdict(new))
    fields = [
        key
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key) and _harmless(key, a.get(key), b.get(key))
    ]
    changes = [
        {"field": key, "old": a.get(key), "new": b.get(key)} for key in fields if key != "data.skip"
    ]
    before = _skipped_before(old, new, workdir)
    now = _skipped(new)
    if before is not None and before != now:
        changes.append(
            {
                "field": "data.skip",
                "old": old.data.skip,
                "new": new.data.skip,
                "added": sorted(now - before),
            }
        )
    return changes


def _harmless(field: str, old: Any, new: Any) -> bool:
    """Whether a run may go on with another value of a field that is recorded."""
    if field == "evaluation.domains":
        return set(new) >= set(old)
    return field in RECORDED_FIELDS or (
        field == "data.skip" and new is not None
    )  # what is in the list is looked at elsewhere


def _no_longer_skipped(old: Config, new: Config, workdir: Path) -> list[str]:
    """What a run left out and would no longer, in a phrase; a list may only grow."""
    before = _skipped_before(old, new, workdir)
    if new.data.skip is None or before is None:  # the first is a difference of the configurations
        return []
    lost = skip.no_longer(before, _skipped(new), new.data.root)
    return (
        [
            f"data.skip: {new.data.skip} no longer lists"
            f" {', '.join(lost[:3])}{', ..' if len(lost) > 3 else ''}"
        ]
        if lost
        else []
    )


def _skipped_before(old: Config, new: Config, workdir: Path) -> frozenset[str] | None:
    """What a run left out until now, as `_skipped`; None if that is not known."""
    if old.data.skip is None:
        return frozenset()
    if (copy := workdir / "skip.txt").is_file():
        return frozenset(copy.read_text(errors="surrogateescape").splitlines())
    return (
        None
        if old.data.skip == new.data.skip or not os.path.isfile(old.data.skip)
        else _skipped(old)
    )


def _skipped(config: Config) -> frozenset[str]:
    """What a run leaves out, as its list says it."""
    d = config.data
    return frozenset() if d.skip is None else skip.entries(d.skip, d.root)
