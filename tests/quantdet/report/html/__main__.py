"""Render a page again: `python -m quantdet.report.html DIR` (or the path of its cases.jsonl)."""

import sys
from pathlib import Path

from quantdet.report.html import data, render


def main(args: list[str]) -> int:
    if len(args) != 1 or args[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    given = Path(args[0])
    try:
        print(render(given / data.CASES if given.is_dir() else given))
    except (OSError, data.DataError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
