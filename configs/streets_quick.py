"""Generated streets, in minutes: a tiny EVA-02 from scratch and a linear decoder.

Reproduces no published figure. It asks the paper's question on the smallest scale: how much of what
a model learns in clear weather is left at night, in rain, in fog and at dusk. The five domains show
the same worlds, so only appearance costs points. `streets_tiny` is the longer run.

Expected, mIoU %: clear 38.4; unseen: night 13.0, rain 17.8, fog 13.2, dusk_rain 13.1, mean 14.3.
Hardware and time: 2:11 minutes on 2 cores of an x86 CPU, with `pip install` into a bare virtual
environment (one run, 2026-11-30).

    python -m jaxdg.train --config configs/streets_quick.py --workdir runs/streets
"""

from jaxdg.config import Config


def get_config() -> Config:
    """The experiment."""
    c = Config(steps=1000, batch_size=4, log_every=50, eval_every=1000, checkpoint_every=1000)
    c.data.crop = (128, 128)
    # This run is too short to profit from augmentation.
    c.data.scale = (1.0, 1.0)
    c.data.brightness = 0.0
    c.data.contrast = 0.0
    # Without rare-class sampling walls, trains and motorcycles are hardly ever seen.
    c.data.rare_class_temperature = 0.01
    c.data.rare_class_min_pixels = 100
    c.model.encoder = "scratch_eva02_ti8"
    c.model.pyramid = "none"
    c.model.decoder = "linear"
    c.optimizer.learning_rate = 2e-3
    c.optimizer.betas = (0.9, 0.98)
    c.optimizer.warmup_steps = 50
    c.optimizer.clip = 1.0
    c.average.on = True
    c.average.momentum = 0.01
    return c
