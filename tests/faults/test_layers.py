"""Hooks on torch modules: what they digest, that they change nothing, and the names of layers that share an object."""

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from quantdet.engines.child import layers  # noqa: E402
from quantdet.judging.first_layer import compare  # noqa: E402


class InPlace(torch.nn.Module):  # type: ignore[misc, name-defined]
    """Writes its output over its input, as a fused add and norm does."""

    def forward(self, x: Any, *, residual: Any) -> Any:
        x.add_(residual)
        return x, residual


class Block(torch.nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self, shared: Any) -> None:
        super().__init__()
        self.norm = InPlace()
        self.linear = torch.nn.Linear(8, 8)
        self.shared = shared

    def forward(self, x: Any) -> Any:
        x, _ = self.norm(x.clone(), residual=torch.ones_like(x))
        return self.shared(self.linear(x))


class Model(torch.nn.Module):  # type: ignore[misc, name-defined]
    """Two blocks with one activation between them; `defect` adds to the outputs of one linear layer at one call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        shared = torch.nn.SiLU()
        self.embed = torch.nn.Embedding(16, 8)
        self.blocks = torch.nn.ModuleList([Block(shared), Block(shared)])

    def forward(self, ids: Any) -> Any:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return x


def traced(model: Any, tap: layers.LayerTap) -> list[Any]:
    """A prefill of four tokens and two steps of one."""
    tap.start()
    with torch.no_grad():
        answers = [model(ids) for ids in (torch.arange(4), torch.tensor([5]), torch.tensor([6]))]
    tap.stop()
    return answers


def test_every_leaf_is_traced_in_order_and_nothing_is_changed() -> None:
    """A shared object has the name of the layer that it serves; steps are counted; outputs are those without hooks."""
    model = Model()
    with torch.no_grad():
        bare = model(torch.arange(4))
    tap = layers.LayerTap(model)

    answers = traced(model, tap)
    traced(model, tap)

    found = tap.trace("p")
    assert torch.equal(bare, answers[0])
    once = ["embed"]
    once += [f"blocks.{block}.{part}" for block in (0, 1) for part in ("norm", "linear", "shared")]
    assert [(call, name) for call in range(3) for name in once] == [
        (call, found.modules[number].name) for call, number, _, _ in found.repeats[0]
    ]
    assert "not reproduced" == compare(found).status


def test_inputs_are_those_before_the_layer() -> None:
    """A layer that writes over its inputs has equal inputs and other outputs when it alone differs."""
    model, repeat = Model(), [0]

    def defect(module: Any, args: Any, output: Any) -> None:
        if repeat[0] == 2:
            output[0].view(torch.int32)[0, 3] ^= 1

    model.blocks[1].norm.register_forward_hook(defect)
    tap = layers.LayerTap(model)

    for repeat[0] in range(4):
        traced(model, tap)

    result = compare(tap.trace("p"))
    assert result.layer is not None
    assert ("found", "blocks.1.norm", "InPlace", "prefill", 2, 1) == (
        result.status, result.layer.name, result.layer.module, result.layer.step, result.layer.repeat, result.differ
    )  # fmt: skip
    assert (1, 64) == (result.layer.differing, result.layer.elements)  # of both tensors that it gives
    assert result.layer.max_abs is not None and 0 < result.layer.max_abs < 1e-6


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float8_e4m3fn", "int32", "bool"])
def test_a_digest_is_of_bytes_dtype_and_shape(dtype: str) -> None:
    """Strides do not matter; the sign of zero, a NaN's payload, the shape and the dtype do."""
    kind = getattr(torch, dtype)
    one = torch.arange(12).reshape(3, 4).to(kind)

    assert layers.digest((one,)) == layers.digest({"x": one.clone()})
    assert layers.digest(one.t()) == layers.digest(one.t().contiguous())
    assert layers.digest(one) != layers.digest(one.reshape(4, 3))
    raw = one.clone().view(torch.uint8)
    raw[0, 0] ^= 1
    assert layers.digest(one) != layers.digest(raw.view(kind))
    if one.is_floating_point() and one.element_size() > 1:
        zero = torch.zeros(2, dtype=kind)
        assert layers.digest(zero) != layers.digest(-zero)
    assert layers.digest(torch.empty(0, 3, dtype=kind)) != layers.digest(torch.empty(3, 0, dtype=kind))
    assert layers.digest(torch.tensor(1).to(kind)) != layers.digest(torch.tensor([1]).to(kind))


def test_what_is_no_tensor_is_left_out() -> None:
    """Arguments of other kinds, modules among them, are not digested."""
    one = torch.ones(2)

    assert layers.digest((one, None, 3, "x", Model())) == layers.digest([one])
