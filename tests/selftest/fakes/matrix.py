"""A deterministic engine without weights, the matrix that it is measured with, and hand-made observations.

Nothing here is used outside the self-tests. Importing this module imports neither an engine nor torch, so that a
forkserver may preload it.
"""

import multiprocessing.forkserver  # noqa: F401  # before pytester notes which modules are there, so that it stays
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
TESTS = ROOT / "tests"


MATRIX = """\
schema = 1

[run]
repeats = 3
decode_tokens = 4
top_k = 4
time_limit_s = 60

[hardware.cpu-here]
kind = "cpu"
title = "the fake's machine"
isa = ["avx2"]
native = ["fp32"]

[hardware.cpu-elsewhere]
kind = "cpu"
title = "a machine that is not here"
isa = ["no_such_flag"]
native = ["fp32"]

[hardware.sm90]
kind = "cuda"
title = "a GPU that is not here"
compute_capability = "9.0"
native = ["bf16", "fp8"]

[kernels.auto]
hardware = ["*"]

[kernels.unquantized]
hardware = ["*"]
classes = ["UnquantizedLinearMethod"]

[kernels.fake4]
hardware = ["cpu-*"]
classes = ["Fake4Kernel"]

[kernels.fake8]
hardware = ["cpu-here"]
classes = ["Fake8Kernel"]

[formats.bf16]
title = "unquantized"
layout = "plain"
weights = "bf16"
kernel = "unquantized"
dtype = "bfloat16"

[formats.gptq]
title = "GPTQ"
layout = "gptq"
weights = "int4-sym"
kernel = "fake4"
dtype = "float16"

[formats.ct]
title = "compressed-tensors, same integers as GPTQ"
layout = "ct"
weights = "int4-sym"
kernel = "fake4"
dtype = "float16"

[formats.awq]
title = "AWQ"
layout = "awq"
weights = "int4-asym"
kernel = "auto"
picks = { "cpu-*" = "fake4" }
dtype = { cpu = "bfloat16", default = "float16" }

[formats.int8]
title = "INT8"
layout = "ct"
weights = "int8-channel"
activations = "int8"
kernel = "fake8"
dtype = "bfloat16"

[[pin]]
kernel = "fake4"
layout = ["gptq", "ct"]
args = { executes = "Fake4Kernel", numerics = "int4-sym" }

[[pin]]
kernel = "fake8"
layout = ["ct"]
args = { executes = "Fake8Kernel" }

[models.alpha]
title = "all formats"
workload = "synthetic-v1"
group_size = 32
memory_gib = 1
formats = ["*"]
[models.alpha.synthetic]
architecture = "qwen3"
vocab_size = 1024
hidden_size = 64
intermediate_size = 64
layers = 1
heads = 2
kv_heads = 1
head_dim = 32

[models.beta]
title = "two formats, one hardware"
workload = "synthetic-v1"
group_size = 32
memory_gib = 1
formats = ["bf16", "ct"]
hardware = ["cpu-here"]
[models.beta.synthetic]
architecture = "qwen3"
seed = 1
vocab_size = 1024
hidden_size = 64
intermediate_size = 64
layers = 1
heads = 2
kv_heads = 1
head_dim = 32

[[setting]]
when = { format = "awq", hardware = "cpu-*" }
args = { executes = "Fake4Kernel" }
reason = "the fake executes what it is told"

[[expect]]
when = { format = "gptq", hardware = "cpu-*" }
outcome = "identical_to"
formats = ["ct"]
reason = "the same integers"
source = "by construction"
"""

# A question about three formats, whose words would be markup, and one about formats that repeat; to append to MATRIX.
QUESTIONS = """
[questions.three]
asks = "Are <b>three</b> formats | apart?"
source = "here"
answer = "apart"
model = ["alpha"]
formats = ["awq", "ct", "int8"]

[questions.which]
asks = "Which formats repeat?"
source = "here"
answer = "repeatable"
formats = ["bf16", "awq"]
"""

# A model with experts and a format of theirs, to append to MATRIX; "*" of the other models does not reach the format.
EXPERTS = """
[kernels.moe4]
hardware = ["cpu-*"]
classes = ["Fake4Kernel"]
moe_classes = ["Moe4Experts"]

[formats.moe]
title = "experts"
layout = "gptq"
weights = "int4-sym"
kernel = "moe4"
dtype = "float16"

[[pin]]
kernel = "moe4"
layout = ["gptq"]
args = { executes = "Fake4Kernel", experts = "Moe4Experts" }

[models.mixture]
title = "experts"
workload = "synthetic-v1"
group_size = 32
memory_gib = 1
formats = ["bf16", "moe"]
hardware = ["cpu-here"]
[models.mixture.synthetic]
architecture = "qwen3_moe"
vocab_size = 1024
hidden_size = 64
intermediate_size = 64
layers = 1
heads = 2
kv_heads = 1
head_dim = 32
experts = 2
experts_per_token = 1
expert_intermediate_size = 32
"""

CONFTEST = """\
from quantdet.session.machine.machine import Machine, Software
from selftest.fakes.engine import FAKE

pytest_plugins = ["quantdet.plugin"]


def pytest_quantdet_engine(config):
    return FAKE


def pytest_quantdet_machine(config):
    return Machine("fake cpu", frozenset({"avx2"}), 64.0), Software("0.32.0", "cpu", "2.0")
"""

# A machine with an A100 and an H100, for `make_suite`; the row `sm90` of the matrix is the second one.
TWO_GPUS = """
from quantdet.session.machine.gpus import Gpu


def pytest_quantdet_machine(config):
    gpus = tuple(
        Gpu(name, uuid, capability, 80.0, "580.1", index=index)
        for index, (name, uuid, capability) in enumerate([("A100", "GPU-a", "8.0"), ("H100", "GPU-h", "9.0")])
    )
    return Machine("fake cpu", frozenset({"avx2"}), 64.0, gpus), Software("0.32.0", "cuda", "2.0")
"""

# A format that asks for FP4 activations, and a kernel for it that does not quantize them.
W4A4 = """
[kernels.fake_marlin]
hardware = ["*"]
classes = ["FakeMarlin"]
weight_only = true

[formats.w4a4]
title = "NVFP4 W4A4"
layout = "ct"
weights = "nvfp4"
activations = "fp4"
kernel = "auto"
dtype = "float16"
native = "fp4"

[[setting]]
when = { format = "w4a4", hardware = "sm90" }
args = { executes = "FakeMarlin" }
reason = "what vLLM does without native FP4"
"""

PYPROJECT = f"""\
[tool.pytest]
strict = true
pythonpath = ["{TESTS.as_posix()}"]
addopts = [
  "-rfE", "--import-mode=importlib", "-p", "no:rerunfailures",
  "-p", "no:hypothesispytest", "--assert=plain", "--tb=short",
]
junit_family = "xunit1"
filterwarnings = ["error"]
"""


def setting(format_id: str, behaviour: str, **args: str) -> str:
    """A `[[setting]]` that gives a format's engine a behaviour."""
    pairs = ", ".join(f'{name} = "{value}"' for name, value in {"behaviour": behaviour, **args}.items())
    return f'\n[[setting]]\nwhen = {{ format = "{format_id}" }}\nargs = {{ {pairs} }}\nreason = "a seeded defect"\n'


def expect(format_id: str, outcome: str, phase: str | None = None) -> str:
    """An `[[expect]]` row."""
    which = f', phase = "{phase}"' if phase else ""
    when = f'{{ format = "{format_id}", hardware = "cpu-here"{which} }}'
    return f'\n[[expect]]\nwhen = {when}\noutcome = "{outcome}"\nreason = "for the test"\nsource = "the test"\n'


def make_suite(folder: Path, matrix: str = MATRIX, machine: str = "") -> None:
    """A copy of the measured tests with the fake engine, in `folder`. `machine`: code with another machine hook."""
    (folder / "pyproject.toml").write_text(PYPROJECT, encoding="utf-8")
    (folder / "conftest.py").write_text(CONFTEST + machine, encoding="utf-8")
    (folder / "quant_matrix.toml").write_text(matrix, encoding="utf-8")
    for path in sorted((TESTS / "determinism").glob("test_*.py")):
        shutil.copy(path, folder / path.name)
