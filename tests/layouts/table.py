"""The table of the configurations for people: `cd tests && python -m layouts.table > layouts/README.md`."""

from collections.abc import Iterable, Mapping

from layouts.rows import BARE_RUNS, SM90, Row, rows

_HEAD = """\
# Checkpoint configurations

{count} tiny checkpoints, each with the verdict that `--model` has to give it. Generated from `configurations.toml`; do not
edit. On a CPU without AMX {exact} of them are BIT_EXACT, {unsupported} are refused by vLLM, and {invalid} have a fault. Of
those with a fault, vLLM by itself runs {silent} without a word: **runs** in bold. A parameter that nothing fills is then
whatever the memory held, which another process may see otherwise.

```sh
cd tests
python -m layouts.make DIR gptq-g32 ct-missing-scale   # writes these two folders; without names, all
python -m layouts.table > layouts/README.md            # writes this page
```

Two decoder layers, 256 wide, 1024 token ids; numbers from the suite's own generator and quantizers, the same bytes on every
machine; NumPy only. Models with experts have four. There is no torchao here: its files are made of torch's tensor subclasses.

- **CPU**: the verdict on a CPU without AMX; where one with AMX should give another, that stands behind a slash (read off vLLM's
  sources, not measured).
- **sm90**: the verdict and kernel on a Hopper GPU with vLLM {versions}; `?` behind it is read off vLLM's sources and not yet
  measured, `unknown` is not even that. A fault of the checkpoint is the same everywhere.
- **says**: a fragment of what the run has to say: the kernel of a good one, the name of a fault, or vLLM's reason.
- **vLLM by itself**: what vLLM 0.32.0 did with the folder on a CPU without AMX, in a process of its own: what its linear
  layers executed, or the end of its exception.
"""
_COLUMNS = "| configuration | what | CPU | sm90, {} | sm90, {} | says | vLLM by itself |\n|---|---|---|---|---|---|---|\n"


def text(found: Mapping[str, Row]) -> str:
    """The whole README."""
    every = list(found.values())
    sections = list(dict.fromkeys(row.section for row in every))
    head = _HEAD.format(
        count=len(every),
        exact=_count(row.cpu == "BIT_EXACT" for row in every),
        unsupported=_count(row.cpu == "UNSUPPORTED" for row in every),
        invalid=_count(row.cpu in ("INVALID", "exit 4") for row in every),
        silent=_count(row.silent for row in every),
        versions=" and ".join(SM90),
    )
    parts = [head]
    for section in sections:
        lines = [_line(row) for row in every if row.section == section]
        parts.append(f"\n## {section}\n\n{_COLUMNS.format(*SM90)}{''.join(lines)}")
    return "".join(parts)


def _line(row: Row) -> str:
    verdict = f"`{row.cpu}`" + (f" / `{row.amx}`" if row.amx else "")
    sm90 = [_sm90(row, version) for version in SM90]
    cells = (f"`{row.name}`: {row.title}", row.what, verdict, *sm90, _code(row.message), _bare(row))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _sm90(row: Row, version: str) -> str:
    expected = row.on_sm90(version)
    if expected is None:
        return "unknown"
    certain = expected.measured or not row.sm90  # a fault of the checkpoint is found without the engine
    words = f"`{expected.verdict}`" + (f" {expected.kernel}" if expected.kernel else "")
    return words + ("" if certain else " ?")


def _bare(row: Row) -> str:
    if row.bare != BARE_RUNS:
        return _code(row.bare)
    return f"{'**runs**' if row.silent else 'runs'}: {row.kernels}"


def _code(words: str) -> str:
    fence = "``" if "`" in words else "`"
    return f"{fence}{words}{fence}"


def _count(these: Iterable[bool]) -> int:
    return sum(map(bool, these))


if __name__ == "__main__":
    print(text(rows()), end="")
