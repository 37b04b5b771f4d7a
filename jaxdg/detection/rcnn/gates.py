"""Masks over the positions and channels of a proposal's features, decided by these and by scenes.

Follows "Prompt-driven Dynamic Object-Centric Learning for Single Domain Generalization" (Li et al.
2024, Daniel00008/PDOC) as its text describes it, and the dual gating that it builds on (DGNet, Li
et al. 2021). Attribute names are the authors'. A gate is open or shut: in training it is drawn with
the probability that its logit says, and the gradient is that of a soft draw (straight through).
Different: biases start at 0; slots that hold no proposal take no part in batch statistics. What the
authors' code does otherwise is a setting of `GatesConfig`.
"""

from collections.abc import Sequence
import dataclasses
from functools import partial
import math
from typing import Any, Literal

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Key
import numpy as np

from jaxdg.backbones.layers import TORCH, Conv, Linear
from jaxdg.backbones.resizing import adaptive_pool
from jaxdg.ranges import Count, Positive, PositiveOrZero, Share
from jaxdg.tracing import BatchNorm

TEMPERATURE = 2 / 3  # of a soft draw
ROUNDS = 3  # of slot attention


@dataclasses.dataclass(unsafe_hash=True)
class GatesConfig:
    """Gates of a box head.

    Attributes:
        scenes: names of the scenes whose embeddings guide the gates of channels: sentences for
            CLIP's text tower, or names of vectors in `file`. (): one constant scene. Default ().
        file: safetensors that hold a vector for each of `scenes`, in place of a text tower; read
            when training starts. `scripts/scene_vectors.py` makes them of pictures. Default None.
        cell: rows, and columns, of features that one spatial gate switches. Default 8.
        norm: of the channel gates' logits before the last layer: batch (of all proposals of a batch
            that count, with running statistics for inference) or layer. Default batch.
        fixed: masks are drawn once with the model's start instead, `density` of each open, and stay
            as they are for every proposal: a control. Default False.
        density: share that is to be open, of the computation (`sparsity`), and its square root of
            each gate (`balance`). Default 0.5.
        sparsity: weight of the squared difference between the share of the computation that the
            masks leave and `density`; 5 in DGNet. Default 0.
        balance: weight of what keeps each gate's share of open ones near the root of `density`; 1
            in DGNet. Default 0.
        fade: steps in which the range that `balance` leaves free grows from nothing to 1 - 1/e of
            all. Default 10000.
    """

    scenes: tuple[str, ...] = ()
    file: str | None = None
    cell: Count = 8
    norm: Literal["batch", "layer"] = "batch"
    fixed: bool = False
    density: Share = 0.5
    sparsity: PositiveOrZero = 0.0
    balance: PositiveOrZero = 0.0
    fade: Positive = 10_000.0

    def check(self, name: str) -> None:
        """Checks that the settings go together.

        Args:
            name: of these settings in the configuration, for the message.

        Raises:
            ValueError: which do not, and what is allowed.
        """
        for field in ("sparsity", "balance"):
            if self.fixed and getattr(self, field):
                raise ValueError(
                    f"{name}.{field} is {getattr(self, field)}; allowed: 0 with {name}.fixed, as"
                    " fixed masks learn nothing"
                )
        if self.fixed and self.scenes:
            raise ValueError(
                f"{name}.scenes is {self.scenes}; allowed: () with {name}.fixed, whose masks read"
                " no scene"
            )
        if self.file is not None and not self.scenes:
            raise ValueError(f"{name}.file is {self.file}; allowed: None, as {name}.scenes is ()")


def gate(logits: Float[Array, "*n"], key: Key[Array, ""] | None = None) -> Float32[Array, "*n"]:
    """Open (1) or shut (0).

    Args:
        logits: of the probability to be open.
        key: draws, with the gradient of the soft draw; None: open from 0 on.
    """
    logits = logits.astype(jnp.float32)
    if key is None:
        return (logits >= 0).astype(jnp.float32)
    uniform = jax.random.uniform(key, logits.shape)
    noise = jnp.log(uniform + 1e-8) - jnp.log(1 - uniform + 1e-8)
    soft = jax.nn.sigmoid((logits + noise) / TEMPERATURE)
    hard = (soft >= 0.5).astype(jnp.float32)
    return soft + jax.lax.stop_gradient(hard - soft)


class GruCell(nnx.Module):
    """Torch's gated recurrent unit: both products have a bias."""

    def __init__(self, channels: int, *, dtype: str, rngs: nnx.Rngs):
        linear = partial(Linear, kernel_init=TORCH, dtype=jnp.dtype(dtype), rngs=rngs)
        self.ih = linear(channels, 3 * channels)
        self.hh = linear(channels, 3 * channels)

    def __call__(self, x: Float[Array, "n c"], state: Float[Array, "n c"]) -> Float[Array, "n c"]:
        of_x = jnp.split(self.ih(x), 3, axis=-1)
        of_state = jnp.split(self.hh(state), 3, axis=-1)
        reset, update = (jax.nn.sigmoid(of_x[i] + of_state[i]) for i in (0, 1))
        new = jnp.tanh(of_x[2] + reset * of_state[2])
        return (1 - update) * new + update * state


class SlotAttention(nnx.Module):
    """Vectors refined by texts in rounds (Locatello et al. 2020, with one slot for each vector).

    Without texts a vector reads its own value in every round, as the classifier of the authors'
    code does, where a product is not summed over the texts.
    """

    def __init__(self, channels: int, texts: int | None, *, dtype: str, rngs: nnx.Rngs):
        """Args:
        channels: of the vectors.
        texts: channels of the texts; None: there are none.
        dtype: compute dtype of linear layers.
        rngs: initialises the parameters.
        """
        linear = partial(Linear, kernel_init=TORCH, dtype=jnp.dtype(dtype), rngs=rngs)
        norm = partial(nnx.LayerNorm, epsilon=1e-5, rngs=rngs)
        if texts is not None:
            self.to_q = linear(channels, channels)
            self.to_k = linear(texts, channels)
            self.norm_slots = norm(channels)
            self.norm_input = norm(texts)
        self.to_v = linear(channels if texts is None else texts, channels)
        self.gru = GruCell(channels, dtype=dtype, rngs=rngs)
        self.norm_pre_ff = norm(channels)
        self.mlp_0 = linear(channels, channels)
        self.mlp_2 = linear(channels, channels)
        self.reads_texts = texts is not None

    def __call__(
        self, slots: Float[Array, "n c"], texts: Float[Array, "p e"]
    ) -> Float32[Array, "n c"]:
        slots = slots.astype(jnp.float32)
        if self.reads_texts:
            texts = self.norm_input(texts)
            keys, values = self.to_k(texts), self.to_v(texts)
        else:
            keys, values = None, self.to_v(slots)
        for _ in range(ROUNDS):
            read = values if keys is None else self.attend(slots, keys, values)
            slots = self.gru(read, slots).astype(jnp.float32)
            slots += self.mlp_2(jax.nn.relu(self.mlp_0(self.norm_pre_ff(slots))))
        return slots

    def attend(
        self, slots: Float[Array, "n c"], keys: Float[Array, "p c"], values: Float[Array, "p c"]
    ) -> Float[Array, "n c"]:
        """What the slots read of the texts' values."""
        queries = self.to_q(self.norm_slots(slots))
        scores = queries.astype(jnp.float32) @ keys.astype(jnp.float32).T
        weights = jax.nn.softmax(scores / math.sqrt(slots.shape[1]))
        return weights.astype(values.dtype) @ values


class FixedMask(nnx.Module):
    """A mask drawn once, with an exact share of open gates, for every proposal."""

    def __init__(self, shape: Sequence[int], density: float, *, rngs: nnx.Rngs):
        count = math.prod(shape)
        order = jax.random.permutation(rngs.params(), count)
        self.mask = nnx.BatchStat((order < round(density * count)).reshape(shape) * 1.0)

    def __call__(self, x: Float[Array, "n _ _ _"], *_: Any) -> Float32[Array, "n *s"]:
        mask = self.mask[...]
        return jnp.broadcast_to(mask, (len(x), *mask.shape))


class SpatialGate(nnx.Module):
    """A gate for each cell of positions, from the features around it."""

    def __init__(self, channels: int, cells: int, *, dtype: str, rngs: nnx.Rngs):
        """Args:
        channels: of the features.
        cells: along each side.
        dtype: compute dtype.
        rngs: initialises the parameters.
        """
        self.cells = cells
        self.atten_s = Conv(
            channels,
            1,
            (3, 3),
            padding=1,
            use_bias=False,
            kernel_init=TORCH,
            dtype=jnp.dtype(dtype),
            rngs=rngs,
        )

    def __call__(
        self, x: Float[Array, "n s s c"], key: Key[Array, ""] | None = None
    ) -> Float32[Array, "n g g 1"]:
        """The gates; a key draws them."""
        return gate(self.atten_s(adaptive_pool(x, self.cells)), key)


class ChannelGate(nnx.Module):
    """A gate for each channel, from the mean of the features and the scenes."""

    def __init__(
        self,
        config: GatesConfig,
        channels: int,
        width: int,
        out: int,
        scenes: int,
        *,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        """Args:
        config: settings.
        channels: of the features.
        width: of the vectors that read the scenes.
        out: gates.
        scenes: channels of the scenes.
        dtype: compute dtype.
        rngs: initialises the parameters.
        """
        linear = partial(Linear, kernel_init=TORCH, dtype=jnp.dtype(dtype), rngs=rngs)
        self.atten_c_fc1 = linear(channels, width)
        self.slot_attention = SlotAttention(width, scenes, dtype=dtype, rngs=rngs)
        self.atten_c_norm = (
            BatchNorm(width, momentum=0.9, rngs=rngs)
            if config.norm == "batch"
            else nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        )
        self.atten_c_conv = linear(width, out, use_bias=False)

    def __call__(
        self,
        x: Float[Array, "n _ _ _"],
        key: Key[Array, ""] | None,
        scenes: Float[Array, "p e"],
        valid: Bool[Array, "n"] | None,
    ) -> Float32[Array, "n o"]:
        """The gates.

        Args:
            x: features.
            key: draws them.
            scenes: their embeddings.
            valid: rows whose statistics are taken in training; None: running ones are used.
        """
        context = self.atten_c_fc1(x.mean((1, 2))).astype(jnp.float32)
        context += self.slot_attention(context, scenes)
        if isinstance(self.atten_c_norm, nnx.LayerNorm):
            context = self.atten_c_norm(context)
        else:
            mask = None if valid is None else valid[:, None]
            context = self.atten_c_norm(context, valid is None, mask=mask)
        return gate(self.atten_c_conv(jax.nn.relu(context)), key)


def spatial_gate(
    config: GatesConfig, channels: int, side: int, *, dtype: str, rngs: nnx.Rngs
) -> SpatialGate | FixedMask:
    """The gates of maps of `side` rows and columns: learned, or fixed."""
    cells = -(-side // config.cell)
    if config.fixed:
        return FixedMask((cells, cells, 1), config.density, rngs=rngs)
    return SpatialGate(channels, cells, dtype=dtype, rngs=rngs)


def channel_gate(
    config: GatesConfig,
    channels: int,
    width: int,
    out: int,
    scenes: int,
    *,
    dtype: str,
    rngs: nnx.Rngs,
) -> ChannelGate | FixedMask:
    """The gates of `out` channels: learned (see `ChannelGate`), or fixed."""
    if config.fixed:
        return FixedMask((out,), config.density, rngs=rngs)
    return ChannelGate(config, channels, width, out, scenes, dtype=dtype, rngs=rngs)


def spread_cells(mask: Float[Array, "n g g 1"], side: int) -> Float[Array, "n s s 1"]:
    """The gates of cells at every position: the nearest cell, as torch counts."""
    index = np.arange(side) * mask.shape[1] // side
    return mask[:, index][:, :, index]
