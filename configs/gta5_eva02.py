r"""Synthetic -> real streets with EVA-02-CLIP L/14 and Mask2Former: the main recipe of VLTSeg.

Reproduces: Hümmer et al. 2024 (arXiv 2312.02021): encoder, taps, pyramid, decoder, losses,
optimiser, schedule, crops, batch and augmentation, from GTA5 or SYNTHIA.
Differs: the pyramid learns at the decoder's rate.
Open in the paper: the strength of RandAugment and the taps of B/16.

Expected, mIoU % on Cityscapes val, BDD100K val, Mapillary val, ACDC val, mean:
    published, GTA5                                65.3 / 58.3 / 66.0 / 62.6, 63.1
    published, GTA5, frozen encoder                55.2 / 51.3 / 57.4 / 47.3, 52.8
    published, SYNTHIA                             56.8 / 51.9 / 55.1 / 48.5, 53.1
    published, SYNTHIA, frozen encoder             48.3 / 42.6 / 46.4 / 37.1, 43.6
    this file                                      not measured

Data: gta5 (24 966 images) or synthia (9 400), cityscapes, bdd100k, mapillary (v1.2) and acdc as
downloaded, below the data root.
Hardware: two GPUs and float32, as the public re-implementation; not yet run here. Less memory is
needed with --config.model.remat=True and --config.model.dtype=bfloat16. A GPU moves less memory
with --config.model.unroll=True and --config.model.mask2former.unroll=True, which take longer to
compile.

`:synthia` trains on SYNTHIA; --config.model.freeze=all freezes the encoder.

    python conversion/torch_to_flax.py --model eva02_clip_l14 \
        --checkpoint EVA02_CLIP_L_psz14_s4B.pt --out weights/eva02_clip_l14.safetensors
    python -m jaxdg.train --config configs/gta5_eva02.py --workdir runs/gta5_eva02
    python -m jaxdg.train --config configs/gta5_eva02.py:synthia --workdir runs/synthia_eva02

The re-implementation found it slightly better to train the decoder first: 1 000 steps with a frozen
encoder at a constant rate, then this recipe. Its pyramid is part of its encoder and is frozen too;
--config.model.freeze='^(backbone|pyramid)\.' in the first command does the same.

    python -m jaxdg.train --config configs/gta5_eva02.py --workdir runs/gta5_frozen \
        --config.steps=1000 --config.model.freeze=all --config.optimizer.power=0 \
        --config.eval_every=0
    python -m jaxdg.train --config configs/gta5_eva02.py --workdir runs/gta5_eva02 \
        --config.model.start=runs/gta5_frozen --config.model.drop_path=0.15

The paper's studies compare the encoders, blocks and augmentations of its figures. `python -m
jaxdg.studies.pretraining`, `freezing` (of B/16) and `corruptions` take this file, `transfer` takes
configs/cityscapes_eva02.py. SegFormer and the successors (DINOv2, DINOv3, SigLIP 2) get this
decoder and recipe as well.
"""

from jaxdg.config import Config
from jaxdg.studies.study import StudyOptions


def get_config(source: str = "gta5") -> Config:
    """The experiment from `source`: gta5 or synthia."""
    c = Config(steps=5000, batch_size=16, log_every=50, eval_every=5000, checkpoint_every=500)
    c.data.source = source
    c.data.workers = 8
    c.data.resize = (720, 1280)
    c.data.crop = (512, 512)
    c.data.scale = (1.0, 1.0)
    c.data.max_class_share = 0.75
    c.data.brightness = 32.0
    c.data.contrast = 0.5
    c.data.saturation = 0.5
    c.data.hue = 18.0
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


def get_study() -> StudyOptions:
    """What the studies compare."""

    def encoder(name, **model):
        fields = {"encoder": name, "weights": f"weights/{name}.safetensors", **model}
        return {f"model.{field}": value for field, value in fields.items()}

    supervised = encoder("augreg_l16")
    randaugment = {"data.randaugment": (2, 9.0)}
    pixmix = {"data.pixmix": (4, 4.0)}
    return StudyOptions(
        encoders={
            "SegFormer MiT-B5": encoder("mit_b5", taps=(), pyramid="none"),
            "Supervised L/16": supervised,
            "MoCo-v3 L/16": encoder("mocov3_l16"),
            "DeiT-III L/16": encoder("deit3_l16"),
            "SAM L/16": encoder("sam_l16"),
            "LDM": encoder("sd15_vpd", taps=(), pyramid="none", drop_path=0.0),
            "CLIP L/14": encoder("clip_l14"),
            "EVA-02-CLIP L/14": {},
            "DINOv2 L/14": encoder("dinov2_l14"),
            "DINOv3 L/16": encoder("dinov3_l16"),
            "SigLIP 2 L/16": encoder("siglip2_l16"),
        },
        models={
            "Supervised L/16": supervised,
            "Supervised L/16 + RandAugment": {**supervised, **randaugment},
            "Supervised L/16 + PixMix": {**supervised, **pixmix},
            "EVA-02-CLIP L/14": {},
            "EVA-02-CLIP L/14 + RandAugment": randaugment,
            "EVA-02-CLIP L/14 + PixMix": pixmix,
            "EVA-02-CLIP L/14 + TLDR": {"tldr.on": True},
        },
        settings={
            "freezing": encoder("eva02_clip_b16", taps=()),
            "corruptions": {"evaluation.domains": ("cityscapes",)},
        },
    )
