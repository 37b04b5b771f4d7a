"""The trace of a few steps, read back from the file that Perfetto and TensorBoard open."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from jaxdg.training.profile import parse_steps, profiled


def run(folder, steps, start, last):
    """Does the steps after `start` to `last`; returns the numbers of those in the trace, and the
    compiled functions in it.
    """
    step_fn = profiled(
        jax.jit(lambda state, batch: (state + batch @ batch, {"loss": jnp.sum(batch)})),
        steps,
        start,
        folder,
    )
    state = jnp.zeros((50, 50))
    for _ in range(start, last):
        state, metrics = step_fn(state, jnp.ones((50, 50)))
    assert float(state[0, 0]) == 50 * (last - start)
    assert float(metrics["loss"]) == 2500
    traces = list(folder.glob("plugins/profile/*/*.trace.json.gz"))
    assert len(traces) == len(list(folder.glob("plugins/profile/*/*.xplane.pb")))
    if not traces:
        return [], set()
    with gzip.open(traces[0]) as file:
        events = json.load(file)["traceEvents"]
    numbers = [
        int(event["args"]["step_num"]) for event in events if "step_num" in event.get("args", {})
    ]
    return sorted(set(numbers)), {
        event["args"]["hlo_module"] for event in events if "hlo_module" in event.get("args", {})
    }


def test_the_steps_asked_for_and_no_others(tmp_path):
    """Steps 3 and 4 of 6, with what the devices did in them."""
    numbers, modules = run(tmp_path, parse_steps("3:4", 6), 0, 6)
    assert numbers == [3, 4]
    assert any(module.startswith("jit") for module in modules)


def test_a_run_that_goes_on_leaves_out_what_lies_behind_it(tmp_path):
    """From step 4 on, `3:5` is step 5 alone, and `2:3` is nothing."""
    assert run(tmp_path / "some", parse_steps("3:5", 6), 4, 6)[0] == [5]
    assert run(tmp_path / "none", parse_steps("2:3", 6), 4, 6)[0] == []


def test_nothing_asked_for(tmp_path):
    """Then the step function is the one given."""

    def step_fn(state, batch):
        return (state, batch)

    assert profiled(step_fn, parse_steps(None, 6), 0, tmp_path) is step_fn


@pytest.mark.parametrize("text", ["3", "0:2", "4:3", "3:7", "a:b", "-1:2", "1:2:3"])
def test_what_names_no_steps_is_refused(text):
    """One line that says what is allowed."""
    with pytest.raises(
        ValueError,
        match=(
            rf"--profile_steps is '{text}'; allowed: FIRST:LAST, such as 10:12, from step 1 .*"
            r" last, 6"
        ),
    ):
        parse_steps(text, 6)
