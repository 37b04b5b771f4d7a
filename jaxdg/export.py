"""The name that `jaxdg export` had before: `python -m jaxdg.export`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("jaxdg.commands.export", run_name="__main__", alter_sys=True)
