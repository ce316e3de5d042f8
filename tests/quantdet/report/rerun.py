"""The command that runs one case of this run again: the case, and every option and variable that its outcome depends on."""

import os
import shlex

import pytest

from quantdet import collect

# Not among them: what only chooses cases or workers, what only writes (--record, --report), and --fresh, since the store
# holds what the verdict was about.
VALUES = (
    "--matrix", "--store", "--replay", "--reference", "--hardware", "--require-hardware", "--repeats", "--max-flip-rate",
    "--lifetimes",
)  # fmt: skip
FLAGS = ("--ignore-native", "--no-controls", "--no-activations", "--allow-download")


def command(config: pytest.Config, nodeid: str) -> str:
    """What to paste where this run was started."""
    session = config.stash[collect.SESSION]
    path, *rest = nodeid.split("::", 1)
    words = ["pytest", "::".join([os.path.relpath(config.rootpath / path, config.invocation_params.dir), *rest])]
    for name in VALUES:
        given = config.getoption(name)
        words += [f"{name}={value}" for value in (given if isinstance(given, list) else [given]) if value is not None]
    words += [name for name in FLAGS if config.getoption(name)]
    prefix = f"QUANTDET_INJECT={shlex.quote(':'.join(session.inject))} " if session.inject else ""
    return prefix + shlex.join(words)  # an id may hold shell characters
