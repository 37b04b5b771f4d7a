"""Makes tests/golden/average_precision.npz: random boxes, judged by three public tools.

Run by hand where pycocotools (last 2.0.11) and mean-average-precision (last 2024.1.5.0) are
installed, with a checkout of detectron2 (last 02b5c4e2), of which only VOC's evaluation is run:

    python tests/oracles/golden_average_precision.py DETECTRON2

- coco, coco_AP50: pycocotools, for every case.
- voc07, voc12: detectron2, for the cases without equal scores, since its order of those is
  undefined. It reads VOC's XML files and result files. It fails on a class without detections, so
  every class gets one more, which is false, has the lowest score and changes no AP.
- plain_*: mean-average-precision, for the case without difficult and crowd boxes, which it does not
  tell apart within an image.

All are in percent, nan where no true box counts.
"""

import ast
import dataclasses
import functools
from pathlib import Path
import sys
import tempfile
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from jaxdg.evaluation.average_precision import Detections, Truth
from tests.detection import scenes

OUT = Path(__file__).resolve().parents[2] / "tests" / "golden" / "average_precision.npz"
CLASSES = 5
Scenes = list[tuple[Truth, Detections]]


def distinct(cases: Scenes, rng: np.random.Generator) -> Scenes:
    """The same with scores of three digits that differ within the case."""
    scores = (1 + rng.permutation(sum(len(d.scores) for _, d in cases))) / 1000
    ends = np.cumsum([len(d.scores) for _, d in cases])
    parts = np.split(scores.astype(np.float32), ends[:-1])
    return [(t, dataclasses.replace(d, scores=s)) for (t, d), s in zip(cases, parts, strict=True)]


def flagged(truth: Truth, difficult: np.ndarray | bool, crowd: np.ndarray | bool) -> Truth:
    """The same truth with other flags."""
    n = len(truth.classes)
    return dataclasses.replace(
        truth,
        difficult=np.broadcast_to(difficult, n).copy(),
        crowd=np.broadcast_to(crowd, n).copy(),
    )


def edges() -> Scenes:
    """Boxes as large as COCO's borders and one pixel less and more.

    Each is found whole, to 3/4 or to the half (IoU of exactly 1, 0.75, 0.5), and a false detection
    of its size is beside it.
    """
    cases = []
    for side in (31, 32, 33, 95, 96, 97):
        for share in (1.0, 0.75, 0.5):
            for k in range(2):
                box = np.array(
                    [[4, 8, 4 + side, 8 + side + side % 2]], np.float32
                )  # an even height
                found = np.concatenate([box, box + np.array([100, 0, 100, 0], np.float32)])
                found[0, 3] = 8 + share * (box[0, 3] - 8)
                flags = np.zeros((2, 1), bool)
                area = np.array([side * side], float)
                truth = Truth(box, np.array([k]), flags[0], flags[1], area)
                cases.append((truth, Detections(found, np.ones(2, np.float32), np.array([k, k]))))
    return cases


def tenths() -> Scenes:
    """Ten boxes of each of two classes, of which 3 and 7 are found: recalls that 0.1 * 3 and 0.1 *
    7 exceed in floating point.
    """
    starts = 20 * np.arange(10)
    box = np.stack([starts, starts * 0, starts + 16, starts * 0 + 12], axis=1).astype(np.float32)
    row = Truth(box, starts * 0, np.zeros(10, bool), np.zeros(10, bool), np.full(10, 192.0))
    return [
        (
            dataclasses.replace(row, classes=row.classes + k),
            Detections(box[:n], np.ones(n, np.float32), np.full(n, k)),
        )
        for k, n in enumerate((3, 7))
    ]


def doubled(cases: Scenes) -> Scenes:
    """Every true box twice, mostly with other flags; and two true boxes that a detection between
    them overlaps equally.
    """
    result = []
    for truth, found in cases:
        twice = {
            f.name: np.concatenate([getattr(truth, f.name)] * 2) for f in dataclasses.fields(truth)
        }
        n = len(truth.classes)
        twice["difficult"][n:] = ~truth.difficult[::-1]
        twice["crowd"][n:] = truth.crowd[::-1]
        result.append((Truth(**twice), found))
    left = [0, 0, 20, 40]
    right = [8, 0, 28, 40]
    between = [4, 0, 24, 40]
    for first, second in ((left, right), (right, left)):
        for also in (left, right):
            truth = Truth(
                np.array([first, second], np.float32),
                np.zeros(2, np.int32),
                np.zeros(2, bool),
                np.zeros(2, bool),
                np.full(2, 800.0),
            )
            result.append(
                (
                    truth,
                    Detections(
                        np.array([between, also], np.float32),
                        np.zeros(2, np.float32),
                        np.zeros(2, np.int32),
                    ),
                )
            )
    return result


def all_cases() -> dict[str, Scenes]:
    """Every case by name."""
    rng = np.random.default_rng(0)

    def draw(n, most=12):
        return [scenes.image(rng, CLASSES, most=most) for _ in range(n)]

    mixed = []
    for truth, found in draw(
        60
    ):  # class 3 has only difficult boxes, class 4 has none, both are found
        keep = truth.classes != 4
        truth = Truth(*(getattr(truth, field.name)[keep] for field in dataclasses.fields(truth)))
        mixed.append((flagged(truth, truth.difficult | (truth.classes == 3), truth.crowd), found))
    few = draw(12)
    empty = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))
    nothing = Truth(
        np.zeros((0, 4), np.float32),
        np.zeros(0, np.int32),
        np.zeros(0, bool),
        np.zeros(0, bool),
        np.zeros(0),
    )
    one_class = [
        (
            dataclasses.replace(t, classes=t.classes * 0),
            dataclasses.replace(d, classes=d.classes * 0),
        )
        for t, d in draw(4, 70)
    ]
    return {
        "mixed": distinct(mixed, rng),
        "plain": distinct([(flagged(t, False, False), d) for t, d in draw(40)], rng),
        "ties": [
            (t, dataclasses.replace(d, scores=np.ceil(d.scores * 4) / 4)) for t, d in draw(40)
        ],
        "doubled": distinct(doubled(draw(20)), rng),
        "many": distinct(one_class, rng),  # more than 100 detections of a class in an image
        "edges": distinct(edges(), rng),
        "tenths": distinct(tenths(), rng),
        "difficult": distinct([(flagged(t, True, False), d) for t, d in few], rng),
        "crowd": distinct([(flagged(t, False, True), d) for t, d in few], rng),
        "no_detections": [(t, empty) for t, _ in few],
        "no_truth": distinct([(nothing, d) for _, d in few], rng),
    }


def voc_functions(detectron2: Path) -> dict[str, Any]:
    """The functions of detectron2's VOC evaluation, without the package."""
    source = (detectron2 / "detectron2" / "evaluation" / "pascal_voc_evaluation.py").read_text()
    wanted = [
        n
        for n in ast.parse(source).body
        if isinstance(n, ast.FunctionDef) and n.name in ("parse_rec", "voc_ap", "voc_eval")
    ]
    names = {
        "np": np,
        "ET": ElementTree,
        "lru_cache": functools.lru_cache,
        "PathManager": SimpleNamespace(open=open),
    }
    exec(compile(ast.Module([*wanted], []), "pascal_voc_evaluation", "exec"), names)
    return names


def detectron2_scores(cases: Scenes, functions: dict[str, Any]) -> np.ndarray:
    """AP of each class by the rules of 2007 and 2012 [2, k]; crowd regions as difficult boxes."""
    result = np.full((2, CLASSES), np.nan)
    functions["parse_rec"].cache_clear()
    with tempfile.TemporaryDirectory() as folder:
        for i, (truth, _) in enumerate(cases):
            root = ElementTree.Element("annotation")
            for box, k, optional in zip(
                truth.boxes.astype(int), truth.classes, truth.difficult | truth.crowd, strict=True
            ):
                thing = ElementTree.SubElement(root, "object")
                for key, value in {
                    "name": k,
                    "pose": "",
                    "truncated": 0,
                    "difficult": int(optional),
                }.items():
                    ElementTree.SubElement(thing, key).text = str(value)
                frame = ElementTree.SubElement(thing, "bndbox")
                for key, value in zip(
                    ("xmin", "ymin", "xmax", "ymax"), box + np.array([1, 1, 0, 0]), strict=True
                ):
                    ElementTree.SubElement(frame, key).text = str(value)
            ElementTree.ElementTree(root).write(f"{folder}/{i}.xml")
        Path(f"{folder}/images.txt").write_text("\n".join(str(i) for i in range(len(cases))))
        for k in range(CLASSES):
            if not any((~(t.difficult | t.crowd) & (t.classes == k)).any() for t, _ in cases):
                continue
            lines = ["0 -1.000 9000.0 9000.0 9001.0 9001.0"]
            for i, (_, found) in enumerate(cases):
                for (x0, y0, x1, y1), score in zip(
                    found.boxes[found.classes == k], found.scores[found.classes == k], strict=True
                ):
                    lines.append(f"{i} {score:.3f} {x0 + 1:.1f} {y0 + 1:.1f} {x1:.1f} {y1:.1f}")
            Path(f"{folder}/found_{k}.txt").write_text("\n".join(lines))
            for rule, old in enumerate((True, False)):
                files = f"{folder}/found_{{}}.txt", f"{folder}/{{}}.xml", f"{folder}/images.txt"
                result[rule, k] = functions["voc_eval"](*files, str(k), 0.5, old)[2]
    return 100 * result


def package_scores(cases: Scenes) -> dict[str, np.ndarray]:
    """What the package mean-average-precision says; its boxes are inclusive pixels."""
    from mean_average_precision import MetricBuilder  # pyright: ignore[reportMissingImports]

    judge = MetricBuilder.build_evaluation_metric("map_2d", async_mode=False, num_classes=CLASSES)
    inclusive = np.array([1, 1, 0, 0])
    for t, d in cases:
        flags = np.stack([t.classes, t.difficult, t.crowd], axis=1)
        judge.add(
            np.column_stack([d.boxes + inclusive, d.classes, d.scores]).astype(float),
            np.column_stack([t.boxes + inclusive, flags]).astype(float),
        )

    def of(**how):
        return np.array(
            [judge.value(iou_thresholds=0.5, **how)[0.5][k]["ap"] for k in range(CLASSES)]
        )

    ten = judge.value(
        iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
        recall_thresholds=np.linspace(0, 1, 101),
        mpolicy="soft",
    )
    scores = {
        "voc07": of(recall_thresholds=np.arange(0.0, 1.1, 0.1)),
        "voc12": of(),
        "coco_AP": np.array(ten["mAP"]),
    }
    return {name: 100 * value for name, value in scores.items()}


def main(detectron2: Path) -> None:
    """Draws the cases, asks the three and writes the file."""
    cases = all_cases()
    stored = {}
    functions = voc_functions(detectron2)
    for name, case in cases.items():
        truths = [t for t, _ in case]
        detections = [d for _, d in case]
        for kind, images in (("truth", truths), ("found", detections)):
            stored[f"{name}/{kind}/count"] = np.array([len(image.boxes) for image in images])
            for field in dataclasses.fields(images[0]):
                stored[f"{name}/{kind}/{field.name}"] = np.concatenate(
                    [getattr(image, field.name) for image in images]
                )
        stored[f"{name}/coco"], stored[f"{name}/coco_AP50"] = scenes.pycocotools_scores(
            truths, detections, CLASSES
        )
        if name != "ties":
            stored[f"{name}/voc07"], stored[f"{name}/voc12"] = detectron2_scores(case, functions)
    stored |= {f"plain_{name}": value for name, value in package_scores(cases["plain"]).items()}
    np.savez_compressed(OUT, **stored)
    print(f"{OUT}: {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
