"""S-DGOD: cyclic-disentangled self-distillation of a detector (Wu and Deng, CVPR 2022).

An extractor, E_DI, makes the map F_di of the encoder's map F, and the detector works on it. Another
one, E_DS, makes F_ds, what belongs to the domain. No label tells which is which. Each is applied to
the results of both, and at every position

    softplus(cos(E_DS(F_di), F_di) - cos(E_DI(F_di), F_di))     "invariant"
    softplus(cos(E_DI(F_ds), F_ds) - cos(E_DS(F_ds), F_ds))     "specific"

ask an extractor to keep what it made and the other one to change it. The first term returns for
mean features of proposals, "proposal". Shallow maps S_l of the encoder, each behind an attention
and brought to the stride of F, are students of the detector on F_di: they learn the classes of the
places that it learns from ("student_class"), its class scores T there at the temperature t
("student_score"), and its map ("student_map", the norm of transform_l(S_l) - F_di over its
positions). Neither T nor F_di gets a gradient from them. The losses of the boxes count a second
time with F in place of F_di ("base_class" and so on), with the same head and the same proposals.

E_DI stays in the trained model; the rest is thrown away.

The repository of the authors (AmingWu/Single-DGOD) trains a plain detector: with the method off a
run is that. The method follows compiled files of the authors in an archive beside it
(`faster_rcnn_cvpr`, `resnet_cvpr`). Layers, terms and the factor 0.15 of the students' three terms
are theirs. They do not tell the weights of the terms and the branch that is judged, so both are
options. Differences:

- "student_map" is the mean over images of a norm each; theirs is one norm over the whole batch,
  which depends on how the batch is divided.
- A map that is not behind the others, as all are in a plain ViT, is brought by a 1x1 convolution.
- A head without proposals has points: a student's scores are read at each point that predicts a
  box, each class is a choice of its own, and "proposal" looks at the true boxes.
- The classes of students are read before their features are pooled. Both are linear.
"""

from collections.abc import Callable, Sequence
import dataclasses
from functools import partial
import math
from typing import Any, Literal, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Key

from jaxdg.backbones import StagedConfig, zoo
from jaxdg.backbones.layers import TORCH, Conv, dropout
from jaxdg.detection.arrays import Targets
from jaxdg.detection.interface import Judged
from jaxdg.detection.rcnn.gated import OfGates
from jaxdg.detection.rcnn.roi_align import roi_align
from jaxdg.detection.rcnn.roi_heads import unit
from jaxdg.methods.method import Batch, Features, Method, MethodOptions
from jaxdg.methods.tldr import quarters
from jaxdg.ranges import Positive, PositiveOrZero, ShareBelowOne
from jaxdg.tracing import BatchNorm
from jaxdg.training import sharding

PART = 0.15  # of each of the students' terms
GROUPS = 32  # of a GroupNorm
BINS = 7  # rows, and columns, that proposals are pooled to


@dataclasses.dataclass(unsafe_hash=True)
class SdgodOptions(MethodOptions):
    """S-DGOD detects on features cleared of their domain; see `jaxdg/methods/sdgod.py`.

    Attributes:
        on: whether it is used. Needs a plain encoder, or a head that reads one map of a
            hierarchical one, as faster_rcnn_c4 does. Default False.
        norm: of its layers: batch, over the whole batch, or group, for small batches. Default
            batch.
        dropout: of the extractors in training. Default 0.5.
        temperature: of the scores that students learn. Default 2.
        base: weight of the losses of the boxes on the encoder's own map; 0 to leave them out, here
            and below. Default 1.
        contrast: weight of the two terms at positions. Default 1.
        proposal_contrast: weight of the term of proposals. Default 1.
        distillation: weight of the students' terms. Default 1.
        branch: that is judged and predicts: invariant, or base for boxes read from the encoder's
            own map, with proposals, if there are any, from the other one. Default invariant.
    """

    norm: Literal["batch", "group"] = "batch"
    dropout: ShareBelowOne = 0.5
    temperature: Positive = 2.0
    base: PositiveOrZero = 1.0
    contrast: PositiveOrZero = 1.0
    proposal_contrast: PositiveOrZero = 1.0
    distillation: PositiveOrZero = 1.0
    branch: Literal["invariant", "base"] = "invariant"

    def check(self, config: Any, name: str) -> None:
        """See `MethodOptions.check`."""
        if not self.on:
            return
        m = config.model
        if config.task != "detection":
            raise ValueError(
                f"{name}.on is True with task {config.task!r}; allowed: False, as it compares boxes"
            )
        staged = isinstance(zoo.entry(m.encoder).config, StagedConfig)
        if staged and getattr(m, m.decoder).pyramid_channels is not None:
            raise ValueError(
                f"{name}.on is True with model.encoder {m.encoder!r} and model.decoder"
                f" {m.decoder!r}; allowed: False, a plain encoder or model.decoder faster_rcnn_c4,"
                " as one map of the encoder is refined"
            )
        if self.base and isinstance(getattr(m, m.decoder), OfGates):
            raise ValueError(
                f"{name}.base is {self.base} with model.decoder {m.decoder!r}; allowed: 0, as gates"
                " would count each step twice"
            )
        if config.tldr.on:
            raise ValueError(
                f"{name}.on and tldr.on are True; allowed: one of them, as the latter trains on"
                " further images in the rows of a batch"
            )

    def build(self, config: Any) -> "Sdgod":
        """See `MethodOptions.build`."""
        return Sdgod(self, config)


class Kept(NamedTuple):
    """What the loss terms are computed from.

    Attributes:
        features: at all taps, as the encoder made them.
        invariant: F_di.
        cycles: by name, what the extractors make of what they made: E_DI(F_di) is `ii`, E_DS(F_di)
            `is`, E_DI(F_ds) `si`; and `s` for F_ds. Those that the terms need.
        students: their maps S_l.
    """

    features: Features
    invariant: Float[Array, "b h w c"]
    cycles: dict[str, Float[Array, "b h w c"]]
    students: list[Float[Array, "b h w _"]]


class Sdgod(Method):
    """S-DGOD in one run."""

    changes_model = True
    lasts = True

    def __init__(self, options: SdgodOptions, config: Any, trained: bool = False):
        """Args:
        options: the settings.
        config: of the run.
        trained: add E_DI alone.
        """
        self.options = options
        self.config = config
        self.trained = trained

    def remains(self) -> "Sdgod":
        """See `Method.remains`: E_DI."""
        return Sdgod(self.options, self.config, trained=True)

    def observed(self, depth: int) -> tuple[int, ...]:
        """See `Method.observed`: the ends of three quarters, or the stages up to that of F."""
        if self.trained or not self.options.distillation:
            return ()
        return quarters(depth)[:3]

    def extend(self, model: Any, rngs: nnx.Rngs) -> None:
        """See `Method.extend`."""
        o = self.options
        encoder = model.backbone.config
        own = model.read[0]
        channels = model.backbone.channels
        kw: Any = dict(norm=o.norm, dtype=encoder.dtype, rngs=rngs)
        extractor = partial(Extractor, channels[own], dropout=o.dropout, **kw)
        model.refinement = extractor(3, proposes_only=o.branch == "base")
        if self.trained:
            return
        if o.contrast or o.proposal_contrast:
            model.specific = extractor(5)
        if o.distillation:
            taps = encoder.taps
            places = [taps.index(i) for i in self.observed(encoder.depth) if i in taps]
            choices, outcomes = model.head.choices
            students = []
            for place in places:
                halvings = round(math.log2(encoder.strides[own] / encoder.strides[place]))
                students.append(
                    Student(
                        channels[place],
                        channels[own],
                        choices * outcomes,
                        None if place == own else halvings,
                        **kw,
                    )
                )
            model.students = nnx.List(students)

    def preparation(self, task: Any, model: Any, mesh: Mesh) -> Callable[[Batch, int], Batch]:
        """See `Method.preparation`: adds the weights of images and true boxes in means."""

        @jax.jit(out_shardings=sharding.batch_sharding(mesh))
        def shares(batch: Batch) -> Batch:
            valid = Targets.of(batch).valid
            return {
                "image_share": jnp.full(len(valid), 1 / len(valid)),
                "box_share": valid / jnp.maximum(jnp.sum(valid), 1),
            }

        fields = ("boxes", "classes", "valid", "crowd")

        def prepared(batch: Batch, step: Any) -> Batch:
            return {**batch, **shares({key: batch[key] for key in fields if key in batch})}

        return prepared

    def refine(
        self, model: Any, features: Features, places: Sequence[int], key: Key[Array, ""]
    ) -> tuple[Features, Kept]:
        """See `Method.refine`: F_di takes the place of F."""
        o = self.options
        extractors = {"i": model.refinement}
        if o.contrast or o.proposal_contrast:
            extractors["s"] = model.specific

        def extracted(name: str, x: Array, draw: int) -> Array:
            return extractors[name](x, jax.random.fold_in(key, draw), True)

        first = features[model.read[0]]
        invariant = extracted("i", first, 0)
        cycles = {}
        if o.contrast or o.proposal_contrast:
            cycles["ii"] = extracted("i", invariant, 1)
            cycles["is"] = extracted("s", invariant, 2)
        if o.contrast:
            cycles["s"] = extracted("s", first, 3)
            cycles["si"] = extracted("i", cycles["s"], 4)
            cycles["ss"] = extracted("s", cycles["s"], 5)
        students = []
        if o.distillation:
            students = [
                student(features[place])
                for student, place in zip(model.students, places, strict=True)
            ]
        return model.with_first(features, invariant), Kept(features, invariant, cycles, students)

    def compare(
        self,
        model: Any,
        kept: Kept,
        output: Any,
        judged: Judged | None,
        batch: Batch,
        denominator: Any,
        key: Key[Array, ""],
    ) -> dict[str, Float[Array, ""]]:
        """See `Method.compare`: all terms."""
        assert judged is not None
        o = self.options
        cycles = kept.cycles
        share = batch["image_share"]
        stride = model.backbone.config.strides[model.read[0]]
        terms = {}

        def mean(values: Float32[Array, "b h w"]) -> Float32[Array, ""]:
            return jnp.sum(share * jnp.mean(values, (1, 2)))

        if o.base:
            again = model.reread(output, kept.features, key, train=True)
            losses = model.losses(again, batch, denominator, key)
            # Proposals are those of one branch.
            own = {name: x for name, x in losses.items() if not name.startswith("rpn_")}
            terms |= {f"base_{name}": o.base * x for name, x in own.items()}
        if o.contrast:
            terms["invariant"] = o.contrast * mean(
                contrast(kept.invariant, cycles["ii"], cycles["is"])
            )
            terms["specific"] = o.contrast * mean(contrast(cycles["s"], cycles["ss"], cycles["si"]))
        if o.proposal_contrast:
            boxes, weight = judged.boxes, judged.share
            if judged.points:
                boxes, weight = Targets.of(batch).boxes, batch["box_share"]
            joined = jnp.concatenate([kept.invariant, cycles["ii"], cycles["is"]], axis=-1)
            three = jnp.split(pooled(joined, boxes, stride), 3, axis=-1)
            terms["proposal"] = o.proposal_contrast * jnp.sum(weight * contrast(*three))
        if o.distillation:
            found = [
                student.terms(x, kept.invariant, judged, stride, o.temperature, share)
                for student, x in zip(model.students, kept.students, strict=True)
            ]
            for name in found[0]:
                total = sum(one[name] for one in found)
                terms[f"student_{name}"] = o.distillation * PART * total
        return terms

    def finish(self, model: Any, state: Any) -> None:
        """See `Method.finish`: E_DI is left."""
        for name in ("specific", "students"):
            if hasattr(model, name):
                delattr(model, name)


class Extractor(nnx.Module):
    """Three convolutions that keep the size of a map; the channels between them are half as many.

    Attributes:
        proposes_only: see `Detector.refinement`.
    """

    def __init__(
        self,
        channels: int,
        side: int,
        *,
        dropout: float,
        proposes_only: bool = False,
        norm: str,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        self.rate = dropout
        self.proposes_only = proposes_only
        inside = channels
        for i, outside in enumerate((channels // 2, channels // 2, channels), 1):
            conv = Conv(
                inside,
                outside,
                (side, side),
                padding=side // 2,
                kernel_init=TORCH,
                dtype=jnp.dtype(dtype),
                rngs=rngs,
            )
            setattr(self, f"conv{i}", conv)
            setattr(self, f"norm{i}", normalisation(norm, outside, rngs))
            inside = outside

    def __call__(
        self, x: Float[Array, "b h w c"], key: Key[Array, ""] | None = None, train: bool = False
    ) -> Float[Array, "b h w c"]:
        """The map; a key turns dropout on, and `train` the statistics of the batch."""
        for i in (1, 2, 3):
            x = normalised(getattr(self, f"norm{i}"), getattr(self, f"conv{i}")(x), train)
            if i < 3:
                own_key = None if key is None else jax.random.fold_in(key, i)
                x = dropout(jax.nn.relu(x), own_key, self.rate)
        return x


class Normalised(nnx.Module):
    """A convolution without bias that rounds sides up, normalised, in training alone."""

    def __init__(
        self,
        inside: int,
        outside: int,
        side: int = 1,
        stride: int = 1,
        groups: int = 1,
        *,
        norm: str,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        self.conv = nnx.Conv(
            inside,
            outside,
            (side, side),
            (stride, stride),
            padding=side // 2,
            feature_group_count=groups,
            use_bias=False,
            kernel_init=TORCH,
            dtype=jnp.dtype(dtype),
            rngs=rngs,
        )
        self.norm = normalisation(norm, outside, rngs)

    def __call__(self, x: Float[Array, "b _ _ _"]) -> Float[Array, "b h w c"]:
        return normalised(self.norm, self.conv(x), True)


class Student(nnx.Module):
    """A shallow map that learns to say what the detector says; in training alone."""

    def __init__(
        self,
        channels: int,
        wanted: int,
        scores: int,
        halvings: int | None,
        *,
        norm: str,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        """Args:
        channels: of the map.
        wanted: channels of the teacher's map.
        scores: logits of a place.
        halvings: from the map to the teacher's; None leaves it as it is.
        norm: batch or group.
        dtype: compute dtype.
        rngs: initialises the parameters.
        """
        layer = partial(Normalised, norm=norm, dtype=dtype, rngs=rngs)
        c = channels
        self.attention = nnx.List([layer(c, c, 3, groups=c), layer(c, c, 3, groups=c)])
        self.attention_norm = normalisation(norm, c, rngs)
        scale = {
            None: (),
            0: ((c, c),),
            1: ((c, c // 2), (c // 2, c // 2, 3, 2), (c // 2, c)),
            2: ((c, c // 2, 3, 2), (c // 2, c // 2, 3, 2), (c // 2, c)),
        }[halvings]
        self.scale = nnx.List([layer(*sizes) for sizes in scale])
        self.transform = layer(c, wanted)
        self.classifier = Conv(
            c, scores, (1, 1), kernel_init=TORCH, dtype=jnp.dtype(dtype), rngs=rngs
        )

    def __call__(self, x: Float[Array, "b _ _ c"]) -> Float[Array, "b h w c"]:
        """S_l, at the stride of the teacher's map."""
        x = self.attended(x) * x
        for layer in self.scale:
            x = jax.nn.relu(layer(x))
        return x

    def attended(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """The attention, from 0.5 to below 1."""
        for layer in self.attention:
            x = jax.nn.relu(layer(x))
        return jax.nn.sigmoid(jax.nn.relu(normalised(self.attention_norm, x, True)))

    def terms(
        self,
        x: Float[Array, "b h w c"],
        teacher: Float[Array, "b h w d"],
        judged: Judged,
        stride: int | float,
        temperature: float,
        image_share: Float32[Array, " b"],
    ) -> dict[str, Float32[Array, ""]]:
        """The three terms, without their weights.

        Args:
            x: S_l.
            teacher: F_di.
            judged: what the detector on F_di said, and what is true.
            stride: pixels a feature.
            temperature: of scores.
            image_share: weights of the images in a mean.
        """
        teacher, logits = jax.lax.stop_gradient((teacher.astype(jnp.float32), judged.logits))
        scores = self.classifier(x).astype(jnp.float32)
        places = partial(at_points if judged.points else pooled, scores, judged.boxes, stride)
        own = places().reshape(logits.shape)
        right = jax.nn.one_hot(judged.truth, logits.shape[-1])
        mine = self.transform(x).astype(jnp.float32)
        return {
            "class": jnp.sum(judged.share * cross_entropy(right, own)),
            "score": jnp.sum(
                judged.share
                * cross_entropy(jax.nn.softmax(logits / temperature), own / temperature)
            ),
            "map": jnp.sum(image_share * distance(mine, teacher)),
        }


def normalisation(kind: str, channels: int, rngs: nnx.Rngs) -> nnx.BatchNorm | nnx.GroupNorm:
    """A layer that normalises channels, in float32: over the batch, or in groups of an image."""
    if kind == "batch":
        return BatchNorm(channels, momentum=0.9, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
    groups = math.gcd(GROUPS, channels)
    return nnx.GroupNorm(channels, groups, epsilon=1e-5, use_fast_variance=False, rngs=rngs)


def normalised(
    norm: nnx.BatchNorm | nnx.GroupNorm, x: Float[Array, "b h w c"], train: bool
) -> Float[Array, "b h w c"]:
    """Normalises in float32; with `train` a BatchNorm takes, and adds, the batch's statistics."""
    whole = x.astype(jnp.float32)
    if isinstance(norm, nnx.BatchNorm):
        return norm(whole, use_running_average=not train).astype(x.dtype)
    return norm(whole).astype(x.dtype)


def contrast(
    anchor: Float[Array, "*n c"], same: Float[Array, "*n c"], other: Float[Array, "*n c"]
) -> Float32[Array, "*n"]:
    """softplus(cos(other, anchor) - cos(same, anchor)) over channels: log 2 where both are as near.

    It is -log(e^p / (e^p + e^n)) of the two cosines.
    """
    anchor, same, other = (unit(x) for x in (anchor, same, other))
    return jax.nn.softplus(jnp.sum(other * anchor, axis=-1) - jnp.sum(same * anchor, axis=-1))


def distance(
    one: Float32[Array, "b h w c"], other: Float32[Array, "b h w c"]
) -> Float32[Array, " b"]:
    """The norm of the difference of two maps, divided by the positions; its gradient at 0 is 0."""
    squares = jnp.sum((one - other) ** 2, (1, 2, 3))
    differs = squares > 0
    root = jnp.where(differs, jnp.sqrt(jnp.where(differs, squares, 1.0)), 0.0)
    return root / (one.shape[1] * one.shape[2])


def cross_entropy(p: Float32[Array, "*n c o"], logits: Float32[Array, "*n c o"]) -> Array:
    """H(p, softmax(logits)) [*n], summed over c choices."""
    return -jnp.sum(p * jax.nn.log_softmax(logits), axis=(-2, -1))


def pooled(
    x: Float[Array, "b h w c"], boxes: Float32[Array, "b p 4"], stride: int | float
) -> Float32[Array, "b p c"]:
    """The mean features of boxes."""
    bins = roi_align((x,), boxes, (stride,), (BINS, BINS), samples=None)
    return jnp.mean(bins.astype(jnp.float32), axis=(2, 3))


def at_points(
    x: Float[Array, "b h w c"], boxes: Float32[Array, "b p 4"], stride: int | float
) -> Float32[Array, "b p c"]:
    """The features at boxes without sides, between the four nearest ones."""
    bins = roi_align((x,), boxes, (stride,), (1, 1), samples=1)
    return bins[:, :, 0, 0].astype(jnp.float32)
