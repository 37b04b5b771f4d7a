"""Generated streets, a tiny vision transformer from scratch, a linear decoder: the whole path in minutes on two CPU cores."""

from jaxdg.config import Config


def get_config() -> Config:
    """The experiment."""
    c = Config(steps=650, batch_size=8, log_every=25, eval_every=650, checkpoint_every=130)
    c.data.crop = (128, 128)
    c.data.scale = (0.8, 1.25)
    c.optimizer.learning_rate = 2e-3
    c.optimizer.clip = 1.0
    c.optimizer.warmup_steps = 50
    return c
