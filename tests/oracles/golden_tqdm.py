"""Makes tests/golden/tqdm.npz: outputs, losses and gradients of tqdm's own modules.

Run by hand where torch and transformers are installed, on a checkout of ByeongHyunPak/tqdm (MIT;
nothing of it is here):

    python tests/oracles/golden_tqdm.py TQDM_CHECKOUT

The authors' text tower, context decoder, head, pixel decoder, losses and segmentor run at reduced
size with the numbers of `drawn`, on drawn features. What they import of mmcv 1.x, which cannot be
installed beside a new torch, is stood in for by the modules here; the core of deformable attention
is transformers'. Points of the losses are those of a fixed sequence. Everything is computed in
float64 and stored in float32: the queries, the pixel decoder's maps, all predictions, all loss
terms, and gradients of their sum.

Made with commit 75168af, torch 2.14.1 and transformers 5.24.0 on CPU.
"""

import argparse
import importlib.util
from pathlib import Path
import sys
import types
from typing import Any, ClassVar
from unittest import mock
import zlib

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # pyright: ignore[reportMissingImports]

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.oracles import stand_ins  # noqa: F401  before what follows

# isort: split

from transformers.models.mask2former.modeling_mask2former import (  # pyright: ignore[reportMissingImports]
    multi_scale_deformable_attention,
)

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden" / "tqdm.npz"
IMAGES = 2
CLASSES = 3
CONTEXTS = 2
IDS = ((62, 5, 63, 0), (62, 7, 9, 63), (62, 11, 63, 0))  # of one, two and one word
VOCABULARY = 64
TEXT = dict(width=16, heads=2, layers=2, output_dim=12)
VISUAL = 8  # channels of the image tower
EMBEDDING = 12
CONTEXT = dict(transformer_width=8, transformer_heads=2, transformer_layers=2)
HIDDEN = 32
HEADS = 4
FFN = 16
CHANNELS = (4, 6, 8, 8)
MAPS = ((8, 10), (5, 6), (4, 4), (3, 3))
GRID = (4, 4)
LABEL = (24, 30)
POINTS = 64
# Parts of the names of what is drawn with deviation 1.
WHOLE = (
    "query_embed",
    "level_e",
    "text_pos_embed",
    "l_embedding",
    "n_embedding",
    "contexts",
    "input",
)
# Small tensors of every part, whose gradients are stored.
OBSERVED = (
    "contexts",
    "gamma",
    "backbone.norm.weight",
    "backbone.head.bias",
    "context_decoder.memory_proj.1.bias",
    "context_decoder.text_proj.1.weight",
    "context_decoder.decoder.0.self_attn.q_proj.weight",
    "context_decoder.decoder.1.cross_attn.v_proj.weight",
    "context_decoder.decoder.1.mlp.0.bias",
    "context_decoder.out_proj.0.weight",
    "decode_head.query_embed.weight",
    "decode_head.level_embed.weight",
    "decode_head.text_proj.0.weight",
    "decode_head.text_proj.2.bias",
    "decode_head.cls_embed.weight",
    "decode_head.mask_embed.2.bias",
    "decode_head.pixel_decoder.text_proj.weight",
    "decode_head.pixel_decoder.text_pos_embed.weight",
    "decode_head.pixel_decoder.level_encoding.weight",
    "decode_head.pixel_decoder.encoder.post_norm.weight",
    "decode_head.pixel_decoder.encoder.layers.0.attentions.0.sampling_offsets.bias",
    "decode_head.pixel_decoder.encoder.layers.0.attentions.1.attn.in_proj_bias",
    "decode_head.pixel_decoder.encoder.layers.1.attentions.1.attn.out_proj.bias",
    "decode_head.pixel_decoder.encoder.layers.1.norms.1.weight",
    "decode_head.pixel_decoder.encoder.layers.1.norms.2.bias",
    "decode_head.pixel_decoder.encoder.layers.0.ffns.0.layers.0.0.bias",
    "decode_head.pixel_decoder.lateral_convs.0.conv.weight",
    "decode_head.transformer_decoder.layers.0.attentions.0.attn.in_proj_bias",
    "decode_head.transformer_decoder.layers.2.attentions.1.attn.out_proj.bias",
    "decode_head.transformer_decoder.post_norm.weight",
)


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 numbers that depend on the name and the shape alone, of the size a weight has."""
    numbers = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
    is_norm = any(part in name for part in ("norm", "ln_", ".gn.")) or name.endswith(
        ("memory_proj.0.weight", "memory_proj.2.weight", "text_proj.0.weight", "out_proj.0.weight")
    )
    if len(shape) == 1:
        return np.float32(0.3) * numbers + np.float32(is_norm and name.endswith("weight"))
    if any(part in name for part in WHOLE):
        return numbers
    numbers = numbers - numbers.mean(tuple(range(1, len(shape))), keepdims=True)
    size = 0.3 if "mask_embed" in name else 1.5
    return numbers * np.float32(size / np.sqrt(np.prod(shape[1:])))


def spread(*shape: Any, **_: Any) -> torch.Tensor:
    """Stands in for `torch.rand`: evenly spread points [.., p, 2], by the test's own formula."""
    shape = shape[0] if len(shape) == 1 else shape
    steps = np.outer(np.arange(1, shape[-2] + 1), [0.7548776662466927, 0.5698402909980532])
    points = torch.tensor((0.5 + steps) % 1, dtype=torch.float32).double()
    return points.expand(shape).contiguous()


def draw_labels() -> np.ndarray:
    """Two label maps: all classes with some unlabelled pixels, and two classes."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, CLASSES, (IMAGES, 4, 5)).astype(np.uint8).repeat(6, 1).repeat(6, 2)
    label[0, :6, :18] = np.arange(CLASSES).repeat(6)
    label[0, :, -4:] = 255
    label[1][label[1] == 1] = 255
    return label


# What the authors' files import of mmcv


class Dot(dict):
    """A dict whose entries are attributes too, as mmcv's ConfigDict."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]

    @classmethod
    def of(cls, tree: Any) -> Any:
        """Every dict in a tree."""
        if isinstance(tree, dict):
            return cls({key: cls.of(value) for key, value in tree.items()})
        return [cls.of(value) for value in tree] if isinstance(tree, list) else tree


class Base(nn.Module):
    """mmcv's BaseModule: a module that is told how it starts, which nobody asks here."""

    def __init__(self, init_cfg: Any = None):
        super().__init__()


class ConvModule(nn.Module):
    """Convolution, GroupNorm and perhaps ReLU."""

    def __init__(self, inputs, outputs, kernel_size, norm_cfg, act_cfg, bias, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel_size, stride, padding, bias=bias)
        self.gn = nn.GroupNorm(norm_cfg["num_groups"], outputs)
        self.act = nn.Identity() if act_cfg is None else nn.ReLU()

    def forward(self, x):
        """Of the features."""
        return self.act(self.gn(self.conv(x)))


class MultiheadAttention(nn.Module):
    """Tokens [n, b, c], positions added to queries and keys, the residual to the result."""

    def __init__(self, embed_dims, num_heads):
        super().__init__()
        self.attn = nn.MultiheadAttention(embed_dims, num_heads)

    def forward(self, query, key, value, query_pos, key_pos, attn_mask=None, **_):
        """Of queries, keys and values."""
        q, k = query + query_pos, key + key_pos
        return query + self.attn(q, k, value, attn_mask=attn_mask)[0]


class DeformableAttention(nn.Module):
    """Deformable attention [n, b, c] with a residual."""

    def __init__(self, embed_dims, num_heads, num_levels, num_points):
        super().__init__()
        self.shape = (num_heads, num_levels, num_points)
        points = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(embed_dims, 2 * points)
        self.attention_weights = nn.Linear(embed_dims, points)
        self.value_proj = nn.Linear(embed_dims, embed_dims)
        self.output_proj = nn.Linear(embed_dims, embed_dims)

    def forward(self, query, key, value, query_pos, spatial_shapes, reference_points, **_):
        """Of the tokens; `key` and `value` are the same."""
        heads, levels, points = self.shape
        x = (query + query_pos).permute(1, 0, 2)
        b, n, _ = x.shape
        values = self.value_proj(query.permute(1, 0, 2)).view(b, n, heads, -1)
        offsets = self.sampling_offsets(x).view(b, n, heads, levels, points, 2)
        weights = self.attention_weights(x).view(b, n, heads, -1).softmax(-1)
        size = spatial_shapes.flip(-1)[None, None, None, :, None].to(x.dtype)
        where = reference_points[:, :, None, :, None] + offsets / size
        shapes = [tuple(shape) for shape in spatial_shapes.tolist()]
        read = multi_scale_deformable_attention(
            values, shapes, where, weights.view(b, n, heads, levels, points)
        )
        return query + self.output_proj(read).permute(1, 0, 2)


class FeedForward(nn.Module):
    """Two linear layers with a residual, by mmcv's names."""

    def __init__(self, width, inner):
        super().__init__()
        first = nn.Sequential(nn.Linear(width, inner), nn.ReLU())
        self.layers = nn.Sequential(first, nn.Linear(inner, width))

    def forward(self, x):
        """Of the tokens."""
        return x + self.layers(x)


class Layer(nn.Module):
    """mmcv's BaseTransformerLayer, with norms after."""

    def __init__(self, *, attn_cfgs: Any, ffn_cfgs: Any, operation_order: Any, **_: Any):
        super().__init__()
        kinds = {
            "MultiScaleDeformableAttention": DeformableAttention,
            "MultiheadAttention": MultiheadAttention,
        }
        count = sum(op.endswith("attn") for op in operation_order)
        cfgs = attn_cfgs if isinstance(attn_cfgs, list) else [attn_cfgs] * count
        sizes = ("embed_dims", "num_heads", "num_levels", "num_points")
        self.attentions = nn.ModuleList(
            [kinds[c["type"]](**{key: c[key] for key in sizes if key in c}) for c in cfgs]
        )
        width = cfgs[0]["embed_dims"]
        self.ffns = nn.ModuleList([FeedForward(width, ffn_cfgs["feedforward_channels"])])
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(3)])
        self.order = operation_order

    def forward(self, query, key, value, query_pos, key_pos, attn_masks=None, **more):
        """The operations in their order."""
        attentions = iter(zip(self.attentions, attn_masks or [None, None], strict=True))
        norms = iter(self.norms)
        for op in self.order:
            if op == "norm":
                query = next(norms)(query)
            elif op == "ffn":
                query = self.ffns[0](query)
            else:
                attend, mask = next(attentions)
                own = op == "self_attn"
                k, v = (query, query) if own else (key, value)
                at = query_pos if own else key_pos
                query = attend(query, k, v, query_pos=query_pos, key_pos=at, attn_mask=mask, **more)
        return query


class Decoder(nn.Module):
    """DetrTransformerDecoder: every layer's output, normalised."""

    def __init__(self, transformerlayers: Any, num_layers: int, **_: Any):
        super().__init__()
        layers: Any = [Layer(**transformerlayers) for _ in range(num_layers)]
        self.layers = nn.ModuleList(layers)
        self.embed_dims = layers[0].norms[0].normalized_shape[0]
        self.post_norm = nn.LayerNorm(self.embed_dims)

    def forward(self, query, **more):
        """Of the tokens."""
        outputs = []
        for layer in self.layers:
            query = layer(query, **more)
            outputs.append(self.post_norm(query))
        return torch.stack(outputs)


def point_sample(maps, points):
    """mmcv's: bilinear, zeros outside; points are (x, y) in 0..1."""
    grid = 2 * points.unsqueeze(2).to(maps.dtype) - 1
    return F.grid_sample(maps, grid, align_corners=False).squeeze(3)


class Registry:
    """Registers nothing, and builds by the name of a class among those given."""

    classes: ClassVar[dict[str, Any]] = {}

    @classmethod
    def register_module(cls, **_):
        """A decorator that notes the class."""

        def note(module):
            cls.classes[module.__name__] = module
            return module

        return note

    @classmethod
    def build(cls, config, **_):
        """The class that a config names."""
        options = {key: value for key, value in config.items() if key != "type"}
        return cls.classes[config["type"]](**options)


def package(name: str, **contents: Any) -> None:
    """Declares a package with these contents; its parents too."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        known = sys.modules.setdefault(".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
        known.__path__ = []
    vars(sys.modules[name]).update(contents)


def load(checkout: Path, name: str) -> Any:
    """One of the authors' files, as the module that it is in their package."""
    path = checkout / (name.replace(".", "/") + ".py")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def declare() -> None:
    """All that the authors' files import of mmcv and of their copy of mmsegmentation."""

    def unchanged(*_, **__):
        return lambda function: function

    def several(function, *arrays):
        return tuple(map(list, zip(*map(function, *arrays), strict=True)))

    def sample(assigned, *_):
        positive = torch.nonzero(assigned.gt_inds > 0).squeeze(-1)
        return types.SimpleNamespace(
            pos_inds=positive,
            neg_inds=torch.nonzero(assigned.gt_inds == 0).squeeze(-1),
            pos_assigned_gt_inds=assigned.gt_inds[positive] - 1,
        )

    names = ("HEADS", "LOSSES", "BACKBONES", "SEGMENTORS", "MASK_ASSIGNERS")
    registries = dict.fromkeys(names, Registry)
    package(
        "mmcv.cnn",
        PLUGIN_LAYERS=Registry,
        Conv2d=nn.Conv2d,
        ConvModule=ConvModule,
        build_plugin_layer=lambda config: ("", Registry.build(config)),
        **dict.fromkeys(("caffe2_xavier_init", "normal_init", "xavier_init")),
    )
    package(
        "mmcv.cnn.bricks.transformer",
        POSITIONAL_ENCODING=Registry,
        build_positional_encoding=Registry.build,
        build_transformer_layer_sequence=lambda config: Decoder(**config),
    )
    package("mmcv.ops", point_sample=point_sample)
    package("mmcv.runner", BaseModule=Base, ModuleList=nn.ModuleList, force_fp32=unchanged)
    package(
        "mmseg.core",
        build_sampler=lambda *_, **__: types.SimpleNamespace(sample=sample),
        multi_apply=several,
        reduce_mean=lambda x: x,
        add_prefix=lambda losses, at: {f"{at}.{key}": value for key, value in losses.items()},
    )
    package("mmseg.core.anchor.builder", PRIOR_GENERATORS=Registry)
    package("mmseg.ops", resize=F.interpolate)
    package("mmseg.models", builder=types.SimpleNamespace())
    package(
        "mmseg.models.builder",
        build_loss=Registry.build,
        build_assigner=Registry.build,
        build_match_cost=Registry.build,
        **registries,
    )
    package("mmseg.models.backbones", ResNet=None)
    package("mmseg.models.segmentors.base", BaseSegmentor=Base)
    package("mmseg.models.utils")
    package("mmseg.models.utils.transformer", MultiScaleDeformableAttention=DeformableAttention)
    package("mmseg.models.losses")
    package("mmseg.models.plugins")
    package("models.backbones.eva_clip", get_backbone=None)
    package("models.backbones.utils", tokenize=None)
    package("models.backbones.clip")
    package("models.segmentors")

    class Head(Base):
        """mmsegmentation's BaseDecodeHead, as far as the head goes."""

        def __init__(self, num_classes=None, init_cfg=None, **_):
            super().__init__()
            self.num_classes = num_classes

    package("mmseg.models.decode_heads.decode_head", BaseDecodeHead=Head)


def head_config() -> Any:
    """The authors' configuration at reduced size."""
    attention = dict(type="MultiheadAttention", embed_dims=HIDDEN, num_heads=HEADS)
    deformable = dict(attention, type="MultiScaleDeformableAttention", num_levels=3, num_points=4)
    sine = dict(type="SinePositionalEncoding", num_feats=HIDDEN // 2, normalize=True)
    ffn = dict(feedforward_channels=FFN)
    encoder = dict(
        num_layers=2,
        transformerlayers=dict(
            attn_cfgs=[deformable, attention],
            ffn_cfgs=ffn,
            operation_order=("self_attn", "norm", "cross_attn", "norm", "ffn", "norm"),
        ),
    )
    decoder = dict(
        num_layers=3,
        transformerlayers=dict(
            attn_cfgs=attention,
            ffn_cfgs=ffn,
            operation_order=("cross_attn", "norm", "self_attn", "norm", "ffn", "norm"),
        ),
    )
    cross_entropy = dict(type="CrossEntropyLoss", reduction="mean")
    return Dot.of(
        dict(
            in_channels=list(CHANNELS),
            feat_channels=HIDDEN,
            out_channels=HIDDEN,
            num_things_classes=1,
            num_stuff_classes=CLASSES - 1,
            num_queries=CLASSES,
            pixel_decoder=dict(
                type="tqdmMSDeformAttnPixelDecoder",
                num_text_embeds=CLASSES,
                encoder=encoder,
                positional_encoding=sine,
            ),
            transformer_decoder=decoder,
            positional_encoding=sine,
            loss_cls=dict(cross_entropy, loss_weight=2.0, class_weight=[1.0] * CLASSES + [0.1]),
            loss_mask=dict(cross_entropy, use_sigmoid=True, loss_weight=5.0),
            loss_dice=dict(type="DiceLoss", naive_dice=True, eps=1.0, loss_weight=5.0),
            train_cfg=dict(
                num_points=POINTS,
                assigner=dict(type="IdentityAssigner", num_cls=CLASSES),
                sampler=dict(type="MaskPseudoSampler"),
            ),
            text_proj=dict(text_in_dim=EMBEDDING, text_out_dim=HIDDEN),
        )
    )


class Model(nn.Module):
    """The authors' modules by the names they have in their segmentor."""

    def __init__(self, checkout: Path):
        super().__init__()
        declare()
        for name in ("rope", "utils"):
            load(checkout, f"models.backbones.eva_clip.{name}")
        tower = load(checkout, "models.backbones.eva_clip.transformer")
        clip = load(checkout, "models.backbones.clip.models")
        for name in ("losses.utils", "losses.cross_entropy_loss", "losses.dice_loss"):
            load(checkout, f"mmseg.models.{name}")
        load(checkout, "mmseg.models.utils.positional_encoding")
        sampling = load(checkout, "mmseg.models.utils.point_sample")
        vars(sys.modules["mmseg.models.utils"]).update(vars(sampling))
        load(checkout, "mmseg.models.utils.assigner")
        points = load(checkout, "mmseg.core.anchor.point_generator")
        package("mmseg.core.anchor", MlvlPointGenerator=points.MlvlPointGenerator)
        load(checkout, "mmseg.models.plugins.tqdm_msdeformattn_pixel_decoder")
        head = load(checkout, "mmseg.models.decode_heads.tqdm_head")
        self.segmentor = load(checkout, "models.segmentors.tqdm_eva_clip").tqdm_EVA_CLIP
        length = CONTEXTS + len(IDS[0])
        self.text_encoder = tower.TextTransformer(
            context_length=length, vocab_size=VOCABULARY, **TEXT
        )
        self.context_decoder = clip.ContextDecoder(visual_dim=EMBEDDING, **CONTEXT)
        self.decode_head = head.tqdmHead(**head_config())
        self.backbone = nn.Module()
        self.backbone.norm = nn.LayerNorm(VISUAL, eps=1e-6)
        self.backbone.head = nn.Linear(VISUAL, EMBEDDING)
        self.contexts = nn.Parameter(torch.zeros(1, CONTEXTS, TEXT["width"]))
        self.gamma = nn.Parameter(torch.zeros(EMBEDDING))
        self.texts = torch.tensor(IDS)
        self.tau = 0.07
        self.neck = self.train_cfg = None
        self.textual_reg = self.visual_reg = True
        self.reg_I = torch.arange(CLASSES)

    def after_extract_feat(self, x):
        """The segmentor's own."""
        return self.segmentor.after_extract_feat(self, x)


def identity_loss(scores, _, label, __):
    """What IdentityHead makes of the scores: BaseDecodeHead's loss with nothing before it."""
    scores = F.interpolate(scores, label.shape[2:], mode="bilinear", align_corners=False)
    criterion = Registry.classes["CrossEntropyLoss"]()
    return {"loss": criterion(scores, label[:, 0], ignore_index=255)}


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path)
    model: Any = Model(parser.parse_args().checkout.resolve()).eval()
    state = {
        name: torch.from_numpy(drawn(name, tuple(tensor.shape)))
        for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(state)
    model.double()

    def given(name, *shape):
        return torch.from_numpy(drawn(f"input {name}", shape)).double().requires_grad_()

    levels = [given(f"level {i}", IMAGES, c, *MAPS[i]) for i, c in enumerate(CHANNELS)]
    tokens = given("tokens", IMAGES, 1 + GRID[0] * GRID[1], VISUAL)
    projected = model.backbone.head(model.backbone.norm(tokens))
    patches = projected[:, 1:].permute(0, 2, 1).reshape(IMAGES, -1, *GRID)
    features = [*levels, [projected[:, :1], patches]]
    before = given("global before", IMAGES, 1, EMBEDDING).detach()
    anchors = F.normalize(given("anchors", CLASSES, EMBEDDING).detach(), dim=-1)
    model.reg_T0 = anchors
    model.reg_E0 = types.SimpleNamespace(extract_feats=lambda _: [(before, None)])
    model.extract_feat = lambda _: features
    model.identity_head = types.SimpleNamespace(forward_train=identity_loss)

    label = torch.from_numpy(draw_labels().astype(np.int64))
    present = [[k for k in range(CLASSES) if (image == k).any()] for image in label]
    truth = {
        "gt_labels": [torch.tensor(classes) for classes in present],
        "gt_masks": [
            torch.stack([image == k for k in classes]).long()
            for image, classes in zip(label, present, strict=True)
        ],
    }
    metas = [{}] * IMAGES
    with mock.patch.object(torch, "rand", spread):
        losses = model.segmentor.forward_train(model, None, metas, label[:, None], **truth)
    losses = {name: value.reshape(()) for name, value in losses.items()}
    total = torch.stack(list(losses.values())).sum()
    total.backward()

    _, _, texts, _ = model.after_extract_feat(features)
    mask_features, maps = model.decode_head.pixel_decoder(levels, texts)
    classes, masks = model.decode_head(levels, texts, metas)
    names = model.text_encoder(model.texts, context=model.contexts)
    found = {
        "names": names,
        "texts": texts,
        "mask_features": mask_features.permute(0, 2, 3, 1),
        **{f"level{i}": x.permute(0, 2, 3, 1) for i, x in enumerate(maps)},
        "class_logits": torch.stack(classes),
        "mask_logits": torch.stack(masks),
    }

    def summed(ending):
        return sum(value for name, value in losses.items() if name.endswith(ending))

    found |= {f"loss.{term}": summed(f"loss_{end}") for term, end in TERMS.items()}
    found["loss.textual"] = losses["reg.textual.loss"]
    found["loss.visual"] = losses["reg.visual.loss"]
    found["loss.vision_language"] = losses["scr_map.loss"]
    terms = [float(value.detach()) for name, value in found.items() if name.startswith("loss.")]
    assert np.isclose(total.item(), sum(terms))
    parameters = dict(model.named_parameters())
    found |= {f"to.{name}": parameters[name].grad for name in OBSERVED}
    to_levels: list[Any] = [x.grad for x in levels]
    found |= {f"to.level{i}": x.permute(0, 2, 3, 1) for i, x in enumerate(to_levels)}
    found["to.tokens"] = tokens.grad
    arrays: dict[str, Any] = {name: value.detach().float().numpy() for name, value in found.items()}
    arrays |= {f"shape.{name}": np.asarray(tensor.shape) for name, tensor in state.items()}
    np.savez_compressed(GOLDEN, **arrays)
    print({name: float(v) for name, v in arrays.items() if name.startswith("loss.")})
    for i, x in enumerate(masks):
        size = maps[i % 3].shape[-2:]
        near = F.interpolate(x, size, mode="bilinear", align_corners=False).abs().min()
        print(f"prediction {i}: deviations {classes[i].std():.2f} {x.std():.2f}, {near:.1e} from 0")
    print(f"{GOLDEN.name}: {GOLDEN.stat().st_size} bytes")


TERMS = {"class": "cls", "mask": "mask", "dice": "dice"}


if __name__ == "__main__":
    main()
