"""Genotypes, which a search of cells finds: from its weights, from files, and drawn at random.

A cell has two inputs and four nodes, as in DARTS (Liu et al. 2019). A node is the sum of operations
on two earlier states; states 0 and 1 are the inputs, state 2 + i is node i. A genotype names the
operation and the state of each: eight pairs, two a node.
"""

import json
from pathlib import Path
from typing import Any

from jaxtyping import Float
import numpy as np

OPERATIONS = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
NODES = 4
EDGES = sum(2 + node for node in range(NODES))
KEY = "reduce"  # of the pairs in a file; both cells halve their maps

Genotype = tuple[tuple[str, int], ...]


def discretised(weights: Float[np.ndarray, "14 8"]) -> Genotype:
    """The genotype of a search: of each node the two edges whose best operations weigh most.

    "none" is never the best. Equal weights go by order.

    Args:
        weights: of the operations of each edge, softmax over `OPERATIONS`; the edges of node 0 from
            states 0 and 1, of node 1 from states 0 to 2, ...
    """
    best = 1 + np.argmax(weights[:, 1:], axis=1)
    most = np.max(weights[:, 1:], axis=1)
    pairs = []
    start = 0
    for node in range(NODES):
        edges = most[start : start + 2 + node]
        for state in np.argsort(-edges, kind="stable")[:2].tolist():
            pairs.append((OPERATIONS[best[start + state]], state))
        start += len(edges)
    return tuple(pairs)


def drawn(seed: int) -> Genotype:
    """A genotype drawn at random: the control of a search."""
    random = np.random.default_rng(seed)
    pairs = []
    for node in range(NODES):
        for state in random.choice(2 + node, 2, replace=False).tolist():
            pairs.append((OPERATIONS[random.integers(1, len(OPERATIONS))], state))
    return tuple(pairs)


def resolved(genotype: Genotype | str | None, name: str) -> Genotype | None:
    """A genotype as a tuple of pairs.

    Args:
        genotype: pairs, a file that `jaxdg genotype` wrote, or pairs as a JSON list; None is none.
        name: of the setting, for the message.

    Raises:
        ValueError: it is no genotype; the message says what is wrong with it.
        FileNotFoundError: no such file.
    """
    if genotype is None:
        return None
    if isinstance(genotype, str):
        if not genotype.lstrip().startswith("["):
            path = Path(genotype).expanduser()
            name, genotype = str(path), path.read_text(encoding="utf-8")
        genotype = _of_json(genotype, name)
    return checked(genotype, name)


def _of_json(text: str, name: str) -> Any:
    """The list of pairs in a JSON list, or behind the key of a JSON object."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is no JSON ({error}); write one with jaxdg genotype") from None
    if isinstance(found, dict):
        if KEY not in found:
            raise ValueError(f"{name} has no {KEY!r}; write one with jaxdg genotype")
        found = found[KEY]
    return found


def checked(pairs: Any, name: str) -> Genotype:
    """A genotype whose pairs make a cell.

    Args:
        pairs: of operation and state.
        name: where they are from, for the message.

    Raises:
        ValueError: another number of pairs, an unknown operation, or a state that a node cannot
            read.
    """
    wanted = f"{2 * NODES} pairs of operation and input, two for each of {NODES} nodes"
    if not isinstance(pairs, (list, tuple)):
        raise ValueError(f"{name} is {pairs!r}; allowed: {wanted}")
    if len(pairs) != 2 * NODES:
        raise ValueError(f"{name} has {len(pairs)} pairs; allowed: {wanted}")
    good = []
    for i, pair in enumerate(pairs):
        node = i // 2
        where = f"pair {i} of {name}, of node {node},"
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError(f"{where} is {pair!r}; allowed: an operation and an input")
        operation, state = pair
        if operation not in OPERATIONS[1:]:
            raise ValueError(
                f"{where} has the unknown operation {operation!r}; allowed:"
                f" {', '.join(OPERATIONS[1:])}"
            )
        if not isinstance(state, int) or not 0 <= state < 2 + node:
            raise ValueError(f"{where} reads input {state!r}; allowed: 0 to {1 + node}")
        if i % 2 and good[-1][1] == state:
            raise ValueError(f"{where} reads input {state} as the pair before; allowed: another")
        good.append((operation, state))
    return tuple(good)
