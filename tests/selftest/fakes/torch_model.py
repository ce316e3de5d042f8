"""Plain objects that look like the modules of a model that transformers has loaded; neither torch nor transformers."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any


def kind(name: str, module: str = "torch.nn.modules.linear", *bases: type) -> type:
    """A class of this name, from this module."""
    return type(name, bases, {"__module__": module})


Linear = kind("Linear")
Linear4bit = kind("Linear4bit", "bitsandbytes.nn.modules", Linear)
Linear8bitLt = kind("Linear8bitLt", "bitsandbytes.nn.modules", Linear)
FP8Linear = kind("FP8Linear", "transformers.integrations.finegrained_fp8", Linear)
Experts = kind("Qwen3MoeExperts", "transformers.models.qwen3_moe.modeling_qwen3_moe")
Router = kind("Qwen3MoeTopKRouter", "transformers.models.qwen3_moe.modeling_qwen3_moe")
Norm = kind("Qwen3RMSNorm", "transformers.models.qwen3.modeling_qwen3")
Embedding = kind("Embedding", "torch.nn.modules.sparse")
Parameter = kind("Parameter", "torch.nn.parameter")
Int8Tensor = kind("Int8Tensor", "torchao.quantization.quantize_.workflows.int8.int8_tensor")


def module(cls: type, **attributes: Any) -> Any:
    made = cls()
    vars(made).update({"weight": Parameter(), **attributes})
    return made


def compressed(activations: bool, status: str = "decompressed") -> Any:
    """A linear layer that compressed-tensors has put its scheme on."""
    inputs = SimpleNamespace(type="int", num_bits=8) if activations else None
    scheme = SimpleNamespace(format="int-quantized", input_activations=inputs)
    return module(Linear, quantization_scheme=scheme, quantization_status=SimpleNamespace(value=status))


class Model:
    """`modules` by name; `head`: the name of the output embeddings."""

    def __init__(self, modules: dict[str, Any], head: str = "lm_head") -> None:
        self.modules = {"lm_head": module(Linear), **modules}
        self.config = SimpleNamespace(_attn_implementation="sdpa")
        self._head = head

    def named_modules(self) -> Iterator[tuple[str, Any]]:
        yield from self.modules.items()

    def get_output_embeddings(self) -> Any:
        return self.modules[self._head]
