"""GradNorm out-of-distribution scores for whole batches: exact, fused, without autograd.

from gradnorm_fast import fast_gradnorm
scores = fast_gradnorm(features, model.fc.weight, model.fc.bias)  # (B,) float32, larger = more in-distribution
"""

import os as _os
from importlib import import_module as _import_module
from typing import TYPE_CHECKING

# The kernels lie beside this package in the repository (a folder `kernels/` that must not be a top-level package of
# that name, for Hugging Face has one) and inside it in a wheel. Not resolved: strict editable installs are links.
if not _os.path.isdir(_os.path.join(_os.path.dirname(__file__), "kernels")):
    __path__.append(_os.path.dirname(_os.path.dirname(_os.path.abspath(__file__))))

if TYPE_CHECKING:
    from .detector import GradNorm, Prediction
    from .evaluation import evaluate, plot_roc, plot_scores
    from .functional import HeadScores, fast_gradnorm, gradnorm_from_logits, head_scores

__version__ = "0.1.0"
__all__ = [
    "GradNorm",
    "HeadScores",
    "Prediction",
    "__version__",
    "evaluate",
    "fast_gradnorm",
    "gradnorm_from_logits",
    "head_scores",
    "plot_roc",
    "plot_scores",
]

# The module of each public name. They are imported on first use, so that `gradnorm-fast --help` need not wait for
# torch.
_MODULES = {
    "GradNorm": "detector",
    "HeadScores": "functional",
    "Prediction": "detector",
    "evaluate": "evaluation",
    "fast_gradnorm": "functional",
    "gradnorm_from_logits": "functional",
    "head_scores": "functional",
    "plot_roc": "evaluation",
    "plot_scores": "evaluation",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(_import_module(f".{_MODULES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
