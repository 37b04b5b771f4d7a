"""Every architecture of the zoo at a small size in the recipe of configs/camvid_vit_tiny.py: does
the loss fall, tuned and frozen?

    JAXDG_DATA=DATA python scripts/train_every_encoder.py [NAME...]

Twenty steps on CamVid each, all but the sizes as in the recipe. Prints the mean loss of the first
five and of the last five steps; benchmarks/RESULTS.md records them. Exits with 1 if one of them did
not fall.
"""

import json
from pathlib import Path
import sys
import tempfile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from rich.console import Console

from configs import camvid_vit_tiny
from jaxdg import backbones, config, train
from jaxdg.backbones import zoo
from jaxdg.commands import command_line as cli
from tests.small_zoo import reduced


def losses(name: str, freeze: str, interrupt: cli.Interrupt) -> list[float]:
    """Of twenty steps of a small encoder under `name`."""
    c = camvid_vit_tiny.get_config()
    c.steps = 20
    c.log_every = 1
    c.eval_every = 0
    c.checkpoint_every = 20
    c.data.crop = (64, 64)
    c.evaluation.stride = (64, 64)
    c.model.encoder = name
    c.model.weights = None
    c.model.taps = (0, 1, 2, 3)
    c.model.freeze = freeze
    head = c.model.mask2former
    head.hidden = 64
    head.points = 512
    head.pixel_layers = 1
    head.pixel_ffn = 128
    head.ffn = 128
    with tempfile.TemporaryDirectory() as folder:
        train.train(config.validated(c), Path(folder), Console(quiet=True), interrupt)
        return [
            json.loads(row)["loss"]
            for row in (Path(folder) / "metrics.jsonl").read_text().splitlines()
        ]


def main() -> int:
    """Trains them all; returns the exit code."""
    architectures: dict[backbones.EncoderConfig, str] = {}
    for name, entry in zoo.ZOO.items():
        if not sys.argv[1:] or name in sys.argv[1:]:
            architectures.setdefault(reduced(entry.config), name)
    interrupt = cli.Interrupt()
    risen = 0
    for small, name in architectures.items():
        zoo.ZOO[name] = zoo.Entry(small)
        for freeze in ("none", "all"):
            seen = losses(name, freeze, interrupt)
            first = np.mean(seen[:5])
            last = np.mean(seen[-5:])
            risen += not last < first
            print(
                f"{name:28s} {'tuned' if freeze == 'none' else 'frozen':6s} {first:6.2f} ->"
                f" {last:6.2f}",
                flush=True,
            )
    return int(risen > 0)


if __name__ == "__main__":
    sys.exit(main())
