"""Checkpoints by Orbax: asynchronous, the newest few and the best, verified when read back.

Each holds two items, so that evaluation need not read the optimiser: `model` (step, parameters,
statistics) and `optimizer`. Where a method changes the model, `model` is what is left of it, and a
third item, `training`, is what training goes on from. All carry a fingerprint of their bits, since
the storage format itself does not notice a changed byte in an array.
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
from typing import Any

from absl import logging
from etils.epath.gpath import PosixGPath
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from jaxdg import files
from jaxdg.training import distributed
from jaxdg.training.metrics import read_metrics
from jaxdg.training.step import TrainState


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
        """Args:
        workdir: of the run; the folder is made if needed.
        keep: newest checkpoints kept, besides the one with the best score.
        read_only: nothing is made, cleared up or mended, as beside a process that trains there.
        say: receives a line for what is mended.

        Raises:
            ValueError: the storage library cannot take the path.
        """
        self.folder = Path(workdir).resolve() / "checkpoints"
        check_path(self.folder)
        self._best = self._noted_best(None if read_only else say)
        kept = policies.AnyPreservationPolicy([policies.LatestN(keep), _Best(self)])
        self._manager = ocp.CheckpointManager(
            LiteralPath(self.folder),
            item_handlers={
                item: ocp.StandardCheckpointHandler() for item in ("model", "training", "optimizer")
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=kept,
                create=not read_only,
                # what a killed run had half written would lie there for ever
                cleanup_tmp_directories=not read_only,
            ),
        )

    def _noted_best(self, say: Callable[[str], None] | None) -> tuple[int, float] | None:
        """Step and score in best.json; if that is broken, what metrics.jsonl says, which is noted
        anew.
        """
        path = self.folder / "best.json"
        noted = files.recall(path, _is_best, say, "taken from metrics.jsonl instead")
        if noted is not None:
            return noted["step"], noted["score"]
        if say is None or not path.with_name("best.json.broken").exists():
            return None
        seen: dict[int, list[float]] = {}
        for row in read_metrics(self.folder.parent):
            if row.get("decides"):
                seen.setdefault(row["step"], []).append(
                    next(row[name] for name in ("mIoU", "mAP50") if name in row)
                )
        best = max(
            ((sum(scores) / len(scores), step) for step, scores in seen.items()), default=None
        )
        if best is not None and distributed.is_main():
            files.write(path, json.dumps({"step": best[1], "score": best[0]}))
        return None if best is None else (best[1], best[0])

    def steps(self) -> list[int]:
        """Steps that have a finished checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def shapes(self, step: int) -> dict[str, tuple[int, ...]]:
        """The shape of every array of a checkpoint's model by dotted name, such as
        `trained.head.norm.scale`; reads no array.
        """
        described = _described(self._manager.item_metadata(step)["model"].tree)
        return {name: shape for name, (shape, _) in described.items()}

    def best(self) -> tuple[int, float] | None:
        """Step and score of the best checkpoint so far, None before the first evaluation."""
        return self._best

    def scored(self, step: int, score: float) -> None:
        """Records the score of a checkpoint; the one with the highest score is kept."""
        if self._best is not None and score < self._best[1]:
            return
        self._best = step, score
        if distributed.is_main():
            files.write(self.folder / "best.json", json.dumps({"step": step, "score": score}))

    def save(self, state: TrainState, finished: tuple[Any, Any, Any] | None = None) -> None:
        """Starts writing `state`; returns before it is on disk. A step that is stored already is
        left as it is.

        Args:
            state: may be donated to the next step right after this returns.
            finished: trained, frozen and statistics of the model that is left when training ends,
                where that is another one. It is stored as the model then, and the state beside it,
                from which training goes on.

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
        """Looks whether the disk has room for a state, or for one of these shapes.

        Done before it is written, because the storage library meets a full disk with hundreds of
        lines and half a checkpoint.

        Raises:
            OSError: it has not.
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
        """Says in one line why a checkpoint could not be written."""
        try:
            yield
        except (
            Exception
        ) as error:  # the storage library wraps what the system says in errors of its own
            full = any(
                sign in str(e)
                for e in _chain(error)
                for sign in ("No space left", "ENOSPC", "quota exceeded", "EDQUOT")
            )
            what = (
                "disk full: a checkpoint did not fit into"
                if full
                else f"a checkpoint could not be written ({_short(error)}) into"
            )
            remedy = (
                "free some space and run the same command"
                if full
                else "see to that folder and run the same command"
            )
            raise OSError(
                f"{what} {self.folder}; the checkpoints before it are whole ({self._kept()});"
                f" {remedy}"
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
        """The state of `step` as it came to the disk: a run is not finished by a checkpoint that
        nobody can read.

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
        """The newest readable state, passing over corrupted ones; None if there is no checkpoint at
        all.

        Corrupted checkpoints newer than it are moved out of the folder, since training will write
        their steps again. If none can be read, none is moved.

        Args:
            like: abstract state with shardings, giving structure and placement.
            step: this one only, with an error if it cannot be read.
            say: receives a line for every checkpoint that was passed over or moved.

        Raises:
            ValueError: every checkpoint is corrupted, or the one asked for, or it belongs to
                another model.
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
        """As `restore`, without the optimiser and moving nothing: {"step", "trained", "frozen",
        "statistics"}.
        """
        return self._newest_readable(lambda at: self._read(at, "model", like), step, say)[0]

    def _newest_readable(
        self, read: Callable[[int], Any], step: int | None, say: Callable[[str], None]
    ) -> tuple[Any, list[int]]:
        """What `read` makes of the newest checkpoint it can read, and the newer ones that it
        cannot.
        """
        if step is not None and step not in self.steps():
            raise ValueError(
                f"{self.folder} has no checkpoint of step {step}; it has {self._kept()}"
            )
        failed: dict[int, Exception] = {}
        while (at := self._next(step, failed)) is not None:
            try:
                found = read(at)
            except Unshared:
                raise
            except (
                Exception
            ) as error:  # the storage library raises whatever a damaged file leads to
                self._check_blame(at, error)
                failed[at] = error
                continue
            newer = {bad: error for bad, error in failed.items() if bad > at and self._exists(bad)}
            for bad, error in newer.items():
                say(
                    f"checkpoint {self.folder / str(bad)} is corrupted ({_short(error)}); falling"
                    f" back to step {at}"
                )
            return found, list(newer)
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
        """The newest checkpoint that has not failed yet, or `step`; None if there is no other."""
        if step is not None:
            return None if failed else step
        if failed and jax.process_count() == 1:
            # beside a run that trains: newer ones have come, and what failed was being removed
            self._manager.reload()
        return max(set(self.steps()) - failed.keys(), default=None)

    def _exists(self, step: int) -> bool:
        return (self.folder / str(step)).is_dir()

    def _check_blame(self, step: int, error: Exception) -> None:
        """Raises an error that says so where a checkpoint was not read for another reason than its
        bytes.
        """
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
        """An item of a checkpoint, placed as `like` says; an error unless it is what was saved."""
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
            stored = dict(
                self._manager.restore(
                    step, args=ocp.args.Composite(**{item: ocp.args.StandardRestore(wanted)})
                )[item]
            )
        except Exception as error:
            if jax.process_count() == 1:
                raise
            raise Unshared(
                f"checkpoint {self.folder / str(step)} cannot be read by process"
                f" {jax.process_index()} ({_short(error)}), maybe by it alone, so the run does not"
                " fall back by itself; move this folder away and run again"
            ) from error
        expected = int(stored.pop("fingerprint"))
        found = int(fingerprint(stored))
        if found != expected:
            raise ValueError(
                f"its {item} arrays do not add up to their fingerprint: {found:08x}, not"
                f" {expected:08x}"
            )
        return stored


class Foreign(ValueError):
    """A checkpoint holds other parameters than the model."""


class Unshared(OSError):
    """A process could not read its part of a checkpoint; the others, which may have read theirs,
    wait for it.
    """


class _Best(policies.PreservationPolicy):
    """Keeps the best-scored checkpoint. Orbax's own policy wants the score when saving, but a run
    that dies while it is evaluated should not have to train to that step again.
    """

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        best = self._checkpoints.best()
        return [best is not None and info.step == best[0] for info in checkpoints]


class LiteralPath(PosixGPath):
    """A local path as it is written. The storage library would search below it with the path as a
    part of the pattern, in which `[1]` and `*` mean something else, and would take `/gs/..` or
    `/s3/..` for a bucket.
    """

    @property
    def _uri_scheme(self) -> None:
        return None

    def glob(self, pattern: str) -> Iterator["LiteralPath"]:
        return (
            self._new(found)
            for found in glob.glob(os.path.join(glob.escape(os.fspath(self)), pattern))
        )


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


@jax.jit
def fingerprint(tree: Any) -> jax.Array:
    """A checksum of the bits of all arrays in `tree` and of their order, uint32; independent of how
    devices divide them.

    Every word counts an odd number of times, so one changed word always changes the sum.
    """
    total = jnp.zeros((), jnp.uint32)
    for i, leaf in enumerate(jax.tree.leaves(tree)):
        bits = jax.lax.bitcast_convert_type(
            leaf, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
        )
        place = jnp.zeros(leaf.shape, jnp.uint32)
        for axis, size in enumerate(leaf.shape):
            place = place * size + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        total += jnp.uint32(2 * i + 1) * jnp.sum(
            (2 * place + 1) * bits.astype(jnp.uint32), dtype=jnp.uint32
        )
    return total


def _items(
    state: TrainState, finished: tuple[Any, Any, Any] | None = None
) -> dict[str, dict[str, Any]]:
    """What is stored apart, with the fields of a state that each holds; see `Checkpoints.save`."""
    fields = dict(vars(state))
    optimizer = {"opt_state": fields.pop("opt_state")}
    if finished is None:
        return {"model": fields, "optimizer": optimizer}
    left = dict(zip(("trained", "frozen", "statistics"), finished, strict=True))
    return {"model": {"step": state.step, **left}, "training": fields, "optimizer": optimizer}


def _described(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shapes and types by dotted name, of an abstract state or of a checkpoint's metadata, which
    spells attributes as keys.
    """

    def name(path):
        return ".".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {name(path): (tuple(leaf.shape), str(leaf.dtype)) for path, leaf in leaves}


def _is_best(content: Any) -> bool:
    """Whether this is what best.json should hold."""
    good = (
        isinstance(content, dict)
        and type(content.get("step")) is int
        and isinstance(content.get("score"), (int, float))
    )
    return good and math.isfinite(content["score"])


def _unreadable(folder: Path) -> str | None:
    """Why the system does not let a file of a folder be read, in words; None if it does, whatever
    they hold.
    """
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
    """An error and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _short(error: BaseException) -> str:
    """The first line of an error, cut to a readable length."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"
