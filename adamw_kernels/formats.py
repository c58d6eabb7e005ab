"""How tensors are stored: which dtypes a parameter, its gradient and its moments may have.

Arithmetic never depends on storage: load -> float32 -> the update's sequence -> store. float64 parameters use
float64 throughout.
"""

import torch

PARAM_DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Storage dtypes in the order of `DtypeCode` in csrc/launch_table.h."""

DTYPE_CODES: dict[torch.dtype, int] = {dtype: code for code, dtype in enumerate(PARAM_DTYPES)}


def compute_dtype(param_dtype: torch.dtype) -> torch.dtype:
    """Dtype of the arithmetic and of the moments: float64 for float64 parameters, float32 for all others."""
    return torch.float64 if param_dtype == torch.float64 else torch.float32


def grad_dtypes(param_dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """Dtypes that a gradient may have: the parameter's own, or any of float32, bfloat16, float16."""
    return PARAM_DTYPES if param_dtype == torch.float64 else PARAM_DTYPES[:3]


def moment_dtype(param_dtype: torch.dtype) -> torch.dtype:
    """Dtype of the moments: the compute dtype; complex parameters keep complex moments, as torch's do."""
    return param_dtype if param_dtype.is_complex else compute_dtype(param_dtype)


PARAM_FORMATS = ("native", "stochastic", "split24", "split32")
"""How a 16-bit weight remembers what its dtype cannot hold, in the order of `ParamFormat` in csrc/launch_table.h."""

MOMENT_FORMATS = ("float32", "bfloat16", "8bit")
"""How the moments are stored, in the order of `MomentFormat` in csrc/launch_table.h."""

GROUP = 16
"""Neighbours, in memory order, that share a word of 8-bit moments."""

FIRST_SCALE = 2.0**24
"""By which the second moment of 8-bit moments is multiplied in storage before the first step."""

MIN_8BIT_NUMEL = 4096
"""Smaller parameters keep float32 moments under "8bit": biases and norms, which are many, sensitive and no share of
the memory; their own launch costs less than packing groups that are mostly ends."""


def param_format(param_dtype: torch.dtype, request: str) -> str:
    """The format that a weight of this dtype gets for a request of PARAM_FORMATS or "auto".

    float32 and wider hold everything themselves, whatever was asked for.
    """
    if param_dtype not in (torch.bfloat16, torch.float16):
        return "native"
    return "split32" if request == "auto" else request


def remainder_dtype(format_of_param: str) -> torch.dtype | None:
    """Dtype of the rest of a weight beside it; None where there is none."""
    return {"split24": torch.int8, "split32": torch.int16}.get(format_of_param)


REMAINDER_KEYS: dict[torch.dtype, str] = {torch.int16: "param_remainder", torch.int8: "param_remainder_8bit"}
"""What it is kept under in the state: a name has one dtype, since whoever loads a checkpoint into tensors that are
there (torch.distributed.checkpoint) casts from one to the other without a word."""

COMMUNICABLE = torch.bfloat16
"""What int16 state is saved as, the same bits: no process group (gloo, NCCL) sends 16-bit integers, so that sharded
ones could not be gathered."""


EMA_FORMATS = ("float32", "bfloat16")
"""How an average of the weights is kept: exactly as the moments are, or in bfloat16, rounded stochastically."""


def ema_dtype(param_dtype: torch.dtype, ema_format: str) -> torch.dtype:
    """Dtype of the average of a parameter's weights: bfloat16, or that of its moments."""
    return torch.bfloat16 if ema_format == "bfloat16" else moment_dtype(param_dtype)


def _mix(z: int) -> int:
    """splitmix64's finalizer, as in csrc/philox.h."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def random_stream(seed: int, tensor: int) -> int:
    """What tells the random bits of one tensor from another's: an int64; *prepare* makes a step's key of it.

    Args:
        seed: of the optimizer.
        tensor: the parameter's position over all groups.
    """
    stream = _mix((seed + 0x9E3779B97F4A7C15 * (tensor + 1)) % 2**64)
    return stream - 2**64 if stream >= 2**63 else stream
