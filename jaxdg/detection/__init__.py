"""Features to boxes: detectors, and their operators with fixed shapes and validity masks."""

from jaxdg.detection.anchors import anchors, points
from jaxdg.detection.boxes import (
    area,
    clip,
    decode,
    encode,
    giou,
    iou,
    non_empty,
    pairwise_giou,
    pairwise_iou,
)
from jaxdg.detection.detector import Detector, DetectorConfig
from jaxdg.detection.fcos import FcosConfig
from jaxdg.detection.nms import nms
from jaxdg.detection.rcnn.cells import CellRcnnConfig
from jaxdg.detection.rcnn.detectors import C4Config, RcnnConfig
from jaxdg.detection.rcnn.roi_align import pyramid_level, roi_align
from jaxdg.detection.rcnn.sampling import assign, sample
from jaxdg.evaluation.average_precision import AveragePrecision, Detections, Truth
from jaxdg.evaluation.coco_format import read_coco, write_coco

__all__ = [
    "AveragePrecision",
    "C4Config",
    "CellRcnnConfig",
    "Detections",
    "Detector",
    "DetectorConfig",
    "FcosConfig",
    "RcnnConfig",
    "Truth",
    "anchors",
    "area",
    "assign",
    "clip",
    "decode",
    "encode",
    "giou",
    "iou",
    "nms",
    "non_empty",
    "pairwise_giou",
    "pairwise_iou",
    "points",
    "pyramid_level",
    "read_coco",
    "roi_align",
    "sample",
    "write_coco",
]
