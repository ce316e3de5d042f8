"""Is the kernel that ran the one that was asked for, in every layer?"""

from collections.abc import Collection, Sequence

from quantdet.judging.reported import NOTE
from quantdet.judging.verdicts import Judgement, Verdict
from quantdet.observations.observation import Observation


def kernel(
    observation: Observation, requested: str, classes: Sequence[str], quantizes: str, moe_classes: Sequence[str] = (), *,
    precision: str = "", weight_only: Collection[str] = (), native: bool = False,
) -> Judgement:  # fmt: skip
    """Is the executed kernel the requested one, the same in every linear layer and in every layer of experts?

    `classes` are the class names that the requested kernel shows, `moe_classes` those of its experts; none: vLLM's own
    choice, not judged but for mixing. `quantizes`: "all" linear layers, "experts" alone, or none ("").
    `precision` ("W4A4") of a format that quantizes activations: a kernel of the `weight_only` classes does not. Where the
    chip multiplies the format (`native`), that is a substitution; elsewhere it is what vLLM can do, and is said.
    """
    header = observation.header
    executed = header.executed
    if executed is None:
        text = f"needs the layers of the loaded model to confirm {requested}, have {NOTE}"
        return Judgement(Verdict.UNAVAILABLE, observation.cell, "kernel", text, False)
    expected = [" or ".join(names) for names in (classes, moe_classes) if names]
    figures: dict[str, object] = {
        "kernel.requested": requested,
        "kernel.executed": executed.summary,
        "expectation": f"{requested}: {', experts '.join(expected) or 'one kernel in every layer'}",
    }

    def invalid(why: str) -> Judgement:
        return Judgement(Verdict.INVALID, observation.cell, "kernel", why, False, figures, executed.summary)

    if executed.tensor_parallel_size != (ranks := int(header.engine_args.get("tensor_parallel_size", 1))):
        return invalid(f"requested {ranks} ranks, executed {executed.summary}")
    if not executed.linear:
        return invalid("no linear layer was found in the loaded model")
    if (moe_classes or quantizes == "experts") and not executed.moe:
        return invalid(f"requested {requested}, found no layer of experts in the loaded model: {executed.summary}")
    if quantizes == "experts" and any(layer.method.startswith("Unquantized") for layer in executed.moe):
        return invalid(f"requested {requested} for experts, executed {executed.summary}: the format was ignored")
    for layers, known in ((executed.linear, classes), (executed.moe, moe_classes)):
        names = {layer.executed for layer in layers}
        if len({(layer.executed, layer.detail) for layer in layers}) > 1:
            return invalid(f"mixed kernels: {executed.summary}")
        if known and not names <= set(known):
            return invalid(f"requested {requested} ({' or '.join(known)}), executed {executed.summary}")
        if quantizes == "all" and any(layer.method.startswith("Unquantized") for layer in layers):
            return invalid(f"requested {requested}, executed {executed.summary}: the format was ignored")
    asked = f"requested {requested}" if classes else "nothing requested: vLLM's own choice, the same in every layer"
    if precision:
        # Whatever the capitals: MarlinMxFp8 of one vLLM is MarlinMxfp8 of another.
        known_names = {name.casefold() for name in weight_only}
        names_found = [layer.executed for layer in executed.linear + executed.moe if layer.executed.casefold() in known_names]
        substituted, first = bool(names_found), next(iter(names_found), "")
        figures["kernel.weight_only"] = substituted
        if substituted and native:
            return invalid(f"{precision} requested, weight-only kernel {first} executed: activations are not quantized")
        if substituted:
            text = f"weight-only: executed {executed.summary}, activations stay {header.dtype or 'unquantized'}"
            text += f" (the format is {precision}; {asked})"
            return Judgement(Verdict.CONFIRMED, observation.cell, "kernel", text, True, figures)
    return Judgement(Verdict.CONFIRMED, observation.cell, "kernel", f"{executed.summary} ({asked})", True, figures)
