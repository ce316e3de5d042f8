"""Packs a recording: the arrays of a model's observations on one hardware into one compressed file, in place.

    python -m quantdet.observations.pack DIR [--unpack]

Headers stay as they are, folders too, and a packed recording is replayed, re-executed and copied as a plain one. The same
arrays give the same file. `--unpack` gives every observation its `tensors.safetensors` back, bit for bit. Observations that are
added to a packed recording (`--record`) lie there in the plain form until it is packed again. Everything is read and checked
first: whatever is wrong is a line on stderr and exit code 2, and then nothing is written.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from quantdet.observations import packed
from quantdet.observations.observation import TENSORS_FILE, Observation, ObservationError, payload_of
from quantdet.observations.store import Store


def groups(root: Path) -> dict[Path, list[Observation]]:
    """The observations below `root` that have arrays, by the packed file in which these belong.

    Raises:
        ObservationError: an observation is damaged, or none is there, or one does not lie as in a recording.
    """
    everything = Store(root).all()
    if not everything:
        raise ObservationError(f"{root}: no observation in this folder")
    found: dict[Path, list[Observation]] = {}
    for one in everything:
        assert one.path is not None
        path = packed.path_of(one.path, one.header)
        # Deeper or higher, the packed file would lie outside, with arrays of observations that were not read.
        if path is None or len(one.path.relative_to(root).parts) != 5:
            raise ObservationError(f"{one.path}: is not HARDWARE/ENVIRONMENT/MODEL/FORMAT/KEY below {root}")
        if one.prompts:
            found.setdefault(path, []).append(one)
    return found


def pack(root: Path) -> list[str]:
    """Pack the recording `root`; a line about each packed file.

    Raises:
        ObservationError, OSError: it cannot be packed.
    """
    contents = {}
    for path, observations in groups(root).items():
        content = packed.content({one.header.tensors_sha256: _payload(one) for one in observations})
        if len(content) > packed.MAX_UNPACKED_BYTES:
            raise ObservationError(f"{path}: would unpack to {len(content)} bytes, at most {packed.MAX_UNPACKED_BYTES}")
        contents[path] = (content, observations)
    told = []
    for path, (content, observations) in contents.items():
        blob = packed.compress(content)
        packed.put(path, blob)
        assert content == packed.content({name: array.tobytes() for name, array in packed.read(path).items()})
        for one in observations:
            _plain(one).unlink(missing_ok=True)
        told.append(f"{path.relative_to(root)}: {len(observations)} observations, {len(content)} bytes in {len(blob)}")
    return told


def unpack(root: Path) -> list[str]:
    """Give every observation of the recording `root` its arrays back; a line about each packed file.

    Raises:
        ObservationError, OSError: it cannot be unpacked.
    """
    told = []
    for path, observations in groups(root).items():
        lacking = [one for one in observations if not _plain(one).exists()]
        for one in lacking:
            packed.put(_plain(one), _payload(one))
        path.unlink(missing_ok=True)
        told.append(f"{path.relative_to(root)}: {len(lacking)} observations have their arrays back")
    return told


def _plain(one: Observation) -> Path:
    assert one.path is not None
    return one.path / TENSORS_FILE


def _payload(one: Observation) -> bytes:
    assert one.path is not None
    return payload_of(one.path, one.header)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="quantdet.observations.pack", description="Pack the arrays of a recording into one file a model, in place."
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="recording, as for pytest --replay=DIR")
    parser.add_argument("--unpack", action="store_true", help="give every observation its arrays back")
    given = parser.parse_args(arguments)
    try:
        folder = given.folder.resolve()
        told = unpack(folder) if given.unpack else pack(folder)
    except (ObservationError, OSError) as error:
        print(f"{parser.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print("\n".join(told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
