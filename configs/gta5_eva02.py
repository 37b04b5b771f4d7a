r"""Synthetic -> real streets with EVA-02-CLIP L/14 and Mask2Former: the recipe of VLTSeg (Hümmer et al. 2024, arXiv 2312.02021).

Reproduces: the paper's encoder, taps, pyramid, decoder, losses, optimiser, schedule, crops, batch and augmentation, from GTA5 or SYNTHIA.
Differs: the pyramid learns at the decoder's rate.

Expected, mIoU % on Cityscapes val, BDD100K val, Mapillary val, ACDC val, mean:
    published, GTA5                                65.3 / 58.3 / 66.0 / 62.6, 63.1
    published, GTA5, with a frozen encoder         55.2 / 51.3 / 57.4 / 47.3, 52.8    (--config.model.freeze=all)
    published, SYNTHIA                             56.8 / 51.9 / 55.1 / 48.5, 53.1
    published, SYNTHIA, with a frozen encoder      48.3 / 42.6 / 46.4 / 37.1, 43.6
    this file                                      not measured

Data: gta5 (24 966 images) or synthia (9 400), cityscapes, bdd100k, mapillary (v1.2) and acdc as downloaded, below the data root.
Hardware: two GPUs and float32, as the public re-implementation; not yet run here. For less memory: --config.model.remat=True and
--config.model.dtype=bfloat16.

    python conversion/torch_to_flax.py --model eva02_clip_l14 --checkpoint EVA02_CLIP_L_psz14_s4B.pt \
        --out weights/eva02_clip_l14.safetensors
    python -m jaxdg.train --config configs/gta5_eva02.py --workdir runs/gta5_eva02
    python -m jaxdg.train --config configs/gta5_eva02.py:synthia --workdir runs/synthia_eva02

Frozen first, which the re-implementation found to be slightly better: 1 000 steps with a frozen encoder at a constant rate, then this.
Its pyramid is part of its encoder and frozen with it: --config.model.freeze='^(backbone|pyramid)\.' in the first command.

    python -m jaxdg.train --config configs/gta5_eva02.py --workdir runs/gta5_frozen --config.steps=1000 --config.model.freeze=all \
        --config.optimizer.power=0 --config.eval_every=0
    python -m jaxdg.train --config configs/gta5_eva02.py --workdir runs/gta5_eva02 --config.model.start=runs/gta5_frozen \
        --config.model.drop_path=0.15
"""

from jaxdg.config import Config


def get_config(source: str = "gta5") -> Config:
    """The experiment from `source`: gta5 or synthia."""
    c = Config(steps=5000, batch_size=16, log_every=50, eval_every=5000, checkpoint_every=500)
    c.data.source = source
    c.data.workers = 8
    c.data.resize = (720, 1280)
    c.data.crop = (512, 512)
    c.data.scale = (1.0, 1.0)
    c.data.max_class_share = 0.75
    c.data.brightness, c.data.contrast, c.data.saturation, c.data.hue = 32.0, 0.5, 0.5, 18.0
    c.data.distortion_probability = 0.5
    c.model.encoder = "eva02_clip_l14"
    c.model.weights = "weights/eva02_clip_l14.safetensors"
    c.model.taps = (9, 14, 19, 23)
    c.model.pyramid = "batch"
    c.model.decoder = "mask2former"
    c.model.drop_path = 0.2
    c.evaluation.protocol = "vltseg"
    c.evaluation.domains = ("cityscapes", "bdd100k", "mapillary", "acdc")
    c.evaluation.stride = (426, 426)
    return c
