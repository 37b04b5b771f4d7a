"""MoCo-v3 (Chen et al. 2021): the plain vision transformer of `jaxdg.backbones.vit`, whose
checkpoints have names of their own.

Its positions are sines and cosines that pre-training kept fixed. The files hold them, with a row of
zeros for the class token, so they load, are resized (plain bicubic, as fine-tuning code does it)
and are fine-tuned like learned ones.
"""

import dataclasses

from jaxdg.backbones.vit import VitConfig


@dataclasses.dataclass(frozen=True)
class MocoV3Config(VitConfig):
    """A MoCo-v3 encoder, built as `Vit`; fields of `VitConfig`.

    A type of its own so that no other checkpoint is taken for one.
    """
