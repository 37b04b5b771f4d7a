"""`python -m jaxdg.studies.report`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("jaxdg.studies.report.report", run_name="__main__", alter_sys=True)
