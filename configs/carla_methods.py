r"""CARLA's towns 01 to 04 -> the unseen town 05: methods of detection beside their controls.

Reproduces no published figure. It shows what each mechanism does to a pre-trained ViT-Ti, on images
of 192x320 pixels with a single-stage head of 64 channels, or a two-stage one where the method needs
proposals. Every run has 400 steps of 4 images. What a run is shown in training beside its images
(copies of DivAlign, pictures that guide edits and gates) has other corruptions than the four that
it is judged under.

    plain            the detector alone
    g_loss           a penalty on class scores (G-NAS), of 0.01
    edits            offsets behind block 8 of 12 that pictures guide (CLIP the Gap)
    edits_random     control: offsets of equal length at random
    edits_permuted   control: the offsets, the channels of each in another order
    divalign         corrupted copies whose boxes agree (DivAlign)
    copies           control: corrupted copies alone
    double           control: the detector alone, twice the steps
    sdgod            S-DGOD
    neck             control: its layers, without its losses
    two_stage        a two-stage detector alone
    gates            gates of its box head that pictures guide (PDDOC)
    gates_fixed      control: masks drawn once

Results: benchmarks/RESULTS.md, "Methods of detection in small".
Data and weights: as in configs/carla_vit_tiny.py.

    python scripts/scene_vectors.py --config configs/carla_methods.py --severity 3 \
        --scenes clear,brightness,contrast,gaussian_noise,defocus_blur \
        --out weights/carla_scenes.safetensors
    jaxdg mine --config carla_methods --config.edits.on --out weights/carla_offset.safetensors
    for control in random permuted; do
        jaxdg mine --config carla_methods --config.edits.on --control $control \
            --of weights/carla_offset.safetensors --out weights/carla_offset_$control.safetensors
    done
    jaxdg study corruptions --config carla_methods --workdir runs/carla_methods
"""

from configs import carla_edits, pddoc
from jaxdg.config import Config
from jaxdg.studies.study import StudyOptions

SHOWN = ("brightness", "contrast", "gaussian_noise", "defocus_blur")
UNSEEN = ("fog", "frost", "snow", "zoom_blur")
TWO_STAGE = {"model.decoder": "faster_rcnn"}
GATES = {"model.decoder": "gated_rcnn"}
NECK = {
    "sdgod.on": True,
    "sdgod.norm": "group",
    "sdgod.base": 0.0,
    "sdgod.contrast": 0.0,
    "sdgod.proposal_contrast": 0.0,
    "sdgod.distillation": 0.0,
}


def get_config() -> Config:
    """The plain detector, and the settings of the methods that models turn on."""
    c = pddoc.get_config("carla")
    c.data.crop = c.data.resize = (192, 320)
    c.model.decoder = "fcos"
    c.model.fcos.channels = c.model.faster_rcnn.channels = c.model.gated_rcnn.channels = 64
    c.model.gated_rcnn.gates.scenes = ("clear", *SHOWN)
    c.edits = carla_edits.get_config("offset").edits
    c.edits.on = False
    c.edits.prompts = SHOWN
    c.evaluation.domains = ("town05",)
    return c


def get_study() -> StudyOptions:
    """The methods and their controls."""
    return StudyOptions(
        models={
            "plain": {},
            "g_loss": {"model.fcos.logit_penalty": 0.01},
            "edits": _edits(""),
            "edits_random": _edits("_random"),
            "edits_permuted": _edits("_permuted"),
            "divalign": {"divalign.on": True},
            "copies": {
                "divalign.on": True,
                "divalign.class_weight": 0.0,
                "divalign.box_weight": 0.0,
            },
            "double": {"steps": 800},
            "sdgod": {"sdgod.on": True, "sdgod.norm": "group"},
            "neck": NECK,
            "two_stage": TWO_STAGE,
            "gates": GATES,
            "gates_fixed": {
                **GATES,
                "model.gated_rcnn.gates.scenes": (),
                "model.gated_rcnn.gates.file": None,
                "model.gated_rcnn.gates.fixed": True,
                "model.gated_rcnn.gates.sparsity": 0.0,
                "model.gated_rcnn.gates.balance": 0.0,
            },
        },
        kinds=UNSEEN,
        severities=(3,),
        repeat=(0, 1, 2),
    )


def _edits(control: str) -> dict[str, object]:
    return {"edits.on": True, "edits.file": f"weights/carla_offset{control}.safetensors"}
