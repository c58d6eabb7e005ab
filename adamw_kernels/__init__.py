"""FusedAdamW and FusedSGDW: torch.optim.AdamW and SGD in one pass over memory, the same bits on every CPU and GPU."""

import torch as _torch  # noqa: F401  # first: the compiled module then finds torch's OpenMP already loaded

from adamw_kernels.adamw import FusedAdamW
from adamw_kernels.backends import BackendUnavailableError, describe
from adamw_kernels.backends import native_module as _native_module
from adamw_kernels.functional import fused_adamw_
from adamw_kernels.gradient_release import release_gradients
from adamw_kernels.gradients import clip_grad_norm_, grad_norm
from adamw_kernels.optimizer import NotMeasuredError
from adamw_kernels.sgdw import FusedSGDW
from adamw_kernels.sharding import number_parameters
from adamw_kernels.warm_restarts import Snapshot, WarmRestarts, normalized_weight_decay

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailableError",
    "FusedAdamW",
    "FusedSGDW",
    "NotMeasuredError",
    "Snapshot",
    "WarmRestarts",
    "__version__",
    "clip_grad_norm_",
    "describe",
    "fused_adamw_",
    "grad_norm",
    "normalized_weight_decay",
    "number_parameters",
    "release_gradients",
]

# Now rather than at the first step: once loaded, the module notices a fork, which OpenMP's threads do not survive.
_native_module()
