"""Low-rank adapters of a frozen encoder: LoRA, SoMA and RecycleLoRA.

An adapted layer computes `y = W x + b + s B (A x)`: W [out, in] is frozen, A [r, in] and B [out, r]
are trained, and `s = alpha / rank`. Everything else of the encoder is frozen too, except the
adapted layers' biases if they are asked for; the decoder trains. When training ends `W + s B A`
takes the place of W, so nothing else knows of adapters. The parameters are `lora_a` [in, r] and
`lora_b` [r, out], beside a layer's `kernel` [in, out].

How they start (`start`):

- lora (Hu et al. 2022): A is random, B is 0. The function is unchanged.
- soma (SoMA, Yun et al. 2025, ysj9909/SoMA): B A is the part of W that belongs to its `rank`
  smallest singular values, and W loses it. The function is unchanged but for rounding.
- soma_released: as the authors' code does it, which made their published files. It decomposes
  before weights are loaded. So B A is that part of a random matrix, torch's initialisation of the
  layer, and W stays whole.
- recycle (RecycleLoRA, chanseul01/RecycleLoRA): from a QR decomposition of W with column pivoting;
  B holds the last columns of Q, A takes the inputs that belong to them, and W loses `s B A`. A
  second, smaller pair (`sub_lora_a`, `sub_lora_b`) has the first columns; the authors train it at
  half the rate: `optimizer.learning_rate_factors=(("sub_lora", 0.5),)`.

A fused `attn.qkv` may have one pair (peft on such a layer; MGRNet), or one for each of its thirds,
which are then called `attn.q`, `attn.k` and `attn.v` (SoMA, which splits the layer). Their
parameters are `q_lora_a` and so on.

Differences: dropout draws one mask an adapted layer, which its pairs share. In half precision
EVA-02 computes adapted layers one by one instead of joined.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import re
from typing import Any, Literal

from flax import nnx
import jax
from jax.core import Tracer
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np
import scipy.linalg

from jaxdg.backbones import zoo
from jaxdg.backbones.layers import Linear, dropout
from jaxdg.backbones.vit import VitConfig
from jaxdg.methods.method import Method, MethodOptions
from jaxdg.ranges import Count, CountOrZero, Positive, ShareBelowOne
from jaxdg.tracing import Rngs

THIRDS = ("q", "k", "v")  # of a fused layer's columns, in this order
# Biases that stand beside a layer instead of in it, by the last word of its name.
BIASES = {"qkv": ("q_bias", "v_bias", "qv_bias"), "q_proj": ("q_bias",), "v_proj": ("v_bias",)}


@dataclasses.dataclass(unsafe_hash=True)
class LowRankOptions(MethodOptions):
    """Low-rank adapters of a frozen encoder; see `jaxdg/methods/low_rank.py`.

    Attributes:
        on: whether they are used, on a plain vision transformer. They decide what of the encoder is
            trained, whatever `model.freeze` says, and learn at its rate
            (`optimizer.encoder_factor`). Default False.
        start: lora, soma (as described), soma_released (as the authors' code does it) or recycle.
            Default lora.
        rank: of each adapter. Default 16.
        sub_rank: of `rank`, the part of recycle's second pair (RecycleLoRA: 4 of 36). Default 0.
        alpha: adapters are multiplied by alpha / rank; None for a factor of 1. Default None.
        dropout: probability of dropping an input of an adapter in training (MGRNet: 0.1). Default
            0.
        products: the adapted layers by their names in a block, such as attn.qkv, attn.proj,
            mlp.fc1; the thirds of a fused attn.qkv are attn.q, attn.k and attn.v. () for all layers
            of the block, attn.qkv as one. Default ().
        first_block: first block that has adapters, from 0 (SoMA: 8). Default 0.
        last_block: last block that has adapters; None for the last of the encoder. Default None.
        biases: whether the biases of adapted layers are trained (SoMA: True). Default False.
    """

    start: Literal["lora", "soma", "soma_released", "recycle"] = "lora"
    rank: Count = 16
    sub_rank: CountOrZero = 0
    alpha: Positive | None = None
    dropout: ShareBelowOne = 0.0
    products: tuple[str, ...] = ()
    first_block: CountOrZero = 0
    last_block: CountOrZero | None = None
    biases: bool = False

    def check(self, config: Any, name: str) -> None:
        """See `MethodOptions.check`."""
        if not self.on:
            return
        encoder = config.model.encoder
        c = zoo.entry(encoder).config
        if not isinstance(c, VitConfig):
            raise ValueError(
                f"{name}.on is True; allowed: False with model.encoder {encoder}, which is no plain"
                " vision transformer"
            )
        if config.rein.on:
            raise ValueError(
                f"{name}.on is True with rein.on; allowed: one of them, as each freezes the rest of"
                " the encoder"
            )
        first, last = self.blocks(c.depth)
        if not first <= last < c.depth:
            raise ValueError(
                f"{name} adapts blocks {first} to {last}; allowed: first_block <= last_block <="
                f" {c.depth - 1}, as {encoder} has {c.depth} blocks"
            )
        layers = linears(c)
        for layer, thirds in chosen(self.products, tuple(layers), f"{name}.products").items():
            inside, outside = layers[layer].in_features, layers[layer].out_features
            smaller = min(inside, outside // (3 if thirds[0] else 1))
            if self.rank > smaller:
                part = f", of which {thirds[0]} is a third" if thirds[0] else ""
                raise ValueError(
                    f"{name}.rank is {self.rank}; allowed: at most {smaller}, the smaller side of"
                    f" the matrix of {layer}, {inside}x{outside}{part}"
                )
        if self.sub_rank and (self.start != "recycle" or self.sub_rank >= self.rank):
            raise ValueError(
                f"{name}.sub_rank is {self.sub_rank}; allowed: 0, or with {name}.start recycle less"
                f" than {name}.rank {self.rank}"
            )

    def build(self, config: Any) -> "LowRank":
        """See `MethodOptions.build`."""
        encoder: Any = zoo.entry(config.model.encoder).config
        return LowRank(self, encoder)

    def blocks(self, depth: int) -> tuple[int, int]:
        """First and last adapted block of an encoder of so many."""
        return self.first_block, depth - 1 if self.last_block is None else self.last_block

    @property
    def scale(self) -> float:
        """The factor of adapters."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class Pair:
    """A pair of factors beside a layer.

    Attributes:
        prefix: of its parameters' names.
        start: first column of the kernel that it adds to.
        width: number of these columns.
        rank: of the factors.
    """

    prefix: str
    start: int
    width: int
    rank: int


class LowRankLinear(Linear):
    """A linear layer with a low-rank term, whose own parameters keep their names."""

    def __init__(
        self,
        layer: nnx.Linear,
        factors: Mapping[Pair, tuple[Array, Array]],
        scale: float,
        dropout: float,
    ):
        """Takes the place of a layer, whose parameters may stack blocks along their first axis.

        Args:
            layer: keeps nothing of its own.
            factors: `lora_a` [.., in, r] and `lora_b` [.., r, width] of each pair.
            scale: of the term.
            dropout: probability of dropping an input of the term while there are `keys`.
        """
        for name, value in vars(layer).items():
            if not name.startswith("_"):
                setattr(self, name, value)
        self.pairs = tuple(factors)
        for pair, (a, b) in factors.items():
            setattr(self, f"{pair.prefix}lora_a", nnx.Param(a))
            setattr(self, f"{pair.prefix}lora_b", nnx.Param(b))
        self.scale = scale
        self.dropout = dropout
        self.keys = nnx.data(None)  # of a training step, one a block

    def __call__(self, inputs: Float[Array, "*b c"], out_sharding=None) -> Float[Array, "*b d"]:
        y = super().__call__(inputs, out_sharding)
        x = inputs.astype(y.dtype)
        if self.keys is not None:
            x = dropout(x, self.keys[...], self.dropout)
        # One product reads the features for all pairs.
        a = jnp.concatenate([self.factors(pair)[0] for pair in self.pairs], axis=-1)
        inner = jnp.split(
            x @ a.astype(y.dtype), np.cumsum([pair.rank for pair in self.pairs])[:-1], axis=-1
        )
        terms = [
            self.placed(pair, h @ self.factors(pair)[1].astype(y.dtype))
            for pair, h in zip(self.pairs, inner, strict=True)
        ]
        return y + self.scale * sum(terms[1:], start=terms[0])

    def factors(self, pair: Pair) -> tuple[Array, Array]:
        """`lora_a` and `lora_b` of a pair."""
        return tuple(getattr(self, f"{pair.prefix}lora_{letter}")[...] for letter in "ab")

    def placed(self, pair: Pair, term: Float[Array, "*b w"]) -> Float[Array, "*b d"]:
        """A pair's columns among those of the layer, which are 0 elsewhere."""
        after = self.out_features - pair.start - pair.width
        return jnp.pad(term, [(0, 0)] * (term.ndim - 1) + [(pair.start, after)])

    def product(self) -> Float[Array, "*l c d"]:
        """The term as a kernel: `scale * lora_a @ lora_b`, in full precision on every device."""
        multiply = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        terms = [self.placed(pair, multiply(*self.factors(pair))) for pair in self.pairs]
        return self.scale * sum(terms[1:], start=terms[0])

    def folded(self) -> nnx.Linear:
        """The plain layer that computes the same."""
        plain = nnx.eval_shape(
            lambda: Linear(1, 1, use_bias=self.use_bias, dtype=self.dtype, rngs=nnx.Rngs(0))
        )
        plain.in_features = self.in_features
        plain.out_features = self.out_features
        plain.kernel = nnx.Param(self.kernel[...] + self.product())
        if self.use_bias:
            plain.bias = self.bias
        return plain


class LowRank(Method):
    """Low-rank adapters in one run."""

    changes_model = True

    def __init__(self, options: LowRankOptions, encoder: VitConfig):
        """Args:
        options: the settings, checked.
        encoder: of the run, as the zoo has it.
        """
        self.options = options
        self.first, self.last = options.blocks(encoder.depth)
        self.chosen = chosen(options.products, tuple(linears(encoder)), "products")
        self.biases = {name for layer in self.chosen for name in biases(layer)}

    def boundaries(self, depth: int) -> tuple[int, ...]:
        """See `Method.boundaries`: the block before the first adapted one, and the last of them."""
        return tuple(end for end in (self.first - 1, self.last) if 0 <= end < depth - 1)

    def extend(self, model: Any, rngs: nnx.Rngs) -> None:
        """See `Method.extend`: adapted layers take the places of plain ones.

        Raises:
            ValueError: no adapted block is built, since the decoder reads earlier ones.
        """
        key = rngs.params()
        layers = list(self.layers(model))
        if not layers:
            raise ValueError(
                f"low_rank adapts blocks {self.first} to {self.last}, and none after block"
                f" {max(model.backbone.config.taps)} is read; allowed: first_block at most that, or"
                " other model.taps"
            )
        for number, blocks, parent, name in layers:
            layer = getattr(parent, name)
            keys = per_block(jax.random.fold_in(key, number), blocks)
            thirds = list(self.chosen.values())[number]
            setattr(parent, name, adapted(self.options, layer, thirds, keys))

    def trains(self, name: str, trained: bool) -> bool:
        """See `Method.trains`: of the encoder the adapters, and maybe the layers' biases."""
        if not name.startswith("backbone."):
            return trained
        if name.endswith(("lora_a", "lora_b")):
            return True
        found = re.fullmatch(r"backbone\.blocks\.(\d+)\.(.+)", name)
        if found is None or not self.options.biases:
            return False
        return self.first <= int(found[1]) <= self.last and found[2] in self.biases

    @contextlib.contextmanager
    def drawing(self, model: Any, key: Key[Array, ""]) -> Iterator[None]:
        """See `Method.drawing`: the adapted layers have keys for their dropout meanwhile."""
        layers = list(self.layers(model)) if self.options.dropout else []
        for number, blocks, parent, name in layers:
            keys = per_block(jax.random.fold_in(key, number), blocks)
            getattr(parent, name).keys = nnx.Variable(keys)
        yield
        for _, _, parent, name in layers:
            getattr(parent, name).keys = None

    def finish(self, model: Any, state: Any) -> None:
        """See `Method.finish`: adapters become part of their kernels."""
        for _, _, parent, name in self.layers(model):
            setattr(parent, name, getattr(parent, name).folded())

    def layers(self, model: Any) -> Iterator[tuple[int, range, Any, str]]:
        """Each chosen layer of each adapted segment.

        Yields:
            Its number among those chosen in a block, the blocks of the segment, and the module and
            attribute that hold it.
        """
        for first, segment in model.backbone.blocks.segments.items():
            if not self.first <= int(first) <= self.last:
                continue
            for number, layer in enumerate(self.chosen):
                *path, name = layer.split(".")
                parent = functools.reduce(getattr, path, segment)
                count = getattr(parent, name).kernel.shape[0]
                yield number, range(int(first), int(first) + count), parent, name


def linears(encoder: VitConfig) -> dict[str, nnx.Linear]:
    """The linear layers of an encoder's block by name, abstract and stacked; one is as all."""
    one = dataclasses.replace(encoder, taps=(0,), boundaries=())
    model: Any = nnx.eval_shape(lambda: one.build(rngs=Rngs(0)))
    return {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_graph(model.blocks.segments["0"])
        if isinstance(module, nnx.Linear)
    }


def chosen(
    products: Sequence[str], layers: Sequence[str], field: str
) -> dict[str, tuple[str, ...]]:
    """The adapted layers of a block.

    Args:
        products: names of layers, or of thirds of a fused one; () for all layers.
        layers: the block's.
        field: that holds `products`, for messages.

    Returns:
        Each layer's thirds that have a pair of their own, or ("",) for the layer as one.

    Raises:
        ValueError: no such layer, or one that is named twice.
    """
    found: dict[str, tuple[str, ...]] = {}
    for product in products or layers:
        parent, _, third = product.rpartition(".")
        fused = f"{parent}.qkv"
        if product in layers:
            layer, third = product, ""
        elif third in THIRDS and fused in layers:
            layer = fused
        else:
            split = " (or its thirds attn.q, attn.k, attn.v)" if "attn.qkv" in layers else ""
            names = ", ".join(name + split * (name == "attn.qkv") for name in sorted(layers))
            raise ValueError(f"{field} has {product!r}; allowed: {names}")
        thirds = found.get(layer, ())
        if thirds and (third in thirds or "" in (third, *thirds)):
            raise ValueError(
                f"{field} is {tuple(products)}; allowed: {layer} once, or each of its thirds once"
            )
        found[layer] = (*thirds, third)
    return found


def biases(layer: str) -> set[str]:
    """The names that a layer's biases may have in a block."""
    parent, _, last = layer.rpartition(".")
    return {f"{layer}.bias", *(f"{parent}.{name}" for name in BIASES.get(last, ()))}


def per_block(key: Key[Array, ""], blocks: range) -> Key[Array, " l"]:
    """A key for each block, which does not depend on where segments end."""
    return jax.vmap(lambda block: jax.random.fold_in(key, block))(jnp.array(blocks))


def adapted(
    options: LowRankOptions, layer: nnx.Linear, thirds: Sequence[str], keys: Key[Array, " l"]
) -> LowRankLinear:
    """A layer of stacked blocks with adapters at their start.

    Args:
        options: the settings.
        layer: with loaded weights, or abstract.
        thirds: that have a pair of their own, or ("",).
        keys: one a block.
    """
    o = options
    kernel = layer.kernel[...]
    width = layer.out_features // (3 if thirds[0] else 1)
    ranks = {"": o.rank - o.sub_rank} | ({"sub_": o.sub_rank} if o.sub_rank else {})
    factors: dict[Pair, tuple[Array, Array]] = {}
    for third in thirds:
        start = width * THIRDS.index(third) if third else 0
        columns = kernel[..., start : start + width]
        own = jax.vmap(functools.partial(jax.random.fold_in, data=start))(keys)
        for sub, rank in ranks.items():
            pair = Pair(f"{third}_{sub}" if third else sub, start, width, rank)
            factors[pair] = first_factors(o, columns, own, rank, bool(sub))
    new = LowRankLinear(layer, factors, o.scale, o.dropout)
    if o.start in ("soma", "recycle"):
        new.kernel = nnx.Param(kernel - new.product())
    return new


def first_factors(
    options: LowRankOptions,
    kernel: Float[Array, "l c d"],
    keys: Key[Array, " l"],
    rank: int,
    sub: bool,
) -> tuple[Float[Array, "l c r"], Float[Array, "l r d"]]:
    """A pair of factors before training.

    Args:
        options: the settings.
        kernel: loaded, or the columns of it that the pair adds to.
        keys: one a block.
        rank: of the pair.
        sub: whether it is recycle's second pair.
    """
    _, inside, outside = kernel.shape

    if options.start == "lora":
        return uniform(keys, inside, rank), jnp.zeros((len(kernel), rank, outside))
    if options.start == "soma_released":
        kernel = uniform(keys, inside, outside)
    if isinstance(kernel, Tracer):  # an abstract model has no values to decompose
        return jnp.zeros((len(kernel), inside, rank)), jnp.zeros((len(kernel), rank, outside))
    if options.start == "recycle":
        pairs = [pivoted(block, rank, sub) for block in np.asarray(kernel)]
    else:
        pairs = [smallest(block, rank, options.scale) for block in np.asarray(kernel)]
    a, b = (jnp.asarray(np.stack(side)) for side in zip(*pairs, strict=True))
    return a, b


def uniform(keys: Key[Array, " l"], inside: int, outside: int) -> Float[Array, "l c d"]:
    """A kernel a key as torch starts a linear layer: uniform within 1 / sqrt(in)."""
    bound = inside**-0.5
    draw = functools.partial(
        jax.random.uniform, shape=(inside, outside), minval=-bound, maxval=bound
    )
    return jax.vmap(draw)(keys)


def smallest(
    kernel: Float[np.ndarray, "c d"], rank: int, scale: float
) -> tuple[Float[np.ndarray, "c r"], Float[np.ndarray, "r d"]]:
    """Two factors of the part of a kernel that belongs to its smallest singular values.

    `scale` times their product is that part.
    """
    if len(kernel) > kernel.shape[1]:
        b, a = smallest(kernel.T, rank, scale)
        return a.T, b.T
    # Eigenvectors of K K^T in double precision are as near as singular vectors of K in single
    # precision, and so few of them take a seventh of the time, or a 40th for wide kernels.
    double = kernel.astype(np.float64)
    _, u = scipy.linalg.eigh(double @ double.T, subset_by_index=(0, rank - 1))
    u = u[:, ::-1]
    rows = u.T @ double  # singular values times right singular vectors
    s = np.linalg.norm(rows, axis=1)
    root = np.sqrt(s / scale)
    b = rows * (root / np.maximum(s, np.finfo(np.float64).tiny))[:, None]
    return (u * root).astype(np.float32), b.astype(np.float32)


def pivoted(
    kernel: Float[np.ndarray, "c d"], rank: int, sub: bool
) -> tuple[Float[np.ndarray, "c r"], Float[np.ndarray, "r d"]]:
    """The last columns of Q, or for `sub` the first, and the inputs that belong to them.

    Q is that of a QR decomposition of the torch weight [d, c] with column pivoting.
    """
    decomposed: Any = scipy.linalg.qr(kernel.T, mode="economic", pivoting=True)
    q, _, order = decomposed
    columns = slice(0, rank) if sub else slice(q.shape[1] - rank, q.shape[1])
    a = np.zeros((len(kernel), rank), np.float32)
    a[order[columns], np.arange(rank)] = 1
    return a, q[:, columns].T
