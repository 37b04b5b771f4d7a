r"""GTA5 -> real streets with OpenAI's CLIP L/14 and Mask2Former (VLTSeg, arXiv 2312.02021).

Reproduces: the paper's other vision-language encoder. All else is configs/gta5_eva02.py, which
says what differs from the paper. Images are normalised with CLIP's own statistics.

Expected, mIoU % on Cityscapes val, BDD100K val, Mapillary val, ACDC val, mean:
    published, GTA5                                55.6 / 52.5 / 59.9 / 51.5, 54.9
    published, GTA5, frozen encoder                53.2 / 49.8 / 57.1 / 45.0, 51.2
    published, SYNTHIA                             51.1 / 44.7 / 50.6 / 40.7, 46.8
    published, SYNTHIA, frozen encoder             46.1 / 41.8 / 45.8 / 35.1, 42.2
    this file                                      not measured

`configs/gta5_clip.py:synthia` trains on SYNTHIA; --config.model.freeze=all freezes the encoder.
Data and hardware: as in configs/gta5_eva02.py.

    python conversion/torch_to_flax.py --model clip_l14 --checkpoint ViT-L-14.pt \
        --out weights/clip_l14.safetensors
    python -m jaxdg.train --config configs/gta5_clip.py --workdir runs/gta5_clip
"""

from configs import gta5_eva02
from jaxdg.config import Config


def get_config(source: str = "gta5") -> Config:
    """The experiment from `source`: gta5 or synthia."""
    c = gta5_eva02.get_config(source)
    c.model.encoder = "clip_l14"
    c.model.weights = "weights/clip_l14.safetensors"
    return c
