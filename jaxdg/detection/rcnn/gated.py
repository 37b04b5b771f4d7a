"""Two-stage detectors whose box head is gated: masks decided by a proposal's features and scenes.

Follows "Prompt-driven Dynamic Object-Centric Learning for Single Domain Generalization" (Li et al.
2024, Daniel00008/PDOC), whose gates lie in the last stage of a CLIP ResNet. The gates themselves
and the settings that give what the authors' code does are in `gates.py`; the regularisers are
DGNet's. Different: the work that a mask spares is counted with the gates' own work on both sides,
so that it is 1 with all gates open, and the average pool's smaller map counts for what it is; a
batch that is computed in parts has each part's own shares.
"""

import dataclasses
from functools import partial
import math
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Key

from jaxdg.backbones import ClipResnet
from jaxdg.backbones.stacking import gathered, stores_product
from jaxdg.detection.interface import HeadContext
from jaxdg.detection.rcnn.detectors import C4Config, Rcnn, RcnnConfig, single_stage
from jaxdg.detection.rcnn.gates import (
    GatesConfig,
    SlotAttention,
    channel_gate,
    spatial_gate,
    spread_cells,
)
from jaxdg.detection.rcnn.roi_heads import BoxHead, Res5Head, RoiHeadsConfig, TextScore, Vectors
from jaxdg.tracing import Statistic


class OfGates:
    """The part that the settings of gated heads share."""

    gates: GatesConfig

    @property
    def scenes(self) -> tuple[str, ...]:
        """See `HeadConfig.scenes`."""
        return self.gates.scenes

    @property
    def scene_file(self) -> str | None:
        """See `HeadConfig.scene_file`."""
        return self.gates.file


@dataclasses.dataclass(unsafe_hash=True)
class GatedC4Config(OfGates, C4Config):
    """Sizes of `C4Config`, and the gates of the last stage.

    Attributes:
        rpn: see `C4Config`.
        roi: see `C4Config`.
        attention_pool: see `C4Config`.
        text_classifier: see `C4Config`.
        templates: see `C4Config`.
        gates: their settings.
        first_mask: masks lie behind the first convolution of a block too; the authors' code
            computes them and leaves them aside. Default True.
        class_attention: the vector that classes are read from is refined by the class names'
            embeddings; False: by itself alone, which the authors' code comes to. With a text
            classifier. Default True.
    """

    gates: GatesConfig = dataclasses.field(default_factory=GatesConfig)
    first_mask: bool = True
    class_attention: bool = True

    def check(self, name: str) -> None:
        """See `HeadConfig.check`."""
        super().check(name)
        self.gates.check(f"{name}.gates")

    def box_head(self, context: HeadContext, *, rngs: nnx.Rngs) -> "GatedRes5Head":
        """See `C4Config.box_head`."""
        return GatedRes5Head(self, context, rngs=rngs)

    def text_score(
        self, channels: int, context: HeadContext, *, rngs: nnx.Rngs
    ) -> "AttendedTextScore":
        """See `C4Config.text_score`."""
        k = context.num_classes
        return AttendedTextScore(channels, k, self.class_attention, dtype=context.dtype, rngs=rngs)


@dataclasses.dataclass(unsafe_hash=True)
class GatedRcnnConfig(OfGates, RcnnConfig):
    """Sizes of `RcnnConfig` with one stage, and gates of a pyramid's box head.

    The paper has none of these. Spatial gates switch the pooled features of a proposal, and channel
    gates the units of the first linear layer.

    Attributes:
        rpn: see `RcnnConfig`.
        roi: see `RcnnConfig`. Default: one stage, with a box for each class.
        channels: see `RcnnConfig`.
        levels: see `RcnnConfig`.
        gates: their settings; scenes have vectors of the encoder's channels in `gates.file`.
    """

    roi: RoiHeadsConfig = dataclasses.field(default_factory=lambda: single_stage().roi)
    gates: GatesConfig = dataclasses.field(default_factory=lambda: GatesConfig(cell=1))

    def check(self, name: str) -> None:
        """See `HeadConfig.check`."""
        super().check(name)
        self.gates.check(f"{name}.gates")
        if len(self.roi.stages) > 1:
            raise ValueError(f"{name}.roi.stages is {self.roi.stages}; allowed: one, with gates")
        if not self.roi.fcs:
            raise ValueError(f"{name}.roi.fcs is 0; allowed: at least 1, whose units have gates")

    def build(self, context: HeadContext, *, rngs: nnx.Rngs) -> Rcnn:
        """See `HeadConfig.build`."""
        self.check("the gated head")
        head = GatedBoxHead(self, context, rngs=rngs)
        return Rcnn(self, [head], self.channels, len(self.levels), context, rngs=rngs)


class Opened(NamedTuple):
    """What the gates of n proposals leave open.

    Attributes:
        space: share of the positions, for each spatial gate.
        channel: share of the channels, for each channel gate.
        work: share of the head's multiplications.
    """

    space: Float32[Array, "g n"]
    channel: Float32[Array, "h n"]
    work: Float32[Array, "n"]


class Gating(nnx.Module):
    """What gates do in training, and what is asked of them.

    Attributes:
        steps: batches seen in training.
        space: share of open positions in the last batch, for each spatial gate; rows of metrics
            show the mean.
        channel: share of open channels, for each channel gate, likewise.
        work: share of the head's multiplications, likewise.
    """

    def __init__(self, config: GatesConfig, spatial: int, channel: int):
        """Args:
        config: settings.
        spatial: number of spatial gates.
        channel: number of channel gates.
        """
        self.config = config
        self.steps = Statistic(jnp.zeros(()))
        self.space = Statistic(jnp.ones(spatial), metric="open_space")
        self.channel = Statistic(jnp.ones(channel), metric="open_channel")
        self.work = Statistic(jnp.ones(()), metric="work")

    def note(self, opened: Opened, valid: Bool[Array, "n"]) -> None:
        """Keeps the mean shares of the proposals that count, at least one."""
        for statistic, shares in zip((self.space, self.channel, self.work), opened, strict=True):
            kept = jnp.sum(jnp.where(valid, shares, 0.0), axis=-1)
            statistic[...] = kept / jnp.sum(valid)

    def terms(self, share: Float32[Array, ""]) -> dict[str, Float32[Array, ""]]:
        """The terms "sparsity" and "balance", where they have a weight; counts a step.

        Args:
            share: of the batch that the proposals of `note` are from.
        """
        c = self.config
        tight = jnp.exp(-self.steps[...] / c.fade)
        self.steps[...] += share
        terms = {}
        if c.sparsity:
            terms["sparsity"] = share * c.sparsity * (self.work[...] - c.density) ** 2
        if c.balance:
            wanted = tight * math.sqrt(c.density)
            least, most = wanted, 1 - tight + wanted

            def outside(shares):
                below, above = jax.nn.relu(least - shares), jax.nn.relu(shares - most)
                return jnp.mean(below**2) + jnp.mean(above**2)

            both = outside(self.space[...]) + outside(self.channel[...])
            terms["balance"] = share * c.balance * both
        return terms


def scene_room(config: GatesConfig, channels: int) -> nnx.BatchStat:
    """Room for the embeddings of the scenes; a constant for none."""
    return nnx.BatchStat(jnp.zeros((max(1, len(config.scenes)), channels)))


class Gated:
    """A `RoiHead` with `gating`, of which `run` is to be written."""

    gating: Gating
    scenes: nnx.BatchStat

    def run(
        self,
        x: Float[Array, "n s s _"],
        key: Key[Array, ""] | None,
        valid: Bool[Array, "n"] | None,
    ) -> tuple[Vectors, Opened]:
        """Vectors, and what the gates left open.

        Args:
            x: pooled features.
            key: draws the gates; None: they are decided.
            valid: proposals whose statistics are taken; None: running ones are used.
        """
        raise NotImplementedError

    def __call__(
        self,
        x: Float[Array, "n s s _"],
        key: Key[Array, ""] | None = None,
        train: bool = False,
        valid: Bool[Array, " n"] | None = None,
    ) -> Vectors:
        """See `RoiHead.__call__`."""
        if not train:
            return self.run(x, None, None)[0]
        valid = jnp.ones(len(x), bool) if valid is None else valid
        valid = valid | ~jnp.any(valid)  # a batch without proposals has statistics too
        vectors, opened = self.run(x, key, valid)
        self.gating.note(opened, valid)
        return vectors

    def terms(self, share: Float32[Array, ""]) -> dict[str, Float32[Array, ""]]:
        """See `RoiHead.terms`."""
        return self.gating.terms(share)


class BlockGates(nnx.Module):
    """The gates of one bottleneck, and what they spare."""

    def __init__(
        self,
        config: GatedC4Config,
        inside: int,
        width: int,
        side: int,
        first: bool,
        scenes: int,
        *,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        """Args:
        config: settings.
        inside: channels of the block's input.
        width: channels between its convolutions.
        side: rows and columns of its input.
        first: it halves the map and has a convolution beside it.
        scenes: channels of the scenes.
        dtype: compute dtype.
        rngs: initialises the parameters.
        """
        kw: Any = dict(dtype=dtype, rngs=rngs)
        c = config.gates
        self.side = side
        self.mask_s = spatial_gate(c, inside, side, **kw)
        self.mask_c1 = (
            channel_gate(c, inside, width, width, scenes, **kw) if config.first_mask else None
        )
        self.mask_c2 = channel_gate(c, width, width, width, scenes, **kw)
        positions = side**2
        after = (side // 2) ** 2 if first else positions
        cells = -(-side // c.cell)
        self.convolutions = (
            positions * inside * width,
            9 * positions * width**2,
            after * width * 4 * width,
        )
        self.always = after * inside * 4 * width if first else 0
        if not c.fixed:
            self.always += 9 * cells**2 * inside + 2 * width**2
            self.always += (inside + width) * width if config.first_mask else 0

    def work(
        self,
        space: Float32[Array, "n"],
        first: Float32[Array, "n"] | None,
        second: Float32[Array, "n"],
    ) -> Float32[Array, "n"]:
        """Multiplications for proposals with these shares of open gates."""
        one, two, three = self.convolutions
        one, two = (one, two) if first is None else (one * space * first, two * first)
        return one + (two + three) * space * second + self.always


class GatedRes5Head(Gated, Res5Head):
    """The last stage of a CLIP ResNet, masked behind its first two convolutions in every block."""

    def __init__(self, config: GatedC4Config, context: HeadContext, *, rngs: nnx.Rngs):
        """Args:
        config: settings.
        context: what it is built for; the encoder is a CLIP ResNet.
        rngs: initialises the gates.
        """
        backbone: ClipResnet = context.backbone  # pyright: ignore[reportAssignmentType]
        Res5Head.__init__(self, backbone, config.attention_pool)
        c = backbone.config
        blocks = c.blocks[3]
        self.gating = Gating(config.gates, blocks, blocks * (2 if config.first_mask else 1))
        self.scenes = scene_room(config.gates, c.embedding)
        self.gates = nnx.List(
            [
                BlockGates(
                    config,
                    c.widths[3] if i else c.widths[2],
                    c.widths[3] // 4,
                    config.roi.size // 2 if i else config.roi.size,
                    i == 0,
                    c.embedding,
                    dtype=context.dtype,
                    rngs=rngs,
                )
                for i in range(c.blocks[3])
            ]
        )

    def run(
        self,
        x: Float[Array, "n s s _"],
        key: Key[Array, ""] | None,
        valid: Bool[Array, "n"] | None,
    ) -> tuple[Vectors, Opened]:
        """See `Gated.run`."""
        blocks = len(self.gates)
        keys = [None] * blocks if key is None else list(jax.random.split(key, blocks))
        space, channel, work = [], [], []
        for i, gates in enumerate(self.gates):
            x, opened = self.block(i, x, gates, keys[i], valid)
            space.append(opened[0])
            channel += [share for share in opened[1:] if share is not None]
            work.append(gates.work(*opened))
        everything = sum(sum(gates.convolutions) + gates.always for gates in self.gates)
        opened = Opened(
            jnp.stack(space), jnp.stack(channel), jnp.sum(jnp.stack(work), axis=0) / everything
        )
        return self.read(x), opened

    def block(
        self,
        i: int,
        x: Float[Array, "n _ _ _"],
        gates: BlockGates,
        key: Key[Array, ""] | None,
        valid: Bool[Array, "n"] | None,
    ) -> tuple[
        Float[Array, "n _ _ _"],
        tuple[Float32[Array, "n"], Float32[Array, "n"] | None, Float32[Array, "n"]],
    ]:
        """The output of a block, and its gates' open shares as `BlockGates.work` takes them."""
        graph, state = nnx.split(self.res5.single(i))
        block = nnx.merge(graph, gathered(state))
        policy = None if self.res5.remat else stores_product
        cheap = partial(jax.checkpoint, policy=policy)  # stores what `Stack` stores
        keys = [None] * 3 if key is None else list(jax.random.split(key, 3))
        scenes = self.scenes[...]

        cells = spread_cells(gates.mask_s(x, keys[0]), gates.side)
        first = None if gates.mask_c1 is None else gates.mask_c1(x, keys[1], scenes, valid)

        def masked(y, channels):
            return y * cells.astype(y.dtype) * channels[:, None, None].astype(y.dtype)

        y = cheap(lambda x: jax.nn.relu(block.bn1(block.conv1(x))))(x)
        if first is not None:
            y = masked(y, first)
        second = gates.mask_c2(y, keys[2], scenes, valid)
        y = masked(cheap(lambda y: jax.nn.relu(block.bn2(block.conv2(y))))(y), second)
        x = cheap(block.join)(x, y)
        shares = cells.mean((1, 2, 3)), None if first is None else first.mean(1), second.mean(1)
        return x, shares


class GatedBoxHead(Gated, BoxHead):
    """`BoxHead`, masked before its first layer and behind its first linear one."""

    def __init__(self, config: GatedRcnnConfig, context: HeadContext, *, rngs: nnx.Rngs):
        """Args:
        config: settings.
        context: what it is built for.
        rngs: initialises the parameters.
        """
        kw: Any = dict(dtype=context.dtype, rngs=rngs)
        c = config.roi
        channels = config.channels
        encoder: Any = context.backbone
        width = encoder.channels[-1]
        BoxHead.__init__(self, c, channels, **kw)
        self.gating = Gating(config.gates, 1, 1)
        self.scenes = scene_room(config.gates, width)
        self.mask_s = spatial_gate(config.gates, channels, c.size, **kw)
        self.mask_c = channel_gate(config.gates, channels, channels, c.hidden, width, **kw)
        positions = c.size**2
        convs = [9 * positions * c.channels * channels] if c.convs else []
        convs += [9 * positions * c.channels**2] * (c.convs - 1)
        self.first = convs[0] if convs else 0
        self.linear = positions * (c.channels if convs else channels) * c.hidden
        self.last = c.hidden**2 if c.fcs > 1 else 0
        self.always = sum(convs[1:]) + max(c.fcs - 2, 0) * c.hidden**2
        if not config.gates.fixed:
            cells = -(-c.size // config.gates.cell)
            self.always += 9 * cells**2 * channels + channels**2 + channels * c.hidden

    def run(
        self,
        x: Float[Array, "n s s _"],
        key: Key[Array, ""] | None,
        valid: Bool[Array, "n"] | None,
    ) -> tuple[Vectors, Opened]:
        """See `Gated.run`."""
        keys = [None, None] if key is None else list(jax.random.split(key))
        cells = spread_cells(self.mask_s(x, keys[0]), x.shape[1])
        x = x * cells.astype(x.dtype)
        channels = self.mask_c(x, keys[1], self.scenes[...], valid)
        for i in range(self.convs):
            x = jax.nn.relu(getattr(self, f"conv{i + 1}")(x))
        x = x.reshape(len(x), -1)
        for i in range(self.fcs):
            x = jax.nn.relu(getattr(self, f"fc{i + 1}")(x))
            if i == 0:
                x = x * channels.astype(x.dtype)
        space, channel = cells.mean((1, 2, 3)), channels.mean(1)
        seen = 1.0 if self.convs else space  # norms fill what the first convolution left out
        left = self.first * space + self.linear * seen * channel + self.last * channel + self.always
        everything = self.first + self.linear + self.last + self.always
        return (x, x), Opened(space[None], channel[None], left / everything)


class AttendedTextScore(TextScore):
    """`TextScore` of a vector halfway to what slot attention makes of it and the texts."""

    def __init__(
        self, channels: int, num_classes: int, reads_texts: bool, *, dtype: str, rngs: nnx.Rngs
    ):
        """Args:
        channels: of the vectors and texts.
        num_classes: k.
        reads_texts: see `GatedC4Config.class_attention`.
        dtype: compute dtype.
        rngs: initialises the parameters.
        """
        super().__init__(channels, num_classes)
        texts = channels if reads_texts else None
        self.slot_attention = SlotAttention(channels, texts, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "r c"]) -> Float32[Array, "r k1"]:
        refined = self.slot_attention(x, self.texts[...])
        return super().__call__(0.5 * x.astype(jnp.float32) + 0.5 * refined)
