"""`stored.described` on plain objects: what a layer holds of its checkpoint, whatever the layout."""

from typing import Any

import pytest

from quantdet.engines.child.stored import Stored, described


class Parameter:
    """A shape and bytes of an element, as a torch parameter has them; `input_dim` where ranks divide its inputs."""

    def __init__(self, *shape: int, size: int = 2, **more: int) -> None:
        self.shape = shape
        self._size = size
        vars(self).update(more)

    def element_size(self) -> int:
        return self._size


class Linear:
    def __init__(self, k: int = 256, n: int = 64, **more: Any) -> None:
        self.input_size_per_partition, self.output_size_per_partition = k, n
        vars(self).update(more)


def of(parameters: dict[str, Parameter], module: Any = None) -> Stored:
    names = {f"model.layers.0.o_proj.{name}": "X" for name in parameters}
    return described(module or Linear(), parameters, names, names)


@pytest.mark.parametrize(
    ("parameters", "bits", "group"),
    [
        ({"weight": Parameter(64, 256)}, 16, None),
        ({"weight": Parameter(64, 256, size=1), "weight_scale": Parameter(64, 1, size=4)}, 8, 256),  # of each channel
        ({"weight": Parameter(64, 256, size=1), "weight_scale": Parameter(3, size=4)}, 8, None),  # of three projections
        ({"weight": Parameter(64, 256, size=1), "weight_scale_inv": Parameter(2, 4, size=4)}, 8, None),  # blocks of 32 x 64
        ({"weight": Parameter(64, 256, size=1), "weight_scale_inv": Parameter(8, 32, size=4)}, 8, None),  # blocks of 8 x 8
        ({"qweight": Parameter(32, 64, size=4), "qzeros": Parameter(8, 8, size=4), "scales": Parameter(8, 64)}, 4, 32),
        ({"qweight": Parameter(24, 64, size=4), "scales": Parameter(2, 64), "g_idx": Parameter(256, size=4)}, 3, 128),
        ({"qweight": Parameter(256, 8, size=4), "scales": Parameter(4, 64)}, 4, 64),  # AWQ
        (
            {"weight_packed": Parameter(64, 32, size=4), "weight_scale": Parameter(64, 2), "weight_shape": Parameter(2)},
            4, 128,
        ),
        (
            {"weight": Parameter(64, 128, size=1), "weight_scale": Parameter(64, 16, size=1), "global_scale": Parameter(64)},
            4, 16,
        ),
        ({"weight": Parameter(64, 256, size=1), "input_scale": Parameter(64, size=4)}, 8, None),
        ({"weight": Parameter(64, 100)}, None, None),  # padded: no whole number of bits
        ({"bias": Parameter(64, 256)}, None, None),
    ],
    ids=[
        "bf16", "channel", "tensor", "block", "small block", "gptq", "gptq 3 bits", "awq", "packed", "nvfp4", "inputs",
        "padded", "no weight",
    ],
)  # fmt: skip
def test_bits_and_groups(parameters: dict[str, Parameter], bits: int | None, group: int | None) -> None:
    """Of k x n weights: by the size of the largest parameter, and by the number of scales of weights."""
    found = of(parameters)

    assert (256, 64, bits, group) == (found.k, found.n, found.bits, found.group)


def test_act_order_over_ranks() -> None:
    """Each rank has the scales of all inputs of the layer, of which it has a half; else each has its own."""
    divided = Linear(k=128, input_size=256)

    whole = of({"qweight": Parameter(16, 64, size=4), "scales": Parameter(8, 64)}, divided)
    own = of({"qweight": Parameter(16, 64, size=4), "scales": Parameter(4, 64, input_dim=0)}, divided)

    assert (32, 32, 4, 4) == (whole.group, own.group, whole.bits, own.bits)


def test_tensors_are_told_once() -> None:
    """By their own names: three projections in one layer have the same."""
    names = {
        f"model.layers.0.self_attn.{one}_proj.{part}": word
        for one in "qkv"
        for part, word in (("weight", "I8"), ("bias", "F16"))
    }

    assert ("bias:F16", "weight:I8") == described(Linear(), {}, names, names).stored


def test_what_was_not_observed_stays_empty() -> None:
    """A layer that nothing is known to have filled, and one without a shape: experts."""
    assert Stored() == described(Linear(), {"weight": Parameter(64, 256)}, (), {})
    experts = described(
        object(), {"w13_weight": Parameter(4, 64, 256)}, ["experts.0.up_proj.weight"], {"experts.0.up_proj.weight": "BF16"}
    )
    assert Stored(("weight:BF16",)) == experts


def test_an_embedding_has_a_shape_too() -> None:
    """Its own words for it."""
    embedding = type("E", (), {"embedding_dim": 256, "num_embeddings_per_partition": 64})()

    assert (256, 64, 16) == ((found := of({"weight": Parameter(64, 256)}, embedding)).k, found.n, found.bits)
