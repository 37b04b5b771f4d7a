"""Makes tests/golden/clip_tokens.npz and clip_text.npz: open_clip's token ids and embeddings.

Run by hand where torch, open_clip and timm are installed:

    python tests/oracles/golden_clip_text.py

The first file holds 1 000 texts with their token ids. The second holds, of three small models, the
embeddings of class names, and the scores that MaskCLIP gives every patch; their weights are drawn
from the tensors' names (the tests draw the same).

With a name of `jaxdg.backbones.TEXT_TOWERS`, such as `python tests/oracles/golden_clip_text.py
clip_l14_text`, compares a model of full size with ours once and prints the differences;
benchmarks/PARITY.md records them.
"""

# ruff: noqa: RUF001  signs that look alike are what the tokenizer must tell apart

from collections.abc import Sequence
import json
from pathlib import Path
import resource
import sys
import tempfile
import time
from typing import Any
import zlib

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # pyright: ignore[reportMissingImports]

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.oracles import stand_ins  # noqa: F401  before what follows

# isort: split

import open_clip  # pyright: ignore[reportMissingImports]
from open_clip.tokenizer import SimpleTokenizer  # pyright: ignore[reportMissingImports]
from open_clip.transformer import TextTransformer  # pyright: ignore[reportMissingImports]
from timm.models.eva import Eva  # pyright: ignore[reportMissingImports]

from jaxdg.data.labels import CITYSCAPES
from tests.oracles.golden_clip import bicubic as clip_bicubic
from tests.oracles.golden_clip import wave
from tests.oracles.golden_eva02 import bicubic as eva_bicubic

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
TEMPLATE = "a photo of a {}."
TEMPLATES = (TEMPLATE, "a bad photo of the {}.", "there is a {} in the scene.")
SIZES = ((20, 20), (16, 32))  # pixels, as trained and not square; of the ResNet eight times these
PHRASES = (
    *CITYSCAPES.names,
    *(TEMPLATE.format(name) for name in CITYSCAPES.names),
    "",
    "   ",
    "I'll say it's what they've done, you're right, he'd go, I'm in, don't",
    "I'LL DON'T THEY'RE O'CLOCK 'S 'tis rock 'n' roll l'été d’été “quoted” ‘single’",
    "Fish &amp; chips &lt;b&gt; &amp;lt;i&amp;gt; &eacute; &#233; &#x1F600; &nbsp; &notaname; &",
    "schÃ¶n âœ” FranÃ§ois â€œquotedâ€\x9d Ã©tÃ© l’Ã©tÃ© naÃ¯ve",
    "Straße GROẞ İstanbul ıI ﬁnal ﬀ ŉ ſ 'ſ Ǆ ὈΔΥΣΣΕΎΣ σς",
    "Ｆｕｌｌ ｗｉｄｔｈ １２３ ｱｲｳ 　ideographic　space",
    "½ ² ³ ⁴ Ⅻ ⅷ ① ㊿ ٣ ३ ๓ 〇 零 一二三 𝟘𝟙 𐒠",
    "日本語のテキスト 中文字符 한국어 텍스트 繁體中文",
    "العربية مُشَكَّلَة עִבְרִית فارسی ‏ ‎",
    "e\u0301 é a\u030a n\u0303 \u0301 q\u0307\u0323 Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢",
    "👍 👍🏽 👨‍👩‍👧‍👦 🇨🇭 ☺️ ☺ ❤️ 1️⃣ 🏳️‍🌈",
    "tab\tnew\nline\r\nreturn\x0bvertical\x0cform\x85next\u2028line\u2029paragraph\xa0hard\u200bzero\ufeffbom",
    "\x00null \x07bell \x1b[31mred\x1b[0m \x1c\x1d\x1e\x1f \x7f \x80 \x9f",
    "<start_of_text> in <END_OF_TEXT> text <|startoftext|> <|endoftext|> <start_of_text",
    "a_b-c.d,e;f:g!h?i/j\\k|l@m#n$o%p^q&r*s(t)u[v]w{x}y~z`0+1=2",
    "1234567890 3.14159 1,000,000 10% $5 €20 ½cup 2nd 3x4",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis " * 8,
    "supercalifragilisticexpialidocious" * 12,
    "word " * 100,
    "lone \ud800 surrogate \udc00 pair \ud83d\ude00",
    "Привет мир ΚΑΛΗΜΕΡΑ ქართული հայերեն ไทย हिन्दी தமிழ் ᓄᓇᕗᑦ ᏣᎳᎩ ⵣ",
    "∑∏∫√∞≠≤≥ ←↑→↓ ■□▲△ ♠♥♦♣ ☃ ™ © ® ° § ¶",
)
# Where random signs are drawn from: first and last of ranges that had no gap or were filled in
# Unicode 14, which all libraries know.
RANGES = (
    (0x20, 0x7E), (0x61, 0x7A), (0x30, 0x39), (0xA0, 0xFF), (0x100, 0x17F), (0x1E00, 0x1EFF),
    (0x391, 0x3A1), (0x3B1, 0x3C9), (0x410, 0x44F), (0x5D0, 0x5EA), (0x621, 0x63A), (0x660, 0x669),
    (0x905, 0x939), (0x966, 0x96F), (0xE01, 0xE3A), (0x300, 0x36F), (0x2010, 0x2027),
    (0x2030, 0x205E), (0x2070, 0x2071), (0x2080, 0x208E), (0x2150, 0x2188), (0x2190, 0x21FF),
    (0x2460, 0x24FF), (0x2600, 0x26FF), (0x3041, 0x3096), (0x30A1, 0x30FA), (0x4E00, 0x9FFC),
    (0xAC00, 0xD7A3), (0xFF01, 0xFF5E), (0x1D400, 0x1D454), (0x1D7CE, 0x1D7FF), (0x1F300, 0x1F5FF),
    (0x1F600, 0x1F64F), (0x1F680, 0x1F6C5),
)  # fmt: skip
PIECES = (
    "'s", "'T", "'ll", "&amp;", "&#39;", "&lt;", " a photo of ", "  ", "Ã©", "â€™", ", ", "road",
    "Traffic Light", "ing", "\u200d", "\ufe0f",
)  # fmt: skip


def texts(count: int) -> list[str]:
    """The phrases above, ImageNet's classes in OpenAI's sentences, then random mixtures of signs
    and pieces; the same at every call.
    """
    rng = np.random.default_rng(0)
    made = list(PHRASES)
    sentences = open_clip.OPENAI_IMAGENET_TEMPLATES
    made += [
        sentences[i % len(sentences)](name)
        for i, name in enumerate(open_clip.IMAGENET_CLASSNAMES[::3])
    ]
    while len(made) < count:
        ranges = [RANGES[i] for i in rng.integers(len(RANGES), size=rng.integers(1, 5))]
        text = ""
        for _ in range(rng.integers(1, 30)):
            first, last = ranges[rng.integers(len(ranges))]
            draw = rng.random()
            text += (
                " "
                if draw < 0.12
                else (
                    PIECES[rng.integers(len(PIECES))]
                    if draw < 0.2
                    else chr(rng.integers(first, last + 1))
                )
            )
        made.append(text)
    return made


def draw(name: str, shape: Sequence[int]) -> np.ndarray:
    """A tensor drawn from its name; makes attention far from uniform. The tests draw the same."""
    if name == "logit_scale":
        return np.asarray(np.log(100.0), np.float32)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    x = rng.standard_normal(shape, np.float32)
    norm = "norm" in name or "ln_" in name or "bn" in name or "downsample.1" in name
    if name.endswith("running_var"):
        return np.exp(0.3 * x)
    if len(shape) == 1 or "embed" in name:
        return x * (0.1 if norm else 0.3) + float(norm and name.endswith("weight"))
    return x * np.float32(1.2 / np.sqrt(np.prod(shape[1:])))


def fill(module: Any, prefix: str) -> dict[str, np.ndarray]:
    """Draws every floating tensor of a module, puts it there, and returns all by their names in a
    file.
    """
    state = module.state_dict()
    drawn = {
        name: draw(prefix + name, tuple(t.shape))
        for name, t in state.items()
        if t.is_floating_point()
    }
    module.load_state_dict(
        {name: torch.from_numpy(np.asarray(drawn.get(name, t))) for name, t in state.items()}
    )
    module.eval()
    return {prefix + name: tensor for name, tensor in drawn.items()}


@torch.inference_mode()
def classes(encode_text: Any, names: Sequence[str], templates: Sequence[str]) -> np.ndarray:
    """Class embeddings [k, e] by open_clip's own classifier builder and tokenizer."""

    class Model:
        def encode_text(self, ids: Any, normalize: bool) -> Any:
            return F.normalize(encode_text(ids), dim=-1) if normalize else encode_text(ids)

    return open_clip.build_zero_shot_classifier(
        Model(), SimpleTokenizer(), names, templates
    ).T.numpy()


def entering(module: Any, block: Any, images: torch.Tensor) -> torch.Tensor:
    """What enters `block` when `module` sees the images."""
    seen: list[torch.Tensor] = []
    handle = block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    module(images)
    handle.remove()
    return seen[0]


def agree(ours: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """The value path, after a check that it is the block itself with a mask by which a token
    attends only to itself.
    """
    torch.testing.assert_close(ours, masked, rtol=1e-4, atol=1e-4)
    return ours


@torch.inference_mode()
def clip_dense(visual: Any, images: torch.Tensor) -> torch.Tensor:
    """MaskCLIP's features [b, h, w, e] of open_clip's transformer, not normalised."""
    *_, block = visual.transformer.resblocks
    x = entering(visual, block, images)
    c = x.shape[-1]
    n = x.shape[1]
    v = F.linear(
        block.ln_1(x), block.attn.in_proj_weight[2 * c :], block.attn.in_proj_bias[2 * c :]
    )
    y = x + block.attn.out_proj(v)
    y = y + block.mlp(block.ln_2(y))
    alone = torch.full((n, n), float("-inf")).fill_diagonal_(0)
    y = agree(y, block(x, attn_mask=alone))
    rows, columns = (side // visual.conv1.stride[0] for side in images.shape[2:])
    return (visual.ln_post(y)[:, 1:] @ visual.proj).unflatten(1, (rows, columns))


@torch.inference_mode()
def eva_dense(trunk: Any, images: torch.Tensor) -> torch.Tensor:
    """MaskCLIP's features [b, h, w, e] of timm's EVA-02, not normalised."""
    *_, block = trunk.blocks
    x = entering(trunk, block, images)
    a = block.attn
    y = x + a.proj(a.norm(a.v_proj(block.norm1(x))))
    y = y + block.mlp(block.norm2(y))
    n = x.shape[1]
    y = agree(
        y,
        block(x, rope=trunk.rope.get_embed(), attn_mask=torch.eye(n, dtype=torch.bool)[None, None]),
    )
    return trunk.head(trunk.norm(y)[:, 1:]).unflatten(1, trunk.patch_embed.grid_size)


@torch.inference_mode()
def resnet_dense(visual: Any, images: torch.Tensor) -> torch.Tensor:
    """MaskCLIP's features [b, h, w, e] of open_clip's ResNet, not normalised."""
    x = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(images))))).permute(
        0, 2, 3, 1
    )
    return visual.attnpool.c_proj(visual.attnpool.v_proj(x))


def scores(dense: torch.Tensor, embeddings: np.ndarray) -> np.ndarray:
    """Cosines times CLIP's temperature, [b, h, w, k]."""
    return 100 * (F.normalize(dense, dim=-1) @ torch.from_numpy(embeddings).T).numpy()


def nchw(images: np.ndarray) -> torch.Tensor:
    """[b, h, w, 3] as torch has it."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def eva_trunk(size: tuple[int, int], embedding: int, **sizes: Any) -> Any:
    """EVA-02 of timm as in EVA-02-CLIP, for images of this size."""
    small: dict[str, Any] = dict(patch_size=4, embed_dim=24, depth=3, num_heads=2)
    family = dict(
        qkv_fused=False,
        mlp_ratio=8 / 3,
        swiglu_mlp=True,
        scale_mlp=True,
        scale_attn_inner=True,
        use_rot_pos_emb=True,
    )
    fixed = dict(ref_feat_shape=(16, 16), global_pool="token", num_classes=embedding)
    options: dict[str, Any] = small | family | fixed | sizes
    return Eva(img_size=size, **options).eval()


def golden_models() -> dict[str, np.ndarray]:
    """Embeddings and scores of the three small models."""
    arrays: dict[str, np.ndarray] = {}

    def note(family: str, encode_text: Any) -> np.ndarray:
        arrays[f"{family}/texts"] = classes(encode_text, CITYSCAPES.names, (TEMPLATE,))
        arrays[f"{family}/averaged"] = classes(encode_text, CITYSCAPES.names[:5], TEMPLATES)
        return arrays[f"{family}/texts"]

    build: Any = open_clip.CLIP
    text: dict[str, Any] = dict(context_length=77, vocab_size=49408, layers=3)
    vision: dict[str, Any] = dict(patch_size=4, width=32, head_width=16, layers=3)
    for size in SIZES:
        model = build(
            48, dict(vision, image_size=size), dict(text, width=64, heads=4), quick_gelu=True
        )
        trained = draw("visual.positional_embedding", (26, 32))
        fill(model, "")
        model.visual.positional_embedding.data = torch.from_numpy(
            clip_bicubic(trained, model.visual.grid_size)
        )
        dense = clip_dense(model.visual, nchw(wave(*size)))
        arrays["clip/{}x{}".format(*size)] = scores(dense, note("clip", model.encode_text))

    tower = TextTransformer(width=48, heads=3, layers=3, output_dim=40)
    fill(tower, "text.")
    embeddings = note("eva02", tower)
    for size in SIZES:
        trunk = eva_trunk(size, 40)
        trained = draw("visual.trunk.pos_embed", (1, 26, 24))
        fill(trunk, "visual.trunk.")
        trunk.pos_embed.data = torch.from_numpy(eva_bicubic(trained, trunk.patch_embed.grid_size))
        arrays["eva02/{}x{}".format(*size)] = scores(
            eva_dense(trunk, nchw(wave(*size))), embeddings
        )

    model = build(
        48,
        dict(image_size=160, layers=(1, 2, 1, 1), width=16),
        dict(text, width=64, heads=4),
        quick_gelu=True,
    )
    fill(model, "")
    embeddings = note("resnet", model.encode_text)
    for h, w in SIZES:
        images = wave(8 * h, 8 * w)
        arrays[f"resnet/{8 * h}x{8 * w}"] = scores(
            resnet_dense(model.visual, nchw(images)), embeddings
        )
    return arrays


def golden_tokens() -> dict[str, np.ndarray]:
    """1 000 texts as JSON, and their ids."""
    made = texts(1000)
    return {
        "texts": np.frombuffer(json.dumps(made).encode(), np.uint8),
        "ids": SimpleTokenizer()(made).numpy().astype(np.uint16),
    }


FULL = {
    "clip_l14_text": "ViT-L-14-quickgelu",
    "clip_b16_text": "ViT-B-16-quickgelu",
    "clip_rn50_text": "RN50-quickgelu",
    "eva02_clip_l14_text": "EVA02-L-14",
    "eva02_clip_b16_text": "EVA02-B-16",
}


def full_size(name: str) -> None:
    """Compares one model of full size, drawn as the small ones are, on 19 class names and a picture
    that is not square.
    """
    from flax import nnx
    import jax
    import jax.numpy as jnp
    from safetensors.numpy import save_file

    from jaxdg import backbones, segmentation, weights
    from jaxdg.conversion import convert as torch_to_flax

    start = time.perf_counter()
    encoder = name.removesuffix("_text")
    size = (224, 336)
    config: Any = open_clip.get_model_config(FULL[name])
    custom = config.pop("custom_text", False)
    model: Any = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config)
    source = fill(model, "")
    images = wave(*size)
    expected = classes(model.encode_text, CITYSCAPES.names, (TEMPLATE,))
    if custom:
        trunk = model.visual.trunk
        trunk.set_input_size(size)
        trunk.pos_embed.data = torch.from_numpy(
            eva_bicubic(source["visual.trunk.pos_embed"], trunk.patch_embed.grid_size)
        )
        dense = eva_dense(trunk, nchw(images))
    elif name == "clip_rn50_text":
        dense = resnet_dense(model.visual, nchw(images))
    else:
        patch = model.visual.patch_size
        grid = size[0] // patch[0], size[1] // patch[1]
        model.visual.positional_embedding.data = torch.from_numpy(
            clip_bicubic(source["visual.positional_embedding"], grid)
        )
        dense = clip_dense(model.visual, nchw(images))
    wanted = scores(dense, expected)
    del model, dense
    with tempfile.TemporaryDirectory() as folder:
        theirs, image, text = (
            Path(folder) / f"{part}.safetensors" for part in ("theirs", "image", "text")
        )
        save_file(source, theirs)
        del source
        print(torch_to_flax.convert(encoder, theirs, image))
        print(torch_to_flax.convert(name, theirs, text))
        theirs.unlink()
        got = backbones.text_embeddings(CITYSCAPES.names, text)
        decoder = segmentation.ClipTextHeadConfig(CITYSCAPES.names)
        ours: Any = nnx.eval_shape(
            lambda: segmentation.Segmenter(
                segmentation.SegmenterConfig(
                    num_classes=19, encoder=encoder, image_size=size, decoder=decoder
                ),
                rngs=nnx.Rngs(0),
            )
        )
        weights.load(ours.backbone, image)
        ours.head.load_text(text)
    graph, state = nnx.split(ours)
    found = np.asarray(
        jax.jit(lambda state, images: nnx.merge(graph, state)(images))(state, jnp.asarray(images))
    )
    print(
        f"texts: max {np.abs(got - expected).max():.1e}; values up to {np.abs(expected).max():.2f};"
        f" classes apart by {np.abs(expected[1:] - expected[:-1]).max():.2f}"
    )
    same = np.mean(found.argmax(-1) == wanted.argmax(-1))
    print(
        f"scores: max {np.abs(found - wanted).max():.1e}; values up to {np.abs(wanted).max():.0f};"
        f" {100 * same:.2f} % of decisions equal"
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{time.perf_counter() - start:.0f} s, {peak:.1f} GB at most, both libraries")


def main() -> None:
    """Writes the two files, or compares the named model."""
    if len(sys.argv) > 1:
        full_size(sys.argv[1])
        return
    for name, arrays in (("clip_tokens", golden_tokens()), ("clip_text", golden_models())):
        path = GOLDEN / f"{name}.npz"
        np.savez_compressed(path, **arrays)  # pyright: ignore[reportArgumentType]
        print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
