"""Draws what an evaluation has kept beside its results.json, as PNG.

    jaxdg draw runs/streets runs/streets/evaluation_3000

In each folder it writes `confusion/DOMAIN.png`, every row in percent of its true pixels; with
`evaluation.calibration` also `reliability/DOMAIN.png`, and for detection `curves/DOMAIN.png`,
precision against recall at IoU 0.5. Nothing is judged again, so results of any age are drawn, and
evaluation needs no chart library.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxdg import files
from jaxdg.commands import command_line as cli
from jaxdg.config import paths, workdir
from jaxdg.drawing import charts
from jaxdg.evaluation.average_precision import CURVES, Curves
from jaxdg.evaluation.confusion import FOLDER, read_confusion

RELIABILITY = "reliability"


def draw(folder: Path) -> list[Path]:
    """Draws the charts of a folder of results; returns their files.

    Raises:
        FileNotFoundError: there is no results.json.
        ValueError: it is broken, or nothing was kept beside it.
    """
    if not (folder / "results.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no results.json; name a workdir, or a folder that evaluate wrote"
        )
    results = workdir.results(folder / "results.json")
    if results is None:
        raise ValueError(f"{folder}/results.json is broken; evaluate again")
    drawn = []
    for domain, entry in results["domains"].items():
        for kind, chart in _charts(folder, domain, entry):
            path = files.of_domain(folder / kind, domain, ".png")
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write(path, chart)
            drawn.append(path)
    if not drawn:
        raise ValueError(
            f"{folder} keeps neither {FOLDER}/ nor {CURVES}/, as older versions did; evaluate again"
        )
    return drawn


def _charts(folder: Path, domain: str, entry: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """The folder and the contents of every chart of a domain."""
    if (stored := read_confusion(folder, domain)) is not None:
        told = "no truth" if entry["mIoU"] is None else f"mIoU {entry['mIoU']:.1f}"
        yield FOLDER, charts.confusion(f"{domain}: {told}", *stored)
    if entry.get("ECE") is not None:
        bins = entry["reliability"]
        title = f"{domain}: calibration error {entry['ECE']:.1f} %"
        yield RELIABILITY, charts.reliability(title, **bins)
    if (curves := Curves.read(folder, domain)) is not None:
        of_class = [curves.detection_class == k for k in range(len(curves.classes))]
        lines = [(curves.recall[mine], curves.precision[mine]) for mine in of_class]
        told = "no truth" if entry["mAP50"] is None else f"mAP50 {entry['mAP50']:.1f}"
        names = curves.classes.tolist()
        yield CURVES, charts.precision_recall(f"{domain}: {told}", names, lines)


def main(arguments: Sequence[str]) -> None:
    """Draws the folders that the arguments name."""
    if len(arguments) < 2:
        raise ValueError("name folders with a results.json; see --help")
    console = cli.console()
    for argument in arguments[1:]:
        folder = Path(paths.given(argument, "a folder of results"))
        console.print(f"{len(draw(folder))} charts in {folder}")


if __name__ == "__main__":
    cli.run(main)
