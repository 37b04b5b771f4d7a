"""What calibration and Boundary IoU cost an evaluation.

    python scripts/evaluation_cost.py --checkpoint RUN --domain day --max_images 40

One process judges the same images with both off and on, by turns. Writing the files of a domain
counts. A first round is not counted.
"""

import argparse
import copy
import dataclasses
from pathlib import Path
import tempfile
import time

import numpy as np

from jaxdg.config import MeshConfig
from jaxdg.evaluate import open_domains
from jaxdg.tasks.loading import restored
from jaxdg.tasks.run_state import opened
from jaxdg.training import sharding


def main() -> None:
    """Prints the seconds of each side and the median of the paired ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--domain", required=True)
    parser.add_argument("--data_root")
    parser.add_argument("--max_images", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    trained = opened(arguments.checkpoint)
    mesh = sharding.make_mesh(MeshConfig(1, 1))
    sides = []
    for on in (False, True):
        config = copy.deepcopy(trained.config)
        config.data.root = arguments.data_root or config.data.root
        config.evaluation = dataclasses.replace(
            config.evaluation,
            domains=(arguments.domain,),
            max_images=arguments.max_images,
            calibration=on,
            boundary=on,
        )
        model = restored(trained, config)
        dataset = open_domains(model.task)[arguments.domain]
        sides.append((model.task.evaluator(model.graph, mesh), model.state, dataset))

    def seconds(side: int) -> tuple[float, float]:
        evaluate, state, dataset = sides[side]
        start = time.perf_counter(), time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            evaluate(state, dataset, lambda: None).write(Path(folder), arguments.domain)
        return time.perf_counter() - start[0], time.process_time() - start[1]

    rounds = []
    for i in range(arguments.rounds + 1):
        order = (0, 1) if i % 2 else (1, 0)
        found = {side: seconds(side) for side in order}
        rounds.append([found[0], found[1]])
    both = np.array(rounds[1:])  # round, off and on, clock and CPU
    for i, clock in enumerate(("by the clock", "of CPU time")):
        off, on = np.median(both[..., i], axis=0)
        ratio = np.median(both[:, 1, i] / both[:, 0, i])
        print(f"{clock}: {off:.2f} s off, {on:.2f} s on, median of the ratios {ratio:.3f}")


if __name__ == "__main__":
    main()
