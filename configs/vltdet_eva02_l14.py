r"""One source -> unseen weather with EVA-02-CLIP L/14 and ViTDet: VLTDet (no code published).

Reproduces: plain fine-tuning of a ViTDet (simple feature pyramid, cascade) on the EVA-02-CLIP
encoder, on one domain, by VLTSeg's authors. What they leave open is ViTDet's (Li et al. 2022,
detectron2's projects/ViTDet): patches of 16, AdamW, weight decay 0.1, layer-wise rates of 0.8, drop
path 0.4, windows of 16x16 tokens in all but four blocks, scales of 0.1 to 2. The learning rate is
its 1e-4 for 64 images a step, in proportion to the batch.
Differs from ViTDet: images of 16:9 instead of squares; a class token that every window sees; the
rate decays polynomially; boxes only.

Expected, AP50 % (voc07) on daytime_clear | night_sunny, dusk_rainy, night_rainy, daytime_foggy,
mean of these four:
    published                                      56.6 | 44.4 43.6 26.6 41.8, 39.1
    this file                                      not measured
Expected, COCO AP50 % on Cityscapes, BDD100K, ACDC | rPD % (evaluation.protocol coco):
    published, from Cityscapes                     59.7 39.6 44.3 | 70.2
    published, from BDD100K                        46.6 49.2 34.5 | 82.4
    published, from ACDC                           44.9 31.0 48.3 | 78.6
    published, from SYNTHIA                        not published
    this file                                      not measured

Open: steps, batch, image size and augmentation of the published runs. Night-rainy holds 49 motors:
report three seeds and their spread.
Data: diverse_weather, or the named datasets with their instance labels, below the data root.
Hardware: GPUs with bfloat16; not yet run here.

The file's argument names another source: `:cityscapes`, `:bdd100k`, `:acdc` or `:synthia`.

    python conversion/torch_to_flax.py --model eva02_clip_l14 \
        --checkpoint EVA02_CLIP_L_psz14_s4B.pt --out weights/eva02_clip_l14.safetensors
    python -m jaxdg.train --config configs/vltdet_eva02_l14.py --workdir runs/vltdet
    python -m jaxdg.train --config configs/vltdet_eva02_l14.py:cityscapes \
        --workdir runs/vltdet_cityscapes
"""

from jaxdg.config import Config

DEPTH = 24
DECAY = 0.8


def get_config(source: str = "daytime_clear") -> Config:
    """The experiment from `source`: daytime_clear, cityscapes, bdd100k, acdc or synthia."""
    c = Config(steps=20_000, batch_size=16, log_every=50, eval_every=20_000, checkpoint_every=1000)
    c.task = "detection"
    c.data.source = source
    c.data.workers = 8
    c.data.crop = c.data.resize = (720, 1280)
    c.data.keep_ratio = True
    c.data.scale = (0.1, 2.0)
    c.data.brightness = c.data.contrast = 0.0
    c.model.encoder = "eva02_clip_l14"
    c.model.weights = "weights/eva02_clip_l14.safetensors"
    c.model.patch_size = 16
    c.model.window = 16
    c.model.decoder = "cascade_rcnn"
    c.model.drop_path = 0.4
    c.model.remat = True
    c.model.dtype = "bfloat16"
    o = c.optimizer
    o.learning_rate = 1e-4 * c.batch_size / 64
    o.encoder_factor = 1.0
    o.learning_rate_factors = (
        *((rf"^backbone\.blocks\.{i}\.", DECAY ** (DEPTH - i)) for i in range(DEPTH)),
        (r"^backbone\.(patch_embed|pos_embed|cls_token)", DECAY ** (DEPTH + 1)),
    )
    o.warmup_steps = 250
    o.weight_decay = 0.1
    o.clip = 0.0
    if source == "daytime_clear":
        c.evaluation.domains = (source, "night_sunny", "dusk_rainy", "night_rainy", "daytime_foggy")
    else:
        c.data.max_boxes = 300
        c.evaluation.domains = ("cityscapes", "bdd100k", "acdc")
        c.evaluation.protocol = "coco"
    return c
