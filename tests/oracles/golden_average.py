"""Makes tests/golden/average.npz: mmengine's moving average and schedules, and mmcv 1's schedule.

Run by hand where torch, mmengine (0.10.7) and mmcv (1.7.2, which needs no compiled operations) are
installed:

    python tests/oracles/golden_average.py

Rates and weight decays of each step for three groups of parameters, an average over steps by
EMAHook, and AdamW with all of it at once. Everything is computed in float64.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mmcv.runner.hooks.lr_updater import (  # pyright: ignore[reportMissingImports]
    PolyLrUpdaterHook,
)
from mmengine.hooks import EMAHook  # pyright: ignore[reportMissingImports]
from mmengine.optim.scheduler import (  # pyright: ignore[reportMissingImports]
    CosineAnnealingParamScheduler,
    LinearLR,
    PolyLR,
)
import numpy as np
import torch  # pyright: ignore[reportMissingImports]

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
STEPS = 20  # of a run
WARMUP = 4
WARMUP_FACTOR = 0.01
PEAK = 1e-3
FLOOR = 1e-5  # of the learning rate
POWER = 0.9
BETAS = (0.8, 0.9)  # float32 holds their bias corrections well from the first step
DECAY = 0.05
FINAL_DECAY = 1e-5
RATE_FACTORS = (1.0, 0.1, 0.001)  # the last group begins below the floor
DECAY_FACTORS = (1.0, 2.0, 0.0)
START = 4  # of the average
MOMENTUM = 0.3
AVERAGED = 12  # steps
ADAMW = 8  # steps
SHAPE = (5, 3)


def adamw(values: list[np.ndarray]) -> tuple[list[Any], torch.optim.Optimizer]:
    """Parameters, each a group with rates of its own, and their optimiser."""
    parameters = [torch.nn.Parameter(torch.tensor(value)) for value in values]
    groups = [
        {"params": [parameter], "lr": PEAK * rate, "weight_decay": DECAY * decay}
        for parameter, rate, decay in zip(parameters, RATE_FACTORS, DECAY_FACTORS, strict=True)
    ]
    return parameters, torch.optim.AdamW(groups, betas=BETAS, eps=1e-8)


def schedules(optimizer: Any, steps: int, warmup: int, floor: float) -> list[Any]:
    """The schedules of a run, by mmengine."""
    first = (
        [LinearLR(optimizer, WARMUP_FACTOR, begin=0, end=warmup, by_epoch=False)] if warmup else []
    )
    return [
        *first,
        PolyLR(optimizer, floor, POWER, begin=warmup, end=steps, by_epoch=False),
        CosineAnnealingParamScheduler(
            optimizer, "weight_decay", eta_min=FINAL_DECAY, begin=0, end=steps, by_epoch=False
        ),
    ]


def scheduled(warmup: int, floor: float) -> tuple[np.ndarray, np.ndarray]:
    """Rates and weight decays by mmengine, each [steps, groups]."""
    parameters, optimizer = adamw([np.zeros(1)] * 3)
    for parameter in parameters:
        parameter.grad = torch.zeros(1, dtype=torch.float64)
    all_schedules = schedules(optimizer, STEPS, warmup, floor)
    rates = []
    decays = []
    for _ in range(STEPS):
        rates.append([group["lr"] for group in optimizer.param_groups])
        decays.append([group["weight_decay"] for group in optimizer.param_groups])
        optimizer.step()
        for schedule in all_schedules:
            schedule.step()
    return np.array(rates), np.array(decays)


def mmcv_rates() -> np.ndarray:
    """Rates by mmcv, [steps, groups]."""
    _, optimizer = adamw([np.zeros(1)] * 3)
    hook = PolyLrUpdaterHook(
        power=POWER,
        min_lr=FLOOR,
        by_epoch=False,
        warmup="linear",
        warmup_iters=WARMUP,
        warmup_ratio=WARMUP_FACTOR,
    )
    runner = SimpleNamespace(optimizer=optimizer, max_iters=STEPS)
    hook.before_run(runner)
    rates = []
    for step in range(STEPS):
        runner.iter = step
        hook.before_train_iter(runner)
        rates.append([group["lr"] for group in optimizer.param_groups])
    return np.array(rates)


def hook_on(model: Any, start: int) -> tuple[EMAHook, SimpleNamespace]:
    """The hook of mmengine as a run begins, and the part of a runner that it reads."""
    hook = EMAHook(begin_iter=start, momentum=MOMENTUM)
    runner = SimpleNamespace(model=model, iter=0)
    hook.before_run(runner)
    return hook, runner


def averages(weights: np.ndarray, start: int) -> np.ndarray:
    """The average by mmengine after each of the steps whose weights are given."""
    model = torch.nn.Linear(1, weights.shape[1], bias=False, dtype=torch.float64)
    hook, runner = hook_on(model, start)
    found = []
    for step, value in enumerate(weights):
        model.weight.data = torch.tensor(value[:, None])
        runner.iter = step
        hook.after_train_iter(runner, step)
        found.append(hook.ema_model.module.weight.data.numpy()[:, 0].copy())
    return np.array(found)


def trained(
    values: list[np.ndarray], gradients: np.ndarray
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Parameters after each step of AdamW, and their averages."""
    parameters, optimizer = adamw(values)
    model = torch.nn.ParameterList(parameters)
    hook, runner = hook_on(model, START)
    all_schedules = schedules(optimizer, len(gradients), 2, FLOOR)
    after = []
    average = []
    for step, gradient in enumerate(gradients):
        for parameter, g in zip(parameters, gradient, strict=True):
            parameter.grad = torch.tensor(g)
        optimizer.step()
        runner.iter = step
        hook.after_train_iter(runner, step)
        for schedule in all_schedules:
            schedule.step()
        after.append(np.stack([p.detach().numpy().copy() for p in parameters]))
        average.append(np.stack([p.detach().numpy().copy() for p in hook.ema_model.module]))
    return after, average


def main() -> None:
    """Writes the golden file."""
    rng = np.random.default_rng(0)
    weights = np.cumsum(rng.normal(size=(AVERAGED, 6)), axis=0)
    values = [rng.normal(size=SHAPE) for _ in RATE_FACTORS]
    gradients = rng.normal(size=(ADAMW, len(values), *SHAPE))
    rates, decays = scheduled(WARMUP, FLOOR)
    after, average = trained(values, gradients)
    np.savez_compressed(
        GOLDEN / "average.npz",
        mmengine_rates=rates,
        mmengine_plain_rates=scheduled(0, 0.0)[0],
        mmcv_rates=mmcv_rates(),
        decays=decays,
        weights=weights,
        averages=averages(weights, START),
        averages_from_0=averages(weights, 0),
        averages_from_1=averages(weights, 1),
        values=np.stack(values),
        gradients=gradients,
        trained=np.stack(after),
        trained_averages=np.stack(average),
    )


if __name__ == "__main__":
    main()
