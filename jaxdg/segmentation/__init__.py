"""Features to masks: decoders, sliding windows, mIoU."""

from jaxdg.evaluation.mean_iou import confusion_matrix, iou
from jaxdg.evaluation.sliding_window import (
    at_labels,
    label_map,
    mirror,
    resize_scores,
    shared_side,
    sliding_window,
    window_starts,
)
from jaxdg.segmentation.clip_text import ClipTextHead, ClipTextHeadConfig
from jaxdg.segmentation.linear import LinearHead
from jaxdg.segmentation.mask2former.head import Mask2Former, Mask2FormerConfig
from jaxdg.segmentation.mgrnet import MgrnetConfig, MgrnetHead
from jaxdg.segmentation.segformer import SegformerConfig, SegformerHead
from jaxdg.segmentation.segmenter import Segmenter, SegmenterConfig
from jaxdg.segmentation.tqdm.head import TqdmConfig, TqdmHead
from jaxdg.segmentation.upscaling import UpscalingConfig, UpscalingHead

__all__ = [
    "ClipTextHead",
    "ClipTextHeadConfig",
    "LinearHead",
    "Mask2Former",
    "Mask2FormerConfig",
    "MgrnetConfig",
    "MgrnetHead",
    "SegformerConfig",
    "SegformerHead",
    "Segmenter",
    "SegmenterConfig",
    "TqdmConfig",
    "TqdmHead",
    "UpscalingConfig",
    "UpscalingHead",
    "at_labels",
    "confusion_matrix",
    "iou",
    "label_map",
    "mirror",
    "resize_scores",
    "shared_side",
    "sliding_window",
    "window_starts",
]
