"""Where the authors publish each model's file, and what its name or URL says of its sha256.

Every URL stands in a README, in code of its authors, or in code of those who load the file from
there. The Hugging Face hub tells a file's sha256 itself. A model without a row has no single file:
`jaxdg convert --list` says where its files are.

Mirrors: `HF_ENDPOINT` replaces https://huggingface.co, as for all programs of the hub.
`JAXDG_MIRROR` replaces the `https:/` of all other URLs, so a mirror has a folder for each host:
https://host/a.pth is looked for at JAXDG_MIRROR/host/a.pth.
"""

import dataclasses
import os
from urllib.parse import urlsplit

from jaxdg.backbones import entry
from jaxdg.conversion import models
from jaxdg.text.clip_text import TEXT_TOWERS

HUB = "https://huggingface.co"
META = "https://dl.fbaipublicfiles.com"
GOOGLE = "https://storage.googleapis.com"
GENERIC = ("model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")

_HARM = "the harmful uses of its Attachment A, to whoever gets the model on too; read it"
# What a licence forbids; it is shown before the download.
FORBIDS = {
    "CC-BY-NC-4.0": "commercial use",
    "NVIDIA, not commercial": "any use but research and evaluation, and commercial use",
    "DINOv3 License": "military and some other uses; read it",
    "CreativeML OpenRAIL-M": _HARM,
    "CreativeML OpenRAIL++-M": _HARM,
}


@dataclasses.dataclass(frozen=True)
class Published:
    """A published file.

    Attributes:
        url: where its authors put it.
        sha256: as its name or URL tells it, whole or its first digits; None if they do not.
        gated: whether the hub gives it only to those who have accepted its licence there.
    """

    url: str
    sha256: str | None = None
    gated: bool = False

    @property
    def file(self) -> str:
        """Its name in the cache: its own, behind the repository's where many files have that."""
        *above, name = urlsplit(self.url).path.split("/")
        return f"{above[2]}-{name}" if name in GENERIC else name

    @property
    def page(self) -> str:
        """The page of the hub that it belongs to."""
        return "/".join(self.url.split("/")[:5])

    def address(self) -> str:
        """The URL to ask: that of a mirror, where the environment names one."""
        if self.url.startswith(f"{HUB}/") and (endpoint := os.environ.get("HF_ENDPOINT")):
            return endpoint.rstrip("/") + self.url.removeprefix(HUB)
        if mirror := os.environ.get("JAXDG_MIRROR"):
            return mirror.rstrip("/") + self.url.removeprefix("https:/")
        return self.url


def _hub(repository: str, file: str, gated: bool = False) -> Published:
    return Published(f"{HUB}/{repository}/resolve/main/{file}", gated=gated)


def _openai(file: str, sha256: str) -> Published:
    return Published(f"https://openaipublic.azureedge.net/clip/models/{sha256}/{file}", sha256)


def _sam(size: str, digits: str) -> Published:
    return Published(f"{META}/segment_anything/sam_vit_{size}_{digits}.pth", digits)


def _dinov2(size: str, registers: str = "") -> Published:
    name = f"dinov2_vit{size}14"
    return Published(f"{META}/dinov2/{name}/{name}{registers}_pretrain.pth")


def _dinov3(size: str) -> Published:
    repository = f"facebook/dinov3-vit{size}16-pretrain-lvd1689m"
    return _hub(repository, "model.safetensors", gated=True)


def _mmselfsup(name: str, date: str, digits: str) -> Published:
    folder = f"https://download.openmmlab.com/mmselfsup/1.x/mocov3/{name}"
    return Published(f"{folder}/{name}-224_{date}-{digits}.pth", digits)


_EVA_CLIP = "QuanSun/EVA-CLIP"
_EVA02 = "Yuxin-CV/EVA-02"
_SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
_DATACOMP = "laion/CLIP-ViT-{}-DataComp.XL-s13B-b90K"

# Encoders and heads by name; a text tower is in the file of its encoder.
FILES: dict[str, Published] = {
    "augreg_ti16": _hub("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", "model.safetensors"),
    "augreg_b16": Published(
        f"{GOOGLE}/vit_models/augreg/B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0.npz"
    ),
    "augreg_l16": Published(
        f"{GOOGLE}/vit_models/augreg/L_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1.npz"
    ),
    "eva02_clip_l14": _hub(_EVA_CLIP, "EVA02_CLIP_L_psz14_s4B.pt"),
    "eva02_clip_l14_336": _hub(_EVA_CLIP, "EVA02_CLIP_L_336_psz14_s6B.pt"),
    "eva02_clip_b16": _hub(_EVA_CLIP, "EVA02_CLIP_B_psz16_s8B.pt"),
    "eva02_clip_l14_vltseg_repro": _hub(_EVA_CLIP, "EVA02_CLIP_L_psz14_s4B.pt"),
    "eva02_ti14": _hub(_EVA02, "eva02/pt/eva02_Ti_pt_in21k_p14.pt"),
    "eva02_s14": _hub(_EVA02, "eva02/pt/eva02_S_pt_in21k_p14.pt"),
    "eva02_l14": _hub(_EVA02, "eva02/pt/eva02_L_pt_m38m_p14.pt"),
    "clip_l14": _openai(
        "ViT-L-14.pt", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"
    ),
    "clip_b16": _openai(
        "ViT-B-16.pt", "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"
    ),
    "clip_rn50": _openai(
        "RN50.pt", "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762"
    ),
    "clip_rn101": _openai(
        "RN101.pt", "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599"
    ),
    "clip_l14_gelu": _hub(_DATACOMP.format("L-14"), "open_clip_pytorch_model.bin"),
    "clip_b16_gelu": _hub(_DATACOMP.format("B-16"), "open_clip_pytorch_model.bin"),
    "sam_b16": _sam("b", "01ec64"),
    "sam_l16": _sam("l", "0b3195"),
    "sam_h16": _sam("h", "4b8939"),
    "mocov3_b16": Published(f"{META}/moco-v3/vit-b-300ep/vit-b-300ep.pth.tar"),
    "mocov3_l16": _mmselfsup(
        "mocov3_vit-large-p16_64xb64-amp-coslr-300e_in1k", "20220829", "9b88a442"
    ),
    "deit3_b16": Published(f"{META}/deit/deit_3_base_224_21k.pth"),
    "deit3_l16": Published(f"{META}/deit/deit_3_large_224_21k.pth"),
    "dinov2_s14": _dinov2("s"),
    "dinov2_b14": _dinov2("b"),
    "dinov2_l14": _dinov2("l"),
    "dinov2_s14_reg": _dinov2("s", "_reg4"),
    "dinov2_b14_reg": _dinov2("b", "_reg4"),
    "dinov2_l14_reg": _dinov2("l", "_reg4"),
    "dinov3_b16": _dinov3("b"),
    "dinov3_l16": _dinov3("l"),
    "siglip_b16": Published(f"{GOOGLE}/big_vision/siglip/webli_en_b16_224_63724782.npz"),
    "siglip_l16": Published(f"{GOOGLE}/big_vision/siglip/webli_en_l16_256_60552751.npz"),
    "siglip2_l16": Published(f"{GOOGLE}/big_vision/siglip2/siglip2_l16_512.npz"),
    "mit_b0": _hub("nvidia/mit-b0", "pytorch_model.bin"),
    "mit_b1": _hub("nvidia/mit-b1", "pytorch_model.bin"),
    "mit_b2": _hub("nvidia/mit-b2", "pytorch_model.bin"),
    "mit_b3": _hub("nvidia/mit-b3", "pytorch_model.bin"),
    "mit_b4": _hub("nvidia/mit-b4", "pytorch_model.bin"),
    "mit_b5": _hub("nvidia/mit-b5", "pytorch_model.bin"),
    "sd15": _hub(_SD15, "v1-5-pruned-emaonly.safetensors"),
    "sd15_vpd": _hub(_SD15, "v1-5-pruned-emaonly.safetensors"),
    "sd21": _hub("stabilityai/stable-diffusion-2-1", "v2-1_768-ema-pruned.safetensors", gated=True),
    "faster_rcnn": Published(
        "https://download.pytorch.org/models/fasterrcnn_resnet50_fpn_coco-258fb6c6.pth", "258fb6c6"
    ),
}


def of(name: str) -> Published:
    """The published file of an encoder, a text tower or a head.

    Raises:
        ValueError: an unknown name, or no single file has it; the message says where it is.
    """
    found = FILES.get(name.removesuffix("_text") if name in TEXT_TOWERS else name)
    if found is not None:
        return found
    listed = {row[0]: row[3] for row in models.listed()}
    if name in models.WHOLE or name in models.ADAPTED or name in listed:
        raise ValueError(
            f"{name} is not fetched by name: {listed[name]}; download it, then jaxdg convert"
        )
    models.layouts(name)  # says what is wrong with the name
    raise ValueError(f"{name} has no published file")


def licence(name: str) -> str:
    """The licence of the file of a model that has one."""
    if name in models.HEADS:
        return models.HEADS[name].LISTED[1]
    return entry(name.removesuffix("_text") if name in TEXT_TOWERS else name).licence
