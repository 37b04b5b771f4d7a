"""Mines edits of features against a frozen encoder, for training with `edits.on`.

    jaxdg mine --config clip_the_gap --out weights/diverse_weather_offsets.safetensors

The field `edits` of the configuration says what is mined, `model.weights` and `model.text_weights`
with what, and the images are those of `data.source`. No detector or decoder is needed. A killed
command goes on where it stopped. The file says what it was mined from, the losses before and after
for each prompt, and how far the edits move embeddings of other crops where each prompt points
(`alignment`, mean cosines). Training refuses a file that was mined for something else.

Controls show whether what was mined matters: directions at random of equal length, the channels of
each prompt in another order, and the statistics of corrupted pictures as they are:

    jaxdg mine --config C --control random --of FILE --out FILE2
    jaxdg mine --config C --control permuted --of FILE --out FILE2
    jaxdg mine --config C --control pictures --out FILE
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxdg import files, weights
from jaxdg.commands import command_line as cli
from jaxdg.commands import process as runtime
from jaxdg.commands.miner import STREAM, Miner, Show, Unfinished
from jaxdg.config import Config
from jaxdg.hub import runs as auto_weights
from jaxdg.methods import edits as edits_lib
from jaxdg.methods.edits import EditsOptions

CONTROLS = ("random", "permuted", "pictures")


def mine(
    config: Config,
    out: Path,
    console: Console,
    interrupt: cli.Interrupt,
    control: str | None = None,
) -> None:
    """Mines what a configuration says, or goes on with it.

    Args:
        config: checked, with the paths of weights.
        out: the file of edits.
        console: shows how far it is.
        interrupt: asks to save and stop.
        control: None, or "pictures".

    Raises:
        Stop: it was asked to.
        ValueError: settings or files that do not fit; `out` was mined for something else.
    """
    miner = Miner(config)
    job = miner.job(control)
    if out.exists():
        if {**edits_lib.about(out), **job} != edits_lib.about(out):
            raise ValueError(f"--out {out} is there, of another mining; give another name")
        console.print(f"{out} is mined already")
        report(edits_lib.about(out), console)
        return
    m = config.edits.mining
    kept = Unfinished(out, job, interrupt)
    if control is not None:
        edits, told = miner.pictures()
    else:
        offsets = config.edits.form == "offset"
        total = m.steps if offsets else len(miner.crops.spread(m.images))
        with shown(console, total) as show:
            edits, told = (miner.offsets if offsets else miner.styles)(kept, show)
    mined = {**job, **told}
    edits_lib.write(out, config.edits, edits, mined)
    kept.forget()
    report(mined, console)
    console.print(f"{out}: {config.edits.form} {list(edits.shape)}")


def derived(out: Path, of: Path, control: str, options: EditsOptions, seed: int) -> None:
    """Writes a control made of mined edits: random offsets of equal length, or permuted channels.

    Args:
        out: the file.
        of: mined edits.
        control: "random" or "permuted".
        options: their form.
        seed: of the draws.

    Raises:
        ValueError: `of` is of another form, or statistics are asked for at random.
    """
    mined = edits_lib.about(of)
    if mined["form"] != options.form:
        raise ValueError(f"--of {of} holds edits of the form {mined['form']}, not {options.form}")
    rng = np.random.default_rng((seed, STREAM, CONTROLS.index(control)))
    edits = np.array(weights.read(of)[edits_lib.MINED[options.form]])
    if control == "permuted":
        edits = np.stack([one[..., rng.permutation(one.shape[-1])] for one in edits])
    elif options.form == "offset":
        mean = edits.mean((1, 2), keepdims=True)
        drawn = rng.standard_normal(mean.shape).astype(np.float32)
        lengths = np.linalg.norm(mean, axis=-1, keepdims=True)
        edits = drawn * (lengths / np.linalg.norm(drawn, axis=-1, keepdims=True))
    else:
        raise ValueError(
            "--control random is of offsets; allowed with statistics: permuted and pictures, and"
            " --config.edits.mining.steps=0 for those of the source's own images"
        )
    mined |= {"control": control, "of_sha256": files.sha256(of)}
    mined |= {"loss_after": None, "alignment": None}
    edits_lib.write(out, options, edits, mined)


def report(mined: Mapping[str, Any], console: Console) -> None:
    """Prints a line for each prompt."""
    for i, prompt in enumerate(mined["prompts"]):
        row = mined["alignment"][i]
        rest = [value for j, value in enumerate(row) if j != i]
        losses = ""
        if mined["loss_before"]:
            losses = (
                f"loss {mined['loss_before'][prompt]:.4f} -> {mined['loss_after'][prompt]:.4f}, "
            )
        others = f"; others {min(rest):.3f} to {max(rest):.3f}" if rest else ""
        console.print(f"  {prompt}: {losses}cosine with its direction {row[i]:.3f}{others}")


class shown:
    """Shows how far a mining is: a bar on a terminal, elsewhere a line each tenth."""

    def __init__(self, console: Console, total: int):
        """`total` is the number of steps or images."""
        self.console = console
        self.total = total
        self.tenth = 0
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task("mining", total=total, note="")

    def __enter__(self) -> Show:
        self.bar.start()
        return self.show

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self, done: int, losses: Any) -> None:
        """Takes how much is done, and the prompts' losses, which may still be computed."""
        tenth = 10 * done // self.total
        if tenth == self.tenth and not self.console.is_terminal:
            return
        note = f"loss {float(np.mean(losses)):.4f}"
        if self.console.is_terminal:
            self.bar.update(self.task, completed=done, note=note)
        else:
            self.console.print(f"mined {done} of {self.total}: {note}")
        self.tenth = tenth


def main(arguments: Sequence[str]) -> None:
    """Mines as the flags say."""
    if len(arguments) > 1:
        raise ValueError(f"unexpected argument {arguments[1]!r}; see --help")
    config = _CONFIG.value
    if config is None:
        raise ValueError("--config FILE is needed, such as --config carla_edits")
    out = Path(_OUT.value)
    if out.suffix != ".safetensors":
        raise ValueError(f"--out is {out}; allowed: a file whose name ends in .safetensors")
    control = _CONTROL.value
    if (control in ("random", "permuted")) != (_OF.value is not None):
        raise ValueError("--of FILE goes with --control random or permuted, and only with these")
    console = cli.console()
    runtime.set_up()
    config.edits.check_mining(config, "edits")
    if _OF.value is not None:
        if out.exists():
            raise ValueError(f"--out {out} is there; give another name")
        derived(out, Path(_OF.value), str(control), config.edits, config.seed)
        console.print(f"{out}: {_OF.value}, {control}")
        return
    if control == "pictures" and (config.edits.form, config.edits.guide) != (
        "statistics",
        "images",
    ):
        raise ValueError(
            "--control pictures is of statistics; allowed with edits.form statistics and"
            " edits.guide images"
        )
    interrupt = cli.Interrupt()
    with interrupt.lifted():
        auto_weights.fetch(config, out.parent, console.print)
    try:
        mine(auto_weights.resolved(config), out, console, interrupt, control)
    except cli.Stop:
        console.print("stopped; the same command goes on")


if __name__ == "__main__":
    _CONFIG = cli.define_config()
    _OUT = cli.define_path(
        "out", "File for the edits; its name ends in .safetensors.", required=True
    )
    _CONTROL = flags.DEFINE_enum(
        "control",
        None,
        CONTROLS,
        "A control instead: random directions or permuted channels of the edits --of a file, or"
        " statistics of corrupted pictures.",
    )
    _OF = cli.define_path("of", "File of mined edits that a control is made of.")
    cli.run(main)
