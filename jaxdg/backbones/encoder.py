"""What every encoder offers and is built from, whatever its architecture: images in, one feature map for each tap out."""

from collections.abc import Sequence
import dataclasses

from flax import nnx
from jaxtyping import Array, Float, Key
import numpy as np


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Fields that all encoders have.

    Attributes:
        image_size: height and width in pixels.
        depth: what taps count: blocks, or the stages of a hierarchical encoder.
        taps: of these, the ones whose outputs are returned, from 0, ascending.
        boundaries: further blocks after which a stacked segment must end (where freezing changes).
        drop_path: probability of skipping the last block's branches; grows linearly from 0.
        remat: recompute blocks in the backward pass (less memory, a third more time).
        dtype: compute dtype; parameters, norms and softmax stay float32.
        mean: of the RGB input in 0..1, that the weights were trained with.
        std: of the RGB input in 0..1, likewise.
    """

    image_size: tuple[int, int] = (224, 224)
    depth: int = 12
    taps: tuple[int, ...] = (2, 5, 8, 11)
    boundaries: tuple[int, ...] = ()
    drop_path: float = 0.0
    remat: bool = False
    dtype: str = "float32"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels from one feature to the next, of each tap."""
        raise NotImplementedError

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each tap's features."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class StagedConfig(EncoderConfig):
    """A hierarchical encoder: up to four stages of several blocks each, whose maps have 4, 8, 16 and 32 pixels a feature.

    Fields of `EncoderConfig`, of which `depth` and `taps` count stages and `boundaries` blocks through all stages, and its sizes.

    Attributes:
        blocks: of each stage.
        widths: channels of each stage's output.
    """

    depth: int = 4
    taps: tuple[int, ...] = (0, 1, 2, 3)
    blocks: tuple[int, int, int, int] = (2, 2, 2, 2)
    widths: tuple[int, int, int, int] = (32, 64, 160, 256)

    @property
    def strides(self) -> tuple[int, ...]:
        """See `EncoderConfig.strides`."""
        return tuple(4 << tap for tap in self.taps)

    @property
    def channels(self) -> tuple[int, ...]:
        """See `EncoderConfig.channels`."""
        return tuple(self.widths[tap] for tap in self.taps)

    @property
    def used(self) -> int:
        """Stages that are built; those past the last tap feed nothing."""
        return self.taps[-1] + 1

    def ends(self, stage: int) -> tuple[int, ...]:
        """Blocks of a stage, counted in it from 0, after which stacked segments end."""
        first = sum(self.blocks[:stage])
        return tuple(end - first for end in self.boundaries if 0 <= end - first < self.blocks[stage])


def join_taps(read: Sequence[int], watched: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Taps of an encoder whose features a decoder reads, some of them, and others watch.

    Args:
        read: blocks, ascending.
        watched: blocks; those past the last that is read are left out, as they need not be built.

    Returns:
        The taps, and where among them are those that are read, and those that are watched.
    """
    taps = tuple(sorted([*read, *(block for block in watched if block < read[-1] and block not in read)]))
    return taps, tuple(taps.index(block) for block in read), tuple(taps.index(block) for block in watched if block in taps)


class Encoder(nnx.Module):
    """Image to features at the taps."""

    config: EncoderConfig

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each tap's features."""
        return self.config.channels

    def __call__(
        self, images: Float[Array | np.ndarray, "b h w 3"], key: Key[Array, ""] | None = None
    ) -> tuple[Float[Array, "b _ _ _"], ...]:
        """Features at the taps.

        Args:
            images: [b, h, w, 3] normalised with `config.mean` and `config.std`, of `config.image_size`.
            key: random key that turns drop path on (training).

        Returns:
            One [b, h / stride, w / stride, c] for each tap, shallow to deep.
        """
        raise NotImplementedError

    def adapt(self, name: str, tensor: np.ndarray) -> np.ndarray | None:
        """Fits a stored tensor to this encoder (positions resized); None where it has no use for one."""
        return tensor

    def unread(self, name: str) -> bool:
        """Whether no feature reads this parameter, so that training would only let it decay; it then stays as loaded."""
        return False

    def check_size(self, images: Float[Array | np.ndarray, "b h w 3"]) -> None:
        """Refuses images of another size than the encoder was built for.

        Raises:
            ValueError: both sizes, and what to do.
        """
        (height, width), (h, w) = self.config.image_size, images.shape[1:3]
        if (h, w) != (height, width):
            raise ValueError(
                f"the encoder was built for {height}x{width} images and got {h}x{w}; "
                f"create it with image_size=({h}, {w}) or resize the images"
            )
