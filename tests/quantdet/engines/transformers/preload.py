"""Imported once by the forkserver of transformers' engine; see `quantdet.engines.vllm.preload`.

torchao stays out, since its import initialises CUDA, and so do packages that look at the device when they are imported.
"""

import contextlib
import importlib
import os
import sys

from quantdet.engines.child import packages

_CHECK = "PYTORCH_NVML_BASED_CUDA_CHECK"
_GIVEN = os.environ.get(_CHECK)

packages.hide(packages.in_forkserver())

with contextlib.suppress(Exception):
    # torch.cuda.is_available, which transformers calls, would otherwise initialise the driver, for a forked child too.
    os.environ[_CHECK] = "1"
    import torch  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401  (what every decoder's module imports too)
    from transformers import AutoModelForCausalLM  # noqa: F401

    for _name in ("transformers.quantizers.auto", "accelerate", "compressed_tensors.compressors"):
        with contextlib.suppress(ImportError):
            importlib.import_module(_name)

if "transformers.models.llama.modeling_llama" in sys.modules:  # of the suite: a name that is wrong is no missing package
    import quantdet.engines.transformers.engine  # noqa: F401

os.environ.pop(_CHECK, None)
if _GIVEN is not None:
    os.environ[_CHECK] = _GIVEN
