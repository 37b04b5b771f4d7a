"""Encoders: image to features. `create(name)` builds one, `ZOO` names them all."""

from jaxdg.backbones.pyramid import Pyramid
from jaxdg.backbones.vit import Vit, VitConfig
from jaxdg.backbones.zoo import ZOO, create, entry

__all__ = ["ZOO", "Pyramid", "Vit", "VitConfig", "create", "entry"]
