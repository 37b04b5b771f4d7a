"""MoCo-v3 (Chen et al. 2021): the plain vision transformer of `jaxdg.backbones.vit`.

Its checkpoints have other names. Its positions are sines and cosines that pre-training kept fixed.
The files hold them, with a row of zeros for the class token. They are loaded, resized (plain
bicubic, as in the fine-tuning code) and fine-tuned like learned positions.
"""

import dataclasses

from jaxdg.backbones.vit import VitConfig


@dataclasses.dataclass(frozen=True)
class MocoV3Config(VitConfig):
    """A MoCo-v3 encoder, built as `Vit`; fields of `VitConfig`.

    A type of its own so that no other checkpoint is taken for one.
    """
