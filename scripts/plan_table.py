"""Compiles the training step of every recipe for GPUs that are not here, and prints a table.

    python scripts/plan_table.py --out FOLDER [--card h100] [--only TEXT]

Each row is one `jaxdg plan --compile_for`, whose JSON is kept in the folder and not made again, so
an interrupted table goes on. A large model takes some minutes. The extra `plan-cuda` is needed, and
for `gnas:augment` a genotype: `jaxdg genotype --random 0 --out genotype.json`.
"""

import argparse
import collections
import json
from pathlib import Path
import re
import subprocess
import sys
from typing import Any

BF16 = "--config.model.dtype=bfloat16"
UNROLL = "--config.model.unroll=True --config.model.mask2former.unroll=True"
WINDOWS = f"{BF16} --config.evaluation.batch_size=8 --config.evaluation.windows_per_call=24"
BOXES = f"{BF16} --config.evaluation.batch_size=8 --image 1024x2048"
DETECTORS = ("vltdet_eva02_l14", "vltdet_clip_rn101", "carla_vit_tiny")
METHODS = ("tuned", "rein", "soma", "vfmnet", "mgrnet", "tqdm")
# "plain" at the common size is vltdet_clip_rn101:clip_the_gap_720.
COMMON = ("clip_the_gap", "pddoc", "sdgod", "divalign", "gnas", "poda", "soma")
WEATHER = ("frozen", "soma", "frozen,faster_rcnn", "soma,faster_rcnn")
PDDOC = ("pddoc", "pddoc:released")
GNAS = ("gnas", "gnas:augment", "gnas:fc")
PODA = (
    "poda_detection:1",
    "poda_detection:2",
    "poda_detection:all",
    "poda_segmentation:source",
    "poda_segmentation:night",
)
LARGER = "--config.model.taps=() --config.model.encoder"
ONE = [(1, "data=1,fsdp=1")]
EIGHT = [(8, "data=8,fsdp=1"), (8, "data=1,fsdp=8"), (8, "data=4,fsdp=2")]
HOSTS = [(64, "data=8,fsdp=8")]
BOTH = [*ONE, EIGHT[1]]
ALL = [*ONE, *EIGHT]
ROWS = [
    *[("gta5_eva02", f"{BF16} {UNROLL}", mesh) for mesh in ONE],
    *[("gta5_eva02", BF16, mesh) for mesh in ALL],
    *[("vltdet_eva02_l14", BF16, mesh) for mesh in ALL],
    *[("streets_tiny", "", mesh) for mesh in ALL],
    *[("streets_boxes", "", mesh) for mesh in ALL],
    *[("camvid_vit_tiny", "", mesh) for mesh in ALL],
    *[("carla_vit_tiny", "", mesh) for mesh in ALL],
    *[("vltdet_clip_rn101", BF16, mesh) for mesh in ALL],
    *[("vltdet_clip_rn101:c4_text", "", mesh) for mesh in ONE],
    *[(f"vltdet_clip_rn101:clip_the_gap{size}", "", ONE[0]) for size in ("", "_720")],
    *[(f"weather_dinov2:{choice}", "", ONE[0]) for choice in WEATHER],
    *[(recipe, "", ONE[0]) for recipe in ("clip_the_gap", *PDDOC, *GNAS, *PODA)],
    *[(f"weather_methods:{method},common", "", ONE[0]) for method in COMMON],
    *[("sdgod", "", mesh) for mesh in ONE],
    *[("sdgod", BF16, mesh) for mesh in ONE],
    *[("divalign", "", mesh) for mesh in ALL[:2]],
    *[("divalign", "--config.optimizer.accumulate=8", mesh) for mesh in ONE],
    *[("gta5_clip", BF16, mesh) for mesh in ALL],
    *[("gta5_eva02", f"{BF16} --config.tldr.on", mesh) for mesh in BOTH],
    *[("gta5_eva02", f"{BF16} --config.model.freeze=all", mesh) for mesh in ONE],
    *[("gta5_eva02", f"{BF16} --config.model.remat=True", mesh) for mesh in ONE],
    *[("gta5_ldm", BF16, mesh) for mesh in ONE],
    *[("gta5_ldm", f"{BF16} --config.model.freeze=none", mesh) for mesh in ONE],
    *[("gta5_eva02_repro", BF16, mesh) for mesh in ALL],
    *[("cityscapes_eva02", BF16, mesh) for mesh in ALL],
    *[("gta5_eva02", "", mesh) for mesh in BOTH],
    *[("gta5_clip", "", mesh) for mesh in ONE],
    *[(f"gta5_methods:{method}", "", ONE[0]) for method in METHODS],
    *[(f"gta5_methods:{method}", BF16, ONE[0]) for method in METHODS],
    *[("camvid_clip_zero_shot", "", mesh) for mesh in ONE],
    *[("cityscapes_test_server", BF16, mesh) for mesh in ONE],
    *[("study_tiny", "", mesh) for mesh in ONE],
    # Inference: label maps by windows, and boxes.
    *[("gta5_eva02", f"{WINDOWS} --image {size}", ONE[0]) for size in ("512x1024", "1024x2048")],
    *[("gta5_clip", f"{WINDOWS} --image {size}", ONE[0]) for size in ("512x1024", "1024x2048")],
    *[("gta5_eva02", f"{WINDOWS} --image 1024x2048", mesh) for mesh in BOTH[1:]],
    *[(recipe, BOXES, mesh) for recipe in DETECTORS for mesh in ONE],
    *[("vltdet_eva02_l14", BOXES, mesh) for mesh in BOTH[1:]],
    # Eight hosts of eight.
    *[("gta5_eva02", BF16, mesh) for mesh in HOSTS],
    *[("gta5_eva02", f"{BF16} {LARGER}=dinov2_g14", mesh) for mesh in HOSTS],
    *[
        ("gta5_eva02", f"{BF16} --config.model.remat=True {LARGER}={encoder}", mesh)
        for encoder in ("eva_clip_8b", "eva_clip_18b")
        for mesh in HOSTS
    ],
]


def command(card: str, recipe: str, options: str, devices: int, mesh: str) -> list[str]:
    """What makes a row, without its output."""
    words = ["plan", "--config", recipe, "--compile_for", card, "--devices", str(devices)]
    return [*words, *(["--mesh", mesh] if devices > 1 else []), *options.split()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the plans")
    parser.add_argument("--card", default="h100")
    parser.add_argument("--only", default="", help="rows whose command holds this text")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    print(
        "| recipe, options | arguments, GB | temporaries, GB | fits | predicted, ms | images/s |"
        " kernels | sent, GB |\n|---|---|---|---|---|---|---|---|"
    )
    for recipe, extra, (devices, mesh) in ROWS:
        words = command(options.card, recipe, extra, devices, mesh)
        if options.only not in " ".join(words):
            continue
        path = options.out / (re.sub(r"[^\w.=]+", "_", " ".join(words)) + ".json")
        if not path.exists():
            run = [sys.executable, "-m", "jaxdg", *words, "--json", str(path)]
            result = subprocess.run(run, capture_output=True, text=True, check=False)
            if result.returncode:
                last = (result.stderr.strip() or result.stdout.strip()).splitlines()[-1]
                print(f"| `{short(words)}` | {last} | | | | | | |", flush=True)
                continue
        print(row(words, json.loads(path.read_text())), flush=True)


def short(words: list[str]) -> str:
    """A command without what all rows have; `--..` stands for `--config.model.`."""
    text = " ".join(words[2:]).replace("--config.model.", "--..").replace(" --devices 1", "")
    return re.sub(r" --compile_for \w+", "", text)


def row(words: list[str], plan: dict[str, Any]) -> str:
    """The table's row of a plan; bytes and collectives are those of a device and step, images those
    of all devices.
    """
    size = plan["bytes"]
    sent = sum(collective["bytes_sent"] for collective in plan["collectives"])
    times: collections.Counter[str] = collections.Counter()
    for collective in plan["collectives"]:
        times[collective["kind"]] += collective["times"]
    kinds = ", ".join(f"{count:.0f} {kind}" for kind, count in times.items())
    cells = (
        f"`{short(words)}`",
        f"{size['arguments'] / 1e9:.2f}",
        f"{size['temporaries'] / 1e9:.2f}",
        "yes" if plan["fits"] else "**no**",
        f"{1e3 * plan['predicted']['seconds']:.1f}",
        f"{plan['images'][0] / plan['predicted']['seconds']:,.0f}",
        f"{plan['predicted']['kernels']:,.0f}",
        f"{sent / 1e9:.2f}" + (f" ({kinds})" if kinds else ""),
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
