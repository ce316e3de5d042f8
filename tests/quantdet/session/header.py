"""The run header: machine, versions, and every environment variable that could change a kernel."""

from quantdet import __version__
from quantdet.session.machine.environment import relevant_variables
from quantdet.session.session import Session


def lines(session: Session) -> list[str]:
    """For `pytest_report_header`."""
    machine, installed = session.machine, session.software
    rows = machine.rows(session.matrix)
    kinds = [gpu.gfx or f"cc {gpu.compute_capability}" for gpu in machine.gpus]
    gpus = ", ".join(f"{gpu.name} ({kind}, {gpu.memory_gib:.0f} GiB)" for gpu, kind in zip(machine.gpus, kinds, strict=True))
    vllm = f"{installed.vllm} ({installed.flavour})" if installed.vllm else "not installed"
    others = {"transformers": installed.transformers, "torch": installed.torch}
    versions = {"vllm": vllm, **{name: version or "not installed" for name, version in others.items()}}
    variables = " ".join(f"{name}={value}" for name, value in relevant_variables().items())
    found = [
        f"quantdet {__version__}: hardware {', '.join(rows) or 'none of the matrix'}; "
        f"cpu {machine.cpu_name}; gpu {gpus or 'none'}; memory {machine.memory_gib:.0f} GiB",
        f"quantdet: {', '.join(f'{name} {version}' for name, version in versions.items())}; "
        f"matrix {', '.join(path.name for path in (session.options.matrix, *session.options.expect))}; "
        + (
            f"replay {', '.join(map(str, session.options.replay))}"
            if session.options.replay
            else f"store {session.options.store}"
        ),
        f"quantdet: variables {variables or 'none set'}",
    ]
    found += [f"quantdet: {line}" for line in session.about]
    if newer := session.newer():
        found.append(f"quantdet: NEWER THAN MEASURED: {newer}")
    if session.inject is not None:
        found.append(f"quantdet: SEEDED DEFECT {':'.join(session.inject)} (QUANTDET_INJECT)")
    return found
