"""A trained model as one file, to be handed to somebody else.

    jaxdg pack runs/streets --out streets.safetensors
    jaxdg pack runs/streets --out streets.safetensors --dtype bfloat16

The file holds what evaluation reads of the run: parameters and running statistics (the average
where `average.on`, adapters folded in), the configuration, class names and colours, the scores, and
a card that says what it was trained on and what it started from. `load`, `predict`, `evaluate`,
`export` and `model.start` take it in place of a workdir, on any machine. In float32 it predicts the
same bits.

`--dtype` stores the parameters in half precision, for half the bytes; they are rounded, and the
card says so. The model computes in the precision of its configuration either way.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags
from flax import nnx
import jax

from jaxdg import weights
from jaxdg.commands import command_line as cli
from jaxdg.commands import model_card
from jaxdg.commands import process as runtime
from jaxdg.config import MeshConfig, paths
from jaxdg.evaluation.overlap import TrainedOn
from jaxdg.tasks import packed
from jaxdg.tasks.run_state import Trained, opened
from jaxdg.training import sharding

DTYPES = ("float32", *packed.HALF)


def pack(checkpoint: str | Path, out: Path, dtype: str = DTYPES[0]) -> packed.Packed:
    """Writes a trained model as one file.

    Args:
        checkpoint: a workdir, one step in it, or a packed file.
        out: the file, whose name ends in `.safetensors`.
        dtype: that the parameters are stored in, one of `DTYPES`.

    Returns:
        What the file says beside its tensors.

    Raises:
        FileNotFoundError: no such model.
        ValueError: it is damaged, `out` is another file, or a parameter is too large for `dtype`.
    """
    check_out(out)
    trained = opened(checkpoint)
    mesh = sharding.make_mesh(MeshConfig(1, 1), jax.local_devices()[:1])
    task = trained.task(trained.config)
    plan, state, step = trained.restore(task, mesh)
    tensors = weights.tensors(nnx.merge(plan.graph, *state))
    card = model_card.card(trained, step, sum(tensor.size for tensor in tensors.values()))
    parameters = [part for part in state[:2] if part]
    if dtype in packed.HALF:
        names = [name for part in parameters for name in weights.slots(part)]
        tensors, error = packed.rounded(tensors, names, dtype)
        card["rounded"] = {
            "dtype": dtype,
            "largest_relative_error": error,
            "note": "the scores are those of the model before its parameters were rounded",
        }
    shapes = {path: leaf.shape for part in parameters for path, leaf in nnx.to_flat_state(part)}
    whole = packed.Packed(
        config=trained.config,
        labels=task.labels,
        step=step,
        segment_ends=weights.segment_ends(shapes, "backbone"),
        frozen=frozenset(plan.frozen),
        trained_on=noted(trained),
        results=tuple(trained.results(step)),
        card=card,
    )
    packed.write(out, whole, tensors)
    return whole


def check_out(out: Path) -> None:
    """Makes sure, before anything is read, that packing replaces nothing but a packed file.

    Raises:
        ValueError: another file is there, or the name is none of a safetensors file.
    """
    if out.suffix != packed.SUFFIX:
        raise ValueError(f"--out is {out}; allowed: a file whose name ends in {packed.SUFFIX}")
    if not out.exists():
        return
    try:
        packed.read(out)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--out {out} is there and is no packed model that can be read; give another name, or"
            " move it"
        ) from error


def noted(trained: Trained) -> TrainedOn | None:
    """The images that a model was trained on. If its workdir does not say, the names of the domains
    where it started from another run, for the file will not lead there; else None, and whoever
    judges it looks at the images of its source.
    """
    found = trained.trained_on()
    start = trained.config.model.start
    if found is not None or start is None:
        return found
    own = TrainedOn(tuple(trained.config.data.source.split("+")))
    try:
        before = opened(start)
        return own.also(noted(before) or TrainedOn(tuple(before.config.data.source.split("+"))))
    except (OSError, ValueError):  # it is gone
        return own


def main(arguments: Sequence[str]) -> None:
    """Packs the model that the arguments name."""
    if len(arguments) != 2:
        raise ValueError("name one trained model: jaxdg pack RUN --out FILE.safetensors")
    runtime.set_up()
    out = Path(_OUT.value)
    whole = pack(paths.given(arguments[1], "the model to pack"), out, _DTYPE.value)
    card = whole.card
    print(
        f"{out}: {out.stat().st_size / 1e6:.1f} MB, {card['parameters']} numbers in {_DTYPE.value},"
        f" {card['encoder']} with {card['decoder']}, step {whole.step} of {card['steps']}"
    )
    if card["rounded"]:
        error = card["rounded"]["largest_relative_error"]
        print(f"parameters are rounded to {card['rounded']['dtype']}: {100 * error:.2g} % at most")
    if terms := model_card.licences(card):
        print(f"licence of what it started from: {', '.join(terms)}")


if __name__ == "__main__":
    _OUT = cli.define_path(
        "out", "File for the model; its name ends in .safetensors.", required=True
    )
    _DTYPE = flags.DEFINE_enum(
        "dtype", DTYPES[0], DTYPES, "What the parameters are stored in; half precision rounds them."
    )
    cli.run(main)
