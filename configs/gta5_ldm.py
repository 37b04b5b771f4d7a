r"""GTA5 -> real streets with a latent diffusion model's features and Mask2Former.

Reproduces: the row "LDM" of the VLTSeg paper's comparison of pre-trainings (arXiv 2312.02021), as
far as it is known. Decoder, losses, schedule, crops, batch and augmentation are those of
configs/gta5_eva02.py, which says what differs from that paper.
Open: nearly all of the published run. It cites a result of others without saying whose. Likely is
PTDiffSeg (arXiv 2307.02138), which trains a decoder on a frozen Stable Diffusion and on class names
as VPD (arXiv 2303.02153) has them. Its decoder, schedule and prompts are not known here, nor
whether 49.2 is its result without the prompts of scenes.
Differs from VPD's code: Mask2Former reads the features, of strides 8 to 64, where VPD has an FPN;
nothing of the encoder is trained.

Expected, mIoU % on Cityscapes val, BDD100K val, Mapillary val, ACDC val, mean:
    published, GTA5                                49.2 /   -  /   -  /   -
    this file                                      not measured

`configs/gta5_ldm.py:ENCODER` takes sd15_vpd (the default), sd15 (the empty prompt) or sd21.
--config.model.freeze=none trains the UNet and the condition, at a tenth of the decoder's rate as
VPD does; the VAE always stays as it is. It needs more memory, and less of it with
--config.model.remat=True and --config.model.dtype=bfloat16.

Data: as in configs/gta5_eva02.py.
Hardware: one GPU; not yet run here. Planned for an H100 in bfloat16: 7.1 GB and 0.12 s a step, with
a frozen encoder.

    python -m jaxdg.train --config configs/gta5_ldm.py --workdir runs/gta5_ldm
"""

from configs import gta5_eva02
from jaxdg.config import Config

ENCODERS = ("sd15_vpd", "sd15", "sd21")


def get_config(encoder: str = "sd15_vpd") -> Config:
    """The experiment with one of `ENCODERS`."""
    if encoder not in ENCODERS:
        raise ValueError(
            f"configs/gta5_ldm.py:{encoder}; allowed behind the colon: {', '.join(ENCODERS)}"
        )
    c = gta5_eva02.get_config()
    c.model.encoder = encoder
    c.model.weights = f"weights/{encoder}.safetensors"
    c.model.taps = ()
    c.model.pyramid = "none"
    c.model.drop_path = 0.0
    c.model.freeze = "all"
    return c
