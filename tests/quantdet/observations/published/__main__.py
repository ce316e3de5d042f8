"""Published result files, turned into observations that `--replay` judges.

    python -m quantdet.observations.published FILE... --out DIR [--hardware ID] [--vllm VERSION]

Reads the two layouts of the published files (`layouts.py`). What they hold is logprobs, some of them; the observations say
so (`evidence: reported`), and so does every verdict on them. Weights are not at hand: `checkpoint_sha256` is the SHA-256 of
"name:" and the checkpoint's name. Files are hostile input: whatever is wrong with one is a line on stderr and exit code 2,
and then nothing is written.
"""

import argparse
import hashlib
import re
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
from packaging.version import InvalidVersion, Version

from quantdet.matrix import load, matrix
from quantdet.matrix.cell import Cell, Phase
from quantdet.observations import observation, store
from quantdet.observations.comparable import comparable
from quantdet.observations.header import SCHEMA, Header, PromptHeader, Reported
from quantdet.observations.observation import Block, Observation, ObservationError, Output, PromptRecord, write
from quantdet.observations.published import checked, layouts
from quantdet.observations.published.checked import ImportRefused, shown
from quantdet.observations.published.layouts import Answer, Report, Row
from quantdet.observations.store import slug

MODEL = "qwen3-8b"
MAX_FILES = 1000
# What a GPU's name, as its driver gives it, says of its compute capability; the matrix knows the row of that.
CAPABILITIES = (
    (r"A100|A800|A30", "8.0"),
    (r"A40|A10G?|A16|A2|A4000|A4500|A5000|A5500|A6000|RTX 30[5-9]0", "8.6"),
    (r"L40S?|L4|L20|RTX 40[5-9]0|RTX \d000 Ada", "8.9"),
    (r"H100|H200|H800|H20|GH200", "9.0"),
    (r"B200|B100|GB200", "10.0"),
    (r"RTX 50[5-9]0|RTX PRO \d000", "12.0"),
)


def hardware_of(report: Report, rows: matrix.Matrix, given: str | None) -> str:
    """The matrix's row of the GPU that the file names; `given` (`--hardware`) where it names none that is known.

    Raises:
        ImportRefused: neither says it, or they say different things.
    """
    found = None
    for pattern, capability in CAPABILITIES:
        if re.search(rf"(?<![A-Za-z0-9])({pattern})(?![A-Za-z0-9])", report.gpu):
            found = next((name for name, row in rows.hardware.items() if row.compute_capability == capability), None)
            break
    if found is None and given is None:
        named = f"names a GPU that is not known here, {shown(report.gpu)}" if report.gpu else "names no GPU"
        raise ImportRefused(f"{report.file}: {named}: give --hardware ({', '.join(rows.hardware)})")
    if found is not None and given is not None and found != given:
        raise ImportRefused(f"{report.file}: names {shown(report.gpu)}, which is {found}; --hardware says {given}")
    return found or str(given)


def observe(report: Report, cell: Cell, vllm: str | None = None) -> Observation:
    """One report as an observation that has not been written yet.

    Raises:
        ImportRefused: `vllm` is not the version that the file names.
    """
    named = report.environment.get("vllm")
    if vllm is not None and named not in (None, vllm):
        raise ImportRefused(f"{report.file}: names vLLM {named}; --vllm says {vllm}")
    environment = {"vllm": vllm or "", **report.environment, "gpu": report.gpu}
    requests = [[one.id, one.length, list(one.ids)] for one in report.requests]
    records, coverage = [], []
    for request in report.requests:
        prefill, decode = ({row for answer in request.answers for row in at(answer)} for at in (_prefill, _decode))
        width = max(len(row.ids) for answer in request.answers for row in (*answer.prefill.values(), *answer.decode.values()))
        covered = Reported(
            prefill=tuple(sorted(prefill)), decode=tuple(sorted(decode)), width=width,
            generated=len(request.answers[0].generated), ids=bool(request.ids),
        )  # fmt: skip
        outputs: dict[bytes, tuple[int, Output]] = {}
        runs = []
        for answer in request.answers:
            output = Output(
                np.array(answer.generated, np.int32),
                _block(answer.decode, covered, "decode"),
                _block(answer.prefill, covered, "prefill"),
            )
            runs.append(outputs.setdefault(output.fingerprint, (len(outputs), output))[0])
        header = PromptHeader(id=request.id, length=request.length, content_start=1, runs=tuple(runs))
        distinct = tuple(output for _, output in outputs.values())
        records.append(PromptRecord(header, np.array(request.ids, np.int32), distinct, covered))
        coverage.append(covered)
    identity = {
        "model": cell.model_id, "format": cell.format_id, "hardware": cell.hardware_id,
        "checkpoint_sha256": hashlib.sha256(f"name:{report.checkpoint}".encode()).hexdigest(),
        "checkpoint_source": report.checkpoint, "engine": "vllm", "engine_args": report.args, "dtype": report.dtype,
        "workload": report.layout, "workload_sha256": store.key_of({"layout": report.layout, "requests": requests}),
        "repeats": len(report.requests[0].answers), "decode_tokens": report.decode_tokens, "top_k": report.top_k,
        "environment": environment, "created": report.created, "lifetime": 0, "evidence": "reported",
    }  # fmt: skip
    bits = [output.fingerprint.hex() for record in records for output in record.outputs]
    header_ = Header.model_validate(
        {
            **identity, "schema": SCHEMA, "kind": "observation", "prompts": [one.header for one in records],
            "reported": coverage, "key": store.key_of({**identity, "bits": bits}),
        }
    )  # fmt: skip
    return Observation(header_, tuple(records))


def _prefill(answer: Answer) -> dict[int, Row]:
    return answer.prefill


def _decode(answer: Answer) -> dict[int, Row]:
    return answer.decode


def _block(rows: dict[int, Row], covered: Reported, phase: Phase) -> Block:
    """Rows of a report, padded to one width with ids that the row has not and logprobs of -inf."""
    n = len(covered.rows(phase))
    digests, chosen = np.zeros((n, 32), np.uint8), np.full(n, -np.inf, np.float32)
    ids, logprobs = np.zeros((n, covered.width), np.int32), np.full((n, covered.width), -np.inf, np.float32)
    for index, place in enumerate(covered.rows(phase)):
        row = rows[place]
        k = len(row.ids)
        exact = np.array(row.ids, "<i4").tobytes() + np.array(row.logprobs, "<f8").tobytes()
        digests[index] = np.frombuffer(hashlib.sha256(exact).digest(), np.uint8)
        padding = (number for number in range(2 * covered.width) if number not in row.ids)
        ids[index] = [*row.ids, *(next(padding) for _ in range(covered.width - k))]
        logprobs[index, :k] = row.logprobs
        if row.chosen is not None:
            chosen[index] = row.chosen
    return Block(digests, chosen, ids, logprobs)


def check_together(observations: Sequence[Observation]) -> None:
    """Whether a replay can judge the observations in one folder.

    Raises:
        ImportRefused: two runs of one cell, or formats of one model and hardware whose requests cannot be compared.
    """
    for a, b in combinations(observations, 2):
        one, other = a.header, b.header
        if (one.model, one.hardware) != (other.model, other.hardware) or one.key == other.key:
            continue
        where, versions = f"{one.model} on {one.hardware}", {observation.vllm_of(a), observation.vllm_of(b)}
        if len(versions) > 1 and "" not in versions:
            continue  # a cell of each version
        hint = "give another --out to one of them"
        if len(versions) > 1:
            raise ImportRefused(f"{where}: one report names vLLM {max(versions)}, another none: {hint}, or --vllm")
        if one.format == other.format:
            raise ImportRefused(f"{where}: two runs of {one.format} ({one.workload}, {other.workload}): {hint}")
        if why := comparable(a, b):
            raise ImportRefused(f"{where}: {one.format} and {other.format} cannot be judged together, {why}: {hint}")


def run(files: Sequence[Path], out: Path, rows: matrix.Matrix, hardware: str | None, vllm: str | None) -> list[Observation]:
    """Import `files` into `out`; all of them or none.

    Raises:
        ImportRefused, ObservationError, OSError: a file, or what is in `out` already, cannot be used.
    """
    if hardware is not None and hardware not in rows.hardware:
        raise ImportRefused(f"--hardware: no {shown(hardware)} in the matrix; it has {', '.join(rows.hardware)}")
    if vllm is not None:
        try:
            vllm = str(Version(vllm))
        except InvalidVersion:
            raise ImportRefused(f"--vllm: {shown(vllm)} is no version") from None
    if len(files) > MAX_FILES:
        raise ImportRefused(f"{len(files)} files; at most {MAX_FILES}")
    cells = set(rows.cells())
    found = []
    for path in files:
        for report in layouts.read(checked.load(path)):
            cell = Cell(MODEL, report.format_id, hardware_of(report, rows, hardware))
            if cell not in cells:
                raise ImportRefused(f"{report.file}: the matrix has no cell {cell}")
            found.append(observe(report, cell, vllm))
    there = store.Store(out)
    known = there.all() if out.exists() else []
    check_together([*known, *found])
    for one in found:
        with there.writing(one.header.cell, slug(one.header.environment), one.header.key) as folder:
            write(folder, one.header, one.prompts)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="quantdet.observations.published", description="Turn published result files into observations for --replay."
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="*_investigation.json or *_generation.json")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for pytest --replay=DIR")
    parser.add_argument("--hardware", metavar="ID", help="row of the matrix, for files that name no GPU or an unknown one")
    parser.add_argument("--vllm", metavar="VERSION", help="for files that do not name it")
    default = Path(__file__).resolve().parents[4] / "quant_matrix.toml"
    parser.add_argument("--matrix", type=Path, default=default, metavar="PATH", help="(default: that of the suite)")
    given = parser.parse_args(arguments)
    try:
        found = run(given.files, given.out, load.load(given.matrix), given.hardware, given.vllm)
    except (ImportRefused, ObservationError, load.MatrixError, OSError) as error:
        print(f"{parser.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for one in found:
        print(f"{one.cell}: {one.header.repeats} x {len(one.prompts)} requests, {one.header.checkpoint_source}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
