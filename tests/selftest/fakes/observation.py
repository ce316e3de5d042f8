"""Hand-made observations."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from quantdet.observations.header import SCHEMA, Header, PromptHeader
from quantdet.observations.observation import Block, Observation, Output, PromptRecord, write
from quantdet.observations.store import Store
from selftest.fakes.engine import block_of, executed, pseudo_logits, sha256

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
