"""What scripts/benchmark.py measures: a configuration's model with random parameters, made-up
batches and files, and functions that run it.

Needs neither data nor weights, nor what only reading them needs (grain, tensorboardX).
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import importlib.util
from pathlib import Path
import sys
import tempfile
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cv2
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from jaxdg import config as config_lib
from jaxdg import methods
from jaxdg.commands.flops import count
from jaxdg.config import Config
from jaxdg.data.augment.transforms import Augmentation
from jaxdg.data.datasets import STREETS, FolderOptions
from jaxdg.data.domains import open_domain
from jaxdg.data.labels import LabelSet
from jaxdg.tasks import run_state as tasks
from jaxdg.training import sharding
from jaxdg.training.step import gradients, make_step

Run = Callable[[int], None]  # runs something so many times and waits for it


class Setup:
    """A configuration's model, step and made-up batch; arrays exist once they are asked for."""

    def __init__(self, config: Config, classes: int | None = None):
        """Weights and data that the configuration names are not read; `classes` makes the labels so
        many.

        Raises:
            ValueError: TLDR is on, whose batches are made with weights that are not read.
        """
        for name, options in methods.settings(config).items():
            if options.on:
                raise ValueError(
                    f"{name}.on is True; allowed: False, for a method may need weights, which are"
                    " not read here"
                )
        config.model.weights = config.model.text_weights = config.model.start = None
        self.config = config
        self.task = tasks.make_task(config)
        if classes is not None:
            self.task.labels = LabelSet(tuple(map(str, range(classes))), ((0, 0, 0),) * classes)
        self.mesh = sharding.make_mesh(config.mesh)
        self.plan = tasks.Blueprint.of(self.task, config.model.freeze)
        self.like, self.optimizer = tasks.abstract_state(self.plan, config, self.mesh)
        places = jax.tree.map(lambda leaf: leaf.sharding, self.like)
        of_task = (self.task.loss_denominator, self.task.losses)
        self.step = make_step(
            self.plan.graph,
            self.optimizer,
            *of_task,
            jax.random.key(0),
            places,
            config.optimizer.accumulate,
        )

    def state(self) -> Any:
        """The train state before the first step."""
        return tasks.initial_state(self.task, self.plan, self.like, self.optimizer)

    def model_state(self) -> Any:
        """The model's random parameters and statistics, without the optimiser."""
        return jax.jit(lambda key: self.plan.split(self.plan.make(key)))(jax.random.key(0))

    def batch(self, seed: int = 0) -> dict[str, np.ndarray]:
        """A batch as `train_batches` gives it."""
        rng = np.random.default_rng(seed)
        n = self.config.batch_size
        h, w = self.config.data.crop
        k = len(self.task.labels.names)
        blocks = rng.integers(0, k, (n, 8, 8)).astype(np.uint8)
        label = blocks[:, np.arange(h) * 8 // h][:, :, np.arange(w) * 8 // w]
        colors = np.random.default_rng(0).integers(40, 216, (k, 3))
        image = (colors[label] + rng.integers(-40, 40, (n, h, w, 3))).astype(np.uint8)
        if self.config.task == "segmentation":
            return {"image": image, "label": label}
        boxes = (n, self.config.data.max_boxes)
        corners = rng.uniform(0, 0.7, (*boxes, 2))
        sides = rng.uniform(0.05, 0.3, (*boxes, 2))
        fields = {
            "boxes": (
                (np.concatenate([corners, corners + sides], axis=-1) * [w, h, w, h]).astype(
                    np.float32
                )
            )
        }
        fields |= {
            "classes": rng.integers(0, k, boxes).astype(np.int32),
            "valid": np.broadcast_to(np.arange(boxes[1]) < 10, boxes),
        }
        return {
            "image": image,
            **fields,
            **{key: np.zeros(boxes, bool) for key in ("difficult", "crowd")},
        }

    def merged(self, state: Any) -> Any:
        """The model of (trained, frozen, statistics)."""
        return nnx.merge(self.plan.graph, *state, copy=True)


def train_run(setup: Setup, batches: Iterator[dict[str, np.ndarray]] | None = None) -> Run:
    """Training steps on one batch that lies on the device already, or on batches from the host."""
    state = setup.state()
    kept = sharding.to_devices(setup.batch(), setup.mesh)

    def run(n: int) -> None:
        nonlocal state
        for _ in range(n):
            batch = kept if batches is None else sharding.to_devices(next(batches), setup.mesh)
            state, metrics = setup.step(state, batch)
        jax.block_until_ready(metrics)

    return run


def repeated(fn: Callable[..., Any], *args: Any) -> Run:
    """A jitted function of the same arguments."""
    fn = jax.jit(fn)

    def run(n: int) -> None:
        for _ in range(n):
            result = fn(*args)
        jax.block_until_ready(result)

    return run


def backward(fn: Callable[..., Any], fixed: Any, *args: Any) -> tuple[Any, ...]:
    """A function that runs `fn(*args, fixed)` forward and, from random gradients of its results,
    backward to `args`; and its arguments.
    """
    results = jax.eval_shape(fn, *args, fixed)

    def both(towards: Any, fixed: Any, *args: Any) -> Any:
        results, pull = jax.vjp(lambda *args: fn(*args, fixed), *args)
        return results, pull(towards)

    return both, random_like(results), fixed, *args


def random_like(tree: Any) -> Any:
    """Arrays of small random numbers."""
    leaves, structure = jax.tree.flatten(tree)

    def make():
        return [
            0.02 * jax.random.normal(jax.random.key(i), leaf.shape, leaf.dtype)
            for i, leaf in enumerate(leaves)
        ]

    return structure.unflatten(jax.jit(make)())


def encoder_alone(setup: Setup, train: bool) -> tuple[Callable[[Any, Any], Any], Any]:
    """The encoder as a function of its parameters and images, and the shapes of its parameters;
    drop path is on in training.
    """
    graph, parameters, rest = nnx.split(setup.merged(setup.plan.abstract).backbone, nnx.Param, ...)
    key = jax.random.key(2) if train else None
    return (lambda parameters, images: nnx.merge(graph, parameters, rest)(images, key)), parameters


def without_remat(setup: Setup) -> Setup:
    """The same model that keeps what its backward pass needs: what has to be computed."""
    if not setup.config.model.remat:
        return setup
    config = config_lib.validated(setup.config)
    config.model.remat = False
    return Setup(config, len(setup.task.labels.names))


def train_flops(setup: Setup) -> float:
    """Of one step on the whole batch."""
    plain = without_remat(setup)
    batch = {
        key: jax.ShapeDtypeStruct(value.shape, value.dtype) for key, value in plain.batch().items()
    }
    losses = (plain.task.loss_denominator, plain.task.losses, jax.random.key(0), 1)
    return count(
        lambda state, batch: gradients(plain.plan.graph, state, batch, *losses), plain.like, batch
    )


def encoder_flops(setup: Setup, train: bool, images: int | None = None) -> float:
    """Of the encoder, with its backward pass in training."""
    plain = without_remat(setup)
    encode, state = encoder_alone(plain, train)
    shape = jax.ShapeDtypeStruct(
        (images or plain.config.batch_size, *plain.config.data.crop, 3), jnp.float32
    )
    if not train:
        return count(encode, state, shape)

    def loss(state: Any, images: Any) -> Any:
        features = encode(state, images)
        return sum(jnp.sum(x) for x in features), features

    return count(jax.grad(loss, has_aux=True), state, shape)


@contextlib.contextmanager
def made_files(
    config: Config, size: tuple[int, int]
) -> Iterator[tuple[Iterator[dict[str, np.ndarray]], str]]:
    """Endless training batches by the configuration's recipe, and in words where from: its own
    generated streets, or files of `size`.

    Where Grain is not installed the batches are ready in the host's memory, and only their way to
    the device is left to be measured.
    """
    if importlib.util.find_spec("grain") is None:
        ready = [Setup(config_lib.validated(config)).batch(seed) for seed in range(4)]
        yield (ready[i % 4] for i in range(10**9)), "host memory, as grain is not installed"
        return
    from jaxdg.data.pipeline import train_batches
    from jaxdg.data.samplers import make_sampler

    d = config.data
    names = tasks.make_task(config).labels.names
    with tempfile.TemporaryDirectory() as folder:
        made = not set(d.source.split("+")) <= set(STREETS)
        if made:
            write_files(Path(folder), size, len(names))
        options: dict[str, Any] = dict(
            root=folder,
            streets=d.streets,
            folder=FolderOptions(images="images", labels="labels", classes=names),
        )
        dataset = open_domain("made" if made else d.source, train=True, **options)
        augmentation = Augmentation(
            **{field.name: getattr(d, field.name) for field in dataclasses.fields(Augmentation)}
        )
        sampler = make_sampler(dataset, seed=0)
        batches = train_batches(
            dataset,
            sampler,
            augmentation,
            seed=0,
            batch_size=config.batch_size,
            start=0,
            stop=10**6,
            workers=d.workers,
        )
        try:
            yield batches, f"PNG files of {size[0]}x{size[1]}" if made else d.source
        finally:
            batches.close()


def write_files(folder: Path, size: tuple[int, int], classes: int, pairs: int = 24) -> None:
    """Pairs of PNG files that take about as long to decode as photographs: smooth shapes with the
    noise of a camera.
    """
    rng = np.random.default_rng(0)
    h, w = size
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
    for i in range(pairs):
        smooth = cv2.resize(
            rng.integers(0, 256, (h // 32, w // 32, 3)).astype(np.uint8),
            (w, h),
            interpolation=cv2.INTER_CUBIC,
        )
        image = np.clip(smooth + rng.normal(0, 3, smooth.shape), 0, 255).astype(np.uint8)
        blocks = rng.integers(0, classes, (8, 16)).astype(np.uint8)
        cv2.imwrite(str(folder / "images" / f"{i}.png"), image)
        cv2.imwrite(
            str(folder / "labels" / f"{i}.png"),
            cv2.resize(blocks, (w, h), interpolation=cv2.INTER_NEAREST),
        )
