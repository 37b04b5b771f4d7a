"""Our EVA-02-CLIP against timm's and our CLIP against open_clip's, live and at full size: random weights through the conversion command.

Run by hand where torch, timm and open_clip are installed: `python scripts/parity_encoders.py eva02_clip_l14 512 512`. Prints, for block 0
and each tap, the largest and mean absolute difference over all tokens and the size of the values; benchmarks/PARITY.md records the results.
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
from scripts import golden_clip, golden_eva02


def eva02(config: backbones.Eva02Config, images: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Weights by timm's names, and its tokens after every block."""
    family = dict(patch_size=config.patch_size, embed_dim=config.width, depth=config.depth, num_heads=config.heads)
    family |= dict(qkv_fused=not config.subln, scale_mlp=config.subln, scale_attn_inner=config.inner_attn_ln)
    weights = golden_eva02.random_weights(golden_eva02.encoder(config.image_size, **family), np.random.default_rng(0))
    return weights, golden_eva02.tokens(weights, images, **family)


def clip(config: backbones.ClipVitConfig, images: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Weights by open_clip's names, and its tokens after every block."""
    architecture = dict(patch_size=config.patch_size, width=config.width, layers=config.depth, heads=config.heads)
    activation = golden_clip.QuickGELU if config.activation == "quick_gelu" else golden_clip.torch.nn.GELU
    model = golden_clip.encoder(config.image_size, activation, **architecture)
    weights = golden_clip.random_weights(model, np.random.default_rng(0))
    tokens = golden_clip.tokens(weights, images, activation, **architecture)
    return {f"visual.{name}": tensor for name, tensor in weights.items()}, tokens


def main() -> None:
    """Runs both encoders on one image and prints the differences."""
    name, height, width = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    start, config = time.perf_counter(), backbones.entry(name).config
    images = golden_eva02.wave(height, width)
    if isinstance(config, backbones.Eva02Config):
        source, expected = eva02(config, images)
    elif isinstance(config, backbones.ClipVitConfig):
        source, expected = clip(config, images)
    else:
        raise SystemExit(f"{name} is compared by scripts/parity_vit.py")
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours = Path(folder) / "theirs.safetensors", Path(folder) / "ours.safetensors"
        save_file(source, theirs)
        del source
        print(torch_to_flax.convert(name, theirs, ours))
        blocks = (0, *config.taps)
        encoder = backbones.create(name, image_size=(height, width), weights=ours, taps=blocks)
    graph, state = nnx.split(encoder)
    tokens = jax.jit(lambda state, images: nnx.merge(graph, state).tokens(images))(state, jnp.asarray(images))
    for block, ours in zip(blocks, tokens, strict=True):
        difference = np.abs(np.asarray(ours) - expected[block])
        print(f"block {block}: max {difference.max():.1e}, mean {difference.mean():.1e}; values up to {np.abs(expected[block]).max():.0f}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{time.perf_counter() - start:.0f} s, {peak:.1f} GB at most, both libraries")


if __name__ == "__main__":
    main()
