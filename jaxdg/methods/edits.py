"""Edits of features behind a block or stage, mined once on a frozen encoder, drawn in training.

Two forms of one mechanism, for both tasks:

- an **offset** is added to the map (CLIP the Gap, Vidit et al., CVPR 2023): behind stage 3 of a
  CLIP ResNet, one for each prompt. In training every image of a batch gets that of a random prompt,
  or the whole batch none;
- **statistics** replace mean and deviation of each channel (PIN, prompt-driven instance
  normalisation, of PODA, Fahes et al., ICCV 2023): behind stage 1, many for each prompt, each mined
  from one image.

`mining` finds them, and `jaxdg mine` writes a file that says what they were found with. Training
draws from it by (seed, step), so a resumed run and any number of devices give the same run. Nothing
of it is in the model: evaluation, checkpoints and export know nothing of edits.

Formulas and constants follow the authors' code (vidit09/domaingen at 9c03d07; astra-vision/PODA at
38c917c and, of detection, at 1f4a653). Differences:

- Changed statistics are written as a change of the map. An image's own ones then change nothing, to
  the last bit.
- Edits may be mined from pictures instead of texts, `guide` "images", for encoders without a text
  tower. The file says so.
"""

from collections.abc import Callable, Mapping
import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Interval
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Key
import numpy as np

from jaxdg import files, weights
from jaxdg.backbones import ClipResnetConfig, Edit, EncoderConfig, VitConfig, zoo
from jaxdg.data.augment.corruptions import KINDS
from jaxdg.methods.method import Batch, Method, MethodOptions, Preparation
from jaxdg.ranges import Count, CountOrZero, Positive, PositiveOrZero, Share
from jaxdg.text.clip_text import TEXT_TOWERS
from jaxdg.training import sharding

EPSILON = 1e-5  # beside variances, as in the authors' code
EDITS = "jaxdg_edits"  # among the metadata of a file of edits
MINED = {"offset": "offsets", "statistics": "styles"}  # the tensor of each form


@dataclasses.dataclass(unsafe_hash=True)
class MiningOptions:
    """How `jaxdg mine` finds edits; the defaults are CLIP the Gap's.

    Attributes:
        steps: of the optimiser: of all offsets together, or for each image of statistics. 0 keeps
            zero offsets and the images' own statistics. Default 1000.
        learning_rate: of Adam for offsets; of SGD with momentum 0.9 and decay 1e-4 for statistics,
            whose loss is a sum over images divided by 16. Default 0.01.
        batch: images a step. Default 4.
        crops: square crops of each of these images, for offsets. Default 15.
        crop: side of a crop, pixels; images are resized first as `data.resize` says. Default 400.
        size: side that a crop is resized to, pixels. Default 224.
        pull: weight of offsets' second loss term, which keeps embeddings near those without
            offset. Default 1.
        images: how many images statistics are mined from, evenly spread over the source; 0 for all.
            Default 0.
        pool: rows, and columns, that a map with changed statistics is pooled to, in CLIP ResNets
            alone; 0 for none. Default 0.
        relu: a ReLU follows changed statistics in mining. Default False.
        text_weights: converted text tower beside the encoder; None for that of the model. Default
            None.
        templates: sentences with {} in place of a prompt; their embeddings, as they are, are
            averaged. Default {}.
        pictures: images whose mean embedding is a target where pictures guide. Default 64.
        severity: of their corruptions, 1 to 5. Default 3.
    """

    steps: CountOrZero = 1000
    learning_rate: Positive = 0.01
    batch: Count = 4
    crops: Count = 15
    crop: Count = 400
    size: Count = 224
    pull: PositiveOrZero = 1.0
    images: CountOrZero = 0
    pool: CountOrZero = 0
    relu: bool = False
    text_weights: str | None = None
    templates: tuple[str, ...] = ("{}",)
    pictures: Count = 64
    severity: Annotated[int, Interval(ge=1, le=5)] = 3


@dataclasses.dataclass(unsafe_hash=True)
class EditsOptions(MethodOptions):
    """Edits of features that were mined from prompts or pictures; see `jaxdg/methods/edits.py`.

    Attributes:
        on: whether it is used; the encoder must be a plain ViT or a CLIP ResNet, and needs
            `model.weights`, the file that edits were mined with. Default False.
        file: of edits, which `jaxdg mine` writes. Default None.
        form: offset (CLIP the Gap) or statistics (PODA). Default offset.
        place: block, or stage of a CLIP ResNet, behind which features are edited, from 0. Default
            2.
        guide: text, or images for encoders without a text tower: then a prompt is a kind of
            corruption, such as fog, and its direction comes from corrupted pictures. Default text.
        prompts: what edits are mined for and drawn from. Default ().
        source: prompt of the source domain, from which offsets point away; None for statistics and
            where pictures guide. Default None.
        probability: of a batch to be edited. Default 0.5.
        share: whether every image draws its own edit (image) or all of a batch one (batch). Default
            image.
        relu: a ReLU follows changed statistics in training. Default False.
        mining: how edits are found; training does not read it.
    """

    file: str | None = None
    form: Literal["offset", "statistics"] = "offset"
    place: CountOrZero = 2
    guide: Literal["text", "images"] = "text"
    prompts: tuple[str, ...] = ()
    source: str | None = None
    probability: Share = 0.5
    share: Literal["image", "batch"] = "image"
    relu: bool = False
    mining: MiningOptions = dataclasses.field(default_factory=MiningOptions)

    def check(self, config: Any, name: str) -> None:
        """See `MethodOptions.check`."""
        if not self.on:
            return
        if self.file is None:
            raise ValueError(f"{name}.on is True; allowed: False without {name}.file of jaxdg mine")
        self.check_mining(config, name)
        for other, options in vars(config).items():
            if isinstance(options, MethodOptions) and options.on and options is not self:
                method = options.build(config)
                if type(method).images is not Method.images:
                    raise ValueError(
                        f"{name}.on is True; allowed: False with {other}.on, which shows the"
                        " encoder other images than those of the batch"
                    )

    def check_mining(self, config: Any, name: str) -> None:
        """Checks what mining and training both read; see `check`."""
        m = config.model
        encoder = zoo.entry(m.encoder).config
        if not isinstance(encoder, VitConfig | ClipResnetConfig):
            raise ValueError(
                f"{name}.on is True with model.encoder {m.encoder!r}; allowed: False, or a plain"
                " ViT or a CLIP ResNet, whose features can be edited"
            )
        if m.weights is None:
            raise ValueError(
                f"{name}.on is True; allowed: False without model.weights, the encoder that edits"
                " are mined with"
            )
        if self.place >= encoder.depth:
            raise ValueError(
                f"{name}.place is {self.place}; allowed: 0 to {encoder.depth - 1}, a {encoder.unit}"
                f" of {m.encoder}"
            )
        self._check_prompts(m.encoder, name)
        if self.form == "offset" and (self.relu or self.mining.relu or self.mining.pool):
            raise ValueError(
                f"{name}.relu, {name}.mining.relu and {name}.mining.pool are of statistics;"
                f" allowed: False, False and 0 with {name}.form offset"
            )
        if self.mining.pool and not isinstance(encoder, ClipResnetConfig):
            raise ValueError(
                f"{name}.mining.pool is {self.mining.pool}; allowed: 0 with model.encoder"
                f" {m.encoder!r}, whose blocks take maps of one size"
            )

    def _check_prompts(self, encoder: str, name: str) -> None:
        """Prompts and their source, for `check_mining`."""
        if not self.prompts or len(set(self.prompts)) < len(self.prompts):
            raise ValueError(
                f"{name}.prompts is {self.prompts}; allowed: at least one, each named once"
            )
        if self.source in self.prompts:
            raise ValueError(
                f"{name}.prompts has {self.source!r}, which is {name}.source too; allowed: prompts"
                " that differ from it, as an offset has no direction otherwise"
            )
        relative = self.form == "offset" and self.guide == "text"
        if (self.source is not None) != relative:
            raise ValueError(
                f"{name}.source is {self.source!r}; allowed: "
                + ("the prompt of the source domain, " if relative else "None, ")
                + f"with {name}.form {self.form} and {name}.guide {self.guide}"
            )
        if self.guide == "images":
            if unknown := [prompt for prompt in self.prompts if prompt not in KINDS]:
                raise ValueError(
                    f"{name}.prompts has {unknown[0]!r}; allowed with {name}.guide images:"
                    f" {', '.join(KINDS)}"
                )
        elif f"{encoder}_text" not in TEXT_TOWERS:
            raise ValueError(
                f"{name}.guide is text; allowed: images with model.encoder {encoder!r}, which has"
                " no text tower"
            )
        for template in self.mining.templates:
            if "{}" not in template:
                raise ValueError(
                    f"{name}.mining.templates has {template!r}; allowed: sentences with {{}}, where"
                    " the prompt goes"
                )

    def build(self, config: Any) -> "Edits":
        """See `MethodOptions.build`."""
        return Edits(self, config)


class Edits(Method):
    """Mined edits in one run."""

    def __init__(self, options: EditsOptions, config: Any):
        """Args:
        options: the settings.
        config: of the run.
        """
        self.options = options
        self.config = config

    def boundaries(self, depth: int) -> tuple[int, ...]:
        """See `Method.boundaries`; a stage ends a segment anyway."""
        staged = isinstance(zoo.entry(self.config.model.encoder).config, ClipResnetConfig)
        return () if staged else (self.options.place,)

    def preparation(self, task: Any, model: Any, mesh: Mesh) -> Preparation:
        """See `Method.preparation`: adds `edit`, float32 [b, c] or [b, 2, c], and `edited` [b]."""
        o = self.options
        m = task.config.model  # where weights known by a name are paths
        shape = pool_shape(o, model.backbone.config)
        whole = sharding.replicated(mesh)
        # Stream 4 of the seed; stream 3 is that of tqdm's visual regulariser.
        key = jax.random.fold_in(jax.random.key(self.config.seed), 2**31 + 3)
        rows = self.config.batch_size

        @jax.jit(out_shardings=sharding.batch_sharding(mesh))
        def drawn(pool: Array, step: Any) -> Batch:
            return draw(pool, jax.random.fold_in(key, step), rows, o)

        def load() -> Array:
            found = read(o, m.encoder, m.weights)
            return jax.make_array_from_callback(found.shape, whole, found.__getitem__)

        return Preparation(
            lambda pool, batch, step: {**batch, **drawn(pool, step)},
            jax.ShapeDtypeStruct(shape, jnp.float32, sharding=whole),
            load,
        )

    def edits(self, batch: Batch) -> Mapping[int, Edit]:
        """See `Method.edits`: those of the batch at the place."""
        return {self.options.place: edited(batch["edit"], batch["edited"], self.options)}


def draw(
    pool: Float[Array, "p *s"], key: Key[Array, ""], rows: int, options: EditsOptions
) -> dict[str, Array]:
    """The edits of a batch.

    Args:
        pool: offsets [p, c], or statistics [p, n, 2, c] of n images.
        key: of the step.
        rows: images of the batch.
        options: of the run.

    Returns:
        `edit`, a row for each image, and `edited` bool [rows].
    """
    on, which, style = jax.random.split(key, 3)
    drawn = rows if options.share == "image" else 1
    at = (jax.random.randint(which, (drawn,), 0, pool.shape[0]),)
    if options.form == "statistics":
        at += (jax.random.randint(style, (drawn,), 0, pool.shape[1]),)
    edit = pool[at]
    return {
        "edit": jnp.broadcast_to(edit, (rows, *edit.shape[1:])),
        "edited": jnp.broadcast_to(jax.random.uniform(on) < options.probability, (rows,)),
    }


def edited(
    edit: Float[Array, "b *s"], where: Array, options: EditsOptions
) -> Callable[[Float[Array, "b h w c"]], Float[Array, "b h w c"]]:
    """A function of the map that edits the images named by `where`, bool [b]."""

    def change(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        full = x.astype(jnp.float32)
        if options.form == "offset":
            new = shifted(full, edit)
        else:
            new = restyled(full, edit, options.relu)
        return jnp.where(where[:, None, None, None], new, full).astype(x.dtype)

    return change


def shifted(x: Float[Array, "b h w c"], offset: Float[Array, "b c"]) -> Float[Array, "b h w c"]:
    """The map with an offset for each channel added at every position."""
    return x + offset[:, None, None]


def own_statistics(x: Float[Array, "b h w c"]) -> Float32[Array, "b 2 c"]:
    """Mean over positions, and root of the unbiased variance and `EPSILON`, of each channel."""
    x = x.astype(jnp.float32)
    mean = x.mean((1, 2), keepdims=True)
    count = math.prod(x.shape[1:3])
    variance = jnp.sum((x - mean) ** 2, (1, 2)) / max(count - 1, 1)
    return jnp.stack([mean[:, 0, 0], jnp.sqrt(variance + EPSILON)], axis=1)


def restyled(
    x: Float[Array, "b h w c"], style: Float[Array, "b 2 c"], relu: bool
) -> Float[Array, "b h w c"]:
    """The map with other statistics: deviation * (x - own mean) / own deviation + mean (AdaIN).

    Args:
        x: the map.
        style: mean and deviation for each channel; a negative deviation is 0.
        relu: whether a ReLU follows.
    """
    own_mean, own_deviation = jnp.moveaxis(own_statistics(x), 1, 0)[:, :, None, None]
    mean, deviation = jnp.moveaxis(style, 1, 0)[:, :, None, None]
    gain = jnp.maximum(deviation, 0.0) / own_deviation
    # As a change of x, so that its own statistics change nothing, to the last bit.
    y = x + ((gain - 1) * (x - own_mean) + (mean - own_mean))
    return jax.nn.relu(y) if relu else y


def channels(encoder: EncoderConfig, place: int) -> int:
    """Channels of the map behind a block or stage."""
    return dataclasses.replace(encoder, taps=(place,)).channels[0]


def pool_shape(options: EditsOptions, encoder: EncoderConfig) -> tuple[int, ...]:
    """The shape of what `read` returns; that of statistics is a guess if the file is not there."""
    c = channels(encoder, options.place)
    if options.form == "offset":
        return len(options.prompts), c
    images = options.mining.images or 1
    if Path(options.file or "").is_file():
        images = weights.read(options.file or "")[MINED[options.form]].shape[1]
    return len(options.prompts), images, 2, c


def about(path: str | Path) -> dict[str, Any]:
    """What a file of edits says of itself.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds no edits.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"no edits at {path}; mine them: jaxdg mine --config CONFIG --out {path}"
        )
    found = weights.metadata(path)
    if EDITS not in found:
        raise ValueError(f"{path} holds no edits; allowed: a file of jaxdg mine")
    return json.loads(found[EDITS])


def read(
    options: EditsOptions, encoder: str, encoder_weights: str
) -> Float32[np.ndarray, "p *n c"]:
    """What training draws from.

    Args:
        options: of the run, with the file.
        encoder: name of the run's in the zoo.
        encoder_weights: the file that it starts from.

    Returns:
        Offsets [p, c], the means over positions of the mined ones; or statistics [p, n, 2, c]. One
        row for each of `options.prompts`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it was mined for something else; the message says for what.
    """
    path = options.file or ""
    mined = about(path)
    wanted = {
        "form": options.form,
        "place": options.place,
        "guide": options.guide,
        "source": options.source,
        "encoder": encoder,
        "encoder_sha256": files.sha256(Path(encoder_weights)),
    }
    wrong = [
        f"{key} {mined.get(key)}, not {value}"
        for key, value in wanted.items()
        if mined.get(key) != value
    ]
    if missing := [prompt for prompt in options.prompts if prompt not in mined["prompts"]]:
        wrong.append(
            f"the prompts {', '.join(map(repr, mined['prompts']))}, not"
            f" {', '.join(map(repr, missing))}"
        )
    if wrong:
        raise ValueError(
            f"edits.file {path} was mined for {'; for '.join(wrong)}; mine it again, or name"
            " another file"
        )
    found = weights.read(path)[MINED[options.form]]
    found = found[[mined["prompts"].index(prompt) for prompt in options.prompts]]
    return found.mean((1, 2)) if options.form == "offset" else found


def write(path: Path, options: EditsOptions, edits: np.ndarray, mined: Mapping[str, Any]) -> None:
    """Writes a file of edits; `mined` is what they were mined from, see `about`."""
    tensor = {MINED[options.form]: np.asarray(edits, np.float32)}
    weights.save(tensor, path, {EDITS: json.dumps(mined)})
