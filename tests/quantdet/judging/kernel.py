"""Is the kernel that ran the one that was asked for, in every layer?"""

from collections.abc import Collection, Sequence

from quantdet.judging import layers, loaded
from quantdet.judging.reported import NOTE
from quantdet.judging.verdicts import Judgement, Verdict
from quantdet.observations.header import Executed, Header
from quantdet.observations.observation import Observation

_OWN = "nothing requested: vLLM's own choice"


def kernel(
    observation: Observation, requested: str, classes: Sequence[str], quantizes: str, moe_classes: Sequence[str] = (), *,
    precision: str = "", weight_only: Collection[str] = (), native: bool = False,
    expected: layers.Expected | None = None, online: bool = False,
) -> Judgement:  # fmt: skip
    """Is the executed kernel the requested one in every linear layer, layer of experts and head that is to be quantized?

    Where the observation tells what the checkpoint stores of a layer, that decides what is expected of it; older recordings
    are expected to have one kernel in every linear layer, and one in every layer of experts.

    `classes` are the class names that the requested kernel shows, `moe_classes` those of its experts; none: vLLM's own
    choice, not judged but for mixing. `expected`: these classes, and what their kernels are called, by layer (None: `classes`
    for all). `quantizes`: "all" linear layers, "experts" alone, or none ("").
    `online`: the engine makes the format itself, of plain weights.
    `precision` ("W4A4") of a format that quantizes activations: a kernel of the `weight_only` classes does not. Where the
    chip multiplies the format (`native`), that is a substitution; elsewhere it is what vLLM can do, and is said.
    """
    header = observation.header
    executed = header.executed
    if executed is None:
        text = f"needs the layers of the loaded model to confirm {requested}, have {NOTE}"
        return Judgement(Verdict.UNAVAILABLE, observation.cell, "kernel", text, False)
    known = [" or ".join(names) for names in (classes, moe_classes) if names]
    figures: dict[str, object] = {
        "kernel.requested": requested,
        "kernel.executed": executed.summary,
        "expectation": f"{requested}: {', experts '.join(known) or 'one kernel in every layer'}",
        **loaded.figures(header),
    }

    def invalid(why: str) -> Judgement:
        return Judgement(Verdict.INVALID, observation.cell, "kernel", why, False, figures, executed.summary)

    each = expected or (lambda layer: (requested, tuple(classes)))
    loading = bool(header.engine_args.get("quantization")) or online
    asks = layers.Asked(requested, classes, moe_classes, quantizes, each, loading)
    wrong = _parts(header, executed, asks)
    cache, told = loaded.kv_cache(header)
    figures |= {"kv_cache": told.removeprefix("KV cache ")} if told else {}
    found = layers.Found(wrong) if wrong else _found(executed, asks)
    if found.wrong or cache:
        return invalid(found.wrong or cache)
    if found.classes:
        figures |= {"kernel.requested": found.requested, "expectation": f"{found.requested}: {' or '.join(found.classes)}"}
    asked = _asked(found, asks)
    end = "".join(f"; {note}" for note in (*found.notes, told, loaded.unused(header)) if note)
    if precision:
        first = layers.weight_only(executed.linear + executed.moe, weight_only)
        figures["kernel.weight_only"] = bool(first)
        if first and native:
            return invalid(f"{precision} requested, weight-only kernel {first} executed: activations are not quantized")
        if first:
            text = f"weight-only: executed {executed.summary}, activations stay {header.dtype or 'unquantized'}"
            text += f" (the format is {precision}; {asked}){end}"
            return Judgement(Verdict.CONFIRMED, observation.cell, "kernel", text, True, figures)
    return Judgement(Verdict.CONFIRMED, observation.cell, "kernel", f"{executed.summary} ({asked}){end}", True, figures)


def _parts(header: Header, executed: Executed, asks: layers.Asked) -> str:
    """What is wrong with the model as a whole: its ranks, or parts that it has to have."""
    experts = asks.quantizes == "experts"
    if executed.tensor_parallel_size != (ranks := int(header.engine_args.get("tensor_parallel_size", 1))):
        return f"requested {ranks} ranks, executed {executed.summary}"
    if not executed.linear:
        return "no linear layer was found in the loaded model"
    if (asks.moe_classes or experts) and not executed.moe:
        return f"requested {asks.requested}, found no layer of experts in the loaded model: {executed.summary}"
    if experts and any(layer.multiplied_plain for layer in executed.moe):
        return f"requested {asks.requested} for experts, executed {executed.summary}: the format was ignored"
    return ""


def _found(executed: Executed, asks: layers.Asked) -> layers.Found:
    if layers.tells(executed):
        return layers.against_checkpoint(executed, asks)
    wrong = _alike(executed, asks)
    if not wrong and asks.loading and all(layer.multiplied_plain for layer in executed.linear + executed.moe):
        wrong = f"requested {asks.requested}, executed {executed.summary}: {layers.NOTHING}"
    return layers.Found(wrong)


def _alike(executed: Executed, asks: layers.Asked) -> str:
    """What is wrong where nobody told what the checkpoint stores: every layer has to run the one kernel."""
    for found, known in ((executed.linear, asks.classes), (executed.moe, asks.moe_classes)):
        names = {layer.executed for layer in found}
        if len({(layer.executed, layer.detail) for layer in found}) > 1:
            return f"mixed kernels: {executed.summary}"
        if known and not names <= set(known):
            return f"requested {asks.requested} ({' or '.join(known)}), executed {executed.summary}"
        if asks.quantizes == "all" and any(layer.multiplied_plain for layer in found):
            return f"requested {asks.requested}, executed {executed.summary}: the format was ignored"
    return ""


def _asked(found: layers.Found, asks: layers.Asked) -> str:
    """What was requested, for a message."""
    if found.classes or asks.classes:
        return f"requested {found.requested or asks.requested}"
    return _OWN if found.notes else f"{_OWN}, the same in every layer"
