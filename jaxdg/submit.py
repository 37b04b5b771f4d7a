"""The name that `jaxdg submit` had before: `python -m jaxdg.submit`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("jaxdg.commands.submit", run_name="__main__", alter_sys=True)
