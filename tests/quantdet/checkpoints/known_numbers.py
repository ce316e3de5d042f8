"""`python -m quantdet.checkpoints.known_numbers RECORDINGS...`: the numbers of checkpoints whose recordings do not tell them.

Observations tell their numbers since this suite decodes them. For older ones they are taken from a younger observation of the
same tensors in the same format, or from the checkpoint, built anew (`--build`), if its tensors have the recorded SHA-256.
"""

import argparse
import json
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from quantdet import checkpoints
from quantdet.matrix import load
from quantdet.observations.header import Header
from quantdet.observations.observation import HEADER_FILE, read_header

_ROOT = Path(__file__).resolve().parents[3]


def table(headers: Iterable[Header], build: Path | None, models: str) -> list[dict[str, str]]:
    """Rows of `fixtures/numbers.json`, sorted; what cannot be told is left out.

    Args:
        headers: of observations, with and without numbers.
        build: a cache of checkpoints, to build what no observation tells; None: build nothing.
        models: a glob; only the checkpoints of these are built.
    """
    told, silent = {}, []
    for header in headers:
        if header.evidence != "logits" or header.role == "control":
            continue
        if header.numbers:
            told[header.model, header.format, header.checkpoint_sha256] = header.numbers
        else:
            silent.append(header)
    rows = {}
    known = load.load(_ROOT / "quant_matrix.toml")
    for header in silent:
        key = header.model, header.format, header.checkpoint_sha256
        if key not in told and build is not None and fnmatchcase(header.model, models) and header.format in known.formats:
            made = checkpoints.resolve(header.model, known.models[header.model], known.formats[header.format], cache=build)
            if made.sha256 == header.checkpoint_sha256:
                told[key] = made.numbers
        if told.get(key, "").startswith(("decoded", "bytes")):
            rows[header.checkpoint_sha256, header.checkpoint_files_sha256] = told[key]
    return [{"tensors": tensors, "files": files, "numbers": rows[tensors, files]} for tensors, files in sorted(rows)]


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(prog="quantdet.checkpoints.known_numbers", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recordings", nargs="+", type=Path)
    parser.add_argument("--build", type=Path, metavar="CACHE", help="build here what no observation tells")
    parser.add_argument("--models", default="*", metavar="GLOB", help="build those of these models only")
    parser.add_argument("--out", type=Path, default=_ROOT / "fixtures" / "numbers.json")
    given = parser.parse_args()
    headers = [read_header(path.parent) for root in given.recordings for path in sorted(root.rglob(HEADER_FILE))]
    rows = table(headers, given.build, given.models)
    given.out.write_text(json.dumps({"schema": 1, "checkpoints": rows}, indent=1) + "\n", encoding="utf-8")
    print(f"{given.out}: {len(rows)} checkpoints")


if __name__ == "__main__":
    main()
