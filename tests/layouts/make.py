"""The checkpoint folders of `configurations.toml`: `cd tests && python -m layouts.make DIR [NAMES...]` writes them.

Each is a Hugging Face folder of a tiny model (two layers, about two megabytes), the same bytes on every machine.
"""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

from layouts import compressed, faulty, floats, integers, others
from layouts.checkpoint import Checkpoint

MADE: dict[str, Callable[[], Checkpoint]] = {
    **others.MADE, **integers.MADE, **compressed.MADE, **floats.MADE, **faulty.MADE,
}  # fmt: skip


def make(names: Iterable[str] | None, folder: Path) -> dict[str, Path]:
    """Write configurations as `folder/NAME` and say where each lies; None: all of them.

    Raises:
        KeyError: a name that is not known; nothing is written then.
        FileExistsError: such a folder is there already.
    """
    makers = {name: MADE[name] for name in (MADE if names is None else names)}
    found: dict[str, Path] = {}
    for name, maker in makers.items():
        found[name] = folder / name
        found[name].mkdir(parents=True)
        maker().write(found[name])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m layouts.make", description="Write checkpoint folders.")
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("names", nargs="*", metavar="NAME", help="of configurations.toml; none: all")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in MADE]:
        parser.error(f"no such configuration: {', '.join(unknown)} (README.md lists them)")
    for name, path in make(arguments.names or None, arguments.folder).items():
        print(f"{name}: {path}")


if __name__ == "__main__":
    main()
