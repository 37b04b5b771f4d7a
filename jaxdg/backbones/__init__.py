"""Encoders: image to features. `create(name)` builds one, `ZOO` names them all.

CLIP's text towers (`jaxdg.text`) go by these names too.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxdg.backbones.clip_resnet import ClipResnet, ClipResnetConfig
from jaxdg.backbones.clip_vit import ClipVit, ClipVitConfig
from jaxdg.backbones.deit3 import Deit3, Deit3Config
from jaxdg.backbones.dinov2 import Dinov2, Dinov2Config, Dinov2GiantConfig
from jaxdg.backbones.dinov3 import Dinov3, Dinov3Config
from jaxdg.backbones.encoder import (
    Edit,
    Encoder,
    EncoderConfig,
    EncoderOptions,
    StagedConfig,
    at_size,
    join_taps,
)
from jaxdg.backbones.eva02 import Eva02, Eva02Config
from jaxdg.backbones.eva_clip import EvaClip, EvaClipConfig
from jaxdg.backbones.latent_diffusion import LatentDiffusion, LatentDiffusionConfig
from jaxdg.backbones.mit import Mit, MitConfig
from jaxdg.backbones.mocov3 import MocoV3Config
from jaxdg.backbones.pyramid import Interpolation, Pyramid
from jaxdg.backbones.sam import Sam, SamConfig
from jaxdg.backbones.siglip import Siglip, SiglipConfig
from jaxdg.backbones.vit import Vit, VitConfig
from jaxdg.backbones.zoo import ZOO, build, check_file, create, entry

if TYPE_CHECKING:
    from jaxdg.text.clip_text import (
        TEXT_TOWERS,
        ClipText,
        ClipTextConfig,
        Projection,
        load_text_tower,
        text_embeddings,
    )

__all__ = [
    "TEXT_TOWERS",
    "ZOO",
    "ClipResnet",
    "ClipResnetConfig",
    "ClipText",
    "ClipTextConfig",
    "ClipVit",
    "ClipVitConfig",
    "Deit3",
    "Deit3Config",
    "Dinov2",
    "Dinov2Config",
    "Dinov2GiantConfig",
    "Dinov3",
    "Dinov3Config",
    "Edit",
    "Encoder",
    "EncoderConfig",
    "EncoderOptions",
    "Eva02",
    "Eva02Config",
    "EvaClip",
    "EvaClipConfig",
    "Interpolation",
    "LatentDiffusion",
    "LatentDiffusionConfig",
    "Mit",
    "MitConfig",
    "MocoV3Config",
    "Projection",
    "Pyramid",
    "Sam",
    "SamConfig",
    "Siglip",
    "SiglipConfig",
    "StagedConfig",
    "Vit",
    "VitConfig",
    "at_size",
    "build",
    "check_file",
    "create",
    "entry",
    "join_taps",
    "load_text_tower",
    "text_embeddings",
]

_OF_TEXT = (
    "TEXT_TOWERS",
    "ClipText",
    "ClipTextConfig",
    "Projection",
    "load_text_tower",
    "text_embeddings",
)


def __getattr__(name: str) -> Any:
    """Imports the names of `jaxdg.text` on first use, as that package imports this one."""
    if name in _OF_TEXT:
        return getattr(importlib.import_module("jaxdg.text.clip_text"), name)
    raise AttributeError(f"module 'jaxdg.backbones' has no attribute {name!r}")
