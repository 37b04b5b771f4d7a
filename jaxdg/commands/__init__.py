"""The commands, what they share, and the table of all of them behind `jaxdg COMMAND`."""

import runpy
import sys

from jaxdg.commands.closed_pipe import ends_quietly

# A module that runs as a program, and what it does; `python -m MODULE` is the same command.
COMMANDS = {
    "train": ("jaxdg.train", "trains, or goes on where a killed run stopped"),
    "evaluate": ("jaxdg.evaluate", "judges a trained model on domains it never saw"),
    "predict": ("jaxdg.predict", "label maps or boxes of images, and overlays"),
    "check": ("jaxdg.commands.check", "says what is in a data root and what is broken"),
    "prepare": ("jaxdg.commands.prepare", "writes datasets as records"),
    "weights": ("jaxdg.hub.command", "fetches and lists published weights by name"),
    "convert": ("jaxdg.conversion.convert", "converts public checkpoints to ours and back"),
    "mine": ("jaxdg.commands.mine", "finds edits of features that training draws from"),
    "submit": ("jaxdg.commands.submit", "writes predictions as the test servers expect them"),
    "pack": ("jaxdg.commands.pack", "writes a trained model as one file"),
    "push": ("jaxdg.commands.push", "puts a packed model into a shared folder, or on the hub"),
    "pull": ("jaxdg.commands.pull", "brings a packed model here"),
    "genotype": ("jaxdg.commands.genotype", "writes what a search of a box head has found"),
    "export": ("jaxdg.commands.export", "writes a trained model as StableHLO"),
    "plan": ("jaxdg.commands.plan", "tells memory and step time on devices that are not here"),
    "report": ("jaxdg.studies.report", "shows a run, or studies, as one page"),
    **{
        f"study {name}": (f"jaxdg.studies.{name}", f"the study of {what}")
        for name, what in (
            ("pretraining", "encoders, tuned or frozen"),
            ("freezing", "how many blocks to freeze"),
            ("corruptions", "what is left under corruptions"),
            ("methods", "adapters, averages and decoders under one budget"),
            ("transfer", "how far a model carries from each source to each target"),
            ("seeds", "how much is chance"),
        )
    },
}


def main() -> None:
    """The program `jaxdg`: runs the command that its arguments name."""
    with ends_quietly():
        _run(sys.argv[1:])


def _run(arguments: list[str]) -> None:
    words = 2 if arguments[:1] == ["study"] else 1
    name = " ".join(arguments[:words])
    if name in COMMANDS:
        sys.argv = [f"jaxdg {name}", *arguments[words:]]
        runpy.run_module(COMMANDS[name][0], run_name="__main__", alter_sys=True)
        return
    width = max(map(len, COMMANDS))
    print("jaxdg COMMAND ...   (jaxdg COMMAND --help lists its flags)\n")
    print("\n".join(f"  {command:{width}}  {what}" for command, (_, what) in COMMANDS.items()))
    if name not in ("", "--help", "-h", "help"):
        print(f"\nerror: {name!r} is not a command", file=sys.stderr)
        sys.exit(1)
