"""`FusedAdamW`: hyperparameters, state, groups. No arithmetic: that is the kernels'."""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.optim.optimizer import Optimizer, StateDict

from adamw_kernels import backends
from adamw_kernels.formats import DLPACK_DTYPES, moment_dtype, moment_like
from adamw_kernels.functional import (
    check_grad,
    check_overlap,
    check_state,
    chooser,
    dense_grad,
    grad_address,
    local_grad,
    local_param,
    local_view,
    refuse_capture,
)
from adamw_kernels.launch_table import Hyperparameters, LaunchPlan, TensorSpec, check_hyperparameters
from adamw_kernels.tensor_watch import ALWAYS_ODD, NO_ROW, STATE_KEYS, TensorWatch, same_layout, watch_tensors

ParamsT: TypeAlias = Iterable[torch.Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, torch.Tensor]]

# Largest step count, a float32, that the kernels' repeated squaring covers. As a float32 it stops growing at 2^24
# anyway, when the bias corrections have long been 1.
MAX_STEP = 2**31 - 128


class _Member(NamedTuple):
    """A parameter that has a row in the plan, as it was when the plan was built. Keeps no tensor alive."""

    name: str
    row: int
    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    addresses: dict[str, int]


class _Shielded:
    """A state value on its way through `Optimizer.load_state_dict`, which would cast it to the parameter's dtype."""

    def __init__(self, value: Any) -> None:
        self.value = value


class FusedAdamW(Optimizer):
    r"""AdamW in one pass over memory: a drop-in for `torch.optim.AdamW`.

    .. math::
        \theta_t = \theta_{t-1} - \Big(\mathrm{lr}\cdot\frac{\hat m_t}{\sqrt{\hat v_t} + \epsilon}
                   + \mathrm{lr}\,\lambda\,\theta_{t-1}\Big)

    Source: Loshchilov & Hutter, *Decoupled Weight Decay Regularization* (2019), Algorithm 2.

    All tensors of all parameter groups that share a dtype combination are updated by one launch a device, whatever
    their learning rates, decays, betas and step counts. Same inputs give the same bits on every backend.

    State per parameter, as in torch: `step` (float32 scalar on the parameter's device), `exp_avg`, `exp_avg_sq`, with
    `amsgrad` `max_exp_avg_sq` (shape, device and layout of the parameter; float32, or float64 for float64
    parameters). State dicts load both ways with `torch.optim.AdamW` and `torch.optim.Adam`.

    Args:
        params: parameters, groups, or named parameters: float32, bfloat16, float16, float64 or complex tensors of any
            dense layout, on CPUs and GPUs.
        lr: learning rate; like betas, eps and weight_decay a float or a one-element tensor. A float32 or float64
            tensor on the parameters' device is read by the device itself on each step.
        betas: decay of the first and second moment, each in [0, 1).
        eps: added to the denominator.
        weight_decay: :math:`\lambda`.
        amsgrad: divide by the running maximum of the second moment.
        maximize: ascend instead of descend.
        foreach: accepted; there is one implementation, and it handles all tensors at once.
        capturable: accepted; there is one implementation, which never waits for the device. Capturing a step in a
            CUDA graph is refused in this version.
        differentiable: must be False: the update is invisible to autograd.
        fused: None or True.
        decoupled: True: decay the weight (AdamW). False: add :math:`\lambda\theta` to the gradient (Adam with L2).
        backend: "auto", "cpu", "triton" or "cuda"; see `adamw_kernels.describe()`.

    Raises:
        ValueError: a hyperparameter out of range, an unknown backend. RuntimeError: an option that cannot be met.
    """

    # Class-level, because deepcopy, pickle and dynamically made subclasses do not call __init__.
    _plan: LaunchPlan | None = None
    _watch: TensorWatch | None = None
    _members: dict[int, _Member] = {}  # replaced whole, never written to
    _seen_flags: list[Any] | None = None
    _backend: str = "auto"

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float | torch.Tensor = 1e-8,
        weight_decay: float | torch.Tensor = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled: bool = True,
        backend: str = "auto",
    ) -> None:
        """Check every option; nothing is allocated before the first step."""
        self._backend = backends.check_name(backend, f"backend={backend!r}")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled,
        }
        _check_options(defaults, "FusedAdamW")
        super().__init__(params, defaults)

    # --- groups -------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, at any time; options it does not name are the constructor's.

        Raises:
            ValueError, RuntimeError: as the constructor; the optimizer is then unchanged.
        """
        if "decoupled" in param_group:
            param_group["decoupled_weight_decay"] = param_group.pop("decoupled")
        options = {key: param_group.get(key, default) for key, default in self.defaults.items()}
        _check_options(options, f"param_groups[{len(self.param_groups)}]")
        super().add_param_group(param_group)

    # --- the step -------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: re-evaluates the model and returns the loss; called with gradients enabled, before the update.

        Returns:
            What `closure` returned, or None.

        Raises:
            ValueError, TypeError, RuntimeError: a tensor or hyperparameter that does not fit, naming the parameter,
                what it was, what was expected and the way out. Then nothing was written.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        refuse_capture()
        sweep = self._sweep()
        if sweep is None:
            self._build()
            sweep = self._sweep()
            assert sweep is not None, "a plan built a moment ago fits"
        params, _grads, relaid = sweep  # alive until the launch: their addresses are in the table
        torch.autograd.graph.increment_version(params)
        assert self._plan is not None
        self._plan.launch()
        del relaid
        return loss

    def _sweep(self) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]] | None:
        """Bring the plan up to date, or return None where it must be built anew."""
        if self._plan is None or self._watch is None or not self._refresh_hyperparameters():
            return None
        with torch._C.DisableTorchFunctionSubclass():
            found = self._watch.sweep(self.param_groups, self.state)
        if found is None:
            return None
        params, grads, odd = found
        relaid = self._read_odd(odd) if odd else []
        return None if relaid is None else (params, grads, relaid)

    def _refresh_hyperparameters(self) -> bool:
        """Write the hyperparameters that changed; False if the plan's structure depends on one of them."""
        assert self._plan is not None
        rows = self._plan.hypers
        flags: list[Any] = []
        hypers: list[Any] = []
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            hypers += (group["lr"], beta1, beta2, group["eps"], group["weight_decay"])
            flags += (group["amsgrad"], group["maximize"], group["decoupled_weight_decay"])
        if flags != self._seen_flags or len(hypers) != len(rows.written):
            return False
        if not all(map(operator.is_, hypers, rows.written)):
            rows.update(hypers)
        return rows.refresh()

    @torch.no_grad()
    def _read_odd(self, odd: list[int]) -> list[torch.Tensor] | None:
        """Write the gradients' addresses that the watch could not; the tensors must outlive the launch."""
        assert self._plan is not None
        params = [p for group in self.param_groups for p in group["params"]]
        kept: list[torch.Tensor] = []
        for position in odd:
            has_grad = position >= 0
            p = params[position if has_grad else -1 - position]
            member = self._members[id(p)]
            address = 0
            if has_grad:
                with torch._C.DisableTorchFunctionSubclass():
                    local, grad = local_view(p), _local_grad(p)
                    if (local.dtype, grad.dtype) != (member.param_dtype, member.grad_dtype):
                        return None
                    if _addresses(local, self.state[p]) != member.addresses or grad.layout != torch.strided:
                        return None
                    if grad.shape != local.shape or grad.device != local.device:
                        return None
                    grad = dense_grad(local, grad)
                kept.append(grad)
                address = grad_address(grad)
            self._plan.write_grad(member.row, address)
        return kept

    # --- building the plan ------------------------------------------------------------------------------------------

    @torch.inference_mode(False)  # the tables outlive this step, and inference tensors could not be written later
    @torch.no_grad()
    def _build(self) -> None:
        """Check everything, create missing state, and build the launch tables. No parameter is updated yet."""
        self._plan = self._watch = None
        hypers = [*_hyperparameters(self.param_groups)]
        with torch._C.DisableTorchFunctionSubclass():
            specs, grads, members = self._collect(keep_idle=True)
            try:
                check_overlap(specs, grads)
            except ValueError:  # does it concern parameters that have no gradient, and so are not written?
                specs, grads, members = self._collect(keep_idle=False)
                check_overlap(specs, grads)
            plan = LaunchPlan(specs, len(self.param_groups), chooser(self._backend))
            plan.hypers.write_all(hypers)
            slots, dtypes = [], []
            for p in (p for group in self.param_groups for p in group["params"]):
                member = members.get(id(p))
                plain = member is not None and not p.is_complex() and not hasattr(p, "_local_tensor")
                slots.append(NO_ROW if member is None else plan.slots[member.row] if plain else ALWAYS_ODD)
                dtypes.append(0 if member is None else DLPACK_DTYPES[member.grad_dtype])
            self._watch = watch_tensors(self.param_groups, self.state, slots, dtypes)
        self._plan = plan
        self._members = members
        self._seen_flags = [
            group[key] for group in self.param_groups for key in ("amsgrad", "maximize", "decoupled_weight_decay")
        ]

    def _collect(self, keep_idle: bool) -> tuple[list[TensorSpec], list[torch.Tensor], dict[int, _Member]]:
        """The rows of the plan: every parameter with a gradient and, if `keep_idle`, those that had one before.

        The latter keep their row so that gradients that come and go (experts, frozen layers) cost nothing.
        """
        places = [(group, index) for group, g in enumerate(self.param_groups) for index in range(len(g["params"]))]
        candidates: dict[int, tuple[str, int, torch.Tensor]] = {}
        for group, index in places:  # a parameter listed twice in its group (torch warns of it) has one row
            p = self.param_groups[group]["params"][index]
            if p.grad is not None or (keep_idle and self.state.get(p)):
                candidates.setdefault(id(p), (_param_name(self.param_groups, group, index), group, p))
        for name, _, p in candidates.values():  # first all checks, then the first change
            if p.grad is not None:
                local = local_param(name, p)
                check_grad(name, local, _local_grad(p))
                _check_adoptable(name, p, local, self.state.get(p, {}))

        specs: list[TensorSpec] = []
        grads: list[torch.Tensor] = []
        members: dict[int, _Member] = {}
        steps_seen: set[int] = set()
        for name, group, p in candidates.values():
            options = self.param_groups[group]
            if p.grad is not None:
                self._complete_state(name, p, options["amsgrad"], steps_seen)
            try:
                spec = self._spec(name, group, p)
            except (AttributeError, KeyError, TypeError, ValueError):
                if p.grad is not None:
                    raise
                continue  # has no gradient: whatever does not fit is looked at when it has one
            members[id(p)] = _Member(
                name, len(specs), spec.param.dtype, spec.grad_dtype, _addresses(spec.param, self.state[p])
            )
            specs.append(spec)
            grads.append(spec.param if p.grad is None else _local_grad(p))
        return specs, grads, members

    def _spec(self, name: str, group: int, p: torch.Tensor) -> TensorSpec:
        options, state, local = self.param_groups[group], self.state[p], local_param(name, p)
        keys = ("step", "exp_avg", "exp_avg_sq") + (("max_exp_avg_sq",) if options["amsgrad"] else ())
        views = {key: local_view(state[key]) for key in keys}
        for key, view in views.items():
            check_state(name, key, local, view)
        return TensorSpec(
            name=name,
            param=local,
            grad_dtype=local.dtype if p.grad is None else _local_grad(p).dtype,
            exp_avg=views["exp_avg"],
            exp_avg_sq=views["exp_avg_sq"],
            max_exp_avg_sq=views.get("max_exp_avg_sq"),
            step=views["step"],
            hyper=group,
            amsgrad=bool(options["amsgrad"]),
            maximize=bool(options["maximize"]),
            decoupled=bool(options["decoupled_weight_decay"]),
        )

    # --- state ------------------------------------------------------------------------------------------------------

    def _complete_state(self, name: str, p: torch.Tensor, amsgrad: bool, steps_seen: set[int]) -> None:
        """Create what is missing in a parameter's state and bring the rest into the form that kernels read.

        Loaded steps may be numbers or tensors of any dtype, shape or device; loaded moments may have another dtype,
        device or layout. A moment is only ever widened, except where a float64 model became a narrower one.
        """
        state = self.state[p]
        local = local_view(p)
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=local.device)
        else:
            step = state["step"]
            if not isinstance(step, torch.Tensor):
                step = torch.tensor(float(step))
            if step.dtype != torch.float32 or step.device != local.device or step.numel() != 1:
                step = step.detach().reshape(()).to(device=local.device, dtype=torch.float32)
            if step.data_ptr() in steps_seen:
                step = step.clone()  # one counter for several parameters would be advanced several times
            state["step"] = step
        steps_seen.add(state["step"].data_ptr())

        dtype = moment_dtype(p.dtype)
        for key in _moment_keys(amsgrad):
            if key not in state:
                state[key] = moment_like(p)
                continue
            moment = state[key]
            if moment.dtype == torch.float64 and dtype != torch.float64 and p.dtype != torch.float64:
                warnings.warn(
                    f"{key} of {name} is float64 and its parameter {p.dtype}: it is rounded to {dtype}", stacklevel=2
                )
            moment = moment.to(device=p.device, dtype=dtype)
            if not same_layout(local_view(moment), local):
                moment = moment_like(p).copy_(moment)
            if moment is not state[key]:
                state[key] = moment

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load the state of a FusedAdamW, `torch.optim.AdamW` or `torch.optim.Adam`, at any step.

        Every state tensor keeps its own dtype (torch's own method casts moments to the parameter's) and is copied to
        its parameter's device, so that nothing is shared with the optimizer it came from. 16-bit moments are widened,
        exactly, by the next step.

        Raises:
            ValueError: the groups do not match. RuntimeError: an option that cannot be met.
        """

        def shield(_: Optimizer, loaded: StateDict) -> StateDict:
            states = {
                key: {name: _Shielded(value) for name, value in entry.items()} if isinstance(entry, dict) else entry
                for key, entry in loaded["state"].items()
            }
            for index, group in enumerate(loaded["param_groups"]):
                if group.get("differentiable"):
                    _check_options({"differentiable": True}, f"loaded param_groups[{index}]")
            return {**loaded, "state": states}

        def unshield(_: Optimizer) -> None:
            for p, entry in self.state.items():
                if not isinstance(entry, dict):
                    continue
                for name, value in entry.items():
                    if isinstance(value, _Shielded):
                        entry[name] = _copy_to(p.device if isinstance(p, torch.Tensor) else None, value.value)

        before = self.register_load_state_dict_pre_hook(shield)  # last: the user's own hooks see plain tensors
        after = self.register_load_state_dict_post_hook(unshield, prepend=True)  # first, likewise
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and deepcopy keep: torch's three entries and the backend's name. Caches are rebuilt."""
        return {**super().__getstate__(), "_backend": self._backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from pickle or `load_state_dict`; older or foreign groups get the options they lack."""
        super().__setstate__(state)
        self._plan = self._watch = None
        for group in self.param_groups:
            for key, default in self.defaults.items():
                group.setdefault(key, default)


# --- checks and names -------------------------------------------------------------------------------------------------


def _check_options(options: dict[str, Any], where: str) -> None:
    """Refuse hyperparameters out of range (with torch's messages) and options that cannot be met.

    Raises:
        ValueError, RuntimeError: naming the option, its value and what is accepted.
    """
    if options.get("differentiable"):
        raise RuntimeError(
            f"{where}: differentiable=True: the fused update is invisible to autograd. Use torch.optim.AdamW("
            "differentiable=True) to differentiate through the optimizer."
        )
    if "lr" not in options:
        return
    for key, text in (("lr", "learning rate"), ("eps", "epsilon value"), ("weight_decay", "weight_decay value")):
        value = options[key]
        if isinstance(value, torch.Tensor) and value.numel() != 1:
            raise ValueError(f"{where}: Tensor {key} must be 1-element, not of shape {tuple(value.shape)}")
        if not 0.0 <= value:
            raise ValueError(f"{where}: Invalid {text}: {value}; expected {key} >= 0")
    betas = options["betas"]
    if len(betas) != 2:
        raise ValueError(f"{where}: betas has {len(betas)} entries; expected two")
    for index, beta in enumerate(betas):
        if isinstance(beta, torch.Tensor) and beta.numel() != 1:
            raise ValueError(f"{where}: Tensor betas[{index}] must be 1-element, not of shape {tuple(beta.shape)}")
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"{where}: Invalid beta parameter at index {index}: {beta}; expected 0 <= beta < 1")
    check_hyperparameters(_group_hyperparameters(options), where)
    if options["fused"] is False:
        raise RuntimeError(f"{where}: fused=False: FusedAdamW has no other implementation. Use torch.optim.AdamW.")
    if options["fused"] and options["foreach"]:
        raise RuntimeError(f"{where}: `fused` and `foreach` cannot be `True` together.")


def _group_hyperparameters(group: dict[str, Any]) -> Hyperparameters:
    beta1, beta2 = group["betas"]
    return Hyperparameters(group["lr"], beta1, beta2, group["eps"], group["weight_decay"])


def _hyperparameters(param_groups: list[dict[str, Any]]) -> Iterator[Any]:
    """Five entries a group, checked, in the order of a HyperRow."""
    for index, group in enumerate(param_groups):
        hyper = _group_hyperparameters(group)
        check_hyperparameters(hyper, f"param_groups[{index}]")
        yield from (hyper.lr, hyper.beta1, hyper.beta2, hyper.eps, hyper.weight_decay)


def _param_name(param_groups: list[dict[str, Any]], group: int, index: int) -> str:
    """The parameter's own name where the user gave names, else its place."""
    names = param_groups[group].get("param_names")
    place = f"param_groups[{group}]['params'][{index}]"
    return f"parameter {names[index]!r} ({place})" if names is not None else place


def _copy_to(device: torch.device | None, value: Any) -> Any:
    """A copy of a state value, its tensors on `device` (None: where they are) in their own dtypes."""
    if isinstance(value, torch.Tensor):
        # Nothing can be copied from meta; the next step says so, and names the parameter.
        return value.detach() if value.is_meta else value.detach().to(device=device or value.device, copy=True)
    if isinstance(value, dict):
        return {key: _copy_to(device, item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copy_to(device, item) for item in value)
    return copy.deepcopy(value)


def _moment_keys(amsgrad: bool) -> tuple[str, ...]:
    return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if amsgrad else ("exp_avg", "exp_avg_sq")


def _addresses(local: torch.Tensor, state: dict[str, Any]) -> dict[str, int]:
    """Where a parameter and its state live; the user's own entries beside them are not ours to look at."""
    found = {key: local_view(state[key]).data_ptr() for key in STATE_KEYS if isinstance(state.get(key), torch.Tensor)}
    return {"param": local.data_ptr(), **found}


def _local_grad(p: torch.Tensor) -> torch.Tensor:
    """The local, real memory of a parameter's gradient, placed as the parameter is."""
    grad = p.grad
    assert grad is not None
    placements = getattr(p, "placements", None)
    if placements is not None and getattr(grad, "placements", placements) != placements:
        grad = grad.redistribute(p.device_mesh, placements)  # type: ignore[attr-defined]
    return local_grad(grad)


def _check_adoptable(name: str, p: torch.Tensor, local: torch.Tensor, state: dict[str, Any]) -> None:
    """Refuse a loaded or edited state that cannot be completed without losing something.

    Raises:
        ValueError, TypeError: naming the parameter, what it was, and the way out.
    """
    known = [key for key in ("step", "exp_avg", "exp_avg_sq") if key in state]
    if known and len(known) != 3:
        missing = [key for key in ("step", "exp_avg", "exp_avg_sq") if key not in state]
        raise ValueError(
            f"the state of {name} has {', '.join(known)} but no {', '.join(missing)}; expected all three or none. "
            "Load a complete state, or delete the entry to start anew."
        )
    for key in (*known, "max_exp_avg_sq"):
        if isinstance(state.get(key), torch.Tensor) and state[key].device.type == "meta":
            raise ValueError(
                f"{key} of {name} is on the meta device and has no values; expected a tensor that has. Load the state "
                "again without mapping it to meta, or delete the entry to start anew."
            )
    if "step" in known:
        step = state["step"]
        if isinstance(step, torch.Tensor) and step.numel() != 1:
            raise ValueError(f"step of {name} has shape {tuple(step.shape)}; expected one element.")
        on_device = isinstance(step, torch.Tensor) and step.device == local.device and step.device.type != "cpu"
        if not on_device and not (0 <= float(step) <= MAX_STEP and float(step) == int(step)):
            raise ValueError(f"step of {name} is {float(step)}; expected a whole number from 0 to {MAX_STEP}.")
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        moment = state.get(key)
        if moment is None:
            continue
        if not isinstance(moment, torch.Tensor) or not (moment.is_floating_point() or moment.is_complex()):
            kind = moment.dtype if isinstance(moment, torch.Tensor) else type(moment).__name__
            raise TypeError(f"{key} of {name} is {kind}; expected a floating-point tensor.")
        if moment.layout != torch.strided:
            raise TypeError(
                f"{key} of {name} has layout {moment.layout}; expected a strided tensor. Make it dense with "
                "`.to_dense()`."
            )
        if moment.is_complex() != p.is_complex():
            raise TypeError(f"{key} of {name} has dtype {moment.dtype} beside a {p.dtype} parameter.")
        view = local_view(moment)
        if view.shape != local.shape:
            raise ValueError(
                f"{key} of {name} has shape {tuple(view.shape)}, the parameter {tuple(local.shape)}; expected the same "
                "shape. If the parameter was resized, delete its entry in the optimizer's state."
            )
