"""Gradients in bfloat16 are as near to float32 as PyTorch's autocast on the same weights."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxdg import backbones
from jaxdg.conversion import convert as torch_to_flax

TAPS = (2, 5, 8, 11)
SIZE = (128, 160)


def far(half, single):
    """Relative distances of the gradients in half precision, a number for each parameter."""
    return np.array(
        [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(half, single, strict=True)]
    )


def ours(weights, images, towards, dtype):
    """The encoder's gradients, in the order of `jax.tree.leaves`."""
    encoder = backbones.create(
        "augreg_ti16", image_size=SIZE, taps=TAPS, weights=weights, dtype=dtype
    )

    def loss(encoder):
        features = encoder(jnp.asarray(images))
        return sum(
            jnp.sum(f.astype(jnp.float32) * t) for f, t in zip(features, towards, strict=True)
        )

    return [np.asarray(g, np.float32) for g in jax.tree.leaves(nnx.jit(nnx.grad(loss))(encoder))]


def theirs(tensors, images, towards, autocast):
    """The gradients of a plain PyTorch version of the same encoder."""
    import torch
    from torch.nn import functional

    held = {name: torch.from_numpy(x.copy()).requires_grad_() for name, x in tensors.items()}

    def norm(x, name):
        return functional.layer_norm(x, x.shape[-1:], *both(name), 1e-6)

    def both(name):
        return held[f"{name}.weight"], held[f"{name}.bias"]

    def run():
        x = torch.from_numpy(images).permute(0, 3, 1, 2)
        x = functional.conv2d(x, *both("patch_embed.proj"), stride=16)
        b, c, rows, columns = x.shape
        grid = held["pos_embed"][:, 1:].detach().reshape(1, 14, 14, c).permute(0, 3, 1, 2)
        grid = functional.interpolate(grid, (rows, columns), mode="bicubic", antialias=True)
        x = x.flatten(2).transpose(1, 2) + grid.flatten(2).transpose(1, 2)
        token = (held["cls_token"] + held["pos_embed"][:, :1]).expand(b, -1, -1)
        x = torch.cat([token, x], dim=1)
        total = 0
        for i in range(12):
            at = f"blocks.{i}"
            qkv = functional.linear(norm(x, f"{at}.norm1"), *both(f"{at}.attn.qkv"))
            q, k, v = qkv.view(b, -1, 3, 3, 64).permute(2, 0, 3, 1, 4)
            y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + functional.linear(y, *both(f"{at}.attn.proj"))
            y = functional.gelu(functional.linear(norm(x, f"{at}.norm2"), *both(f"{at}.mlp.fc1")))
            x = x + functional.linear(y, *both(f"{at}.mlp.fc2"))
            if i in TAPS:
                direction = torch.from_numpy(towards[TAPS.index(i)])
                total = total + (x[:, 1:].reshape(b, rows, columns, c).float() * direction).sum()
        return total

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        total = run()
    total.backward()
    return [x.grad.numpy() for x in held.values() if x.grad is not None]


def test_gradients_in_bfloat16_are_as_near_as_autocasts(weights_path, tmp_path):
    """Of the real ViT-Ti on noise: their distances from float32, relative to each parameter's
    gradient, are no larger than PyTorch's.
    """
    pytest.importorskip("torch")
    source = weights_path("vit_tiny_patch16_224.safetensors")
    converted = tmp_path / "ti16.safetensors"
    command = ["--model", "augreg_ti16", "--checkpoint", str(source), "--out", str(converted)]
    assert torch_to_flax.main(command) == 0
    random = np.random.default_rng(0)
    images = random.normal(size=(2, *SIZE, 3)).astype(np.float32)
    shape = (2, SIZE[0] // 16, SIZE[1] // 16, 192)
    towards = [random.normal(size=shape).astype(np.float32) for _ in TAPS]
    got = far(*(ours(converted, images, towards, dtype) for dtype in ("bfloat16", "float32")))
    tensors = {k: v for k, v in load_file(source).items() if not k.startswith(("head", "norm."))}
    want = far(*(theirs(tensors, images, towards, autocast) for autocast in (True, False)))
    print("ours", np.median(got), got.max(), "PyTorch", np.median(want), want.max())
    assert np.median(got) <= 1.1 * np.median(want)
    assert got.max() <= 1.1 * want.max()
