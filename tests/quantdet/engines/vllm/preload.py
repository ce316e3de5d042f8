"""Imported once by the forkserver, so that the children that it forks find vLLM already imported.

It must not initialise CUDA (a forked child could not use it) and must be importable where vLLM is not: the child then
meets the real error itself.
"""

import contextlib

from quantdet.engines.child import packages

packages.hide(packages.in_forkserver())

# False once the server has initialised CUDA: its children could not use it and ask for a fresh interpreter instead.
FORK_SAFE = True

with contextlib.suppress(Exception):
    import torch
    import vllm.entrypoints.llm
    from vllm.platforms import current_platform

    import quantdet.engines.vllm.engine  # noqa: F401  (what the children need as well)

    if current_platform.is_cpu():  # on CUDA these initialise the device
        import vllm.model_executor.models.llama
        import vllm.model_executor.models.qwen3
        import vllm.v1.worker.cpu_worker  # noqa: F401

    FORK_SAFE = not torch.cuda.is_initialized()
