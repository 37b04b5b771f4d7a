"""The worst images of a domain are those that sorting all of them gives."""

import numpy as np
import pytest

from jaxdg.evaluation.worst import Worst, worst_of


@pytest.mark.parametrize("images", [0, 2, 40])
def test_kept_are_the_first_of_a_sort(images):
    """In any order, judged by one process or by two: the lowest scores, of equal ones the first
    images; and few examples are made that are not kept.
    """
    rng = np.random.default_rng(images)
    scores = rng.integers(0, 8, images) / 8
    expected = sorted(range(images), key=lambda i: (scores[i], i))[:3]
    made = []

    def judge(some):
        worst = Worst(3)
        for i in some:
            worst.offer(float(scores[i]), i, lambda i=i: made.append(i) or {"i": i})
        return worst.kept()

    order = rng.permutation(images).tolist()
    one = judge(order)
    assert [example["i"] for example in worst_of(one, 3)] == expected
    assert len(made) <= 20
    two = judge(order[::2]) | judge(order[1::2])
    assert [example["i"] for example in worst_of(two, 3)] == expected
