"""Our encoders against independent implementations, live and at full size: random weights through
the conversion command.

Run by hand where torch and the reference package are installed: `python scripts/parity_encoders.py
eva02_clip_l14 512 512`. Prints, for each tap, the largest and mean absolute difference and the size
of the values; benchmarks/PARITY.md records the results.
"""

from collections.abc import Callable
from pathlib import Path
import resource
import sys
import tempfile
import time
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from jaxdg import backbones
from jaxdg.backbones import EncoderConfig
from jaxdg.conversion import convert as torch_to_flax
from tests.oracles import (
    golden_clip,
    golden_clip_resnet,
    golden_deit3,
    golden_dinov2,
    golden_dinov3,
    golden_eva02,
    golden_sam,
    golden_segformer,
    golden_siglip,
    golden_vit,
)

# (config of the pre-training, images [b, h, w, 3]) to random weights by their publisher's names and
# the reference's features [b, h, w, c] at the taps.
Reference = Callable[[Any, np.ndarray], tuple[dict[str, np.ndarray], list[np.ndarray]]]
REFERENCES: dict[type[EncoderConfig], Reference] = {
    backbones.VitConfig: golden_vit.full_size,
    backbones.Eva02Config: golden_eva02.full_size,
    backbones.ClipVitConfig: golden_clip.full_size,
    backbones.SamConfig: golden_sam.full_size,
    backbones.MocoV3Config: golden_vit.full_size,
    backbones.Deit3Config: golden_deit3.full_size,
    backbones.Dinov2Config: golden_dinov2.full_size,
    backbones.Dinov3Config: golden_dinov3.full_size,
    backbones.SiglipConfig: golden_siglip.full_size,
    backbones.MitConfig: golden_segformer.full_size,
    backbones.ClipResnetConfig: golden_clip_resnet.full_size,
}


def main() -> None:
    """Runs both encoders on one image and prints the differences."""
    name = sys.argv[1]
    height = int(sys.argv[2])
    width = int(sys.argv[3])
    start = time.perf_counter()
    config = backbones.entry(name).config
    images = golden_eva02.wave(height, width)
    source, expected = REFERENCES[type(config)](config, images)
    with tempfile.TemporaryDirectory() as folder:
        theirs = Path(folder) / "theirs.safetensors"
        ours = Path(folder) / "ours.safetensors"
        save_file(source, theirs)
        del source
        print(torch_to_flax.convert(name, theirs, ours))
        encoder = backbones.create(name, image_size=(height, width), weights=ours)
    graph, state = nnx.split(encoder)
    features = jax.jit(lambda state, images: nnx.merge(graph, state)(images))(
        state, jnp.asarray(images)
    )
    for tap, ours, theirs in zip(config.taps, features, expected, strict=True):
        difference = np.abs(np.asarray(ours) - theirs)
        print(
            f"tap {tap}: max {difference.max():.1e}, mean {difference.mean():.1e}; values up to"
            f" {np.abs(theirs).max():.0f}"
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{time.perf_counter() - start:.0f} s, {peak:.1f} GB at most, both libraries")


if __name__ == "__main__":
    main()
