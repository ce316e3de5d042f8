"""A cell: one model in one format on one hardware; the phases and engines that it is measured in."""

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, get_args

# Safe in pytest node ids, in `-k` expressions, as a file name and in artefact names.
ID_PATTERN = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
Phase = Literal["decode", "prefill"]
PHASES: tuple[Phase, ...] = ("decode", "prefill")
EngineName = Literal["vllm", "transformers"]
OTHER_ENGINES = frozenset(get_args(EngineName)) - {"vllm"}


@dataclass(frozen=True, order=True)
class Cell:
    """One model in one format on one hardware row.

    `vllm`: the version, given only where one run judges recordings of several versions.
    """

    model_id: str
    format_id: str
    hardware_id: str
    vllm: str = ""

    @property
    def id(self) -> str:
        return f"{self.model_id}/{self.format_id}/{self.hardware_id}{f'@{self.vllm}' if self.vllm else ''}"

    def __str__(self) -> str:
        return self.id


def matches_any(name: str, patterns: str | tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, p) for p in ((patterns,) if isinstance(patterns, str) else patterns))
