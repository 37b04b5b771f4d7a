"""Released models of tqdm (ByeongHyunPak/tqdm) to a workdir: EVA-02-CLIP or CLIP, pyramid, and the
decoder whose queries are made of class names.

A file holds the whole model: both towers, the decoder, and the image tower as it was before
training (`reg_E0`), which only training reads. Of the text tower's table the rows of the class
names are kept, and of its positions as many as the longest name needs. What their code computes
anew at every start, the embeddings that queries stay near, is computed at conversion.

Their CLIP adds its class token to the position of it once more, so that token is doubled here. They
normalise images with CLIP's statistics for EVA-02-CLIP too; where the encoder here has others, the
difference goes into the patches' kernel and positions.
"""

import functools
import re

from flax import nnx
import jax
import numpy as np

from jaxdg import backbones, weights
from jaxdg import config as config_lib
from jaxdg.backbones.zoo import CLIP
from jaxdg.config import Config
from jaxdg.conversion import adapted, clip, clip_text, eva02, mapping, vltseg
from jaxdg.conversion.checkpoint import Checkpoint
from jaxdg.conversion.mapping import CONV, SAME, Layout, Misfit, Row, Transform
from jaxdg.conversion.mask2former import DENSE, EMBEDDING, FUSED, NORM
from jaxdg.segmentation.tqdm.head import ANCHOR, name_ids
from jaxdg.tasks.run_state import make_task
from jaxdg.text import tokenizer
from jaxdg.text.clip_text import TEXT_TOWERS, ClipTextConfig, TextTransformer, normalize
from jaxdg.tracing import Rngs

NAME = "tqdm"
LISTED = (
    "1108-3175 MB",
    "MIT (code)",
    (
        "tqdm-eva02-clip-vit-l-gta, tqdm-eva02-clip-vit-l-city and tqdm-clip-vit-b-gta, linked in"
        " the README of ByeongHyunPak/tqdm; whole models, --out is a workdir"
    ),
)
CROP = 512  # of all released models
ENCODERS = ("eva02_clip_l14_336", "clip_b16")
POSITIONS = {  # that the image tower has only on this encoder
    ENCODERS[0]: "backbone.pos_embed",
    ENCODERS[1]: "backbone.positional_embedding",
}
KERNEL = "backbone.patch_embed.proj.weight"  # of EVA-02-CLIP
TABLE = "text_encoder.token_embedding.weight"
ROWS = "text_encoder.positional_embedding"
ANCHORS = "reg_T0"  # the authors' name of what no file holds

BEFORE = "the image tower before training: only the visual regulariser reads it"
DOUBLED = Transform(lambda a: 2 * a[None, None], lambda a: (a[0, 0] / 2,))
FIRST = Transform(lambda a: a[0], lambda a: (a[None],))  # [1, m, c] to [m, c]

LAYERS = r"context_decoder\.decoder\.(\d+)\."
PIXEL = "pixel_decoder.encoder.layers.*"
LAYER = "transformer_decoder.layers.*"
RENAMED = (  # of Mask2Former's names in mmsegmentation 1.x to those in 0.x, in this order
    (rf"({re.escape(PIXEL)}\.)self_attn", r"\1attentions.0"),
    (rf"({re.escape(PIXEL)}\.)norms\.1", r"\1norms.2"),
    (rf"({re.escape(LAYER)}\.)cross_attn", r"\1attentions.0"),
    (rf"({re.escape(LAYER)}\.)self_attn", r"\1attentions.1"),
    (r"\.ffn\.", ".ffns.0."),
)
CONTEXT = "decoder.*"
HEAD = (
    *(
        (ours, functools.reduce(lambda name, pair: re.sub(*pair, name), RENAMED, theirs), kind)
        for ours, theirs, kind in vltseg.HEAD
        if ours != "query_feat"
    ),
    ("pixel_decoder.layers.*.cross_attn.in_proj", f"{PIXEL}.attentions.1.attn.in_proj", FUSED),
    ("pixel_decoder.layers.*.cross_attn.out_proj", f"{PIXEL}.attentions.1.attn.out_proj", DENSE),
    ("pixel_decoder.layers.*.cross_norm", f"{PIXEL}.norms.1", NORM),
    ("pixel_decoder.post_norm", "pixel_decoder.encoder.post_norm", NORM),
    ("pixel_decoder.text_proj", "pixel_decoder.text_proj", DENSE),
    ("pixel_decoder.text_pos_embed", "pixel_decoder.text_pos_embed", EMBEDDING),
    ("text_proj.0", "text_proj.0", DENSE),
    ("text_proj.1", "text_proj.2", DENSE),
)
CONTEXT_DECODER = (
    ("memory_proj.0", "memory_proj.0", NORM),
    ("memory_proj.1", "memory_proj.1", DENSE),
    ("memory_proj.2", "memory_proj.2", NORM),
    ("text_proj.0", "text_proj.0", NORM),
    ("text_proj.1", "text_proj.1", DENSE),
    ("out_proj.0", "out_proj.0", NORM),
    ("out_proj.1", "out_proj.1", DENSE),
    *((f"{CONTEXT}.norm{i}", f"{CONTEXT}.norm{i}", NORM) for i in (1, 2, 3)),
    *(
        (f"{CONTEXT}.{kind}.{part}_proj", f"{CONTEXT}.{kind}.{part}_proj", DENSE[:1])
        for kind in ("self_attn", "cross_attn")
        for part in "qkv"
    ),
    *(
        (f"{CONTEXT}.{kind}.proj", f"{CONTEXT}.{kind}.proj", DENSE)
        for kind in ("self_attn", "cross_attn")
    ),
    (f"{CONTEXT}.mlp.0", f"{CONTEXT}.mlp.0", DENSE),
    (f"{CONTEXT}.mlp.1", f"{CONTEXT}.mlp.3", DENSE),
)


def layouts() -> tuple[Layout, ...]:
    """On EVA-02-CLIP, and on CLIP; with what is in a file alone."""
    whole = [layout(encoder, ("road",), 0, tokenizer.LENGTH) for encoder in ENCODERS]
    return tuple(
        one._replace(rows=tuple(row for row in one.rows if row.source != (ANCHORS,)))
        for one in whole
    )


def layout(encoder: str, names: tuple[str, ...], contexts: int, rows: int) -> Layout:
    """How the authors' code names the tensors.

    Args:
        encoder: one of `ENCODERS`.
        names: of the classes.
        contexts: learned tokens before a name.
        rows: of the text tower's positions.
    """
    table = [
        *image_rows(encoder),
        *vltseg.rows_of("pyramid", "backbone", vltseg.PYRAMID),
        *(row._replace(target=f"head.text.{row.target}") for row in text_rows(encoder)),
        Row((ROWS,), "head.text.positional_embedding", cut(rows, contexts, names)),
        Row((TABLE,), "head.text.tokens", chosen(names)),
        Row((ANCHORS,), "head.text.anchors", SAME),
        Row(("contexts",), "head.contexts", FIRST),
        Row(("gamma",), "head.gamma", SAME),
        *vltseg.rows_of("head.context_decoder", "context_decoder", CONTEXT_DECODER),
        *vltseg.rows_of("head", "decode_head", HEAD),
    ]
    left_out = (
        (r"reg_E0\..+", BEFORE),
        (r"backbone\.(blocks\.\d+\.attn\.)?rope\.freqs_(cos|sin)", eva02.ROPE),
        (r"backbone\.fpn1\.1\.num_batches_tracked", vltseg.COUNT),
    )
    return Layout(f"tqdm on {encoder}", tuple(table), left_out)


def image_rows(encoder: str) -> list[Row]:
    """The image tower with its last norm and projection: the tables of CLIP's own files, whose
    prefix is another.
    """
    config = backbones.entry(encoder).config
    if isinstance(config, backbones.Eva02Config):
        rows = next(known for known in eva02.layouts(config) if known.name == "EVA-CLIP").rows
    else:
        rows = clip.layouts()[0].rows
        rows = [
            row._replace(transform=DOUBLED) if row.target == "cls_token" else row for row in rows
        ]
    own = [row._replace(target=f"backbone.{row.target}", resized=False) for row in rows]
    own += [
        row._replace(target=f"head.{row.target}")
        for row in clip_text.layouts(tower_of(encoder))[0].rows
        if row.target.startswith("image_projection.")
    ]
    return [
        row._replace(source=tuple(name.replace("visual.", "backbone.", 1) for name in row.source))
        for row in own
    ]


def text_rows(encoder: str) -> list[Row]:
    """The text tower but for its tokens and positions, by the names of `TextTransformer`."""
    known = clip_text.layouts(tower_of(encoder))[0].rows
    kept = [row for row in known if row.target.startswith(("blocks.", "ln_final.", "text_proj"))]
    return [
        row._replace(
            source=tuple(f"text_encoder.{name.removeprefix('text.')}" for name in row.source)
        )
        for row in kept
    ]


def tower_of(encoder: str) -> ClipTextConfig:
    """The text tower beside an encoder."""
    return TEXT_TOWERS[f"{encoder}_text"]


def cut(rows: int, contexts: int, names: tuple[str, ...]) -> Transform:
    """Positions to as many as the longest name has with its context.

    A token sees those before it alone, and a text is read at its end.
    """
    length = contexts + name_ids(names).shape[1]
    return Transform(
        lambda a: a[:length], lambda a: (np.broadcast_to(np.float32(0), (rows, a.shape[1])),)
    )


def chosen(names: tuple[str, ...]) -> Transform:
    """The table of tokens [n, c] to those of the names [k, words, c]."""
    ids = name_ids(names)
    return Transform(
        lambda a: a[ids],
        lambda a: (np.broadcast_to(np.float32(0), (tokenizer.VOCABULARY, a.shape[2])),),
    )


def of_run(config: Config, file: Checkpoint) -> Layout:
    """The layout of a file."""
    names = class_names(config)
    contexts = config.model.tqdm.contexts
    (rows, *_) = vltseg.shape_of(file, ROWS, 2)
    words = name_ids(names).shape[1]
    prompt = name_ids([ANCHOR.format(name) for name in names]).shape[1]
    needed = max(contexts + words, prompt)
    if rows < needed:
        raise Misfit(
            f"{ROWS} has {rows} rows, not {needed} or more for {contexts} tokens of context with a"
            f" name of {words}, and a prompt of {prompt}"
        )
    return layout(config.model.encoder, names, contexts, rows)


def class_names(config: Config) -> tuple[str, ...]:
    """Those of the run."""
    return make_task(config).labels.names


def of_checkpoint(file: Checkpoint, source: str = "gta5") -> Config:
    """The run that made a file; sizes are those of its tensors.

    Args:
        file: of one of `layouts`.
        source: what was trained on, of those in the recipe.

    Raises:
        Misfit: a tensor missing that tells a size, or positions of another grid than of the crop.
        ValueError: a source that the recipe does not have, or sizes that no configuration has.
    """
    encoder = ENCODERS[POSITIONS[ENCODERS[1]] in file.names]
    c = vltseg.recipe("gta5_methods", f"{NAME},{encoder},{source}")
    patch = backbones.entry(encoder).config.strides[-1]
    at = POSITIONS[encoder]
    rows = vltseg.shape_of(file, at, 3 if encoder == ENCODERS[0] else 2)[-2]
    grid = CROP // patch
    if rows != 1 + grid * grid:
        raise Misfit(f"{at} has {rows} rows, not {1 + grid * grid} for a crop of {CROP}")
    c.data.crop = (CROP, CROP)
    c.evaluation.stride = (CROP * 2 // 3, CROP * 2 // 3)
    # All is in the workdir. `text_weights` says that the model holds texts.
    c.model.weights = None
    c.visual_anchor.on = False
    o = c.model.tqdm
    head = vltseg.head_sizes(file, layouts()[ENCODERS.index(encoder)])
    for field in ("hidden", "heads", "pixel_layers", "pixel_ffn", "layers", "ffn"):
        setattr(o, field, head[field])
    o.contexts = vltseg.shape_of(file, "contexts", 3)[1]
    o.context_width = vltseg.shape_of(file, "context_decoder.memory_proj.1.weight", 2)[0]
    layers = {match[1] for name in file.names if (match := re.match(LAYERS, name))}
    o.context_layers = len(layers) or o.context_layers
    return config_lib.validated(c)


def prepared(file: Checkpoint, config: Config) -> Checkpoint:
    """A file with `ANCHORS`, and with the patches for the statistics of the encoder here."""
    encoder = backbones.entry(config.model.encoder).config
    assert isinstance(encoder, backbones.VitConfig)
    anchors = functools.cache(lambda: text_anchors(file, config))
    at = POSITIONS[config.model.encoder]
    patches: dict[str, np.ndarray] = {}
    if config.model.encoder == ENCODERS[0]:
        positions = file.read(at)
        kernel = file.read(KERNEL) if KERNEL in file.names else np.zeros(0)
        # Otherwise it is told as missing or misshapen.
        if kernel.ndim == 4 and kernel.shape[:2] == (positions.shape[-1], 3):
            both = adapted.renormalised(CONV.forward(kernel), positions, encoder, CLIP)
            patches = {KERNEL: CONV.inverse(both[0])[0], at: both[1]}

    def read(name: str) -> np.ndarray:
        if name == ANCHORS:
            return anchors()
        return patches[name] if name in patches else file.read(name)

    return file._replace(names=[*file.names, ANCHORS], read=read)


def text_anchors(file: Checkpoint, config: Config) -> np.ndarray:
    """Embeddings [k, e] of the class names, that queries stay near, by the text tower in a file.

    They are zeros where the tower is not whole, which the conversion refuses.
    """
    tower = tower_of(config.model.encoder)
    names = class_names(config)
    (rows, *_) = file.read(ROWS).shape
    encoder = nnx.eval_shape(lambda: TextTransformer(tower, rows, rngs=Rngs(0)))
    table = (*text_rows(config.model.encoder), Row((ROWS,), "positional_embedding", SAME))
    layout = Layout("the text tower", table, ())
    known = layout.known()
    own = [name for name in file.names if known.fullmatch(name)]
    ids = name_ids([ANCHOR.format(name) for name in names])
    try:
        found = mapping.to_flax(encoder, (layout,), own, file.read)
        tokens = file.read(TABLE)[ids].astype(np.float32)
    except (Misfit, LookupError):
        return np.zeros((len(names), tower.embedding), np.float32)
    weights.fill(encoder, found.tensors, ROWS)
    ends = ids.argmax(axis=1).astype(np.int32)  # the end token has the highest id
    graph, state = nnx.split(encoder)
    embed = jax.jit(lambda state, x: normalize(nnx.merge(graph, state).encode(x, ends)))
    return np.asarray(embed(state, tokens))


def described(config: Config) -> str:
    """The run in words."""
    m = config.model
    return (
        f"{m.encoder}, {m.tqdm.contexts} tokens of context, {m.tqdm.layers} layers after"
        f" {m.tqdm.pixel_layers} of the pixel decoder; windows of {config.data.crop[0]} pixels; no"
        f" tensor tells what it was trained on: {config.data.source}, says its config.json"
    )
