"""One mesh with axes (data, fsdp): batches are divided over both, parameters over fsdp by an ordered list of rules.

A rule is (regex, spec): the first regex found in a parameter's name counts and its spec names the trailing axes, so the leading
layer axis of stacked blocks is never divided. An axis that the devices do not divide evenly stays whole.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

from flax import nnx
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
import optax

from jaxdg import weights
from jaxdg.config import MeshConfig

Rules: TypeAlias = Sequence[tuple[str, tuple[str | None, ...]]]

RULES: Rules = (
    (r"kernel$", (None, "fsdp")),
    (r"_embed$", (None, "fsdp")),
)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Devices as (data, fsdp).

    Args:
        config: how many each way.
        devices: to be used; all devices of all hosts if None.

    Raises:
        ValueError: the product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    data, fsdp = config.data, config.fsdp
    if data == -1 and fsdp == -1:
        data, fsdp = count, 1
    data = count // fsdp if data == -1 else data
    fsdp = count // data if fsdp == -1 else fsdp
    if data * fsdp != count:
        raise ValueError(
            f"mesh is data={config.data}, fsdp={config.fsdp}; allowed: a product equal to the number of devices, {count} (-1 = the rest)"
        )
    return Mesh(np.asarray(devices).reshape(data, fsdp), ("data", "fsdp"))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds all of it."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis divided over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def parameter_shardings(mesh: Mesh, state: nnx.State, rules: Rules = RULES) -> Any:
    """A tree of shardings like `state`, which may be abstract."""
    names = {path: name for name, (path, _) in weights.slots(state).items()}

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        axes = weights.first_match(names[path], rules, ())
        axes = axes[max(0, len(axes) - len(leaf.shape)) :]
        spec = [None] * (len(leaf.shape) - len(axes)) + list(axes)
        fits = [a if a is None or leaf.shape[i] % mesh.shape[a] == 0 else None for i, a in enumerate(spec)]
        return NamedSharding(mesh, PartitionSpec(*fits))

    return weights.unflatten_like(state, {path: sharding(path, leaf) for path, leaf in nnx.to_flat_state(state)})


def optimizer_shardings(mesh: Mesh, optimizer: optax.GradientTransformation, params: nnx.State, shardings: Any) -> Any:
    """Shardings of the optimiser's state: its moments lie where their parameters lie, everything else on all devices."""
    state = jax.eval_shape(optimizer.init, params)
    return optax.tree_map_params(optimizer, lambda _, s: s, state, shardings, transform_non_params=lambda _: replicated(mesh))


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's rows of a global batch as arrays divided over all devices."""
    sharding = batch_sharding(mesh)
    return {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()}
