"""The name that `jaxdg plan` had before: `python scripts/plan.py`."""

from pathlib import Path
import runpy
import sys

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    runpy.run_module("jaxdg.commands.plan", run_name="__main__", alter_sys=True)
