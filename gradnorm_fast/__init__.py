"""GradNorm out-of-distribution scores for whole batches: exact, fused, without autograd.

from gradnorm_fast import fast_gradnorm
scores = fast_gradnorm(features, model.fc.weight, model.fc.bias)  # (B,) float32, larger = more in-distribution
"""

import os as _os

# The kernels lie beside this package in the repository (a folder `kernels/` that must not be a top-level package of
# that name, for Hugging Face has one) and inside it in a wheel. Not resolved: strict editable installs are links.
if not _os.path.isdir(_os.path.join(_os.path.dirname(__file__), "kernels")):
    __path__.append(_os.path.dirname(_os.path.dirname(_os.path.abspath(__file__))))

from .detector import GradNorm, Prediction
from .evaluation import evaluate, plot_roc, plot_scores
from .functional import HeadScores, fast_gradnorm, gradnorm_from_logits, head_scores
from .layers import LayerNorms, layer_gradnorms

__version__ = "0.1.0"
__all__ = [
    "GradNorm",
    "HeadScores",
    "LayerNorms",
    "Prediction",
    "__version__",
    "evaluate",
    "fast_gradnorm",
    "gradnorm_from_logits",
    "head_scores",
    "layer_gradnorms",
    "plot_roc",
    "plot_scores",
]
