r"""Clear days -> unseen weather with DINOv2-L, frozen or with SoMA's adapters, two-stage heads.

    jaxdg train --config weather_dinov2:METHOD[,HEAD] --workdir runs/X

METHOD is soma (the default: adapters of the smallest singular components) or frozen, HEAD is
cascade_rcnn (the default) or faster_rcnn, both on ViTDet's pyramid.

Reproduces: data, sizes, augmentation, optimiser, schedule, batch and steps of SoMA's detection
(Yun et al., CVPR 2025; ysj9909/SoMA at 48141b8, DGOD/): squares of 1024, scales of 0.1 to 2,
photometric distortion, AdamW at 2e-4 with 1500 steps of warm-up and a tenth after 24 000 and 32 000
of 40 000, an annealed decay, batches of 8. Their head is Co-DETR with 900 queries, which is not
here; a frozen encoder is no experiment of theirs.
Differs: the head; the mean colour around images is 0 after normalisation and theirs a grey of 114;
boxes under 32 pixels are no reason to drop an image; queries have no parameters here.

Expected, AP50 % (voc07, images fitted into 1024 x 1024) on daytime_clear | night_sunny, dusk_rainy,
night_rainy, daytime_foggy, mean of these four:
    published, SoMA with Co-DETR: to be beaten     69.4 | 59.3 59.3 47.6 51.0, 54.3
    published, frozen with Faster R-CNN                 | 55.4 59.0 43.4 50.6, 52.1
    this file                                      not measured
The second row is of Cauvis's paper, perhaps by its own protocol, which leaves small boxes out.

Data: diverse_weather below the data root. Weights: `--model dinov2_l14`.
Hardware: a GPU with bfloat16; not yet run here. benchmarks/RESULTS.md has what
`jaxdg plan --compile_for h100` predicts.

    jaxdg convert --model dinov2_l14 --checkpoint dinov2_vitl14_pretrain.pth \
        --out weights/dinov2_l14.safetensors
    jaxdg train --config weather_dinov2:soma --workdir runs/weather_soma
    jaxdg train --config weather_dinov2:frozen,faster_rcnn --workdir runs/weather_frozen
"""

from jaxdg.config import Config

METHODS = ("soma", "frozen")
HEADS = ("cascade_rcnn", "faster_rcnn")


def get_config(choice: str = "soma") -> Config:
    """The experiment of `choice`: METHOD and HEAD, by comma."""
    method, head, *more = [*choice.split(","), ""]
    head = head or HEADS[0]
    if any(more) or method not in METHODS or head not in HEADS:
        raise ValueError(
            f"weather_dinov2:{choice}; allowed: METHOD[,HEAD] with METHOD of {', '.join(METHODS)}"
            f" and HEAD of {', '.join(HEADS)}"
        )
    c = Config(steps=40_000, batch_size=8, log_every=50, eval_every=40_000, checkpoint_every=4000)
    c.task = "detection"
    d = c.data
    d.source = "daytime_clear"
    d.workers = 8
    d.crop = d.resize = (1024, 1024)
    d.keep_ratio = True
    d.scale = (0.1, 2.0)
    d.padding = "corner"
    d.brightness = 32.0
    d.contrast = 0.5
    d.saturation = 0.5
    d.hue = 18.0
    d.distortion_probability = 0.5
    m = c.model
    m.encoder = "dinov2_l14"
    m.weights = "weights/dinov2_l14.safetensors"
    m.patch_size = 16
    m.patch_resize = "bicubic"
    m.decoder = head
    m.dtype = "bfloat16"
    o = c.optimizer
    o.learning_rate = 2e-4
    o.encoder_factor = 0.5
    o.schedule = "mmengine"
    o.warmup_steps = 1500
    o.warmup_factor = 0.01
    o.power = 0.0
    o.drops = (24_000, 32_000)
    o.final_weight_decay = 1e-5
    o.weight_decay_factors = (("norm", 0.0), (r"^backbone\.", 0.2))
    o.clip = 35.0
    if method == "frozen":
        m.freeze = "all"
    else:
        m.remat = True
        c.low_rank.on = True
        c.low_rank.start = "soma"
        c.low_rank.first_block = 8
        c.low_rank.biases = True
        c.low_rank.products = (
            "attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2",
        )  # fmt: skip
    c.evaluation.domains = (
        "daytime_clear", "night_sunny", "dusk_rainy", "night_rainy", "daytime_foggy",
    )  # fmt: skip
    return c
