"""Generated streets, a tiny vision transformer from scratch, a linear decoder: the whole path in minutes on two CPU cores."""

from jaxdg.config import Config


def get_config() -> Config:
    """The experiment."""
    c = Config(steps=900, batch_size=8, log_every=20, eval_every=450, checkpoint_every=150)
    c.data.crop = (128, 128)
    c.optimizer.learning_rate = 1e-3
    c.optimizer.clip = 1.0
    c.optimizer.warmup_steps = 50
    return c
