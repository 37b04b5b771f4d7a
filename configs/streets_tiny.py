"""Generated streets, a tiny vision transformer from scratch, a linear decoder: the whole path in minutes on two CPU cores.

Reproduces no published figure; it shows the question of the paper in small: how much of what is learned in clear weather is left at night,
in rain, in fog and at dusk. The five domains show the same worlds, so every point lost is lost to appearance.

Expected, mIoU %: clear 38.0; unseen: night 13.0, rain 23.8, fog 19.1, dusk_rain 11.3, their mean 16.8.
Hardware and time: 2 cores of an x86 CPU, 5:38 minutes, 6:10 with `pip install` into a bare virtual environment (one run, 2026-11-22).

    python -m jaxdg.train --config configs/streets_tiny.py --workdir runs/streets
"""

from jaxdg.config import Config


def get_config() -> Config:
    """The experiment."""
    c = Config(steps=1400, batch_size=4, log_every=50, eval_every=1400, checkpoint_every=350)
    c.data.crop = (128, 128)
    c.data.scale = (0.8, 1.25)
    c.model.encoder = "scratch_ti8"
    c.model.pyramid = "layer"
    c.optimizer.learning_rate = 1.5e-3
    c.optimizer.warmup_steps = 50
    c.optimizer.clip = 1.0
    c.optimizer.weight_decay_factors = ((r"bias$|norm|cls_token$|pos_embed$", 0.0),)
    return c
