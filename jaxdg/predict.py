"""Images in, label maps and overlays out.

python -m jaxdg.predict --checkpoint runs/streets --out predictions IMAGE_OR_FOLDER...
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from absl import flags
import numpy as np
from PIL import Image

from jaxdg import cli, visualize
from jaxdg.data.datasets import read_image
from jaxdg.tasks import Model, load

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


def find_images(paths: Iterable[str]) -> list[tuple[Path, Path]]:
    """(image file, its name below --out without suffix) of every image given or found in the folders given, in order.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a folder holds no images, or two images would be written to the same file.
    """
    found: list[tuple[Path, Path]] = []
    for path in map(Path, paths):
        if path.is_dir():
            files = sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES)
            if not files:
                raise ValueError(f"{path} holds no images ({' '.join(SUFFIXES)})")
            found += [(f, f.relative_to(path).with_suffix("")) for f in files]
        elif path.is_file():
            found.append((path, Path(path.stem)))
        else:
            raise FileNotFoundError(f"{path} does not exist")
    taken: dict[Path, Path] = {}
    for file, name in found:
        if name in taken:
            raise ValueError(f"{taken[name]} and {file} would both be written as {name}.png; predict them into different folders")
        taken[name] = file
    return found


def predict_file(model: Model, file: Path, name: Path, out: Path) -> np.ndarray:
    """Writes `out/NAME.png` (class ids) and `out/NAME_overlay.jpg` of one image; returns the class ids uint8 [h, w]."""
    image = read_image(str(file))
    label = model.predict(image)
    target = out / name
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(label).save(target.with_name(target.name + ".png"))
    overlay = visualize.overlay(image, label, model.labels.colors, model.labels.names)
    Image.fromarray(overlay).save(target.with_name(target.name + "_overlay.jpg"), quality=92)
    return label


def main(arguments: Sequence[str]) -> None:
    """Predicts the images that the arguments name."""
    if len(arguments) < 2:
        raise ValueError("name at least one image or folder: python -m jaxdg.predict --checkpoint DIR --out DIR IMAGE_OR_FOLDER...")
    images = find_images(arguments[1:])
    model, out = load(_CHECKPOINT.value), Path(_OUT.value)
    for file, name in images:
        label = predict_file(model, file, name, out)
        ids, counts = np.unique(label, return_counts=True)
        shares = sorted(zip(counts / label.size, ids, strict=True), reverse=True)[:3]
        print(f"{out / name}.png  " + ", ".join(f"{model.labels.names[i]} {100 * share:.0f} %" for share, i in shares), flush=True)


if __name__ == "__main__":
    _CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A workdir, or one step in it such as DIR/checkpoints/500.", required=True)
    _OUT = flags.DEFINE_string("out", None, "Folder for NAME.png (class ids) and NAME_overlay.jpg.", required=True)
    cli.run(main)
