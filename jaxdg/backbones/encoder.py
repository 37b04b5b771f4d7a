"""The interface of all encoders: images to one feature map for each tap."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import math
from typing import Any, Literal

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np

from jaxdg import weights
from jaxdg.ranges import Count, CountOrZero, ShareBelowOne
from jaxdg.tracing import Rngs

# Of a map float [b, h, w, c], a map that takes its place.
Edit = Callable[[Array], Array]


@dataclasses.dataclass(unsafe_hash=True, kw_only=True)
class EncoderOptions:
    """The settings of a run's encoder. A model keeps a copy, so later changes have no effect.

    Attributes:
        encoder: a name of the zoo (`jaxdg.backbones.ZOO`). Default scratch_ti8.
        taps: blocks whose features are read, from 0, or stages of a hierarchical encoder. () takes
            the zoo's choice: the last block of each quarter, or VLTSeg's taps; all stages. Default
            ().
        patch_size: side of the encoder's patches in pixels; None for that of its pre-training.
            Default None.
        patch_resize: method that resizes the stored kernel of patches of another size: flexi
            (FlexiViT's pseudo-inverse) or bicubic. Default flexi.
        window: rows and columns of tokens in a window, for large images (ViTDet: 16). Most blocks
            of EVA-02 then attend within windows; with 0 every block attends to the whole image.
            Default 0.
        drop_path: probability of skipping the branches of the encoder's last block in training; it
            grows linearly from 0 at the first block. Default 0.
        remat: recompute encoder blocks in the backward pass: less memory, a third more time.
            Default False.
        unroll: compile each block by itself instead of one for all neighbours. It takes longer to
            compile; a GPU then moves less memory in a step. Default False.
        dtype: compute type, float32 or bfloat16; parameters stay float32. Default float32.
    """

    encoder: str = "scratch_ti8"
    taps: tuple[int, ...] = ()
    patch_size: Count | None = None
    patch_resize: str = "flexi"
    window: CountOrZero = 0
    drop_path: ShareBelowOne = 0.0
    remat: bool = False
    unroll: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The fields of all encoders.

    Attributes:
        image_size: height and width in pixels.
        depth: number of blocks, or of stages of a hierarchical encoder.
        taps: blocks or stages whose outputs are returned, from 0, ascending.
        boundaries: further blocks after which a stacked segment must end (where freezing changes).
        drop_path: probability of skipping the last block's branches; grows linearly from 0.
        remat: recompute blocks in the backward pass (less memory, a third more time).
        unroll: compile each block by itself instead of one for all neighbours.
        dtype: compute dtype; parameters, norms and softmax stay float32.
        mean: of RGB in 0..1, by which the pre-training normalised images.
        std: of RGB in 0..1, likewise.
    """

    image_size: tuple[int, int] = (224, 224)
    depth: int = 12
    taps: tuple[int, ...] = (2, 5, 8, 11)
    boundaries: tuple[int, ...] = ()
    drop_path: float = 0.0
    remat: bool = False
    unroll: bool = False
    dtype: str = "float32"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def build(self, *, rngs: nnx.Rngs) -> "Encoder":
        """The encoder with random parameters.

        Raises:
            ValueError: sizes that do not fit together.
        """
        raise NotImplementedError

    def configured(
        self, options: EncoderOptions, image_size: tuple[int, int], boundaries: tuple[int, ...]
    ) -> "EncoderConfig":
        """This encoder with the options of a run.

        Args:
            options: of the run.
            image_size: height and width in pixels.
            boundaries: further blocks after which a stacked segment ends.

        Raises:
            ValueError: taps outside the encoder, or an option that this family does not have.
        """
        name = options.encoder
        taps = tuple(sorted(options.taps)) or self.taps
        if taps[0] < 0 or taps[-1] >= self.depth or len(set(taps)) != len(taps):
            raise ValueError(
                f"taps {taps} of {name} must be different blocks in 0..{self.depth - 1}"
            )
        if options.patch_size is not None:
            raise ValueError(
                f"{name} does not cut images into patches of one size; leave patch_size"
                " (model.patch_size) out"
            )
        if options.window:
            raise ValueError(
                f"{name} cannot attend in windows of a chosen size, EVA-02 alone can; leave window"
                " (model.window) out"
            )
        return dataclasses.replace(
            self,
            image_size=image_size,
            taps=taps,
            boundaries=boundaries,
            drop_path=options.drop_path,
            remat=options.remat,
            unroll=options.unroll,
            dtype=options.dtype,
        )

    @property
    def unit(self) -> str:
        """The word for what `depth` and taps count."""
        return "block"

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels from one feature to the next, for each tap."""
        raise NotImplementedError

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each tap's features."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class StagedConfig(EncoderConfig):
    """A hierarchical encoder: up to four stages of blocks, with strides of 4, 8, 16 and 32 pixels
    unless a family says otherwise.

    `depth` and `taps` count stages; `boundaries` count blocks through all stages.

    Attributes:
        blocks: of each stage.
        widths: channels of each stage's output.
    """

    depth: int = 4
    taps: tuple[int, ...] = (0, 1, 2, 3)
    blocks: tuple[int, int, int, int] = (2, 2, 2, 2)
    widths: tuple[int, int, int, int] = (32, 64, 160, 256)

    @property
    def unit(self) -> str:
        """See `EncoderConfig.unit`."""
        return "stage"

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
        """Number of stages that are built; the taps need no later ones."""
        return self.taps[-1] + 1

    def ends(self, stage: int) -> tuple[int, ...]:
        """Blocks of a stage, counted in it from 0, after which stacked segments end."""
        first = sum(self.blocks[:stage])
        return tuple(
            end - first for end in self.boundaries if 0 <= end - first < self.blocks[stage]
        )


def join_taps(
    read: Sequence[int], observed: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The taps of an encoder whose features a decoder reads and training methods observe.

    Args:
        read: blocks that the decoder reads, ascending.
        observed: blocks that methods observe. Those past the last block that is read are left out,
            as they need not be built.

    Returns:
        The taps, and the places among them of the blocks that are read.
    """
    taps = sorted({*read, *(block for block in observed if block < read[-1])})
    return tuple(taps), tuple(taps.index(block) for block in read)


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
            images: [b, h, w, 3] normalised with `config.mean` and `config.std`, of
                `config.image_size`.
            key: random key that turns drop path on (training).

        Returns:
            One [b, h / stride, w / stride, c] for each tap, shallow to deep.
        """
        raise NotImplementedError

    def adapt(self, name: str, tensor: np.ndarray) -> np.ndarray | None:
        """Fits a stored tensor to this encoder, for example resizes positions; None drops it."""
        return tensor

    def unit_of(self, name: str) -> int | None:
        """The block, or stage of a hierarchical encoder, that a parameter belongs to, from 0.

        None: it belongs to none of them, as embeddings do.
        """
        raise NotImplementedError

    def unused(self, name: str) -> bool:
        """Whether no feature depends on this parameter.

        Training would only let it decay, so it stays as loaded.
        """
        return False

    @contextlib.contextmanager
    def editing(self, edits: Mapping[int, Edit]) -> Iterator[None]:
        """While this is open, edited features replace those behind blocks or stages.

        Later blocks read them, and so does who reads a tap there. Class token and padding stay.

        Args:
            edits: by block or stage, from 0; several contexts edit one after another.

        Raises:
            ValueError: features of this encoder cannot be edited, or not there.
        """
        with contextlib.ExitStack() as doors:
            for unit, edit in edits.items():
                doors.enter_context(self.door(unit, self.of_map(edit)))
            yield

    @contextlib.contextmanager
    def door(self, unit: int, change: Callable[[Array], Array]) -> Iterator[None]:
        """As `editing` at one place, of all that the next block reads: the map, or all tokens."""
        stack, block = self.behind(unit)
        if block not in stack.ends:
            raise ValueError(
                f"features behind {self.config.unit} {unit} cannot be edited, as no segment ends"
                " there; name it as a boundary or as a tap"
            )
        before = stack.edits or {}
        first = before.get(block, lambda x: x)
        stack.edits = {**before, block: lambda x: change(first(x))}
        try:
            yield
        finally:
            stack.edits = before

    def behind(self, unit: int) -> tuple[Any, int]:
        """The stack that a block or stage belongs to, and its last block in there, from 0.

        Raises:
            ValueError: features of this encoder cannot be edited, or it is not built so deep.
        """
        raise ValueError(
            f"{type(self).__name__} does not let its features be edited; allowed: a plain ViT or a"
            " CLIP ResNet"
        )

    def of_map(self, edit: Edit) -> Callable[[Array], Array]:
        """An edit of the map as one of all that the next block reads."""
        return edit

    def map_of(self, x: Array) -> Float[Array, "b h w c"]:
        """The map in what the next block reads."""
        return x

    def check_size(self, images: Float[Array | np.ndarray, "b h w 3"]) -> None:
        """Refuses images of another size than the encoder was built for.

        Raises:
            ValueError: both sizes, and what to do.
        """
        height, width = self.config.image_size
        h, w = images.shape[1:3]
        if (h, w) != (height, width):
            raise ValueError(
                f"the encoder was built for {height}x{width} images and got {h}x{w}; "
                f"create it with image_size=({h}, {w}) or resize the images"
            )


def at_size(encoder: Encoder, image_size: tuple[int, int]) -> Encoder:
    """A copy of an encoder for images of another size, for use inside a traced program.

    The parameters stay the encoder's own, and what methods have added to it stays too; a module of
    theirs that depends on the size holds the encoder's config, as `config`. Learned
    positions are resized as those of a file are: `adapt` is linear in each channel, so its matrix
    is what it makes of the unit vectors.

    Args:
        encoder: of any image size.
        image_size: height and width in pixels.

    Raises:
        ValueError: the encoder does not resize its positions.
    """
    if image_size == encoder.config.image_size:
        return encoder
    config = dataclasses.replace(encoder.config, image_size=image_size)
    # Whatever differs between two new encoders of both sizes depends on the size.
    before, after = (
        nnx.eval_shape(lambda c=c: c.build(rngs=Rngs(0))) for c in (encoder.config, config)
    )
    fitted = nnx.merge(*nnx.split(encoder), copy=True)
    modules = dict(nnx.iter_modules(fitted))
    modules_after = dict(nnx.iter_modules(after))
    for path, module in nnx.iter_modules(before):
        for name, value in vars(module).items():
            new = getattr(modules_after[path], name)
            if isinstance(value, int | tuple | EncoderConfig) and value != new:
                setattr(modules[path], name, new)
    for module in modules.values():
        if getattr(module, "config", None) == encoder.config:
            setattr(module, "config", config)  # noqa: B010  no attribute of every module
    graph, state = nnx.split(fitted)
    flat = dict(nnx.to_flat_state(state))
    leaves_after = dict(nnx.to_flat_state(nnx.state(after)))
    for path, leaf in nnx.to_flat_state(nnx.state(before)):
        if leaf.shape != leaves_after[path].shape:
            name = next(iter(weights.named(path, leaf.shape)))
            resized = _resize_like_stored(after, name, weights.is_stacked(path))
            flat[path] = flat[path].replace(resized(flat[path][...]))
    return nnx.merge(graph, nnx.from_flat_state(flat))


def _resize_like_stored(encoder: Encoder, name: str, stacked: bool) -> Callable[[Array], Array]:
    """`encoder.adapt` of a tensor of this name, or of a stack of them, as a product."""

    def resize(x: Array) -> Array:
        kept = x.shape[:-1]
        units = np.eye(math.prod(kept), dtype=np.float32).reshape(*kept, -1)
        matrix = encoder.adapt(name, units)
        if matrix is None or np.any(encoder.adapt(name, np.zeros_like(units))):
            raise ValueError(
                f"{type(encoder).__name__} does not resize {name}, so it takes images of"
                f" {encoder.config.image_size} only when built for them"
            )
        exact = jax.lax.Precision.HIGHEST
        return jnp.tensordot(matrix, x.reshape(-1, x.shape[-1]), 1, precision=exact)

    return jax.vmap(resize) if stacked else resize
