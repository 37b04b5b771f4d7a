r"""Mapillary -> Cityscapes -> the test servers of Cityscapes and ACDC (VLTSeg, arXiv 2312.02021).

Reproduces: VLTSeg's submission. It trains 20 000 steps on Mapillary, then 40 000 on Cityscapes'
training images, and predicts in windows of 1024 with test-time augmentation. What the paper leaves
open follows configs/gta5_eva02.py.

Expected, mIoU % on Cityscapes test, ACDC test (unseen):
    published                                      86.4 / 77.9
    this file                                      not measured

Data: mapillary, cityscapes and acdc as downloaded, test images included, below the data root.
Hardware: as in configs/cityscapes_eva02.py.

    python -m jaxdg.train --config configs/cityscapes_eva02.py:mapillary --workdir runs/mapillary
    python -m jaxdg.train --config configs/cityscapes_test_server.py --workdir runs/test_server
    python -m jaxdg.submit --checkpoint runs/test_server --benchmark cityscapes --data_root DATA \
        --out submissions/cityscapes
    python -m jaxdg.submit --checkpoint runs/test_server --benchmark acdc --data_root DATA \
        --out submissions/acdc
"""

from configs import cityscapes_eva02
from jaxdg.config import Config


def get_config() -> Config:
    """The experiment: the second run of the chain."""
    c = cityscapes_eva02.get_config()
    c.steps = 40_000
    c.eval_every = 40_000
    c.model.weights = None
    c.model.start = "runs/mapillary"
    c.evaluation.domains = ("cityscapes", "acdc")
    return c
