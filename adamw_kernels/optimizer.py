"""`FusedAdamW`: hyperparameters, state, groups. No arithmetic: that is the kernels'."""

from __future__ import annotations

import contextlib
import math
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch._compile import _disable_dynamo
from torch.optim.optimizer import Optimizer, StateDict

from adamw_kernels import backends, interchange
from adamw_kernels.control import StepControl, Verdict
from adamw_kernels.functional import is_capturing
from adamw_kernels.options import FURTHER_OPTIONS, WHOLE_OPTIONS, check_options, check_skip_norm
from adamw_kernels.state import Formats, check_formats, copy_to
from adamw_kernels.stepper import Options, Stepper, param_name

if TYPE_CHECKING:
    from adamw_kernels.gradient_release import GradientRelease
    from adamw_kernels.launch_table import LaunchPlan

ParamsT: TypeAlias = Iterable[torch.Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, torch.Tensor]]


class _Shielded:
    """A state value on its way through `Optimizer.load_state_dict`, which would cast it to the parameter's dtype."""

    def __init__(self, value: Any) -> None:
        self.value = value


class NotMeasuredError(AttributeError, RuntimeError):
    """A gradient norm was asked for that no option makes the optimizer compute; `hasattr` says False."""


class _Internals:
    """What an optimizer keeps beside torch's attributes.

    One object, so that a wrapper that copies or forwards attributes (Lightning's) shares it: attributes of the
    optimizer itself, written through a wrapper, would land on the wrapper.
    """

    def __init__(self, options: Options, guards: dict[str, Any]) -> None:
        self.options = options
        self.guards = guards
        self.stepper: Stepper | None = None
        self.control: StepControl | None = None
        self.release: GradientRelease | None = None
        self.shows_averages = False
        self.warned = False  # of native 16-bit weights
        self.constructed = False
        # Plans that CUDA graphs replay. Nobody tells when a graph is gone, and it must not outlive its tables.
        self.captured: list[LaunchPlan | None] = []

    def steppers_of(self, p: torch.Tensor) -> list[Stepper]:
        """What may have stepped a parameter: one for all, or its own where gradients are released."""
        own = None if self.release is None else self.release._steppers.get(id(p))
        return [stepper for stepper in (self.stepper, own) if stepper is not None]


class FusedAdamW(Optimizer):
    r"""AdamW in one pass over memory: a drop-in for `torch.optim.AdamW`.

    .. math::
        \theta_t = \theta_{t-1} - \Big(\mathrm{lr}\cdot\frac{\hat m_t}{\sqrt{\hat v_t} + \epsilon}
                   + \mathrm{lr}\,\lambda\,\theta_{t-1}\Big)

    Source: Loshchilov & Hutter, *Decoupled Weight Decay Regularization* (2019), Algorithm 2.

    All tensors of all parameter groups that share a dtype combination are updated by one launch a device, whatever
    their learning rates, decays, betas and step counts. Same inputs give the same bits on every backend.

    State per parameter, as in torch: `step` (float32 scalar on the parameter's device), `exp_avg`, `exp_avg_sq`, with
    `amsgrad` `max_exp_avg_sq`, with `ema_decay` `param_ema` (shape, device and layout of the parameter; float32, or
    float64 for float64 parameters); beside split weights `param_remainder`, beside 8-bit moments `moment_groups` and
    `exp_avg_sq_scale`. State dicts load both ways with `torch.optim.AdamW` and `torch.optim.Adam`.

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
        capturable: accepted; there is one implementation, which never waits for the device. After one eager step it
            can be captured in a CUDA graph; see `upload_hyperparameters`.
        differentiable: must be False: the update is invisible to autograd.
        fused: True: `torch.amp.GradScaler` hands over its scale and its flag, and the device unscales and skips, as
            with torch's `fused=True`. None (as torch's default): the scaler unscales the gradients itself and skips
            on the host, which wrappers that clip or watch for skips (Lightning, accelerate) rely on. With True, call
            `unscale_` of FSDP1's ShardedGradScaler first: nowhere else does it agree on a scale with its peers.
        decoupled: True: decay the weight (AdamW). False: add :math:`\lambda\theta` to the gradient (Adam with L2).
        cautious: no update of an element where first moment and gradient disagree in sign (Liang et al., Cautious
            Optimizers, 2024; without their rescaling by the mean of the mask).
        cautious_weight_decay: no decay of an element where it and the update disagree in sign (Chen et al., Cautious
            Weight Decay, 2025).
        max_grad_norm: gradients enter multiplied by min(1, max_grad_norm / (norm + 1e-6)), norm being the 2-norm of
            all (unscaled) gradients together, over all devices and shards. They are read once more and not written.
            A number or a one-element tensor above 0; infinity measures only.
        clip_per_group: norm is that of a group's own gradients.
        skip_nonfinite: a step whose gradients hold inf or NaN changes nothing.
        max_skip_norm: nor does one whose norm is larger than this, or NaN. A number or a one-element tensor.
        ema_decay: keep an average of the weights beside them, `ema = ema + (1 - ema_decay) (weight - ema)` after each
            step of a parameter, starting at the weight before its first. In [0, 1); a number or a one-element tensor.
        ema_warmup: use (1 + t) / (10 + t) as long as that is less than `ema_decay`.
        ema_format: "float32" (float64 for float64 parameters) or "bfloat16", rounded stochastically.
        param_format: how a bfloat16 or float16 weight remembers what its dtype cannot hold: "native" (nothing, rounded
            to nearest: what torch does, small updates are lost), "stochastic" (nothing, rounded by chance without
            bias), "split24" (8 more bits, an int8 beside it), "split32" (all of a float32's bits, an int16 beside it:
            updates as those of a float32 master weight). "auto": "split32". Wider weights hold everything themselves.
        moment_format: "float32" (float64 for float64 parameters), "bfloat16" (rounded stochastically) or "8bit" (8.5
            bits a moment; parameters below 4,096 elements keep float32).
        update_bound: :math:`|\hat m|/\sqrt{\hat v}` at most. "auto": where moments are rounded, the limit that exact
            ones cannot exceed (7.27 in the long run for the default betas); None: no limit.
        process_group: over which plain tensors are shards, for norms and skips; DTensors know by themselves.
        seed: of the random bits of stochastic rounding, which depend on it, the parameter's position, its step count
            and the element's index alone.
        backend: "auto", "cpu", "triton" or "cuda"; see `adamw_kernels.describe()`.

    max_grad_norm, ema_decay, ema_warmup, ema_format, param_format, moment_format, update_bound, cautious and
    cautious_weight_decay are options of each group.

    Raises:
        ValueError: a hyperparameter out of range, options that contradict each other, an unknown backend.
        TypeError: not a process group; an average or moments too coarse for their parameter.
        RuntimeError: an option that cannot be met.
    """

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
        cautious: bool = False,
        cautious_weight_decay: bool = False,
        max_grad_norm: float | torch.Tensor | None = None,
        clip_per_group: bool = False,
        skip_nonfinite: bool = False,
        max_skip_norm: float | torch.Tensor | None = None,
        ema_decay: float | torch.Tensor | None = None,
        ema_warmup: bool = False,
        ema_format: str = "float32",
        param_format: str = "auto",
        moment_format: str = "float32",
        update_bound: float | str | None = "auto",
        process_group: Any = None,
        seed: int = 0,
        backend: str = "auto",
    ) -> None:
        """Check every option; nothing is allocated before the first step."""
        backends.check_name(backend, f"backend={backend!r}")
        check_skip_norm(max_skip_norm)
        if process_group is not None and not hasattr(process_group, "rank"):
            raise TypeError(
                f"FusedAdamW: process_group is {process_group!r}; expected a torch.distributed.ProcessGroup or None"
            )
        self._internals = _Internals(
            Options(backend, bool(clip_per_group), process_group, operator.index(seed)),
            {"skip_nonfinite": bool(skip_nonfinite), "max_skip_norm": max_skip_norm},
        )
        defaults: dict[str, Any] = {
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
        # Beyond torch's options only those in use: without them, groups look like torch's to whatever compares keys
        # (a flattened distributed checkpoint, say).
        further = {
            "cautious": cautious,
            "cautious_weight_decay": cautious_weight_decay,
            "max_grad_norm": max_grad_norm,
            "ema_decay": ema_decay,
            "ema_warmup": ema_warmup,
            "ema_format": ema_format,
            "param_format": param_format,
            "moment_format": moment_format,
            "update_bound": update_bound,
        }
        defaults |= {
            key: value
            for key, value in further.items()
            if isinstance(value, torch.Tensor) or value != FURTHER_OPTIONS[key]
        }
        check_options(defaults, "FusedAdamW")
        super().__init__(params, defaults)
        self._internals.constructed = True
        if fused:
            self._step_supports_amp_scaling = True
        if clip_per_group and not self._any_group_has("max_grad_norm"):
            raise ValueError("FusedAdamW: clip_per_group=True, and no group has a max_grad_norm; expected one")
        if (ema_warmup or ema_format != "float32") and not self._any_group_has("ema_decay"):
            option = f"ema_format={ema_format!r}" if not ema_warmup else "ema_warmup=True"
            raise ValueError(f"FusedAdamW: {option}, and no group has an ema_decay; expected one")

    def _any_group_has(self, option: str) -> bool:
        return any(group.get(option) is not None for group in self.param_groups)

    # --- groups -------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, at any time; options it does not name are the constructor's.

        Raises:
            ValueError, RuntimeError: as the constructor; the optimizer is then unchanged.
            TypeError: an average or moments too coarse for their parameter.
        """
        if "decoupled" in param_group:
            param_group["decoupled_weight_decay"] = param_group.pop("decoupled")
        known = FURTHER_OPTIONS.keys() | self.defaults.keys()
        options = self.defaults | {key: value for key, value in param_group.items() if key in known}
        where = f"param_groups[{len(self.param_groups)}]"
        check_options(options, where)
        for key in ("ema_warmup", "ema_format"):
            named = param_group.get(key, FURTHER_OPTIONS[key])
            if named != FURTHER_OPTIONS[key] and options.get("ema_decay") is None:
                raise ValueError(f"{where}: {key}={named!r}, and the group has no ema_decay; expected one")
        for key in sorted(WHOLE_OPTIONS & param_group.keys()):
            raise ValueError(
                f"{where}: {key}={param_group[key]!r} in a group; it is an option of the whole optimizer, expected in "
                "FusedAdamW(...)"
            )
        super().add_param_group(param_group)
        try:
            for index, p in enumerate(param_group["params"]):
                check_formats(param_name(param_group, len(self.param_groups) - 1, index), p, param_group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._warn_of_native_weights(param_group)

    def _warn_of_native_weights(self, group: dict[str, Any]) -> None:
        narrow = [p.dtype for p in group["params"] if p.dtype in (torch.bfloat16, torch.float16)]
        if group.get("param_format") == "native" and narrow and not self._internals.warned:
            self._internals.warned = True
            warnings.warn(
                f"param_format='native' rounds {narrow[0]} weights to nearest: what is less than half their last bit, "
                "most updates and all decay late in training, is lost. 'stochastic' loses nothing on average, "
                "'split24' and 'split32' keep the rest of the weight.",
                stacklevel=3 if self._internals.constructed else 5,
            )

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
        self._update()
        return loss

    # Not to be traced by torch.compile, which knows no addresses: it would break the graph dozens of times in here and
    # compile what is between. Costs 0.4 us a step.
    @_disable_dynamo
    def _update(self) -> None:
        """The step without its closure."""
        self._refuse_while_averages_are_shown("step()")
        stepper = self._current_stepper()
        # Set by GradScaler, or by hand, for this step.
        scale, flag = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if self._internals.release is not None:
            self._internals.release.finish_iteration(scaled=scale is not None or flag is not None)
        capturing = is_capturing()
        try:
            stepper.step(scale, flag, capturing=capturing)
        except KeyError:
            if not self._complete_groups():  # set from outside, by somebody who knows torch's options only
                raise
            stepper.step(scale, flag, capturing=capturing)
        if capturing:
            self._internals.captured.append(stepper.plan)

    def _current_stepper(self) -> Stepper:
        own = self._internals
        if own.stepper is None or own.stepper.groups is not self.param_groups or own.stepper.state is not self.state:
            groups = self.param_groups
            own.stepper = Stepper(groups, groups, self.state, own.options, self._find_control)
        return own.stepper

    def _complete_groups(self) -> bool:
        """Give every group the options it lacks; whether there were any."""
        lacking = [(group, key) for group in self.param_groups for key in self.defaults if key not in group]
        for group, key in lacking:
            group[key] = self.defaults[key]
        return bool(lacking)

    def _measures(self) -> bool:
        """Whether anything asks for a gradient norm."""
        guards = self._internals.guards
        guarded = guards["skip_nonfinite"] or guards["max_skip_norm"] is not None
        return guarded or self._any_group_has("max_grad_norm")

    def _find_control(self, signalled: bool) -> StepControl | None:
        """What decides over the steps of a plan that is being built; None where every step is to be applied."""
        own = self._internals
        measures = self._measures()
        scaled = signalled or getattr(self, "_step_supports_amp_scaling", False)
        num_norms = len(self.param_groups) if own.options.clip_per_group else 1
        before = own.control
        if before is None and not measures and not scaled:
            return None
        if before is None or (before.measures, before.num_norms) != (measures, num_norms):
            own.control = StepControl(measures=measures, num_norms=num_norms, **own.guards)
            if before is not None:
                own.control.adopt(before)
        return own.control

    def upload_hyperparameters(self) -> None:
        """Bring the devices' copies of learning rates and the like up to date, between replays of a captured step.

        A captured step reads them from device memory. Tensors on the device are read in place and need no call; Python
        numbers and CPU tensors, which a scheduler may change, reach the device by this method, in stream order.

        Raises:
            RuntimeError: a CUDA graph is being captured, or an option changed that only a new capture can follow.
            ValueError: a value out of range; then nothing was sent.
        """
        if is_capturing():
            raise RuntimeError("upload_hyperparameters() belongs between replays: it cannot be part of a CUDA graph")
        if self._internals.stepper is not None:
            self._internals.stepper.upload_hyperparameters()
        elif self._internals.captured:
            raise RuntimeError(
                "the state was loaded anew since the step was captured, and the graph still updates the old one. Take "
                "one eager step and capture again."
            )
        if self._internals.release is not None:
            self._internals.release.upload_hyperparameters()

    # --- what the last step found -----------------------------------------------------------------------------------

    def _last_verdict(self, what: str) -> Verdict | None:
        """That of the last step, or None before the first."""
        if not self._measures():
            raise NotMeasuredError(
                f"{what}: nothing asks for a gradient norm; construct with max_grad_norm=, skip_nonfinite=True or "
                "max_skip_norm= (max_grad_norm=float('inf') measures and never clips)"
            )
        control = self._internals.control
        if control is None or not control.measures or not control.verdicts:
            return None
        return control.verdicts[0]

    @property
    def grad_norm(self) -> torch.Tensor:
        """2-norm of the unscaled gradients of the last step, before clipping: a float32 scalar on the device.

        A new tensor on each read, which waits for nothing; only looking at its value does. NaN before the first step,
        and as it was after a step that `GradScaler` left out on the host, of which the optimizer does not know.

        Raises:
            NotMeasuredError: nothing asks for a norm.
        """
        verdict = self._last_verdict("grad_norm")
        return torch.full((), math.nan, device=self._first_device()) if verdict is None else verdict.norm()

    @property
    def group_grad_norms(self) -> torch.Tensor:
        """The same for each group, with `clip_per_group`: a float32 vector on the device.

        Raises:
            NotMeasuredError: there is one norm only, or none.
        """
        if not self._internals.options.clip_per_group:
            raise NotMeasuredError("group_grad_norms: there is one norm, grad_norm; construct with clip_per_group=True")
        verdict = self._last_verdict("group_grad_norms")
        if verdict is None:
            return torch.full((len(self.param_groups),), math.nan, device=self._first_device())
        return verdict.norms()

    @property
    def last_step_skipped(self) -> torch.Tensor:
        """Whether the last step changed nothing, by the loss scaler's flag or a guard: a bool scalar on the device.

        Without `fused=True` a GradScaler does not call `step` at all when it skips, and nothing is known here.
        """
        if self._internals.control is None or not self._internals.control.verdicts:
            return torch.zeros((), dtype=torch.bool, device=self._first_device())
        return self._internals.control.verdicts[0].skip()

    @property
    def skipped_steps(self) -> torch.Tensor:
        """How many steps did so since this optimizer was made: an int64 scalar on the device; not saved."""
        if self._internals.control is None or not self._internals.control.verdicts:
            return torch.zeros((), dtype=torch.int64, device=self._first_device())
        return self._internals.control.verdicts[0].skipped_steps()

    def _first_device(self) -> torch.device:
        device: torch.device = next(p.device for group in self.param_groups for p in group["params"])
        return device

    # --- averages of the weights --------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Within it, every parameter that has an average holds it; then the weights come back, also after an error.

        The weights are kept aside meanwhile, in memory of their own size; the averages stay as they are. What is
        written to parameters within is lost. A parameter that has not been stepped is its own average.

        Raises:
            RuntimeError: no group has an `ema_decay`; or this one is entered already. `step` and `load_state_dict`
                within raise too.
        """
        self._refuse_while_averages_are_shown("ema_weights()")
        groups = [group for group in self.param_groups if group.get("ema_decay") is not None]
        if not groups:
            raise RuntimeError("ema_weights(): no group has an ema_decay; construct with ema_decay=")
        params = [p for group in groups for p in group["params"] if "param_ema" in self.state.get(p, {})]
        weights = [p.detach().clone() for p in params]
        self._internals.shows_averages = True
        try:
            with torch.no_grad():
                for p in params:
                    p.copy_(self.state[p]["param_ema"])
            yield
        finally:
            self._internals.shows_averages = False
            _bring_back(params, weights)

    def _refuse_while_averages_are_shown(self, what: str) -> None:
        if self._internals.shows_averages:
            raise RuntimeError(
                f"{what} within ema_weights(): the parameters hold their averages and the weights are set aside. "
                "Leave the `with` block first."
            )

    # --- storage formats --------------------------------------------------------------------------------------------

    def formats(self) -> dict[torch.Tensor, Formats]:
        """How each parameter's weight and moments are stored: what "auto" chose, and what is too small for "8bit"."""
        return interchange.formats(self)

    def fp32_weights(self) -> dict[torch.Tensor, torch.Tensor]:
        """The weights with all that their formats remember of them, by parameter: to be saved or evaluated.

        New float32 tensors (float64 and complex parameters keep their dtype), DTensors where parameters are. Under
        "split32" they are the master weights of which the parameters are the rounded form.
        """
        self._refuse_while_averages_are_shown("fp32_weights()")
        return interchange.fp32_weights(self)

    def load_fp32_weights(self, weights: Mapping[torch.Tensor, torch.Tensor] | Sequence[torch.Tensor]) -> None:
        """Write float32 weights into parameters of any format, together with what the format remembers.

        Args:
            weights: one a parameter, by parameter or in their order; shape and sharding as theirs.

        Raises:
            ValueError, TypeError: one is missing or does not fit; then nothing was written.
        """
        self._refuse_while_averages_are_shown("load_fp32_weights()")
        interchange.load_fp32_weights(self, weights)

    def export_state_dict(self, target: str = "torch") -> StateDict:
        """A state dict that `torch.optim.AdamW` loads beside `fp32_weights()`: moments in float32, torch's options.

        Averages of weights are not part of it. The way back is `load_state_dict`, into any format.

        Raises:
            ValueError: another target than "torch".
        """
        return interchange.export_state_dict(self, target)

    def convert(self, *, param_format: str | None = None, moment_format: str | None = None) -> None:
        """Go on in other formats, for all groups; what is None stays. The state is converted at once, to nearest.

        Raises:
            ValueError, TypeError: as the constructor; then nothing was changed.
            RuntimeError: a CUDA graph holds the step.
        """
        self._refuse_while_averages_are_shown("convert()")
        interchange.convert(self, {"param_format": param_format, "moment_format": moment_format})

    # --- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> StateDict:
        """As torch's; where anything is rounded by chance, the groups also name the seed, so that a run resumes."""
        result = super().state_dict()
        groups, seed = result["param_groups"], self._internals.options.seed
        by_chance = ("param_format", "moment_format", "ema_format")
        if seed or any(key in group for group in groups for key in by_chance):
            for group in groups:
                group["seed"] = seed
        return result

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load the state of a FusedAdamW, `torch.optim.AdamW` or `torch.optim.Adam`, at any step.

        Every state tensor keeps its own dtype (torch's own method casts moments to the parameter's) and is copied to
        its parameter's device, so that nothing is shared with the optimizer it came from. 16-bit moments are widened,
        exactly, by the next step. Options that torch does not know (`ema_decay`, say) and that the loaded groups do not
        have either stay as they are.

        Raises:
            ValueError: the groups do not match. RuntimeError: an option that cannot be met.
        """
        self._refuse_while_averages_are_shown("load_state_dict()")
        kept: list[dict[str, Any]] = []

        def shield(_: Optimizer, loaded: StateDict) -> StateDict:
            states = {
                key: {name: _Shielded(value) for name, value in entry.items()} if isinstance(entry, dict) else entry
                for key, entry in loaded["state"].items()
            }
            for index, group in enumerate(loaded["param_groups"]):
                if group.get("differentiable"):
                    check_options({"differentiable": True}, f"loaded param_groups[{index}]")
            for own, group in zip(self.param_groups, loaded["param_groups"], strict=False):  # torch compares lengths
                kept.append({key: own[key] for key in FURTHER_OPTIONS if key in own and key not in group})
            return {**loaded, "state": states}

        def unshield(_: Optimizer) -> None:
            for group, options in zip(self.param_groups, kept, strict=True):
                group.update(options)
                own = self._internals
                own.options = own.options._replace(seed=group.pop("seed", own.options.seed))
            for p, entry in self.state.items():
                if not isinstance(entry, dict):
                    continue
                for name, value in entry.items():
                    if isinstance(value, _Shielded):
                        entry[name] = copy_to(p.device if isinstance(p, torch.Tensor) else None, value.value)

        before = self.register_load_state_dict_pre_hook(shield)  # last: the user's own hooks see plain tensors
        after = self.register_load_state_dict_post_hook(unshield, prepend=True)  # first, likewise
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and deepcopy keep: torch's three entries and what was chosen for the optimizer as a whole."""
        own = self._internals
        return {**super().__getstate__(), "_internals": _Internals(own.options, own.guards)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from pickle or `load_state_dict`; older or foreign groups get the options they lack."""
        super().__setstate__(state)
        self.__dict__.setdefault("_internals", _Internals(Options(), {"skip_nonfinite": False, "max_skip_norm": None}))
        if self.defaults.get("fused"):
            self._step_supports_amp_scaling = True
        self._internals.stepper = None
        self._internals.constructed = True
        self._complete_groups()


# --- checks and names -------------------------------------------------------------------------------------------------


def _bring_back(params: list[torch.Tensor], weights: list[torch.Tensor]) -> None:
    """Write every weight that can be written, whatever happened to the others; raise the first error."""
    error: BaseException | None = None
    with torch.no_grad():
        for p, weight in zip(params, weights, strict=True):
            try:
                p.copy_(weight)
            except BaseException as failure:  # an interrupt, too, must not cost the other weights
                error = error or failure
    if error is not None:
        raise error
