"""The commands beside the three verbs, what all of them share, and the one table of them behind
`jaxdg COMMAND`.
"""

import runpy
import sys

# Each is a module that runs as a program; `python -m MODULE` is the same command.
COMMANDS = {
    "train": ("jaxdg.train", "trains, or goes on where a killed run stopped"),
    "evaluate": ("jaxdg.evaluate", "judges a trained model on domains it never saw"),
    "predict": ("jaxdg.predict", "label maps or boxes of images, and overlays"),
    "check": ("jaxdg.commands.check", "says what is in a data root and what is broken"),
    "prepare": ("jaxdg.commands.prepare", "writes datasets as records"),
    "convert": ("jaxdg.conversion.convert", "converts public checkpoints to ours and back"),
    "submit": ("jaxdg.commands.submit", "writes predictions as the test servers expect them"),
    "export": ("jaxdg.commands.export", "writes a trained model as StableHLO"),
    "plan": ("jaxdg.commands.plan", "tells memory and step time on devices that are not here"),
    "report": ("jaxdg.studies.report", "shows studies as one page"),
    **{
        f"study {name}": (f"jaxdg.studies.{name}", f"the study of {what}")
        for name, what in (
            ("pretraining", "encoders, tuned or frozen"),
            ("freezing", "how many blocks to freeze"),
            ("corruptions", "what is left under corruptions"),
            ("transfer", "how far a model carries from each source to each target"),
            ("seeds", "how much is chance"),
        )
    },
}


def main() -> None:
    """The program `jaxdg`: runs the command that its arguments name."""
    given = sys.argv[1:]
    words = 2 if given[:1] == ["study"] else 1
    name = " ".join(given[:words])
    if name not in COMMANDS:
        wide = max(map(len, COMMANDS))
        print("jaxdg COMMAND ...   (jaxdg COMMAND --help says more)\n")
        print("\n".join(f"  {command:{wide}}  {what}" for command, (_, what) in COMMANDS.items()))
        if name not in ("", "--help", "-h", "help"):
            print(f"\nerror: {name!r} is no command", file=sys.stderr)
            sys.exit(1)
        return
    sys.argv = [f"jaxdg {name}", *given[words:]]
    runpy.run_module(COMMANDS[name][0], run_name="__main__", alter_sys=True)
