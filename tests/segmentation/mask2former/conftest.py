"""Head and inputs of the golden files, drawn as tests/oracles/golden_mask2former.py does."""

import zlib

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdg import weights
from jaxdg.conversion import mapping, mask2former
from jaxdg.segmentation import Mask2FormerConfig

CHANNELS = (8, 12, 16, 24)
MAPS = {"even": ((16, 24), (8, 12), (4, 6), (2, 3)), "odd": ((18, 26), (9, 13), (5, 7), (3, 4))}


def drawn(name, shape):
    """Float32 standard normal numbers that belong to a name."""
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)


def weight(name, shape):
    """The parameter of a name in transformers."""
    numbers = drawn(name, shape)
    if "level_embed" in name or "queries_" in name:
        return numbers
    if len(shape) == 1:
        numbers = 0.3 * numbers + name.endswith(".weight")
    else:
        numbers = (
            (numbers - numbers.mean(tuple(range(1, len(shape))), keepdims=True))
            * 1.5
            / np.sqrt(np.prod(shape[1:]))
        )
    more = {"sampling_offsets": 2, "mask_projection.bias": 2, "mask_embedder.2": 0.1}
    return np.float32(
        next((factor for part, factor in more.items() if part in name), 1)
    ) * numbers.astype(np.float32)


@pytest.fixture(scope="session")
def normal():
    """`normal(name, shape)`: what the oracle was given under this name."""
    return drawn


@pytest.fixture(scope="session")
def layout():
    """The table of transformers' names."""
    return next(layout for layout in mask2former.layouts() if layout.name == "transformers")


@pytest.fixture(scope="session")
def config():
    """Sizes of the oracle's head."""
    return Mask2FormerConfig(
        num_classes=5,
        hidden=64,
        queries=12,
        heads=8,
        pixel_layers=2,
        pixel_ffn=96,
        layers=4,
        ffn=80,
    )


@pytest.fixture(scope="session")
def head(config, layout, tmp_path_factory):
    """The oracle's head: its weights under transformers' names, through the table and a file."""
    path = tmp_path_factory.mktemp("mask2former") / "head.safetensors"
    head = mask2former.abstract(config, CHANNELS)
    shapes = mapping.source_shapes(head, layout)
    converted = mapping.to_flax(
        head, [layout], list(shapes), lambda name: weight(name, shapes[name])
    )
    weights.save(converted.tensors, path, {})
    weights.load(head, path)
    return head


@pytest.fixture(scope="session")
def features():
    """`features("even")`: the oracle's feature maps, finest first, [1, h, w, c]."""

    def maps(case):
        sizes = zip(CHANNELS, MAPS[case], strict=True)
        return tuple(
            jnp.asarray(drawn(f"{case} {i}", (1, c, *size)).transpose(0, 2, 3, 1))
            for i, (c, size) in enumerate(sizes)
        )

    return maps
