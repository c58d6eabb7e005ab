"""FusedAdamW: torch.optim.AdamW in one pass over memory, the same bits on every CPU and GPU."""

import torch as _torch  # noqa: F401  # first: the compiled module then finds torch's OpenMP already loaded

from adamw_kernels.backends import BackendUnavailableError, describe
from adamw_kernels.backends import native_module as _native_module
from adamw_kernels.functional import fused_adamw_
from adamw_kernels.gradient_release import release_gradients
from adamw_kernels.gradients import clip_grad_norm_, grad_norm
from adamw_kernels.optimizer import FusedAdamW, NotMeasuredError

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailableError",
    "FusedAdamW",
    "NotMeasuredError",
    "__version__",
    "clip_grad_norm_",
    "describe",
    "fused_adamw_",
    "grad_norm",
    "release_gradients",
]

# Now rather than at the first step: once loaded, the module notices a fork, which OpenMP's threads do not survive.
_native_module()
