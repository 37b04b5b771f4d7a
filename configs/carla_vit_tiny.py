r"""CARLA's towns 01 to 04 -> the unseen town 05: a pre-trained ViT-Ti/16 and FCOS.

Reproduces no published figure. It shows for boxes how much pre-training helps in an unseen place.

Expected, AP50 % (voc07) of vehicles on town05, mean of three seeds (their spread):
    this file                                     62.5 (0.8)
    from scratch (--config.model.weights=None)     4.0 (2.5)

Hardware and time: 16 to 20 minutes a run on one core of an x86 CPU beside other work (2026-11-23).
Data: the towns of the Carla-Object-Detection-Dataset (640x380 pixels, boxes in VOC's form) as
`carla_towns/town01/VOC2007` and so on, below the data root.
Weights: timm's vit_tiny_patch16_224.augreg_in21k_ft_in1k.

    python conversion/torch_to_flax.py --model augreg_ti16 \
        --checkpoint vit_tiny_patch16_224.safetensors --out weights/augreg_ti16.safetensors
    python -m jaxdg.train --config configs/carla_vit_tiny.py --workdir runs/carla \
        --config.data.root=DATA
    python -m jaxdg.train --config configs/carla_vit_tiny.py --workdir runs/scratch \
        --config.data.root=DATA --config.model.weights=None
"""

from jaxdg.config import Config


def get_config() -> Config:
    """The experiment."""
    c = Config(steps=400, batch_size=4, log_every=20, eval_every=400, checkpoint_every=200)
    c.task = "detection"
    c.data.source = "carla"
    c.data.crop = c.data.resize = (256, 448)
    c.data.keep_ratio = True
    c.data.scale = (0.8, 1.5)
    c.data.max_boxes = 20
    c.model.encoder = "augreg_ti16"
    c.model.weights = "weights/augreg_ti16.safetensors"
    c.model.decoder = "fcos"
    c.model.fcos.channels = 128
    c.optimizer.learning_rate = 1e-3
    c.optimizer.warmup_steps = 50
    c.optimizer.clip = 1.0
    c.evaluation.domains = ("carla", "town05")
    c.evaluation.batch_size = 8
    return c
