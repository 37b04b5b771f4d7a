r"""Streets -> other streets by the methods that came after VLTSeg: Rein, SoMA, tqdm and MGRNet.

    jaxdg train --config configs/gta5_methods.py:METHOD[,ENCODER[,SOURCE]] --workdir runs/X

METHOD is one of

    rein       learned tokens after every block of a frozen encoder (Wei et al., CVPR 2024)
    tuned      plain fine-tuning, the encoder at a tenth of the rate, as in Rein's comparison
    frozen     a frozen encoder, likewise
    lora       LoRA of rank 8 on queries, keys and values, likewise
    soma       adapters of the smallest singular components (Yun et al., CVPR 2025)
    tqdm       queries made of class names by CLIP's text tower (Pak et al., ECCV 2024)
    vfmnet     LoRA of rank 32 and a decoder of transposed convolutions (MGRNet's simple head)
    mgrnet     the same, refined in windows under the guidance of its own masks

ENCODER is dinov2_l14 (the default), eva02_l14, clip_l14, sam_h16 or any plain ViT of the zoo; of
tqdm it is eva02_clip_l14_336 or another CLIP ViT. Nobody has published the other methods on
dinov3_l16, siglip2_l16 or eva02_clip_l14. SOURCE is gta5 (the
default), synthia, gta5+synthia, cityscapes, or cityscapes_1024: crops of 1024, judged on ACDC.

Reproduces: data, crops, augmentation, optimiser, schedule, batch and steps of the authors' code
(w1oves/Rein at 7da85bc, ysj9909/SoMA at 7ea8c0e, ByeongHyunPak/tqdm at 75168af, tpy001/VFMSeg at
6b019b9), taps 7, 11, 15 and 23 without a final norm, patches of 16 pixels and a pyramid by
interpolation; of tqdm patches of 14 and a learned pyramid.
Differs: images are normalised as in each encoder's pre-training, where Rein takes ImageNet's
statistics for all; for EVA-02-CLIP with ImageNet's, where tqdm takes CLIP's. The loss of `vfmnet`
is a mean over labelled pixels, theirs over all pixels. SoMA starts as its paper says;
--config.low_rank.start=soma_released starts as its code does. tqdm trains on all of GTA5, where its
authors have presumably half of it.
Open: the batch of tqdm is 8 on each of an unknown number of GPUs; citing papers say 16. SoMA's
results are presumably of the step that was best on the target domains. The rank of LoRA in Rein's
paper is inferred from the number of parameters. Others could not reproduce Rein's 57.4 with CLIP-L.
The code of MGRNet trains adapters at 1e-4, its paper says 1e-5. The recipes of `vfmnet` and
`mgrnet` from other sources than gta5 are gta5's, and nobody trained them or tqdm on crops of 1024
for ACDC.

Published, mIoU % on Cityscapes / BDD100K / Mapillary, mean. Sizes differ from protocol to protocol,
so only rows of one protocol compare (docs/how-to/protocols.md):

    protocol rein
        rein,dinov2_l14                  66.4 / 60.4 / 66.1   64.3
        rein,eva02_l14                   65.3 / 60.5 / 64.9   63.6
        rein,clip_l14                    57.1 / 54.7 / 60.5   57.4
        rein,sam_h16                     59.6 / 52.0 / 62.1   57.9
        tuned,dinov2_l14                 63.7 / 57.4 / 64.2   61.7
        tuned,eva02_l14                  62.1 / 56.2 / 64.6   60.9
        tuned,clip_l14                   51.3 / 47.6 / 54.3   51.1
        tuned,sam_h16                    57.6 / 51.7 / 61.5   56.9
        frozen,dinov2_l14                63.3 / 56.1 / 63.9   61.1
        frozen,eva02_l14                 56.5 / 53.6 / 58.6   56.2
        frozen,clip_l14                  53.7 / 48.7 / 55.0   52.4
        frozen,sam_h16                   57.0 / 47.1 / 58.4   54.2
        lora,dinov2_l14                  65.2 / 58.3 / 64.6   62.7
        lora,eva02_l14                   55.5 / 52.7 / 58.3   55.5
        rein,dinov2_l14,gta5+synthia     68.1 / 60.5 / 67.1   65.2
        rein,dinov2_l14,cityscapes            65.0 / 72.3     68.7
        rein,dinov2_l14,cityscapes_1024  ACDC test            77.6
    protocol soma
        soma,dinov2_l14                  71.8 / 61.3 / 71.7   68.3
        soma,dinov2_l14,gta5+synthia                          69.3
        soma,dinov2_l14,cityscapes            67.0 / 76.5     71.7
        soma,dinov2_l14,cityscapes_1024  ACDC test            78.8
    protocol tqdm
        tqdm                             68.9 / 59.2 / 70.1   66.1
        tqdm,,cityscapes                      64.7 / 76.2     70.4
    protocol mgrnet
        vfmnet,dinov2_l14                72.2 / 63.0 / 71.9   69.0
        mgrnet,dinov2_l14                73.9 / 62.9 / 73.5   70.1
        mgrnet,eva02_l14                 69.5 / 61.1 / 70.0   66.9
        mgrnet,clip_l14                  62.3 / 56.1 / 66.5   61.6
        mgrnet,sam_h16                   64.1 / 55.6 / 67.7   62.5
        mgrnet,dinov2_l14,cityscapes          66.2 / 77.1     71.6
    this file                            not measured

Data: the source, cityscapes, bdd100k, mapillary and acdc as downloaded, below the data root.
Hardware: one GPU. Rein's paper names 9.5 to 10.5 hours on an RTX 3090 Ti for 40 000 steps of 4.
Weights: `jaxdg convert --list` names the file of each encoder. tqdm needs the text tower of its
encoder too: `--model eva02_clip_l14_336_text`.

    jaxdg convert --model dinov2_l14 --checkpoint dinov2_vitl14_pretrain.pth \
        --out weights/dinov2_l14.safetensors
    jaxdg train --config gta5_methods:soma --workdir runs/soma
    jaxdg evaluate --checkpoint runs/soma --protocol rein,soma,mgrnet
"""

from collections.abc import Callable

from jaxdg.backbones import Eva02Config, zoo
from jaxdg.config import Config

LARGE = "cityscapes_1024"
# Where a source is judged.
TARGETS = {
    "gta5": ("cityscapes", "bdd100k", "mapillary"),
    "synthia": ("cityscapes", "bdd100k", "mapillary"),
    "gta5+synthia": ("cityscapes", "bdd100k", "mapillary"),
    "cityscapes": ("bdd100k", "mapillary"),
    LARGE: ("acdc",),
}
SHORTEST_SIDES = (
    256, 307, 358, 409, 460, 512, 563, 614, 665, 716, 768, 819, 870, 921, 972, 1024,
)  # fmt: skip
LARGE_SHORTEST_SIDES = (
    512, 614, 716, 819, 921, 1024, 1126, 1228, 1331, 1433, 1536, 1638, 1740, 1843, 1945, 2048,
)  # fmt: skip
TAPS = {24: (7, 11, 15, 23), 32: (7, 15, 23, 31)}  # of encoders of so many blocks
QUERIES_KEYS_VALUES = ("attn.q_proj", "attn.k_proj", "attn.v_proj")  # where they are three layers


def get_config(choice: str = "soma") -> Config:
    """The experiment of `choice`: METHOD, ENCODER and SOURCE, by comma."""
    method, encoder, source, *more = [*choice.split(","), "", ""]
    source = source or "gta5"
    if any(more) or method not in METHODS or source not in TARGETS:
        raise ValueError(
            f"gta5_methods:{choice}; allowed: METHOD[,ENCODER[,SOURCE]] with METHOD of"
            f" {', '.join(METHODS)} and SOURCE of {', '.join(TARGETS)}"
        )
    encoder = encoder or ("eva02_clip_l14_336" if method == "tqdm" else "dinov2_l14")
    c = common(encoder, source)
    METHODS[method](c, source)
    return c


def common(encoder: str, source: str) -> Config:
    """The parts that the methods share."""
    c = Config(steps=40_000, batch_size=4, log_every=50, eval_every=40_000, checkpoint_every=4000)
    c.data.source = "cityscapes" if source == LARGE else source
    c.data.workers = 8
    c.data.crop = (1024, 1024) if source == LARGE else (512, 512)
    c.data.shortest_sides = LARGE_SHORTEST_SIDES if source == LARGE else SHORTEST_SIDES
    c.data.longest_side = 2 * max(c.data.shortest_sides)
    c.data.scale = (1.0, 1.0)
    c.data.padding = "corner"
    c.data.max_class_share = 0.75
    c.data.brightness = 32.0
    c.data.contrast = 0.5
    c.data.saturation = 0.5
    c.data.hue = 18.0
    c.data.distortion_probability = 0.5
    c.model.encoder = encoder
    c.model.weights = f"weights/{encoder}.safetensors"
    known = zoo.entry(encoder).config
    c.model.taps = TAPS.get(known.depth, known.taps)
    c.model.patch_size = 16
    c.model.patch_resize = "bicubic"
    c.model.pyramid = "interpolate"
    c.model.decoder = "mask2former"
    c.optimizer.learning_rate = 1e-4
    c.optimizer.encoder_factor = 1.0
    c.optimizer.schedule = "mmengine"
    c.optimizer.clip = 0.0
    c.optimizer.weight_decay_factors = (
        (r"norm|(query|level)_embed$|query_feat$|learnable_tokens|after\.scale$", 0.0),
    )
    if c.data.source == "cityscapes":
        c.batch_size = 8
    if source == LARGE:
        c.optimizer.warmup_steps = 10_000
        c.optimizer.warmup_factor = 1e-6
    c.evaluation.protocol = "rein"
    c.evaluation.domains = TARGETS[source]
    return c


def rein(c: Config, source: str) -> None:
    """Rein."""
    c.rein.on = True
    if source == LARGE:
        c.optimizer.learning_rate = 6e-5


def tuned(c: Config, source: str) -> None:
    """Plain fine-tuning."""
    c.optimizer.encoder_factor = 0.1


def frozen(c: Config, source: str) -> None:
    """A frozen encoder."""
    c.model.freeze = "all"


def lora(c: Config, source: str) -> None:
    """LoRA as in Rein's comparison."""
    c.low_rank.on = True
    c.low_rank.rank = 8
    c.low_rank.products = ("attn.qkv",) if has_one_layer(c) else QUERIES_KEYS_VALUES


def soma(c: Config, source: str) -> None:
    """SoMA with its average of the weights and its annealed decay."""
    c.low_rank.on = True
    c.low_rank.start = "soma"
    c.low_rank.first_block = 8
    c.low_rank.biases = True
    if has_one_layer(c):
        c.low_rank.products = (
            "attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2",
        )  # fmt: skip
    c.optimizer.encoder_factor = 0.5
    c.optimizer.final_weight_decay = 1e-5
    c.average.on = source != "gta5+synthia"
    c.average.start = 12_000
    if c.data.source == "cityscapes":
        c.average.start = 20_000
    if source == "cityscapes":
        c.optimizer.warmup_steps = 1500
        c.optimizer.warmup_factor = 0.01
    c.evaluation.protocol = "soma"


def vfmnet(c: Config, source: str) -> None:
    """MGRNet's simple head on LoRA."""
    c.batch_size = 2
    c.model.pyramid = "none"
    c.model.decoder = "upscaling"
    c.low_rank.on = True
    c.low_rank.rank = 32
    c.low_rank.dropout = 0.1
    c.low_rank.products = ("attn.qkv",) if has_one_layer(c) else (*QUERIES_KEYS_VALUES, "attn.proj")
    if c.model.encoder.startswith("clip"):
        c.low_rank.products = ("attn.proj", "mlp.fc1", "mlp.fc2")
    c.data.rare_class_temperature = 0.01
    c.data.rare_class_min_crop_ratio = 0.5
    c.evaluation.protocol = "mgrnet"


def mgrnet(c: Config, source: str) -> None:
    """MGRNet: `vfmnet` on halved crops of 1024, and the refinement of windows."""
    vfmnet(c, source)
    c.data.crop = (1024, 1024)
    c.data.shortest_sides = ()
    c.data.longest_side = None
    c.data.resize = (1440, 2560)
    c.data.rare_class_min_crop_ratio = 2.0
    c.model.decoder = "mgrnet"


def tqdm(c: Config, source: str) -> None:
    """Tqdm with its three regularisers."""
    c.steps = c.eval_every = 20_000
    c.batch_size = 16
    c.data.shortest_sides = ()
    c.data.longest_side = None
    c.data.scale = (0.5, 2.0)
    c.data.rare_class_temperature = 100.0
    c.data.rare_class_min_crop_ratio = 0.5
    c.model.text_weights = f"weights/{c.model.encoder}_text.safetensors"
    c.model.taps = ()
    c.model.patch_size = None
    c.model.pyramid = "batch"
    c.model.decoder = "tqdm"
    if c.model.encoder == "clip_b16":  # theirs, not EVA-02-CLIP
        c.model.drop_path = 0.1
        c.model.tqdm.contexts = 5
    c.visual_anchor.on = True
    o = c.optimizer
    on_cityscapes = c.data.source == "cityscapes"
    o.learning_rate = 1e-4 if on_cityscapes else 1e-5
    o.weight_decay = 1e-5 if on_cityscapes else 1e-4
    o.min_learning_rate = 1e-6
    o.encoder_factor = 0.1
    o.learning_rate_factors = ((r"^pyramid", 0.1),)
    o.schedule = "mmcv"
    o.warmup_steps = 1500
    o.warmup_factor = 1e-6
    # The norms outside of the encoder, and from Cityscapes embeddings too.
    norms = (
        r"^head\.((context_decoder\.decoder|pixel_decoder\.layers|layers)\..*norm"
        r"|(pixel_decoder\.post|decoder)_norm)"
    )
    o.weight_decay_factors = ((norms, 0.0),)
    if on_cityscapes:
        o.weight_decay_factors += ((r"^head\.(query|level)_embed$", 0.0),)
    c.evaluation.protocol = "tqdm"


def has_one_layer(c: Config) -> bool:
    """Whether one layer of the encoder computes queries, keys and values."""
    return not isinstance(zoo.entry(c.model.encoder).config, Eva02Config)


METHODS: dict[str, Callable[[Config, str], None]] = {
    "rein": rein,
    "tuned": tuned,
    "frozen": frozen,
    "lora": lora,
    "soma": soma,
    "tqdm": tqdm,
    "vfmnet": vfmnet,
    "mgrnet": mgrnet,
}
