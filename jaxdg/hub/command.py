"""Published weights by name.

    jaxdg weights list
    jaxdg weights get eva02_clip_l14 eva02_clip_l14_text

`get` prints the paths of converted files: kept ones, or such as it fetches and converts now.
--config.model.weights=auto does the same for the encoder of a run, and
--config.model.text_weights=auto for its text tower. `list` shows what there is: kept already, to be
had by get, or by hand (download the file, then jaxdg convert).
"""

import argparse
import sys

from jaxdg.conversion import models
from jaxdg.hub import published, store


def listing() -> str:
    """Every model with published weights: name, megabytes, licence, how to get it, from where."""

    def how(name: str) -> str:
        if store.path_of(name).is_file():
            return "kept"
        try:
            published.of(name)
        except ValueError:
            return "by hand"
        return "get"

    return models.table([(*row[:3], how(row[0]), row[3]) for row in models.listed()])


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="jaxdg weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("list", help="show all models, and which of them are kept")
    get = commands.add_parser("get", help="fetch and convert weights, and print where they are")
    get.add_argument("names", metavar="NAME", nargs="+", help="a name that `list` shows")
    args = parser.parse_args(arguments)
    if args.command == "list":
        print(listing())
        return 0
    try:
        for name in args.names:
            print(store.get(name), flush=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the download", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
