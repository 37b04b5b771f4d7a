"""The protocol between training and a method. Every hook does nothing by default.

Training calls the hooks in this order:

    modules and parameters   observed, boundaries, extend, trains
    before a step            wants_pictures, corruptions, preparation
    in a step                images, drawing, edits, targets, observe, refine, losses, compare
    after the optimiser      transformation
    when training ends       finish

Several methods may be on at once: each gets what the hooks of the methods before it returned.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
from typing import Any

from flax import nnx
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key, Shaped
import optax

from jaxdg.backbones import Edit
from jaxdg.detection.interface import Judged

Batch = dict[str, Array]
Features = tuple[Float[Array, "b _ _ _"], ...]
Decoded = tuple[Float[Array, "n _ _ _"], ...]  # features of the images that the decoder gets


@dataclasses.dataclass(frozen=True)
class Preparation:
    """A preparation that needs arrays besides the batch, such as those of another encoder.

    Attributes:
        function: of (state, batch, step from 0) to the prepared batch; jitted.
        state: what `function` needs, as shapes with shardings.
        load: reads and returns it.
    """

    function: Callable[[Any, Batch, Any], Batch]
    state: Any
    load: Callable[[], Any]


@dataclasses.dataclass(unsafe_hash=True)
class MethodOptions:
    """The settings of a method; each method adds its own and documents them.

    Attributes:
        on: whether it is used. Default False.
    """

    on: bool = False

    def check(self, config: Any, name: str) -> None:
        """Checks these settings, and that they fit the run.

        Args:
            config: of the run.
            name: of the field that holds these settings, for messages.

        Raises:
            ValueError: the message names the setting and what is allowed.
        """

    def build(self, config: Any) -> "Method":
        """The method of a run."""
        raise NotImplementedError


class Method:
    """One method in one run.

    Attributes:
        wants_pictures: batches have `style` uint8 [b, h, w, 3], a picture from `data.pictures` for
            each image.
        corruptions: of these kinds, see `data/augment/corruptions.py`, one is drawn for each image;
            batches have `corrupted` uint8 [b, h, w, 3], the image under it. () for none.
        changes_model: `finish` turns the trained model into another one.
        lasts: modules that `extend` adds stay in the model, which is built with them for evaluation
            too; see `remains`.
    """

    wants_pictures = False
    corruptions: tuple[str, ...] = ()
    changes_model = False
    lasts = False

    @property
    def changes_rows(self) -> bool:
        """Whether it reads or edits features, or the decoder gets other rows than those of the
        batch.
        """
        hooks = ("targets", "observe", "refine", "edits")
        return any(getattr(type(self), hook) is not getattr(Method, hook) for hook in hooks)

    def remains(self) -> "Method":
        """The method whose `extend` adds to a new model what is left of this one's in the end."""
        return self

    def observed(self, depth: int) -> tuple[int, ...]:
        """The blocks or stages whose features `observe` receives, ascending."""
        return ()

    def boundaries(self, depth: int) -> tuple[int, ...]:
        """Blocks where a segment ends: `extend` changes them in another way than the next block, or
        `edits` edits their features.
        """
        return ()

    def extend(self, model: Any, rngs: nnx.Rngs) -> None:
        """Adds modules to a model; its own parameters must keep their names.

        What depends on the size of the encoder's images reads it from the encoder's config when it
        is called, and holds that as `config`: see `backbones.at_size`.

        Args:
            model: with loaded weights, or abstract.
            rngs: for the new parameters.
        """

    def trains(self, name: str, trained: bool) -> bool:
        """Whether a parameter is trained.

        Args:
            name: per block, such as `backbone.blocks.3.attn.qkv.kernel`.
            trained: what `model.freeze` and the earlier methods decided.
        """
        return trained

    def preparation(
        self, task: Any, model: Any, mesh: Mesh
    ) -> Callable[[Batch, int], Batch] | Preparation | None:
        """A function of (batch, step from 0) that prepares a batch on the devices, or None.

        One that needs more than the batch is a `Preparation`, so that a run is planned without its
        files. If it returns float32 images, they count as augmented; uint8 ones are augmented in
        the step.

        Args:
            task: of the run.
            model: abstract.
            mesh: where batches lie.
        """
        return None

    def images(self, images: Float[Array, "b h w 3"], batch: Batch) -> Float[Array, "n h w 3"]:
        """The input of the encoder, RGB in 0..255: the augmented images, or several for each."""
        return images

    def drawing(
        self, model: Any, key: Key[Array, ""]
    ) -> contextlib.AbstractContextManager[None, Any]:
        """What the modules of `extend` draw at random lies in the model while this is open.

        It is open while the encoder runs in training. Modules hold no random state: what was added
        must be gone afterwards.

        Args:
            model: of this step; is changed in place.
            key: of this step.
        """
        return contextlib.nullcontext()

    def edits(self, batch: Batch) -> Mapping[int, Edit]:
        """Edits of features behind blocks or stages, from 0, while the encoder runs in training.

        An edit gets a map float [b, h, w, c] with a row for each row of the batch, and its result
        takes the map's place; see `Encoder.editing`.

        Args:
            batch: prepared, or a part of it.
        """
        return {}

    def targets(self, batch: Batch) -> Batch:
        """The batch for the losses, with a row for each row of features that `observe` returns."""
        return batch

    def observe(
        self, features: Features, places: Sequence[int], batch: Batch
    ) -> tuple[Decoded, dict[str, Float[Array, ""]]]:
        """Computes loss terms from features.

        Args:
            features: at all taps of the encoder.
            places: of the observed blocks among the taps.
            batch: prepared, or a part of it.

        Returns:
            The features for the decoder, and named loss terms; the terms of a batch are the sums
            over its parts.
        """
        return features, {}

    def refine(
        self, model: Any, features: Features, places: Sequence[int], key: Key[Array, ""]
    ) -> tuple[Features, Any]:
        """Passes features through modules of `extend`, on their way to the decoder.

        In evaluation the model does so by itself, see `Detector.refinement`.

        Args:
            model: of this step; running statistics are updated in place.
            features: at all taps of the encoder.
            places: of the observed blocks among the taps.
            key: of this step.

        Returns:
            The features for the decoder, and whatever `compare` needs.
        """
        return features, None

    def losses(self, output: Any, batch: Batch, denominator: Any) -> dict[str, Float[Array, ""]]:
        """Computes loss terms from the output of the decoder or detector.

        Args:
            output: of the model.
            batch: of `targets`, or a part of it; its rows are those of the output.
            denominator: of the losses of the global batch, see `Task.loss_denominator`.

        Returns:
            Named loss terms; the terms of a batch are the sums over its parts.
        """
        return {}

    def compare(
        self,
        model: Any,
        kept: Any,
        output: Any,
        judged: Judged | None,
        batch: Batch,
        denominator: Any,
        key: Key[Array, ""],
    ) -> dict[str, Float[Array, ""]]:
        """Computes loss terms of detection from features and what the head said of them.

        Args:
            model: of this step.
            kept: of `refine`.
            output: of the head.
            judged: the places that its losses judge.
            batch: as for `losses`.
            denominator: as for `losses`.
            key: with which the head's losses drew.

        Returns:
            Named loss terms; the terms of a batch are the sums over its parts.
        """
        return {}

    def transformation(self) -> optax.GradientTransformation | None:
        """A transformation of the optimiser's updates; its state is saved with the optimiser's."""
        return None

    def finish(self, model: Any, state: Any) -> None:
        """Turns the trained model into the plain one that is evaluated, saved and exported.

        Args:
            model: is changed in place; what `extend` added must be gone afterwards.
            state: of `transformation`, if there is one.
        """


def tap_places(model: Any, blocks: Sequence[int]) -> list[int]:
    """The places of blocks among a model's taps; blocks that are not built are left out."""
    taps = model.backbone.config.taps
    return [taps.index(block) for block in blocks if block in taps]


def interleave(*arrays: Shaped[Array, "b *s"]) -> Shaped[Array, "n *s"]:
    """The first rows of all arrays, then the second rows, ..; no row changes its device."""
    return jnp.stack(arrays, axis=1).reshape(-1, *arrays[0].shape[1:])
