"""Encoders: image to features. `create(name)` builds one, `ZOO` names them all."""

from jaxdg.backbones.clip_vit import ClipVit, ClipVitConfig
from jaxdg.backbones.encoder import Encoder, EncoderConfig
from jaxdg.backbones.eva02 import Eva02, Eva02Config
from jaxdg.backbones.pyramid import Pyramid
from jaxdg.backbones.vit import Vit, VitConfig
from jaxdg.backbones.zoo import ZOO, create, entry

__all__ = [
    "ZOO",
    "ClipVit",
    "ClipVitConfig",
    "Encoder",
    "EncoderConfig",
    "Eva02",
    "Eva02Config",
    "Pyramid",
    "Vit",
    "VitConfig",
    "create",
    "entry",
]
