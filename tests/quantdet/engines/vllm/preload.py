"""Imported once by the forkserver, so that the children that it forks find vLLM already imported.

It must not initialise CUDA (a forked child could not use it) and must be importable where vLLM is not: the child then
meets the real error itself.
"""

import contextlib
import sys

from quantdet.engines.child import packages

packages.hide(packages.in_forkserver())

# What is not here, the children meet themselves.
with contextlib.suppress(Exception):
    import vllm.entrypoints.llm
    from vllm.platforms import current_platform

    if current_platform.is_cpu():  # on CUDA these initialise the device
        import vllm.model_executor.models.llama
        import vllm.model_executor.models.qwen3
        import vllm.v1.worker.cpu_worker  # noqa: F401

if "vllm.entrypoints.llm" in sys.modules:  # of the suite, what the children need: a name that is wrong is no missing package
    import quantdet.engines.vllm.engine  # noqa: F401

# False once the server has initialised CUDA: its children could not use it and ask for a fresh interpreter instead.
FORK_SAFE = "torch" not in sys.modules or not sys.modules["torch"].cuda.is_initialized()
