"""CamVid by day in one town -> another place by day and dusk: a real pre-trained ViT-Ti/16 and a linear decoder."""

from jaxdg.config import Config


def get_config() -> Config:
    """The experiment."""
    c = Config(steps=600, batch_size=8, log_every=20, eval_every=600, checkpoint_every=100)
    c.data.source = "camvid"
    c.data.crop = (256, 256)
    c.data.scale = (0.75, 1.5)
    c.model.encoder = "augreg_ti16"
    c.model.weights = "weights/augreg_ti16.safetensors"
    c.model.pyramid = "none"
    c.optimizer.learning_rate = 1e-3
    c.optimizer.clip = 1.0
    c.evaluation.domains = ("camvid", "day", "dusk")
    c.evaluation.stride = (112, 112)
    return c
