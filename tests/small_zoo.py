"""Every architecture of the zoo at a small size."""

import dataclasses

from jaxdg import backbones
from jaxdg.backbones.encoder import StagedConfig

DEPTH = 4


def reduced(config, depth=DEPTH):
    """The same architecture, small, and of fewer blocks if `depth` says so.

    Sizes differ, so that shapes tell axes apart.
    """
    small = dict(mean=(0.5,) * 3, std=(0.5,) * 3)
    if isinstance(config, backbones.LatentDiffusionConfig):
        return dataclasses.replace(
            config,
            **small,
            blocks=(depth // 2,) * 4,
            widths=(32, 64, 96, 128),
            heads=(2, 2, 2, 2),
            vae_widths=(32, 64, 64, 32),
            context=(3, 40),
        )
    if isinstance(config, StagedConfig):
        return dataclasses.replace(
            config, **small, blocks=(depth // 2,) * 4, widths=(8, 16, 40, 64)
        )
    small |= dict(
        image_size=(12, 12), patch_size=4, width=24, heads=2, depth=depth, taps=(depth - 1,)
    )
    if isinstance(config, backbones.SamConfig):
        small |= dict(window=2, global_blocks=(1, 3))
    return dataclasses.replace(config, **small)
