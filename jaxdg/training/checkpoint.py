"""Checkpoints by Orbax: asynchronous, the newest few and the best, verified when read back.

Each holds two items, so that evaluation need not read the optimiser: `model` (step, parameters, statistics) and `optimizer`.
Both carry a fingerprint of their bits, since the storage format itself does not notice a changed byte in an array.
"""

from collections.abc import Callable, Sequence
import json
import os
from pathlib import Path
import shutil
from typing import Any

from absl import logging
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from jaxdg import distributed
from jaxdg.training.step import TrainState


class Checkpoints:
    """The `checkpoints` folder of a workdir."""

    def __init__(self, workdir: str | Path, keep: int = 2):
        """Args:
        workdir: of the run; the folder is made if needed.
        keep: newest checkpoints kept, besides the one with the best score.
        """
        self.folder = Path(workdir).resolve() / "checkpoints"
        path = self.folder / "best.json"
        self._best = (best["step"], best["score"]) if path.exists() and (best := json.loads(path.read_text())) else None
        kept = policies.AnyPreservationPolicy([policies.LatestN(keep), _Best(self)])
        self._manager = ocp.CheckpointManager(
            self.folder,
            item_handlers={"model": ocp.StandardCheckpointHandler(), "optimizer": ocp.StandardCheckpointHandler()},
            options=ocp.CheckpointManagerOptions(preservation_policy=kept),
        )

    def steps(self) -> list[int]:
        """Steps that have a finished checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def best(self) -> tuple[int, float] | None:
        """Step and score of the best checkpoint so far, None before the first evaluation."""
        return self._best

    def scored(self, step: int, score: float) -> None:
        """Notes the score of the checkpoint of `step`; higher is better, and the best one is kept."""
        if self._best is not None and score < self._best[1]:
            return
        self._best = step, score
        if distributed.is_main():
            partial = self.folder / "best.partial"
            partial.write_text(json.dumps({"step": step, "score": score}))
            os.replace(partial, self.folder / "best.json")

    def save(self, state: TrainState) -> None:
        """Starts writing `state`; returns before it is on disk. A step that is stored already is left as it is.

        Args:
            state: may be donated to the next step right after this returns.

        Raises:
            OSError: the disk has no room for it.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self.wait()
        # Looked at before, because the storage library meets a full disk with hundreds of lines and half a checkpoint.
        needed, free = sum(leaf.nbytes for leaf in jax.tree.leaves(state)), shutil.disk_usage(self.folder).free
        if free < 1.25 * needed:
            kept = ", ".join(map(str, self.steps())) or "none"
            raise OSError(
                f"disk full: the checkpoint of step {step} needs {needed / 1e6:.0f} MB and {self.folder} has {free / 1e6:.0f} MB free; "
                f"the checkpoints before it are whole ({kept}); free some space and run the same command"
            )
        stored = {name: ocp.args.StandardSave({"fingerprint": fingerprint(part), **part}) for name, part in _items(state).items()}
        self._manager.save(step, args=ocp.args.Composite(**stored))

    def wait(self) -> None:
        """Returns once everything saved is on disk.

        Raises:
            OSError: it could not be written.
        """
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for pending writes and frees the threads."""
        self._manager.close()

    def restore(self, like: TrainState, step: int | None = None, say: Callable[[str], None] = logging.warning) -> TrainState | None:
        """The newest readable state, passing over corrupted ones; None if there is no checkpoint at all.

        Corrupted checkpoints newer than it are moved out of the folder, since training will write their steps again. If none can
        be read, none is moved.

        Args:
            like: abstract state with shardings, giving structure and placement.
            step: this one only, with an error if it cannot be read.
            say: receives a line for every checkpoint that was passed over or moved.

        Raises:
            ValueError: every checkpoint is corrupted, or the one asked for, or it belongs to another model.
        """

        def read(at: int) -> TrainState:
            return TrainState(**self._read(at, "model", like), **self._read(at, "optimizer", like))

        state, corrupted = self._newest_readable(read, step, say)
        for at in corrupted if distributed.is_main() else ():
            aside = self.folder.parent / f"corrupted_checkpoint_{at}"
            while aside.exists():
                aside = aside.with_name(aside.name + "_")
            (self.folder / str(at)).rename(aside)
            say(f"corrupted checkpoint moved to {aside}")
        if corrupted:
            multihost_utils.sync_global_devices("corrupted checkpoints moved")
            self._manager.reload()
        return state

    def restore_model(
        self, like: TrainState, step: int | None = None, say: Callable[[str], None] = logging.warning
    ) -> dict[str, Any] | None:
        """As `restore`, without the optimiser and moving nothing: {"step", "trained", "frozen", "statistics"}."""
        return self._newest_readable(lambda at: self._read(at, "model", like), step, say)[0]

    def _newest_readable(self, read: Callable[[int], Any], step: int | None, say: Callable[[str], None]) -> tuple[Any, list[int]]:
        """What `read` makes of the newest checkpoint it can read, and the newer ones that it cannot."""
        steps = self.steps()
        if step is not None and step not in steps:
            raise ValueError(f"{self.folder} has no checkpoint of step {step}; it has {', '.join(map(str, steps)) or 'none'}")
        failed: dict[int, Exception] = {}
        for at in steps[::-1] if step is None else [step]:
            try:
                found = read(at)
            except Unshared:
                raise
            except Exception as error:  # the storage library raises whatever a damaged file leads to
                failed[at] = error
                continue
            for bad, error in failed.items():
                say(f"checkpoint {self.folder / str(bad)} is corrupted ({_short(error)}); falling back to step {at}")
            return found, list(failed)
        if not failed:
            return None, []
        at, error = next(iter(failed.items()))
        remedy = "start again in a new workdir" if step is None else "choose another step"
        raise ValueError(
            f"no readable checkpoint: {self.folder / str(at)} is corrupted or belongs to another model ({_short(error)}); {remedy}"
        ) from error

    def _read(self, step: int, item: str, like: TrainState) -> dict[str, Any]:
        """An item of a checkpoint, placed as `like` says; an error unless it is what was saved."""
        checksum = jax.ShapeDtypeStruct((), jnp.uint32, sharding=like.step.sharding)
        wanted = {"fingerprint": checksum, **_items(like)[item]}
        if item == "model":  # the storage library's own message would not name the parameter
            there, here = _shapes(self._manager.item_metadata(step)[item].tree), _shapes(wanted)
            for name in sorted(there.keys() | here.keys()):
                if there.get(name) != here.get(name):
                    raise ValueError(f"{name} is {there.get(name, 'absent')} there and {here.get(name, 'absent')} in this model")
        try:
            stored = dict(self._manager.restore(step, args=ocp.args.Composite(**{item: ocp.args.StandardRestore(wanted)}))[item])
        except Exception as error:
            if jax.process_count() == 1:
                raise
            raise Unshared(
                f"checkpoint {self.folder / str(step)} cannot be read by process {jax.process_index()} ({_short(error)}), maybe by it "
                "alone, so the run does not fall back by itself; move this folder away and run again"
            ) from error
        expected, found = int(stored.pop("fingerprint")), int(fingerprint(stored))
        if found != expected:
            raise ValueError(f"its {item} arrays do not add up to their fingerprint: {found:08x}, not {expected:08x}")
        return stored


class Unshared(OSError):
    """A process could not read its part of a checkpoint; the others, which may have read theirs, wait for it."""


class _Best(policies.PreservationPolicy):
    """Keeps the best-scored checkpoint. Orbax's own policy wants the score when saving, but a run that dies while it is
    evaluated should not have to train to that step again.
    """

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        best = self._checkpoints.best()
        return [best is not None and info.step == best[0] for info in checkpoints]


@jax.jit
def fingerprint(tree: Any) -> jax.Array:
    """A checksum of the bits of all arrays in `tree` and of their order, uint32; independent of how devices divide them.

    Every word counts an odd number of times, so one changed word always changes the sum.
    """
    total = jnp.zeros((), jnp.uint32)
    for i, leaf in enumerate(jax.tree.leaves(tree)):
        bits = jax.lax.bitcast_convert_type(leaf, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize])
        place = jnp.zeros(leaf.shape, jnp.uint32)
        for axis, size in enumerate(leaf.shape):
            place = place * size + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        total += jnp.uint32(2 * i + 1) * jnp.sum((2 * place + 1) * bits.astype(jnp.uint32), dtype=jnp.uint32)
    return total


def _items(state: TrainState) -> dict[str, dict[str, Any]]:
    """What is stored apart, with the fields of a state that each holds."""
    fields = dict(vars(state))
    optimizer = {"opt_state": fields.pop("opt_state")}
    return {"model": fields, "optimizer": optimizer}


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shapes by dotted name, of an abstract state or of a checkpoint's metadata, which spells attributes as keys."""
    name = lambda path: ".".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
    return {name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _short(error: Exception) -> str:
    """The first line of an error, cut to a readable length."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"
