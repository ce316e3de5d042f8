"""The plan of a cell: engine arguments, environment and requests, and the identity that its observations are keyed by."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from quantdet import __version__
from quantdet.checkpoints import Checkpoint, altered, numbers
from quantdet.checkpoints.unchanged import files_sha256
from quantdet.engines.child.packages import version
from quantdet.engines.plan import Plan, PlannedPrompt
from quantdet.judging.results import Missing
from quantdet.judging.verdicts import Verdict
from quantdet.matrix import workload
from quantdet.matrix.cell import Cell
from quantdet.matrix.matrix import Matrix
from quantdet.matrix.models import Claims, Model
from quantdet.matrix.pins import filled
from quantdet.matrix.rows import ONLINE, EngineCall, Format
from quantdet.metrics import bounds
from quantdet.observations import store
from quantdet.observations import trace as traces
from quantdet.observations.claims import ROLE
from quantdet.session import usable

# Raised when what is measured, or how, changes: older observations are then no longer taken for new ones.
MEASUREMENT = 3


# Packages that transformers computes with where they are installed, asked for or not.
BESIDE_TRANSFORMERS = ("accelerate", "kernels")


def installed(packages: Iterable[str]) -> str:
    """The installed ones of `packages`, with their versions."""
    found = {name: version(name) for name in packages}
    return ", ".join(f"{name} {found[name]}" for name in sorted(found) if found[name] is not None)


def known_arguments(matrix: Matrix) -> frozenset[str]:
    """Names of every engine argument that a cell of `matrix` may be given."""
    rows: list[Mapping[str, Any]] = [
        matrix.engine.args,
        *(pin.args for pin in matrix.pin),
        *(row.args for row in matrix.setting),
    ]
    return frozenset({"enforce_eager", *usable.RESERVED, *(name for row in rows for name in row)} - {"model"})


def key_of(plan: Plan, lifetime: int) -> str:
    """SHA-256 over everything that an observation of this lifetime depends on.

    Without `architecture`: what is checked before a measurement does not change it, and the hardware row is in the identity.
    Without the checkpoint's source: its hashes say what was measured, wherever that is from. They decide its numbers too.
    """
    identity = {name: value for name, value in plan.identity.items() if name not in ("checkpoint_source", "numbers")}
    more = {"lifetime": lifetime, "measurement": MEASUREMENT, "extra": _beside_the_identity(plan)}
    return store.key_of({**identity, **more})


def _beside_the_identity(plan: Plan) -> dict[str, Any]:
    """What else of a plan is in its key: by the names, and only where it is asked for, as the first stores have it."""
    found: dict[str, Any] = {"spawn": plan.spawn}
    found |= {} if plan.onednn_fp8 is None else {"onednn_fp8": plan.onednn_fp8}
    found |= {"hide": list(plan.hides)} if plan.hides else {}
    found |= {} if plan.least_repeats is None else {"least_repeats": plan.least_repeats}
    found |= {"activations": True} if plan.hidden_states else {}
    found |= {"cold": list(plan.cold)} if plan.cold else {}
    found |= {} if plan.device is None else {"device": plan.device, "packages": list(plan.packages)}
    return found


@dataclass
class _Call:
    """How the engine of a cell is called: its arguments, its environment, and what of that is the cell's own."""

    args: dict[str, Any]
    env: dict[str, str]
    own: dict[str, str]
    onednn_fp8: bool | None = None


def _call(
    cell: Cell, matrix: Matrix, vllm_version: str, device: dict[str, str], computed: dict[str, Any]
) -> _Call | Missing:  # fmt: skip
    """Arguments and environment by the matrix's rows, or why there are none: no way to use the kernel.

    `computed`: arguments that follow from the requests, which a setting may replace.
    """
    format_, model = matrix.formats[cell.format_id], matrix.models[cell.model_id]
    vllm = format_.engine == "vllm"
    call: EngineCall = matrix.engine if vllm else matrix.transformers
    args: dict[str, Any] = {**call.args, **computed, **({"enforce_eager": format_.mode == "eager"} if vllm else {})}
    made = _Call(args, {}, {**device, **matrix.hardware[cell.hardware_id].limits})
    if vllm and format_.kernel not in ("auto", "unquantized"):
        pin = matrix.pin_for(format_, vllm_version, model)
        if pin is None or pin.unsupported:
            need = f"pin: needs a way to use {format_.kernel} for layout {format_.layout}"
            have = f"have none in vLLM {vllm_version}" + (f": {pin.unsupported}" if pin else "")
            return Missing(Verdict.UNSUPPORTED, f"{need}, {have}")
        made.args |= filled(pin.args, model.group_size)
        made.own |= pin.env
    for setting in matrix.settings(cell):
        made.args |= filled(setting.args, model.group_size)
        made.own |= setting.env
        made.onednn_fp8 = made.onednn_fp8 if setting.onednn_fp8 is None else setting.onednn_fp8
    made.env = {**call.env, **made.own}
    return made


def lengths(cell: Cell, matrix: Matrix, work: workload.Workload, claimed: workload.Workload | None) -> dict[str, Any]:
    """vLLM's arguments that follow from the requests."""
    run, claims = matrix.run_for(cell), matrix.models[cell.model_id].claims
    text, top_k = work.has_text, run.top_k
    length = (matrix.engine.max_text_tokens if text else workload.max_tokens(work)) + run.decode_tokens
    if claims is not None and claimed is not None:
        asked = matrix.engine.max_text_tokens if claimed.has_text else workload.max_tokens(claimed)
        length, top_k = max(length, asked + claims.decode_tokens), max(top_k, claims.top_k)
        text = text or claimed.has_text
    return {
        "skip_tokenizer_init": not text, "max_model_len": length, "max_num_batched_tokens": max(2048, length),
        "max_logprobs": top_k, "tensor_parallel_size": matrix.tensor_parallel_size(cell),
    }  # fmt: skip


def plan_for(
    cell: Cell, matrix: Matrix, work: workload.Workload, checkpoint: Checkpoint, environment: dict[str, Any], *,
    vllm_version: str, engine: str, repeats: int | None, inject: tuple[str, str] | None, max_flip_rate: float | None = None,
    device: dict[str, str] | None = None, claimed: workload.Workload | None = None,
    hidden_states: bool = False,
) -> Plan | Missing:  # fmt: skip
    """The plan, or why there is none (need and have): this vLLM cannot be told to use the kernel, or arguments do not fit.

    `device`: the environment that shows the engine a GPU of the cell's row, where it would take another.
    `claimed`: the workload of the model's claims, if they are to be recorded.
    `hidden_states`: whether they are taken too.
    """
    format_, run, row = matrix.formats[cell.format_id], matrix.run_for(cell), matrix.hardware[cell.hardware_id]
    vllm, model = format_.engine == "vllm", matrix.models[cell.model_id]
    claims = model.claims if claimed is not None else None
    computed = lengths(cell, matrix, work, claimed) if vllm else {}
    call = _call(cell, matrix, vllm_version, device or {}, computed)
    if isinstance(call, Missing):
        return call
    args = call.args
    if less := usable.too_small(args, computed):
        return Missing(Verdict.INVALID, f"engine arguments: {'; '.join(less)}")
    least = repeats or run.repeats
    repeats = least if max_flip_rate is None else max(least, bounds.runs_needed(max_flip_rate))
    defect = inject[0] if inject and any(fnmatchcase(x, inject[1]) for x in (cell.format_id, cell.id)) else ""
    settings = {} if call.onednn_fp8 is None else {"onednn_fp8": call.onednn_fp8}
    # What else the engine computes with; of vLLM's own cells its version says that.
    used = {} if vllm else {"engine_packages": installed((*BESIDE_TRANSFORMERS, *format_.packages))}
    identity: dict[str, Any] = {
        "model": cell.model_id, "format": cell.format_id, "hardware": cell.hardware_id,
        "checkpoint_sha256": checkpoint.sha256, "checkpoint_source": checkpoint.source,
        "checkpoint_files_sha256": files_sha256(checkpoint.path), "numbers": _numbers(checkpoint, format_, model, args),
        "engine": engine, "engine_args": args,
        "engine_env": call.env, "dtype": format_.dtype_on(row.kind), "workload": work.id, "workload_sha256": work.sha256,
        "repeats": repeats, "decode_tokens": run.decode_tokens, "top_k": run.top_k, "inject": defect,
        "environment": {**environment, **settings, **used, "suite": __version__},
    }  # fmt: skip
    identity |= {} if max_flip_rate is None else {"max_flip_rate": max_flip_rate}
    plan = Plan(
        identity=identity, checkpoint=str(checkpoint.path), dtype=format_.dtype_on(row.kind), args=args, env=call.env,
        prompts=tuple(_planned(prompt) for prompt in work.prompts), repeats=repeats,
        decode_tokens=run.decode_tokens, top_k=run.top_k, inject=defect,
        spawn=bool(set(call.own) - set(matrix.engine.env_at_start)) or "torchao" in format_.packages,
        hides=row.hides, onednn_fp8=call.onednn_fp8, least_repeats=None if max_flip_rate is None else least,
        hidden_states=hidden_states, architecture=None if row.kind == "cpu" else row.gfx or row.compute_capability,
        device=None if vllm else "cpu" if row.kind == "cpu" else "cuda", packages=() if vllm else format_.packages,
        unfilled=matrix.engine.unfilled if vllm else {},
    )  # fmt: skip
    return plan if claims is None or claimed is None else _with_claims(plan, claims, claimed)


def _with_claims(plan: Plan, claims: Claims, claimed: workload.Workload) -> Plan:
    """`plan`, which keeps tokens for re-execution too."""
    told = {
        "claims_workload": claimed.id, "claims_workload_sha256": claimed.sha256,
        "claim_tokens": claims.decode_tokens, "claim_top_k": claims.top_k,
    }  # fmt: skip
    return replace(
        plan, identity={**plan.identity, **told}, claims=tuple(_planned(prompt) for prompt in claimed.prompts),
        claim_tokens=claims.decode_tokens, claim_top_k=claims.top_k,
    )  # fmt: skip


def verifying(plan: Plan, dtype: str, top_k: int, *, hidden_states: bool = False) -> Plan:
    """`plan` in `dtype`, but every request once and for its prefill; the one token that is generated is not looked at.

    `hidden_states`: with fingerprints of them, in an eager cell.
    """
    changes = {"repeats": 1, "decode_tokens": 1, "top_k": top_k, "role": ROLE, "dtype": dtype}
    args = {**plan.args, "max_logprobs": max(top_k, int(plan.args.get("max_logprobs", 0)))}
    identity = {**plan.identity, **changes, "engine_args": args}
    identity.pop("max_flip_rate", None)  # decides repeats, of which there are none here
    return replace(
        plan, identity=identity, args=args, dtype=dtype, repeats=1, decode_tokens=1, top_k=top_k, claims=(), least_repeats=None,
        hidden_states=hidden_states and bool(plan.args.get("enforce_eager")),
    )  # fmt: skip


def cold(plan: Plan, matrix: Matrix) -> Plan:
    """`plan` in a process that finds no kernel compiled or chosen by an earlier one."""
    return replace(plan, identity={**plan.identity, "caches": "cold"}, cold=matrix.engine.caches, spawn=True)


def controlling(plan: Plan, kind: str, cache: Path) -> Plan:
    """`plan` with a seeded defect: see `Session.control`.

    Raises:
        Unavailable, OSError, ValueError: see `checkpoints.altered`.
    """
    folder, source = Path(plan.checkpoint), plan.identity["checkpoint_source"]
    if kind == "control":
        path, sha256 = altered.renamed(folder, cache)
    else:
        path, sha256, tensor = altered.one_integer(folder, cache)
        source = f"{source}: {tensor}"
    least = plan.least_repeats or plan.repeats
    changes = {
        "numbers": plan.identity["numbers"] if kind == "control" else "",
        "role": "control", "inject": kind, "checkpoint_sha256": sha256, "checkpoint_source": source, "repeats": least,
        "max_flip_rate": 0.0,
    }  # fmt: skip
    identity = {name: value for name, value in plan.identity.items() if not name.startswith("claim")} | changes
    return replace(
        plan, identity=identity, checkpoint=str(path), inject=kind, repeats=least, least_repeats=None, hidden_states=False,
        claims=(), claim_tokens=0, claim_top_k=0,
    )  # fmt: skip


def _numbers(checkpoint: Checkpoint, format_: Format, model: Model, args: dict[str, Any]) -> str:
    """The numbers that the engine computes with: of the checkpoint, or what these arguments let it make of plain weights."""
    if format_.layout not in ONLINE or model.hub is not None or not checkpoint.numbers:
        return checkpoint.numbers
    how: dict[str, Any] = {"weights": format_.weights}
    how |= {name: args[name] for name in ("quantization", "hf_overrides", "torchao") if name in args}
    return numbers.online(checkpoint.numbers, how)


def _planned(prompt: workload.Prompt) -> PlannedPrompt:
    if prompt.token_ids:  # a text beside ids is documentation
        return PlannedPrompt(prompt.id, prompt.token_ids, prompt.forced_ids, prompt.content_start)
    return PlannedPrompt(prompt.id, (), (), prompt.content_start, prompt.text, prompt.forced_text)


def tracing_plan(plan: Plan, prompt: str, repeats: int) -> Plan:
    """`plan`, but one prompt, with hooks; often enough to see noise again."""
    identity = {**plan.identity, "role": traces.ROLE, "repeats": repeats, "prompt": prompt, "traced": traces.TRACED}
    prompts = tuple(one for one in plan.prompts if one.id == prompt)
    return replace(plan, identity=identity, prompts=prompts, repeats=repeats, claims=())
