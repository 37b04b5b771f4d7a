"""What released adapters (Rein, SoMA) share: the frozen encoder's file beside theirs, and the run.

Their authors enlarge the encoder's patches to 16 pixels, the kernel by plain bicubic interpolation,
and normalise images with ImageNet's statistics whatever the encoder was trained on. They fit
positions to the crop by plain bicubic interpolation, CLIP's by bilinear.
"""

from collections.abc import Mapping, Sequence
import math
from typing import NamedTuple

from flax import nnx
import numpy as np

from jaxdg import backbones
from jaxdg.backbones import resizing
from jaxdg.backbones.zoo import IMAGENET
from jaxdg.config import Config
from jaxdg.conversion import clip, dinov2, eva02, mapping, sam, vltseg, wrappers
from jaxdg.conversion.checkpoint import Checkpoint
from jaxdg.conversion.mapping import Layout, Misfit

PATCH = 16
KERNEL = "patch_embed.proj.kernel"
POSITIONS = "pos_embed"
CLASS = "cls_token"
CROPS = (512, 1024)  # of the published models; the first one is usual
BESIDE = "encoder."  # before the names of the encoder's tensors, beside those of the adapter's file


class Training(NamedTuple):
    """What no tensor tells of a training.

    Attributes:
        crop: side of its images in pixels, one of `CROPS`.
        source: what was trained on, of those in the recipe.
    """

    crop: int = CROPS[0]
    source: str = "gta5"


class Frozen(NamedTuple):
    """The encoder of a released model, before its training.

    Attributes:
        name: of the zoo.
        tensors: by jaxdg's names, for the run's patches and crop.
        converted: what they were made from.
        view: the file by the names of the layout that it has.
    """

    name: str
    tensors: Mapping[str, np.ndarray]
    converted: mapping.Converted
    view: Checkpoint


def layouts(name: str) -> tuple[Layout, ...]:
    """The layouts in which an encoder's file is published."""
    match backbones.entry(name).config:
        case backbones.Dinov2Config() as config:
            return dinov2.layouts(config)
        case backbones.Eva02Config() as config:
            return eva02.layouts(config)
        case backbones.ClipVitConfig():
            return clip.layouts()
        case backbones.SamConfig():
            return sam.layouts()
        case config:
            raise NotImplementedError(f"no released adapter is known for {type(config).__name__}")


def frozen(file: Checkpoint, names: Sequence[str], crop: int) -> Frozen:
    """Reads the file of the encoder; of several that it may be, it is that which knows most names.

    Args:
        file: as published, or with patches of 16 pixels and positions for the crop, as the authors
            of the adapters convert it.
        names: of the zoo.
        crop: side of the run's images in pixels.

    Raises:
        Misfit: the file is of none of these encoders, or has patches or positions of another size.
    """

    def known(name: str) -> int:
        view = wrappers.unwrapped(file, layouts(name))
        tables = [layout.known() for layout in layouts(name)]
        return max(sum(bool(table.fullmatch(key)) for key in view.names) for table in tables)

    name = max(names, key=known)
    config = backbones.entry(name).config
    assert isinstance(config, backbones.VitConfig)
    view = wrappers.unwrapped(file, layouts(name))
    patch = PATCH if _has_enlarged_patches(view, name) else config.patch_size
    module = nnx.eval_shape(
        lambda: backbones.create(name, image_size=config.image_size, patch_size=patch)
    )
    converted = mapping.to_flax(module, layouts(name), view.names, view.read)
    kernel = converted.tensors[KERNEL]
    if patch != PATCH:
        kernel = resizing.resize_patch(kernel, PATCH, "bicubic")
    positions = fitted_positions(converted.tensors[POSITIONS], config, crop)
    kernel, positions = renormalised(kernel, positions, config)
    changed = {KERNEL: kernel, POSITIONS: positions}
    if isinstance(config, backbones.ClipVitConfig):
        # The code that Rein's authors took for CLIP adds the class token to its position again.
        changed[CLASS] = 2 * converted.tensors[CLASS]
    tensors = mapping.Lazy(
        {
            key: lambda key=key: changed[key] if key in changed else converted.tensors[key]
            for key in converted.tensors
        }
    )
    return Frozen(name, tensors, converted, view)


def fitted_positions(positions: np.ndarray, config: backbones.VitConfig, crop: int) -> np.ndarray:
    """Positions for the patches of a crop.

    Args:
        positions: as stored: [1, prefix + n, c], or SAM's [1, rows, columns, c].
        config: of the encoder.
        crop: side in pixels.

    Raises:
        Misfit: those of another grid than the published file's or the crop's.
    """
    shape = positions.shape
    on_a_map = len(shape) == 4
    side = shape[1] if on_a_map else math.isqrt(shape[1] - config.prefix)
    allowed = dict.fromkeys((config.image_size[0] // config.patch_size, crop // PATCH))
    if side not in allowed:
        sizes = " or ".join(f"{n}x{n}" for n in allowed)
        raise Misfit(
            f"its positions are those of {side}x{side} patches, not {sizes} for a crop of {crop}"
            " (--crop)"
        )
    by_clip = isinstance(config, backbones.ClipVitConfig)
    grid = (crop // PATCH, crop // PATCH)
    rows = resizing.resize_positions(
        positions.reshape(1, -1, shape[-1]),
        grid,
        prefix=config.prefix,
        matrix=resizing.linear_matrix if by_clip else resizing.cubic_matrix,
    )
    return rows.reshape(1, *grid, -1) if on_a_map else rows


def _has_enlarged_patches(view: Checkpoint, name: str) -> bool:
    """Whether a file holds the kernel as the authors of the adapters convert it."""
    sources = {row.source[0] for one in layouts(name) for row in one.rows if row.target == KERNEL}
    return any(
        view.read(source).shape[2:] == (PATCH, PATCH) for source in sources & set(view.names)
    )


def renormalised(
    kernel: np.ndarray,
    positions: np.ndarray,
    config: backbones.VitConfig,
    statistics: Mapping[str, Sequence[float]] = IMAGENET,
) -> tuple[np.ndarray, np.ndarray]:
    """Kernel and positions that give the same tokens for images normalised with the encoder's own
    statistics as the given ones give for those normalised with `statistics`.

    With x the pixels, (x - m) / s = (x - m') / s' * (s' / s) + (m' - m) / s. The factor goes into
    the kernel, and what the kernel makes of the constant is added to the patches' positions.
    """
    mean, std = (np.asarray(statistics[key], np.float64) for key in ("mean", "std"))
    factor = np.asarray(config.std) / std
    constant = (np.asarray(config.mean) - mean) / std
    added = np.einsum("ijcd,c->d", kernel.astype(np.float64), constant)
    first = np.zeros_like(positions[:, : config.prefix])
    rest = np.broadcast_to(added, positions[:, config.prefix :].shape)
    return (
        (kernel * factor[:, None]).astype(np.float32),
        (positions + np.concatenate([first, rest], axis=1)).astype(np.float32),
    )


def joined(file: Checkpoint, encoder: Frozen, layout: Layout) -> Checkpoint:
    """An adapter's file with those tensors of its encoder that a layout reads, behind `BESIDE`."""
    used = {source for row in layout.rows for source in row.source}
    beside = {BESIDE + key: key for key in encoder.tensors if BESIDE + key in used}

    def read(name: str) -> np.ndarray:
        return encoder.tensors[beside[name]] if name in beside else file.read(name)

    return file._replace(names=[*file.names, *beside], read=read)


def run(file: Checkpoint, method: str, encoder: str, training: Training) -> Config:
    """The run of the recipe for a method; sizes of the decoder are those of the file's tensors.

    Raises:
        ValueError: a source that the recipe does not have.
    """
    crop = training.crop
    source = training.source
    large = crop == CROPS[-1] and source == "cityscapes"
    c = vltseg.recipe(
        "gta5_methods", f"{method},{encoder},{'cityscapes_1024' if large else source}"
    )
    c.data.crop = (crop, crop)
    c.evaluation.stride = (round(crop * 2 / 3), round(crop * 2 / 3))
    c.model.weights = None
    c.model.mask2former = vltseg.head_options(file)
    return c
