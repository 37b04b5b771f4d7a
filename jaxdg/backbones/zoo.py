"""Every encoder by name: its architecture, the normalisation its weights expect, and where the weights come from."""

from collections.abc import Sequence
import dataclasses
import difflib
from pathlib import Path

from flax import nnx
import jax

from jaxdg import weights as weights_io
from jaxdg.backbones.vit import Vit, VitConfig


@dataclasses.dataclass(frozen=True)
class Entry:
    """One named encoder.

    Attributes:
        config: its architecture at the image size of its pre-training.
        source: the public checkpoint, in words a person can search for; empty for encoders that are trained from scratch.
        licence: of that checkpoint.
        megabytes: size of that checkpoint.
    """

    config: VitConfig
    source: str = ""
    licence: str = ""
    megabytes: int = 0


def _vit(width: int, depth: int, heads: int, patch_size: int = 16) -> VitConfig:
    taps = tuple(depth * i // 4 - 1 for i in (1, 2, 3, 4))
    return VitConfig(width=width, depth=depth, heads=heads, patch_size=patch_size, taps=taps)


ZOO: dict[str, Entry] = {
    "augreg_ti16": Entry(
        _vit(192, 12, 3), "timm vit_tiny_patch16_224.augreg_in21k(_ft_in1k); AugReg Ti_16-i21k-300ep-*.npz", "Apache-2.0", 23
    ),
    "augreg_b16": Entry(_vit(768, 12, 12), "timm vit_base_patch16_224.augreg_in21k; AugReg B_16-i21k-300ep-*.npz", "Apache-2.0", 346),
    "augreg_l16": Entry(_vit(1024, 24, 16), "timm vit_large_patch16_224.augreg_in21k; AugReg L_16-i21k-300ep-*.npz", "Apache-2.0", 1217),
    # Small enough to learn from scratch on two CPU cores; patch 8 keeps poles and signs visible in small pictures.
    "scratch_ti8": Entry(_vit(128, 4, 4, patch_size=8)),
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
    image_size: tuple[int, int] | None = None,
    weights: str | Path | None = None,
    taps: Sequence[int] | None = None,
    boundaries: Sequence[int] = (),
    drop_path: float = 0.0,
    remat: bool = False,
    dtype: str = "float32",
    rngs: nnx.Rngs | None = None,
) -> Vit:
    """Builds the encoder called `name`, with its converted weights if they are given.

    Args:
        name: a name of the zoo, such as "augreg_l16".
        image_size: height and width in pixels; the pre-training's size if None. Learned positions are resized to it at load.
        weights: a file made by `conversion/torch_to_flax.py`; None leaves random parameters.
        taps: blocks whose outputs are returned, from 0; the last block of each quarter if None.
        boundaries: further blocks after which a stacked segment ends (where freezing changes).
        drop_path: probability of skipping the last block's branches in training.
        remat: recompute blocks in the backward pass.
        dtype: compute dtype, "float32" or "bfloat16".
        rngs: initialises random parameters; `nnx.Rngs(0)` if None.

    Returns:
        The encoder: images [b, h, w, 3] to one [b, h / p, w / p, c] a tap.

    Raises:
        ValueError: an unknown name, taps outside the encoder, or weights that do not fit, all offenders named.
    """
    config = entry(name).config
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
    if min(config.grid) < 1:
        raise ValueError(f"image_size {config.image_size} is smaller than one {config.patch_size}-pixel patch of {name}")
    if rngs is not None:
        backbone = Vit(config, rngs=rngs)
    else:
        graph, state = nnx.split(nnx.eval_shape(lambda: Vit(config, rngs=nnx.Rngs(0))))
        if weights is None:  # one compiled initialisation instead of one dispatch a parameter; a file fills everything anyway
            state = jax.jit(lambda: nnx.split(Vit(config, rngs=nnx.Rngs(0)))[1])()
        backbone = nnx.merge(graph, state)
    if weights is not None:
        weights_io.load(backbone, weights)
    return backbone
