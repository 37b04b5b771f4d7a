"""Figures that others have published, to stand beside ours: copied as printed, or read off a plot
where the note says so.

Scores are mIoU or AP50 in %. A figure may be compared with one of ours only where both are trained
on the same source, judged on the same domains and by the same protocol: `Published` says all three,
and `report.py` decides by them.
"""

from collections.abc import Sequence
import dataclasses


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a figure was published.

    Attributes:
        name: title, or what the method is called, and place.
        url: of the paper; None if not known for sure.
    """

    name: str
    url: str | None = None


VLTSEG = Source(
    "Strong but Simple: A Baseline for Domain Generalized Dense Perception by CLIP-Based Transfer"
    " Learning (VLTSeg, VLTDet), ACCV 2024",
    "https://arxiv.org/abs/2312.02021",
)
POSTER = Source("The poster of the same paper, ACCV 2024")
SDGOD = Source(
    "Single-Domain Generalized Object Detection in Urban Scene via Cyclic-Disentangled"
    " Self-Distillation (S-DGOD), CVPR 2022"
)
GNAS = Source("G-NAS, AAAI 2024")
PDDOC = Source(
    "Prompt-Driven Dynamic Object-Centric Learning for Single Domain Generalization (PDDOC), CVPR"
    " 2024",
    "https://arxiv.org/abs/2402.18447",
)
CLIP_GAP = Source("CLIP the Gap, CVPR 2023", "https://arxiv.org/abs/2301.05499")
PODA = Source(
    "PØDA: Prompt-driven Zero-shot Domain Adaptation, ICCV 2023", "https://arxiv.org/abs/2212.03241"
)
SRCD = Source("SRCD: Semantic Reasoning with Compound Domains, TNNLS 2024")
UFR = Source("Unbiased Faster R-CNN, CVPR 2024", "https://arxiv.org/abs/2405.15225")
OADG = Source("OA-DG: Object-Aware Domain Generalization for Object Detection, AAAI 2024")
DIVALIGN = Source(
    "DivAlign: Improving Single Domain-Generalized Object Detection: A Focus on Diversification and"
    " Alignment, CVPR 2024"
)
CAUVIS = Source("Cauvis: visual prompts on DINOv2-L (lichen1015/Cauvis)")
REIN = Source("Stronger, Fewer, & Superior (Rein), CVPR 2024", "https://arxiv.org/abs/2312.04265")
TQDM = Source(
    "Textual Query-Driven Mask Transformer (tqdm), ECCV 2024", "https://arxiv.org/abs/2407.09033"
)
MFUSER = Source("Mamba as a Bridge (MFuser), CVPR 2025", "https://arxiv.org/abs/2504.03193")
SOMA = Source(
    "SoMA: Singular Value Decomposed Minor Components Adaptation, CVPR 2025",
    "https://arxiv.org/abs/2412.04077",
)
RECYCLELORA = Source("RecycleLoRA, CVPR 2026", "https://arxiv.org/abs/2603.28142")
MGRNET = Source("MGRNet")


@dataclasses.dataclass(frozen=True)
class Row:
    """One published row.

    Attributes:
        name: of the method or setting.
        values: one a column of the table, None where nothing was published.
        cite: where.
        source: the domain trained on, if rows of a table differ in it.
        remark: how it was measured, where that is the row's own way.
    """

    name: str
    values: tuple[float | None, ...]
    cite: Source
    source: str | None = None
    remark: str = ""


@dataclasses.dataclass(frozen=True)
class Published:
    """A published table.

    Attributes:
        study: the study of ours that it belongs to.
        task: segmentation or detection.
        title: what it shows.
        source: the domain trained on; None if rows differ in it.
        protocol: the name of ours for how it was judged; None where papers differ or do not say,
            and no figure of ours may be compared.
        columns: their heads: a name of a domain of ours where it is one; `mean_unseen` and `rPD` as
            in results.json.
        rows: in the order of publication.
        note: what a reader must know.
    """

    study: str
    task: str
    title: str
    source: str | None
    protocol: str | None
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str = ""

    @property
    def remarks(self) -> str:
        """The note, and what rows remark."""
        rows = [f"{row.name}: {row.remark}." for row in self.rows if row.remark]
        return " ".join([self.note, *rows]).strip()

    @property
    def domains(self) -> tuple[str, ...]:
        """The columns that are domains of ours."""
        return tuple(name for name in self.columns if name in _DOMAINS)


_DOMAINS = (
    "cityscapes",
    "bdd100k",
    "mapillary",
    "acdc",
    "daytime_clear",
    "night_sunny",
    "dusk_rainy",
    "night_rainy",
    "daytime_foggy",
)
_FOUR = ("cityscapes", "bdd100k", "mapillary", "acdc", "mean_unseen")
_WEATHER = (
    "daytime_clear",
    "night_sunny",
    "dusk_rainy",
    "night_rainy",
    "daytime_foggy",
    "mean_unseen",
)


def _rows(cite: Source, table: dict[str, tuple[float | None, ...]]) -> tuple[Row, ...]:
    return tuple(Row(name, values, cite) for name, values in table.items())


def _by_source(
    cite: Source, methods: Sequence[str], table: dict[str, tuple[tuple[float, ...], ...]]
) -> tuple[Row, ...]:
    """Rows of every source and method."""
    return tuple(
        Row(f"{method}, trained on {source}", values, cite, source)
        for source, lines in table.items()
        for method, values in zip(methods, lines, strict=True)
    )


# Freezing: mIoU after training with so many of 12 blocks frozen, counted from the image upwards and
# from the last block downwards.
FREEZING_FIRST = {
    "cityscapes": (54.7, 54.2, 54.9, 53.2, 52.6, 51.0, 50.6, 48.0, 48.7, 48.6, 48.5, 47.8),
    "bdd100k": (53.2, 52.3, 52.3, 51.1, 50.1, 47.4, 46.0, 46.4, 46.4, 46.5, 45.9, 45.1),
    "mapillary": (59.4, 58.4, 58.2, 57.3, 56.0, 55.7, 54.3, 52.6, 52.5, 52.8, 52.1, 51.8),
    "acdc": (48.5, 47.2, 46.5, 45.1, 44.5, 42.7, 42.1, 41.5, 40.6, 40.3, 38.9, 38.1),
}
FREEZING_LAST = {
    "cityscapes": (55.1, 54.7, 54.9, 54.8, 54.8, 55.6, 54.8, 56.6, 54.6, 51.9, 51.0, 47.8),
    "bdd100k": (53.3, 52.1, 52.0, 53.0, 52.4, 53.9, 52.6, 52.1, 51.4, 50.0, 48.6, 45.1),
    "mapillary": (59.3, 58.7, 59.2, 59.3, 59.3, 58.4, 57.7, 58.6, 57.2, 56.0, 54.7, 51.8),
    "acdc": (48.7, 48.2, 48.7, 48.7, 46.9, 47.0, 46.7, 47.6, 47.2, 42.5, 41.5, 38.1),
}
FREEZING_NONE = {"cityscapes": 54.5, "bdd100k": 52.9, "mapillary": 59.5, "acdc": 47.9}

_SEGMENTATION_GTA5 = Published(
    "pretraining",
    "segmentation",
    "Encoders with a Mask2Former decoder (SegFormer: its own), trained on GTA5, mIoU in %",
    "gta5",
    "vltseg",
    _FOUR,
    _rows(
        VLTSEG,
        {
            "SegFormer MiT-B5": (46.6, 45.6, 50.1, 36.4, 44.7),
            "Supervised IN-21k ViT-L/16": (49.3, 47.0, 52.2, 43.5, 48.0),
            "MoCo-v3": (49.7, 46.2, 52.4, 39.1, 46.9),
            "DeiT-3": (53.7, 52.6, 59.3, 49.0, 53.7),
            "SAM": (53.2, 50.3, 58.8, 45.5, 52.0),
            "LDM": (49.2, None, None, None, None),
            "CLIP L/14, frozen": (53.2, 49.8, 57.1, 45.0, 51.2),
            "CLIP L/14": (55.6, 52.5, 59.9, 51.5, 54.9),
            "EVA-02-CLIP L/14, frozen": (55.2, 51.3, 57.4, 47.3, 52.8),
            "EVA-02-CLIP L/14": (65.3, 58.3, 66.0, 62.6, 63.1),
        },
    ),
)
_SEGMENTATION_SYNTHIA = Published(
    "pretraining",
    "segmentation",
    "Encoders trained on SYNTHIA, mean of 19 classes, mIoU in %",
    "synthia",
    "vltseg",
    _FOUR,
    _rows(
        VLTSEG,
        {
            "SegFormer": (41.1, 36.2, 42.4, 32.6, 38.1),
            "Supervised": (44.3, 37.1, 43.1, 34.8, 39.8),
            "MoCo-v3": (40.2, 35.4, 41.5, 31.7, 37.2),
            "DeiT-3": (47.8, 39.1, 45.4, 34.7, 41.8),
            "SAM": (51.6, 40.4, 50.1, 40.1, 45.6),
            "CLIP, frozen": (46.1, 41.8, 45.8, 35.1, 42.2),
            "CLIP": (51.1, 44.7, 50.6, 40.7, 46.8),
            "EVA-02-CLIP, frozen": (48.3, 42.6, 46.4, 37.1, 43.6),
            "EVA-02-CLIP": (56.8, 51.9, 55.1, 48.5, 53.1),
        },
    ),
)
_SEGMENTATION_NEWER = Published(
    "pretraining",
    "segmentation",
    "Newer methods trained on GTA5, mIoU in %, mean of three domains",
    "gta5",
    None,
    ("cityscapes", "bdd100k", "mapillary", "mean_unseen"),
    (
        Row("VLTSeg", (65.3, 58.3, 66.0, 63.2), VLTSEG),
        Row("Rein, EVA-02", (65.3, 60.5, 64.9, 63.6), POSTER),
        Row("Rein, DINOv2-L", (66.4, 60.4, 66.1, 64.3), REIN),
        Row("tqdm, EVA-02", (68.9, 59.2, 70.1, 66.1), TQDM),
        Row("MFuser", (70.2, 63.1, 71.3, 68.2), MFUSER),
        Row("SoMA", (71.8, 61.3, 71.7, 68.3), SOMA),
        Row("RecycleLoRA", (73.0, 61.8, 72.1, 69.0), RECYCLELORA),
        Row("MGRNet", (73.9, 62.9, 73.5, 70.1), MGRNET),
    ),
    "Rein with DINOv2-L as cited by later papers. Papers differ in image sizes and label maps.",
)
_LATER = "a later figure of S-DGOD's authors, from their repository"
_DETECTION_WEATHER = Published(
    "pretraining",
    "detection",
    "Diverse Weather, trained on clear days, AP50 in %",
    "daytime_clear",
    "voc07",
    _WEATHER,
    (
        Row("Faster R-CNN, FPN", (55.1, 38.6, 30.2, 14.0, 33.7, 29.1), SDGOD, remark=_LATER),
        Row("switchable whitening", (53.2, 34.7, 35.2, 17.8, 33.8, 30.4), SDGOD, remark=_LATER),
        Row("IBN-Net", (55.1, 38.4, 37.5, 18.0, 35.9, 32.5), SDGOD, remark=_LATER),
        Row("IterNorm", (50.4, 31.8, 27.3, 14.3, 30.7, 26.0), SDGOD, remark=_LATER),
        Row("ISW", (55.7, 37.1, 38.7, 20.2, 35.1, 32.8), SDGOD, remark=_LATER),
        Row("S-DGOD", (56.1, 36.6, 28.2, 16.6, 33.5, 28.7), SDGOD, remark="600 x 1000 pixels"),
        Row("SRCD", (None, 36.7, 28.8, 17.0, 35.9, 29.6), SRCD),
        Row("UFR", (None, 40.8, 33.2, 19.2, 39.6, 33.2), UFR),
        Row("G-NAS", (58.4, 45.0, 35.1, 17.4, 36.4, 33.5), GNAS, remark="563 x 1000 pixels"),
        Row("PDDOC", (53.6, 38.5, 33.7, 19.2, 39.1, 32.6), PDDOC, remark="600 x 1067 pixels"),
        Row(
            "CLIP the Gap",
            (51.3, 36.9, 32.3, 18.7, 38.5, 31.6),
            CLIP_GAP,
            remark="600 x 1067 pixels; two runs of its code differ by 2.0 on night_rainy",
        ),
        Row(
            "DivAlign",
            (52.8, 42.5, 38.1, 24.1, 37.2, 35.5),
            DIVALIGN,
            remark="within 800 x 1333 pixels; trained on corruptions",
        ),
        Row(
            "DivAlign, copies alone",
            (50.6, 39.4, 37.0, 22.0, 35.6, 33.5),
            DIVALIGN,
            remark="within 800 x 1333 pixels; trained on corruptions",
        ),
        Row(
            "PØDA",
            (None, 43.4, 40.2, 20.5, 44.4, 37.1),
            POSTER,
            remark="measured otherwise, see the row of its correction",
        ),
        Row("VLTDet, R-101", (60.5, 44.6, 38.4, 22.1, 42.3, 36.9), POSTER),
        Row("VLTDet, ViT-L/14", (56.6, 44.4, 43.6, 26.6, 41.8, 39.1), POSTER),
        Row(
            "SoMA",
            (69.4, 59.3, 59.3, 47.6, 51.0, 54.3),
            SOMA,
            remark="Co-DETR on DINOv2-L, fitted into 1024 x 1024 pixels",
        ),
    ),
    "PØDA as the poster prints it; its authors later corrected night_sunny to 43.3 and"
    " daytime_foggy to 43.1, and so the mean to 36.8.",
)
_DETECTION_WEATHER_OTHERWISE = Published(
    "pretraining",
    "detection",
    "Diverse Weather, trained on clear days and measured otherwise, AP50 in %",
    "daytime_clear",
    None,
    _WEATHER,
    (
        Row(
            "PØDA, corrected",
            (None, 43.3, 40.2, 20.5, 43.1, 36.8),
            PODA,
            remark=(
                "a model for each column, which knows by a phrase what it is judged on; AP is the"
                " area under the curve, on 1024 x 1820 pixels"
            ),
        ),
        Row(
            "OA-DG",
            (55.8, 38.0, 33.9, 16.8, 38.3, 31.8),
            OADG,
            remark="within 1024 x 2048 pixels; its data set class decides on the AP",
        ),
        Row(
            "OA-DG, released",
            (None, 38.6, 35.3, 18.0, 38.7, 32.7),
            OADG,
            remark="its checkpoint, by its README",
        ),
        Row(
            "frozen DINOv2-L, Faster R-CNN",
            (None, 55.4, 59.0, 43.4, 50.6, 52.1),
            CAUVIS,
            remark="as Cauvis lists it, perhaps by its own protocol",
        ),
        Row(
            "Cauvis",
            (73.7, 61.2, 64.6, 47.6, 56.5, 57.5),
            CAUVIS,
            remark="true boxes under 32 pixels do not count; 640 x 640 pixels",
        ),
    ),
)
_SEGMENTATION_REAL = Published(
    "transfer",
    "segmentation",
    "From one real dataset to others, mIoU in %",
    None,
    "vltseg",
    ("cityscapes", "bdd100k", "mapillary", "acdc", "rPD"),
    _by_source(
        VLTSEG,
        ("SegFormer", "SAM", "VLTSeg"),
        {
            "cityscapes": (
                (80.8, 58.0, 69.1, 58.6, 76.6),
                (82.8, 57.1, 71.0, 60.5, 75.9),
                (85.0, 66.0, 77.2, 73.3, 84.9),
            ),
            "bdd100k": (
                (62.4, 64.4, 63.0, 54.2, 93.0),
                (68.8, 69.3, 69.1, 57.9, 94.2),
                (78.9, 72.5, 75.9, 71.3, 104.0),
            ),
            "acdc": (
                (66.3, 54.1, 64.9, 75.0, 82.4),
                (68.9, 57.0, 68.1, 77.4, 83.5),
                (78.8, 65.0, 74.1, 80.0, 90.8),
            ),
            "mapillary": (
                (76.1, 63.0, 78.9, 65.7, 86.5),
                (76.4, 62.8, 78.9, 63.4, 85.6),
                (81.6, 69.2, 83.8, 74.2, 89.5),
            ),
        },
    ),
    "On test servers VLTSeg has 86.4 on Cityscapes, and 77.9 from Cityscapes on ACDC.",
)
_DETECTION_REAL = Published(
    "transfer",
    "detection",
    "From one real dataset to others, AP50 in %",
    None,
    "coco",
    ("cityscapes", "bdd100k", "acdc", "rPD"),
    _by_source(
        POSTER,
        ("IN-21k", "SAM", "VLTDet"),
        {
            "cityscapes": (
                (52.8, 30.8, 35.6, 62.9),
                (61.2, 37.2, 45.1, 67.2),
                (59.7, 39.6, 44.3, 70.2),
            ),
            "bdd100k": (
                (45.2, 51.2, 35.7, 79.0),
                (47.5, 53.8, 37.1, 78.6),
                (46.6, 49.2, 34.5, 82.4),
            ),
            "acdc": ((22.4, 22.5, 32.8, 68.4), (33.9, 25.3, 47.8, 61.9), (44.9, 31.0, 48.3, 78.6)),
        },
    ),
)
_SEGMENTATION_CORRUPTIONS = Published(
    "corruptions",
    "segmentation",
    "Mean over corruptions by severity, mIoU in %",
    None,
    None,
    ("1", "2", "3", "4", "5"),
    _rows(
        POSTER,
        {
            "IN-21k": (43.9, 42.4, 40.9, 38.9, 37.3),
            "IN-21k + RandAugment": (47.2, 45.3, 43.7, 41.4, 39.5),
            "IN-21k + PixMix": (45.9, 44.6, 43.0, 41.0, 39.0),
            "EVA-02": (61.1, 58.8, 56.6, 53.4, 50.4),
            "EVA-02 + RandAugment": (59.8, 57.9, 56.0, 53.6, 51.2),
            "EVA-02 + PixMix": (59.1, 57.7, 55.5, 53.1, 50.5),
            "EVA-02 + TLDR": (60.6, 58.8, 56.9, 54.0, 51.5),
        },
    ),
    "Read off the poster's plot, give or take 0.2.",
)
_DETECTION_CORRUPTIONS = Published(
    "corruptions",
    "detection",
    "Mean over corruptions by severity, AP50 in %",
    None,
    None,
    ("1", "5"),
    _rows(
        POSTER,
        {
            "EVA-02": (39.5, 28.0),
            "EVA-02 + RandAugment": (41.8, 30.5),
            "EVA-02 + PixMix": (41.5, 29.0),
            "IN-21k": (34.3, 24.6),
        },
    ),
    "Read off the poster's plot by eye.",
)
_SEGMENTATION_FREEZING = Published(
    "freezing",
    "segmentation",
    "EVA-02-CLIP B/16 (12 blocks) with some blocks frozen, trained on GTA5, mIoU in %",
    "gta5",
    "vltseg",
    _FOUR[:4],
    _rows(
        POSTER,
        {
            "none frozen": tuple(FREEZING_NONE[d] for d in _FOUR[:4]),
            **{
                f"first {n} frozen": tuple(FREEZING_FIRST[d][n - 1] for d in _FOUR[:4])
                for n in range(1, 13)
            },
            **{
                f"last {n} frozen": tuple(FREEZING_LAST[d][n - 1] for d in _FOUR[:4])
                for n in range(1, 13)
            },
        },
    ),
    "Read off the poster's plot, give or take 0.2; none frozen: about.",
)

TABLES = (
    _SEGMENTATION_GTA5,
    _SEGMENTATION_SYNTHIA,
    _SEGMENTATION_NEWER,
    _DETECTION_WEATHER,
    _DETECTION_WEATHER_OTHERWISE,
    _SEGMENTATION_FREEZING,
    _SEGMENTATION_CORRUPTIONS,
    _DETECTION_CORRUPTIONS,
    _SEGMENTATION_REAL,
    _DETECTION_REAL,
)
