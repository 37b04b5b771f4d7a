r"""Clear days -> unseen weather with CLIP's ResNet-101: VLTDet's smaller model (no code published).

Reproduces: plain fine-tuning of a Faster R-CNN on CLIP's encoder, on one domain. Its authors name
the encoder only. The head is that of CLIP the Gap (Vidit et al. 2023), the earlier method on the
same encoder: proposals from the third stage, classified by the last stage and the attention pool
(C4), on images of 600 x 1067 pixels. The file's argument names a variant: `fpn` is a feature
pyramid with two linear layers; `c4_text` classifies by CLIP's embeddings of the class names, as
CLIP the Gap does.
Differs from CLIP the Gap: AdamW; nothing is frozen.

Expected, AP50 % (voc07) on daytime_clear | night_sunny, dusk_rainy, night_rainy, daytime_foggy,
mean of these four:
    published                                      60.5 | 44.6 38.4 22.1 42.3, 36.9
    published, CLIP the Gap                        51.3 | 36.9 32.3 18.7 38.5, 31.6
    this file                                      not measured

Open: the head, steps, batch, image size and augmentation of the published run.
Data and hardware: as in configs/vltdet_eva02_l14.py.

    python conversion/torch_to_flax.py --model clip_rn101 --checkpoint RN101.pt \
        --out weights/clip_rn101.safetensors
    python conversion/torch_to_flax.py --model clip_rn101_text --checkpoint RN101.pt \
        --out weights/clip_rn101_text.safetensors
    python -m jaxdg.train --config configs/vltdet_clip_rn101.py --workdir runs/vltdet_rn101
    python -m jaxdg.train --config configs/vltdet_clip_rn101.py:c4_text \
        --workdir runs/vltdet_rn101_text
"""

from configs import vltdet_eva02_l14
from jaxdg.config import Config, ModelConfig, OptimizerConfig


def get_config(head: str = "c4") -> Config:
    """The experiment with `head`: c4, c4_text or fpn."""
    if head not in ("c4", "c4_text", "fpn"):
        raise ValueError(
            f"configs/vltdet_clip_rn101.py:{head}; allowed behind the colon: c4, c4_text, fpn"
        )
    c = vltdet_eva02_l14.get_config()
    c.data.crop = c.data.resize = (600, 1067)
    c.data.scale = (1.0, 1.0)
    c.model = ModelConfig()
    c.optimizer = OptimizerConfig(learning_rate=1e-4, warmup_steps=250, clip=1.0)
    c.model.encoder = "clip_rn101"
    c.model.weights = "weights/clip_rn101.safetensors"
    c.model.dtype = "bfloat16"
    if head == "fpn":
        c.model.decoder = "faster_rcnn"
        c.model.faster_rcnn.rpn.convs = 1
        c.model.faster_rcnn.roi.convs = 0
        c.model.faster_rcnn.roi.fcs = 2
    else:
        c.model.decoder = "faster_rcnn_c4"
        c.model.text_weights = "weights/clip_rn101_text.safetensors" if head == "c4_text" else None
    return c
