r"""Cityscapes -> night, snow, rain or a game that a phrase alone describes, and GTA5 -> Cityscapes:
PODA, in segmentation.

    jaxdg train --config poda_segmentation:source --workdir runs/poda_source
    jaxdg mine --config poda_segmentation:night --out weights/poda_night.safetensors
    jaxdg train --config poda_segmentation:night --workdir runs/poda_night

and likewise `snow`, `rain` and `gta5`; `gta5_source` and `real` for GTA5 -> Cityscapes. One model a
phrase: it knows by name where it will be judged.

Reproduces: Fahes et al. (ICCV 2023, code at 38c917c). CLIP's ResNet-50 stays frozen. Each source
image gives a style: mean and deviation of the channels behind stage 1, by 100 steps of SGD towards
the phrase's embedding, from crops of 768, over 80 templates. From the source model's weights, 2000
steps of 8 crops then train the decoder on features of which every image has a random style.
Differs: the decoder is SegFormer's MLP on all four stages and not DeepLabV3+ on a dilated encoder,
so the deepest stage has 32 pixels a feature and not 16. The checkpoint of the last step counts in
the source phase too; theirs is the best on the source's validation images.

Expected, mIoU % on ACDC's validation images of the condition, GTA5 or Cityscapes:
    this file                                      not measured

Data: cityscapes, acdc and gta5 as downloaded, below the data root.
Weights: OpenAI's RN50, converted as `clip_rn50` and `clip_rn50_text`.
Hardware: GPUs; not yet run here. `carla_edits:statistics` runs the mechanism in small.
"""

from jaxdg.config import Config, OptimizerConfig
from jaxdg.text.templates import IMAGENET

# The phrase and the domain of each target, and the source.
TARGETS = {
    "night": ("driving at night", "acdc/night", "cityscapes"),
    "snow": ("driving in snow", "acdc/snow", "cityscapes"),
    "rain": ("driving under rain", "acdc/rain", "cityscapes"),
    "gta5": ("driving in a game", "gta5", "cityscapes"),
    "real": ("driving", "cityscapes", "gta5"),
}
SOURCES = {"source": "cityscapes", "gta5_source": "gta5"}


def get_config(phase: str = "source") -> Config:
    """The experiment of a phase: source, gta5_source, or a target."""
    if phase not in (*SOURCES, *TARGETS):
        raise ValueError(
            f"poda_segmentation:{phase}; allowed behind the colon:"
            f" {', '.join((*SOURCES, *TARGETS))}"
        )
    c = Config(log_every=50)
    c.data.workers = 8
    c.data.crop = (768, 768)
    c.data.scale = (1.0, 1.0)
    c.model.encoder = "clip_rn50"
    c.model.weights = "weights/clip_rn50.safetensors"
    c.model.freeze = "all"
    c.model.decoder = "segformer"
    c.optimizer = OptimizerConfig(
        rule="sgd",
        learning_rate=0.1,
        min_learning_rate=1e-6,
        weight_decay=1e-4,
        weight_decay_factors=(),
        clip=0.0,
    )
    c.evaluation.stride = (512, 512)
    if phase in SOURCES:
        c.steps = c.eval_every = 200_000
        c.checkpoint_every = 10_000
        c.batch_size = 2
        c.data.source = SOURCES[phase]
        c.data.brightness = 32.0
        c.data.contrast = c.data.saturation = 0.5
        c.evaluation.domains = tuple(d for _, d, s in TARGETS.values() if s == c.data.source)
        return c
    prompt, domain, c.data.source = TARGETS[phase]
    c.steps = c.eval_every = c.checkpoint_every = 2000
    c.batch_size = 8
    c.data.flip = c.data.brightness = c.data.contrast = 0.0
    c.model.start = f"runs/poda_{'source' if c.data.source == 'cityscapes' else 'gta5_source'}"
    c.optimizer.learning_rate = 0.01
    c.evaluation.domains = (c.data.source, domain)
    e = c.edits
    e.on = True
    e.file = f"weights/poda_{phase}.safetensors"
    e.form = "statistics"
    e.place = 0
    e.prompts = (prompt,)
    e.probability = 1.0
    e.relu = True
    styles(c, 768)
    return c


def styles(c: Config, crop: int) -> None:
    """How PODA mines, from crops of so many pixels."""
    m = c.edits.mining
    m.text_weights = f"weights/{c.model.encoder}_text.safetensors"
    m.templates = IMAGENET
    m.steps = 100
    m.learning_rate = 1.0
    m.batch = 16
    m.crop = m.size = crop
    m.pool = 56
    m.relu = True
