"""All encoders by name: architecture, the normalisation of images, and the source of weights."""

from collections.abc import Sequence
import dataclasses
import difflib
import importlib
from pathlib import Path
from typing import Any

from flax import nnx
import jax

from jaxdg import weights as weights_io
from jaxdg.backbones.clip_resnet import ClipResnetConfig
from jaxdg.backbones.clip_vit import ClipVitConfig
from jaxdg.backbones.deit3 import Deit3Config
from jaxdg.backbones.dinov2 import Dinov2Config, Dinov2GiantConfig
from jaxdg.backbones.dinov3 import Dinov3Config
from jaxdg.backbones.encoder import Encoder, EncoderConfig, EncoderOptions
from jaxdg.backbones.eva02 import Eva02Config
from jaxdg.backbones.eva_clip import EvaClipConfig
from jaxdg.backbones.latent_diffusion import LatentDiffusionConfig
from jaxdg.backbones.mit import MitConfig
from jaxdg.backbones.mocov3 import MocoV3Config
from jaxdg.backbones.sam import SamConfig
from jaxdg.backbones.siglip import SiglipConfig
from jaxdg.backbones.vit import VitConfig
from jaxdg.tracing import Rngs

IMAGENET: dict[str, Any] = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
CLIP: dict[str, Any] = dict(
    mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711)
)
LARGE_TAPS = (9, 14, 19, 23)  # of VLTSeg's encoders with 24 blocks


@dataclasses.dataclass(frozen=True)
class Entry:
    """One named encoder.

    Attributes:
        config: its architecture at the image size of its pre-training.
        source: the public checkpoint, in words that a search finds; empty for encoders that are
            trained from scratch.
        licence: of that checkpoint.
        megabytes: size of that checkpoint.
    """

    config: EncoderConfig
    source: str = ""
    licence: str = ""
    megabytes: int = 0


def _vit(width: int, depth: int, heads: int, patch_size: int = 16) -> VitConfig:
    taps = tuple(depth * i // 4 - 1 for i in (1, 2, 3, 4))
    return VitConfig(width=width, depth=depth, heads=heads, patch_size=patch_size, taps=taps)


def _sam(width: int, depth: int, heads: int) -> SamConfig:
    quarters = tuple(depth * i // 4 - 1 for i in (1, 2, 3, 4))
    return SamConfig(
        image_size=(1024, 1024),
        width=width,
        depth=depth,
        heads=heads,
        taps=quarters,
        global_blocks=quarters,
        **IMAGENET,
    )


def _dinov2(file: str, hub: str, megabytes: int, registers: int = 0, **sizes: Any) -> Entry:
    return Entry(
        Dinov2Config(
            image_size=(518, 518), patch_size=14, registers=registers, **sizes, **IMAGENET
        ),
        f"{file}_pretrain.pth of facebookresearch/dinov2; facebook/{hub}",
        "Apache-2.0",
        megabytes,
    )


def _mit(
    size: str,
    blocks: tuple[int, int, int, int],
    megabytes: int,
    widths: tuple[int, int, int, int] = (64, 128, 320, 512),
) -> Entry:
    source = f"mit_{size}.pth or segformer.{size}.*.pth of NVlabs/SegFormer; nvidia/mit-{size}"
    return Entry(
        MitConfig(blocks=blocks, widths=widths, **IMAGENET),
        source,
        "NVIDIA, not commercial",
        megabytes,
    )


def _sd15(**options: Any) -> Entry:
    return Entry(
        LatentDiffusionConfig(image_size=(512, 512), **options),
        "unet, vae and text_encoder of stable-diffusion-v1-5/stable-diffusion-v1-5, or its"
        " v1-5-pruned-emaonly.safetensors; v1.1 to v1.4 of CompVis",
        "CreativeML OpenRAIL-M",
        4265,
    )


_TINY: dict[str, Any] = dict(patch_size=14, width=192, depth=12, heads=3)
_SMALL: dict[str, Any] = dict(patch_size=14, width=384, depth=12, heads=6)
_BASE: dict[str, Any] = dict(patch_size=16, width=768, depth=12, heads=12)
_LARGE: dict[str, Any] = dict(patch_size=14, width=1024, depth=24, heads=16, taps=LARGE_TAPS)
# Sizes of encoders whose taps end the quarters.
_S: dict[str, Any] = dict(width=384, depth=12, heads=6, taps=(2, 5, 8, 11))
_B: dict[str, Any] = dict(width=768, depth=12, heads=12, taps=(2, 5, 8, 11))
_L: dict[str, Any] = dict(width=1024, depth=24, heads=16, taps=(5, 11, 17, 23))
_FUSED: dict[str, Any] = dict(subln=False, inner_attn_ln=False)
# As in VLTSeg, images for EVA-02-CLIP are normalised with ImageNet's statistics, though its
# pre-training used CLIP's.
_EVA02_CLIP_L = Eva02Config(**_LARGE, **IMAGENET)

ZOO: dict[str, Entry] = {
    "augreg_ti16": Entry(
        _vit(192, 12, 3),
        "timm vit_tiny_patch16_224.augreg_in21k(_ft_in1k); AugReg Ti_16-i21k-300ep-*.npz",
        "Apache-2.0",
        23,
    ),
    "augreg_b16": Entry(
        _vit(768, 12, 12),
        "timm vit_base_patch16_224.augreg_in21k; AugReg B_16-i21k-300ep-*.npz",
        "Apache-2.0",
        410,
    ),
    "augreg_l16": Entry(
        _vit(1024, 24, 16),
        "timm vit_large_patch16_224.augreg_in21k; AugReg L_16-i21k-300ep-*.npz",
        "Apache-2.0",
        1303,
    ),
    "eva02_clip_l14": Entry(
        _EVA02_CLIP_L,
        "EVA02_CLIP_L_psz14_s4B.pt of QuanSun/EVA-CLIP; timm eva02_large_patch14_clip_224.merged2b",
        "MIT",
        856,
    ),
    "eva02_clip_l14_336": Entry(
        dataclasses.replace(_EVA02_CLIP_L, image_size=(336, 336)),
        "EVA02_CLIP_L_336_psz14_s6B.pt of QuanSun/EVA-CLIP; timm"
        " eva02_large_patch14_clip_336.merged2b",
        "MIT",
        856,
    ),
    "eva02_clip_b16": Entry(
        Eva02Config(**_BASE, **IMAGENET),
        "EVA02_CLIP_B_psz16_s8B.pt of QuanSun/EVA-CLIP; timm eva02_base_patch16_clip_224.merged2b",
        "MIT",
        300,
    ),
    "eva02_clip_l14_vltseg_repro": Entry(
        dataclasses.replace(
            _EVA02_CLIP_L, image_size=(512, 512), inner_attn_ln=False, random_positions=True
        ),
        "state_dict of a VLTSeg/VLTSeg checkpoint, or the file of eva02_clip_l14",
        "MIT",
        856,
    ),
    "eva02_ti14": Entry(
        Eva02Config(**_TINY, **_FUSED, **CLIP),
        "timm eva02_tiny_patch14_224.mim_in22k; eva02_Ti_pt_in21k_p14.pt of Yuxin-CV/EVA-02",
        "MIT",
        22,
    ),
    "eva02_s14": Entry(
        Eva02Config(**_SMALL, **_FUSED, **CLIP),
        "timm eva02_small_patch14_224.mim_in22k; eva02_S_pt_in21k_p14.pt of Yuxin-CV/EVA-02",
        "MIT",
        87,
    ),
    "eva02_l14": Entry(
        Eva02Config(**_LARGE, **CLIP, inner_attn_ln=False),
        "timm eva02_large_patch14_224.mim_m38m; eva02_L_pt_m38m_p14.pt of Yuxin-CV/EVA-02",
        "MIT",
        1213,
    ),
    "clip_l14": Entry(
        ClipVitConfig(**_LARGE, **CLIP),
        "ViT-L-14.pt of OpenAI; open_clip ViT-L-14-quickgelu; openai/clip-vit-large-patch14",
        "MIT",
        933,
    ),
    "clip_b16": Entry(
        ClipVitConfig(**_BASE, **CLIP),
        "ViT-B-16.pt of OpenAI; open_clip ViT-B-16-quickgelu; openai/clip-vit-base-patch16",
        "MIT",
        351,
    ),
    "clip_l14_gelu": Entry(
        ClipVitConfig(**_LARGE, **CLIP, activation="gelu"),
        "open_clip ViT-L-14 datacomp_xl_s13b_b90k, not a -quickgelu one",
        "MIT",
        1711,
    ),
    "clip_b16_gelu": Entry(
        ClipVitConfig(**_BASE, **CLIP, activation="gelu"),
        "open_clip ViT-B-16 datacomp_xl_s13b_b90k, not a -quickgelu one",
        "MIT",
        599,
    ),
    "sam_b16": Entry(
        _sam(768, 12, 12),
        "sam_vit_b_01ec64.pth of facebookresearch/segment-anything; facebook/sam-vit-base",
        "Apache-2.0",
        375,
    ),
    "sam_l16": Entry(
        _sam(1024, 24, 16),
        "sam_vit_l_0b3195.pth of facebookresearch/segment-anything; facebook/sam-vit-large",
        "Apache-2.0",
        1250,
    ),
    "sam_h16": Entry(
        _sam(1280, 32, 16),
        "sam_vit_h_4b8939.pth of facebookresearch/segment-anything; facebook/sam-vit-huge",
        "Apache-2.0",
        2565,
    ),
    "mocov3_b16": Entry(
        MocoV3Config(**_B, **IMAGENET),
        "vit-b-300ep.pth.tar of facebookresearch/moco-v3;"
        " mocov3_vit-base-p16_16xb256-amp-coslr-300e_in1k of MMSelfSup",
        "CC-BY-NC-4.0",
        1728,
    ),
    "mocov3_l16": Entry(
        MocoV3Config(**_L, **IMAGENET),
        "mocov3_vit-large-p16_64xb64-amp-coslr-300e_in1k of MMSelfSup",
        "Apache-2.0",
        2611,
    ),
    "deit3_b16": Entry(
        Deit3Config(**_B, **IMAGENET),
        "deit_3_base_224_21k.pth of facebookresearch/deit; timm"
        " deit3_base_patch16_224.fb_in22k_ft_in1k",
        "Apache-2.0",
        346,
    ),
    "deit3_l16": Entry(
        Deit3Config(**_L, **IMAGENET),
        "deit_3_large_224_21k.pth of facebookresearch/deit; timm"
        " deit3_large_patch16_224.fb_in22k_ft_in1k",
        "Apache-2.0",
        1217,
    ),
    "dinov2_s14": _dinov2("dinov2_vits14", "dinov2-small", 88, **_S),
    "dinov2_b14": _dinov2("dinov2_vitb14", "dinov2-base", 346, **_B),
    "dinov2_l14": _dinov2("dinov2_vitl14", "dinov2-large", 1218, **_L),
    "dinov2_s14_reg": _dinov2(
        "dinov2_vits14_reg4", "dinov2-with-registers-small", 88, registers=4, **_S
    ),
    "dinov2_b14_reg": _dinov2(
        "dinov2_vitb14_reg4", "dinov2-with-registers-base", 346, registers=4, **_B
    ),
    "dinov2_l14_reg": _dinov2(
        "dinov2_vitl14_reg4", "dinov2-with-registers-large", 1218, registers=4, **_L
    ),
    "dinov2_g14": Entry(
        Dinov2GiantConfig(
            image_size=(518, 518),
            patch_size=14,
            width=1536,
            depth=40,
            heads=24,
            taps=(9, 19, 29, 39),
            **IMAGENET,
        ),
        "dinov2_vitg14_pretrain.pth of facebookresearch/dinov2; for planning, not converted",
        "Apache-2.0",
        4546,
    ),
    "dinov3_b16": Entry(
        Dinov3Config(**_B, **IMAGENET),
        "dinov3_vitb16_pretrain_lvd1689m-73cec8be.pth of facebookresearch/dinov3; timm"
        " vit_base_patch16_dinov3.lvd1689m; facebook/dinov3-vitb16-pretrain-lvd1689m",
        "DINOv3 License",
        343,
    ),
    "dinov3_l16": Entry(
        Dinov3Config(**_L, **IMAGENET),
        "dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth of facebookresearch/dinov3; timm"
        " vit_large_patch16_dinov3.lvd1689m; facebook/dinov3-vitl16-pretrain-lvd1689m",
        "DINOv3 License",
        1213,
    ),
    "siglip_b16": Entry(
        SiglipConfig(**_B),
        "timm vit_base_patch16_siglip_224.webli; google/siglip-base-patch16-224;"
        " webli_en_b16_224_63724782.npz of big_vision",
        "Apache-2.0",
        372,
    ),
    "siglip_l16": Entry(
        SiglipConfig(image_size=(256, 256), **_L),
        "timm vit_large_patch16_siglip_256.webli; google/siglip-large-patch16-256;"
        " webli_en_l16_256_60552751.npz of big_vision",
        "Apache-2.0",
        1264,
    ),
    "siglip2_l16": Entry(
        SiglipConfig(image_size=(512, 512), **_L),
        "timm vit_large_patch16_siglip_512.v2_webli; google/siglip2-large-patch16-512;"
        " siglip2_l16_512.npz of big_vision",
        "Apache-2.0",
        1267,
    ),
    "eva_clip_8b": Entry(
        EvaClipConfig(patch_size=14, width=4096, depth=32, heads=32, taps=(7, 15, 23, 31), **CLIP),
        "EVA_CLIP_8B_psz14_s9B.pt of BAAI/EVA-CLIP-8B; for planning, not converted",
        "Apache-2.0",
        32900,
    ),
    "eva_clip_18b": Entry(
        EvaClipConfig(
            patch_size=14,
            width=5120,
            depth=48,
            heads=40,
            taps=(11, 23, 35, 47),
            **CLIP,
            postnorm=True,
        ),
        "EVA_CLIP_18B_psz14_s6B.fp16.pt of BAAI/EVA-CLIP-18B; for planning, not converted",
        "Apache-2.0",
        36700,
    ),
    "clip_rn50": Entry(ClipResnetConfig(**CLIP), "RN50.pt of OpenAI; open_clip RN50", "MIT", 244),
    "clip_rn101": Entry(
        ClipResnetConfig(**CLIP, blocks=(3, 4, 23, 3), embedding=512),
        "RN101.pt of OpenAI; open_clip RN101",
        "MIT",
        278,
    ),
    "mit_b0": _mit("b0", (2, 2, 2, 2), 14, widths=(32, 64, 160, 256)),
    "mit_b1": _mit("b1", (2, 2, 2, 2), 55),
    "mit_b2": _mit("b2", (3, 4, 6, 3), 99),
    "mit_b3": _mit("b3", (3, 4, 18, 3), 178),
    "mit_b4": _mit("b4", (3, 8, 27, 3), 245),
    "mit_b5": _mit("b5", (3, 6, 40, 3), 328),
    "sd15": _sd15(),
    # As in VPD: a learned condition of Cityscapes' class names, and maps of the attention to it.
    "sd15_vpd": _sd15(context=(19, 768), learned=True, maps=True, scale=1.0),
    "sd21": Entry(
        LatentDiffusionConfig(image_size=(768, 768), heads=(5, 10, 20, 20), context=(77, 1024)),
        "unet, vae and text_encoder of stabilityai/stable-diffusion-2-1 or -2-1-base, or"
        " v2-1_768-ema-pruned.safetensors",
        "CreativeML OpenRAIL++-M",
        5214,
    ),
    # Small enough to learn from scratch on two CPU cores; patch 8 keeps poles and signs visible in
    # small pictures.
    "scratch_ti8": Entry(_vit(128, 4, 4, patch_size=8)),
    "scratch_eva02_ti8": Entry(
        Eva02Config(patch_size=8, width=128, depth=4, heads=2, taps=(0, 1, 2, 3), **_FUSED)
    ),
}


def entry(name: str) -> Entry:
    """The zoo's entry of `name`.

    Raises:
        ValueError: no encoder has this name; the message lists those that exist.
    """
    if name in ZOO:
        return ZOO[name]
    # Only this message needs the text towers, which import this package.
    towers = importlib.import_module("jaxdg.text.clip_text").TEXT_TOWERS
    if name in towers:
        raise ValueError(
            f"{name} is no encoder but a text tower, which jaxdg.backbones.text_embeddings reads;"
            " it converts under this name"
        )
    close = difflib.get_close_matches(name, [*ZOO, *towers], n=1)
    hint = f"did you mean {close[0]}?" if close else f"choose one of {' '.join(ZOO)}"
    raise ValueError(f"unknown encoder {name!r}; {hint}")


def create(
    name: str,
    *,
    variant: str | None = None,
    image_size: tuple[int, int] | None = None,
    weights: str | Path | None = None,
    boundaries: Sequence[int] = (),
    rngs: nnx.Rngs | None = None,
    **options: Any,
) -> Encoder:
    """Builds the encoder called `name`, with its converted weights if they are given.

    Args:
        name: a name of the zoo, such as "augreg_l16".
        variant: "vltseg_repro" of "eva02_clip_l14" is the zoo's "eva02_clip_l14_vltseg_repro"; None
            is the encoder as its authors run it.
        image_size: height and width in pixels; the pre-training's size if None. Learned positions
            are resized to it at load.
        weights: a file made by `conversion/torch_to_flax.py`; None leaves random parameters.
        boundaries: further blocks after which a stacked segment ends (where freezing changes).
        rngs: initialises random parameters; `nnx.Rngs(0)` if None.
        **options: fields of `EncoderOptions`: `taps`, `patch_size`, `patch_resize`, `window`,
            `drop_path`, `remat`, `dtype`.

    Returns:
        The encoder: images [b, h, w, 3] to one [b, h / stride, w / stride, c] a tap.

    Raises:
        TypeError: no such option.
        ValueError: an unknown name, taps outside the encoder, an option that its family does not
            have, or weights that do not fit, all offenders named.
    """
    chosen = EncoderOptions(
        encoder=f"{name}_{variant}" if variant else name,
        **{**options, "taps": tuple(options.get("taps") or ())},
    )
    config = configured(chosen, image_size, boundaries)
    if rngs is not None:
        backbone = config.build(rngs=rngs)
    else:
        graph, state = nnx.split(nnx.eval_shape(lambda: config.build(rngs=Rngs(0))))
        if weights is None:  # else the file fills everything
            # One compiled initialisation replaces one dispatch a parameter.
            state = jax.jit(lambda: nnx.split(config.build(rngs=Rngs(0)))[1])()
        backbone = nnx.merge(graph, state)
    if weights is not None:
        weights_io.load(backbone, weights)
        check_file(name, weights)
    return backbone


def build(
    options: EncoderOptions,
    *,
    taps: Sequence[int],
    image_size: tuple[int, int],
    boundaries: Sequence[int],
    rngs: nnx.Rngs,
) -> Encoder:
    """The encoder of a model, with random parameters.

    Args:
        options: of the run; `taps` replaces theirs.
        taps: blocks or stages whose features the model needs.
        image_size: height and width in pixels.
        boundaries: further blocks after which a stacked segment ends.
        rngs: initialises the parameters.

    Raises:
        ValueError: as `create`.
    """
    names = (field.name for field in dataclasses.fields(EncoderOptions))
    chosen = EncoderOptions(**{name: getattr(options, name) for name in names})
    chosen.taps = tuple(taps)
    return configured(chosen, image_size, boundaries).build(rngs=rngs)


def configured(
    options: EncoderOptions, image_size: tuple[int, int] | None, boundaries: Sequence[int]
) -> EncoderConfig:
    """The zoo's encoder with the options of a run; arguments and errors as for `create`."""
    config = entry(options.encoder).config
    config = config.configured(options, image_size or config.image_size, tuple(boundaries))
    if min(config.image_size) < max(config.strides):
        raise ValueError(
            f"image_size {config.image_size} is smaller than the {max(config.strides)} pixels of"
            f" one feature of {options.encoder}"
        )
    return config


def check_file(name: str, path: str | Path) -> None:
    """Refuses a converted file of another encoder, even if its tensors fit.

    MoCo-v3's encoder has all tensors of a plain vision transformer, but normalises images with
    other statistics. Encoders that differ only in the size of their images take each other's files.

    Args:
        name: of the encoder in the zoo.
        path: a converted file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it belongs to an encoder that computes something else.
    """
    theirs = weights_io.metadata(path).get("model", name)
    if theirs == name or theirs not in ZOO:
        return
    image_free = dict(image_size=(1, 1), taps=(0,), boundaries=())
    one, other = (dataclasses.replace(entry(each).config, **image_free) for each in (name, theirs))
    if one != other:
        raise ValueError(
            f"{path} holds the weights of {theirs}, and the encoder is {name}: set"
            f" model.encoder={theirs}, or give a file of {name}; one that was converted under a"
            " wrong name is converted again"
        )
