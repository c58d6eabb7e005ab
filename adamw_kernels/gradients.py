"""Gradient norms by themselves: `grad_norm` and `clip_grad_norm_`, for use with any optimizer or none."""

from __future__ import annotations

import atexit
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch._compile import _disable_dynamo

from adamw_kernels import backends
from adamw_kernels.agreement import Agreement, shares_of
from adamw_kernels.control import NormDomain, StepControl
from adamw_kernels.formats import DTYPE_CODES
from adamw_kernels.functional import chooser, grad_address, is_capturing, is_dense, local_grad
from adamw_kernels.launch_table import DECIDE, MEASURE, LaunchPlan, TensorSpec
from adamw_kernels.sharding import shard_groups
from adamw_kernels.tensor_watch import ALWAYS_ODD, NO_ROW, watch_tensors

Parameters = torch.Tensor | Iterable[torch.Tensor]


# Parameter lists whose launch tables are kept; a training loop clips one or two.
MAX_METERS = 8


class _Meter:
    """The launch tables by which one list of parameters is measured, and a watch that tells whether they still fit.

    Keeps no tensor alive: a list is recognised by the parameters' identities, and the watch compares their memory.
    """

    @torch.inference_mode(False)  # the tables outlive this call, and inference tensors could not be written later
    @torch.no_grad()
    def __init__(self, params: list[torch.Tensor], process_group: Any, backend: str) -> None:
        specs: list[TensorSpec] = []
        self._grads: list[torch.Tensor] = []  # until they are measured
        rows: list[int | None] = []
        unused = torch.empty(0, device="cpu")
        for i, p in enumerate(params):
            rows.append(None if p.grad is None else len(specs))
            if p.grad is None:
                continue
            local, groups = _dense(f"the gradient of parameters[{i}]", p.grad, process_group)
            self._grads.append(local)
            # Only the gradient is read. The row needs the rest to be there, and to agree with it.
            specs.append(
                TensorSpec(
                    name=f"parameters[{i}]",
                    param=local,
                    grad_dtype=local.dtype,
                    exp_avg=unused,
                    exp_avg_sq=unused,
                    max_exp_avg_sq=None,
                    step=unused,
                    hyper=0,
                    domain=NormDomain(0, groups),
                )
            )
        self._dtype = torch.float64 if any(spec.grad_dtype == torch.float64 for spec in specs) else torch.float32
        self._control = StepControl(measures=True)
        self._plan = LaunchPlan(
            specs,
            1,
            chooser(backend),
            control=self._control,
            stages=MEASURE | DECIDE,
            domains=[NormDomain(0, groups) for groups in _all_shard_groups(params, process_group)],
            home=params[0].device if params else torch.device("cpu"),
        )
        slots, dtypes = [], []
        for p, row in zip(params, rows, strict=True):
            plain = type(p.grad) is torch.Tensor and not p.is_complex() and p.layout == torch.strided
            plain = plain and not hasattr(p, "_local_tensor") and not p.is_meta
            slots.append(NO_ROW if row is None else self._plan.slots[row] if plain else ALWAYS_ODD)
            dtypes.append(None if row is None else specs[row].grad_dtype)
        self._rows = rows
        self._seen = [(spec.param.numel(), spec.grad_dtype, spec.domain.process_groups) for spec in specs]
        self._process_group = process_group
        self._watch = watch_tensors([{"params": params}], {}, slots, dtypes)

    def measure_anew(self, agreement: Agreement) -> torch.Tensor:
        """The norm of the gradients that were there when the meter was made."""
        self._plan.write_grads([grad_address(local) for local in self._grads])
        norm = self._launch(agreement)
        self._grads = []
        return norm

    def measure(self, params: list[torch.Tensor], agreement: Agreement) -> torch.Tensor | None:
        """The norm of the gradients that are there now; None if the tables do not fit them."""
        odd = self._watch.sweep([{"params": params}], {})
        try:
            return None if odd is None else self._measure(params, odd, agreement)
        finally:
            self._watch.release()

    def _measure(self, params: list[torch.Tensor], odd: Sequence[int], agreement: Agreement) -> torch.Tensor | None:
        """The same, where the watch left these positions to be read."""
        kept = []  # until they are measured
        for position in odd:  # DTensors, complex tensors, gradients in another layout
            index = position if position >= 0 else -1 - position
            row = self._rows[index]
            grad = params[index].grad
            if row is None or (grad is not None and position < 0):
                return None
            if grad is None:
                self._plan.write_grad(row, 0)
                continue
            local, groups = _dense(f"the gradient of parameters[{index}]", grad, self._process_group)
            if (local.numel(), local.dtype, groups) != self._seen[row]:
                return None
            self._plan.write_grad(row, grad_address(local))
            kept.append(local)
        return self._launch(agreement)

    def _launch(self, agreement: Agreement) -> torch.Tensor:
        self._control.agreement = agreement
        self._plan.measure()
        self._plan.tables[0].launch(DECIDE)
        return self._control.verdicts[0].norm(self._dtype)


_meters: dict[tuple[Any, ...], _Meter] = {}
# They may refer to process groups, and gloo's abort the interpreter when they outlive it (one exit in ten).
atexit.register(_meters.clear)


@_disable_dynamo  # addresses mean nothing to torch.compile
@torch.no_grad()
def grad_norm(
    parameters: Parameters,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    process_group: Any = None,
    backend: str = "auto",
) -> torch.Tensor:
    r"""Norm of all gradients of some parameters together, as if they were one vector.

    .. math::
        \Big(\sum_i \sum_j g_{ij}^2\Big)^{1/2}

    Squares are added up in float64, in a fixed order: exact to about 1e-15, never overflowing, the same bits on every
    backend. One launch reads every gradient once, whatever their dtypes.

    Args:
        parameters: tensors, or one tensor, whose `.grad` counts where there is one. DTensors count as a whole.
        norm_type: 2; other norms are computed by `torch.nn.utils.get_total_norm`.
        error_if_nonfinite: raise if the norm is inf or NaN, which waits for the device.
        foreach: accepted, and handed to torch for other norms.
        process_group: over which plain tensors are shards of larger ones.
        backend: "auto", "cpu", "triton" or "cuda".

    Returns:
        A scalar on the first gradient's device, float64 if a gradient is, else float32. Zero if there is no gradient.

    Raises:
        RuntimeError: the norm is not finite and `error_if_nonfinite`; a sparse gradient; another process cannot read
            one of its gradients (where gradients are on a CPU; on GPUs the norm is NaN here then).
        TypeError: a gradient's dtype.
        ValueError: another norm over a process group.
    """
    backends.check_name(backend, f"backend={backend!r}")
    if is_capturing():
        raise RuntimeError(
            "grad_norm and clip_grad_norm_ keep tables that a CUDA graph would read again on each replay; they cannot "
            "be captured. FusedAdamW(max_grad_norm=...) can, or use torch.nn.utils.clip_grad_norm_."
        )
    params = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    grads = [p.grad for p in params if p.grad is not None]
    if float(norm_type) != 2.0:
        if process_group is not None:
            raise ValueError(f"norm_type={norm_type} with a process_group: only the 2-norm is reduced; expected 2")
        total = torch.nn.utils.get_total_norm(grads, norm_type, error_if_nonfinite, foreach)
        return total.full_tensor() if hasattr(total, "full_tensor") else total
    if not grads and not any(_all_shard_groups(params, process_group)):  # else other processes wait for this one
        return torch.tensor(0.0)
    agreement = Agreement()  # of this call: who has measured these before, only each process knows
    with torch._C.DisableTorchFunctionSubclass():
        try:
            norm = _measure(params, process_group, backend, agreement)
        except Exception as error:
            shares = shares_of(_all_shard_groups(params, process_group))
            if shares:
                agreement.refuse(error, (), params[0].device if params else torch.device("cpu"), shares)
            raise
    if error_if_nonfinite and not bool(norm.isfinite()):
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it cannot be "
            "clipped. To disable this error and scale the gradients by the non-finite norm anyway, set "
            "`error_if_nonfinite=False`"
        )
    return norm


def _measure(params: list[torch.Tensor], process_group: Any, backend: str, agreement: Agreement) -> torch.Tensor:
    """The norm, by tables that fit or new ones."""
    key = (*map(id, params), id(process_group), backend)
    norm = _meters[key].measure(params, agreement) if key in _meters else None
    if norm is None:
        _meters.pop(key, None)
        meter = _Meter(params, process_group, backend)
        norm = meter.measure_anew(agreement)
        _meters[key] = meter
        while len(_meters) > MAX_METERS:
            _meters.pop(next(iter(_meters)), None)
    return norm


@_disable_dynamo
@torch.no_grad()
def clip_grad_norm_(
    parameters: Parameters,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    process_group: Any = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Multiply the gradients by min(1, max_norm / (norm + 1e-6)): `torch.nn.utils.clip_grad_norm_` with our norm.

    With FusedAdamW, `max_grad_norm=` does the same without writing the gradients.

    Args:
        parameters: tensors, or one tensor.
        max_norm: what the norm shall not exceed.
        norm_type: as for `grad_norm`, like the rest.
        error_if_nonfinite: raise before anything is written.
        foreach: as for `grad_norm`.
        process_group: as for `grad_norm`.
        backend: as for `grad_norm`.

    Returns:
        The norm before clipping, as `grad_norm`.

    Raises:
        RuntimeError, TypeError, ValueError: as `grad_norm`.
    """
    params = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    norm = grad_norm(params, norm_type, error_if_nonfinite, foreach, process_group=process_group, backend=backend)
    torch.nn.utils.clip_grads_with_norm_(params, max_norm, norm, foreach)
    return norm


def _all_shard_groups(params: list[torch.Tensor], process_group: Any) -> list[tuple[Any, ...]]:
    """The process groups of every sum of squares that some process may have, whether or not it has any term here."""
    of_plain_tensors = [] if process_group is None else [(process_group,)]
    return of_plain_tensors + [shard_groups(p, process_group) for p in params]


def _dense(what: str, grad: torch.Tensor, process_group: Any) -> tuple[torch.Tensor, tuple[Any, ...]]:
    """A gradient's local memory, in whatever order it is dense, and over which processes it must be reduced."""
    if grad.layout != torch.strided:
        raise RuntimeError(f"{what} has layout {grad.layout}; expected a dense one. Use `.to_dense()`.")
    if any(placement.is_partial() for placement in getattr(grad, "placements", ())):
        grad = grad.redistribute(  # type: ignore[attr-defined]
            placements=[
                torch.distributed.tensor.Replicate() if placement.is_partial() else placement
                for placement in grad.placements  # type: ignore[attr-defined]
            ]
        )
    local = local_grad(grad)
    if local.dtype not in DTYPE_CODES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPE_CODES)
        raise TypeError(f"{what} has dtype {local.dtype}; expected one of {names}. Cast it.")
    local = local.resolve_neg()
    return (local if is_dense(local) else local.contiguous()), shard_groups(grad, process_group)
