"""What tables of related checkpoints share: one publisher's layout made from another's, and
projections that are kept apart.
"""

from collections.abc import Iterable

import numpy as np

from jaxdg.conversion.mapping import Layout, Row, Transform

# Kernels and biases of query, key and value, each a tensor in torch's axes, side by side.
APART_KERNELS = Transform(
    lambda *parts: np.concatenate([part.T for part in parts], axis=-1),
    lambda fused: tuple(part.T for part in np.split(fused, 3, axis=-1)),
)
APART_BIASES = Transform(
    lambda *parts: np.concatenate(parts), lambda fused: tuple(np.split(fused, 3))
)


def renamed(
    rows: Iterable[Row],
    name: str,
    pairs: Iterable[tuple[str, str]],
    left_out: Iterable[tuple[str, str]],
    prefix: str = "",
) -> Layout:
    """A layout of the same tensors by other names.

    Args:
        rows: of the layout that it is made from.
        name: of the new one.
        pairs: what is replaced in source names, and by what, one after the other.
        left_out: as of `Layout`, by the new names.
        prefix: put before every source name.
    """

    def new(source: str) -> str:
        for theirs, others in pairs:
            source = source.replace(theirs, others)
        return prefix + source

    pairs = tuple(pairs)
    return Layout(
        name,
        tuple(row._replace(source=tuple(map(new, row.source))) for row in rows),
        tuple(left_out),
    )
