r"""Writes vectors of scenes for the gates of a detector (`gates.file`) that has no text tower.

A vector is the mean of the encoder's last features over all positions of training images of the
source, corrupted in one way. `clear` stands for no corruption. The images are evenly spread.

    python scripts/scene_vectors.py --config configs/carla_vit_tiny.py --out scenes.safetensors \
        --scenes clear,fog,snow,brightness,contrast --severity 3 --images 32
"""

from absl import flags
from flax import nnx
import jax
import numpy as np
from safetensors.numpy import save_file

from jaxdg.commands import command_line as cli
from jaxdg.data.augment.corruptions import corrupt
from jaxdg.tasks.detection import Detection

CLEAR = "clear"


def main(_) -> None:
    """Writes the file."""
    config = _CONFIG.value
    task = Detection(config)
    model = task.model(nnx.Rngs(0))
    task.load_weights(model)
    graph, state = nnx.split(model)
    dataset = task.open(config.data.source, train=True)
    chosen = np.linspace(0, len(dataset) - 1, _IMAGES.value).round().astype(int)
    pictures = [dataset[int(i)]["image"] for i in chosen]

    @jax.jit
    def mean(state, image):
        model = nnx.merge(graph, state)
        features = model.encode(task.normalize(image[None]))
        return features[model.read[-1]].mean((0, 1, 2))

    vectors = {}
    for scene in _SCENES.value:
        total = np.zeros((), np.float64)
        for i, picture in zip(chosen, pictures, strict=True):
            if scene != CLEAR:
                picture = corrupt(picture, scene, _SEVERITY.value, int(i))
            fitted = task.fit.prepare({"image": picture})["image"]
            total = total + np.asarray(mean(state, fitted), np.float64)
        vectors[scene] = (total / len(pictures)).astype(np.float32)
        print(f"{scene}: length {np.linalg.norm(vectors[scene]):.3f}")
    metadata = {
        "encoder": config.model.encoder,
        "source": config.data.source,
        "severity": str(_SEVERITY.value),
        "images": str(len(pictures)),
    }
    save_file(vectors, _OUT.value, metadata)


if __name__ == "__main__":
    _CONFIG = cli.define_config()
    _OUT = flags.DEFINE_string("out", None, "The file.", required=True)
    _SCENES = flags.DEFINE_list("scenes", [CLEAR], "Corruptions, and clear.")
    _SEVERITY = flags.DEFINE_integer("severity", 3, "Of the corruptions.", 1, 5)
    _IMAGES = flags.DEFINE_integer("images", 32, "Training images.", 1)
    cli.run(main)
