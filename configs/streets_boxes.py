"""Boxes on generated streets, in minutes: a tiny EVA-02 from scratch and FCOS.

Reproduces no published figure. It shows in small how much of what a detector finds in clear weather
it finds at night, in rain, in fog and at dusk. The five domains show the same worlds, so only
appearance costs points.

Expected, AP50 % (voc07): not measured.
Hardware and time: 2 cores of an x86 CPU; not measured.

    python -m jaxdg.train --config configs/streets_boxes.py --workdir runs/streets_boxes
"""

from jaxdg.config import Config


def get_config() -> Config:
    """The experiment."""
    c = Config(steps=1500, batch_size=4, log_every=50, eval_every=1500, checkpoint_every=500)
    c.task = "detection"
    c.data.crop = (128, 256)
    # This run is too short to profit from augmentation.
    c.data.scale = (1.0, 1.0)
    c.data.brightness = 0.0
    c.data.contrast = 0.0
    c.model.encoder = "scratch_eva02_ti8"
    c.model.decoder = "fcos"
    c.model.fcos.channels = 64
    c.optimizer.learning_rate = 1.2e-3
    c.optimizer.betas = (0.9, 0.98)
    c.optimizer.warmup_steps = 50
    c.optimizer.clip = 1.0
    return c
