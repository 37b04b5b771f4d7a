"""Makes tests/golden/latent_diffusion_1.npz and _2.npz: outputs of diffusers' UNet and VAE.

Run by hand where torch and diffusers are installed (last with torch 2.14 and diffusers 0.42.1):

    python tests/oracles/golden_latent_diffusion.py

One small random model of each version of Stable Diffusion: 1 has projections that are convolutions
and as many heads at every level, 2 has linear ones and heads of one width. At two image sizes: the
mean of the VAE's latent, every eighth channel of every block's output, all of the four features,
and the maps of the attention to the condition, averaged as in VPD. Also the embedding of the time
and the schedule of the noise. The UNet sees the mean as it is, as in VPD. Weights are not stored:
`drawn` makes each from its published name, here and in the tests.
"""

from pathlib import Path
from typing import Any
import zlib

from diffusers import (  # pyright: ignore[reportMissingImports]
    AutoencoderKL,
    DDPMScheduler,
    UNet2DConditionModel,
)
import numpy as np
import torch  # pyright: ignore[reportMissingImports]

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
SIZES = ((64, 128), (192, 64))
TIME = 7
ROWS = 3
WIDTHS = (32, 64, 96, 128)
VAE_WIDTHS = (32, 64, 64, 32)
HEADS = {1: 4, 2: (1, 2, 3, 4)}
SMALL = ("conv_in.", "proj_in.", "resnets.0.conv2.", "resnets.0.conv_shortcut.")


def wave(height: int, width: int) -> np.ndarray:
    """A smooth picture by formula, [1, h, w, 3] in about -1..1; the tests compute the same."""
    y, x, c = np.ogrid[0:height, 0:width, 0:3]
    return (
        np.sin(0.33 * y + 0.5 * c) * np.cos(0.21 * x - 0.9 * c) + 0.3 * np.sin(0.9 * x + 1.7 * y)
    ).astype(np.float32)[None]


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The random tensor of a published name.

    What enters some norms is small enough (variances near 1e-5) for their epsilons to count.
    """
    numbers = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) > 1:
        numbers *= 1.0 / np.sqrt(np.prod(shape[1:]))
    else:
        numbers = 0.3 * numbers + (name.endswith("weight"))
    return (numbers * (3e-3 if any(part in name for part in SMALL) else 1)).astype(np.float32)


def filled(model: Any) -> list[str]:
    """Fills a model by its published names; returns these and the shapes."""
    state = model.state_dict()
    model.load_state_dict(
        {name: torch.from_numpy(drawn(name, tuple(t.shape))) for name, t in state.items()}
    )
    model.eval()
    return [f"{name} {' '.join(map(str, t.shape))}" for name, t in state.items()]


def unet(version: int, **sizes: Any) -> UNet2DConditionModel:
    """The UNet of a version of Stable Diffusion; its sizes are small unless given."""
    small: dict[str, Any] = dict(
        block_out_channels=WIDTHS, cross_attention_dim=16, attention_head_dim=HEADS[version]
    )
    return UNet2DConditionModel(**{**small, **sizes}, use_linear_projection=version == 2)


def vae(widths: tuple[int, ...] = VAE_WIDTHS) -> AutoencoderKL:
    """The VAE of all versions."""
    return AutoencoderKL(
        block_out_channels=widths,
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )


class Maps:
    """Attention to the condition that keeps its probabilities, the mean over the heads."""

    def __init__(self) -> None:
        self.seen: list[np.ndarray] = []

    def __call__(
        self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, **_: Any
    ) -> Any:
        """Called by diffusers in place of its own computation."""
        q = attn.head_to_batch_dim(attn.to_q(hidden_states))
        k = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
        v = attn.head_to_batch_dim(attn.to_v(encoder_hidden_states))
        probabilities = attn.get_attention_scores(q, k)
        self.seen.append(probabilities.mean(0, keepdim=True).numpy())
        return attn.to_out[0](attn.batch_to_head_dim(torch.bmm(probabilities, v)))


def blocks(model: Any) -> dict[str, Any]:
    """Every block whose output is compared, by name: a pair of a residual block and a transformer
    is one, called after the latter.
    """
    found = {"conv_in": model.conv_in, "mid_block": model.mid_block}
    for kind in ("down", "up"):
        for i, level in enumerate(getattr(model, f"{kind}_blocks")):
            parts = "attentions" if hasattr(level, "attentions") else "resnets"
            for j, block in enumerate(getattr(level, parts)):
                found[f"{kind}_blocks.{i}.{parts}.{j}"] = block
            for sampler in getattr(level, f"{kind}samplers") or ():
                found[f"{kind}_blocks.{i}.{kind}samplers.0"] = sampler
    return found


@torch.inference_mode()
def outputs(
    model: Any, encoder: Any, images: np.ndarray, context: np.ndarray, scale: float = 1.0
) -> tuple[np.ndarray, dict[str, np.ndarray], dict[int, np.ndarray]]:
    """The mean of the latent, the outputs of all blocks, and the maps by their stride."""
    picture = torch.from_numpy(images).permute(0, 3, 1, 2)
    mean = encoder.encode(picture).latent_dist.mean
    kept: dict[str, np.ndarray] = {}
    hooks = []
    for name, block in blocks(model).items():

        def keep(module: Any, inputs: Any, output: Any, name: str = name) -> None:
            tensor = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
            kept[name] = tensor.permute(0, 2, 3, 1).numpy()

        hooks.append(block.register_forward_hook(keep))
    processors = {}
    maps = {}
    for name, processor in model.attn_processors.items():
        is_read = "attn2" in name and "mid_block" not in name
        processors[name] = maps[name] = Maps() if is_read else processor
    model.set_attn_processor(processors)
    text = torch.from_numpy(context)[None].expand(len(images), -1, -1)
    model(mean * scale, TIME, encoder_hidden_states=text)
    for hook in hooks:
        hook.remove()
    h, w = images.shape[1:3]
    averaged = {}
    for stride in (16, 32):
        shape = (h // stride, w // stride)
        same = [
            m.seen[0]
            for m in maps.values()
            if isinstance(m, Maps) and m.seen[0].shape[1] == np.prod(shape)
        ]
        assert len(same) == 5, len(same)
        averaged[stride] = np.mean(same, axis=0).reshape(1, *shape, -1)
    return mean.permute(0, 2, 3, 1).numpy(), kept, averaged


FEATURES = (
    "up_blocks.3.attentions.2",
    "up_blocks.2.attentions.1",
    "up_blocks.1.attentions.1",
    "up_blocks.0.resnets.1",
)


def main() -> None:
    """Writes the files."""
    scheduler: Any = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000
    )
    context = drawn("context", (ROWS, 16))
    encoder = vae()
    vae_names = filled(encoder)
    for version in (1, 2):
        model = unet(version)
        names = [f"unet.{name}" for name in filled(model)]
        names += [f"vae.{n}" for n in vae_names if n.startswith(("encoder", "quant_conv"))]
        arrays: dict[str, np.ndarray] = {
            "names": np.asarray(names),
            "noise_left": scheduler.alphas_cumprod.numpy(),
        }
        with torch.inference_mode():
            steps = model.time_proj(torch.tensor([TIME]))
            arrays["time"] = model.time_embedding(steps).numpy()
        for h, w in SIZES:
            mean, kept, maps = outputs(model, encoder, wave(h, w), context)
            at = f"{h}x{w}"
            arrays |= {f"{at}/mean": mean}
            arrays |= {f"{at}/maps{stride}": m for stride, m in maps.items()}
            arrays |= {
                f"{at}/{name}": x if name in FEATURES else x[..., ::8] for name, x in kept.items()
            }
            print(version, at, {name: f"{x.std():.3f}" for name, x in kept.items()})
            print({stride: f"{m.std():.3f}" for stride, m in maps.items()}, f"{mean.std():.2f}")
        tell_epsilons(model, encoder, context, arrays)
        path = GOLDEN / f"latent_diffusion_{version}.npz"
        np.savez_compressed(path, **arrays)  # pyright: ignore[reportArgumentType]
        print(f"{path.name}: {path.stat().st_size} bytes")


def tell_epsilons(model: Any, encoder: Any, context: np.ndarray, arrays: Any) -> None:
    """Prints what other epsilons would change: the comparison must see them."""
    at = "{}x{}".format(*SIZES[0])
    for kind, part, epsilon in (
        ("GroupNorm", encoder, 1e-5),
        ("GroupNorm", model, 1e-6),
        ("GroupNorm", model, 1e-5),
        ("LayerNorm", model, 1e-6),
    ):
        norms = [m for m in part.modules() if type(m).__name__ == kind and m.eps != epsilon]
        before = [m.eps for m in norms]
        for m in norms:
            m.eps = epsilon
        mean, kept, _ = outputs(model, encoder, wave(*SIZES[0]), context)
        change = np.abs(kept[FEATURES[0]] - arrays[f"{at}/{FEATURES[0]}"]).max()
        moved = np.abs(mean - arrays[f"{at}/mean"]).max()
        print(f"{len(norms)} {kind} with {epsilon}: features {change:.3f}, mean {moved:.3f}")
        for m, eps in zip(norms, before, strict=True):
            m.eps = eps


if __name__ == "__main__":
    main()
