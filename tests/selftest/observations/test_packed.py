"""Packed recordings: the same observations in fewer bytes, there and back; what is damaged or means harm is refused."""

import lzma
import os
import shutil
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from quantdet.matrix.cell import Cell
from quantdet.observations import packed
from quantdet.observations.claims import References
from quantdet.observations.observation import HEADER_FILE, TENSORS_FILE, Observation, ObservationError, read, write
from quantdet.observations.pack import main, pack, unpack
from quantdet.observations.store import Store, copy_into, key_of
from selftest.fakes.matrix import ROOT
from selftest.fakes.observation import observation

FUZZ = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
ENVIRONMENT = "vllm-1-torch-2-00000000"
ALPHA = "cpu-here/alpha.safetensors.xz"
FORMATS = ("bf16", "awq", "awq_marlin")


def add(root: Path, format_id: str, numerics: str = "", model: str = "alpha", environment: str = ENVIRONMENT) -> Path:
    """One observation in a recording; equal `numerics` are equal bits."""
    key = key_of({"of": [format_id, model, environment]})
    whole = observation(format_id, numerics=numerics or format_id, key=key, model=model)
    with Store(root).writing(whole.header.cell, environment, key) as folder:
        write(folder, whole.header, whole.prompts)
    return Store(root).place(whole.header.cell, environment, key)


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    """Three formats of one model, two of them with the same bits, and another model's."""
    root = tmp_path / "r"
    for format_id in FORMATS:
        add(root, format_id, format_id.partition("_")[0])
    add(root, "bf16", model="beta")
    return root


def bits(found: list[Observation]) -> list[tuple[str, list[bytes]]]:
    """What was observed: seals of headers, and every bit of every array."""
    return [(one.header.header_sha256, [output.fingerprint for p in one.prompts for output in p.outputs]) for one in found]


def files(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def refused(place: Path, *words: str) -> None:
    """Reading gives an ObservationError that names the packed file, and every one of `words`."""
    with pytest.raises(ObservationError) as caught:
        read(place)
    assert str(caught.value).startswith(str(place.parents[3] / "alpha.safetensors.xz"))
    assert [] == [word for word in words if word not in str(caught.value)], str(caught.value)


# ---------------------------------------------------------------------------------------------------- there and back


def test_a_packed_recording_is_the_same_recording(recording: Path) -> None:
    """Every observation, in the same order, bit for bit; headers stay, and each model has one file."""
    before, there = bits(Store(recording).all()), files(recording)

    told = pack(recording)

    assert before == bits(Store(recording).all())
    headers = {name for name in there if name.endswith(HEADER_FILE)}
    assert headers | {ALPHA, "cpu-here/beta.safetensors.xz"} == set(files(recording))
    assert all(there[name] == content for name, content in files(recording).items() if name in headers)
    assert [f"{ALPHA}: 3 observations", "cpu-here/beta.safetensors.xz: 1 observations"] == [t.split(",")[0] for t in told]


def test_unpacking_gives_back_every_byte(recording: Path) -> None:
    there = files(recording)

    pack(recording)
    unpack(recording)

    assert there == files(recording)


def test_packing_is_reproducible(recording: Path, tmp_path: Path) -> None:
    """The same observations give the same file: packed again, and written in another order."""
    for number, format_id in enumerate(reversed(FORMATS)):
        add(tmp_path / "other", format_id, format_id.partition("_")[0])
        pack(tmp_path / "other")
        assert number + 1 == len(Store(tmp_path / "other").all())
    pack(recording)
    once = files(recording)
    pack(recording)

    assert once == files(recording)
    assert once[ALPHA] == (tmp_path / "other" / ALPHA).read_bytes()


def test_equal_arrays_are_kept_once(recording: Path) -> None:
    """Two formats with the same bits have one entry, by the hash that both headers name."""
    hashes = {one.header.tensors_sha256 for one in Store(recording).all() if one.header.model == "alpha"}
    pack(recording)

    assert hashes == set(packed.read(recording / ALPHA))
    assert 2 == len(hashes)


def test_an_observation_is_added_to_a_packed_recording(recording: Path) -> None:
    """It lies there as it always did, beside the packed ones, until they are packed together."""
    pack(recording)
    add(recording, "gptq")
    assert 5 == len(Store(recording).all())

    pack(recording)

    assert [] == list(recording.rglob(TENSORS_FILE))
    assert 5 == len(Store(recording).all())


def test_what_lies_in_the_folder_comes_first(recording: Path) -> None:
    """A damaged plain file is not hidden by a packed one that is whole."""
    place = add(recording, "bf16")
    pack(recording)
    (place / TENSORS_FILE).write_bytes(b"damaged")

    with pytest.raises(ObservationError, match=f"{TENSORS_FILE}: SHA-256 differs"):
        read(place)


def test_a_packed_file_that_was_replaced_is_read_anew(recording: Path) -> None:
    """What was unpacked before is kept for the next observation, and no longer than the file is the same."""
    place = add(recording, "bf16")
    pack(recording)
    read(place)
    packed.put(recording / ALPHA, packed.compress(packed.content({})))

    refused(place, "has no arrays of tensors_sha256")


def test_a_refusal_has_nothing_to_pack(tmp_path: Path) -> None:
    """Its header stays, and no file is made for it."""
    whole = observation()
    header = whole.header.model_copy(update={"kind": "refusal", "refusal": "no", "prompts": ()})
    with Store(tmp_path).writing(header.cell, ENVIRONMENT, header.key) as folder:
        write(folder, header, ())

    assert [] == pack(tmp_path)
    assert ["no"] == [one.header.refusal for one in Store(tmp_path).all()]


def test_copies_are_plain(recording: Path, tmp_path: Path) -> None:
    """A bundle, or another recording, does not need the packed file: the copy has the arrays, byte by byte."""
    there = {name: content for name, content in files(recording).items() if "/alpha/" in name}
    pack(recording)

    for one in Store(recording).all():
        if one.header.model == "alpha":
            copy_into(one, tmp_path / "copy")

    assert there == files(tmp_path / "copy")


def test_a_store_finds_what_is_packed(recording: Path) -> None:
    """By cell, environment and key, as before; one whose packed file is damaged is measured again."""
    place = add(recording, "bf16")
    key = read(place).header.key
    pack(recording)
    assert Store(recording).find(Cell("alpha", "bf16", "cpu-here"), ENVIRONMENT, key) is not None
    (recording / ALPHA).write_bytes(b"")

    assert Store(recording).find(Cell("alpha", "bf16", "cpu-here"), ENVIRONMENT, key) is None
    assert not place.exists()


def test_a_part_of_a_packed_recording_is_read(recording: Path) -> None:
    """--replay of one environment's folder: the packed file lies above it, and is found."""
    pack(recording)

    assert 4 == len(Store(recording / "cpu-here" / ENVIRONMENT).all())
    assert ["bf16"] == [one.header.format for one in Store(recording / "cpu-here" / ENVIRONMENT / "beta").all()]


def test_versions_of_one_model_share_a_file(recording: Path) -> None:
    """What two environments measured alike lies in one packed file, which is what makes it small."""
    add(recording, "bf16", environment="vllm-2-torch-2-00000000")

    told = pack(recording)

    assert f"{ALPHA}: 4 observations" == told[0].split(",")[0]
    assert 2 == len(packed.read(recording / ALPHA))
    assert 5 == len(Store(recording).all())


def test_references_are_collected_without_unpacking(recording: Path) -> None:
    """Only headers are read while cases are collected."""
    pack(recording)
    (recording / ALPHA).write_bytes(b"")

    assert [] == References([recording]).claims(["cpu-here"])


def test_the_recordings_of_this_checkout_are_packed_and_small() -> None:
    """A clone stays small: what was recorded is packed before it is committed; the older form stays in use in CI."""
    folder = ROOT / "fixtures"

    assert [] == list((folder / "recordings").rglob(TENSORS_FILE))
    assert [] != list((folder / "lifetimes").rglob(TENSORS_FILE))
    assert 22_000_000 > sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# ------------------------------------------------------------------------------------------------------- what is refused


def test_a_damaged_recording_is_not_packed(recording: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line that names the file, exit code 2, and not a byte is changed, of the other model neither."""
    (add(recording, "bf16") / TENSORS_FILE).write_bytes(b"damaged")
    there = files(recording)

    assert 2 == main([str(recording)])

    assert there == files(recording)
    assert f"{TENSORS_FILE}: SHA-256 differs" in capsys.readouterr().err


@pytest.mark.parametrize("below", ["..", "cpu-here", f"cpu-here/{ENVIRONMENT}/alpha"])
@pytest.mark.parametrize("options", [[], ["--unpack"]])
def test_only_whole_recordings_are_packed(
    recording: Path, below: str, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a part of one, the packed file would lie outside and lose what other parts have in it."""
    pack(recording)
    there = files(recording)

    assert 2 == main([str(recording / below), *options])

    assert there == files(recording)
    assert "is not HARDWARE/ENVIRONMENT/MODEL/FORMAT/KEY below" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["nothing", "empty"])
def test_nothing_to_pack_is_an_error(tmp_path: Path, folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()

    assert 2 == main([str(tmp_path / folder)])
    assert "no such folder" in (err := capsys.readouterr().err) or "no observation in this folder" in err


def test_what_would_not_be_read_back_is_not_packed(recording: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger than a reader takes: refused before anything is written."""
    there = files(recording)
    monkeypatch.setattr(packed, "MAX_UNPACKED_BYTES", 100)

    with pytest.raises(ObservationError, match=r"alpha.safetensors.xz: would unpack to \d+ bytes, at most 100"):
        pack(recording)
    assert there == files(recording)


def test_a_full_disk_leaves_the_recording_as_it_was(recording: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays go when the packed file is there, and no half of it stays."""
    there = files(recording)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert 2 == main([str(recording)])
    assert there == files(recording)


def test_the_command_says_what_it_did(recording: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = files(recording)

    assert 0 == main([str(recording)])
    assert f"{ALPHA}: 3 observations, " in capsys.readouterr().out
    assert 0 == main([str(recording), "--unpack"])
    assert f"{ALPHA}: 3 observations have their arrays back" in capsys.readouterr().out
    assert there == files(recording)


# ------------------------------------------------------------------------------------------------------ hostile packed files


def stream(unpacked: bytes, dictionary: int = 1 << 20) -> bytes:
    return lzma.compress(unpacked, filters=[{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": dictionary}])


def varint(number: int) -> bytes:
    found = bytearray()
    while number >= 0x80:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])


def promising(blob: bytes, size: int) -> bytes:
    """A stream of one block whose index says that it unpacks to `size` bytes, with checksums that fit."""
    length = 4 * (struct.unpack("<I", blob[-8:-4])[0] + 1)
    index = blob[-12 - length : -12]
    end = next(n for n in range(2, len(index)) if index[n] < 0x80) + 1  # of the block's packed size
    changed = index[:end] + varint(size)
    changed += bytes(-len(changed) % 4)
    changed += struct.pack("<I", zlib.crc32(changed))
    footer = struct.pack("<I", len(changed) // 4 - 1) + blob[-4:-2]
    return blob[: -12 - length] + changed + struct.pack("<I", zlib.crc32(footer)) + footer + b"YZ"


def bomb() -> bytes:
    """300 MiB of zeros."""
    compressor = lzma.LZMACompressor(preset=0)
    return b"".join(compressor.compress(bytes(1 << 20)) for _ in range(300)) + compressor.flush()


def entry(name: str, payload: bytes) -> bytes:
    return save({name: np.frombuffer(payload, np.uint8)})


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The one observation of a packed recording."""
    found = add(tmp_path / "r", "bf16")
    pack(tmp_path / "r")
    return found


def packed_of(place: Path) -> Path:
    return place.parents[3] / "alpha.safetensors.xz"


def renamed(blob: bytes, dtype: type) -> bytes:
    """The right arrays under the right name, and the packed tensor of another dtype: the same bytes."""
    return stream(save({name: array.view(dtype) for name, array in load(lzma.decompress(blob)).items()}))


HASH = "0" * 64
MISTAKES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda blob: b"", "not a whole .xz stream"),
    "cut": (lambda blob: blob[:-1], "not a whole .xz stream"),
    "half": (lambda blob: blob[: len(blob) // 2], "not a whole .xz stream"),
    "two streams": (lambda blob: blob + blob, "not a whole .xz stream: its index says"),
    "something behind": (lambda blob: blob + b"\0\0\0\0", "not a whole .xz stream"),
    "something before": (lambda blob: b"\0" + blob, "not a whole .xz stream"),
    "gzip": (lambda blob: b"\x1f\x8b" + blob[2:], "not a whole .xz stream"),
    "the older format": (lambda blob: lzma.compress(b"x" * 100, lzma.FORMAT_ALONE), "not a whole .xz stream"),
    "plain": (lambda blob: lzma.decompress(blob), "not a whole .xz stream"),
    "a bit of the block": (lambda blob: blob[:200] + bytes([blob[200] ^ 1]) + blob[201:], "not a whole .xz stream: "),
    "promises a terabyte": (lambda blob: promising(blob, 1 << 40), "unpacks to 1099511627776 bytes, at most 268435456"),
    "promises one byte": (lambda blob: promising(blob, 1), "not a whole .xz stream: its index says 1 bytes"),
    "promises more": (lambda blob: promising(blob, 1 << 20), "not a whole .xz stream"),
    "a size of 70 bits": (lambda blob: promising(blob, 1 << 69), "a size of more than 63 bits"),
    "a dictionary of a gigabyte": (lambda blob: stream(lzma.decompress(blob), 1 << 30), "Memory usage limit exceeded"),
    "no safetensors": (lambda blob: stream(b"x" * 100), "not packed arrays: "),
    "a path for a name": (lambda blob: stream(entry("../../../etc/passwd", b"x")), "'../../../etc/passwd': a name that is no"),
    "a name that clears": (lambda blob: stream(entry("\x1b[2J", b"x")), "'\\x1b[2J': a name that is no SHA-256"),
    "numbers": (lambda blob: stream(save({HASH: np.zeros(3, np.float32)})), "float32 (3,), needs uint8 (bytes,)"),
    "rows": (lambda blob: stream(save({HASH: np.zeros((2, 2), np.uint8)})), "uint8 (2, 2), needs uint8 (bytes,)"),
    "other numbers": (lambda blob: renamed(blob, np.float32), "float32 ("),
    "other arrays": (lambda blob: stream(entry(HASH, b"x")), "has no arrays of tensors_sha256"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_bad_packed_file_is_refused(place: Path, mistake: str) -> None:
    """Damaged, promising what it is not, or of another form: the file is named, and what is wrong."""
    change, words = MISTAKES[mistake]
    packed_of(place).write_bytes(change(packed_of(place).read_bytes()))

    refused(place, words)


def test_other_arrays_under_the_right_name_are_refused(place: Path) -> None:
    """What was hashed when it was measured is what counts, not what somebody calls it."""
    sha256 = next(iter(packed.read(packed_of(place))))
    packed_of(place).write_bytes(stream(entry(sha256, b"others")))

    refused(place, "SHA-256 differs from observation.json: tensors_sha256")


def test_a_bomb_does_not_go_off(place: Path) -> None:
    """300 MiB in 50 KB: refused by its promise, and where it promises little, after that little."""
    blob = bomb()
    assert 1 << 16 > len(blob)
    for content, words in (blob, "unpacks to 314572800 bytes, at most"), (promising(blob, 5000), "its index says 5000 bytes"):
        packed_of(place).write_bytes(content)
        tracemalloc.start()
        refused(place, words)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert 4 << 20 > peak


def test_a_packed_file_is_no_link_to_a_device(place: Path) -> None:
    packed_of(place).unlink()
    packed_of(place).symlink_to("/dev/zero")

    refused(place, "not a regular file")


def test_a_packed_file_that_is_gone_is_missed(place: Path) -> None:
    """The arrays are missing in the folder, where they were always looked for."""
    packed_of(place).unlink()

    with pytest.raises(ObservationError, match=f"{place / TENSORS_FILE}: No such file or directory"):
        read(place)


def test_nothing_is_looked_for_outside_of_a_recording(place: Path, tmp_path: Path) -> None:
    """A folder that does not lie where its header says has no packed file: nothing above it is read."""
    moved = tmp_path / "a" / "b" / "alpha" / "d" / "e"
    moved.parent.mkdir(parents=True)
    shutil.copytree(place, moved)
    shutil.copy(packed_of(place), tmp_path / "a" / "alpha.safetensors.xz")

    with pytest.raises(ObservationError, match=f"{moved / TENSORS_FILE}: No such file or directory"):
        read(moved)
    assert packed.path_of(Path("e"), observation().header) is None


@FUZZ
@given(data=st.data())
def test_damage_anywhere_is_found_or_changes_nothing(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Bytes cut, changed or put in: an ObservationError that can be printed, or the same arrays."""
    root = tmp_path_factory.mktemp("fuzz") / "r"
    place = add(root, "bf16")
    whole = read(place)
    pack(root)
    blob = packed_of(place).read_bytes()
    start = data.draw(st.integers(0, len(blob)))
    end = data.draw(st.integers(start, min(len(blob), start + 40)))
    packed_of(place).write_bytes(blob[:start] + data.draw(st.binary(max_size=20)) + blob[end:])
    try:
        assert bits([whole]) == bits([read(place)])
    except ObservationError as error:
        assert str(error).isprintable()
