"""Which elements of a parameter came from a tensor of the checkpoint: small torch modules, loaded as vLLM's layers load."""

import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from quantdet.engines.plan import InvalidMeasurement  # noqa: E402
from quantdet.engines.vllm import loading, writes  # noqa: E402

A, B = torch.arange(8.0).reshape(2, 4), torch.arange(8.0, 16.0).reshape(2, 4)
RULES = {"*attn.k_scale": "no scale", "*.g_idx": "no order"}


def filled(
    load: Callable[[Any], None], shape: tuple[int, ...] = (4, 4), dtype: Any = None, **tensors: Any
) -> tuple[int, set[str]]:
    """How many elements of a parameter stay missing after `load`, and the tensors it came from; A and B are handed out."""
    parameter = torch.nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
    seen = writes.Writes()
    with seen:
        for name, tensor in (tensors or {"a": A.clone(), "b": B.clone()}).items():
            seen.hand_out(name, tensor)
            load(SimpleNamespace(to=parameter, name=name, tensor=tensor))
    return writes.missing(parameter), set(writes.names_of(parameter))


def shard(given: Any, dim: int = 0) -> Any:
    """The half of the parameter that is for this tensor."""
    size = given.to.shape[dim] // 2
    return given.to.data.narrow(dim, size * (given.name == "b"), size)


def test_shards_fill_a_parameter() -> None:
    """By rows, by columns, from other dtypes and strides, by index."""
    both = (0, {"a", "b"})

    assert both == filled(lambda given: shard(given).copy_(given.tensor))
    assert both == filled(lambda given: shard(given, 1).copy_(given.tensor.t()))
    assert both == filled(lambda given: shard(given).copy_(given.tensor.to(torch.int32)), dtype=torch.int32)
    assert both == filled(lambda given: shard(given).copy_(given.tensor.t().contiguous().t() * 2))
    rows = {"a": torch.tensor([0, 2]), "b": torch.tensor([1, 3])}
    assert both == filled(lambda given: given.to.data.index_put_((rows[given.name],), given.tensor))
    assert both == filled(lambda given: given.to.data.index_copy_(0, rows[given.name], given.tensor))
    assert both == filled(lambda given: shard(given).view(torch.uint8).copy_(given.tensor.view(torch.uint8)))


def test_what_nothing_filled_is_counted() -> None:
    """A shard that did not come, by rows and by columns, by index; a number that nobody loaded is none that came."""

    def first(load: Callable[[Any], Any]) -> Callable[[Any], None]:
        return lambda given: load(given) if given.name == "a" else None

    assert (8, {"a"}) == filled(first(lambda given: shard(given).copy_(given.tensor)))
    assert (8, {"a"}) == filled(first(lambda given: shard(given, 1).copy_(given.tensor.t())))
    assert (8, {"a"}) == filled(first(lambda given: given.to.data.index_put_((torch.tensor([0, 2]),), given.tensor)))
    assert (16, set()) == filled(lambda given: given.to.data.zero_())
    assert (16, set()) == filled(lambda given: given.to.data.copy_(torch.zeros(4, 4)))
    assert (16, set()) == filled(lambda given: given.to.data.copy_(torch.empty_like(given.tensor).repeat(2, 1)))
    assert (16, set()) == filled(lambda given: given.to.data.add_(1))


def test_a_part_of_a_whole_that_did_not_come() -> None:
    """Tensors are gathered first, and one is lost: what is made of them is not whole either."""
    gathered = torch.empty(4, 4)

    def load(given: Any) -> None:
        if given.name == "a":
            gathered[:2].copy_(given.tensor)
        else:
            given.to.data.copy_(gathered)
            given.to.data = gathered.t().contiguous()

    assert 0 < filled(load)[0]


def test_padding_belongs_to_the_tensor_that_is_padded() -> None:
    """Filled with a number before or after it; a number read from a tensor came from it too."""

    def before(given: Any) -> None:
        shard(given).fill_(0)
        shard(given)[:1].copy_(given.tensor[:1])

    assert (0, {"a", "b"}) == filled(before)
    assert (0, {"a"}) == filled(lambda given: (given.to.data[:2].copy_(given.tensor), given.to.data[2:].fill_(0)), a=A.clone())
    assert (0, {"a"}) == filled(lambda given: given.to.data.fill_(given.tensor.item()), a=torch.tensor(3.0))


def test_data_that_is_replaced() -> None:
    """By a tensor of the checkpoint, or what is made of some."""

    def replaced(given: Any) -> None:
        given.to.data = given.tensor

    def joined(given: Any) -> None:
        kept.append(given.tensor)
        if len(kept) == 2:
            given.to.data = torch.cat(kept)

    kept: list[Any] = []
    assert (0, {"a"}) == filled(replaced, a=A.clone())
    assert (0, {"a", "b"}) == filled(joined)


def test_memory_that_is_used_again() -> None:
    """A loader hands out every tensor in one buffer."""
    buffer = torch.empty(2, 4)

    def load(given: Any) -> None:
        shard(given).copy_(given.tensor)

    assert (0, {"a", "b"}) == filled(load, a=buffer, b=buffer)


def test_rims_of_experts() -> None:
    """Zeros around every expert's weights are padding; a shard of half a side, another expert, other numbers are not."""

    def padded(*filled_of: tuple[slice, slice, slice], rest: float = 0.0) -> bool:
        parameter = torch.full((2, 8, 8), rest)
        seen = writes.Writes()
        with seen:
            for place in filled_of:
                tensor = torch.ones(parameter[place].shape)
                seen.hand_out("a", tensor)
                parameter[place].copy_(tensor)
        return writes.is_padding(parameter)

    every, most, half = slice(None), slice(0, 6), slice(0, 4)
    assert padded((every, most, most))
    assert padded((every, slice(0, 3), most), (every, slice(4, 7), most))  # two shards, each padded
    assert not padded((every, most, most), rest=1.0)
    assert not padded((every, half, every))
    assert not padded((slice(0, 1), most, most))
    assert not padded((slice(0, 1), most, most), (slice(1, 2), most, slice(0, 5)))
    assert not padded()


# ------------------------------------------------------------------------------------------------------ a whole model


class Method:
    """Repacks a layer; `online`: its weight is made when it has come, as vLLM quantizes while it loads."""

    def __init__(self, online: bool = False) -> None:
        self.online = online
        self.repacked: list[Any] = []

    def process_weights_after_loading(self, layer: Any) -> None:
        self.repacked.append(layer)
        layer.weight = torch.nn.Parameter(layer.weight.data * 2, requires_grad=False)


class Layer(torch.nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self, online: bool = False) -> None:
        super().__init__()
        self.quant_method = Method(online)
        self.input_size_per_partition, self.output_size_per_partition = 4, 4
        self.weight = torch.nn.Parameter(torch.empty(4, 4, device="meta" if online else "cpu"), requires_grad=False)
        self.weight_scale = torch.nn.Parameter(torch.full((4, 1), torch.finfo(torch.float32).min), requires_grad=False)


class Attention(torch.nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.k_scale = torch.nn.Parameter(torch.tensor(-1.0), requires_grad=False)


class Model(torch.nn.Module):  # type: ignore[misc, name-defined]
    """Two layers and the attention of each; a tensor goes where its name says, `a` and `b` into the halves of a weight."""

    packed_modules_mapping = {"ab_proj": ["a_proj", "b_proj"]}  # noqa: RUF012  # vLLM's own word

    def __init__(self, online: bool = False) -> None:
        super().__init__()
        for number in (0, 1):
            setattr(self, f"l{number}", torch.nn.ModuleDict({"ab_proj": Layer(online), "attn": Attention()}))

    def load_weights(self, weights: Any) -> None:
        for name, tensor in weights:
            where, _, part = name.rpartition(".")
            parameter = dict(self.named_parameters()).get(name.replace("a_proj", "ab_proj").replace("b_proj", "ab_proj"))
            if parameter is None:
                parameter = dict(self.named_parameters()).get(f"{where.rpartition('.')[0]}.ab_proj.{part}")
            if parameter is None:
                continue
            if parameter.is_meta:
                layer = self.get_submodule(f"{where.rpartition('.')[0]}.ab_proj")
                layer.weight = torch.nn.Parameter(torch.empty(4, 4), requires_grad=False)
                parameter = layer.weight
            data = parameter.data
            if "a_proj" in name or "b_proj" in name:
                data = data.narrow(0, 2 * ("b_proj" in name), 2)
            data.copy_(tensor)


def whole(**changes: Any) -> dict[str, Any]:
    """Every tensor of the model; None: left out."""
    tensors = {}
    for number in (0, 1):
        for side in "ab":
            tensors[f"l{number}.{side}_proj.weight"] = torch.ones(2, 4)
            tensors[f"l{number}.{side}_proj.weight_scale"] = torch.ones(2, 1)
    return {name: tensor for name, tensor in {**tensors, **changes}.items() if tensor is not None}


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[Callable[..., Any]]:
    """Loads a model of this file as vLLM does its own, watched."""
    loader = ModuleType("vllm.model_executor.model_loader.fake")
    monkeypatch.setitem(sys.modules, loader.__name__, loader)
    loader.initialize_model = lambda model: model  # type: ignore[attr-defined]

    def load(tensors: dict[str, Any], *, online: bool = False, hand: bool = True, **options: Any) -> Any:
        watch = loading.Watch(str(tmp_path), RULES, **options)
        with watch.watching():
            model = loader.initialize_model(Model(online))
            if hand:
                model.load_weights(iter(tensors.items()))
            for module in model.modules():
                if isinstance(module, Layer):
                    module.quant_method.process_weights_after_loading(module)
        return watch, model

    yield load


@pytest.mark.parametrize("online", [False, True])
def test_a_whole_model(loaded: Callable[..., Any], online: bool) -> None:
    """Everything is filled or by a rule not; a surplus tensor is listed; layers say what they hold, before it is repacked."""
    watch, model = loaded(whole(surplus=torch.ones(1)), online=online)

    found = watch.found()
    assert (4, 8, ("surplus",), 1) == (found.filled, found.tensors, found.unused, found.unused_count)
    assert {"no scale": ("l0.attn.k_scale", "l1.attn.k_scale")} == found.by_rule
    held = watch.layers[id(model.l1["ab_proj"])]
    assert (("weight:F32", "weight_scale:F32"), 4, 4, 32, 4) == (held.stored, held.k, held.n, held.bits, held.group)
    assert torch.equal(model.l1["ab_proj"].weight, torch.full((4, 4), 2.0))


@pytest.mark.parametrize(
    ("changes", "online", "words"),
    [
        (
            {"l0.a_proj.weight": None, "l0.b_proj.weight": None}, False,
            "l0.ab_proj.weight (nothing filled any of 16 elements: a_proj, b_proj)",
        ),
        ({"l1.b_proj.weight": None}, False, "l1.ab_proj.weight (nothing filled 8 of 16 elements: b_proj)"),
        ({"l1.b_proj.weight": None}, True, "l1.ab_proj.weight (nothing filled 8 of 16 elements: b_proj)"),
        ({"l0.a_proj.weight_scale": None}, False, "l0.ab_proj.weight_scale (nothing filled 2 of 4 elements: a_proj)"),
        ({"l0.a_proj.weight_scale": torch.full((2, 1), float("nan"))}, False, "l0.ab_proj.weight_scale (holds NaN)"),
        (
            {"l0.a_proj.weight_scale": torch.full((2, 1), torch.finfo(torch.float32).min)}, False,
            "l0.ab_proj.weight_scale (holds the smallest float32, which vLLM puts there before it loads)",
        ),
        ({"l1.attn.k_scale": torch.tensor(0.5)}, False, "l0.attn.k_scale (nothing filled it, and other layers' were)"),
    ],
)  # fmt: skip
def test_a_model_that_is_not_whole(loaded: Callable[..., Any], changes: dict[str, Any], online: bool, words: str) -> None:
    """By the name of the parameter, before anything else; another rank says it once it has loaded."""
    with pytest.raises(InvalidMeasurement) as caught:
        loaded(whole(**changes), online=online)
    assert f"the model holds what the checkpoint does not: {words}" == str(caught.value)

    watch, _ = loaded(whole(**changes), online=online, at_once=False)
    with pytest.raises(InvalidMeasurement) as later:
        watch.found()
    assert str(caught.value) == str(later.value)


def test_a_layer_that_nothing_was_seen_to_fill(loaded: Callable[..., Any]) -> None:
    """Its memory was never there while tensors came; and a model that was handed none at all."""
    without = {name: None for name in whole() if name.startswith("l1.")}
    with pytest.raises(InvalidMeasurement, match=r"l1\.ab_proj\.weight \(nothing filled any of 16 elements: a_proj, b_proj\)"):
        loaded(whole(**without), online=True)
    watch, _ = loaded(whole(), hand=False)
    with pytest.raises(InvalidMeasurement, match="vLLM handed its model no tensors"):
        watch.found()


def test_an_engine_that_makes_its_model_elsewhere(tmp_path: Any) -> None:
    """Nothing is known, and nothing is said."""
    watch = loading.Watch(str(tmp_path), RULES)
    with watch.watching():
        pass

    assert watch.found() is None
