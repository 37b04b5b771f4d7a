r"""GTA5 -> real streets with EVA-02-CLIP L/14 and Mask2Former: the recipe of VLTSeg (Hümmer et al. 2024, arXiv 2312.02021).

Reproduces: the paper's encoder, taps, pyramid, decoder, losses, optimiser, schedule, crops and batch. Differs: images are scaled by one
factor to 1280x704 instead of 1280x720; photometric distortion is brightness and contrast; the pyramid learns at the decoder's rate.

Expected, mIoU % on Cityscapes val, BDD100K val, Mapillary val, ACDC val, mean:
    published                                    65.3 / 58.3 / 66.0 / 62.6, 63.1
    published, the same with a frozen encoder    55.2 / 51.3 / 57.4 / 47.3, 52.8    (--config.model.freeze=all)
    this file                                    not measured

Data: GTA5 as downloaded, all 24 966 images in gta5/images and their palette PNGs with Cityscapes ids in gta5/labels below the data root.
It has no validation split, so nothing is evaluated while training; judge the checkpoint on other domains with jaxdg.evaluate.
Hardware: two GPUs and float32, as the public re-implementation; not yet run here. For less memory: --config.model.remat=True and
--config.model.dtype=bfloat16.

    python conversion/torch_to_flax.py --model eva02_clip_l14 --checkpoint EVA02_CLIP_L_psz14_s4B.pt \
        --out weights/eva02_clip_l14.safetensors
    python -m jaxdg.train --config configs/gta5_eva02.py --workdir runs/gta5_eva02

Frozen first, which the re-implementation found to be slightly better: 1 000 steps with a frozen encoder at a constant rate, then this.
Its pyramid is part of its encoder and frozen with it: --config.model.freeze='^(backbone|pyramid)\.' in the first command.

    python -m jaxdg.train --config configs/gta5_eva02.py --workdir runs/gta5_frozen --config.steps=1000 --config.model.freeze=all \
        --config.optimizer.power=0
    python -m jaxdg.train --config configs/gta5_eva02.py --workdir runs/gta5_eva02 --config.model.start=runs/gta5_frozen \
        --config.model.drop_path=0.15
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
    c.model.encoder = "eva02_clip_l14"
    c.model.weights = "weights/eva02_clip_l14.safetensors"
    c.model.taps = (9, 14, 19, 23)
    c.model.pyramid = "batch"
    c.model.decoder = "mask2former"
    c.model.drop_path = 0.2
    c.evaluation.domains = ("gta5",)
    c.evaluation.stride = (426, 426)
    return c
