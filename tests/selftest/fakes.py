"""A deterministic engine without weights, the matrix that it is measured with, and hand-made observations.

Nothing here is used outside the self-tests. Importing this module imports neither an engine nor torch, so that a
forkserver may preload it.
"""

import ctypes
import hashlib
import multiprocessing.forkserver  # noqa: F401  # before pytester notes which modules are there, so that it stays
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantdet.engines.child import faults, speed
from quantdet.engines.child.capture import digest_rows
from quantdet.engines.child.recorder import Recorder
from quantdet.engines.plan import EngineLacks, EngineRefused, InvalidMeasurement, Plan, PlannedPrompt
from quantdet.engines.process.process import EngineSpec
from quantdet.metrics.bits import stable_topk
from quantdet.observations import trace
from quantdet.observations.defects import FLIPS
from quantdet.observations.header import SCHEMA, Executed, Header, Layer, PromptHeader
from quantdet.observations.observation import Block, Observation, Output, PromptRecord, write
from quantdet.observations.store import Store
from selftest import fake_hidden, fake_layers

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
VOCABULARY = 1024  # the shipped synthetic workload has ids below 1000

FAKE = EngineSpec("selftest.fakes:FakeEngine", "selftest.fakes")
SPAWNED = EngineSpec("selftest.fakes:FakeEngine")


# ------------------------------------------------------------------------------------------------------- fake engine


class FakeEngine:
    """Logits are normal numbers seeded by (numerics, token ids). `plan.args` say how it behaves.

    numerics: formats with the same value have the same logits (default: the format's id);
    executes: kernel class that every layer shows; experts: that of layers of experts; behaviour: see `_ACTIONS` and `_distort`;
    only_not: while this file exists the engine dies;
    pace: milliseconds of a prompt and of a further token, for the figures of speed;
    only_if: the behaviour holds while this file exists; starts: file that gets a line per engine start;
    pids: file that gets the process ids of the engine and of what it starts.
    """

    def measure(self, plan: Plan, directory: Path) -> None:
        args = plan.args
        if "starts" in args:
            with open(args["starts"], "a", encoding="utf-8") as file:
                file.write(f"{plan.identity['model']}/{plan.identity['format']}\n")
        _note_pid(args, os.getpid())
        behaviour = args.get("behaviour", "honest")
        if "only_if" in args and not Path(args["only_if"]).exists():
            behaviour = "honest"
        if "only_not" in args and Path(args["only_not"]).exists():
            behaviour = "exit"
        print(f"fake engine: {behaviour}", flush=True)
        faults.fire(plan.inject)
        _act(behaviour, args)
        _disturb(behaviour, args, Path(plan.checkpoint), directory)
        if behaviour == "missing":
            return
        if plan.identity.get("role") == trace.ROLE:
            trace.write(fake_layers.traced(plan, behaviour), directory / trace.TRACE_FILE)
            return
        recorder = Recorder(plan)
        for number, prompt in enumerate(plan.prompts):
            _prompt(plan, behaviour, recorder, prompt, number)
        claims = Recorder(plan.claiming)
        for number, prompt in enumerate(plan.claims, len(plan.prompts)):
            _prompt(plan.claiming, behaviour, claims, prompt, number)
        header = _header(plan, behaviour, recorder)
        header = header.model_copy(
            update={
                "claims": tuple(record.header for record in claims.records),
                "timings": {**header.timings, **_pace(plan)},
            }
        )
        records = tuple(recorder.records), tuple(claims.records)
        whole = Observation(header, records[0], claims=records[1])
        write(directory, header, *records, fake_hidden.measured(plan, whole, behaviour))
        if behaviour == "damaged":
            path = directory / "tensors.safetensors"
            path.write_bytes(path.read_bytes()[:-1])
        if behaviour == "kill_late":
            os.kill(os.getpid(), signal.SIGKILL)


def _pace(plan: Plan) -> dict[str, float]:
    """Figures of speed on a clock of their own: `pace` says the milliseconds of a prompt and of each further token."""
    if "pace" not in plan.args:
        return {}
    prefill_ms, decode_ms = map(float, str(plan.args["pace"]).split())
    now = [0.0]

    def generate(ids: Sequence[int], n_tokens: int) -> None:
        now[0] += (prefill_ms + (n_tokens - 1) * decode_ms) / 1000

    longest = max(plan.prompts, key=lambda prompt: len(prompt.token_ids))
    return speed.timings(plan, generate, (*longest.token_ids, *longest.forced_ids), clock=lambda: now[0])


def _note_pid(args: dict[str, Any], pid: int) -> None:
    if "pids" in args:
        with open(args["pids"], "a", encoding="utf-8") as file:
            file.write(f"{pid}\n")


def _act(behaviour: str, args: dict[str, Any]) -> None:
    """What an engine may do instead of, or beside, measuring."""
    match behaviour:
        case "refuse":
            raise EngineRefused("ValueError: the fake does not take this format")
        case "lacking":
            raise EngineLacks("no-such-kernel")
        case "invalid":
            raise InvalidMeasurement("the fake's rows do not add up")
        case "say":
            print(args["says"], flush=True)
            os._exit(1)
        case "raise":
            raise RuntimeError("the fake broke down")
        case "exit":
            os._exit(3)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "ill":
            os.kill(os.getpid(), signal.SIGILL)
        case "segv":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "garbage":
            os.write(1, b"\xff\xfe not UTF-8 \x00 \x1b[31mred\x1b[0m \x07 \xef\xbf\xbe\n" * 3)
            os._exit(1)
        case "parent":
            _note_pid(args, os.getppid())
        case "children" | "sleep" | "kill_with_children":
            for _ in range(2):
                _note_pid(args, subprocess.Popen(["sleep", "300"]).pid)
            if behaviour == "sleep":
                time.sleep(300)
            elif behaviour == "kill_with_children":
                os.kill(os.getpid(), signal.SIGKILL)


def _disturb(behaviour: str, args: dict[str, Any], checkpoint: Path, directory: Path) -> None:
    """What happens around an engine; on /dev/full the kernel says what it says on a full disk."""
    match behaviour:
        case "full_arrays":
            (directory / "tensors.safetensors").symlink_to("/dev/full")
        case "full_header":
            (directory / ".observation.json").symlink_to("/dev/full")
        case "full_log_late":  # what was said waits in a buffer
            sys.stdout = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115
            print("a line")
        case "full_log":
            full = os.open("/dev/full", os.O_WRONLY)
            os.dup2(full, 1)
            os.dup2(full, 2)
            print("a line", flush=True)
        case "scribble":
            path = checkpoint / args["file"]
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)
        case "remove":
            (checkpoint / args["file"]).unlink()
        case "meet":  # the engine of another run
            end = time.monotonic() + 20
            while len(Path(args["starts"]).read_text(encoding="utf-8").splitlines()) < 2 and time.monotonic() < end:
                time.sleep(0.01)
        case "oom_killed":
            Path(args["count"]).write_text("nr_free_pages 0\noom_kill 4\n", encoding="utf-8")
            os.kill(os.getpid(), signal.SIGKILL)
        case "hold_interpreter":  # a call into C that keeps the interpreter's lock
            ctypes.PyDLL(None).sleep(300)


def pseudo_logits(numerics: str, ids: list[int], name: str, rows: int) -> NDArray[np.float32]:
    """float32 (rows, VOCABULARY), the same for the same arguments everywhere."""
    key = hashlib.sha256(f"{numerics}/{name}/{','.join(map(str, ids))}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little")))
    return generator.standard_normal((rows, VOCABULARY), dtype=np.float32)


def causal_logits(numerics: str, ids: list[int], first: int) -> NDArray[np.float32]:
    """float32 (len(ids) - first, VOCABULARY): row r depends on `numerics` and the ids up to `first` + r, as a model's does."""
    state = hashlib.sha256((f"{numerics}/" + "".join(f"{token}," for token in ids[:first])).encode())
    rows = []
    for token in ids[first:]:
        state.update(b"%d," % token)
        key = int.from_bytes(state.copy().digest()[:16], "little")
        rows.append(np.random.Generator(np.random.Philox(key=key)).standard_normal(VOCABULARY, dtype=np.float32))
    return np.asarray(rows)


def _prompt(plan: Plan, behaviour: str, recorder: Recorder, prompt: PlannedPrompt, number: int) -> None:
    ids = [*prompt.token_ids, *prompt.forced_ids]
    numerics = str(plan.args.get("numerics", plan.identity["format"]))
    if plan.inject == "integer" and behaviour != "blind":
        numerics += ", one integer changed"
    if behaviour == "path":  # the weights' place is in the numbers
        numerics += plan.checkpoint
    answer = causal_logits(numerics, ids, 0)
    prefill, decode = answer[:-1], answer[-1:]
    generated: list[int] = []
    while len(decode) < plan.decode_tokens:  # greedy, each step from what came before it
        generated.append(int(np.argmax(decode[-1])))
        decode = np.concatenate([decode, causal_logits(numerics, ids + generated, len(ids) + len(generated) - 1)])
    recorder.begin(prompt, ids, len(prompt.token_ids))
    lifetime = plan.identity.get("lifetime", 0)
    for repeat in range(plan.repeats):
        if recorder.enough(repeat):
            break
        rows = {"decode": decode.copy(), "prefill": prefill.copy()}
        last = repeat == plan.repeats - 1
        if behaviour == "restart_noise" and lifetime:
            flip(rows["prefill"], 0, 5)
        if last and number == 0 and behaviour != "blind":  # "blind": nothing that is done to the logits is seen
            for phase, (row, token) in FLIPS.get("bitflip" if plan.inject == "noise" else plan.inject, {}).items():
                flip(rows[phase], row, token)
        _distort(behaviour, rows, repeat, last, number)
        tokens = np.argmax(np.nan_to_num(rows["decode"]), axis=1).astype(np.int32)
        blocks = {
            "decode": block_of(rows["decode"], tokens, plan.top_k),
            "prefill": block_of(rows["prefill"], np.asarray(ids[1:]), plan.top_k),
        }
        began = time.monotonic()
        recorder.add(tokens, rows["decode"], rows["prefill"], blocks["decode"], blocks["prefill"])
        recorder.generate_s += time.monotonic() - began
    recorder.end()


def _distort(behaviour: str, rows: dict[str, NDArray[np.float32]], repeat: int, last: bool, number: int) -> None:
    """Seeded defects of the numbers."""
    match behaviour:
        case "flip_decode" if last and number == 1:
            flip(rows["decode"], 2, 7)
        case "flip_prefill" if last and number == 2:
            flip(rows["prefill"], 33, 7)
        case "swap" if last and number == 0:
            rows["decode"][[1, 2]] = rows["decode"][[2, 1]]
        case "nan" if repeat == 1 and number == 1:
            rows["decode"][2, 9] = np.nan
        case "noise" if repeat:
            for phase in rows:
                rows[phase] += np.float32(0.01 * repeat)
                rows[phase][:, 1::2] -= np.float32(0.02 * repeat)


def flip(logits: NDArray[np.float32], row: int, token: int) -> None:
    """Turn over the lowest mantissa bit of one logit, in place."""
    logits.view(np.int32)[row, token] ^= 1


def block_of(logits: NDArray[np.float32], chosen: NDArray[Any], k: int) -> Block:
    """What an engine answers for these logits."""
    exact = logits.astype(np.float64)
    peak = np.nanmax(exact, axis=1, keepdims=True)
    logprobs = (exact - peak - np.log(np.exp(exact - peak).sum(axis=1, keepdims=True))).astype(np.float32)
    ids = np.argsort(-logprobs, axis=1, kind="stable")[:, :k].astype(np.int32)
    ids, values = stable_topk(ids, np.take_along_axis(logprobs, ids, axis=1))
    return Block(digest_rows(logits), logprobs[np.arange(len(logits)), np.asarray(chosen)], ids, values)


def _header(plan: Plan, behaviour: str, recorder: Recorder) -> Header:
    executes = str(plan.args.get("executes", "UnquantizedLinearMethod"))
    names = {
        "wrong_kernel": ["OtherKernel"],
        "mixed_kernels": [executes, "OtherKernel"],
        "ignored": ["UnquantizedLinearMethod"],
    }.get(behaviour, [executes])
    experts = (str(plan.args["experts"]),) if "experts" in plan.args else ()
    if behaviour == "wrong_experts":
        experts = ("OtherExperts",)
    return Header.model_validate(
        {
            **plan.identity,
            "schema": SCHEMA,
            "kind": "observation",
            "executed": executed(*names, experts=experts)
            .model_copy(update={"logits_dtype": recorder.logits_dtype})
            .model_dump(),
            "nonfinite": [row.model_dump() for row in recorder.nonfinite],
            "repeats": recorder.repeats,
            "divergences": [row.model_dump() for row in recorder.divergences],
            "prompts": [record.header.model_dump() for record in recorder.records],
            "timings": {
                "measure_s": recorder.generate_s,
                "tokens_per_second": recorder.tokens / max(recorder.generate_s, 1e-9),
            },
        }
    )


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def executed(*names: str, experts: tuple[str, ...] = ()) -> Executed:
    """Kernels of a model with four layers per name, two of `experts`; unquantized layers show their method only."""
    layers = tuple(
        Layer(kind=kind, module=module, method=name if name.startswith("Unq") else "FakeMethod",
              kernel="" if name.startswith("Unq") else name, count=count)
        for found, kind, module, count in ((names, "linear", "QKVParallelLinear", 4), (experts, "moe", "RoutedExperts", 2))
        for name in found
    )  # fmt: skip
    return Executed(layers=layers, attention=("FAKE_ATTENTION",), logits_dtype="float32")


def left_behind(folder: Path, within_s: float = 5.0) -> list[Path]:
    """What is in a folder of temporary files after at most `within_s` seconds, but for pytest's own."""
    end = time.monotonic() + within_s
    while True:
        found = [path for path in folder.iterdir() if path.name.startswith("quantdet")]
        if not found or time.monotonic() > end:
            return found
        time.sleep(0.02)


def alive(pids: list[int], within_s: float = 5.0) -> list[int]:
    """Those of `pids` that still run after at most `within_s` seconds (a killed one may wait to be reaped)."""
    end = time.monotonic() + within_s
    while True:
        left = []
        for pid in pids:
            try:
                state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if state not in "ZX":
                left.append(pid)
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.02)


# ------------------------------------------------------------------------------------------- hand-made observations

IDENTITY: dict[str, Any] = {
    "key": "0" * 64, "created": "2026-01-01T00:00:00+00:00", "model": "alpha", "format": "bf16", "hardware": "cpu-here",
    "lifetime": 0, "checkpoint_sha256": "1" * 64, "engine": "fake", "workload": "w", "workload_sha256": "2" * 64,
    "repeats": 3, "decode_tokens": 4, "top_k": 4,
}  # fmt: skip


def observation(
    format_id: str = "bf16", *, numerics: str | None = None, repeats: int = 3, lengths: tuple[int, ...] = (6, 9),
    kernels: tuple[str, ...] = ("UnquantizedLinearMethod",), experts: tuple[str, ...] = (), **header: Any,
) -> Observation:  # fmt: skip
    """An honest observation: every repeat gave the same bits. `header` overrides fields of the header.

    What computes the same (`numerics`) holds the same numbers.
    """
    records = []
    decode_tokens, top_k = header.get("decode_tokens", 4), header.get("top_k", 4)
    for number, length in enumerate(lengths):
        ids = [11 + number * 17 + 3 * i for i in range(length)]
        decode = pseudo_logits(numerics or format_id, ids, "decode", decode_tokens)
        prefill = pseudo_logits(numerics or format_id, ids, "prefill", length - 1)
        tokens = np.argmax(decode, axis=1).astype(np.int32)
        output = Output(tokens, block_of(decode, tokens, top_k), block_of(prefill, np.asarray(ids[1:]), top_k))
        prompt = PromptHeader(id=f"p{number}", length=length, content_start=2, runs=(0,) * repeats)
        records.append(PromptRecord(prompt, np.asarray(ids, np.int32), (output,)))
    values = {
        **IDENTITY, "schema": SCHEMA, "kind": "observation", "format": format_id, "repeats": repeats,
        "executed": executed(*kernels, experts=experts).model_dump(),
        "prompts": [record.header.model_dump() for record in records],
        "numbers": f"decoded:{sha256(numerics or format_id)}",
    }  # fmt: skip
    return Observation(Header.model_validate({**values, **header}), tuple(records))


def with_outputs(whole: Observation, prompt: int, outputs: tuple[Output, ...], runs: tuple[int, ...]) -> Observation:
    """`whole` with one prompt's outputs and the output of each repeat replaced."""
    record = whole.prompts[prompt]
    header = record.header.model_copy(update={"runs": runs})
    prompts = list(whole.prompts)
    prompts[prompt] = PromptRecord(header, record.prompt_ids, outputs)
    changed = whole.header.model_copy(update={"prompts": tuple(p.header for p in prompts)})
    return replace(whole, header=changed, prompts=tuple(prompts))


def changed_block(block: Block, **arrays: Any) -> Block:
    """A copy of `block` with arrays replaced; a function gets a copy of the array and edits it in place."""
    found = {name: array.copy() for name, array in block.arrays().items()}
    for name, edit in arrays.items():
        edit(found[name])
    return Block(**found)


def changed_output(output: Output, phase: str, **arrays: Any) -> Output:
    """A copy of `output` with arrays of one phase edited in place (`output_ids` among them)."""
    ids = output.output_ids.copy()
    if "output_ids" in arrays:
        arrays.pop("output_ids")(ids)
    blocks = {"decode": output.decode, "prefill": output.prefill}
    blocks[phase] = changed_block(blocks[phase], **arrays)
    return Output(ids, blocks["decode"], blocks["prefill"])


def last_repeat(whole: Observation, prompt: int, output: Output) -> Observation:
    """`whole`, but the last repeat of one prompt gave `output`."""
    repeats = whole.header.repeats
    return with_outputs(whole, prompt, (*whole.prompts[prompt].outputs, output), (0,) * (repeats - 1) + (1,))


# ------------------------------------------------------------------------------------------------------ pytester runs

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
from selftest.fakes import FAKE

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


def write_often(root: str, results: Any) -> None:
    """For a process of its own: write the same observation thirty times, each time found whole; says what went wrong."""
    store, whole = Store(Path(root)), observation(numerics="bf16", key="a" * 64)
    cell, environment, key = whole.header.cell, "vllm-1-torch-2-00000000", whole.header.key
    try:
        for _ in range(30):
            with store.writing(cell, environment, key) as folder:
                write(folder, whole.header, whole.prompts)
            assert store.find(cell, environment, key) is not None
    except BaseException as error:
        results.put(repr(error))
        raise
    results.put("")
