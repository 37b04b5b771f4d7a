"""The tables of benchmarks/RESULTS.md from what scripts/gpu_session.sh measured.

    python scripts/gpu_table.py OUT.jsonl [--plan PLAN.json]

A plan is what `jaxdg plan --compile_for CARD --json PLAN.json` predicted for the same step: its
parts then stand beside the measured ones.
"""

import argparse
import json
from pathlib import Path
from typing import Any

Record = dict[str, Any]

# The names of scripts/benchmark.py's parts, forward and backward, and of a plan's.
PARTS = {
    "encoder, both": ("encoder",),
    "pyramid, both": ("pyramid",),
    "pixel decoder, both": ("pixel decoder",),
    "transformer decoder, both": ("decoder",),
    "losses with matching, both": ("losses", "matching"),
    "optimiser": ("optimiser",),
    "distortion and normalisation": ("input preparation",),
}


def speeds(records: list[Record]) -> str:
    """A row for every step and inference, beside PyTorch's where it was measured."""
    rows = [
        "| measured | images a step | ms | images/s | MFU | PyTorch, ms | ours / PyTorch |",
        "|---|---|---|---|---|---|---|",
    ]
    for record in records:
        if record["mode"] not in ("train_step", "inference"):
            continue
        peer = record.get("peer", {})
        cells = (
            f"{record['mode'].replace('_', ' ')}, {record['model']}, {record['dtype']}"
            + (", from files" if "input" in record else ""),
            record["shapes"]["batch_size"],
            record["ms"],
            record["images_per_s"],
            "" if record["mfu"] is None else f"{100 * record['mfu']:.0f} %",
            peer.get("ms", ""),
            record.get("ours_to_peer", ""),
        )
        rows.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(rows)


def parts(record: Record, plan: Record | None) -> str:
    """A row for each part of a step: measured alone, and predicted within the whole program."""
    rows = ["| part, forward and backward | measured, ms | predicted, ms |", "|---|---|---|"]
    predicted = plan["predicted"]["seconds_by_part"] if plan else {}
    for name, planned in PARTS.items():
        if name not in record["parts_ms"]:
            continue
        known = [1e3 * predicted[part] for part in planned if part in predicted]
        ms = f"{sum(known):.1f}" if known else ""
        rows.append(f"| {name.removesuffix(', both')} | {record['parts_ms'][name]} | {ms} |")
    whole = f"{1e3 * plan['predicted']['seconds']:.1f}" if plan else ""
    rows.append(f"| the whole step | {record['ms']} | {whole} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("measured", type=Path, help="JSON lines of scripts/gpu_session.sh")
    parser.add_argument("--plan", type=Path, help="JSON of `jaxdg plan --compile_for`")
    options = parser.parse_args()
    records = [json.loads(line) for line in options.measured.read_text().splitlines()]
    plan = json.loads(options.plan.read_text()) if options.plan else None
    first = records[0]
    versions = " ".join(f"{name} {version}" for name, version in first["versions"].items())
    print(f"On {first['device']}, {first['date']}, commit {first['commit']}, {versions}.\n")
    print(speeds(records))
    for record in records:
        if record["mode"] == "breakdown":
            print("\n" + parts(record, plan))
        if record["mode"] == "command":
            print(
                f"\nTraining on real images, `{record['command']}`: first step after"
                f" {record['first_step_s']} s, step {record['resident'][-1]['step']} or later after"
                f" {record['whole_s']} s."
            )


if __name__ == "__main__":
    main()
