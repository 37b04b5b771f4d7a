"""CamVid's three domains by CLIP alone: every patch of a B/16 against the class names, without a
step of training (MaskCLIP).

Follows: MaskCLIP (Zhou et al. 2022, chongzhou96/MaskCLIP) without its refinements, see
    jaxdg/segmentation/clip_text.py. A baseline for
runs that train: what an encoder knows of the classes before it has seen a label. For another model
give both of its files, such as

    --config.model.encoder=eva02_clip_l14 --config.model.weights=.. --config.model.text_weights=..

Expected, mIoU % (11 classes): not measured. Hardware and time: evaluation only. Data and weights:
CamVid in SegNet's layout below the data root; ViT-B-16.pt of OpenAI, which both files are made
from.

    python conversion/torch_to_flax.py --model clip_b16 --checkpoint ViT-B-16.pt --out weights/clip_b16.safetensors
    python conversion/torch_to_flax.py --model clip_b16_text --checkpoint ViT-B-16.pt --out weights/clip_b16_text.safetensors
    python -m jaxdg.train --config configs/camvid_clip_zero_shot.py --workdir runs/camvid_clip --config.data.root=DATA
"""

from jaxdg.config import Config


def get_config() -> Config:
    """The experiment."""
    c = Config(steps=0)
    c.data.source = "camvid"
    c.data.crop = (224, 224)
    c.model.encoder = "clip_b16"
    c.model.weights = "weights/clip_b16.safetensors"
    c.model.text_weights = "weights/clip_b16_text.safetensors"
    c.model.pyramid = "none"
    c.model.decoder = "clip_text"
    c.evaluation.domains = ("camvid", "day", "dusk")
    c.evaluation.stride = (112, 112)
    return c
