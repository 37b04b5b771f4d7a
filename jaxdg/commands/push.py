"""A packed model to a shared folder, or to the Hugging Face hub.

    jaxdg push streets.safetensors /shared/models
    jaxdg push streets.safetensors hf://OWNER/REPO

A shared folder gets STREETS/streets.safetensors with a page about it, and a table of all models
that were pushed there. The hub gets the file and the page, in a repository that is made if there is
none, private unless --public. It needs the extra `hub` (`pip install "jaxdg[hub]"`), and HF_TOKEN
or `hf auth login`.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from jaxdg import files
from jaxdg.commands import command_line as cli
from jaxdg.commands import model_card, shelf
from jaxdg.config import paths
from jaxdg.hub import huggingface
from jaxdg.tasks import packed


def to_hub(file: Path, name: huggingface.Name, public: bool) -> str:
    """Writes a packed model and its page to a repository of the hub; returns the model's name
    there.

    Raises:
        ValueError: the library of the hub is missing.
        OSError: the hub does not take it.
    """
    try:
        import huggingface_hub as hub  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            'the Hugging Face hub needs the extra hub: pip install "jaxdg[hub]"'
        ) from error
    target = name.file or file.name
    at = "" if name.revision == huggingface.MAIN else f"@{name.revision}"
    full = f"{paths.HUB}{name.repo}{at}/{target}"
    whole = packed.read(file)
    page = model_card.page(whole, target, full, files.sha256(file), file.stat().st_size)
    api = hub.HfApi(token=huggingface.token())
    api.create_repo(name.repo, private=not public, exist_ok=True)
    api.create_commit(
        name.repo,
        [
            hub.CommitOperationAdd(target, file),
            hub.CommitOperationAdd("README.md", page.encode()),
        ],
        commit_message=f"{target}, packed by jaxdg",
        revision=name.revision,
    )
    return full


def main(arguments: Sequence[str]) -> None:
    """Pushes the model that the arguments name."""
    if len(arguments) != 3:
        raise ValueError(
            "name a packed model and where it goes: jaxdg push FILE.safetensors FOLDER, or"
            f" {paths.HUB}OWNER/REPO"
        )
    file = Path(paths.given(arguments[1], "the model"))
    target = paths.given(arguments[2], "where it goes", hub=True)
    packed.read(file)  # fails early if it is none
    packed.verify(file)
    if target.startswith(paths.HUB):
        print(f"pushed {to_hub(file, huggingface.parsed(target), _PUBLIC.value)}")
        return
    console = cli.console()
    print(f"pushed {shelf.put(file, Path(target), console.print)}")


if __name__ == "__main__":
    _PUBLIC = flags.DEFINE_bool("public", False, "A repository that is made is public.")
    cli.run(main)
