"""GTA5 -> real streets with OpenAI's CLIP L/14: the recipe of VLTSeg (Hümmer et al. 2024, arXiv 2312.02021), with a linear decoder.

Reproduces: the paper's other vision-language encoder, with everything else as in configs/gta5_eva02.py, which says what differs from the
paper. Images are normalised with CLIP's own statistics.

Expected, mIoU % on Cityscapes val, BDD100K val, Mapillary val, ACDC val, mean:
    published, Mask2Former decoder               55.6 / 52.5 / 59.9 / 51.5, 54.9
    published, the same with a frozen encoder    53.2 / 49.8 / 57.1 / 45.0, 51.2    (--config.model.freeze=all)
    this file with its linear decoder            not measured

Data and hardware: as in configs/gta5_eva02.py.

    python conversion/torch_to_flax.py --model clip_l14 --checkpoint ViT-L-14.pt --out weights/clip_l14.safetensors
    python -m jaxdg.train --config configs/gta5_clip.py --workdir runs/gta5_clip
"""

from jaxdg.config import Config
from jaxdg.data.datasets import FolderOptions

TRAIN_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # Cityscapes ids in the order of the 19 classes


def get_config() -> Config:
    """The experiment."""
    c = Config(steps=5000, batch_size=16, log_every=50, eval_every=0, checkpoint_every=500)
    c.data.source = "gta5"
    c.data.folder = FolderOptions(
        images="gta5/images",
        labels="gta5/labels",
        id_map={cityscapes: train for train, cityscapes in enumerate(TRAIN_IDS)},
        ignore=(*(i for i in range(35) if i not in TRAIN_IDS), 255),
    )
    c.data.workers = 8
    c.data.crop = (512, 512)
    c.data.scale = (1280 / 1914, 1280 / 1914)
    c.data.max_class_share = 0.75
    c.data.brightness = 32.0
    c.data.contrast = 0.5
    c.model.encoder = "clip_l14"
    c.model.weights = "weights/clip_l14.safetensors"
    c.model.taps = (9, 14, 19, 23)
    c.model.pyramid = "batch"
    c.model.drop_path = 0.2
    c.evaluation.domains = ("gta5",)
    c.evaluation.stride = (426, 426)
    return c
