"""Mistakes in a matrix file: each named, by its TOML path, all at once."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantdet.matrix import mistakes as rows
from quantdet.matrix.cell import ID_PATTERN, Cell
from quantdet.matrix.load import MatrixError, load
from quantdet.matrix.rows import CARRIES
from selftest.fakes.matrix import MATRIX, ROOT, make_suite
from selftest.matrix.test_matrix import Edit, document, mistakes, parse, toml

pytest_plugins = ["pytester"]

ROW = {"when": {"format": "gptq"}, "outcome": "noisy", "reason": "r", "source": "s"}


def put(*path: Any) -> Edit:
    """Set a value: keys of tables, indices of lists, then the value."""

    def edit(raw: Any) -> None:
        for key in path[:-2]:
            raw = raw[key]
        raw[path[-2]] = path[-1]

    return edit


def drop(*path: Any) -> Edit:
    def edit(raw: Any) -> None:
        for key in path[:-1]:
            raw = raw[key]
        del raw[path[-1]]

    return edit


def add(table: str, **row: Any) -> Edit:
    return lambda raw: raw.setdefault(table, []).append(row)


MISTAKES: dict[str, tuple[Edit, str, str]] = {
    "unknown table": (put("surprise", {}), "surprise", "unknown key"),
    "unknown key": (put("formats", "gptq", "colour", "red"), "formats.gptq.colour", "unknown key"),
    "unknown key deep": (
        put("models", "alpha", "synthetic", "depth", 3), "models.alpha.synthetic.depth", "unknown key",
    ),
    "unknown key in a row": (put("pin", 0, "colour", 1), "pin.0.colour", "unknown key"),
    "unknown key in when": (put("expect", 0, "when", "moon", "full"), "expect.0.when.moon", "unknown key"),
    "missing key": (drop("formats", "gptq", "title"), "formats.gptq.title", "missing"),
    "missing table": (drop("hardware"), "hardware", "missing"),
    "no reason": (put("expect", 0, "reason", ""), "expect.0.reason", "at least 1"),
    "no source": (drop("expect", 0, "source"), "expect.0.source", "missing"),
    "schema": (put("schema", 2), "schema", "1"),
    "wrong type": (put("run", "repeats", "many"), "run.repeats", "'many'"),
    "fraction": (put("run", "repeats", 2.5), "run.repeats", "2.5"),
    "too few repeats": (put("run", "repeats", 1), "run.repeats", "greater than or equal to 2"),
    "no time": (put("run", "time_limit_s", 0), "run.time_limit_s", "greater than 0"),
    "table is a list": (put("formats", "gptq", []), "formats.gptq", ""),
    "kind": (put("hardware", "sm90", "kind", "tpu"), "hardware.sm90.kind", "'tpu'"),
    "unidentified hardware": (drop("hardware", "sm90", "compute_capability"), "hardware.sm90", "compute_capability"),
    "capability of a CPU": (
        put("hardware", "cpu-here", "compute_capability", "9.0"), "hardware.cpu-here", "has no 'compute_capability'",
    ),
    "bad capability": (
        put("hardware", "sm90", "compute_capability", "9"), "hardware.sm90.compute_capability", "'9'",
    ),
    "unknown layout": (put("formats", "gptq", "layout", "zip"), "formats.gptq.layout", "'zip'"),
    "unknown dtype": (put("formats", "gptq", "dtype", "int4"), "formats.gptq.dtype", "'int4'"),
    "dtype without default": (put("formats", "awq", "dtype", {"cpu": "float16"}), "formats.awq", "default"),
    "unknown kernel": (put("formats", "gptq", "kernel", "warp"), "formats.gptq.kernel", "no kernel 'warp'"),
    "unknown pinned kernel": (put("pin", 0, "kernel", "warp"), "pin.0.kernel", "no kernel 'warp'"),
    "unknown picked kernel": (
        put("formats", "awq", "picks", {"cpu-*": "warp"}), "formats.awq.picks.cpu-*", "no kernel 'warp'",
    ),
    "unknown picked hardware": (
        put("formats", "awq", "picks", {"tpu": "fake4"}), "formats.awq.picks", "'tpu' matches no hardware",
    ),
    "picks of a pinned kernel": (put("formats", "gptq", "picks", {"cpu-*": "fake4"}), "formats.gptq", "'picks'"),
    "unknown kernel hardware": (
        put("kernels", "fake4", "hardware", ["tpu"]), "kernels.fake4.hardware", "'tpu' matches no hardware",
    ),
    "unknown model hardware": (
        put("models", "beta", "hardware", ["tpu"]), "models.beta.hardware", "'tpu' matches no hardware",
    ),
    "unknown format": (put("models", "beta", "formats", ["bf17"]), "models.beta.formats", "'bf17' matches no format"),
    "no formats": (put("models", "beta", "formats", []), "models.beta", "needs 'formats'"),
    "no workload": (put("models", "beta", "workload", ""), "models.beta", "needs 'workload'"),
    "a base without a checkpoint": (put("models", "beta", "base", "/a"), "models.beta", "unquantized twin"),
    "a format of no model": (put("formats", "awq", "models", ["gamma"]), "formats.awq.models", "matches no model"),
    "unknown format of a row": (
        put("expect", 0, "when", "format", "gtpq"), "expect.0.when.format", "'gtpq' matches no format",
    ),
    "unknown model of a row": (
        put("expect", 0, "when", "model", ["alpha", "gamma"]), "expect.0.when.model", "'gamma' matches no model",
    ),
    "unknown hardware of a row": (
        put("expect", 0, "when", "hardware", "tpu-*"), "expect.0.when.hardware", "'tpu-*' matches no hardware",
    ),
    "unknown twin": (put("expect", 0, "formats", ["cf"]), "expect.0.formats", "'cf' matches no format"),
    "illegal combination": (
        put("formats", "gptq", "weights", "nvfp4"), "formats.gptq", "layout 'gptq' cannot carry weights 'nvfp4'",
    ),
    "illegal activations": (put("formats", "ct", "activations", "fp8"), "formats.ct", "cannot carry"),
    "bad specifier": (put("pin", 0, "vllm", "0.26 or so"), "pin.0.vllm", "'0.26 or so' is not a version specifier"),
    "bad specifier of a row": (put("expect", 0, "vllm", "new"), "expect.0.vllm", "'new' is not a version specifier"),
    "unknown kernel of a range": (
        put("formats", "awq", "picks", {"cpu-*": {"<1": "warp"}}), "formats.awq.picks.cpu-*", "no kernel 'warp'",
    ),
    "bad specifier of a pick": (
        put("formats", "awq", "picks", {"cpu-*": {"old": "fake4"}}), "formats.awq.picks.cpu-*.old", "not a version specifier",
    ),
    "overlapping ranges of a pick": (
        put("formats", "awq", "picks", {"cpu-*": {"<0.3": "fake4", ">=0.2": "fake4"}}), "formats.awq.picks.cpu-*", "both hold",
    ),
    "pins that differ": (
        put("pin", [
            {"kernel": "fake4", "layout": ["gptq", "ct"], "vllm": "<0.30", "args": {"way": "old"}},
            {"kernel": "fake4", "layout": ["ct"], "vllm": ">=0.29", "args": {"way": "new"}},
        ]), "pin.1", "differs from pin.0",
    ),
    "a way that is none": (
        put("pin", 0, {"kernel": "fake4", "layout": ["ct"], "unsupported": "no", "args": {"way": "x"}}), "pin.0", "no way",
    ),
    "unknown source of a pin": (put("pin", 0, "source", "moon"), "pin.0.source", "'online'"),
    "stale expectation": (
        add("expect", **{**ROW, "when": {"model": "beta", "hardware": "sm90"}}), "expect.1", "matches no cell",
    ),
    "stale setting": (
        add("setting", when={"format": "int8", "hardware": "sm90"}, reason="r"), "setting.1", "matches no cell",
    ),
    "twins of noise": (put("expect", 0, "outcome", "noisy"), "expect.0", "'formats'"),
    "identical without twins": (drop("expect", 0, "formats"), "expect.0", "'formats'"),
    "unsupported by phase": (
        add("expect", **{**ROW, "outcome": "unsupported", "when": {"format": "gptq", "phase": "decode"}}),
        "expect.1", "cannot depend on a phase",
    ),
    "unknown outcome": (put("expect", 0, "outcome", "lucky"), "expect.0.outcome", "'lucky'"),
    "noise of twins": (put("expect", 0, "fires", {"n_below": 9}), "expect.0", "'fires' belongs to"),
    "silence of noise": (
        add("expect", **{**ROW, "fires_not": {"n_below": 9}}), "expect.1", "'fires_not' belongs to",
    ),
    "no condition": (add("expect", **{**ROW, "fires": {}}), "expect.1.fires", "needs one of n_below"),
    "unknown condition": (add("expect", **{**ROW, "fires": {"m_below": 9}}), "expect.1.fires.m_below", "unknown key"),
    "empty condition": (add("expect", **{**ROW, "fires": {"n_below": 0}}), "expect.1.fires.n_below", "greater than 0"),
    "rows given twice": (
        add("expect", **{**ROW, "fires": {"tokens_per_expert_at_most": 6}, "max_rows": 9}), "expect.1", "'max_rows' follows",
    ),
    "noise that fires nowhere": (add("expect", **{**ROW, "fires": {"k_at_least": 999}}), "expect.1", "fires in no layer"),
    "twins that always fire": (
        put("expect", 0, "fires_not", {"n_below": 999}), "expect.0", "fires in some layer of every model",
    ),
    "layers as nobody's": (
        put("models", "beta", {"title": "x", "workload": "synthetic-v1", "formats": ["bf16", "ct"], "path": "/w",
                               "layers_as": "gamma"}),
        "models.beta.layers_as", "has to name a synthetic model",
    ),
    "layers as another's": (put("models", "beta", "layers_as", "alpha"), "models.beta.layers_as", "that is not synthetic"),
    "experts of a dense model": (put("models", "beta", "synthetic", "experts", 4), "models.beta.synthetic", "has no 'experts'"),
    "no auto": (drop("kernels", "auto"), "kernels.auto", "missing"),
    "kernel without classes": (drop("kernels", "fake4", "classes"), "kernels.fake4.classes", "missing"),
    "several sources": (put("models", "alpha", "path", "/weights"), "models.alpha", "exactly one of"),
    "no source of weights": (drop("models", "alpha", "synthetic"), "models.alpha", "has none"),
    "odd group": (put("models", "alpha", "group_size", 48), "models.alpha.group_size", "48"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_told_by_its_path(tmp_path: Path, kind: str) -> None:
    """Each kind of mistake: a line that begins with the TOML path and says what is wrong."""
    edit, path, words = MISTAKES[kind]

    found = mistakes(tmp_path, edit)

    mine = [line for line in found if line.startswith(f"{path}: ")]
    assert mine, found
    assert any(words in line for line in mine), found


@pytest.mark.parametrize(
    ("edit", "path", "words"),
    [
        (put("expect", 0, "when", "moon", "full"), "expect.0.when.moon", "(row 1 of [[expect]]: when = { "),
        (put("pin", 0, "kernel", "warp"), "pin.0.kernel", '(row 1 of [[pin]]: kernel = "warp"'),
    ],
    ids=["expect", "pin"],
)
def test_a_mistake_in_a_row_says_which_row(tmp_path: Path, edit: Edit, path: str, words: str) -> None:
    """TOML counts rows from 0, people from 1: both are said, and the row's own words."""
    (mine,) = [line for line in mistakes(tmp_path, edit) if line.startswith(f"{path}: ")]

    assert words in mine


def test_a_mistake_in_a_row_says_its_line(tmp_path: Path) -> None:
    """The line of the row's header, where the file has one for each; of two rows in conflict both."""
    text = (ROOT / "quant_matrix.toml").read_text(encoding="utf-8")
    row = '\n[[expect]]\nwhen = { format = "gtpq" }\noutcome = "noisy"\nreason = "r"\nsource = "s"\n'
    path = tmp_path / "matrix.toml"
    path.write_text(text + row, encoding="utf-8")

    with pytest.raises(MatrixError) as error:
        load(path)

    (found,) = error.value.mistakes
    number = text.count("\n[[expect]]") + 1
    line = len(text.splitlines()) + 2
    where = f'(row {number} of [[expect]], line {line}: when = {{ format = "gtpq" }}, outcome = "noisy")'
    assert found.startswith(f"expect.{number - 1}.when.format: ")
    assert found.endswith(where)
    both = rows.told("pin.1: differs from pin.0 about", {"pin": [{"kernel": "a"}, {"kernel": "b"}]}, "[[pin]]\n[[pin]]\n")
    assert both.endswith('(row 2 of [[pin]], line 2: kernel = "b"; row 1 of [[pin]], line 1: kernel = "a")')


UNSAFE = (
    "", "..", ".", "a/b", "../x", "/etc", "a\\b", "A", "a b", "a[b]", "a:b", "a~b", "a\n", "\u00e9", "-a", "a.", "a\0",
    "a" * 65,
)  # fmt: skip


@pytest.mark.parametrize("table", ["hardware", "formats", "models", "kernels"])
@pytest.mark.parametrize("name", UNSAFE, ids=ascii)
def test_an_id_that_is_unsafe_is_refused(tmp_path: Path, table: str, name: str) -> None:
    """No id can leave a folder, break a node id, or be two words."""

    def edit(raw: dict[str, Any]) -> None:
        raw[table][name] = raw[table][list(raw[table])[-1]]

    shown = name if name.isprintable() else repr(name)  # one mistake, one line

    assert [f"{table}.{shown}"] == [line.partition(": id must be")[0] for line in mistakes(tmp_path, edit)]


@given(st.text(max_size=70))
def test_an_id_is_always_one_plain_path_part(name: str) -> None:
    """Whatever is taken for an id stays inside its folder."""
    if ID_PATTERN.fullmatch(name):
        assert Path("/store") / name == (Path("/store") / name).resolve()
        assert (name,) == Path(name).parts


FIVE: tuple[Edit, ...] = (
    put("formats", "gptq", "colour", "red"),
    put("formats", "ct", "kernel", "warp"),
    put("run", "repeats", "many"),
    put("models", "alpha", "path", "/weights"),
    put("expect", 0, "when", "hardware", "tpu"),
)


FIVE_PATHS = (
    "formats.gptq.colour", "formats.ct.kernel", "run.repeats", "models.alpha", "expect.0.when.hardware",
)  # fmt: skip


def test_five_mistakes_are_told_at_once(tmp_path: Path) -> None:
    """Wrong keys, types, references, sources and rows are in one list, with their number."""
    found = mistakes(tmp_path, *FIVE)

    assert sorted(FIVE_PATHS) == sorted(line.partition(": ")[0] for line in found)


def test_five_mistakes_end_the_run_with_code_4(pytester: pytest.Pytester) -> None:
    """pytest prints every mistake and exits 4 before anything is collected."""
    make_suite(pytester.path, document(*FIVE))

    result = pytester.runpytest_inprocess()

    assert pytest.ExitCode.USAGE_ERROR == result.ret
    said = result.stdout.str() + result.stderr.str()
    assert "quant_matrix.toml: 5 mistakes" in said
    assert [] == [path for path in FIVE_PATHS if f"  {path}: " not in said]
    assert "Traceback" not in said


@pytest.mark.parametrize(
    "text", ["", "x = ", "schema = 1", "schema = 1\nformats = 3", "[formats]\n[formats]", "schema = [[[[", "\ufeff"]
)
def test_a_file_that_is_no_matrix(tmp_path: Path, text: str) -> None:
    """Bad TOML, an empty file and other documents are MatrixErrors."""
    with pytest.raises(MatrixError):
        parse(tmp_path, text)


@pytest.mark.parametrize("payload", [b"\xff\xfe", b"\0"])
def test_a_file_that_is_not_text(tmp_path: Path, payload: bytes) -> None:
    """Bytes that are no UTF-8 text are a MatrixError."""
    path = tmp_path / "m.toml"
    path.write_bytes(payload)

    with pytest.raises(MatrixError, match="not readable as TOML"):
        load(path)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    """Neither is a traceback."""
    with pytest.raises(MatrixError, match="no such file"):
        load(tmp_path / "nothing.toml")
    with pytest.raises(MatrixError):
        load(tmp_path)


SCALAR = (
    st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=6)
    | st.dates() | st.sampled_from(["gptq", "*", "[", "../x", ">=1", "auto", "cpu-*"])
)  # fmt: skip


JUNK = st.recursive(
    SCALAR,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)


def places(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [here] if here else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*here, key))
    return found


PLACES = places(tomllib.loads(MATRIX))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(PLACES), JUNK), min_size=1, max_size=3))
def test_junk_is_a_matrix_or_a_matrix_error(tmp_path: Path, junk: list[tuple[tuple[Any, ...], Any]]) -> None:
    """Any value in any place: the file is a matrix whose cells can be listed, or it is refused; nothing else."""
    raw = tomllib.loads(MATRIX)
    for path, value in junk:
        try:
            put(*path, value)(raw)
        except (KeyError, TypeError, IndexError, AttributeError):
            continue  # an earlier edit took this place away
    text = "\n".join(f"{toml(key)} = {toml(value)}" for key, value in raw.items())
    try:
        matrix = parse(tmp_path, text)
    except MatrixError as error:
        assert error.mistakes
    else:
        for cell in matrix.cells():
            matrix.kernel_classes(cell)


def test_every_legal_combination_is_accepted(tmp_path: Path) -> None:
    """The table of what a layout carries is what is accepted."""
    for layout, pairs in CARRIES.items():
        for weights, activations in pairs:

            def edit(raw: dict[str, Any], row: tuple[str, str, str] = (layout, weights, activations)) -> None:
                raw["formats"]["bf16"].update(layout=row[0], weights=row[1], activations=row[2])

            parse(tmp_path, document(edit))


def test_the_shipped_matrix_knows_which_activations_are_quantized_and_by_what() -> None:
    """Formats by their precision; the chips that multiply them; the kernel families that leave activations alone."""
    shipped = load(ROOT / "quant_matrix.toml")
    precision = {name: row.precision for name, row in shipped.formats.items() if row.precision}

    wanted = {"nvfp4_w4a4": "W4A4", "mxfp8": "W8A8", "int8_w8a8": "W8A8", "fp8_tensor": "W8A8", "bnb_int8": "W8A8"}
    assert wanted == {name: precision.get(name) for name in wanted}
    assert {"nvfp4_w4a16", "fp8_w8a16", "mxfp4", "bf16"}.isdisjoint(precision)
    fp4 = [row for row in shipped.hardware if shipped.multiplies(Cell("tiny-qwen3", "nvfp4_w4a4", row))]
    assert ["sm100", "sm120"] == fp4
    assert {"MarlinNvFp4LinearKernel", "MacheteLinearKernel"} <= shipped.weight_only_classes
    assert (
        not {"CutlassNvFp4LinearKernel", "TritonInt8ScaledMMLinearKernel", "UnquantizedLinearMethod"}
        & shipped.weight_only_classes
    )
