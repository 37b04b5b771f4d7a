"""Writes a contact sheet of the generated streets.

    python scripts/streets_sheet.py --out sheet.png [--seed 0] [--first 0] [--scenes 8]
        [--height 256] [--width 512]

Each row is a scene: its five appearances, its label map in colour and its boxes.
"""

import argparse

import cv2
import numpy as np

from jaxdg.data.labels import CITYSCAPES
from jaxdg.streets.render import APPEARANCES, Scene, render


def boxed(scene: Scene, colors: np.ndarray) -> np.ndarray:
    """The picture with its objects' boxes in the colours of their classes, uint8 [h, w, 3]."""
    image = scene.image.copy()
    for (x0, y0, x1, y1), label in zip(
        scene.boxes.astype(int).tolist(), scene.box_labels.tolist(), strict=True
    ):
        cv2.rectangle(image, (x0, y0), (x1 - 1, y1 - 1), colors[label].tolist(), 1)
    return image


def main():
    """Reads the command line and writes the sheet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="PNG or JPEG file to write")
    for name, default in (
        ("seed", 0),
        ("first", 0),
        ("scenes", 8),
        ("height", 256),
        ("width", 512),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    args = parser.parse_args()
    colors = np.array(CITYSCAPES.colors, np.uint8)
    rows = []
    for index in range(args.first, args.first + args.scenes):
        scenes = [
            render(args.seed, index, appearance, (args.height, args.width))
            for appearance in APPEARANCES
        ]
        rows.append(
            np.concatenate(
                [*(s.image for s in scenes), colors[scenes[0].label], boxed(scenes[0], colors)], 1
            )
        )
    if not cv2.imwrite(args.out, np.concatenate(rows)[..., ::-1]):
        raise SystemExit(f"cannot write {args.out}")
    print(f"{args.out}: {args.scenes} scenes; columns {', '.join(APPEARANCES)}, labels, boxes")


if __name__ == "__main__":
    main()
