"""Hostile input: recordings, matrices, checkpoints and reports of somebody who means harm, and what each is answered with."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from faults.cases import rows, shows
from quantdet.checkpoints import tensors
from quantdet.judging.results import Missing
from quantdet.matrix import load
from quantdet.matrix.cell import Cell
from quantdet.observations import packed
from quantdet.observations.observation import HEADER_FILE, TENSORS_FILE, ObservationError
from quantdet.observations.pack import pack
from quantdet.observations.published import __main__
from quantdet.session.machine.machine import Machine, Software
from quantdet.session.options import Options
from quantdet.session.replay import Replay
from quantdet.session.session import Session
from selftest.fakes.engine import FAKE
from selftest.fakes.inner import Suite
from selftest.fakes.matrix import MATRIX, ROOT
from selftest.fakes.observation import observation
from selftest.observations.test_observation import edit_header, put, put_payload
from selftest.observations.test_packed import bomb, entry, promising, stream

pytest_plugins = ["pytester"]

FUZZ = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
ESC, TURNED = "\x1b[2J", "\u202e"  # clears a terminal; shows what follows backwards


def here(test: str) -> list[str]:
    return rows(f"selftest/whole/test_hostile.py::{test}")


def pickled(path: Path) -> bytes:
    """A pickle that creates `path` when it is read (protocol 0, written by hand: nothing here imports pickle)."""
    return f"cbuiltins\nopen\n(S'{path}'\nS'w'\ntR.".encode()


def edited(**fields: Any) -> Callable[[Path], None]:
    return lambda place: edit_header(place, lambda raw: raw.update(fields))


def text_of_header(change: Callable[[str], str]) -> Callable[[Path], None]:
    def edit(place: Path) -> None:
        path = place / HEADER_FILE
        path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")

    return edit


def linked(name: str, target: str) -> Callable[[Path], None]:
    def edit(place: Path) -> None:
        (place / name).unlink()
        (place / name).symlink_to(target)

    return edit


def piped(name: str) -> Callable[[Path], None]:
    def edit(place: Path) -> None:
        (place / name).unlink()
        os.mkfifo(place / name)

    return edit


def sparse(name: str, size: int) -> Callable[[Path], None]:
    return lambda place: os.truncate(place / name, size)


def args_of(text: str) -> Callable[[Path], None]:
    return text_of_header(lambda header: header.replace('"engine_args": {}', f'"engine_args": {{"a": {text}}}'))


def header_of_arrays(header: dict[str, Any], length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


RECORDINGS: dict[str, Callable[[Path], None]] = {
    "rec-device": linked(TENSORS_FILE, "/dev/zero"),
    "rec-header-device": linked(HEADER_FILE, "/dev/zero"),
    "rec-pipe": piped(HEADER_FILE),
    "rec-huge-header": sparse(HEADER_FILE, 1 << 40),
    "rec-huge-arrays": sparse(TENSORS_FILE, 1 << 40),
    "rec-claims-terabytes": lambda place: put_payload(place, header_of_arrays({}, 1 << 40)),
    "rec-tensor-terabytes": lambda place: put_payload(
        place, header_of_arrays({"0.prompt_ids": {"dtype": "I32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}})
    ),
    "rec-pickle": lambda place: put_payload(place, pickled(place / "trap")),
    "rec-deep": text_of_header(lambda text: "[" * 100_000),
    "rec-deep-field": args_of("[" * 40 + "]" * 40),
    "rec-digits": args_of("9" * 5000),
    "rec-bits": args_of("9" * 30),
    "rec-twice": text_of_header(lambda text: text.replace("{", '{"model": "beta",', 1)),
    "rec-dotdot": edited(model="../../etc"),
    "rec-absolute": edited(format="/etc/passwd"),
    "rec-control": edited(environment={"gpu": f"H200{ESC}"}),
    "rec-control-name": edited(environment={f"gpu{ESC}": "H200"}),
    "rec-bidi": edited(engine=f"vllm{TURNED}"),
    "rec-surrogate": text_of_header(lambda text: text.replace('"engine": "fake"', '"engine": "\\ud800"')),
    "rec-version": edited(environment={"vllm": "0.32 or so"}),
    "rec-version-list": edited(environment={"vllm": ["0.32.0"]}),
}


def recording(root: Path, folder: str = "bf16") -> Path:
    place = root / "cpu-here" / "vllm-1" / "alpha" / folder / ("0" * 16)
    place.mkdir(parents=True)
    return put(place, observation())


@pytest.mark.parametrize("id_", here("test_a_hostile_recording"))
def test_a_hostile_recording(tmp_path: Path, id_: str) -> None:
    """--replay of it ends before anything is judged, with one line that names the file and what is wrong."""
    place = recording(tmp_path / "r")
    assert Replay(tmp_path / "r")
    RECORDINGS[id_](place)

    with pytest.raises(ObservationError) as caught:
        Replay(tmp_path / "r")

    text = str(caught.value)
    assert text.startswith(str(place))
    assert text.isprintable()
    shows(id_, "exit 4", text)
    assert not (place / "trap").exists()


PACKED: dict[str, Callable[[Path], None]] = {
    "pk-device": lambda path: (path.unlink(), path.symlink_to("/dev/zero"))[0],
    "pk-pipe": lambda path: (path.unlink(), os.mkfifo(path))[0],
    "pk-huge": lambda path: os.truncate(path, 1 << 40),
    "pk-cut": lambda path: os.truncate(path, path.stat().st_size - 100),
    "pk-bomb": lambda path: packed.put(path, bomb()),
    "pk-promise": lambda path: packed.put(path, promising(path.read_bytes(), 1 << 40)),
    "pk-liar": lambda path: packed.put(path, promising(bomb(), 5000)),
    "pk-dictionary": lambda path: packed.put(path, stream(b"x", 1 << 30)),
    "pk-streams": lambda path: packed.put(path, path.read_bytes() + stream(b"x")),
    "pk-header": lambda path: packed.put(path, stream(header_of_arrays({}, 1 << 40))),
    "pk-tensor": lambda path: packed.put(
        path, stream(header_of_arrays({"0" * 64: {"dtype": "U8", "shape": [1 << 42], "data_offsets": [0, 1 << 42]}}))
    ),
    "pk-path": lambda path: packed.put(path, stream(entry("../../../etc/passwd", b"x"))),
    "pk-control": lambda path: packed.put(path, stream(entry(f"{ESC}{TURNED}", b"x"))),
    "pk-swapped": lambda path: packed.put(path, stream(entry(next(iter(packed.read(path))), b"of another"))),
    "pk-lacking": lambda path: packed.put(path, stream(entry("0" * 64, b"x"))),
    "pk-pickle": lambda path: packed.put(path, stream(pickled(path.parent / "trap"))),
}


@pytest.mark.parametrize("id_", here("test_a_hostile_packed_recording"))
def test_a_hostile_packed_recording(tmp_path: Path, id_: str) -> None:
    """As one that is not packed: --replay ends before anything is judged, with one line that names the packed file."""
    recording(tmp_path / "r")
    pack(tmp_path / "r")
    assert Replay(tmp_path / "r")
    path = tmp_path / "r" / "cpu-here" / "alpha.safetensors.xz"
    PACKED[id_](path)

    with pytest.raises(ObservationError) as caught:
        Replay(tmp_path / "r")

    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert text.isprintable()
    shows(id_, "exit 4", text)
    assert not (path.parent / "trap").exists()


def test_the_pickle_of_these_tests_works(tmp_path: Path) -> None:
    """What `rec-pickle` holds does run code where somebody unpickles it: that nothing happened means something."""
    loads = __import__("pickle").loads

    loads(pickled(tmp_path / "trap")).close()

    assert (tmp_path / "trap").exists()


@pytest.mark.parametrize("id_", here("test_a_hostile_name_of_a_folder"))
def test_a_hostile_name_of_a_folder(suite: Suite, pytester: pytest.Pytester, id_: str) -> None:
    """What steers a terminal does not reach it; nothing outside of the folder is read through a link back."""
    place = recording(pytester.path / "r", f"bf16{ESC}{TURNED}\n")
    (place.parent / "back").symlink_to("../..")
    (place / TENSORS_FILE).unlink()

    run = suite("--replay", "r")

    assert {} == run.cases
    shows(id_, f"exit {run.code}", run.output)
    assert ESC not in run.output
    assert TURNED not in run.output


@pytest.mark.parametrize("id_", here("test_hostile_words_in_a_recording"))
def test_hostile_words_in_a_recording(suite: Suite, pytester: pytest.Pytester, id_: str) -> None:
    """Markup of the report's tables, of XML and of formats in every free text of a header is shown as it stands."""
    nasty = "x\\[/bold][/]&<![CDATA[%s{0}]]>"
    place = recording(pytester.path / "r")

    def spoil(raw: dict[str, Any]) -> None:
        for layer in raw["executed"]["layers"]:
            layer.update(module=nasty, method=nasty, scheme=nasty, kernel=nasty, detail=nasty)
        for number, prompt in enumerate(raw["prompts"]):
            prompt["id"] = f"{nasty}{number}"
        raw.update(created=nasty, engine=nasty, workload=nasty, checkpoint_source=nasty, engine_args={nasty: nasty})
        raw["environment"] = {"gpu": nasty, "variables": {nasty: nasty}, nasty: [nasty]}
        raw["timings"] = {nasty: 1.0}

    edit_header(place, spoil)

    run = suite("--replay", "r", "-k", "alpha and cpu-here and bf16")

    case = run.cases["test_kernel[alpha/bf16/cpu-here]"]
    assert 1 == run.code
    shows(id_, case.verdict, case.message)
    assert f"{nasty}[{nasty}] x4" in case.message
    assert nasty[:20] in run.output.split("quantdet: verdicts")[1]  # in the table, where it is folded
    assert "INTERNALERROR" not in run.output


def replaced(old: str, new: str) -> str:
    assert old in MATRIX
    return MATRIX.replace(old, new)


def model(source: str) -> str:
    return MATRIX + f'\n[models.mine]\ntitle = "x"\nworkload = "synthetic-v1"\nformats = ["bf16"]\n{source}\n'


SETTING = '\n[[setting]]\nwhen = {{ format = "awq" }}\nreason = "x"\n{}\n'
MATRICES: dict[str, str] = {
    "mx-deep": "x = " + "[" * 100_000,
    "mx-digits": replaced("repeats = 3", "repeats = " + "9" * 5000),
    "mx-bits": replaced("repeats = 3", "repeats = 0x" + "f" * 50_000),
    "mx-dotted": ".".join(["a"] * 100_000) + " = 1",
    "mx-dotted-table": "[" + " . ".join(['"a"'] * 3000) + "]",
    "mx-long": "a" * 900_000 + " = 1",
    "mx-large": "#" * (1 << 21),
    "mx-control": replaced('title = "AWQ"', 'title = "A\\u001b[2J"'),
    "mx-bidi": replaced('title = "AWQ"', 'title = "A\\u202e"'),
    "mx-control-key": replaced('title = "AWQ"', 'title = "AWQ"\n"a\\u001b[2J" = 1'),
    "mx-id-path": MATRIX.replace("formats.awq", 'formats."../../awq"'),
    "mx-id-control": MATRIX.replace("formats.awq", 'formats."awq\\u001b[2J"'),
    "mx-dimension": replaced("hidden_size = 64", "hidden_size = 1_000_000_000_000"),
    "mx-layers": replaced("layers = 1\n", "layers = 1_000_000_000\n"),
    "mx-code": MATRIX + "\n[engine.args]\ntrust_remote_code = true\n",
    "mx-code-setting": MATRIX + SETTING.format("args = { hf_overrides = { trust_remote_code = true } }"),
    "mx-code-pin": replaced('args = { executes = "Fake8Kernel" }', "args = { trust_remote_code = false }"),
    "mx-environment": MATRIX + SETTING.format('env = { "A=B" = "x" }'),
    "mx-pip": model('package = { distribution = "--index-url=http://x", version = "1", file = "m.gguf" }'),
    "mx-package-path": model('package = { distribution = "x", version = "1", file = "../../m.gguf" }'),
    "mx-like-many": MATRIX
    + "\n[formats.big]\nkernel = 'auto'\npicks = {"
    + ", ".join(f"p{i} = 'auto'" for i in range(20_000))
    + "}\n"
    + "".join(f"[formats.f{i}]\nlike = 'big'\n" for i in range(5_000)),
    "mx-like-circle": MATRIX + "".join(f"\n[formats.f{i}]\ntitle = 'f'\nlike = 'f{(i + 1) % 5_000}'\n" for i in range(5_000)),
    "mx-hub-path": model('hub = { plain = "o/../x" }'),
    "mx-hub-revision": model('hub = { plain = "o/x@../../y" }'),
}


@pytest.mark.parametrize("id_", here("test_a_hostile_matrix"))
def test_a_hostile_matrix(tmp_path: Path, id_: str) -> None:
    """A usage error that names the place; nothing of the size that the file asks for is made."""
    path = tmp_path / "m.toml"
    path.write_text(MATRICES[id_], encoding="utf-8")

    with pytest.raises(load.MatrixError) as caught:
        load.load(path)

    shows(id_, "exit 4", str(caught.value))
    assert str(caught.value).replace("\n", "").isprintable()
    assert len(str(caught.value)) < 5000


FROM = 'schema = 1\nkernels_from = "kernels.toml"\n'
PIN = 'schema = 1\n[kernels.auto]\nhardware = ["*"]\n[[pin]]\nkernel = "auto"\nlayout = ["ct"]\n'
ROW = '[[expect]]\nwhen = {{ format = "awq" }}\noutcome = "noisy"\nsource = "s"\nreason = {}\n'


def text(content: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(content, encoding="utf-8")


# Files that a matrix or a person names beside a matrix: `kernels.toml` of `kernels_from`, `expect.toml` of `--expect`.
BESIDE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "kf-device": ("kernels", lambda path: path.symlink_to("/dev/zero")),
    "kf-pipe": ("kernels", os.mkfifo),
    "kf-huge": ("kernels", lambda path: (path.touch(), os.truncate(path, 1 << 40))),
    "kf-dotted": ("kernels", text(".".join(["a"] * 100_000) + " = 1")),
    "kf-deep": ("kernels", text(PIN + "args = { a = " + "[" * 100_000)),
    "kf-bits": ("kernels", text(PIN + "k_not_multiple_of = 0x" + "f" * 50_000)),
    "kf-control": ("kernels", text(PIN + 'unsupported = "no\\u001b[2J"')),
    "kf-code": ("kernels", text(PIN + "args = { trust_remote_code = true }")),
    "ex-endless": ("expect", lambda path: path.symlink_to("/dev/zero")),
    "ex-dotted": ("expect", text(".".join(["a"] * 100_000) + " = 1")),
    "ex-digits": ("expect", text(ROW.format("9" * 5000))),
    "ex-control": ("expect", text(ROW.format('"no\\u001b[2J"'))),
    "ex-bidi": ("expect", text(ROW.format('"\\u202e"'))),
}


@pytest.mark.parametrize("id_", here("test_a_hostile_file_beside_a_matrix"))
def test_a_hostile_file_beside_a_matrix(tmp_path: Path, id_: str) -> None:
    """The same bounds as for a matrix, and the file's own name."""
    kind, make = BESIDE[id_]
    path, matrix = tmp_path / f"{kind}.toml", tmp_path / "m.toml"
    make(path)
    matrix.write_text(
        (FROM if kind == "kernels" else "") + MATRIX.removeprefix("schema = 1\n" * (kind == "kernels")), encoding="utf-8"
    )

    with pytest.raises(load.MatrixError) as caught:
        load.load(matrix, [path] if kind == "expect" else [])

    told = str(caught.value)
    shows(id_, "exit 4", told)
    assert f"{path}: 1 mistake\n" in told
    assert told.replace("\n", "").isprintable()
    assert len(told) < 5000


@pytest.mark.parametrize("id_", here("test_a_matrix_without_end"))
def test_a_matrix_without_end(suite: Suite, id_: str) -> None:
    """--matrix of a device is read up to the bound."""
    run = suite("--matrix=/dev/zero")

    shows(id_, f"exit {run.code}", run.output)


F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def weights(payload: bytes) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(payload)

    return make


def index(content: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        weights(header_of_arrays({"t": F32}) + b"1234")(folder)
        (folder / tensors.INDEX_NAME).write_text(content if isinstance(content, str) else json.dumps(content))

    return make


def pipe_of_weights(folder: Path) -> None:
    os.mkfifo(folder / "model.safetensors")


def endless_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 39))
    os.truncate(folder / "model.safetensors", 1 << 40)


def only_a_pickle(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickled(folder / "trap"))


def config(text: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        weights(header_of_arrays({"t": F32}) + b"1234")(folder)
        (folder / "config.json").write_text(text)

    return make


CHECKPOINTS: dict[str, Callable[[Path], None]] = {
    "ck-terabytes": endless_header,
    "ck-header-claims": weights(header_of_arrays({}, 1 << 40)),
    "ck-tensor-claims": weights(header_of_arrays({"t": {**F32, "shape": [1 << 40], "data_offsets": [0, 1 << 42]}})),
    "ck-deep": weights(struct.pack("<Q", 100_000) + b"[" * 100_000),
    "ck-twice": weights(struct.pack("<Q", 14) + b'{"t":1,"t":2} '),
    "ck-pipe": pipe_of_weights,
    "ck-index-path": index({"weight_map": {"t": "../../x.safetensors"}}),
    "ck-index-number": index({"weight_map": {"t": 7}}),
    "ck-index-deep": index("[" * 100_000),
    "ck-config-deep": config("[" * 100_000),
    "ck-config-number": config("9" * 5000),
    "ck-pickle": only_a_pickle,
}


@pytest.mark.parametrize("id_", here("test_a_hostile_checkpoint"))
def test_a_hostile_checkpoint(tmp_path: Path, id_: str) -> None:
    """A local folder of weights: the cell's verdict, before any engine starts."""
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    CHECKPOINTS[id_](folder)
    table = tmp_path / "m.toml"
    table.write_text(model(f'path = "{folder}"'), encoding="utf-8")
    options = Options(matrix=table, store=tmp_path / "s", checkpoints=tmp_path / "c")
    software = Software("0.32.0", "cpu", "2.0")
    session = Session(
        options, load.load(table), Machine("cpu", frozenset({"avx2"}), 64.0), software, FAKE, ROOT / "fixtures" / "prompts"
    )

    result = session.result(Cell("mine", "bf16", "cpu-here"))

    assert isinstance(result, Missing)
    shows(id_, str(result.verdict), result.reason)
    assert not (folder / "trap").exists()


REPORT = ROOT / "fixtures" / "published" / "extracts" / "awq_investigation.json"


def report(**fields: Any) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(REPORT.read_text(encoding="utf-8")), **fields}))

    return make


REPORTS: dict[str, Callable[[Path], object]] = {
    "im-deep": lambda path: path.write_text("[" * 100_000),
    "im-digits": lambda path: path.write_text("9" * 5000),
    "im-twice": lambda path: path.write_text('{"baseline": 1, "baseline": 2}'),
    "im-endless": lambda path: path.symlink_to("/dev/zero"),
    "im-pipe": os.mkfifo,
    "im-huge": lambda path: (path.touch(), os.truncate(path, 1 << 40)),
    "im-path": report(variant="../../escape"),
    "im-control": report(model=f"Qwen3{ESC}"),
    "im-bidi": report(model=f"Qwen3{TURNED}"),
    "im-pickle": lambda path: path.write_bytes(pickled(path.with_name("trap"))),
}


@pytest.mark.parametrize("id_", here("test_a_hostile_report"))
def test_a_hostile_report(tmp_path: Path, capsys: pytest.CaptureFixture[str], id_: str) -> None:
    """One printable line, exit code 2, and nothing is written."""
    path = tmp_path / "report.json"
    REPORTS[id_](path)

    code = __main__.main([str(path), "--out", str(tmp_path / "out"), "--hardware", "sm80"])

    said = capsys.readouterr().err
    shows(id_, f"exit {code}", said)
    assert said.removesuffix("\n").isprintable()
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "trap").exists()
