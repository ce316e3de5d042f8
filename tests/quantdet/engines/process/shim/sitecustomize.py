"""First on PYTHONPATH of engine processes: hides packages that break `import vllm` in processes that vLLM starts.

vLLM inspects a model's class in a fresh interpreter, which knows nothing of what its parent masked.
"""

import importlib.machinery
import importlib.util
import os
import sys

# PYTHONPATH brings the suite, unless a process that vLLM starts has another one. Where it is there, an import that fails is a
# defect: Python then says "Error in sitecustomize" and goes on.
if importlib.util.find_spec("quantdet") is not None:
    from quantdet.engines.child import packages

    packages.hide(packages.broken())

# Only one sitecustomize is imported: hand on to the one that this file shadows.
_here = os.path.dirname(os.path.abspath(__file__))
_spec = importlib.machinery.PathFinder.find_spec("sitecustomize", [p for p in sys.path if os.path.abspath(p or ".") != _here])
if _spec is not None and _spec.loader is not None:
    _spec.loader.exec_module(importlib.util.module_from_spec(_spec))
