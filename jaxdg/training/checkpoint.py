"""Checkpoints by Orbax: asynchronous, the newest few and the best, verified when read back.

Each holds two items, so that evaluation need not read the optimiser: `model` (step, parameters, statistics) and `optimizer`.
Both carry a fingerprint of their bits, since the storage format itself does not notice a changed byte in an array.
"""

from collections.abc import Callable, Sequence
import json
import os
from pathlib import Path
from typing import Any

from absl import logging
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from jaxdg.training.step import TrainState


class Checkpoints:
    """The `checkpoints` folder of a workdir."""

    def __init__(self, workdir: str | Path, keep: int = 2):
        """Args:
        workdir: of the run; the folder is made if needed.
        keep: newest checkpoints kept, besides the one with the best score.
        """
        self.folder = Path(workdir).resolve() / "checkpoints"
        kept = policies.AnyPreservationPolicy([policies.LatestN(keep), _Best(self)])
        self._manager = ocp.CheckpointManager(self.folder, options=ocp.CheckpointManagerOptions(preservation_policy=kept))

    def steps(self) -> list[int]:
        """Steps that have a finished checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def best(self) -> tuple[int, float] | None:
        """Step and score of the best checkpoint so far, None before the first evaluation."""
        path = self.folder / "best.json"
        return (best["step"], best["score"]) if path.exists() and (best := json.loads(path.read_text())) else None

    def scored(self, step: int, score: float) -> None:
        """Notes the score of the checkpoint of `step`; higher is better, and the best one is kept."""
        best = self.best()
        if best is None or score >= best[1]:
            partial = self.folder / "best.partial"
            partial.write_text(json.dumps({"step": step, "score": score}))
            os.replace(partial, self.folder / "best.json")

    def save(self, state: TrainState) -> None:
        """Starts writing `state`; returns before it is on disk. A step that is stored already is left as it is.

        Args:
            state: may be donated to the next step right after this returns.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        model = _model_part(state)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                model=ocp.args.StandardSave({"fingerprint": fingerprint(model), **model}),
                optimizer=ocp.args.StandardSave({"fingerprint": fingerprint(state.opt_state), "state": state.opt_state}),
            ),
        )

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
        """The newest readable state, passing over corrupted ones and saying so; None if there is none at all.

        Args:
            like: abstract state with shardings, giving structure and placement.
            step: this one only, with an error if it cannot be read.
            say: receives a line for every checkpoint that was passed over.

        Raises:
            ValueError: every checkpoint is corrupted, or the one asked for, or it belongs to another model.
        """
        model = self.restore_model(like, step, say)
        if model is None:
            return None
        step = int(model["step"])
        like_optimizer = {"fingerprint": _abstract_fingerprint(like), "state": like.opt_state}
        try:
            stored = self._restore(step, optimizer=like_optimizer)["optimizer"]
            _verify(stored["state"], stored["fingerprint"])
        except Exception as error:
            return self._pass_over(step, error, lambda: self.restore(like, None, say), say)
        return TrainState(opt_state=stored["state"], **model)

    def restore_model(
        self, like: TrainState, step: int | None = None, say: Callable[[str], None] = logging.warning
    ) -> dict[str, Any] | None:
        """As `restore`, without the optimiser: {"step", "trained", "frozen", "statistics"}."""
        steps = self.steps()
        if step is not None and step not in steps:
            raise ValueError(f"{self.folder} has no checkpoint of step {step}; it has {', '.join(map(str, steps)) or 'none'}")
        if not steps:
            return None
        chosen = steps[-1] if step is None else step
        like_model = {"fingerprint": _abstract_fingerprint(like), **_model_part(like)}
        try:
            stored = dict(self._restore(chosen, model=like_model)["model"])
            _verify(stored, stored.pop("fingerprint"))
        except Exception as error:
            if step is not None:
                raise ValueError(f"checkpoint {self.folder / str(step)} cannot be read: {_short(error)}") from error
            return self._pass_over(chosen, error, lambda: self.restore_model(like, None, say), say)
        return stored

    def _restore(self, step: int, **items: Any) -> Any:
        return self._manager.restore(step, args=ocp.args.Composite(**{k: ocp.args.StandardRestore(v) for k, v in items.items()}))

    def _pass_over(self, step: int, error: Exception, retry: Callable[[], Any], say: Callable[[str], None]) -> Any:
        """Moves a bad checkpoint aside (its step will be written again) and tries the one before."""
        older = [s for s in self.steps() if s < step]
        if not older:
            raise ValueError(
                f"no readable checkpoint in {self.folder}: step {step} failed with {_short(error)}; "
                "it is corrupted or belongs to another model; start again in a new workdir"
            ) from error
        aside = self.folder.parent / f"corrupted_checkpoint_{step}"
        say(f"checkpoint {self.folder / str(step)} is corrupted ({_short(error)}); moved to {aside}, falling back to step {older[-1]}")
        while aside.exists():
            aside = aside.with_name(aside.name + "_")
        (self.folder / str(step)).rename(aside)
        self._manager.reload()
        return retry()


class _Best(policies.PreservationPolicy):
    """Keeps the best-scored checkpoint. Orbax's own policy wants the score when saving, but a run that dies while it is
    evaluated should not have to train to that step again.
    """

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints

    def should_preserve(self, checkpoints: Sequence[policies.PolicyCheckpointInfo], *, context: Any) -> Sequence[bool]:
        best = self._checkpoints.best()
        return [best is not None and info.step == best[0] for info in checkpoints]


def fingerprint(tree: Any) -> jax.Array:
    """A checksum of the bits of all arrays in `tree`, uint32; independent of how they are divided over devices."""
    return _fingerprint(tree)


@jax.jit
def _fingerprint(tree: Any) -> jax.Array:
    total = jnp.zeros((), jnp.uint32)
    for i, leaf in enumerate(jax.tree.leaves(tree)):
        bits = jax.lax.bitcast_convert_type(leaf, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[leaf.dtype.itemsize])
        total += jnp.uint32(2 * i + 1) * jnp.sum(bits, dtype=jnp.uint32)
    return total


def _verify(tree: Any, expected: jax.Array) -> None:
    found = int(fingerprint(tree))
    if found != int(expected):
        raise ValueError(f"its arrays do not add up to their fingerprint ({found:08x}, not {int(expected):08x})")


def _model_part(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "trained": state.trained, "frozen": state.frozen, "statistics": state.statistics}


def _abstract_fingerprint(like: TrainState) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((), jnp.uint32, sharding=like.step.sharding)


def _short(error: Exception) -> str:
    """The first line of an error, cut to a readable length."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"
