r"""The paper's studies in small, on CamVid: a pre-trained ViT-Ti/16 and a linear decoder.

Reproduces no published figure. At most 30 images of each domain are judged
(`evaluation.max_images`), so these results compare with one another only.

Results: docs/reports/study_tiny/report.md.
Hardware and time: 25 minutes on 2 cores of an x86 CPU shared with other work, at most 97 seconds a
run (2026-11-23): pretraining 2:32, freezing 9:23, transfer 4:17, seeds 4:03, corruptions 4:58.
Data and weights: as in configs/camvid_vit_tiny.py.

    export JAXDG_DATA=DATA
    for study in pretraining freezing methods transfer seeds corruptions; do
        python -m jaxdg.studies.$study --config configs/study_tiny.py --workdir runs/study/$study
    done
    cd runs/study
    python -m jaxdg.studies.report pretraining freezing methods corruptions transfer seeds
"""

from jaxdg.config import Config
from jaxdg.studies.study import StudyOptions


def get_config() -> Config:
    """The experiment."""
    c = Config(steps=200, batch_size=8, log_every=20, eval_every=200, checkpoint_every=100)
    c.keep_checkpoints = 1
    c.data.source = "camvid"
    c.data.crop = (160, 160)
    c.data.scale = (0.5, 1.0)
    c.model.encoder = "augreg_ti16"
    c.model.weights = "weights/augreg_ti16.safetensors"
    c.model.pyramid = "none"
    c.optimizer.learning_rate = 1e-3
    c.optimizer.clip = 1.0
    c.evaluation.domains = ("camvid", "day", "dusk")
    c.evaluation.stride = (160, 160)
    c.evaluation.max_images = 30
    return c


def get_study() -> StudyOptions:
    """What the studies compare."""
    return StudyOptions(
        freeze_first=(3, 6, 9, 12),
        freeze_last=(3, 6, 9),
        models={"augreg_ti16": {}, "from scratch": {"model.weights": None}},
        kinds=("gaussian_noise", "motion_blur", "fog"),
        severities=(1, 3),
        settings={"transfer": {"evaluation.domains": ("camvid", "camvid_day", "camvid_dusk")}},
    )
