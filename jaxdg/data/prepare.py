"""The name that `jaxdg prepare` had before: `python -m jaxdg.data.prepare`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("jaxdg.commands.prepare", run_name="__main__", alter_sys=True)
