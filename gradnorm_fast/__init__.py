"""GradNorm out-of-distribution scores for whole batches: exact, fused, without autograd.

>>> import torch
>>> from gradnorm_fast import fast_gradnorm
>>> features, head = torch.rand(256, 2048), torch.nn.Linear(2048, 1000).requires_grad_(False)
>>> scores = fast_gradnorm(features, head.weight, head.bias)  # float32, larger = more in-distribution
>>> scores.shape
torch.Size([256])
"""

import os as _os
import sys as _sys
from importlib import import_module as _import_module
from importlib.machinery import ModuleSpec as _ModuleSpec
from importlib.util import module_from_spec as _module_from_spec
from typing import TYPE_CHECKING

# A wheel holds the kernels in this folder. In the repository they lie beside it, in a `kernels/` without __init__.py,
# for a top-level package of that name is Hugging Face's. There, that folder alone becomes `gradnorm_fast.kernels`.
# Not resolved: strict editable installs are links.
if not _os.path.isdir(_os.path.join(_os.path.dirname(__file__), "kernels")):
    _spec = _ModuleSpec(f"{__name__}.kernels", None, is_package=True)
    _spec.submodule_search_locations = [
        _os.path.join(_os.path.dirname(_os.path.dirname(_os.path.abspath(__file__))), "kernels")
    ]
    kernels = _sys.modules.setdefault(_spec.name, _module_from_spec(_spec))

if TYPE_CHECKING:
    from .detector import GradNorm, Prediction
    from .evaluation import evaluate, plot_roc, plot_scores
    from .functional import (
        HeadScores,
        TokenStatistics,
        fast_gradnorm,
        gradnorm_from_logits,
        head_scores,
        token_statistics,
        warmup,
    )
    from .layers import LayerNorms, layer_gradnorms

__version__ = "0.1.0"
__all__ = [
    "GradNorm",
    "HeadScores",
    "LayerNorms",
    "Prediction",
    "TokenStatistics",
    "__version__",
    "evaluate",
    "fast_gradnorm",
    "gradnorm_from_logits",
    "head_scores",
    "layer_gradnorms",
    "plot_roc",
    "plot_scores",
    "token_statistics",
    "warmup",
]

# The module of each public name. They are imported on first use, so that `gradnorm-fast --help` need not wait for
# torch. A process that only loads an exported program imports `gradnorm_fast.serving`, which registers the operators.
_MODULES = {
    "GradNorm": "detector",
    "HeadScores": "functional",
    "LayerNorms": "layers",
    "Prediction": "detector",
    "TokenStatistics": "functional",
    "evaluate": "evaluation",
    "fast_gradnorm": "functional",
    "gradnorm_from_logits": "functional",
    "head_scores": "functional",
    "layer_gradnorms": "layers",
    "plot_roc": "evaluation",
    "plot_scores": "evaluation",
    "token_statistics": "functional",
    "warmup": "functional",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(_import_module(f".{_MODULES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
