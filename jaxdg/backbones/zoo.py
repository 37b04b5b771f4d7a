"""Every encoder by name: its architecture, the normalisation its weights expect, and where the weights come from."""

from collections.abc import Callable, Sequence
import dataclasses
import difflib
from pathlib import Path
from typing import Any

from flax import nnx
import jax

from jaxdg import weights as weights_io
from jaxdg.backbones.clip_vit import ClipVit, ClipVitConfig
from jaxdg.backbones.encoder import Encoder, EncoderConfig
from jaxdg.backbones.eva02 import Eva02, Eva02Config
from jaxdg.backbones.vit import Vit, VitConfig

FAMILIES: dict[type[EncoderConfig], Callable[..., Encoder]] = {VitConfig: Vit, Eva02Config: Eva02, ClipVitConfig: ClipVit}
IMAGENET: dict[str, Any] = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
CLIP: dict[str, Any] = dict(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))
LARGE_TAPS = (9, 14, 19, 23)  # of VLTSeg's encoders with 24 blocks


@dataclasses.dataclass(frozen=True)
class Entry:
    """One named encoder.

    Attributes:
        config: its architecture at the image size of its pre-training.
        source: the public checkpoint, in words a person can search for; empty for encoders that are trained from scratch.
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


_TINY: dict[str, Any] = dict(patch_size=14, width=192, depth=12, heads=3)
_SMALL: dict[str, Any] = dict(patch_size=14, width=384, depth=12, heads=6)
_BASE: dict[str, Any] = dict(patch_size=16, width=768, depth=12, heads=12)
_LARGE: dict[str, Any] = dict(patch_size=14, width=1024, depth=24, heads=16, taps=LARGE_TAPS)
_FUSED: dict[str, Any] = dict(subln=False, inner_attn_ln=False)
# The CLIP-trained ones with ImageNet's statistics, as VLTSeg feeds them, though their pre-training used CLIP's.
_EVA02_CLIP_L = Eva02Config(**_LARGE, **IMAGENET)

ZOO: dict[str, Entry] = {
    "augreg_ti16": Entry(
        _vit(192, 12, 3), "timm vit_tiny_patch16_224.augreg_in21k(_ft_in1k); AugReg Ti_16-i21k-300ep-*.npz", "Apache-2.0", 23
    ),
    "augreg_b16": Entry(_vit(768, 12, 12), "timm vit_base_patch16_224.augreg_in21k; AugReg B_16-i21k-300ep-*.npz", "Apache-2.0", 346),
    "augreg_l16": Entry(_vit(1024, 24, 16), "timm vit_large_patch16_224.augreg_in21k; AugReg L_16-i21k-300ep-*.npz", "Apache-2.0", 1217),
    "eva02_clip_l14": Entry(
        _EVA02_CLIP_L, "EVA02_CLIP_L_psz14_s4B.pt of QuanSun/EVA-CLIP; timm eva02_large_patch14_clip_224.merged2b", "MIT", 856
    ),
    "eva02_clip_l14_336": Entry(
        dataclasses.replace(_EVA02_CLIP_L, image_size=(336, 336)),
        "EVA02_CLIP_L_336_psz14_s6B.pt of QuanSun/EVA-CLIP; timm eva02_large_patch14_clip_336.merged2b",
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
        dataclasses.replace(_EVA02_CLIP_L, image_size=(512, 512), inner_attn_ln=False, random_positions=True),
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
    "clip_l14": Entry(ClipVitConfig(**_LARGE, **CLIP), "ViT-L-14.pt of OpenAI; open_clip ViT-L-14-quickgelu", "MIT", 933),
    "clip_b16": Entry(ClipVitConfig(**_BASE, **CLIP), "ViT-B-16.pt of OpenAI; open_clip ViT-B-16-quickgelu", "MIT", 351),
    "clip_l14_gelu": Entry(
        ClipVitConfig(**_LARGE, **CLIP, activation="gelu"), "open_clip ViT-L-14 datacomp_xl_s13b_b90k, not a -quickgelu one", "MIT", 1711
    ),
    "clip_b16_gelu": Entry(
        ClipVitConfig(**_BASE, **CLIP, activation="gelu"), "open_clip ViT-B-16 datacomp_xl_s13b_b90k, not a -quickgelu one", "MIT", 599
    ),
    # Small enough to learn from scratch on two CPU cores; patch 8 keeps poles and signs visible in small pictures.
    "scratch_ti8": Entry(_vit(128, 4, 4, patch_size=8)),
    "scratch_eva02_ti8": Entry(Eva02Config(patch_size=8, width=128, depth=4, heads=4, taps=(0, 1, 2, 3))),
}


def entry(name: str) -> Entry:
    """The zoo's entry of `name`.

    Raises:
        ValueError: no encoder has this name; the message lists those that exist.
    """
    if name not in ZOO:
        close = difflib.get_close_matches(name, ZOO, n=1)
        hint = f"did you mean {close[0]}?" if close else "choose one of"
        raise ValueError(f"unknown encoder {name!r}; {hint} {' '.join(ZOO) if not close else ''}".rstrip())
    return ZOO[name]


def create(
    name: str,
    *,
    variant: str | None = None,
    image_size: tuple[int, int] | None = None,
    weights: str | Path | None = None,
    taps: Sequence[int] | None = None,
    boundaries: Sequence[int] = (),
    drop_path: float = 0.0,
    remat: bool = False,
    dtype: str = "float32",
    rngs: nnx.Rngs | None = None,
) -> Encoder:
    """Builds the encoder called `name`, with its converted weights if they are given.

    Args:
        name: a name of the zoo, such as "augreg_l16".
        variant: "vltseg_repro" of "eva02_clip_l14" is the zoo's "eva02_clip_l14_vltseg_repro"; None is the encoder as its authors run it.
        image_size: height and width in pixels; the pre-training's size if None. Learned positions are resized to it at load.
        weights: a file made by `conversion/torch_to_flax.py`; None leaves random parameters.
        taps: blocks whose outputs are returned, from 0 (of hierarchical encoders stages); the zoo's choice if None: the last block of
            each quarter, or what VLTSeg reads; all stages.
        boundaries: further blocks after which a stacked segment ends (where freezing changes).
        drop_path: probability of skipping the last block's branches in training.
        remat: recompute blocks in the backward pass.
        dtype: compute dtype, "float32" or "bfloat16".
        rngs: initialises random parameters; `nnx.Rngs(0)` if None.

    Returns:
        The encoder: images [b, h, w, 3] to one [b, h / stride, w / stride, c] a tap.

    Raises:
        ValueError: an unknown name, taps outside the encoder, or weights that do not fit, all offenders named.
    """
    name = f"{name}_{variant}" if variant else name
    config = entry(name).config
    family = FAMILIES[type(config)]
    chosen = tuple(sorted(taps)) if taps else config.taps
    if chosen[0] < 0 or chosen[-1] >= config.depth or len(set(chosen)) != len(chosen):
        raise ValueError(f"taps {chosen} of {name} must be different blocks in 0..{config.depth - 1}")
    config = dataclasses.replace(
        config,
        image_size=tuple(image_size or config.image_size),
        taps=chosen,
        boundaries=tuple(boundaries),
        drop_path=drop_path,
        remat=remat,
        dtype=dtype,
    )
    if min(config.image_size) < max(config.strides):
        raise ValueError(f"image_size {config.image_size} is smaller than the {max(config.strides)} pixels of one feature of {name}")
    if rngs is not None:
        backbone = family(config, rngs=rngs)
    else:
        graph, state = nnx.split(nnx.eval_shape(lambda: family(config, rngs=nnx.Rngs(0))))
        if weights is None:  # one compiled initialisation instead of one dispatch a parameter; a file fills everything anyway
            state = jax.jit(lambda: nnx.split(family(config, rngs=nnx.Rngs(0)))[1])()
        backbone = nnx.merge(graph, state)
    if weights is not None:
        weights_io.load(backbone, weights)
    return backbone
