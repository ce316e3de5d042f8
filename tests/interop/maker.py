"""Run as a program, in a process of its own: a maker's tool quantizes a checkpoint, or vLLM generates from what it made.

`python maker.py auto-round SOURCE TARGET`, `python maker.py compressed-tensors SOURCE TARGET`, and
`python maker.py generate FOLDER ID...`, which prints one line of JSON. Tools of makers change loggers, threads and classes of
transformers for good, which no process that measures should have seen.
"""

import json
import sys
from collections import Counter
from typing import Any

GROUP = 64  # SmolLM2-135M has 576 = 9 x 64 inputs


def compressed_tensors(source: str, target: str) -> None:
    """4-bit symmetric integers by round-to-nearest: a preset, scales and files of compressed-tensors itself."""
    import torch
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, is_module_quantized
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    scheme = preset_name_to_scheme("W4A16", ["Linear"])
    assert scheme.weights is not None
    scheme.weights.group_size = GROUP
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"]))
    for module in model.modules():
        if is_module_quantized(module):
            groups = module.weight.detach().unflatten(-1, (-1, GROUP))
            scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
            module.weight_scale.data.copy_(scale)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(target)
    compressor.update_config(target)


def auto_round(source: str, target: str) -> None:
    """4-bit symmetric integers in GPTQ's layout, tuned on eight samples (SignRound), in four steps a layer."""
    import torch
    from auto_round import AutoRound
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    vocabulary = model.config.vocab_size
    # Asked for although the samples are ids.
    words = Tokenizer(models.WordLevel({str(token): token for token in range(vocabulary)}, unk_token="0"))
    samples = list(torch.randint(3, vocabulary, (8, 1, 32), generator=torch.Generator().manual_seed(0)))
    AutoRound(
        model, PreTrainedTokenizerFast(tokenizer_object=words), scheme="W4A16", group_size=GROUP, iters=4, dataset=samples,
        nsamples=8, seqlen=32, batch_size=8, device_map="cpu", enable_torch_compile=False,
    ).quantize_and_save(target, format="auto_gptq")  # fmt: skip


def generate(folder: str, *prompt: str) -> None:
    """Print four tokens that vLLM makes greedily of a prompt's ids, and how many layers each kernel has."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        folder, enforce_eager=True, max_model_len=64, max_num_batched_tokens=64, max_num_seqs=1, skip_tokenizer_init=True,
        dtype="bfloat16",
    )  # fmt: skip
    answer = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True, detokenize=False)
    out = engine.generate({"prompt_token_ids": [int(token) for token in prompt]}, answer)
    print(json.dumps({"tokens": list(out[0].outputs[0].token_ids), "kernels": engine.apply_model(kernels)[0]}))


def kernels(model: Any) -> dict[str, int]:
    """Linear layers by the class of their kernel; of those without one, of their method."""
    found: Counter[str] = Counter()
    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        if method is not None and type(layer).__name__.endswith("ParallelLinear"):
            holder = getattr(layer, "scheme", None) or method
            found[type(getattr(holder, "kernel", method)).__name__] += 1
    return dict(found)


if __name__ == "__main__":
    {"compressed-tensors": compressed_tensors, "auto-round": auto_round, "generate": generate}[sys.argv[1]](*sys.argv[2:])
