"""Which formats re-execute a claim here, and why a claim cannot be judged here."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from quantdet import checkpoints
from quantdet.judging import causes, same_numerics
from quantdet.judging.reexecution import claim as attribution
from quantdet.judging.results import Lack, Measured, Missing, Refusal
from quantdet.judging.verdicts import Judgement, Verdict
from quantdet.matrix.cell import Cell
from quantdet.matrix.models import Model
from quantdet.matrix.rows import ONLINE, Format
from quantdet.observations.claims import Claim
from quantdet.observations.observation import Observation
from quantdet.session.session import Session


def verifiers(claim: Claim, session: Session) -> list[Cell]:
    """The formats of the claim's model that run on the verifying hardware, in vLLM: claims are made by it."""
    formats = session.matrix.formats
    cells = [Cell(claim.model_id, name, claim.hardware_id) for name in formats if formats[name].engine == "vllm"]
    return [cell for cell in cells if session.evidence.verifies(cell)]


def numbers(format_: Format) -> str:
    """What a format computes with: its weights and, where it quantizes them, its activations."""
    return format_.weights if format_.activations == "none" else f"{format_.weights} with {format_.activations} activations"


def gate(claim: Claim, session: Session) -> Lack | None:
    """Why `claim` cannot be judged here (need and have); None if it can be tried."""
    header = session.references.header(claim)
    what = f"checkpoint sha256 {header.checkpoint_sha256[:16]}, {header.checkpoint_source or 'source unknown'}"
    if claim.model_id not in session.matrix.models:
        return Lack("reexecution", f"model {claim.model_id} ({what})", "none of this name in the matrix")
    if claim.format_id not in session.matrix.formats:
        return Lack("reexecution", f"format {claim.format_id} ({what})", "none of this name in the matrix")
    here = verifiers(claim, session)
    if not here:
        cells = [cell for cell in session.matrix.cells() if cell.model_id == claim.model_id]
        reasons = [session.gate(cell) for cell in cells if cell.hardware_id == claim.hardware_id]
        nothing = Lack("reexecution", f"a format of {claim.model_id} on {claim.hardware_id}", "none")
        return next(filter(None, reasons), nothing)
    weights = numbers(session.matrix.formats[claim.format_id])
    own = [cell for cell in here if numbers(session.matrix.formats[cell.format_id]) == weights]
    if not own:
        return Lack("reexecution", f"a format with weights {weights} on {claim.hardware_id}", "none")
    dtypes = {session.matrix.verifying_dtype(cell, header.dtype) for cell in own}
    if header.dtype not in dtypes:
        need = f"a format with weights {weights} in {header.dtype} on {claim.hardware_id}"
        return Lack("reexecution", need, ", ".join(sorted(dtypes)))
    # Made here of one source, and one word: the same numbers. Two makers' may be others, which their checkpoints tell later.
    if len(own) == len(here) and _made_here(session.matrix.models[claim.model_id]):
        return _alone(claim, [cell.format_id for cell in here])
    return None


def _made_here(model: Model) -> bool:
    """Whether the suite makes every format of a model itself."""
    return model.synthetic is not None or model.package is not None


def _made_while_loading(claim: Claim, session: Session, recorded: Observation) -> bool:
    """Whether the engine makes the claimed format, so that the numbers of its folder are not those that it computes with."""
    layout = session.matrix.formats[claim.format_id].layout
    if layout in ONLINE or same_numerics.made_while_loading(recorded.header):
        return True
    if layout != "plain":  # its own quantization may be named too
        return False
    rows = session.matrix.settings(Cell(claim.model_id, claim.format_id, claim.hardware_id))
    given: list[Mapping[str, Any]] = [session.matrix.engine.args, *(row.args for row in rows)]
    return any(args.get("quantization") for args in given)


def _alone(claim: Claim, verified: Iterable[str]) -> Lack:
    """What is missing where no format with other numbers re-executes a claim: nothing could tell it from anything."""
    need = f"a format with other numbers than {claim.format_id} on {claim.hardware_id}"
    return Lack("reexecution", need, ", ".join(sorted(verified)))


def judge(claim: Claim, session: Session) -> Judgement | str:
    """The claim re-executed and judged; a text says why it is UNAVAILABLE."""
    recorded = session.references.observation(claim)
    bad = recorded.header.nonfinite
    if bad:
        text = f"non-finite logits, first prompt {bad[0].prompt} {bad[0].phase} {bad[0].position}"
        return Judgement(Verdict.INVALID, claim, "reexecution", text, False)
    wanted = recorded.header.checkpoint_sha256
    try:
        weights = session.measuring.weights(claim.model_id, claim.format_id)
    except checkpoints.Unavailable as error:
        return f"weights: needs checkpoint sha256 {wanted[:16]} ({recorded.header.checkpoint_source}): {error}"
    except (OSError, ValueError) as error:
        cell = Cell(claim.model_id, claim.format_id, claim.hardware_id)
        cause = causes.missing(cell, Missing(Verdict.ERROR, f"checkpoint: {error}"))
        return Judgement(Verdict.ERROR, claim, "reexecution", f"checkpoint: {error}", False, cause=cause)
    if weights.sha256 != wanted:
        text = f"another checkpoint under the same name: the claim's sha256 is {wanted[:16]}, here it is {weights.sha256[:16]}"
        return Judgement(Verdict.INVALID, claim, "reexecution", text, False)
    verified: dict[str, Observation] = {}
    failed: dict[str, Missing] = {}
    for cell in verifiers(claim, session):
        match session.verified(cell, recorded.header.dtype):
            case Measured(observations=(found, *_)) if found.header.nonfinite:
                failed[cell.format_id] = Missing(Verdict.INVALID, "non-finite logits")
            case Measured(observations=(found, *_)):
                verified[cell.format_id] = found
            case Missing() as missing:
                failed[cell.format_id] = missing
            case Refusal(message=message):
                failed[cell.format_id] = Missing(Verdict.UNSUPPORTED, message)
    if not verified and failed and all(one.verdict is Verdict.UNAVAILABLE for one in failed.values()):
        return next(iter(failed.values())).reason
    # Of the claim as the checkpoint of its name is here, not as it says: it may be sealed under another's name.
    held = {name: same_numerics.held(one) for name, one in verified.items()}
    if not held.get(claim.format_id):
        held[claim.format_id] = "" if _made_while_loading(claim, session, recorded) else weights.numbers
    labels = labelled(held, {name: numbers(session.matrix.formats[name]) for name in held}, claim.format_id)
    if not failed and all(labels[name] != labels[claim.format_id] for name in verified):
        told = same_numerics.short(held[claim.format_id]) or "not known here"
        need = f"reexecution: needs a format with the numbers of {claim.format_id} ({told})"
        return f"{need} on {claim.hardware_id}, have {', '.join(sorted(verified))} with others"
    if not failed and all(labels[name] == labels[claim.format_id] for name in verified):
        return _alone(claim, verified)
    sequences = session.sequences(claim.model_id, recorded.header.dtype)
    judgement = attribution.judge(claim, recorded, verified, labels, sequences, failed)
    if judgement.verdict is not Verdict.ERROR:
        return judgement
    results = {cell: session.verified(cell, recorded.header.dtype) for cell in verifiers(claim, session)}
    # What failed tells no numbers: by the word that the matrix has for it.
    words = {cell: labels.get(cell.format_id) or numbers(session.matrix.formats[cell.format_id]) for cell in results}
    own = [cell for cell, word in words.items() if word == labels[claim.format_id]]
    return replace(judgement, cause=causes.of_reexecution(results, own, session.expectations))


def labelled(held: Mapping[str, str], words: Mapping[str, str], claimed: str) -> dict[str, str]:
    """A text for what each format holds: the same text where the numbers are the same, whatever the formats are called.

    Args:
        held: by format, its numbers (`checkpoints.numbers`); empty: not known, and then nobody else's.
        words: by format, what the matrix calls them.
        claimed: the format whose numbers are called by their word alone.
    """
    by_numbers: dict[str, str] = {}
    for name in (claimed, *(name for name in held if name != claimed)):
        digest = held[name] or f"unknown of {name}"
        if digest not in by_numbers:
            # The beginning of a digest may be another's too.
            texts = (words[name], f"{words[name]} ({same_numerics.short(digest)})", f"{words[name]} ({digest})")
            by_numbers[digest] = next(text for text in texts if text not in by_numbers.values())
    return {name: by_numbers[held[name] or f"unknown of {name}"] for name in held}
