"""Our plain ViT against timm's, live and at full size: random weights through the conversion command, any image size.

Run by hand where torch and timm are installed: `python scripts/parity_vit.py augreg_b16 224 352`. Prints, for block 0 and each tap, the
largest and mean absolute difference over all tokens and the size of the values; benchmarks/PARITY.md records the results.
"""

from pathlib import Path
import resource
import sys
import tempfile
import time

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from conversion import torch_to_flax
from jaxdg import backbones
from scripts.golden_vit import random_weights, timm_tokens, wave


def main() -> None:
    """Runs both encoders on one image and prints the differences."""
    name, height, width = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    start, config = time.perf_counter(), backbones.entry(name).config
    blocks, c = (0, *config.taps), config.width
    source = random_weights(c, config.depth, config.patch_size, config.grid[0], np.random.default_rng(0))
    source |= {"norm.weight": np.ones(c, np.float32), "norm.bias": np.zeros(c, np.float32)}
    images = wave(height, width)[:1]
    architecture = {"patch_size": config.patch_size, "embed_dim": c, "depth": config.depth, "num_heads": config.heads, "num_classes": 0}
    expected, _ = timm_tokens(source, images, blocks, **architecture)
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours = Path(folder) / "timm.safetensors", Path(folder) / "ours.safetensors"
        save_file(source, theirs)
        print(torch_to_flax.convert(name, theirs, ours))
        encoder = backbones.create(name, image_size=(height, width), weights=ours, taps=blocks)
    graph, state = nnx.split(encoder)
    tokens = jax.jit(lambda state, images: nnx.merge(graph, state).tokens(images))(state, jnp.asarray(images))
    for block, a, b in zip(blocks, tokens, expected, strict=True):
        difference = np.abs(np.asarray(a) - b)
        print(f"block {block}: max {difference.max():.1e}, mean {difference.mean():.1e}; values up to {np.abs(b).max():.0f}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{time.perf_counter() - start:.0f} s, {peak:.1f} GB at most, both libraries")


if __name__ == "__main__":
    main()
