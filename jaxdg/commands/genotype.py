"""Writes the genotype that a search of cells has found, or one drawn at random.

    jaxdg genotype runs/search --out genotype.json
    jaxdg genotype --random 3 --out random_3.json

The file goes into another run, which trains the cells anew:
`--config.model.cell_rcnn.genotype=genotype.json`. It also holds the weights of the search, softmax
over the operations of each edge. A genotype drawn at random is what a searched one is compared
with.
"""

from collections.abc import Sequence
import json
from pathlib import Path
from typing import Any

from absl import flags
from flax import nnx
import jax
from jaxtyping import Float
import numpy as np

from jaxdg import files, weights
from jaxdg.commands import command_line as cli
from jaxdg.commands import process as runtime
from jaxdg.config import MeshConfig, paths
from jaxdg.detection.rcnn.genotype import KEY, OPERATIONS, Genotype, discretised, drawn
from jaxdg.tasks.run_state import opened
from jaxdg.training import sharding

DECODER = "cell_rcnn"
ALPHAS = "head.roi_heads.box_head.0.alpha_reduce"


def searched(checkpoint: str | Path) -> tuple[Float[np.ndarray, "14 8"], int]:
    """The weights of the operations of each edge, and the step of the search.

    Args:
        checkpoint: a workdir, one step in it, or a packed file.

    Raises:
        FileNotFoundError: no such model.
        ValueError: it is damaged, or no search.
    """
    trained = opened(checkpoint)
    model = trained.config.model
    if model.decoder != DECODER or model.cell_rcnn.genotype is not None:
        what = f"model.decoder {model.decoder}"
        if model.decoder == DECODER:
            what = "a genotype of its own"
        raise ValueError(
            f"{checkpoint} is no search: it was trained with {what}; allowed: a run with"
            f" model.decoder {DECODER} and model.{DECODER}.genotype None"
        )
    mesh = sharding.make_mesh(MeshConfig(1, 1), jax.local_devices()[:1])
    plan, state, step = trained.restore(trained.task(trained.config), mesh)
    alphas = weights.tensors(nnx.merge(plan.graph, *state))[ALPHAS].astype(np.float64)
    e = np.exp(alphas - alphas.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True), step


def write(out: Path, pairs: Genotype, **more: Any) -> None:
    """Writes a genotype as JSON, with what else is known of it, a line each."""
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        f"{json.dumps(key)}: {json.dumps(value)}" for key, value in {KEY: pairs, **more}.items()
    ]
    files.write(out, "{\n" + ",\n".join(lines) + "\n}\n")


def main(arguments: Sequence[str]) -> None:
    """Writes the genotype that the arguments name."""
    seed = _RANDOM.value
    if len(arguments) != (2 if seed is None else 1):
        raise ValueError(
            "name one search, or a seed: jaxdg genotype RUN --out FILE.json, or"
            " jaxdg genotype --random SEED --out FILE.json"
        )
    runtime.set_up()
    out = Path(_OUT.value)
    if seed is None:
        of_edges, step = searched(paths.given(arguments[1], "the search"))
        pairs = discretised(of_edges)
        table = np.round(of_edges, 6).tolist()
        write(out, pairs, run=arguments[1], step=step, operations=OPERATIONS, weights=table)
    else:
        pairs = drawn(seed)
        write(out, pairs, random=seed)
    print(f"{out}: {' '.join(f'{operation}<{state}' for operation, state in pairs)}")


if __name__ == "__main__":
    _OUT = cli.define_path("out", "File for the genotype, as JSON.", required=True)
    _RANDOM = flags.DEFINE_integer(
        "random", None, "Draws one with this seed instead of reading a search.", lower_bound=0
    )
    cli.run(main)
