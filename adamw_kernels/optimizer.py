"""`FusedOptimizer`: options, state, groups of whatever rule. No arithmetic: that is the kernels'."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from torch._compile import _disable_dynamo
from torch.optim.optimizer import Optimizer, StateDict

from adamw_kernels import backends, interchange
from adamw_kernels.agreement import Agreement, compare
from adamw_kernels.control import StepControl, Verdict
from adamw_kernels.functional import is_capturing
from adamw_kernels.groups import describe, param_name
from adamw_kernels.loading import Loading
from adamw_kernels.options import FURTHER_OPTIONS, WHOLE_OPTIONS, check_options, check_seed, check_skip_norm
from adamw_kernels.param_copies import ParamCopies
from adamw_kernels.rules import INITIAL_LRS, LR_WHEN_ADDED, initial_lr_of
from adamw_kernels.sharding import is_flat_shard
from adamw_kernels.state import Formats, check_formats, packed
from adamw_kernels.step_hooks import with_hooks
from adamw_kernels.stepper import Options, Stepper

if TYPE_CHECKING:
    from adamw_kernels.gradient_release import GradientRelease
    from adamw_kernels.launch_table import LaunchPlan

ParamCopyT: TypeAlias = Mapping[torch.Tensor, torch.Tensor] | Sequence[torch.Tensor | None] | None
ParamsT: TypeAlias = Iterable[torch.Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, torch.Tensor]]


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
        self.agreement = Agreement()
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


class FusedOptimizer(Optimizer):
    """What all rules share: one pass over memory, one launch a device for all tensors that share dtypes and formats.

    A subclass has the options of one rule and names those of `FURTHER_OPTIONS` that mean nothing to it.
    """

    foreign_options: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self,
        params: ParamsT,
        options: dict[str, Any],
        further: dict[str, Any],
        *,
        clip_per_group: bool,
        skip_nonfinite: bool,
        max_skip_norm: float | torch.Tensor | None,
        process_group: Any,
        param_copy: ParamCopyT,
        seed: int,
        backend: str,
    ) -> None:
        """Check every option; nothing is allocated before the first step.

        Args:
            params: as torch's optimizers take them.
            options: of each group, under torch's names.
            further: of each group, by the names of FURTHER_OPTIONS.
            clip_per_group: of the optimizer as a whole, as all that follow.
            skip_nonfinite: a guard.
            max_skip_norm: another.
            process_group: over which plain tensors are shards.
            param_copy: where weights are also written, for all groups.
            seed: of random bits.
            backend: by name.
        """
        name = type(self).__name__
        backends.check_name(backend, f"backend={backend!r}")
        check_skip_norm(max_skip_norm, name)
        check_seed(seed, f"{name}: seed")
        if process_group is not None and not hasattr(process_group, "rank"):
            raise TypeError(
                f"{name}: process_group is {process_group!r}; expected a torch.distributed.ProcessGroup or None"
            )
        self._internals = _Internals(
            Options(backend, bool(clip_per_group), process_group, int(seed), ParamCopies()),
            {"skip_nonfinite": bool(skip_nonfinite), "max_skip_norm": max_skip_norm},
        )
        # Beyond torch's options only those in use: without them, groups look like torch's to whatever compares keys
        # (a flattened distributed checkpoint, say).
        defaults = options | {
            key: value
            for key, value in further.items()
            if isinstance(value, torch.Tensor) or value != FURTHER_OPTIONS[key]
        }
        check_options(defaults, name)
        super().__init__(params, defaults)
        self._internals.constructed = True
        if param_copy is not None:
            self._add_copies(
                [p for group in self.param_groups for p in group["params"]], param_copy, f"{name}: param_copy"
            )
        if options["fused"]:
            self._step_supports_amp_scaling = True
        if clip_per_group and not self._any_group_has("max_grad_norm"):
            raise ValueError(f"{name}: clip_per_group=True, and no group has a max_grad_norm; expected one")
        ema_warmup, ema_format = further["ema_warmup"], further["ema_format"]
        if (ema_warmup or ema_format != "float32") and not self._any_group_has("ema_decay"):
            option = f"ema_format={ema_format!r}" if not ema_warmup else "ema_warmup=True"
            raise ValueError(f"{name}: {option}, and no group has an ema_decay; expected one")

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
        known = FURTHER_OPTIONS.keys() | self.defaults.keys() | {*INITIAL_LRS}
        options = self.defaults | {key: value for key, value in param_group.items() if key in known}
        where = f"param_groups[{len(self.param_groups)}]"
        for key in sorted(self.foreign_options & param_group.keys()):
            raise ValueError(f"{where}: {key}={param_group[key]!r} is no option of {type(self).__name__}")
        check_options(options, where)
        for key in ("ema_warmup", "ema_format"):
            named = param_group.get(key, FURTHER_OPTIONS[key])
            if named != FURTHER_OPTIONS[key] and options.get("ema_decay") is None:
                raise ValueError(f"{where}: {key}={named!r}, and the group has no ema_decay; expected one")
        for key in sorted(WHOLE_OPTIONS & param_group.keys()):
            if key == "seed" and param_group[key] == self._internals.options.seed:
                continue  # a group of this optimizer, or of one like it
            raise ValueError(
                f"{where}: {key}={param_group[key]!r} in a group; it is an option of the whole optimizer, expected in "
                "the constructor"
            )
        copies = param_group.pop("param_copy", None)
        super().add_param_group(param_group)
        if options.get("decay_coupling") == "schedule" and initial_lr_of(param_group) is None:
            lr = param_group["lr"]
            param_group[LR_WHEN_ADDED] = lr.clone() if isinstance(lr, torch.Tensor) else lr
        try:
            for index, p in enumerate(param_group["params"]):
                check_formats(param_name(param_group, len(self.param_groups) - 1, index), p, param_group)
            if copies is not None:
                self._add_copies(param_group["params"], copies, f"{where}: param_copy")
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._name_seed()
        self._warn_of_native_weights(param_group)

    def _add_copies(self, params: list[torch.Tensor], copies: Any, where: str) -> None:
        options = self._internals.options
        for device in {p.device for p in params}:
            backend = backends.choose(device, options.backend).name
            if backend != "cpu":
                raise ValueError(
                    f"{where}: the backend is {backend!r} for tensors on {device}; expected 'cpu', which alone writes "
                    "copies"
                )
        options.copies.add(params, copies, where)

    def write_param_copies(self) -> None:
        """Write every `param_copy` anew, after weights were changed other than by a step (loaded, say)."""
        self._internals.options.copies.write()

    def _name_seed(self) -> None:
        """Have all groups name the seed where anything is rounded by chance; else none, so that they look like torch's.

        The groups themselves, not only what is saved of them: of a flattened checkpoint,
        torch.distributed.checkpoint loads no option that the groups do not have, and ZeroRedundancyOptimizer
        hands options to its local optimizer through the groups alone.
        """
        seed = self._internals.options.seed
        by_chance = ("param_format", "moment_format", "ema_format")
        named = bool(seed) or any(group.get("seed") for group in self.param_groups)
        named = named or any(key in group for group in self.param_groups for key in by_chance)
        for group in self.param_groups:
            if named:
                group.setdefault("seed", seed)
            else:
                group.pop("seed", None)

    def _warn_of_native_weights(self, group: dict[str, Any]) -> None:
        narrow = [p.dtype for p in group["params"] if p.dtype in (torch.bfloat16, torch.float16)]
        if group.get("param_format") == "native" and narrow and not self._internals.warned:
            self._internals.warned = True
            warnings.warn(
                f"param_format='native' rounds {narrow[0]} weights to nearest: what is less than half their last bit, "
                "most updates and all decay late in training, is lost. 'stochastic' loses nothing on average, "
                "'split24' and 'split32' keep the rest of the weight.",
                stacklevel=3 if self._internals.constructed else 6,
            )

    # --- the step -------------------------------------------------------------------------------------------------

    @with_hooks
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: re-evaluates the model and returns the loss; called with gradients enabled, before the update.

        Returns:
            What `closure` returned, or None.

        Raises:
            ValueError, TypeError, RuntimeError: a tensor or hyperparameter that does not fit, naming the parameter,
                what it was, what was expected and the way out. Then nothing was written.
            RuntimeError: where norms, guards or a loss scaler's signals are reduced over processes: another process
                cannot take the step, with its reason, or holds other parameters. On GPUs the former is skipped here
                as an overflow is, because nothing waits for the device.
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
        stepper = self._current_stepper()
        # Set by GradScaler, or by hand, for this step.
        scale, flag = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        signalled = scale is not None or flag is not None
        capturing = is_capturing()
        self._internals.agreement.engaged = capturing  # a graph is no place to talk
        try:
            self._refuse_while_averages_are_shown("step()")
            if self._internals.release is not None:
                self._internals.release.finish_iteration(scaled=signalled)
            try:
                stepper.step(scale, flag, capturing=capturing)
            except KeyError:
                if not self._complete_groups():  # set from outside, by somebody who knows torch's options only
                    raise
                stepper.step(scale, flag, capturing=capturing)
        except Exception as error:
            stepper.refuse(error, signalled=signalled)
            raise
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
            own.control = StepControl(measures=measures, num_norms=num_norms, agreement=own.agreement, **own.guards)
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

    def check_ranks(self, process_group: Any = None) -> None:
        """Compare the parameters with those of all other processes, which must call this too: once, after construction.

        Names (where the optimizer was given any), dtypes, whole shapes and placements must be the same, in the same
        order and groups. A step compares them by itself, once, where it reduces norms, guards or signals over
        processes; without these it communicates nothing and cannot know. Then parameters in another order get other
        random bits, replicas drift apart, and checkpoints are mixed up. What has neither a name nor a shape of its own
        cannot be told apart: pass `model.named_parameters()` to the constructor.

        Args:
            process_group: whose processes hold the same parameters, by default all. A pipeline's stages do not: pass
                the group of the stage.

        Raises:
            RuntimeError: on every process alike, naming the first parameter that differs and two ranks; or, after the
                process group's time-out, that some process did not call this.
        """
        compare(describe(self.param_groups), process_group or torch.distributed.group.WORLD)

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
        """As torch's; where anything is rounded by chance, the groups also name the seed, so that a run resumes.

        Tensors share memory with the state, as torch's do. Those of int16 are shown as bfloat16 of the same bits (not
        of the same values): no process group sends int16, so that the state of shards could not be gathered. Beside
        parameters of FullyShardedDataParallel all are float32, copies that lose nothing.
        """
        self._name_seed()
        packing = self.register_state_dict_post_hook(_pack, prepend=True)  # first: the user's own hooks see the result
        try:
            return super().state_dict()
        finally:
            packing.remove()

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load the state of an optimizer of this kind, ours or torch's (`AdamW` and `Adam`, or `SGD`), at any step.

        Every state tensor keeps its own dtype (torch's own method casts moments to the parameter's) and is copied to
        its parameter's device, so that nothing is shared with the optimizer it came from. 16-bit moments are widened,
        exactly, by the next step. Options that torch does not know (`ema_decay`, say) and that the loaded groups do not
        have either stay as they are.

        All of it is checked first, after the hooks that were registered for it.

        Raises:
            ValueError: the groups do not match.
            ValueError, TypeError, RuntimeError: an option, or a parameter's state, that a step would refuse. In either
                case nothing was loaded.
        """
        self._refuse_while_averages_are_shown("load_state_dict()")
        loading = Loading(self)
        before = self.register_load_state_dict_pre_hook(loading.shield)  # last: the user's own hooks see plain tensors
        after = self.register_load_state_dict_post_hook(loading.unshield, prepend=True)  # first, likewise
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


def _pack(opt: Optimizer, state_dict: StateDict) -> StateDict:
    members = zip(opt.param_groups, state_dict["param_groups"], strict=True)
    pairs = [pair for own, group in members for pair in zip(own["params"], group["params"], strict=True)]
    flat = {key for p, key in pairs if is_flat_shard(p)}
    states = {
        key: packed(entry, is_flat_shard=key in flat) if isinstance(entry, dict) else entry
        for key, entry in state_dict["state"].items()
    }
    return {**state_dict, "state": states}


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
