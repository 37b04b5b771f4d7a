"""Checkpoints by Orbax: written asynchronously, the newest few and the best, verified when read.

A checkpoint has two items, so that evaluation need not read the optimiser: `model` (step,
parameters, statistics) and `optimizer`. If a method changes the model, `model` is the finished
model, and a third item, `training`, is the one from which training resumes. Each item has a
fingerprint of its bits, since the storage format does not notice a changed byte in an array.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import errno
import glob
import json
import math
import os
from pathlib import Path
import shutil
from typing import Any, TypeVar

from absl import logging
from etils.epath.gpath import PosixGPath
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from jaxdg import files
from jaxdg.training import distributed
from jaxdg.training.fingerprint import fingerprint
from jaxdg.training.metrics import read_metrics
from jaxdg.training.step import TrainState

T = TypeVar("T")
LISTINGS = 5  # of checkpoints beside a run that removes some


class Checkpoints:
    """The `checkpoints` folder of a workdir."""

    def __init__(
        self,
        workdir: str | Path,
        keep: int = 2,
        *,
        read_only: bool = False,
        say: Callable[[str], None] = logging.warning,
    ):
        """Opens the folder.

        Args:
            workdir: of the run; the folder is made if needed.
            keep: number of newest checkpoints to keep, besides the one with the best score.
            read_only: changes nothing, as another process may train there.
            say: receives a line for each repair.

        Raises:
            ValueError: the storage library cannot take the path.
        """
        self.folder = Path(workdir).resolve() / "checkpoints"
        check_path(self.folder)
        self._best = self._noted_best(None if read_only else say)
        kept = policies.AnyPreservationPolicy([policies.LatestN(keep), _Best(self)])
        items = ("model", "training", "optimizer")
        self._manager = _listed(
            lambda: ocp.CheckpointManager(
                LiteralPath(self.folder),
                item_handlers={item: ocp.StandardCheckpointHandler() for item in items},
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=kept,
                    create=not read_only,
                    # Removes what a killed run has half written.
                    cleanup_tmp_directories=not read_only,
                ),
            )
        )

    def _noted_best(self, say: Callable[[str], None] | None) -> tuple[int, float] | None:
        """Step and score in best.json; if that is broken, they are restored from metrics.jsonl."""
        path = self.folder / "best.json"
        noted = files.recall(path, _is_best, say, "taken from metrics.jsonl instead")
        if noted is not None:
            return noted["step"], noted["score"]
        if say is None or not path.with_name("best.json.broken").exists():
            return None
        seen: dict[int, list[float]] = {}
        for row in read_metrics(self.folder.parent):
            if row.get("decides"):
                score = next(row[name] for name in ("mIoU", "mAP50") if name in row)
                seen.setdefault(row["step"], []).append(score)
        if not seen:
            return None
        score, step = max((sum(scores) / len(scores), step) for step, scores in seen.items())
        if distributed.is_main():
            files.write(path, json.dumps({"step": step, "score": score}))
        return step, score

    def steps(self) -> list[int]:
        """Steps that have a finished checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def shapes(self, step: int) -> dict[str, tuple[int, ...]]:
        """The shapes of a checkpoint's model by dotted name, such as `trained.head.norm.scale`."""
        described = _described(self._manager.item_metadata(step)["model"].tree)
        return {name: shape for name, (shape, _) in described.items()}

    def best(self) -> tuple[int, float] | None:
        """Step and score of the best checkpoint; None before the first evaluation."""
        return self._best

    def scored(self, step: int, score: float) -> None:
        """Records the score of a checkpoint; the one with the highest score is kept."""
        if self._best is not None and score < self._best[1]:
            return
        self._best = step, score
        if distributed.is_main():
            files.write(self.folder / "best.json", json.dumps({"step": step, "score": score}))

    def save(self, state: TrainState, finished: tuple[Any, Any, Any] | None = None) -> None:
        """Starts to write `state`; returns before it is on disk. Keeps a step that is stored.

        Args:
            state: may be donated to the next step once this returns.
            finished: trained, frozen and statistics of the finished model, if methods change it.
                It is stored as the model, and the state as `training`.

        Raises:
            OSError: the disk has no room for it.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self.wait()
        self.check_room(state, step)
        stored = {
            name: ocp.args.StandardSave({"fingerprint": fingerprint(part), **part})
            for name, part in _items(state, finished).items()
        }
        with self._explained():
            self._manager.save(step, args=ocp.args.Composite(**stored))

    def check_room(self, state: TrainState, step: int) -> None:
        """Checks that the disk has room for a state, which may be abstract.

        On a full disk the storage library leaves hundreds of lines and half a checkpoint.

        Raises:
            OSError: there is no room.
        """
        needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self.folder).free
        if free < 1.25 * needed:
            raise OSError(
                f"disk full: the checkpoint of step {step} needs {needed / 1e6:.0f} MB and"
                f" {self.folder} has {free / 1e6:.0f} MB free; the checkpoints before it are whole"
                f" ({self._kept()}); free some space and run the same command"
            )

    def _kept(self) -> str:
        return ", ".join(map(str, self.steps())) or "none"

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns errors of writing into one line."""
        try:
            yield
        except Exception as error:  # the storage library wraps the system's errors in its own
            texts = [str(e) for e in _chain(error)]
            signs = ("No space left", "ENOSPC", "quota exceeded", "EDQUOT")
            if any(sign in text for text in texts for sign in signs):
                what = "disk full: a checkpoint did not fit into"
                remedy = "free some space"
            else:
                what = f"a checkpoint could not be written ({_short(error)}) into"
                remedy = "see to that folder"
            raise OSError(
                f"{what} {self.folder}; the checkpoints before it are whole ({self._kept()});"
                f" {remedy} and run the same command"
            ) from error

    def wait(self) -> None:
        """Returns once everything saved is on disk.

        Raises:
            OSError: it could not be written.
        """
        with self._explained():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for pending writes and frees the threads."""
        self._manager.close()

    def reread(self, like: TrainState, step: int) -> TrainState:
        """Reads back the state of `step`: a run is finished only if its checkpoint can be read.

        Args:
            like: as for `restore`.
            step: saved just before.

        Raises:
            ValueError: it is not what was saved; it has been moved out of the folder.
            OSError: it cannot be read, or could not be written.
        """
        self.wait()
        try:
            state = self.restore(like, step)
        except ValueError as error:
            aside = self._move_aside([step], lambda line: None)
            raise ValueError(
                f"the checkpoint of step {step} cannot be read back"
                f" ({_short(error.__cause__ or error)}); it is in {aside}; look at the disk of"
                f" {self.folder} and run the same command, which goes on from the checkpoints"
                f" before it ({self._kept()})"
            ) from error
        assert state is not None
        return state

    def restore(
        self,
        like: TrainState,
        step: int | None = None,
        say: Callable[[str], None] = logging.warning,
    ) -> TrainState | None:
        """The newest readable state; None if there is no checkpoint at all.

        Newer, corrupted checkpoints are moved out of the folder, since training writes their steps
        again. If none can be read, none is moved.

        Args:
            like: abstract state with shardings; gives structure and placement.
            step: reads only this one; raises if it cannot be read.
            say: receives a line for every checkpoint that was skipped or moved.

        Raises:
            ValueError: the checkpoint belongs to another model, or all (or the one asked for) are
                corrupted.
        """

        def read(at: int) -> TrainState:
            item = "training" if (self.folder / str(at) / "training").is_dir() else "model"
            return TrainState(**self._read(at, item, like), **self._read(at, "optimizer", like))

        state, corrupted = self._newest_readable(read, step, say)
        if corrupted:
            self._move_aside(corrupted, say)
        return state

    def _move_aside(self, steps: Sequence[int], say: Callable[[str], None]) -> Path:
        """Moves checkpoints out of the folder; returns the place of the last one."""
        aside = self.folder.parent
        for at in steps:
            aside = self.folder.parent / f"corrupted_checkpoint_{at}"
            while aside.exists():
                aside = aside.with_name(aside.name + "_")
            if distributed.is_main():
                (self.folder / str(at)).rename(aside)
                say(f"corrupted checkpoint moved to {aside}")
        multihost_utils.sync_global_devices("corrupted checkpoints moved")
        self._manager.reload()
        return aside

    def restore_model(
        self,
        like: TrainState,
        step: int | None = None,
        say: Callable[[str], None] = logging.warning,
    ) -> dict[str, Any] | None:
        """As `restore`, but reads no optimiser and moves nothing; a dict of the state's fields."""
        return self._newest_readable(lambda at: self._read(at, "model", like), step, say)[0]

    def _newest_readable(
        self, read: Callable[[int], Any], step: int | None, say: Callable[[str], None]
    ) -> tuple[Any, list[int]]:
        """The result of `read` for the newest checkpoint it can read, and the newer, bad steps."""
        if step is not None and step not in self.steps():
            raise ValueError(
                f"{self.folder} has no checkpoint of step {step}; it has {self._kept()}"
            )
        failed: dict[int, Exception] = {}
        while (at := self._next(step, failed)) is not None:
            try:
                state = read(at)
            except Unshared:
                raise
            except Exception as error:  # the storage library raises anything on a damaged file
                self._raise_unless_corrupted(at, error)
                failed[at] = error
                continue
            newer = {bad: error for bad, error in failed.items() if bad > at and self._exists(bad)}
            for bad, error in newer.items():
                say(
                    f"checkpoint {self.folder / str(bad)} is corrupted ({_short(error)}); falling"
                    f" back to step {at}"
                )
            return state, list(newer)
        if not failed:
            return None, []
        at, error = next(iter(failed.items()))
        if not self._exists(at):
            raise ValueError(
                f"checkpoint {self.folder / str(at)} was removed while it was read, by a run that"
                " keeps the newest; try again"
            )
        remedy = "start again in a new workdir" if step is None else "choose another step"
        raise ValueError(
            f"no readable checkpoint: {self.folder / str(at)} is corrupted ({_short(error)});"
            f" {remedy}"
        ) from error

    def _next(self, step: int | None, failed: dict[int, Exception]) -> int | None:
        """The newest checkpoint that has not failed yet, or `step`; None if all have failed."""
        if step is not None:
            return None if failed else step
        if failed and jax.process_count() == 1:
            # A run that trains there may have removed what failed, and written newer ones.
            _listed(self._manager.reload)
        return max(set(self.steps()) - failed.keys(), default=None)

    def _exists(self, step: int) -> bool:
        return (self.folder / str(step)).is_dir()

    def _raise_unless_corrupted(self, step: int, error: Exception) -> None:
        """Raises an error if something else than wrong bytes kept a checkpoint from being read."""
        folder = self.folder / str(step)
        if isinstance(error, Foreign):
            raise ValueError(
                f"checkpoint {folder} belongs to another model ({error}); give the settings of its"
                " own run"
            )
        if any(isinstance(e, MemoryError) or "RESOURCE_EXHAUSTED" in str(e) for e in _chain(error)):
            raise OSError(
                f"checkpoint {folder} does not fit into memory ({_short(error)})"
            ) from error
        if (reason := _unreadable(folder)) is not None:
            raise OSError(
                f"checkpoint {folder} cannot be read ({reason}); it was left as it is; once it can"
                " be read, run the same command"
            )

    def _read(self, step: int, item: str, like: TrainState) -> dict[str, Any]:
        """An item of a checkpoint, placed as `like`; an error unless it is what was saved."""
        checksum = jax.ShapeDtypeStruct((), jnp.uint32, sharding=like.step.sharding)
        wanted = {"fingerprint": checksum, **_items(like)["model" if item == "training" else item]}
        # The storage library's own message would not name the parameter.
        there = _described(self._manager.item_metadata(step)[item].tree)
        here = _described(wanted)
        for name in sorted(there.keys() | here.keys()):
            if there.get(name) != here.get(name):
                shape, dtype = there.get(name, ("absent", ""))
                own_shape, own_dtype = here.get(name, ("absent", ""))
                kinds = (shape, own_shape) if shape != own_shape else (dtype, own_dtype)
                raise Foreign(f"{name} is {kinds[0]} there and {kinds[1]} in this model")
        try:
            args = ocp.args.Composite(**{item: ocp.args.StandardRestore(wanted)})
            stored = dict(self._manager.restore(step, args=args)[item])
        except Exception as error:
            if jax.process_count() == 1:
                raise
            raise Unshared(
                f"checkpoint {self.folder / str(step)} cannot be read by process"
                f" {jax.process_index()} ({_short(error)}), maybe by it alone, so the run does not"
                " fall back by itself; move this folder away and run again"
            ) from error
        expected = int(stored.pop("fingerprint"))
        actual = int(fingerprint(stored))
        if actual != expected:
            raise ValueError(
                f"its {item} arrays do not add up to their fingerprint: {actual:08x}, not"
                f" {expected:08x}"
            )
        return stored


class Foreign(ValueError):
    """A checkpoint has other parameters than the model."""


class Unshared(OSError):
    """A process could not read its part of a checkpoint; the others may have read theirs."""


class _Best(policies.PreservationPolicy):
    """Keeps the checkpoint with the best score.

    Orbax's own policy needs the score when it saves. Here a checkpoint is saved before it is
    evaluated, so a run that dies during evaluation need not train to that step again.
    """

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        best = self._checkpoints.best()
        return [best is not None and info.step == best[0] for info in checkpoints]


class LiteralPath(PosixGPath):
    """A local path whose characters all stand for themselves.

    The storage library globs with the path as a part of the pattern, where `[1]` and `*` mean
    something else. It also takes `/gs/..` or `/s3/..` for a bucket.
    """

    @property
    def _uri_scheme(self) -> None:
        return None

    def glob(self, pattern: str) -> Iterator["LiteralPath"]:
        full_pattern = os.path.join(glob.escape(os.fspath(self)), pattern)
        return (self._new(path) for path in glob.glob(full_pattern))


def check_path(path: Path) -> None:
    """Refuses the few paths that the storage library cannot take.

    Raises:
        ValueError: the message says why.
    """
    text = str(path)
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(
            f"{text.encode(errors='surrogateescape')!r} is no UTF-8, which checkpoints need; rename"
            " the folder"
        )
    for sign in ("\\", *(f"/{scheme}:/" for scheme in ("gs", "s3", "az", "hf"))):
        if sign in f"{text}/":
            raise ValueError(
                f"the path {text} holds {sign}, which the checkpoint library reads as something"
                " else; rename the folder"
            )


def _items(
    state: TrainState, finished: tuple[Any, Any, Any] | None = None
) -> dict[str, dict[str, Any]]:
    """The items of a checkpoint, each with the fields that it stores; see `Checkpoints.save`."""
    fields = dict(vars(state))
    optimizer = {"opt_state": fields.pop("opt_state")}
    if finished is None:
        return {"model": fields, "optimizer": optimizer}
    model = dict(zip(("trained", "frozen", "statistics"), finished, strict=True))
    return {"model": {"step": state.step, **model}, "training": fields, "optimizer": optimizer}


def _described(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shapes and types of an abstract state or of a checkpoint's metadata, by dotted name."""

    def name(path):  # the metadata has keys in place of attributes
        return ".".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {name(path): (tuple(leaf.shape), str(leaf.dtype)) for path, leaf in leaves}


def _is_best(content: Any) -> bool:
    """Whether best.json may hold this."""
    if not isinstance(content, dict) or type(content.get("step")) is not int:
        return False
    score = content.get("score")
    return isinstance(score, (int, float)) and math.isfinite(score)


def _listed(read: Callable[[], T]) -> T:
    """The result of `read`, which lists checkpoints and looks at each.

    A run that trains there may remove one in between; then the list is read anew.
    """
    for _ in range(LISTINGS - 1):
        try:
            return read()
        except FileNotFoundError:
            continue
    return read()


def _unreadable(folder: Path) -> str | None:
    """The system's reason why a file of a folder cannot be read; None if all can be read."""
    failures: list[OSError] = []
    for parent, _, names in os.walk(folder, onerror=failures.append):
        for name in names:
            try:
                with open(os.path.join(parent, name), "rb") as file:
                    while file.read(1 << 24):
                        pass
            except OSError as error:
                failures.append(error)
    real = [error for error in failures if error.errno != errno.ENOENT]
    return f"{real[0].filename}: {real[0].strerror}" if real else None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _short(error: BaseException) -> str:
    """The first line of an error, cut to a readable length."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"
