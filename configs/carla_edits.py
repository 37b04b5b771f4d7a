r"""CARLA's towns 01 to 04 -> the unseen town 05, with edits of features that pictures guide.

Reproduces no published figure. It exercises the mechanism of CLIP the Gap (`offset`) and of PODA
(`statistics`) on configs/carla_vit_tiny.py: edits are mined once against the frozen ViT-Ti and
drawn in training, in half of the batches. The encoder has no text tower. So nothing here shows that
a *text* finds a direction: targets are mean embeddings of corrupted training images, directions
those from the same images clean, and embeddings are the mean of the last block's patches after a
LayerNorm without parameters.

    offset        behind block 8 of 12, as stage 3 of 4 of a ResNet
    statistics    behind block 2 of 12, as stage 1 of 4; without a ReLU, which a residual stream is
                  not behind

A gain counts beside its controls alone: random offsets of equal length and permuted channels of the
mined ones; the corrupted images' own statistics, which nothing mined, and those of clean images
(mining.steps 0). Judge on town05 clean and under corruptions that are not among the prompts, over
three seeds; the baseline's spread is 0.8 on vehicles.

Expected, AP50 % (voc07) of vehicles on town05:
    configs/carla_vit_tiny.py                     62.5 (0.8)
    this file                                     not measured

Data, weights and hardware: as in configs/carla_vit_tiny.py.

    jaxdg mine --config carla_edits:offset --out weights/carla_offset.safetensors
    jaxdg train --config carla_edits:offset --workdir runs/carla_offset
    jaxdg mine --config carla_edits:offset --control random \
        --of weights/carla_offset.safetensors --out weights/carla_random.safetensors
    jaxdg train --config carla_edits:offset --workdir runs/carla_random \
        --config.edits.file=weights/carla_random.safetensors
"""

from configs import carla_vit_tiny
from jaxdg.config import Config


def get_config(form: str = "offset") -> Config:
    """The experiment with edits of `form`: offset or statistics."""
    if form not in ("offset", "statistics"):
        raise ValueError(f"carla_edits:{form}; allowed behind the colon: offset, statistics")
    c = carla_vit_tiny.get_config()
    e = c.edits
    e.on = True
    e.file = f"weights/carla_{form}.safetensors"
    e.guide = "images"
    e.prompts = ("fog", "snow", "frost", "brightness")
    m = e.mining
    m.crop = m.size = 256
    if form == "offset":
        e.place = 8
        m.steps = 200
        m.crops = 1
    else:
        e.form = "statistics"
        e.place = 2
        m.steps = 50
        m.learning_rate = 1.0
        m.images = 32
        m.size = 192
    return c
