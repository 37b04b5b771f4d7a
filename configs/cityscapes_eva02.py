"""One real dataset -> the others with EVA-02-CLIP L/14 and Mask2Former (VLTSeg, arXiv 2312.02021).

Reproduces: the paper's recipe with Cityscapes, BDD100K, Mapillary or ACDC as the source. Steps,
batch, crops and image sizes are set here; all else, with weights and differences, is
configs/gta5_eva02.py.

Expected, mIoU % on Cityscapes val, BDD100K val, Mapillary val, ACDC val | rPD %:
    published, from Cityscapes                     85.0 / 66.0 / 77.2 / 73.3 | 84.9
    published, from BDD100K                        78.9 / 72.5 / 75.9 / 71.3 | 104.0
    published, from Mapillary                      81.6 / 69.2 / 83.8 / 74.2 | 89.5
    published, from ACDC                           78.8 / 65.0 / 74.1 / 80.0 | 90.8
    this file                                      not measured

Data: the four datasets as downloaded, below the data root.
Hardware: 1024x1024 crops, 8 a step; not yet run here.

The first command trains on Cityscapes; `:bdd100k`, `:mapillary` and `:acdc` name the other sources.
The last command trains on all four.

    python -m jaxdg.train --config configs/cityscapes_eva02.py --workdir runs/cityscapes
    python -m jaxdg.train --config configs/cityscapes_eva02.py:bdd100k --workdir runs/bdd100k
    python -m jaxdg.studies.transfer --config configs/cityscapes_eva02.py --workdir runs/transfer
"""

from configs import gta5_eva02
from jaxdg.config import Config
from jaxdg.studies.study import StudyOptions


def get_config(source: str = "cityscapes") -> Config:
    """The experiment from `source`: cityscapes, bdd100k, mapillary or acdc."""
    c = gta5_eva02.get_config(source)
    c.steps = 20_000
    c.batch_size = 8
    c.eval_every = 20_000
    c.data.resize = (1080, 1920) if source == "acdc" else (1024, 2048)
    c.data.crop = (1024, 1024)
    c.evaluation.stride = (768, 768)
    return c


def get_study() -> StudyOptions:
    """What the studies compare."""
    sources = ("cityscapes", "bdd100k", "mapillary", "acdc")
    return StudyOptions(
        sources={source: {"data.resize": get_config(source).data.resize} for source in sources}
    )
