"""A fast program that stands in for training in the tests of studies, and a study that starts it.

`python stand_in.py FLAGS` runs the study `transfer`, which starts `python stand_in.py train FLAGS`
for each run. That writes the files that training writes.
"""

import json
import os
from pathlib import Path
import signal
import sys
import time


def train(folder: Path, steps: int, source: str, seed: int) -> None:
    """A step is a checkpoint; a source of that name breaks the run; results follow from source and
    seed. `starts` notes each start.
    """
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    with (folder / "starts").open("a") as file:
        file.write(f"{os.getpid()}\n")
    if source == "broken":
        sys.exit("a warning\nerror: no images of broken\na library's last words")
    if source == "dumb":
        os.kill(os.getpid(), signal.SIGKILL)
    checkpoints = folder / "checkpoints"
    done = max((int(path.name) for path in checkpoints.glob("*")), default=0)
    print(f"from step {done}", flush=True)
    for step in range(done + 1, steps + 1):
        time.sleep(float(os.environ.get("SECONDS_A_STEP", "0")))
        (checkpoints / str(step)).mkdir(parents=True)
        if asked:
            return
    base = 10 * len(source) + seed

    def entry(name, score):
        return {"mIoU": score, "images": 3, "seen": name == source, "part_of": None}

    domains = {name: entry(name, base + i + 0.1) for i, name in enumerate(("clear", "night"))}
    unseen = [entry["mIoU"] for entry in domains.values() if not entry["seen"]]
    mean = sum(unseen) / len(unseen)
    results = {
        "task": "segmentation",
        "source": source,
        "protocol": "native",
        "step": steps,
        "domains": domains,
        "mean_unseen": mean,
    }
    (folder / "results.json").write_text(
        json.dumps({**results, "rPD": None if len(unseen) > 1 else 100 * mean / base})
    )


def study() -> None:
    """The command of a study whose runs are made by `train`."""
    from jaxdg.config import workdir as workdir_lib
    from jaxdg.studies import command, study, transfer

    class StandIn(study.Study):
        def command(self, run, show=None):
            if show is not None:
                return super().command(run, show)
            c = self.config(run)
            return [
                __file__,
                "train",
                str(self.workdir(run)),
                str(c.steps),
                c.data.source,
                str(run.seed),
            ]

        def train(self, run, console, interrupt):
            workdir_lib.claim(self.config(run), self.workdir(run))
            return super().train(run, console, interrupt)

    command.main("transfer", transfer.plan, make=StandIn)


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        train(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
    else:
        study()
