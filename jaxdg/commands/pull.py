"""A packed model from a shared folder, or from the Hugging Face hub, to a folder here.

    jaxdg pull /shared/models/streets --out models
    jaxdg pull hf://OWNER/REPO/streets.safetensors --out models

The file is verified. What a branch of the hub has now is fetched, whatever the cache holds; a
download that was cut goes on.
"""

from collections.abc import Sequence
import os
from pathlib import Path
import shutil

from jaxdg import files
from jaxdg.commands import command_line as cli
from jaxdg.commands import model_card, shelf
from jaxdg.config import paths
from jaxdg.hub import huggingface
from jaxdg.tasks import packed


def pull(source: str, out: Path) -> Path:
    """Brings a packed model into a folder; returns its path there.

    Args:
        source: a packed model, the folder of one on a shelf, or hf://OWNER/REPO[@REVISION]/FILE.
        out: the folder; made if needed.

    Raises:
        FileNotFoundError: no such model.
        ValueError: it is no packed model or damaged, or a file of its name is there.
        OSError: it cannot be fetched or written.
    """
    of_hub = source.startswith(paths.HUB)
    origin = Path(huggingface.parsed(source).file) if of_hub else shelf.taken(Path(source))
    target = out / origin.name
    if target.exists():
        raise ValueError(f"{target} is there already; give another --out, or remove it")
    if not of_hub:
        packed.read(origin)
    out.mkdir(parents=True, exist_ok=True)
    unfinished = out / f".{origin.name}.pull"  # what a cut download left is kept for the next
    unfinished.mkdir(exist_ok=True)
    with files.naming(target):
        if of_hub:
            partial = huggingface.fetched(source, unfinished / origin.name)
        else:
            partial = Path(shutil.copyfile(origin, unfinished / origin.name))
    try:
        packed.read(partial)
        packed.verify(partial)
        os.replace(partial, target)
    finally:
        shutil.rmtree(unfinished)
    return target


def main(arguments: Sequence[str]) -> None:
    """Pulls the model that the arguments name."""
    if len(arguments) != 2:
        raise ValueError(
            f"name one model: jaxdg pull FOLDER/NAME, or jaxdg pull {huggingface.FORM}"
        )
    target = pull(paths.given(arguments[1], "the model", hub=True), Path(_OUT.value))
    card = packed.read(target).card
    print(f"{target}: {card['encoder']} with {card['decoder']}, trained on {card['source']}")
    if terms := model_card.licences(card):
        print(f"licence of what it started from: {', '.join(terms)}")


if __name__ == "__main__":
    _OUT = cli.define_path("out", "Folder for the model; the current one if left out.", default=".")
    cli.run(main)
