"""A run so small that it compiles in seconds: a vision transformer 16 wide in the zoo, and states
filled without compiling.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh
import numpy as np
import pytest

from jaxdg.backbones import VitConfig, zoo
from jaxdg.config import Config, MeshConfig, validated
from jaxdg.tasks import run_state as tasks
from jaxdg.training import sharding
from jaxdg.training.step import Batch, TrainState, make_step


@dataclasses.dataclass
class Run:
    """All that a training step needs."""

    config: Config
    task: tasks.Task
    mesh: Mesh
    plan: tasks.Blueprint
    like: TrainState
    optimizer: Any

    def state(self, seed: int = 0) -> TrainState:
        """Random parameters that depend on the seed alone, zero moments."""
        rng = np.random.default_rng(seed)

        def fill(path, leaf):
            scale = str(path[-2]).endswith(("'scale']", "'var']"))
            noise = (
                rng.normal(0, 0.1, leaf.shape)
                if len(leaf.shape) < 3
                else rng.normal(0, leaf.shape[-2] ** -0.5, leaf.shape)
            )
            return jax.device_put((scale + noise).astype(leaf.dtype), leaf.sharding)

        def fill_all(tree):
            return jax.tree_util.tree_map_with_path(fill, tree)

        zeros = jax.tree.map(
            lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding), self.like
        )
        return dataclasses.replace(
            zeros,
            trained=fill_all(self.like.trained),
            frozen=fill_all(self.like.frozen),
            statistics=fill_all(self.like.statistics),
        )

    def step(
        self, accumulate: int = 1, seed: int = 0
    ) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]:
        """The compiled training step."""
        at = jax.tree.map(lambda leaf: leaf.sharding, self.like)
        key = jax.random.key(seed)
        return make_step(
            self.plan.graph,
            self.optimizer,
            self.task.loss_denominator,
            self.task.losses,
            key,
            at,
            accumulate,
        )

    def batch(self, seed: int = 0, rows: int = 8) -> Batch:
        """Noise with labels that follow it; the share of ignored pixels differs from row to row."""
        rng = np.random.default_rng(seed)
        h, w = self.config.data.crop
        image = rng.integers(0, 256, (rows, h, w, 3)).astype(np.uint8)
        label = (image[..., 0] // 14).astype(np.uint8)
        label[rng.random((rows, h, w)) < np.linspace(0, 1, rows).reshape(-1, 1, 1)] = 255
        return sharding.to_devices({"image": image, "label": label}, self.mesh)


@pytest.fixture(scope="session")
def make_run():
    """`make_run(mesh, model={..}, data={..}, optimizer={..}, steps=..)` on as many devices as the
    mesh has.
    """
    zoo.ZOO["tiny"] = zoo.Entry(
        VitConfig(width=16, depth=8, heads=2, patch_size=8, taps=(1, 3, 5, 7))
    )

    def make(mesh: MeshConfig | None = None, **fields) -> Run:
        mesh = mesh or MeshConfig(1, 1)
        config = Config(steps=10, batch_size=8)
        config.data.crop = config.evaluation.stride = (16, 16)
        config.data.brightness = config.data.contrast = 0.0
        config.model.encoder = "tiny"
        config.model.pyramid = "none"
        config.model.taps = (7,)
        for name, value in fields.items():
            part = getattr(config, name)
            setattr(
                config,
                name,
                dataclasses.replace(part, **value) if dataclasses.is_dataclass(part) else value,
            )
        config = validated(config)
        task = tasks.make_task(config)
        devices = sharding.make_mesh(mesh, jax.devices()[: mesh.data * mesh.fsdp])
        plan = tasks.Blueprint.of(task, config.model.freeze)
        like, optimizer = tasks.abstract_state(plan, config, devices)
        return Run(config, task, devices, plan, like, optimizer)

    yield make
    del zoo.ZOO["tiny"]
