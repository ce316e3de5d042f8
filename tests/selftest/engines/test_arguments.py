"""Engine arguments that are asked for: their types read off vLLM's sources, what is a mistake, what cannot be obeyed."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quantdet.engines import arguments, signatures
from quantdet.engines.arguments import REFUSED
from quantdet.engines.signatures import Known, Type

SOURCES = {
    "__init__.py": "raise ImportError('nothing imports it')\n",
    "engine/arg_utils.py": """
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Optional, Union
import torch
from vllm.config import CacheDType, KernelConfig
from ..config.cache import RenamedDType as Renamed, Built, Late
from vllm.backends import Backend, Level
from gone.elsewhere import Foreign

if TYPE_CHECKING:
    from vllm.config.cache import Methods
else:
    Methods = str

Overrides = dict[str, Any] | Callable[[Foreign], Foreign]
Circle = Circle

@dataclass
class EngineArgs:
    model: str = ModelConfig.model
    kv_cache_dtype: CacheDType = CacheConfig.cache_dtype
    renamed: Renamed = "a"
    built: Built = "x"
    late: Late = "x"
    quantization: Methods | str | None = None
    max_model_len: int = ModelConfig.max_model_len
    block_size: Optional[int] = None
    share: float = 0.9
    eager: bool = False
    either: Union[bool, str, None] = None
    names: str | list[str] = "x"
    params: set[str] = get_field(Config, "params")
    extra: dict = None
    text: "dict[str, Any] | Foreign | None" = None
    kernel_config: KernelConfig = get_field(VllmConfig, "kernel_config")
    overrides: Overrides = None
    lora_dtype: str | torch.dtype | None = "auto"
    foreign: Foreign = None
    missing: NoSuchName = None
    circle: Circle = None
    backend: Backend | None = None
    level: Level = Level.O1
    inline: Literal["on", "off"] | None = None
    compilation: KernelConfig = None
    shared: ClassVar[int] = 3
    _internal: int = 0

    def method(self, not_an_argument: int):
        local: int = 3
""",
    "entrypoints/llm.py": """
class LLM(Mixin):
    def __init__(self, model: str, *, chat_template: Path | str | None = None,
                 compilation: int | dict[str, Any] | None = None, **kwargs: Any) -> None:
        pass
""",
    "config/__init__.py": "from vllm.config.cache import CacheDType\nfrom .kernel import KernelConfig\n",
    "config/cache.py": """
NAMES = ["x", "y"]
CacheDType = Literal["auto", "fp8", "fp8_e4m3"]
Other = Literal["c"]
RenamedDType: TypeAlias = Literal["a", "b", Other]
Methods = Literal["gptq", "awq"]
Built = Literal[tuple(NAMES)]
Late = Literal[make_names()]
""",
    "config/kernel.py": "@config\nclass KernelConfig:\n    x: int = 0\n",
    "backends.py": """
class Backend(Enum, metaclass=Meta):
    '''Backends.'''
    FLASH = "a.b.Flash"
    CPU = ("a.b.Cpu")
class Level(IntEnum):
    O0 = 0
    O1 = 1
""",
}


@pytest.fixture
def known(tmp_path: Path) -> Known:
    return Known(made(tmp_path))


def made(folder: Path, **changes: str) -> Path:
    """A source tree of a vllm."""
    for name, text in {**SOURCES, **changes}.items():
        path = folder / "vllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder / "vllm"


def kinds(*names: Any, **more: Any) -> Type:
    return Type(frozenset(names), **more)


TEXT = kinds("text")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("model", TEXT),
        ("kv_cache_dtype", Type(choices=("auto", "fp8", "fp8_e4m3"))),
        ("renamed", Type(choices=("a", "b", "c"))),
        ("built", Type(choices=("x", "y"))),
        ("late", Type(anything=True)),
        ("quantization", kinds("text", "null", choices=("gptq", "awq"))),
        ("max_model_len", kinds("integer")),
        ("block_size", kinds("integer", "null")),
        ("share", kinds("integer", "number")),
        ("eager", kinds("boolean")),
        ("either", kinds("boolean", "text", "null")),
        ("names", kinds("text", "list", items=TEXT)),
        ("params", kinds("list", items=TEXT)),
        ("extra", kinds("object")),
        ("text", kinds("object", "null")),
        ("kernel_config", kinds("object")),
        ("overrides", kinds("object")),
        ("lora_dtype", kinds("text", "null")),
        ("foreign", Type(anything=True)),
        ("missing", Type(anything=True)),
        ("circle", Type(anything=True)),
        ("backend", kinds("null", names=("FLASH", "CPU"))),
        ("level", Type(choices=(0, 1))),
        ("inline", kinds("null", choices=("on", "off"))),
        ("compilation", kinds("object", "integer", "null")),  # what either of the two takes
        ("chat_template", kinds("text", "null")),
    ],
)
def test_annotations_are_followed(known: Known, name: str, wanted: Type) -> None:
    """Through imports, aliases, texts and classes; what cannot be read is anything, never a wrong type."""
    assert wanted == known[name]


def test_fields_are_arguments(known: Known) -> None:
    """Those of the class and of the constructor; class variables, fields of vLLM's own, methods and `**kwargs` are none."""
    assert {"model", "chat_template", "block_size"} <= set(known)
    assert not {"shared", "_internal", "local", "not_an_argument", "kwargs", "self"} & set(known)
    assert 26 == len(known)


def test_a_vllm_that_keeps_them_elsewhere_is_not_known(tmp_path: Path) -> None:
    """No class, no file, a syntax that this Python cannot parse: nothing is checked, vLLM decides."""
    for number, text in enumerate(("class Other:\n    pass\n", "class EngineArgs(:\n")):
        assert signatures.known_arguments(made(tmp_path / str(number), **{"engine/arg_utils.py": text})) is None
    assert signatures.known_arguments(tmp_path / "nothing") is None
    assert ([], ("a", 1)) == (arguments.mistakes({"no_such": 1}, None), arguments.parse("a=1", None))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("kv_cache_dtype=fp8", "fp8"),
        ("quantization=awq", "awq"),
        ("quantization=null", None),
        ("quantization=8", "8"),  # a text argument stays text
        ("max_model_len=4096", 4096),
        ("max-model-len=4096", 4096),
        ("--max-model-len = -1", -1),
        ("block_size=None", None),
        ("share=1", 1),
        ("share=.5", ".5"),  # not JSON: a mistake
        ("share=0.5", 0.5),
        ("eager=true", True),
        ("eager=False", False),
        ("either=true", True),
        ("either=x=y", "x=y"),
        ("names=a", "a"),
        ('names=["a", "b"]', ["a", "b"]),
        ('extra={"a": {"b": 1}}', {"a": {"b": 1}}),
        ("extra={a: 1}", "{a: 1}"),
        ("late=3", 3),
        ("late=fast", "fast"),
        ("late=NaN", "NaN"),
        ("missing=true", True),
        ("level=1", 1),
        ("backend=flash", "flash"),
        ("no_such=[1]", [1]),
        ("chat_template=", ""),
    ],
)
def test_a_value_has_the_type_of_its_argument(known: Known, text: str, value: Any) -> None:
    """JSON where it is no text; text without quotes where it is."""
    found = arguments.parse(text, known)[1]

    assert (type(value), value) == (type(found), found)


@pytest.mark.parametrize("text", ["", "eager", "=1", "a b=1", "1x=2", "ü=1"])
def test_what_is_no_argument_is_refused(known: Known, text: str) -> None:
    """Need and have."""
    with pytest.raises(ValueError, match=r"needs NAME=VALUE, have '"):
        arguments.parse(text, known)


@pytest.mark.parametrize(
    ("args", "wrong"),
    [
        ({"max_model_len": 1, "eager": True, "share": 1, "names": ["a"], "text": {}, "backend": "Cpu", "level": 0}, []),
        ({"late": object, "foreign": {}, "block_size": None, "inline": None}, []),
        ({"max_model_length": 1}, ["max_model_length: vLLM has no such engine argument; the nearest name is max_model_len"]),
        ({"xyzzy": 1}, ["xyzzy: vLLM has no such engine argument"]),
        ({"max_model_len": "4k"}, ["max_model_len: needs an integer, have text '4k'"]),
        ({"max_model_len": True}, ["max_model_len: needs an integer, have true"]),
        ({"max_model_len": 1.0}, ["max_model_len: needs an integer, have 1.0"]),
        ({"max_model_len": None}, ["max_model_len: needs an integer, have null"]),
        ({"eager": 1}, ["eager: needs true or false, have 1"]),
        ({"share": "much"}, ["share: needs a number, have text 'much'"]),
        ({"names": ["a", 1]}, ['names: needs text or a JSON list, have ["a", 1]']),
        ({"params": [1]}, ["params: needs a JSON list (each text), have [1]"]),
        ({"extra": []}, ["extra: needs a JSON object, have []"]),
        ({"level": True}, ["level: needs one of 0, 1, have true"]),
        (
            {"kv_cache_dtype": "FP8"},
            ["kv_cache_dtype: needs one of 'auto', 'fp8', 'fp8_e4m3', have text 'FP8'; the nearest is 'fp8'"],
        ),
        ({"quantization": "gtpq"}, ["quantization: needs one of 'gptq', 'awq', have text 'gtpq'; the nearest is 'gptq'"]),
        ({"backend": "flush"}, ["backend: needs one of 'FLASH', 'CPU', have text 'flush'; the nearest is 'FLASH'"]),
        ({"eager": 0, "extra": 0}, ["eager: needs true or false, have 0", "extra: needs a JSON object, have 0"]),
        ({"eager": "\x1b[31m" + "x" * 60}, ["eager: needs true or false, have text '" + "x" * 40 + "...'"]),
    ],
)  # fmt: skip
def test_mistakes_are_told_with_need_and_have(
    known: Known, monkeypatch: pytest.MonkeyPatch, args: dict[str, Any], wrong: list[str]
) -> None:
    """All at once; a near name is proposed, a list of values is named."""
    monkeypatch.setattr(arguments, "_plugins", lambda: False)

    assert wrong == arguments.mistakes(args, known)


def test_a_long_list_is_shortened(tmp_path: Path) -> None:
    """Its first eight, and how many there are."""
    names = ", ".join(f'"v{number}"' for number in range(12))
    folder = made(tmp_path, **{"config/cache.py": SOURCES["config/cache.py"].replace('"auto", "fp8"', names)})

    (wrong,) = arguments.mistakes({"kv_cache_dtype": "?"}, Known(folder))

    assert wrong.startswith("kv_cache_dtype: needs one of 'v0', 'v1', ")
    assert "'v7', ... (13 in all), have text '?'" in wrong
    assert "'v8'" not in wrong


def test_a_plugin_may_have_other_methods(known: Known, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name outside the list, where the annotation allows any text: a plugin can have registered it; a Literal alone not."""
    monkeypatch.setattr(arguments, "_plugins", lambda: True)

    assert [] == arguments.mistakes({"quantization": "my_own"}, known)
    assert arguments.mistakes({"kv_cache_dtype": "my_own"}, known)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("enable_prefix_caching", True, "does not read the prefix cache for requests with prompt logprobs"),
        ("trust_remote_code", True, "nothing runs the code of a checkpoint"),
        ("load_format", "dummy", "random numbers"),
        ("logprobs_mode", "raw_logits", "raw log-probabilities"),
        ("pipeline_parallel_size", 2, "one process for each rank"),
        ("pipeline_parallel_size", True, "one process for each rank"),  # equal to 1, and not 1
        ("distributed_executor_backend", "mp", "one process for each rank"),
        ("speculative_config", {"method": "ngram"}, "a draft gives several"),
        ("skip_tokenizer_init", True, "token ids"),
        ("runner", "pooling", "no logits"),
        ("hf_overrides", {"quantization_config": None}, "how it is quantized"),
        ("hf_overrides", {"text_config": [{"architectures": ["X"]}]}, "how it is quantized"),
        ("hf_token", True, "every record"),
    ],
)
def test_what_cannot_be_obeyed_is_refused(name: str, value: Any, reason: str) -> None:
    """With the reason, and what was asked for."""
    (found,) = arguments.refused({name: value, "seed": 1})

    assert found.startswith(f"{name}: cannot be obeyed, have ")
    assert reason in found


@pytest.mark.parametrize(
    "args",
    [
        {"enable_prefix_caching": False, "trust_remote_code": False, "pipeline_parallel_size": 1, "runner": "generate"},
        {"load_format": "safetensors", "logprobs_mode": "raw_logprobs", "hf_overrides": {"rope_theta": 1.0}},
        {"kv_cache_dtype": "fp8", "quantization": "fp8", "max_model_len": 64, "tensor_parallel_size": 2, "enable_lora": True},
        {"dtype": "float16", "enforce_eager": True, "max_logprobs": 9, "max_num_batched_tokens": 99, "disable_log_stats": True},
    ],
)
def test_what_is_obeyed_is_not_refused(args: dict[str, Any]) -> None:
    """Values that the suite has anyhow, and all that it leaves to the engine."""
    assert [] == arguments.refused(args)


def test_everything_wrong_comes_at_once(known: Known) -> None:
    """Form, name twice, type, name, and what cannot be obeyed; the rest is there."""
    texts = ["eager", "eager=true", "eager=false", "max_model_len=x", "no_such=1", "trust_remote_code=true"]
    args, wrong = arguments.asked(texts, known)

    assert {"eager": True, "max_model_len": "x", "no_such": 1, "trust_remote_code": True} == args
    assert [
        "needs NAME=VALUE, have 'eager'",
        "eager: given twice, as true and as false",
        "max_model_len: needs an integer, have text 'x'",
        "no_such: vLLM has no such engine argument",
        "trust_remote_code: vLLM has no such engine argument",
        "trust_remote_code: cannot be obeyed, have true: nothing runs the code of a checkpoint",
    ] == wrong


# --------------------------------------------------------------------------------------------------- the installed vLLM


@pytest.fixture
def installed() -> Known:
    """What is known of the installed vLLM."""
    found = signatures.known_arguments()
    if found is None:
        pytest.skip("needs an installed vLLM (pip install -e '.[cpu]'), have none")
    return found


def test_the_installed_vllm_is_read(installed: Known) -> None:
    """Common arguments have their types, and almost none is left open."""
    assert kinds("integer") == installed["tensor_parallel_size"] == installed["seed"]
    assert "integer" in installed["max_model_len"].kinds & installed["max_num_seqs"].kinds & installed["block_size"].kinds
    assert kinds("boolean") == installed["enable_lora"] == installed["trust_remote_code"]
    assert kinds("integer", "number") == installed["gpu_memory_utilization"]
    for name, some in {
        "kv_cache_dtype": {"auto", "fp8", "fp8_e5m2"}, "quantization": {"fp8", "compressed-tensors"},
        "dtype": {"auto", "bfloat16", "float16"}, "logprobs_mode": {"raw_logprobs"}, "runner": {"generate", "pooling"},
    }.items():  # fmt: skip
        assert some <= set(installed[name].choices), name
    for name in ("speculative_config", "hf_overrides", "compilation_config"):
        assert "object" in installed[name].kinds
        assert not installed[name].anything
    assert sum(one.anything for one in installed.values()) <= len(installed) // 20


def test_what_is_refused_exists(installed: Known) -> None:
    """A table of names that vLLM no longer has would refuse nothing; a value that is obeyed is of the argument's type."""
    there = [name for name in REFUSED if name in installed]
    values = [(name, value) for name in there for value in (*REFUSED[name].obeyed, *REFUSED[name].only)]

    assert len(REFUSED) - 12 <= len(there)  # an older vLLM has not all of them
    assert [] == [wrong for name, value in values for wrong in arguments.mistakes({name: value}, installed)]


def test_no_engine_is_imported(installed: Known) -> None:
    """A fresh interpreter checks an argument without vllm or torch."""
    code = (
        "import sys; from quantdet.engines import arguments, signatures\n"
        "print(arguments.asked(['kv-cache-dtype=fp8', 'seed=x'], signatures.known_arguments()))\n"
        "print([name for name in ('vllm', 'torch') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert [
        "({'kv_cache_dtype': 'fp8', 'seed': 'x'}, [\"seed: needs an integer, have text 'x'\"])", "[]",
    ] == run.stdout.splitlines(), run.stderr  # fmt: skip
