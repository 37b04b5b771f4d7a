"""GTA5 -> real streets as the public re-implementation VLTSeg/VLTSeg trains, deviations included.

Reproduces:
- its encoder: learned positions are left random, and there is no `inner_attn_ln`;
- its schedule: constant for 500 steps, then polynomial;
- its learning rates: the pyramid, which is part of its backbone, learns at a tenth;
- its weight decay, which also reaches what a key "backbone" matches (the class token, the
  pyramid's norms, the norm in the MLPs) and the pixel decoder's level embedding.
All else is configs/gta5_eva02.py.

Expected, mIoU % on Cityscapes val, BDD100K val, Mapillary val, ACDC val:
    published by the re-implementation             65.2 / 59.6 / 66.1 / 62.3
    this file                                      not measured

Data, weights and hardware: as in configs/gta5_eva02.py.

    python -m jaxdg.train --config configs/gta5_eva02_repro.py --workdir runs/gta5_eva02_repro
"""

from configs import gta5_eva02
from jaxdg.config import Config


def get_config(source: str = "gta5") -> Config:
    """The experiment from `source`: gta5 or synthia."""
    c = gta5_eva02.get_config(source)
    c.model.encoder = "eva02_clip_l14_vltseg_repro"
    c.optimizer.hold_steps = 500
    c.optimizer.learning_rate_factors = ((r"^pyramid\.", 0.1),)
    c.optimizer.weight_decay_factors = (
        (r"^backbone\.(pos_embed$|blocks\.\d+\.norm[12]\.)", 0.0),
        (r"^(backbone|pyramid|head\.pixel_decoder\.level_embed$)", 1.0),
        (r"norm|(query|level)_embed$|query_feat$", 0.0),
    )
    return c
