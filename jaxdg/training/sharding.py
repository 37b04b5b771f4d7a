"""One mesh with axes (data, fsdp): batches are divided over both, parameters over fsdp by rules.

A rule is (regex, spec). The first regex found in a parameter's name counts; its spec names the
trailing axes. If the devices do not divide such an axis evenly, they divide the last other axis
that they can. If there is none, every device holds the parameter. The leading layer axis of stacked
blocks is never divided.
"""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
from typing import Any, TypeAlias

from flax import nnx
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
import optax

from jaxdg import weights

Rules: TypeAlias = Sequence[tuple[str, tuple[str | None, ...]]]

RULES: Rules = (
    (r"kernel$", (None, "fsdp")),
    # Factors of adapters beside a kernel: their rank is small, and need not divide.
    (r"lora_a$", ("fsdp", None)),
    (r"lora_b$", (None, "fsdp")),
    (r"_embed$", (None, "fsdp")),
)


@dataclasses.dataclass
class MeshConfig:
    """How devices are arranged; the product must be the number of devices, -1 meaning "the rest".

    Attributes:
        data: copies of the model, each with its own part of the batch. Default -1.
        fsdp: devices among which one copy's parameters, gradients and optimiser state are divided.
            Default 1.
    """

    data: int = -1
    fsdp: int = 1


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
    data = config.data
    fsdp = config.fsdp
    if data == -1 and fsdp == -1:
        data = count
        fsdp = 1
    data = count // fsdp if data == -1 else data
    fsdp = count // data if fsdp == -1 else fsdp
    if data * fsdp != count:
        raise ValueError(
            f"mesh is data={config.data}, fsdp={config.fsdp}; allowed: a product equal to the"
            f" number of devices, {count} (-1 = the rest)"
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
    names = {
        path: (name, int(layer is not None))
        for name, (path, layer, _) in weights.slots(state).items()
    }

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name, first = names[path]
        n = len(leaf.shape)
        axes = weights.first_match(name, rules, ())
        axes = axes[max(0, len(axes) - (n - first)) :]
        spec = [None] * (n - len(axes)) + list(axes)
        for i, axis in enumerate(spec):
            if axis and leaf.shape[i] % mesh.shape[axis]:
                spec[i] = None
                others = [
                    j
                    for j in range(first, n)
                    if spec[j] is None and leaf.shape[j] % mesh.shape[axis] == 0
                ]
                if others:
                    spec[others[-1]] = axis
        return NamedSharding(mesh, PartitionSpec(*spec))

    return weights.unflatten_like(
        state, {path: sharding(path, leaf) for path, leaf in nnx.to_flat_state(state)}
    )


def optimizer_shardings(
    mesh: Mesh, optimizer: optax.GradientTransformation, params: nnx.State, shardings: Any
) -> Any:
    """Shardings of the optimiser's state: moments as their parameters, all else replicated."""
    state = jax.eval_shape(optimizer.init, params)
    return optax.tree_map_params(
        optimizer, lambda _, s: s, state, shardings, transform_non_params=lambda _: replicated(mesh)
    )


def gather(state: Any, at: Any) -> Any:
    """In a jitted function: gathers parameters or gradients on every device, except stacked blocks.

    `backbones.stacking.gathered` gathers each block when its turn comes, and says why.

    Args:
        state: a tree of parameters.
        at: their shardings, a tree like it.
    """

    def gathered(path: tuple[Any, ...], leaf: jax.Array, at: Any) -> jax.Array:
        if weights.is_stacked(path) or not isinstance(at, NamedSharding):
            return leaf
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(at.mesh, PartitionSpec()))

    return jax.tree_util.tree_map_with_path(gathered, state, at)


def mesh_of(shardings: Any) -> contextlib.AbstractContextManager:
    """In a jitted function: sets the mesh of a tree of shardings, if they have one."""
    at = jax.tree.leaves(shardings)[0]
    if isinstance(at, NamedSharding):
        return jax.sharding.use_abstract_mesh(at.mesh.abstract_mesh)
    return contextlib.nullcontext()


@contextlib.contextmanager
def gathered(state: Any, mesh: Mesh | None) -> Iterator[Any]:
    """In a jitted function: what a model that only computes features is merged from.

    In the context all parameters are gathered on every device of the mesh, stacked blocks one after
    another as they compute. See `backbones.stacking.gathered` for what happens without.

    Args:
        state: parameters and statistics, divided over the mesh.
        mesh: None leaves them as they are.
    """
    if mesh is None:
        yield state
        return
    at = jax.tree.map(lambda _: replicated(mesh), state)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield gather(state, at)


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's rows of a global batch as arrays divided over all devices."""
    sharding = batch_sharding(mesh)
    return {
        key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()
    }
