"""Writes a contact sheet of the corruptions of an image, at severities 0 to 5 in each row.

python scripts/corruption_sheet.py --image photo.png --out sheet.png [--width 320]
    [--kinds fog,frost]
"""

import argparse

import cv2
import numpy as np

from jaxdg.data.augment.corruptions import ALL_KINDS, SEVERITIES, corrupt
from jaxdg.data.images import read_image


def main():
    """Reads the command line and writes the sheet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image", required=True, help="image to corrupt, at its own size")
    parser.add_argument("--out", required=True, help="PNG or JPEG file to write")
    parser.add_argument("--width", type=int, default=320, help="of a panel in pixels, default 320")
    parser.add_argument("--kinds", default=",".join(ALL_KINDS), help="by comma, all if left out")
    args = parser.parse_args()
    image = read_image(args.image)
    rows = []
    height = round(args.width * image.shape[0] / image.shape[1])
    for kind in args.kinds.split(","):
        panels = [image, *(corrupt(image, kind, severity, seed=0) for severity in SEVERITIES)]
        panels = [
            cv2.resize(panel, (args.width, height), interpolation=cv2.INTER_AREA)
            for panel in panels
        ]
        cv2.putText(
            panels[0],
            kind,
            (6, height - 8),
            cv2.FONT_HERSHEY_SIMPLEX,
            0.6,
            (255, 255, 0),
            2,
            cv2.LINE_AA,
        )
        rows.append(np.concatenate(panels, 1))
    if not cv2.imwrite(args.out, np.concatenate(rows)[..., ::-1]):
        raise SystemExit(f"cannot write {args.out}")
    print(f"{args.out}: as it is, then severities {', '.join(map(str, SEVERITIES))}")


if __name__ == "__main__":
    main()
