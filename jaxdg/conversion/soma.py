"""Released models of SoMA (ysj9909/SoMA) to a workdir of plain DINOv2 and Mask2Former.

A file holds the low-rank adapters A and B of the last blocks, every bias of the encoder and the
head. The encoder's kernels are those of DINOv2's own file, to which the products B A are added: the
authors' code starts its adapters before it loads DINOv2, so nothing is taken off. Queries, keys and
values have adapters of their own and are one kernel here. Biases that training froze must be those
of the encoder's file.
"""

from collections import Counter
from collections.abc import Sequence
import re

import numpy as np

from jaxdg import config as config_lib
from jaxdg import weights
from jaxdg.config import Config
from jaxdg.conversion import adapted, vltseg
from jaxdg.conversion.checkpoint import Checkpoint
from jaxdg.conversion.dinov2 import MASKED, NORM
from jaxdg.conversion.mapping import SAME, Layout, Misfit, Row, Transform
from jaxdg.conversion.names import APART_BIASES

NAME = "soma"
LISTED = (
    "102-204 MB",
    "MIT (code)",
    (
        "soma_dinov2-L_*_best.pth in the releases of ysj9909/SoMA, on DINOv2-L, whose file is"
        " --encoder; whole models, --out is a workdir"
    ),
)
ENCODERS = ("dinov2_l14",)
FIRST = 8  # block with adapters
START = "backbone.model."
LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
ADAPTED = re.compile(r"blocks\.(\d+)\.(attn\.qkv|attn\.proj|mlp\.fc[12])\.(kernel|bias)")
LEFT_OUT = (
    (r"backbone\.model\.norm\.bias", NORM),
    (r"backbone\.model\.mask_token", MASKED),
)
CLOSE = 2e-3  # of the largest: what half precision and averaging leave of equal biases


def parts(layer: str) -> list[str]:
    """The layers of SoMA that are one here: queries, keys and values are apart there."""
    return [layer.replace("qkv", part) for part in ("qkv" if "qkv" in layer else ("",))]


def layouts() -> tuple[Layout, ...]:
    """The one layout, whose rows say no more than names."""
    layers = [part for layer in LINEARS for part in parts(layer)]
    names = [
        f"{START}blocks.*.{layer}.{tensor}"
        for layer in layers
        for tensor in ("lora_A.weight", "lora_B.weight", "bias")
    ]
    names += [f"{START}blocks.*.{norm}.bias" for norm in ("norm1", "norm2")]
    names.append(f"{START}patch_embed.proj.bias")
    rows = [Row((name,), name, SAME) for name in names]
    rows += vltseg.rows_of("head", "decode_head", vltseg.HEAD)
    return (Layout("SoMA", tuple(rows), LEFT_OUT),)


def encoders(file: Checkpoint) -> Sequence[str]:
    """The one encoder."""
    return ENCODERS


def of_checkpoint(file: Checkpoint, encoder: adapted.Frozen, training: adapted.Training) -> Config:
    """The run that made a file; sizes are those of its tensors.

    Raises:
        ValueError: sizes that no configuration has.
    """
    c = adapted.run(file, NAME, encoder.name, training)
    c.low_rank.start = "soma_released"
    c.low_rank.rank = rank_of(file)
    c.low_rank.first_block = FIRST
    return config_lib.validated(c)


def layout(file: Checkpoint, encoder: adapted.Frozen) -> Layout:
    """The layout of a file with its encoder's tensors beside it."""
    rank = rank_of(file)
    rows = vltseg.rows_of("head", "decode_head", vltseg.HEAD)
    for key in encoder.tensors:
        own = f"{adapted.BESIDE}{key}"
        match = ADAPTED.fullmatch(key)
        layers = parts(key.rpartition(".")[0])
        biases = tuple(f"{START}{layer}.bias" for layer in layers)
        if match and int(match[1]) >= FIRST:
            pairs = [f"{START}{layer}.lora_{ab}.weight" for layer in layers for ab in "AB"]
            sources = (own, *pairs) if match[3] == "kernel" else biases
            transform = merged(len(layers), rank) if match[3] == "kernel" else APART_BIASES
            if len(sources) == 1:
                transform = SAME
        elif key.endswith(".bias"):
            sources = own, *biases
            transform = checked(len(biases))
        else:
            sources = (own,)
            transform = SAME
        rows.append(Row(sources, f"backbone.{key}", transform))
    return Layout("SoMA", tuple(rows), LEFT_OUT)


def rank_of(file: Checkpoint) -> int:
    """The rank of most adapters in a file.

    Raises:
        Misfit: there are none.
    """
    ranks = Counter(
        file.read(name).shape[0]
        for name in file.names
        if name.endswith(".lora_A.weight") and file.read(name).ndim == 2
    )
    if not ranks:
        raise Misfit("it holds no adapters (*.lora_A.weight)")
    return ranks.most_common(1)[0][0]


def merged(layers: int, rank: int) -> Transform:
    """A kernel [in, out] and the pairs A [r, in], B [out / layers, r] to the kernel with B A."""

    def forward(kernel: np.ndarray, *pairs: np.ndarray) -> np.ndarray:
        changes = [(b @ a).T for a, b in zip(pairs[::2], pairs[1::2], strict=True)]
        return kernel + np.concatenate(changes, axis=1)

    def inverse(kernel: np.ndarray) -> tuple[np.ndarray, ...]:
        a = np.zeros((rank, kernel.shape[0]), np.float32)
        b = np.zeros((kernel.shape[1] // layers, rank), np.float32)
        return kernel, *(a, b) * layers

    return Transform(forward, inverse)


def checked(layers: int) -> Transform:
    """A frozen bias, and the copies in SoMA's file of its parts, to that bias; see `check`."""
    return Transform(lambda bias, *copies: bias, lambda bias: (bias, *np.split(bias, layers)))


def check(file: Checkpoint, encoder: adapted.Frozen) -> None:
    """Refuses an encoder whose biases are not those that training froze.

    Raises:
        Misfit: the biases by name.
    """
    foreign = []
    for key in encoder.tensors:
        match = ADAPTED.fullmatch(key)
        if not key.endswith(".bias") or (match and int(match[1]) >= FIRST):
            continue
        layers = parts(key.removesuffix(".bias"))
        for layer, bias in zip(layers, np.split(encoder.tensors[key], len(layers)), strict=True):
            copy = file.read(f"{START}{layer}.bias").astype(np.float32)
            if np.abs(copy - bias).max() > CLOSE * max(np.abs(bias).max(), CLOSE):
                foreign.append(f"{START}{layer}.bias")
    if foreign:
        told = weights.told("frozen in the training and not those of the encoder's file", foreign)
        raise Misfit(f"{weights.joined(told)}; give the file of the encoder that it was trained on")
