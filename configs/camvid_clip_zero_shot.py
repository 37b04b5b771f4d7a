r"""CamVid without training: CLIP B/16 compares each patch with the class names (MaskCLIP).

Follows: MaskCLIP (Zhou et al. 2022, chongzhou96/MaskCLIP) without its refinements, see
jaxdg/segmentation/clip_text.py. It is a baseline for runs that train: it shows what an encoder
knows of the classes before it has seen a label. Another model needs both of its files, such as

    --config.model.encoder=eva02_clip_l14 --config.model.weights=.. --config.model.text_weights=..

Expected, mIoU % (11 classes): not measured.
Hardware and time: evaluation only.
Data: CamVid in SegNet's layout below the data root.
Weights: OpenAI's ViT-B-16.pt, from which both files are made.

    python conversion/torch_to_flax.py --model clip_b16 --checkpoint ViT-B-16.pt \
        --out weights/clip_b16.safetensors
    python conversion/torch_to_flax.py --model clip_b16_text --checkpoint ViT-B-16.pt \
        --out weights/clip_b16_text.safetensors
    python -m jaxdg.train --config configs/camvid_clip_zero_shot.py --workdir runs/camvid_clip \
        --config.data.root=DATA
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
