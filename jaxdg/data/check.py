"""The name that `jaxdg check` had before: `python -m jaxdg.data.check`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("jaxdg.commands.check", run_name="__main__", alter_sys=True)
