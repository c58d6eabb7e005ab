"""Write past the end of a tensor on purpose, through the native path.

`make sanitize` runs this first and expects AddressSanitizer to stop it: a sanitized run that would not see this proves
nothing. Run by hand in an ordinary build, it corrupts memory.
"""

import torch

from adamw_kernels import backends
from adamw_kernels.hyperparameters import Hyperparameters
from adamw_kernels.launch_table import ROW_NUMEL, LaunchPlan, TensorSpec

param, grad = torch.zeros(1024), torch.zeros(1024)
spec = TensorSpec(
    name="canary",
    param=param,
    grad_dtype=torch.float32,
    exp_avg=torch.zeros_like(param),
    exp_avg_sq=torch.zeros_like(param),
    max_exp_avg_sq=None,
    step=torch.zeros(()),
    hyper=0,
    amsgrad=False,
    maximize=False,
    decoupled=True,
)
plan = LaunchPlan([spec], 1, lambda device: backends.choose(device, "cpu"))
plan.hypers.write_all(Hyperparameters(1e-3, 0.9, 0.999, 1e-8, 1e-2))
plan.write_grads([grad.data_ptr()])
plan.tables[0].rows[ROW_NUMEL] = 1024 + 64
plan.launch()
print("nobody noticed")
