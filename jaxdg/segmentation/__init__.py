"""Features to masks: decoders, sliding windows, mIoU."""

from jaxdg.segmentation.linear import LinearHead
from jaxdg.segmentation.mask2former import Mask2Former, Mask2FormerConfig
from jaxdg.segmentation.mean_iou import confusion_matrix, iou
from jaxdg.segmentation.segmenter import Segmenter, SegmenterConfig
from jaxdg.segmentation.sliding_window import resize_scores, sliding_window, window_starts

__all__ = [
    "LinearHead",
    "Mask2Former",
    "Mask2FormerConfig",
    "Segmenter",
    "SegmenterConfig",
    "confusion_matrix",
    "iou",
    "resize_scores",
    "sliding_window",
    "window_starts",
]
