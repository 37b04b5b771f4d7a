"""A trained model as an ONNX graph of one window, converted by jax2onnx.

The graph takes pixels that are normalised, and computes in float32 without loops over layers,
whatever the run does. So `predict` differs by the rounding of another order, and where the run
computes in half precision by that of its own. docs/how-to/onnx.md has what stands around the graph:
the windows of a segmenter, the size of a detector's images.
"""

from collections.abc import Sequence
import copy
import dataclasses
import importlib.metadata
import logging
from pathlib import Path
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from jaxdg.backbones import entry
from jaxdg.commands.description import of_model
from jaxdg.commands.plain_program import plain
from jaxdg.segmentation.decoder import Decoder
from jaxdg.tasks.loading import Model, restored
from jaxdg.tasks.run_state import opened
from jaxdg.tasks.segmentation import Segmentation

OPSET = 18  # GroupNorm, LayerNorm and GELU are spelt out; TensorRT and others read it
LARGEST = 2**31 - 1  # bytes that protobuf writes
# Of the largest score of a window: how far the graph may be from the model it was made of.
ALLOWED = 1e-3
INSTALL = (
    "pip install 'jaxdg[onnx]' and then pip install --no-deps jax2onnx==0.17.1 (see"
    " docs/how-to/onnx.md)"
)


@dataclasses.dataclass(frozen=True)
class Graph:
    """An ONNX graph.

    Attributes:
        content: of the file.
        inputs: what it takes, by name.
        outputs: what it gives, by name.
        difference: of the scores that ONNX Runtime and JAX compute for one image of noise, the
            largest over the largest score.
    """

    content: bytes
    inputs: dict[str, jax.ShapeDtypeStruct]
    outputs: dict[str, jax.ShapeDtypeStruct]
    difference: float


def loaded(checkpoint: str | Path) -> Model:
    """As `jaxdg.load`, computing in float32 and without loops over layers."""
    trained = opened(checkpoint)
    config = copy.deepcopy(trained.config)
    config.model.dtype = "float32"
    for part in (config.model, getattr(config.model, config.model.decoder)):
        if hasattr(part, "unroll"):
            part.unroll = True
    return restored(trained, config)


def window_program(model: Model) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """What an ONNX graph computes: the function, its inputs by name and its outputs by name.

    For segmentation it is the class scores `scores` [1, h, w, k] of one window `image`. For
    detection it is `boxes` [d, 4], `scores` [d] and `classes` [d] of an image that lies in the
    upper left corner of `image` and has the height and width `size` [1, 2]; slots without a box
    have a score of 0. Images are normalised, [1, h, w, 3].

    Raises:
        ValueError: the decoder sees more of an image than a window.
    """
    task: Any = model.task

    def network() -> Any:
        return nnx.merge(model.graph, *model.state)

    image = jax.ShapeDtypeStruct((1, *task.window, 3), jnp.float32)
    if isinstance(task, Segmentation):
        head = type(nnx.eval_shape(network).head)
        if head.image_scores is not Decoder.image_scores:
            raise ValueError(
                f"model.decoder {task.config.model.decoder} sees an image as a whole beside its"
                " windows, so that no graph of one window predicts what it does; export it with"
                " --out"
            )

        def class_scores(image: jax.Array) -> tuple[jax.Array, ...]:
            return (network().scores(image).astype(jnp.float32),)

        function: Any = class_scores
        inputs = {"image": image}
        names = ("scores",)
    else:

        def detections(image: jax.Array, size: jax.Array) -> tuple[jax.Array, ...]:
            found = network().detect(image, size)
            return found.boxes[0], found.scores[0], found.classes[0]

        function = detections
        inputs = {"image": image, "size": jax.ShapeDtypeStruct((1, 2), jnp.float32)}
        names = ("boxes", "scores", "classes")
    outputs = jax.eval_shape(function, *inputs.values())
    return function, inputs, dict(zip(names, outputs, strict=True))


def convert(model: Model) -> Graph:
    """The ONNX graph of a model from `loaded`, after ONNX Runtime has computed what JAX does.

    Raises:
        ValueError: what it needs is not installed, the model does not convert, or the graph
            computes something else.
    """
    to_onnx, runtime = libraries()
    function, inputs, outputs = window_program(model)
    what = f"{model.task.config.model.encoder} with {model.task.config.model.decoder}"
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model.state))
    if size > LARGEST:
        raise ValueError(
            f"{what} has {size / 1e9:.1f} GB of parameters, and a file of ONNX holds"
            f" {LARGEST / 1e9:.1f}; export it with --out"
        )
    try:
        proto = to_onnx(
            plain(function, *inputs.values()),
            list(inputs.values()),
            model_name="jaxdg",
            opset=OPSET,
            input_names=list(inputs),
            output_names=list(outputs),
        )
    except Exception as error:  # of whatever kind the converter raises
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"jax2onnx {importlib.metadata.version('jax2onnx')} does not convert {what}: {reason};"
            " export it with --out"
        ) from error
    content = proto.SerializeToString()
    examples = _examples(inputs)
    try:
        session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
        found = session.run(list(outputs), examples)
    except Exception as error:  # of kinds that ONNX Runtime keeps to itself
        raise ValueError(
            f"ONNX Runtime does not run the graph of {what}: {' '.join(str(error).split())}; export"
            " it with --out"
        ) from error
    expected = jax.jit(function)(*examples.values())
    difference = compared(found, [np.asarray(x) for x in expected])
    if difference > ALLOWED:
        raise ValueError(
            f"the graph of {what} computes something else in ONNX Runtime than the model in JAX:"
            f" scores of noise differ by {difference:.2g} of the largest; allowed: {ALLOWED};"
            " export it with --out"
        )
    return Graph(content, inputs, outputs, difference)


def compared(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """The largest difference of the scores, over the largest score.

    Of a detector they are the second output. They fall, so that boxes that change places with
    others of nearly their score do not count.
    """
    of = 1 if len(expected) > 1 else 0
    largest = float(np.abs(expected[of]).max())
    return float(np.abs(found[of] - expected[of]).max()) / max(largest, 1e-30)


def description(model: Model, graph: Graph) -> dict[str, Any]:
    """What the file beside the graph says, of JSON types."""
    encoder = entry(model.task.config.model.encoder).config

    def arrays(named: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
        return {
            name: {"shape": list(array.shape), "dtype": array.dtype.name}
            for name, array in named.items()
        }

    known = of_model(model)
    for name in ("jax2onnx", "onnxruntime"):
        known["versions"][name] = importlib.metadata.version(name)
    return {
        **known,
        "format": "onnx",
        "input": arrays(graph.inputs),
        "output": arrays(graph.outputs),
        "mean": _times_255(encoder.mean),
        "std": _times_255(encoder.std),
        "platforms": ["onnx"],
        "opset": OPSET,
        "difference": graph.difference,
    }


def _times_255(values: Sequence[float]) -> list[float]:
    """In float32, as `photometric.normalize` computes it."""
    return (np.float32(255) * np.array(values, np.float32)).tolist()


def _examples(inputs: dict[str, jax.ShapeDtypeStruct]) -> dict[str, np.ndarray]:
    """An image of noise and its size, of what a graph takes."""
    shape = inputs["image"].shape
    noise = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    sizes = np.array([shape[1:3]], np.float32)
    return {"image": noise, **({"size": sizes} if "size" in inputs else {})}


def libraries() -> tuple[Any, Any]:
    """The converter of jax2onnx, and ONNX Runtime.

    Raises:
        ValueError: one is not installed.
    """
    try:
        import jax2onnx  # pyright: ignore[reportMissingImports]
        import onnxruntime  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"--onnx needs {error.name}, which is not installed: {INSTALL}") from error
    # It loads converters of libraries that are not here, and would print a traceback for each.
    logging.getLogger("jax2onnx.plugins.plugin_system").setLevel(logging.ERROR)
    return jax2onnx.to_onnx, onnxruntime
