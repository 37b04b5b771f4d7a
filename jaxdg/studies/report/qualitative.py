"""Draws images of a study: image, truth, the models' predictions, and the best model's errors."""

from pathlib import Path

import numpy as np

from jaxdg.evaluation import results
from jaxdg.report import tiles
from jaxdg.report.document import Pictures
from jaxdg.studies.report.study_json import Study

MODELS = 4  # side by side
IMAGES = 2  # of a domain


def pictures(study: Study) -> list[Pictures]:
    """A grid for each domain of which the runs stored images."""
    models = _models(study)
    grids = []
    for domain, entry in study.entries().items():
        names = {name for _, folder in models for name in tiles.files_of(folder, domain)}
        images = [
            [(model, folder / name) for model, folder in models if (folder / name).is_file()]
            for name in sorted(names, key=tiles.number)[:IMAGES]
        ]
        if images:
            which = results.mark(domain, entry, study.json["source"]).strip(" ()") or "unseen"
            if share := results.share(entry):
                which = f"{which}; {results.JUDGED}: {share}"
            boxes = study.score == "mAP50"
            classes = list(entry["AP50" if boxes else "IoU"])
            caption = f"Images of {domain} ({which})."
            name = domain.replace("/", "_")
            grids.append(tiles.grid(name, images, classes, caption, boxes=boxes))
    return grids


def _models(study: Study) -> list[tuple[str, Path]]:
    """Names and picture folders of the models to show.

    The best on unseen domains comes first; the others are spread over the ranking.
    """
    ranked = study.ranked() or [group for group in study.groups if study.finished(group)]
    if not ranked:
        return []
    if len(ranked) == 1:  # seeds side by side
        models = [(f"seed {run['seed']}", run["name"]) for run in study.finished(ranked[0])]
    else:
        models = [(group["group"], study.finished(group)[0]["name"]) for group in ranked]
    places = np.linspace(0, len(models) - 1, min(MODELS, len(models))).round().astype(int)
    return [
        (models[i][0], study.folder / "runs" / models[i][1] / "qualitative")
        for i in np.unique(places)
    ]
