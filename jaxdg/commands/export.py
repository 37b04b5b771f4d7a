"""A trained model as one file that runs without this package: StableHLO with the weights inside,
or ONNX.

    python -m jaxdg.export --checkpoint runs/streets --out streets.stablehlo --size 512x1024

    import jax
    model = jax.jit(jax.export.deserialize(open("streets.stablehlo", "rb").read()).call)
    label_map = model(image)    # uint8 [512, 1024, 3], RGB

Where it runs only JAX and flatbuffers are needed, within the compatibility that `jax.export`
promises. It promises none for the call of cuDNN's attention, which models in half precision make on
GPUs by CUDA: export them again when JAX there is much newer.

Beside it `streets.json` says what goes in and what comes out: sizes, classes, colours, the protocol
of the run. Segmentation gives a label map uint8 [h, w] by the run's sliding windows. Detection
takes images of the size it was trained on, or that fit it without being resized, and gives
{"boxes" [d, 4]: x0 y0 x1 y1 in pixels, "scores" [d], "classes" [d]}, the best first; slots without
a box have a score of 0. `--batch` makes it take [n, h, w, 3] for any n, one image after another.

`--onnx model.onnx` instead of `--out` writes an ONNX graph, of one window or of a detector's image;
model.json beside it says what goes in. See `onnx_graph` and docs/how-to/onnx.md.

    python -m jaxdg.export --checkpoint streets.safetensors --onnx streets.onnx
"""

from collections.abc import Callable, Sequence
import json
from pathlib import Path
from typing import Any

from absl import flags
from flax import nnx
import jax
import jax.export  # not loaded by jax itself
import jax.numpy as jnp

from jaxdg import files
from jaxdg.backbones.cudnn import CALLS
from jaxdg.commands import command_line as cli
from jaxdg.commands import onnx_graph
from jaxdg.commands import process as runtime
from jaxdg.commands.description import of_model
from jaxdg.tasks.loading import Model, load
from jaxdg.tasks.segmentation import Segmentation

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def program(model: Model) -> Callable[[jax.Array], Any]:
    """What `model.predict` computes, as one function of an image uint8 [h, w, 3] that JAX can
    trace.
    """
    task: Any = model.task
    c = task.config

    def label_map(image: jax.Array) -> jax.Array:
        network: Any = nnx.merge(model.graph, *model.state)
        windows = task.window, c.evaluation.stride, c.evaluation.windows_per_call
        scores = network.image_scores(task.normalize(image[None]), *windows)
        return jnp.argmax(scores[0], axis=-1).astype(jnp.uint8)

    def boxes(image: jax.Array) -> dict[str, jax.Array]:
        h, w = image.shape[:2]
        room_h, room_w = c.data.crop
        fitted = jnp.pad(image, ((0, room_h - h), (0, room_w - w), (0, 0)))
        found = task.detect(
            model.graph, model.state, fitted[None], jnp.array([[h, w]], jnp.float32)
        )
        inside = jnp.clip(found.boxes[0], 0, jnp.array([w, h, w, h], jnp.float32))
        return {"boxes": inside, "scores": found.scores[0], "classes": found.classes[0]}

    return label_map if isinstance(task, Segmentation) else boxes


def export(
    model: Model,
    size: tuple[int, int],
    platforms: Sequence[str] = PLATFORMS[:2],
    batch: bool = False,
) -> jax.export.Exported:
    """The model with its weights as a StableHLO program.

    Args:
        model: from `jaxdg.load`.
        size: height and width of the images it will take.
        platforms: it is lowered for; it runs on no other.
        batch: it takes [n, h, w, 3] for any n instead of [h, w, 3], and gives back as many.

    Raises:
        ValueError: a detector cannot take images of this size as they are.
    """
    h, w = size
    crop = model.task.config.data.crop
    if not isinstance(model.task, Segmentation) and model.task.fit.inside(size) != size:  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError(
            f"size is {h}x{w}; allowed: what fills {crop[0]}x{crop[1]} in height or in width and"
            " exceeds neither, for the detector sees images at the size it was trained on; resize"
            " them to that before"
        )
    single = program(model)

    def images_in_turn(images: jax.Array) -> Any:
        return jax.lax.map(single, images)

    # cuDNN's attention has no symbolic sizes, so the images of a batch run one after another.
    function = images_in_turn if batch else single
    shape = jax.export.symbolic_shape(f"n, {h}, {w}, 3") if batch else (h, w, 3)
    calls = (*CALLS, "LayoutConstraint")  # the latter in Mask2Former, for GPUs alone
    allowed = [jax.export.DisabledSafetyCheck.custom_call(name) for name in calls]
    exporter = jax.export.export(jax.jit(function), platforms=platforms, disabled_checks=allowed)
    return exporter(jax.ShapeDtypeStruct(shape, jnp.uint8))


def description(model: Model, exported: jax.export.Exported) -> dict[str, Any]:
    """What the file beside the program says, of JSON types."""
    arrays = (
        {"": exported.out_avals[0]}
        if model.task.config.task == "segmentation"
        else dict(zip(("boxes", "classes", "scores"), exported.out_avals, strict=True))
    )
    shapes = {
        name: {
            "shape": [str(n) if not isinstance(n, int) else n for n in a.shape],
            "dtype": a.dtype.name,
        }
        for name, a in arrays.items()
    }
    (image,) = exported.in_avals
    known = of_model(model)
    known["versions"]["calling_convention"] = exported.calling_convention_version
    return {
        **known,
        "input": {
            "shape": [n if isinstance(n, int) else str(n) for n in image.shape],
            "dtype": "uint8",
            "channels": "RGB",
        },
        "output": shapes.get("", shapes),
        "platforms": list(exported.platforms),
    }


def check_out(out: Path) -> Path:
    """Makes sure, before anything is computed, that an export replaces nothing but an earlier one;
    returns its description's path.

    Args:
        out: file for the program.

    Raises:
        ValueError: it has the name of its description, or one of the two is another file.
    """
    beside = out.with_suffix(".json")
    if beside == out:
        raise ValueError(
            f"--out is {out}; its description goes to a file of that name; choose another suffix,"
            " such as .stablehlo"
        )
    described = _is_description(beside)
    for path in (beside, out):
        if path.exists() and not (described and path.is_file()):
            raise ValueError(
                f"--out {out} would replace {path}, which is there and is none of an export; give"
                " another name, or move it"
            )
    return beside


def _is_description(path: Path) -> bool:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return (
        isinstance(content, dict)
        and {"task", "input", "output", "platforms", "versions"} <= content.keys()
    )


def write(model: Model, exported: jax.export.Exported, out: Path) -> Path:
    """Writes the program to `out` and its description beside it, each whole or not at all; returns
    the description's path.
    """
    return _write(out, exported.serialize(), description(model, exported))


def _write(out: Path, program: bytes | bytearray, described: dict[str, Any]) -> Path:
    beside = check_out(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    for path, content in (
        (out, bytes(program)),
        (beside, json.dumps(described, indent=2) + "\n"),
    ):
        files.write(path, content)
    return beside


def main(arguments: Sequence[str]) -> None:
    """Exports as the flags say."""
    if len(arguments) > 1:
        raise ValueError(f"unexpected argument {arguments[1]!r}; see --help")
    if (_OUT.value is None) == (_ONNX.value is None):
        raise ValueError(
            "give one of --out, for a StableHLO program, and --onnx, for an ONNX graph"
        )
    runtime.set_up()
    if _ONNX.value is not None:
        _write_graph(Path(_ONNX.value))
        return
    size = cli.parse_size("size", _SIZE.value) if _SIZE.value else None
    out = Path(_OUT.value)
    check_out(out)
    model = load(_CHECKPOINT.value)
    h, w = size or model.task.config.data.crop
    exported = export(model, (h, w), _PLATFORMS.value, _BATCH.value)
    beside = write(model, exported, out)
    images = f"[n, {h}, {w}, 3]" if _BATCH.value else f"[{h}, {w}, 3]"
    print(
        f"{out}: {out.stat().st_size / 1e6:.1f} MB, images uint8 {images}, for"
        f" {', '.join(exported.platforms)}; described in {beside}"
    )


def _write_graph(out: Path) -> None:
    """Writes an ONNX graph as the flags say."""
    for flag in ("size", "platform", "batch"):
        if flags.FLAGS[flag].present:
            raise ValueError(
                f"--{flag} is of StableHLO programs; an ONNX graph takes one window of the run's"
                " size, on any platform; leave it out"
            )
    check_out(out)
    onnx_graph.libraries()
    model = onnx_graph.loaded(_CHECKPOINT.value)
    graph = onnx_graph.convert(model)
    beside = _write(out, graph.content, onnx_graph.description(model, graph))
    takes = ", ".join(f"{name} {list(array.shape)}" for name, array in graph.inputs.items())
    print(
        f"{out}: {out.stat().st_size / 1e6:.1f} MB, takes {takes}; scores in ONNX Runtime differ by"
        f" {graph.difference:.1g} of the largest; described in {beside}"
    )


if __name__ == "__main__":
    _CHECKPOINT = cli.define_checkpoint()
    _OUT = cli.define_path(
        "out",
        "File for the program, such as model.stablehlo; model.json comes beside it.",
    )
    _ONNX = cli.define_path(
        "onnx",
        "File for an ONNX graph of one window, such as model.onnx, instead of --out; model.json"
        " comes beside it. Needs the extra onnx, and jax2onnx.",
    )
    _SIZE = flags.DEFINE_string(
        "size", None, "Height x width of the images it will take; the run's data.crop if left out."
    )
    _PLATFORMS = flags.DEFINE_multi_enum(
        "platform", list(PLATFORMS[:2]), PLATFORMS, "Where it will run; may be given several times."
    )
    _BATCH = flags.DEFINE_bool("batch", False, "Take [n, h, w, 3] for any n.")
    cli.run(main)
