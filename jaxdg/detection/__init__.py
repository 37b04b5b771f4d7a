"""Features to boxes: the operators of detectors, with fixed shapes and validity masks."""

from jaxdg.detection.anchors import anchors, points
from jaxdg.detection.boxes import area, clip, decode, encode, giou, iou, non_empty, pairwise_giou, pairwise_iou
from jaxdg.detection.nms import nms
from jaxdg.detection.roi_align import pyramid_level, roi_align
from jaxdg.detection.sampling import assign, sample

__all__ = [
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
    "roi_align",
    "sample",
]
