"""Resizing of learned positions, of the kernels that turn patches into tokens, and of maps.

`jax.image.resize` is another operation than torch's bicubic, which the published models use.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np


def cubic_matrix(source: int, target: int, offset: float = 0.0) -> np.ndarray:
    """Weights [target, source] of plain bicubic interpolation along one axis.

    The kernel is that of Keys (1981) with a = -0.75; edges are repeated. With an `offset` the scale
    is that of a target larger by it, as if torch got a scale factor instead of a size.
    """
    a = -0.75
    centre = (np.arange(target) + 0.5) * source / (target + offset) - 0.5
    matrix = np.zeros((target, source))
    for step in (-1, 0, 1, 2):
        index = np.floor(centre).astype(int) + step
        t = np.abs(centre - index)
        near = ((a + 2) * t - (a + 3)) * t * t + 1
        far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
        np.add.at(
            matrix, (np.arange(target), index.clip(0, source - 1)), np.where(t <= 1, near, far)
        )
    return matrix


def linear_matrix(source: int, target: int, corners: bool = False) -> np.ndarray:
    """Rows of weights [target, source] of plain linear interpolation along one axis.

    Args:
        source: samples given.
        target: samples wanted.
        corners: the first and last samples stay where they are (torch's `align_corners=True`); else
            samples are centres of equal parts of one length, edges repeated.
    """
    steps = np.arange(target)
    if corners:
        at = steps * (source - 1) / max(target - 1, 1)
    else:
        at = ((steps + 0.5) * source / target - 0.5).clip(0, source - 1)
    return np.maximum(1 - np.abs(at[:, None] - np.arange(source)), 0.0)


def adaptive_matrix(source: int, target: int) -> np.ndarray:
    """Means [target, source] over the windows of torch's adaptive average pooling along one axis.

    Windows may overlap.
    """
    index = np.arange(target)[:, None]
    first = index * source // target
    end = -(-(index + 1) * source // target)
    at = np.arange(source)
    inside = (at >= first) & (at < end)
    return inside / inside.sum(axis=1, keepdims=True)


def adaptive_pool(x: Float[Array, "b h w c"], side: int) -> Float[Array, "b side side c"]:
    """Adaptive average pooling to `side` rows and columns, as torch's."""
    down, across = (jnp.asarray(adaptive_matrix(n, side), x.dtype) for n in x.shape[1:3])
    exact = jax.lax.Precision.HIGHEST
    return jnp.einsum("iy,jx,byxc->bijc", down, across, x, precision=exact)


def resize_positions(
    positions: np.ndarray,
    grid: tuple[int, int],
    prefix: int,
    matrix: Callable[[int, int], np.ndarray] = cubic_matrix,
) -> np.ndarray:
    """Resizes learned position embeddings to another token grid, by plain bicubic interpolation.

    Half-pixel centres, a = -0.75, no antialiasing: equal to torch's `F.interpolate(mode="bicubic",
    align_corners=False)`, which EVA, CLIP, DeiT and MoCo code use.

    Args:
        positions: [1, prefix + n, c]. A square number n is taken for a square grid, as all
            pre-trainings use; any other n must fit.
        grid: rows and columns wanted.
        prefix: leading rows that belong to no patch (the class token) and stay as they are.
        matrix: source and target side to weights [target, source] along one axis, of families that
            interpolate otherwise.

    Returns:
        [1, prefix + rows * columns, c], float32.

    Raises:
        ValueError: the source grid is not square.
    """
    rows, columns = grid
    patches = positions[0, prefix:].astype(np.float32)
    side = round(len(patches) ** 0.5)
    if (side, side) == grid or (side * side != len(patches) and len(patches) == rows * columns):
        return positions.astype(np.float32)
    if side * side != len(patches):
        raise ValueError(
            f"{len(patches)} patch positions are no square grid and do not fit {rows}x{columns};"
            " give the image size they were made for"
        )
    square = patches.reshape(side, side, -1)
    resized = np.einsum(
        "iy,jx,yxc->ijc", matrix(side, rows), matrix(side, columns), square, optimize=True
    )
    return np.concatenate(
        [positions[0, :prefix].astype(np.float32), resized.reshape(rows * columns, -1)],
        dtype=np.float32,
    )[None]


PATCH_RESIZES = ("flexi", "bicubic")


def resize_patch(kernel: np.ndarray, size: int, method: str) -> np.ndarray:
    """Resizes the kernel that turns a square patch into a token.

    "flexi" is FlexiViT's (Beyer et al. 2023), with the bilinear interpolation (no antialiasing) of
    its authors' code in big_vision; timm's `resample_patch_embed` does the same with another
    interpolation. It multiplies by the pseudo-inverse of what the interpolation does to the pixels
    of a patch: the token of an enlarged patch is then that of the patch itself.

    "bicubic" enlarges or shrinks the kernel as if it were a picture, by torch's plain bicubic, and
    scales by nothing: published domain-generalization code converts DINOv2 from 14 to 16 pixels so.
    Tokens grow with the patch's area, in that case by 16^2 / 14^2.

    Args:
        kernel: [p, p, 3, c].
        size: pixels of the new patch's side.
        method: one of `PATCH_RESIZES`.

    Returns:
        [size, size, 3, c], float32.
    """
    source = kernel.shape[0]
    if method == "flexi":
        axis = np.linalg.pinv(linear_matrix(source, size).T)
    else:
        axis = cubic_matrix(source, size)
    return np.einsum(
        "iy,jx,yxco->ijco", axis, axis, kernel.astype(np.float64), optimize=True
    ).astype(np.float32)
