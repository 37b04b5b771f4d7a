"""The protocol between training and a method. Every hook has a default that does nothing.

In the order in which training asks:

    modules and parameters   observed, boundaries, extend, trains
    before a step            wants_pictures, preparation
    in a step                images, targets, observe
    after the optimiser      transformation
    when training ends       finish

Several methods may be on at once: each hook sees what the methods before it have made.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float
import optax

Batch = dict[str, Array]
Features = tuple[Float[Array, "b _ _ _"], ...]
Kept = tuple[Float[Array, "n _ _ _"], ...]  # features for some of the images, or for all


@dataclasses.dataclass(unsafe_hash=True)
class MethodOptions:
    """The settings of a method; each method adds its own and documents them.

    Attributes:
        on: whether it is used. Default False.
    """

    on: bool = False

    def check(self, config: Any, name: str) -> None:
        """Refuses settings that do not fit together, or not with the run.

        Args:
            config: of the run.
            name: of these settings in it, for messages.

        Raises:
            ValueError: which, and what is allowed.
        """

    def build(self, config: Any) -> "Method":
        """The method of a run."""
        raise NotImplementedError


class Method:
    """One method in one run.

    Attributes:
        wants_pictures: every image of a batch comes with a picture, `style` uint8 [b, h, w, 3],
            drawn from `data.pictures`.
        changes_model: what is left when training ends (`finish`) differs from the model that is
            trained.
    """

    wants_pictures = False
    changes_model = False

    def observed(self, depth: int) -> tuple[int, ...]:
        """The blocks or stages whose features `observe` receives, ascending."""
        return ()

    def boundaries(self, depth: int) -> tuple[int, ...]:
        """Blocks after which a stacked segment must end, because `extend` changes the next block
        otherwise than this one.
        """
        return ()

    def extend(self, model: Any, rngs: nnx.Rngs) -> None:
        """Adds modules to a model. The names of parameters that are there already must stay.

        Args:
            model: with loaded weights, or abstract.
            rngs: initialises what is added.
        """

    def trains(self, name: str, trained: bool) -> bool:
        """Whether a parameter is trained.

        Args:
            name: of one block's parameter, such as `backbone.blocks.3.attn.qkv.kernel`.
            trained: what `model.freeze` and the methods before say.
        """
        return trained

    def preparation(
        self, task: Any, model: Any, mesh: Mesh
    ) -> Callable[[Batch, int], Batch] | None:
        """What is done to a batch on the devices before its step: a function of (batch, step from
        0); None for nothing.

        Images that are float32 afterwards have been augmented; uint8 ones are augmented in the
        step.

        Args:
            task: of the run.
            model: abstract.
            mesh: where batches lie.
        """
        return None

    def images(self, images: Float[Array, "b h w 3"], batch: Batch) -> Float[Array, "n h w 3"]:
        """What the encoder sees in a step, RGB in 0..255: the augmented images, or several for
        each.
        """
        return images

    def targets(self, batch: Batch) -> Batch:
        """What the losses are computed of: a prepared batch, with a row for each row of features
        that `observe` leaves.
        """
        return batch

    def observe(
        self, features: Features, places: Sequence[int], batch: Batch
    ) -> tuple[Kept, dict[str, Float[Array, ""]]]:
        """Looks at features and adds loss terms.

        Args:
            features: at all taps of the encoder.
            places: those of the observed blocks among them.
            batch: as prepared, or a part of it.

        Returns:
            The features that the decoder goes on with, and named loss terms; those of a batch are
            the sums of those of its parts.
        """
        return features, {}

    def transformation(self) -> optax.GradientTransformation | None:
        """What comes after the optimiser: it sees its updates and the parameters.

        Its state is saved with the optimiser's.
        """
        return None

    def finish(self, model: Any, state: Any) -> None:
        """Turns a trained model into the plain one that is evaluated, saved and exported.

        Args:
            model: the trained one; what `extend` added must be gone afterwards.
            state: of `transformation`, if there is one.
        """


def tap_places(model: Any, blocks: Sequence[int]) -> list[int]:
    """Where the features of blocks are among those that a model's `encode` returns; blocks that are
    not built are left out.
    """
    taps = model.backbone.config.taps
    return [taps.index(block) for block in blocks if block in taps]
