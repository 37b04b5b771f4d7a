"""Four pyramid levels from four taps of a plain encoder, learned or interpolated.

`Pyramid` is that of the public VLTSeg re-implementation. The shallowest tap is enlarged four times
and the next one twice. The third stays, and max pooling halves the deepest. The re-implementation
normalises with BatchNorm over the global batch. LayerNorm is the default for new runs, as it needs
no batch statistics.

`Interpolation` has the same levels and no parameters; Rein and SoMA read their encoders so.
"""

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdg.backbones.layers import is_half, spread
from jaxdg.tracing import BatchNorm


class Double(nnx.Module):
    """Transposed convolution with kernel 2 and stride 2: a linear layer whose output is 2x2 pixels.

    `kernel[i, j]` makes the pixel in row i, column j: torch's ConvTranspose2d weight with the axes
    (in, out, i, j) moved to (i, j, in, out). As a matrix product instead of XLA's dilated
    convolution it cut a whole training step of 8 crops 128x128 on 2 CPU cores from 1.12 to 0.39 s
    (2026-11-22). Kernels start as torch's do, within 1 / sqrt(4 out).
    """

    def __init__(self, channels: int, out: int | None = None, *, dtype: str, rngs: nnx.Rngs):
        out = out or channels
        init = nnx.initializers.variance_scaling(
            1 / 3, "fan_in", "uniform", in_axis=(0, 1, 3), out_axis=2
        )
        self.kernel = nnx.Param(init(rngs.params(), (2, 2, channels, out)))
        self.bias = nnx.Param(jnp.zeros(out))
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 o"]:
        b, h, w, c = x.shape
        kernel = self.kernel[...].astype(self.dtype)
        if is_half(self.dtype):
            # The bias is added to what the product gives, before pixels are placed, so that a GPU
            # adds it in the product.
            y = x.astype(self.dtype) @ kernel.transpose(2, 0, 1, 3).reshape(c, -1)
            y = y + spread(jnp.tile(self.bias[...], 4), y)
            return jnp.swapaxes(y.reshape(b, h, w, 2, 2, -1), 2, 3).reshape(b, 2 * h, 2 * w, -1)
        y = jnp.einsum("bhwc,ijco->bhiwjo", x.astype(self.dtype), kernel)
        return y.reshape(b, 2 * h, 2 * w, -1) + self.bias[...]


class Pyramid(nnx.Module):
    """Taps at one stride p to levels at strides p/4, p/2, p and 2p, with unchanged channels."""

    def __init__(
        self, channels: int, norm: str = "layer", *, dtype: str = "float32", rngs: nnx.Rngs
    ):
        """Builds the pyramid with random parameters.

        Args:
            channels: of each tap and each level.
            norm: "layer", or "batch" for statistics over the global batch (checkpoints of the
                re-implementation).
            dtype: compute dtype.
            rngs: initialises the parameters.
        """
        self.fpn1_up1 = Double(channels, dtype=dtype, rngs=rngs)
        self.fpn1_norm = (
            BatchNorm(channels, momentum=0.9, rngs=rngs)
            if norm == "batch"
            else nnx.LayerNorm(channels, rngs=rngs)
        )
        self.fpn1_up2 = Double(channels, dtype=dtype, rngs=rngs)
        self.fpn2 = Double(channels, dtype=dtype, rngs=rngs)

    def __call__(
        self, features: tuple[Float[Array, "b _ _ c"], ...], train: bool = False
    ) -> tuple[Float[Array, "b _ _ c"], ...]:
        """Four taps [b, h, w, c] to [b, 4h, 4w, c], [b, 2h, 2w, c], the third, [b, h/2, w/2, c]."""
        x1, x2, x3, x4 = features
        x1 = self.fpn1_up1(x1)
        x1 = self._activated(x1, train)
        x1 = self.fpn1_up2(x1)
        return x1, self.fpn2(x2), x3, nnx.max_pool(x4, (2, 2), strides=(2, 2))

    def _activated(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w c"]:
        """GELU of the normalised features."""
        graph, state = nnx.split(self.fpn1_norm)

        def run(state, x):
            norm = nnx.merge(graph, state)
            options = {}
            if isinstance(norm, nnx.BatchNorm):
                options["use_running_average"] = not train
            return jax.nn.gelu(norm(x, **options), approximate=False), nnx.state(norm)

        if self.fpn1_up1.dtype.itemsize == 2:
            # Both are float32 and so twice as large: the backward pass computes them anew.
            run = jax.checkpoint(run)
        y, state = run(state, x)
        if train:
            nnx.update(self.fpn1_norm, nnx.filter_state(state, nnx.BatchStat))
        return y


class Interpolation(nnx.Module):
    """Taps at one stride p to levels at strides p/4, p/2, p and 2p, resized bilinearly.

    Equal to torch's `F.interpolate(mode="bilinear", align_corners=False)` with a `scale_factor` of
    4, 2, 1 and 0.5.
    """

    def __call__(
        self, features: tuple[Float[Array, "b _ _ c"], ...], train: bool = False
    ) -> tuple[Float[Array, "b _ _ c"], ...]:
        """Four taps [b, h, w, c] to [b, 4h, 4w, c], [b, 2h, 2w, c], the third, [b, h/2, w/2, c];
        `train` changes nothing.
        """
        x1, x2, x3, x4 = features
        # A sample of half the resolution lies in the middle of four features.
        halved = nnx.avg_pool(x4.astype(jnp.float32), (2, 2), strides=(2, 2)).astype(x4.dtype)
        return enlarged(x1, 4), enlarged(x2, 2), x3, halved


def enlarged(x: Float[Array, "b h w c"], factor: int) -> Float[Array, "b h2 w2 c"]:
    """Enlarges both sides bilinearly by a whole factor; the border is repeated.

    Every feature has its samples at the same places around it, so that its neighbours are read by
    shifting the map.
    """
    dtype = x.dtype
    x = x.astype(jnp.float32)
    for axis in (1, 2):
        n = x.shape[axis]
        padded = jnp.pad(x, [(int(i == axis),) * 2 for i in range(4)], mode="edge")
        before = jax.lax.slice_in_dim(padded, 0, n, axis=axis)
        after = jax.lax.slice_in_dim(padded, 2, n + 2, axis=axis)
        places = [(i + 0.5) / factor - 0.5 for i in range(factor)]
        samples = [
            (1 - abs(place)) * x + abs(place) * (before if place < 0 else after) for place in places
        ]
        shape = (*x.shape[:axis], n * factor, *x.shape[axis + 1 :])
        x = jnp.stack(samples, axis=axis + 1).reshape(shape)
    return x.astype(dtype)
