"""Contact sheets of `jaxdg check`: images with their label maps or boxes drawn over them."""

from collections.abc import Sequence
import os
from pathlib import Path
import re

import cv2
from jaxtyping import UInt8
import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from jaxdg.commands.check.decoding import OpenedSplit, evenly_spaced
from jaxdg.data.datasets import Files
from jaxdg.drawing.overlays import box_overlay, overlay
from jaxdg.drawing.palettes import BACKGROUND, TEXT
from jaxdg.drawing.panels import grid

SOFTWARE = "jaxdg.data.check"  # the `Software` field of the sheets, by which they are replaced
IMAGES = 3  # of a split
WIDTH = 480  # of an image at most, pixels


def save(name: str, opened: Sequence[OpenedSplit], folder: Path) -> str:
    """Saves a sheet with a row for each split, unless it would replace another picture.

    Args:
        name: of the dataset.
        opened: its splits.
        folder: for the sheet.

    Returns:
        A line that names the file.
    """
    file = folder / (re.sub(r"[^\w-]", "_", name) + ".png")
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists() and _software(file) != SOFTWARE:
        return (
            f"contact sheet not written: {file} is there and is none that this command wrote; move"
            " it, or give another --out"
        )
    rows = []
    for o in opened:
        if images := evenly_spaced(o.with_class or o.intact, IMAGES):
            rows.append(_side_by_side([_tile(o.split.name, o.dataset, i) for i in images]))
    mark = PngImagePlugin.PngInfo()
    mark.add_text("Software", SOFTWARE)
    partial = file.with_name(f".{file.name}.partial")
    Image.fromarray(grid(rows)).save(partial, "PNG", pnginfo=mark)
    os.replace(partial, file)
    return f"contact sheet: {file}"


def _software(file: Path) -> str | None:
    """The `Software` field of a picture."""
    try:
        with Image.open(file) as picture:
            return picture.info.get("Software")
    except OSError:
        return None


def _tile(name: str, dataset: Files, i: int) -> UInt8[np.ndarray, "h w 3"]:
    sample = dataset[i]
    labels = dataset.labels
    h, w = sample["image"].shape[:2]
    scale = min(1.0, WIDTH / w)
    size = (min(WIDTH, w), max(1, round(h * scale)))
    image = np.asarray(cv2.resize(sample["image"], size, interpolation=cv2.INTER_AREA), np.uint8)
    if "boxes" in sample:
        boxes = sample["boxes"] * scale
        picture = box_overlay(image, boxes, sample["classes"], labels.colors, labels.names)
    else:
        label = cv2.resize(sample["label"], size, interpolation=cv2.INTER_NEAREST)
        label = np.asarray(label, np.uint8)
        picture = overlay(image, label, labels.colors, labels.names)
    caption = Image.new("RGB", (picture.shape[1], 26), BACKGROUND)
    text = f"{name}  {os.path.basename(dataset.name(i))}"
    font = ImageFont.load_default(13)
    ImageDraw.Draw(caption).text((2, 13), text, font=font, fill=TEXT, anchor="lm")
    return np.concatenate([np.asarray(caption), picture])


def _side_by_side(
    tiles: Sequence[UInt8[np.ndarray, "_ _ 3"]], gap: int = 12
) -> UInt8[np.ndarray, "h w 3"]:
    """Pictures in a row, aligned at the top."""
    height = max(tile.shape[0] for tile in tiles)
    width = sum(tile.shape[1] for tile in tiles) + gap * (len(tiles) - 1)
    canvas = np.full((height, width, 3), BACKGROUND, np.uint8)
    left = 0
    for tile in tiles:
        h, w = tile.shape[:2]
        canvas[:h, left : left + w] = tile
        left += w + gap
    return canvas
