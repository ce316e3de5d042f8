"""A deterministic engine without weights. It imports neither an engine nor torch: a forkserver may preload it."""

import ctypes
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
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
from quantdet.observations.header import SCHEMA, Executed, Header, Layer
from quantdet.observations.observation import Block, Observation, write
from quantdet.observations.seeded_flips import FLIPS
from selftest.fakes import hidden_states
from selftest.fakes import layers as fake_layers

VOCABULARY = 1024  # the shipped synthetic workload has ids below 1000


FAKE = EngineSpec("selftest.fakes.engine:FakeEngine", "selftest.fakes.engine")


SPAWNED = EngineSpec("selftest.fakes.engine:FakeEngine")


class FakeEngine:
    """Logits are normal numbers seeded by (numerics, token ids). `plan.args` say how it behaves.

    numerics: formats with the same value have the same logits (default: the format's id);
    executes: kernel class that every layer shows; experts: that of layers of experts; stored, group: what the checkpoint stores
    of every layer, words with blanks between, in a layer [128, 64] of 4 bits; behaviour: see `_ACTIONS` and `_distort`;
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
        write(directory, header, *records, hidden_states.measured(plan, whole, behaviour))
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
    ran = executed(*names, experts=experts)
    if "stored" in plan.args:
        told = {
            "stored": tuple(str(plan.args["stored"]).split()),
            "k": 64,
            "n": 128,
            "bits": 4,
            "group": plan.args.get("group"),
        }
        ran = ran.model_copy(update={"layers": tuple(layer.model_copy(update=told) for layer in ran.layers)})
    return Header.model_validate(
        {
            **plan.identity,
            "schema": SCHEMA,
            "kind": "observation",
            "executed": ran.model_copy(update={"logits_dtype": recorder.logits_dtype}).model_dump(),
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
