"""How ONNX graphs agree with `predict` on images, and what both cost.

    python scripts/onnx_agreement.py --checkpoint model.safetensors --onnx model.onnx IMAGE...

`jaxdg export --onnx` has made the graph. The functions around it are those of docs/how-to/onnx.md,
word for word. Each side computes in one thread, by turns; seconds are CPU time, which other work on
the machine changes little. A first image is not counted.
"""

import argparse
import functools
import os
from pathlib import Path
import re
import shutil
import sys
import tempfile
import time
import types
from typing import Any
from unittest import mock

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jaxdg.commands import onnx_graph
from jaxdg.detection.boxes import pairwise_iou
from jaxdg.evaluation.average_precision import Detections
from jaxdg.tasks.loading import load

PAGE = Path(__file__).resolve().parents[1] / "docs/how-to/onnx.md"


def page_function(name: str, folder: Path) -> Any:
    """A function of the page, for `streets.onnx` and `streets.json` in a folder."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (block,) = (block for block in blocks if f"def {name}(" in block)
    space: dict[str, Any] = {}
    here = Path.cwd()
    os.chdir(folder)
    try:
        exec(block, space)
    finally:
        os.chdir(here)
    return space[name]


def shared(found: tuple[np.ndarray, ...], ours: Detections) -> float:
    """The share of boxes of either that the other has, of one class, place and score.

    Boxes of nearly one score may come in another order.
    """
    boxes, scores, classes = found
    total = len(scores) + len(ours.scores)
    near = np.asarray(pairwise_iou(jnp.asarray(boxes), jnp.asarray(ours.boxes))) > 0.99
    near &= np.abs(scores[:, None] - ours.scores) < 1e-4
    near &= classes[:, None] == ours.classes
    return (near.any(1).sum() + near.any(0).sum()) / total if total else 1.0


def compared(model: Any, theirs: Any, paths: list[str]) -> None:
    """Prints how the predictions of both agree, and what they cost."""
    segments = model.task.config.task == "segmentation"

    def timed(function: Any, image: np.ndarray) -> tuple[Any, float]:
        start = time.process_time()
        return function(image), time.process_time() - start

    seconds = []
    same = []
    for path in [paths[0], *paths]:
        image = np.asarray(Image.open(path).convert("RGB"))
        ours, our_time = timed(model.predict, image)
        found, their_time = timed(theirs, image)
        seconds.append((our_time, their_time))
        same.append(np.mean(found == ours) if segments else shared(found, ours))
    share, least = 100 * np.mean(same[1:]), 100 * min(same)
    what = "labels agree" if segments else "boxes that both find"
    print(f"{what}: {share:.4f} % of all, {least:.4f} % of the worst image")
    medians = np.median(seconds[1:], axis=0)
    print("CPU seconds an image: jaxdg {:.3f}, ONNX Runtime {:.3f}".format(*medians))


def compared_scores(model: Any, session: Any, paths: list[str]) -> None:
    """Prints by how much the scores of images differ that are resized to a window."""
    function, inputs, outputs = onnx_graph.window_program(model)
    program = jax.jit(function)
    at = list(outputs).index("scores")
    h, w = inputs["image"].shape[1:3]
    difference = largest = 0.0
    for path in paths:
        image = cv2.resize(np.asarray(Image.open(path).convert("RGB")), (w, h))
        given = {"image": np.asarray(model.task.normalize(image[None]))}
        if "size" in inputs:
            given["size"] = np.array([[h, w]], np.float32)
        expected = np.asarray(program(*given.values())[at])
        difference = max(difference, float(np.abs(session.run(None, given)[at] - expected).max()))
        largest = max(largest, float(np.abs(expected).max()))
    print(f"scores at {w}x{h} differ by {difference:.2g}; the largest is {largest:.3g}")


def main() -> None:
    """Prints one line a quantity."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--onnx", required=True, type=Path)
    parser.add_argument("images", nargs="+")
    arguments = parser.parse_args()
    import onnxruntime  # pyright: ignore[reportMissingImports]

    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    cv2.setNumThreads(1)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    one_thread = functools.partial(onnxruntime.InferenceSession, sess_options=options)
    shim = types.SimpleNamespace(InferenceSession=one_thread)
    model = load(arguments.checkpoint)
    name = "predict" if model.task.config.task == "segmentation" else "detect"
    with tempfile.TemporaryDirectory() as folder:
        for suffix in (".onnx", ".json"):
            shutil.copy(arguments.onnx.with_suffix(suffix), Path(folder, "streets" + suffix))
        with mock.patch.dict(sys.modules, onnxruntime=shim):
            theirs = page_function(name, Path(folder))
    compared(model, theirs, arguments.images)
    compared_scores(model, one_thread(str(arguments.onnx)), arguments.images)


if __name__ == "__main__":
    main()
