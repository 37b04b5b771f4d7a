"""tqdm's visual regulariser: global features stay near those of the encoder before training.

The term is the mean squared difference of the two features of an image, those of the class token in
CLIP's joint space (ByeongHyunPak/tqdm). The encoder before training is no part of the model: it
sees a batch before the step, from the files `model.weights` and `model.text_weights`. So
checkpoints and their readers know nothing of it.
"""

import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxdg import weights
from jaxdg.methods.method import Batch, Method, MethodOptions, Preparation
from jaxdg.ranges import PositiveOrZero
from jaxdg.segmentation.tqdm.head import projection_tensors
from jaxdg.training import sharding


@dataclasses.dataclass(unsafe_hash=True)
class VisualAnchorOptions(MethodOptions):
    """The visual regulariser of tqdm; see `jaxdg/methods/visual_anchor.py`.

    Attributes:
        on: whether it is used; needs `model.decoder` tqdm, `model.weights` and
            `model.text_weights`. The encoder then sees each image twice, the second time without a
            backward pass. Default False.
        weight: of the term. Default 1.
    """

    weight: PositiveOrZero = 1.0

    def check(self, config: Any, name: str) -> None:
        """See `MethodOptions.check`."""
        if not self.on:
            return
        m = config.model
        if m.decoder != "tqdm":
            raise ValueError(
                f"{name}.on is True with model.decoder {m.decoder!r}; allowed: False, as tqdm alone"
                " has a global feature"
            )
        for field in ("weights", "text_weights"):
            if getattr(m, field) is None:
                raise ValueError(
                    f"{name}.on is True; allowed: False without model.{field}, as the method keeps"
                    " the global feature of the encoder before training"
                )

    def build(self, config: Any) -> "VisualAnchor":
        """See `MethodOptions.build`."""
        return VisualAnchor(self, config)


class ImageTower(nnx.Module):
    """An encoder with its last norm and projection: images to global features."""

    def __init__(self, backbone: Any, projection: Any):
        self.backbone = backbone
        self.projection = projection

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b e"]:
        """The class token in the joint space; images are normalised."""
        last = self.backbone.tokens(images)[-1]
        return self.projection(last[:, 0].astype(jnp.float32))


class VisualAnchor(Method):
    """The visual regulariser in one run."""

    def __init__(self, options: VisualAnchorOptions, config: Any):
        """Args:
        options: the settings.
        config: of the run.
        """
        self.options = options
        self.config = config

    def preparation(self, task: Any, model: Any, mesh: Mesh) -> Preparation:
        """See `Method.preparation`: augments the images, and adds `anchor` float32 [b, e]."""
        m = self.config.model
        graph, shapes = nnx.split(ImageTower(model.backbone, model.head.image_projection))
        places = sharding.parameter_shardings(mesh, shapes)
        placed = jax.tree.map(
            lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), shapes, places
        )
        # Stream 3 of the seed; stream 2 is TLDR's.
        key = jax.random.fold_in(jax.random.key(self.config.seed), 2**31 + 2)

        @jax.jit(out_shardings=sharding.batch_sharding(mesh))
        def prepared(state: nnx.State, batch: Batch, step: Any) -> Batch:
            image = batch["image"]
            if image.dtype == jnp.uint8:  # else a method before has augmented them
                image = task.augmented(batch, jax.random.fold_in(key, step))
            with sharding.gathered(state, mesh) as whole:
                before: Any = nnx.merge(graph, whole)
                anchor = before(task.normalize(image))
            return {**batch, "image": image, "anchor": anchor}

        def load() -> nnx.State:
            before: Any = nnx.merge(graph, placed)
            weights.load(before.backbone, m.weights)
            weights.fill(before.projection, projection_tensors(m.text_weights), m.text_weights)
            return nnx.state(before)

        return Preparation(prepared, placed, load)

    def losses(self, output: Any, batch: Batch, denominator: Any) -> dict[str, Float[Array, ""]]:
        """See `Method.losses`: the term."""
        distance = jnp.mean((output.image - batch["anchor"]) ** 2, axis=-1)
        return {"visual": self.options.weight * jnp.sum(distance) / denominator.images}
