"""What runs on a lent accelerator: in the time there is, the most valuable first, and its table."""

import json
from pathlib import Path
import subprocess
import sys

ROOT = Path(__file__).resolve().parents[2]
SESSION = ROOT / "scripts" / "gpu_session.sh"


def session(tmp_path, seconds, **environment):
    """What it says, and the command lines of the benchmarks that a stand-in for Python got."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\nexit ${{CODE:-0}}\n')
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", SESSION, tmp_path / "out.jsonl"],
        env={
            "PATH": "/usr/bin:/bin",
            "PYTHON": str(python),
            "SECONDS_IN_ALL": str(seconds),
            **environment,
        },
        capture_output=True,
        text=True,
        check=True,
    )
    asked = tmp_path / "asked"
    return done.stderr, asked.read_text().splitlines() if asked.exists() else []


def test_the_most_valuable_comes_first_and_failures_stop_nothing(tmp_path):
    said, asked = session(tmp_path, 720, DATA_ROOT="/data", CODE="3")
    assert [line.split()[1] for line in asked] == [
        "train_step",
        "inference",
        "command",
        "breakdown",
    ]
    assert "--peer torch" in asked[0]
    assert "--override data.root=/data --override model.weights=None" in asked[2]
    assert said.count("ended with code 3") == 4


def test_what_does_not_fit_is_left_out(tmp_path):
    said, asked = session(tmp_path, 29)
    assert asked == []
    assert "step is left out: 29 s are left of 29" in said
    said, asked = session(tmp_path, 60)
    assert "== step, at most 60 s: " in said
    assert "real is left out: DATA_ROOT is not given" in said
    assert len(asked) == 3


def test_the_table(tmp_path):
    """Every line that was measured is in it, parts beside their prediction."""
    common = {
        "date": "2026-11-29",
        "device": "NVIDIA H200",
        "commit": "abc",
        "versions": {"jax": "0.10.2"},
        "model": "eva02_clip_l14 + mask2former",
        "dtype": "bfloat16",
        "shapes": {"batch_size": 16},
        "images_per_s": 80.0,
        "mfu": 0.41,
        "ms": 200.0,
    }
    records = [
        {"mode": "train_step", **common, "peer": {"ms": 300.0}, "ours_to_peer": 0.67},
        {"mode": "breakdown", **common, "parts_ms": {"encoder, both": 110.0, "optimiser": 5.0}},
        {
            "mode": "command",
            **common,
            "command": "python scripts/benchmark.py command",
            "first_step_s": 50.0,
            "whole_s": 70.0,
            "resident": [{"step": 60, "bytes": 1}],
        },
    ]
    measured = tmp_path / "out.jsonl"
    measured.write_text("".join(json.dumps(record) + "\n" for record in records))
    plan = tmp_path / "plan.json"
    by_part = {"encoder": 0.115, "optimiser": 0.0059}
    plan.write_text(json.dumps({"predicted": {"seconds": 0.2036, "seconds_by_part": by_part}}))
    table = subprocess.run(
        [sys.executable, ROOT / "scripts" / "gpu_table.py", measured, "--plan", plan],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "On NVIDIA H200, 2026-11-29, commit abc, jax 0.10.2." in table
    row = "train step, eva02_clip_l14 + mask2former, bfloat16 | 16 | 200.0 | 80.0 | 41 % | 300.0"
    assert f"| {row} | 0.67 |" in table
    assert "| encoder | 110.0 | 115.0 |" in table
    assert "| optimiser | 5.0 | 5.9 |" in table
    assert "| the whole step | 200.0 | 203.6 |" in table
    assert "first step after 50.0 s, step 60 or later after 70.0 s" in table
