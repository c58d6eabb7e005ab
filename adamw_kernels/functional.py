"""`fused_adamw_`, the list-level function underneath the optimizer, and the checks that both go through."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from adamw_kernels import backends
from adamw_kernels.control import NormDomain, StepControl
from adamw_kernels.formats import DTYPE_CODES, GROUP, REMAINDER_KEYS, compute_dtype, grad_dtypes
from adamw_kernels.hyperparameters import Hyperparameters, check_hyperparameters
from adamw_kernels.launch_table import LaunchPlan, TensorSpec
from adamw_kernels.sharding import description, shard_groups
from adamw_kernels.tensor_watch import EMPTY_GRADIENT, same_layout

# --- what a tensor may be -------------------------------------------------------------------------------------------


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def local_view(tensor: torch.Tensor) -> torch.Tensor:
    """The real, local memory behind a tensor: a DTensor's own shard, a complex tensor as pairs of reals."""
    if type(tensor) not in _PLAIN:
        shard: Any = getattr(tensor, "_local_tensor", tensor)
        # A collective may still be under way in it.
        tensor = shard.wait() if hasattr(shard, "trigger_wait") else shard
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def local_param(name: str, param: torch.Tensor) -> torch.Tensor:
    """The local view of a parameter that can be updated in place; raises as `check_param`."""
    if any(placement.is_partial() for placement in getattr(param, "placements", ())):
        raise ValueError(
            f"{name} is {description(param)}: only the sum over the processes means something; expected Shard or "
            "Replicate. Use `.redistribute()`."
        )
    if param.is_conj():
        raise ValueError(f"{name} is a lazily conjugated view; expected plain memory. Use `.resolve_conj()`.")
    local = local_view(param)
    check_param(name, local)
    return local


def local_grad(grad: torch.Tensor) -> torch.Tensor:
    """The local view of a gradient; a lazily conjugated one is materialised."""
    return local_view(grad.resolve_conj() if grad.is_complex() else grad)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_param(name: str, param: torch.Tensor) -> None:
    """Refuse a (local, real) parameter that cannot be updated in place.

    Raises:
        TypeError: its dtype or kind.
        ValueError: its layout or device.
        The message names the parameter, what it was, what was expected, and the way out.
    """
    if param.layout != torch.strided:
        raise TypeError(f"{name} has layout {param.layout}; expected a strided tensor. Use `.to_dense()`.")
    if param.dtype not in DTYPE_CODES:
        raise TypeError(f"{name} has dtype {param.dtype}; expected one of {_names(tuple(DTYPE_CODES))}.")
    if param.device.type == "meta":
        raise ValueError(
            f"{name} is on the meta device and has no memory; expected a CPU or GPU tensor. "
            "Materialise the model (`to_empty`, then initialise) before the first step."
        )
    if hasattr(param, "__tensor_flatten__"):
        raise TypeError(
            f"{name} is a {type(param).__name__}, which wraps other tensors; expected a plain tensor or a DTensor. "
            "Optimise the tensors inside."
        )
    if param.is_inference():
        raise ValueError(
            f"{name} is an inference tensor, which autograd does not track; expected one created outside "
            "torch.inference_mode(). Clone it outside."
        )
    if param.is_neg():
        raise ValueError(f"{name} is a lazily negated view; expected plain memory. Use `.resolve_neg()`.")
    if not is_dense(param):
        raise ValueError(
            f"{name} has shape {tuple(param.shape)} and strides {param.stride()}, which overlap or leave gaps; "
            "expected dense memory in any dimension order. Use `.contiguous()`."
        )
    _check_memory(name, param)
    _check_alignment(name, param)


def _check_alignment(what: str, tensor: torch.Tensor) -> None:
    if tensor.data_ptr() % tensor.dtype.itemsize:
        raise ValueError(
            f"{what} starts at an address that is no multiple of its {tensor.dtype.itemsize}-byte elements; "
            "expected an aligned tensor. Clone it."
        )


def _check_memory(what: str, tensor: torch.Tensor) -> None:
    """Refuse a tensor whose storage was released or shrunk under it.

    Raises:
        ValueError: naming it, what it has and what it needs.
    """
    needed = (tensor.storage_offset() + tensor.numel()) * tensor.dtype.itemsize
    present = tensor.untyped_storage().nbytes()
    if tensor.numel() and (present < needed or tensor.data_ptr() == 0):
        raise ValueError(
            f"{what} needs {needed} bytes of memory and has {present}; expected allocated memory. Its storage was "
            "released or resized (by an offloading hook?): restore it before the step."
        )


def is_dense(tensor: torch.Tensor) -> bool:
    """True if the elements fill one range of memory, each once: contiguous, channels_last, transposed."""
    if tensor.is_contiguous() or tensor.numel() == 0:
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def check_grad(name: str, param: torch.Tensor, grad: torch.Tensor) -> None:
    """Refuse a (local, real) gradient that does not belong to this (local, real) parameter.

    Raises:
        RuntimeError: it is sparse, as torch.optim.AdamW does.
        TypeError: its dtype. ValueError: its shape or device.
    """
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"the gradient of {name} has layout {grad.layout}; expected a dense one. FusedAdamW does not support "
            "sparse gradients: use `sparse=False` in the embedding, or torch.optim.SparseAdam for this parameter."
        )
    if grad.device != param.device:
        raise ValueError(
            f"the gradient of {name} is on {grad.device}, the parameter on {param.device}; expected the same device. "
            "Move the gradient with `.to(param.device)`."
        )
    if grad.shape != param.shape:
        raise ValueError(
            f"the gradient of {name} has shape {tuple(grad.shape)}, the parameter {tuple(param.shape)}; expected the "
            "same shape. Reshape the gradient."
        )
    if grad.dtype not in grad_dtypes(param.dtype):
        raise TypeError(
            f"the gradient of {name} has dtype {grad.dtype}; expected one of {_names(grad_dtypes(param.dtype))} beside "
            f"a {param.dtype} parameter. Cast the gradient."
        )
    if same_layout(grad, param):
        _check_memory(f"the gradient of {name}", grad)


def check_state(
    name: str, key: str, param: torch.Tensor, value: torch.Tensor, dtype: torch.dtype | None = None
) -> None:
    """Refuse a (local, real) state tensor that the kernels cannot use as it is.

    Args:
        name: of the parameter.
        key: of the state tensor.
        param: local, real.
        value: likewise.
        dtype: that it must have; by default the compute dtype, float32 for the step.

    Raises:
        TypeError: its dtype. ValueError: its shape, device or layout.
    """
    if value.device != param.device:
        raise ValueError(
            f"{key} of {name} is on {value.device}, the parameter on {param.device}; expected the same device. "
            "Move it with `.to(param.device)`."
        )
    if value.layout != torch.strided:
        raise TypeError(
            f"{key} of {name} has layout {value.layout}; expected a strided tensor. Make it dense with `.to_dense()`."
        )
    expected = dtype or (torch.float32 if key == "step" else compute_dtype(param.dtype))
    if value.dtype != expected:
        raise TypeError(f"{key} of {name} has dtype {value.dtype}; expected {expected}. Cast it.")
    _check_alignment(f"{key} of {name}", value)
    counts = {"step": 1, "exp_avg_sq_scale": 1, "moment_groups": -(-param.numel() // GROUP)}
    if key in counts:
        if value.numel() != counts[key]:
            many = "one element" if counts[key] == 1 else f"{counts[key]} elements"
            raise ValueError(f"{key} of {name} has shape {tuple(value.shape)}; expected {many}.")
        if not value.is_contiguous():
            raise ValueError(f"{key} of {name} has strides {value.stride()}; expected contiguous memory.")
        return
    if value.shape != param.shape:
        raise ValueError(
            f"{key} of {name} has shape {tuple(value.shape)}, the parameter {tuple(param.shape)}; expected the same "
            "shape. If the parameter was resized, delete its entry in the optimizer's state."
        )
    if not same_layout(value, param):
        raise ValueError(
            f"{key} of {name} has strides {value.stride()}, the parameter {param.stride()}; expected the same memory "
            "layout. Copy it into `torch.empty_like(param)`."
        )
    _check_memory(f"{key} of {name}", value)


def check_overlap(specs: Sequence[TensorSpec], grads: Sequence[torch.Tensor]) -> None:
    """Refuse tensors that share memory with one that a step writes, where the result would depend on the order.

    A gradient that is exactly its own parameter is fine: each element is read before it is written. So is one in
    another layout: a copy of it is read.

    Raises:
        ValueError: naming both tensors.
    """
    ranges = _Ranges()
    for spec, grad in zip(specs, grads, strict=True):
        ranges.add_param(spec.name, spec.param, grad)
        suffix = "_code" if spec.moment_format == "8bit" else ""
        remainder = "param_remainder" if spec.remainder is None else REMAINDER_KEYS[spec.remainder.dtype]
        state = {
            f"exp_avg{suffix}" if spec.rule == "adamw" else "momentum_buffer": spec.exp_avg,
            f"exp_avg_sq{suffix}": spec.exp_avg_sq,
            "step": spec.step,
            "max_exp_avg_sq": spec.max_exp_avg_sq,
            "param_ema": spec.ema,
            remainder: spec.remainder,
            "moment_groups": spec.groups,
            "exp_avg_sq_scale": spec.scale,
            "param_copy": spec.copy,
        }
        for key, tensor in state.items():
            if tensor is not None:
                ranges.add(f"{key} of {spec.name}", tensor, written=True)
    ranges.check()


def check_params_overlap(params: Sequence[tuple[str, torch.Tensor, torch.Tensor]]) -> None:
    """The same for (name, local parameter, local gradient) alone, before there is any state.

    Raises:
        ValueError: naming both tensors.
    """
    ranges = _Ranges()
    for name, param, grad in params:
        ranges.add_param(name, param, grad)
    ranges.check()


class _Ranges:
    """Memory that a step touches, by device: (begin, end, whose, whether it is written)."""

    def __init__(self) -> None:
        self._by_device: defaultdict[torch.device, list[tuple[int, int, str, bool]]] = defaultdict(list)

    def add(self, what: str, tensor: torch.Tensor, *, written: bool) -> None:
        start, size = tensor.data_ptr(), tensor.nbytes
        if size:
            self._by_device[tensor.device].append((start, start + size, what, written))

    def add_param(self, name: str, param: torch.Tensor, grad: torch.Tensor) -> None:
        self.add(name, param, written=True)
        is_param = grad.data_ptr() == param.data_ptr() and grad.dtype == param.dtype
        if not is_param and same_layout(grad, param):
            self.add(f"the gradient of {name}", grad, written=False)

    def check(self) -> None:
        for ranges in self._by_device.values():
            _check_ranges(ranges)


def _check_ranges(ranges: list[tuple[int, int, str, bool]]) -> None:
    ranges.sort()
    end, owner = -1, ""  # the range that reaches furthest so far
    written_end, written_owner = -1, ""  # the same among written ones
    for start, stop, what, writes in ranges:
        if start < written_end or (writes and start < end):
            other = written_owner if start < written_end else owner
            raise ValueError(
                f"{what} and {other} share memory; expected separate tensors. Tie weights by using one Parameter "
                "object in both places."
            )
        if stop > end:
            end, owner = stop, what
        if writes and stop > written_end:
            written_end, written_owner = stop, what


def _check_is_tensor(what: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{what} is {value!r}; expected a tensor. Leave out parameters that have no gradient.")


def dense_grad(param: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """The gradient in its parameter's memory layout: itself, or a re-laid copy."""
    if same_layout(grad, param) and not grad.is_neg():
        return grad
    return torch.empty_like(param, dtype=grad.dtype, memory_format=torch.preserve_format).copy_(grad)


def grad_address(grad: torch.Tensor) -> int:
    """What goes into a launch table for this gradient; never 0."""
    return grad.data_ptr() if grad.numel() else EMPTY_GRADIENT


def is_capturing() -> bool:
    """Whether the current stream is being captured in a CUDA graph."""
    initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return bool(initialized and torch.cuda.is_current_stream_capturing())


def chooser(request: str) -> Callable[[torch.device], backends.Backend]:
    """`backends.choose` for a request such as "auto"."""
    return lambda device: backends.choose(device, request)


# --- the function ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def fused_adamw_(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    max_exp_avg_sqs: Sequence[torch.Tensor],
    state_steps: Sequence[torch.Tensor],
    *,
    lr: float | torch.Tensor,
    beta1: float | torch.Tensor = 0.9,
    beta2: float | torch.Tensor = 0.999,
    eps: float | torch.Tensor = 1e-8,
    weight_decay: float | torch.Tensor = 1e-2,
    amsgrad: bool = False,
    maximize: bool = False,
    decoupled: bool = True,
    cautious: bool = False,
    cautious_weight_decay: bool = False,
    max_grad_norm: float | torch.Tensor | None = None,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    backend: str = "auto",
    chunk_size: int | None = None,
) -> None:
    r"""One AdamW step over lists of tensors, in place, in one pass over memory.

    Per tensor, with :math:`t` the step count after this step:

    .. math::
        m_t &= m_{t-1} + (1-\beta_1)(g - m_{t-1}) \\
        v_t &= v_{t-1} + (1-\beta_2)(g^2 - v_{t-1}) \\
        \theta_t &= \theta_{t-1} - \Big(\mathrm{lr}\,\lambda\,\theta_{t-1} +
            \frac{\mathrm{lr}}{1-\beta_1^t}\,
            \frac{m_t}{\sqrt{v_t}\,/\sqrt{1-\beta_2^t} + \epsilon}\Big)

    computed in float32 (float64 for float64 parameters) from coefficients that are computed in float64 and rounded
    once. Source: Loshchilov & Hutter, *Decoupled Weight Decay Regularization* (2019), Algorithm 2.

    The positional arguments are those of `torch.optim.adamw.adamw`. Each call checks its tensors and builds a launch
    table; :class:`FusedAdamW` does that once and keeps the table.

    Args:
        params: float32, bfloat16, float16, float64 or complex tensors of any dense layout, on CPUs and GPUs; written.
        grads: one a parameter: its shape and device; its dtype, or any of float32, bfloat16, float16. Read only.
        exp_avgs: first moments: the parameter's shape and layout, float32 (float64 for float64). Written.
        exp_avg_sqs: second moments, likewise. Written.
        max_exp_avg_sqs: running maxima of the second moments, likewise, with `amsgrad`; else empty. Written.
        state_steps: one-element float32 tensors on the parameter's device: steps taken so far. Written.
        lr: learning rate, a float or a one-element tensor, like the four that follow.
        beta1: decay of the first moment, in [0, 1).
        beta2: decay of the second moment, in [0, 1).
        eps: added to the denominator, outside the root.
        weight_decay: :math:`\lambda`.
        amsgrad: divide by the running maximum of the second moment.
        maximize: ascend instead of descend.
        decoupled: True: decay the weight (AdamW). False: add :math:`\lambda\theta` to the gradient (Adam with L2).
        cautious: no update of an element where first moment and gradient disagree in sign (Liang et al., Cautious
            Optimizers, 2024; without their rescaling by the mean of the mask).
        cautious_weight_decay: no decay of an element where it and the update disagree in sign (Chen et al., Cautious
            Weight Decay, 2025).
        max_grad_norm: gradients enter multiplied by min(1, max_grad_norm / (norm + 1e-6)), their joint 2-norm; they
            are not written.
        grad_scale: one element: gradients are this many times too large.
        found_inf: one element: if not zero, or NaN, nothing is written.
        backend: "auto", "cpu", "triton" or "cuda".
        chunk_size: elements a chunk, a multiple of 16; the result does not depend on it.

    Raises:
        ValueError: lists of different lengths, shapes, devices, layouts or hyperparameters that do not fit.
        TypeError: dtypes that do not fit.
        RuntimeError: sparse gradients; a backend that cannot run here; a CUDA graph is being captured (building the
            launch table cannot be; :class:`FusedAdamW` keeps one, and can).
        Nothing is written when an error is raised.
    """
    if is_capturing():
        raise RuntimeError(
            "fused_adamw_ builds its launch table on each call, which cannot be captured in a CUDA graph. FusedAdamW "
            "keeps its table: after one eager step, its step() can be captured."
        )
    lists: dict[str, Sequence[Any]] = {
        "grads": grads,
        "exp_avgs": exp_avgs,
        "exp_avg_sqs": exp_avg_sqs,
        "state_steps": state_steps,
    }
    if amsgrad:
        lists["max_exp_avg_sqs"] = max_exp_avg_sqs
    for key, values in lists.items():
        if len(values) != len(params):
            raise ValueError(f"{key} has {len(values)} entries, params has {len(params)}; expected as many")
    hyper = Hyperparameters(lr, beta1, beta2, eps, weight_decay, max_grad_norm)
    check_hyperparameters(hyper, "fused_adamw_")
    backends.check_name(backend, f"backend={backend!r}")

    specs: list[TensorSpec] = []
    dense_grads: list[torch.Tensor] = []
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        name = f"params[{i}]"
        _check_is_tensor(name, param)
        _check_is_tensor(f"the gradient of {name}", grad)
        p, g = local_param(name, param), local_grad(grad)
        check_grad(name, p, g)
        state = {"exp_avg": exp_avgs[i], "exp_avg_sq": exp_avg_sqs[i], "step": state_steps[i]}
        if amsgrad:
            state["max_exp_avg_sq"] = max_exp_avg_sqs[i]
        for key, value in state.items():
            _check_is_tensor(f"{key} of {name}", value)
        local = {key: local_view(value) for key, value in state.items()}
        for key, value in local.items():
            check_state(name, key, p, value)
        specs.append(
            TensorSpec(
                name=name,
                param=p,
                grad_dtype=g.dtype,
                exp_avg=local["exp_avg"],
                exp_avg_sq=local["exp_avg_sq"],
                max_exp_avg_sq=local.get("max_exp_avg_sq"),
                step=local["step"],
                hyper=0,
                amsgrad=amsgrad,
                maximize=maximize,
                decoupled=decoupled,
                cautious=cautious,
                cautious_decay=cautious_weight_decay,
                clip=max_grad_norm is not None,
                domain=NormDomain(0, shard_groups(param, None)),
            )
        )
        dense_grads.append(dense_grad(p, g))
    check_overlap(specs, dense_grads)
    signalled = grad_scale is not None or found_inf is not None
    measures = max_grad_norm is not None
    control = StepControl(measures=measures) if measures or signalled else None
    plan = LaunchPlan(specs, 1, chooser(backend), chunk_size, control)
    plan.hypers.write_all(hyper)
    plan.write_grads([grad_address(g) for g in dense_grads])
    if control is not None:
        control.signal(grad_scale, found_inf)
    torch.autograd.graph.increment_version([*params])
    plan.launch()
