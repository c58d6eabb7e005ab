"""The optimizer's step on the host: a plan that is built once, and the sweep that brings it up to date.

A `Stepper` steps the parameters it is shown: all of an optimizer's, or a single one whose gradient has just arrived.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from adamw_kernels.agreement import Roster, shares_of
from adamw_kernels.control import NormDomain, StepControl
from adamw_kernels.formats import random_stream
from adamw_kernels.functional import (
    check_grad,
    check_overlap,
    check_params_overlap,
    check_state,
    chooser,
    dense_grad,
    grad_address,
    local_param,
    local_view,
)
from adamw_kernels.groups import describe, is_coded, is_extended, param_name, traits_of
from adamw_kernels.hyperparameters import check_hyperparameters
from adamw_kernels.launch_table import LaunchPlan, TensorSpec
from adamw_kernels.options import FURTHER_OPTIONS, check_8bit_betas, check_seed
from adamw_kernels.param_copies import ParamCopies
from adamw_kernels.placement import is_misplaced, placed_grad, redistributed_grad
from adamw_kernels.rules import group_hyperparameters, initial_lr_of, moment_keys, read_groups, rule_of
from adamw_kernels.sharding import (
    first_element,
    is_flat_shard,
    mesh_groups,
    random_place,
    shard_groups,
)
from adamw_kernels.state import (
    check_adoptable,
    check_formats,
    complete_state,
    drop_remainder,
    formats_of,
    local_state,
    remainder_in,
    state_dtypes,
)
from adamw_kernels.tensor_watch import ALWAYS_ODD, NO_ROW, GroupGuard, TensorWatch, guard_groups, watch_tensors


class Member(NamedTuple):
    """A parameter that has a row in the plan, as it was when the plan was built. Keeps no tensor alive."""

    name: str
    row: int
    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    addresses: dict[str, int]


@dataclasses.dataclass(frozen=True, eq=False)
class Options:
    """What concerns an optimizer as a whole.

    Attributes:
        backend: as `backends.choose` takes it.
        clip_per_group: every group has a gradient norm of its own.
        process_group: over which parameters other than DTensors are sharded, or None.
        seed: of the random bits of stochastic rounding, in groups that name none.
        copies: of the weights in 16 bits.
    """

    backend: str = "auto"
    clip_per_group: bool = False
    process_group: Any = None
    seed: int = 0
    copies: ParamCopies = dataclasses.field(default_factory=ParamCopies)

    def __deepcopy__(self, memo: dict[int, Any]) -> Options:
        """The same (a process group cannot be copied) without copies of the weights, which are of other parameters."""
        return dataclasses.replace(self, copies=ParamCopies())


class Stepper:
    """One step over the parameters of `groups`; keeps the plan from step to step.

    Attributes:
        plan: the launch plan, or None before the first step.
        watch: what notices that the plan no longer fits.
        members: the parameters that have a row, by id.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lists: list[dict[str, Any]],
        state: Any,
        options: Options,
        find_control: Callable[[bool], StepControl | None],
        place: tuple[int, int, int] = (0, 0, 0),
    ) -> None:
        """Nothing is built before the first step.

        Args:
            groups: whose hyperparameters count.
            lists: as many dicts, whose "params" are stepped: `groups` themselves, or parts of them.
            state: the optimizer's state of these parameters.
            options: of the optimizer.
            find_control: called for each plan, with whether a loss scaler is at work: what decides over its steps, or
                None.
            place: of the first of these parameters in the optimizer: its group, its index there, and its position over
                all groups.
        """
        self.groups = groups
        self.lists = lists
        self.state = state
        self.options = options
        self.control: StepControl | None = None
        self._find_control = find_control
        self.place = place
        self.plan: LaunchPlan | None = None
        self.watch: TensorWatch | None = None
        self.members: dict[int, Member] = {}
        self._captured: LaunchPlan | None = None  # that of the last graph
        self._flat_shards = False
        self._copies: list[int] = []  # addresses of the options' copies then
        self._redistributed = False  # whether this step has placed gradients as their parameters are
        self._guard: GroupGuard | None = None  # of groups whose options the plan holds; None: of none
        self._structure: list[Any] | None = None
        self._sizes: list[int] = []  # of the groups' dicts when the plan was built
        self._extended: list[bool] = []  # groups that had any of FURTHER_OPTIONS then
        self._coded: list[int] = []  # groups whose moments are of 8 bits

    # --- the step -------------------------------------------------------------------------------------------------

    def step(
        self,
        grad_scale: torch.Tensor | float | None = None,
        found_inf: torch.Tensor | float | None = None,
        *,
        capturing: bool = False,
    ) -> None:
        """Update every parameter that has a gradient.

        Args:
            grad_scale: gradients are this many times too large.
            found_inf: if not zero, or NaN, the step is skipped.
            capturing: the current stream is being captured in a CUDA graph.

        Raises:
            ValueError, TypeError, RuntimeError: as `FusedOptimizer.step`.
        """
        self._redistributed = False
        signalled = grad_scale is not None or found_inf is not None
        relaid = None if signalled and self.control is None else self._sweep()
        if capturing:
            self._check_capture(relaid is not None)
        if relaid is None:
            self._build(signalled=signalled)
            self._agree()
            relaid = self._sweep()
        assert relaid is not None and self.watch is not None and self.plan is not None, "a new plan fits"
        try:  # parameters and gradients are held: their addresses are in the table
            if grad_scale is not None and self._flat_shards and self.options.process_group is None:
                # After `unscale_` (no grad_scale then) a sharded scaler's flag is everybody's; here it is our own.
                raise RuntimeError(
                    "parameters are sharded by FullyShardedDataParallel, and this process knows only its own shards' "
                    "overflow: some would step while others skip. Call scaler.unscale_(optimizer) before "
                    "scaler.step(optimizer), or pass process_group= to the optimizer."
                )
            if self.control is not None:
                self.control.signal(grad_scale, found_inf, capturing=capturing)
            self.watch.bump_versions()
            self.plan.launch(capturing=capturing)
        finally:
            self.watch.release()
        if capturing:
            self._captured = self.plan
        del relaid

    @torch.no_grad()
    def refuse(self, error: Exception, *, signalled: bool) -> None:
        """Tell other processes, where they would wait for this one, that `error` keeps it from taking the step."""
        control = self._find_control(signalled)
        if control is not self.control:
            self.control, self.plan = control, None  # which knows of no other
        agreement = None if control is None else control.agreement
        with torch._C.DisableTorchFunctionSubclass():
            if not self._redistributed and (agreement is None or agreement.is_settled):
                self._redistribute_for_others()
            if agreement is None or agreement.engaged:
                return
            try:
                domains = self._domains()
            except RuntimeError:  # raised on all
                return
            if any(domain.process_groups for domain in domains):
                agreement.refuse(error, self._groups(domains), self._home() or torch.device("cpu"))

    def _redistribute_for_others(self) -> None:
        """Take part in what the other processes do with gradients that are not placed as their parameters are."""
        self._redistributed = True
        for p in (p for group in self.lists for p in group["params"]):
            with contextlib.suppress(Exception):  # the one that this process cannot redistribute, the others cannot
                if p.grad is not None and is_misplaced("", p):
                    redistributed_grad("", p)

    def _agree(self) -> None:
        """Before anything is communicated for the first time, compare what processes hold."""
        agreement = None if self.control is None else self.control.agreement
        if agreement is None or agreement.is_settled or self.plan is None:
            return
        plan, self.plan = self.plan, None  # if they disagree, the next step comes here again
        agreement.settle(shares_of([domain.process_groups for domain in plan.domains]))
        self.plan = plan

    def forget_recast(self, name: str, p: torch.Tensor) -> None:
        """Drop the remainder of a weight that was cast since the last step: bfloat16's and float16's look alike."""
        before = self.members.get(id(p))
        if before is None or before.param_dtype == p.dtype:
            return
        if remainder_in(self.state.get(p, {})) is not None:
            drop_remainder(name, p, self.state[p])  # raises where warnings are errors
        del self.members[id(p)]  # what will be loaded after this belongs to the new dtype
        self.plan = None

    def upload_hyperparameters(self) -> None:
        """Bring the devices' hyperparameter rows up to date without a step.

        Raises:
            RuntimeError: the plan must be built anew, which only a step does.
        """
        if self.plan is None:
            return
        if self._captured not in (None, self.plan) or not self._refresh_hyperparameters():
            raise RuntimeError(
                "parameters, state or an option other than a hyperparameter's value changed since the step was "
                "captured (amsgrad, one that was None, a group added, a first gradient); the graph cannot follow. Take "
                "one eager step and capture again."
            )
        for table in self.plan.tables:
            table.send_hyperparameters()

    def _check_capture(self, plan_fits: bool) -> None:
        """Refuse what a CUDA graph cannot replay.

        Raises:
            RuntimeError: saying what to do instead.
        """
        if not plan_fits or self.plan is None:
            raise RuntimeError(
                "the optimizer has not taken a step with these parameters, options and kinds of gradients yet, and "
                "what a first step does (allocating, compiling, sending tables) cannot be captured in a CUDA graph. "
                "Take one eager step before the capture."
            )
        devices = [str(table.device) for table in self.plan.tables]
        if len(devices) > 1 or (devices and self.plan.tables[0].device.type != "cuda"):
            raise RuntimeError(
                f"a CUDA graph is being captured, and the optimizer holds parameters with gradients on "
                f"{', '.join(devices)}: a graph replays the work of one GPU. Use one optimizer a device."
            )
        if not all(table.has_current_hyperparameters() for table in self.plan.tables):
            raise RuntimeError(
                "hyperparameters changed since the last step, and sending them is no part of a CUDA graph (it would "
                "replay these values for ever). Call upload_hyperparameters() before the capture, as between replays."
            )

    def _sweep(self) -> Sequence[torch.Tensor] | None:
        """Bring the plan up to date, or return None where it must be built anew.

        Returns:
            Copies of gradients, which must outlive the launch. What else the table refers to, the watch holds.
        """
        if self.plan is None or self.watch is None or not self._refresh_hyperparameters():
            return None
        if self.options.copies and self.options.copies.addresses() != self._copies:
            return None
        with torch._C.DisableTorchFunctionSubclass():
            odd = self.watch.sweep(self.lists, self.state)
        if not odd:
            return None if odd is None else ()
        relaid = None
        try:
            relaid = self._read_odd(odd)
        finally:
            if relaid is None:
                self.watch.release()
        return relaid

    def _refresh_hyperparameters(self) -> bool:
        """Write the hyperparameters that changed; False if the plan's structure depends on one of them."""
        assert self.plan is not None
        rows = self.plan.hypers
        if self._guard is not None and self._guard.are_unwritten(self.groups):
            self._check_8bit_betas()
            return rows.refresh()
        self._guard, guard = None, self._guard or guard_groups()
        guard.remember(self.groups)
        sizes = [*map(len, self.groups)]
        if sizes != self._sizes:  # one of our options was added, or something else (a schedule's initial_lr)
            if [*map(is_extended, self.groups)] != self._extended:
                return False
            self._sizes = sizes
        hypers, structure = read_groups(self.groups, self._extended)
        if structure != self._structure or len(hypers) != len(rows.written):
            return False
        self._check_8bit_betas()
        if not all(map(operator.is_, hypers, rows.written)) and not rows.update(hypers):
            return False
        self._guard = guard
        return rows.refresh()

    def _check_8bit_betas(self) -> None:
        for index in self._coded:
            check_8bit_betas(self.groups[index], f"param_groups[{self.place[0] + index}]")

    @torch.no_grad()
    def _read_odd(self, odd: Sequence[int]) -> list[torch.Tensor] | None:
        """Write the gradients' addresses that the watch could not; the tensors must outlive the launch.

        Everything is compared before the first gradient is redistributed: that is a collective, and a process that did
        it twice, because it found its plan out of date in between, would leave the others waiting.
        """
        assert self.plan is not None
        params = [p for group in self.lists for p in group["params"]]
        read: list[tuple[Member, torch.Tensor, torch.Tensor]] = []
        with torch._C.DisableTorchFunctionSubclass():
            for position in odd:
                p = params[position if position >= 0 else -1 - position]
                member = self.members[id(p)]
                if position < 0:  # has none
                    self.plan.write_grad(member.row, 0)
                    continue
                local, grad = local_view(p), placed_grad(member.name, p)
                if (local.dtype, grad.dtype) != (member.param_dtype, member.grad_dtype):
                    return None
                if _addresses(local, self.state[p]) != member.addresses or grad.layout != torch.strided:
                    return None
                if grad.shape != local.shape or grad.device != local.device:
                    return None
                read.append((member, p, local))
            self._redistributed = True
            kept = [dense_grad(local, redistributed_grad(member.name, p)) for member, p, local in read]
        for (member, _, _), grad in zip(read, kept, strict=True):
            self.plan.write_grad(member.row, grad_address(grad))
        return kept

    # --- building the plan ------------------------------------------------------------------------------------------

    @torch.inference_mode(False)  # the tables outlive this step, and inference tensors could not be written later
    @torch.no_grad()
    def _build(self, *, signalled: bool) -> None:
        """Check everything, create missing state, and build the launch tables. No parameter is updated yet."""
        self.plan = self.watch = self._guard = None
        sizes = [len(group) for group in self.groups]
        extended = [*map(is_extended, self.groups)]
        for index, group in enumerate(self.groups, self.place[0]):
            check_hyperparameters(group_hyperparameters(group), f"param_groups[{index}]")
            if is_coded(group):
                check_8bit_betas(group, f"param_groups[{index}]")
                self._refuse_flat_shards(index - self.place[0])
            if "seed" in group:
                check_seed(group["seed"], f"seed of param_groups[{index}]")
            if group.get("decay_coupling") == "schedule" and initial_lr_of(group) is None:
                raise ValueError(
                    f"param_groups[{index}]: decay_coupling='schedule', and the group has no initial_lr; expected the "
                    "lr that stands for a multiplier of 1"
                )
        hypers, structure = read_groups(self.groups, extended)
        self.control = self._find_control(signalled)
        with torch._C.DisableTorchFunctionSubclass():
            domains = self._domains()
            self._enrol(domains)
            specs, grads, members = self._collect(keep_idle=True)
            try:
                check_overlap(specs, grads)
            except ValueError:  # does it concern parameters that have no gradient, and so are not written?
                specs, grads, members = self._collect(keep_idle=False)
                check_overlap(specs, grads)
            plan = LaunchPlan(
                specs,
                len(self.groups),
                chooser(self.options.backend),
                control=self.control,
                domains=domains,
                home=self._home(),
            )
            plan.hypers.write_all(hypers)
            slots, dtypes = [], []
            for p in (p for group in self.lists for p in group["params"]):
                member = members.get(id(p))
                slots.append(NO_ROW if member is None else ALWAYS_ODD if p.is_complex() else plan.slots[member.row])
                dtypes.append(None if member is None else member.grad_dtype)
            self.watch = watch_tensors(self.lists, self.state, slots, dtypes)
            self._copies = self.options.copies.addresses()
        if self.control is not None:
            self.control.keep_only([table.device for table in plan.tables])
        self.plan = plan
        self.members = members
        self._structure, self._sizes, self._extended = structure, sizes, extended
        self._coded = [i for i, group in enumerate(self.groups) if is_coded(group)]
        self._flat_shards = any(is_flat_shard(p) for group in self.lists for p in group["params"])

    def _refuse_flat_shards(self, group: int) -> None:
        """Refuse 8-bit moments of parameters that FullyShardedDataParallel cuts anywhere, all ranks alike.

        Raises:
            ValueError: naming the first of them.
        """
        for index, p in enumerate(self.lists[group]["params"]):
            if is_flat_shard(p):
                raise ValueError(
                    f"moment_format of {self._name(group, index)} is '8bit', and it is sharded by "
                    "FullyShardedDataParallel, which cuts groups of neighbours in two and cannot save what they share; "
                    "expected 'float32' or 'bfloat16'. Under FSDP2 (fully_shard) 8 bits work."
                )

    def _home(self) -> torch.device | None:
        """Where to decide if no parameter has a gradient."""
        return next((p.device for group in self.lists for p in group["params"]), None)

    def _enrol(self, domains: list[NormDomain]) -> None:
        """Let the processes that will reduce together compare what they hold, in the first such step."""
        if self.control is None or self.control.agreement is None or not any(d.process_groups for d in domains):
            return
        process_group = self.options.process_group
        # Over a process group, plain tensors are each process's own. The stepper itself would keep its state alive.
        lines = functools.partial(describe, self.lists, with_plain_tensors=process_group is None)
        self.control.agreement.roster = Roster.of(lines, self._groups(domains), self.control.num_norms, process_group)

    def _groups(self, domains: list[NormDomain]) -> dict[Any, None]:
        """The process groups of all reductions and, because replicas must not drift apart, of whole meshes."""
        groups = dict.fromkeys(group for domain in domains for group in domain.process_groups)
        params = [p for group in self.lists for p in group["params"] if hasattr(p, "placements")]
        for p in {id(p.device_mesh): p for p in params}.values():
            groups |= dict.fromkeys(mesh_groups(p))
        return groups

    def _name(self, group: int, index: int) -> str:
        return param_name(self.groups[group], self.place[0] + group, self.place[1] + index)

    def _collect(self, keep_idle: bool) -> tuple[list[TensorSpec], list[torch.Tensor], dict[int, Member]]:
        """The rows of the plan: every parameter with a gradient and, if `keep_idle`, those that had one before.

        The latter keep their row so that gradients that come and go (experts, frozen layers) cost nothing.
        """
        places = [(group, index) for group, g in enumerate(self.lists) for index in range(len(g["params"]))]
        candidates: dict[int, tuple[str, int, torch.Tensor, int]] = {}
        # A parameter listed twice in its group (torch warns of it) has one row.
        for position, (group, index) in enumerate(places, self.place[2]):
            p = self.lists[group]["params"][index]
            if p.grad is not None or (keep_idle and self.state.get(p)):
                candidates.setdefault(id(p), (self._name(group, index), group, p, random_place(p, position)))
        stepped: list[tuple[str, torch.Tensor, torch.Tensor]] = []
        for name, group, p, _ in candidates.values():  # first all checks, then the first change
            if p.grad is not None:
                local = local_param(name, p)
                grad = placed_grad(name, p)
                check_grad(name, local, grad)
                stepped.append((name, local, grad))
                check_adoptable(name, p, local, self.state.get(p, {}), rule_of(self.groups[group]))
                check_formats(name, p, self.groups[group])
        check_params_overlap(stepped)
        for device in {local.device for _, local, _ in stepped}:
            chooser(self.options.backend)(device)

        specs: list[TensorSpec] = []
        grads: list[torch.Tensor] = []
        members: dict[int, Member] = {}
        steps_seen: set[int] = set()
        options = [FURTHER_OPTIONS | group for group in self.groups]
        traits = [traits_of(of_group) for of_group in options]
        for name, group, p, place in candidates.values():
            self.forget_recast(name, p)
            if p.grad is not None:
                complete_state(name, p, self.state[p], options[group], steps_seen)
            try:
                spec = self._spec(name, group, p, place, options[group], traits[group])
            except (AttributeError, KeyError, TypeError, ValueError):
                if p.grad is not None:
                    raise
                continue  # has no gradient: whatever does not fit is looked at when it has one
            members[id(p)] = Member(
                name, len(specs), spec.param.dtype, spec.grad_dtype, _addresses(spec.param, self.state[p])
            )
            specs.append(spec)
            grads.append(spec.param if p.grad is None else placed_grad(name, p))
        return specs, grads, members

    def _spec(
        self,
        name: str,
        group: int,
        p: torch.Tensor,
        place: int,
        options: dict[str, Any],
        traits: dict[str, Any],
    ) -> TensorSpec:
        state, local = self.state[p], local_param(name, p)
        formats = formats_of(p, options)
        views: dict[str, torch.Tensor] = {}
        for key, dtype in state_dtypes(local, formats, options).items():
            views[key] = local_view(state[key])
            check_state(name, key, local, views[key], dtype)
        if not formats.covers(state):
            raise TypeError(f"the state of {name} has another format")  # to be converted when it is stepped
        moments = [views[key] for key in moment_keys(options, formats.moments)]
        first, second, *maximum = moments if traits["rule"] == "adamw" else (*moments, None, None)[:2]
        bound = options["update_bound"]
        if bound == "auto":
            bound = math.inf if formats.moments == "float32" else -1.0
        return TensorSpec(
            name=name,
            param=local,
            grad_dtype=local.dtype if p.grad is None else placed_grad(name, p).dtype,
            exp_avg=first,
            exp_avg_sq=second,
            max_exp_avg_sq=maximum[0] if maximum else None,
            step=views["step"],
            hyper=group,
            amsgrad=bool(maximum),
            ema=views.get("param_ema"),
            domain=self._domain(group, p),
            random_stream=random_stream(int(options.get("seed", self.options.seed)), place),
            param_format=formats.param,
            moment_format=formats.moments,
            remainder=remainder_in(views),
            groups=views.get("moment_groups"),
            scale=views.get("exp_avg_sq_scale"),
            first_element=first_element(p, self.options.process_group),
            update_bound=math.inf if bound is None else float(bound),
            copy=self.options.copies.of(name, p),
            **traits,
        )

    def _domain(self, group: int, p: torch.Tensor) -> NormDomain:
        """Which sum of squares a parameter's gradient is part of."""
        if self.control is None:
            return NormDomain()
        norm = group if self.options.clip_per_group else 0
        return NormDomain(norm, shard_groups(p, self.options.process_group))

    def _domains(self) -> list[NormDomain]:
        """All sums of squares, also those to which no gradient adds here.

        Processes reduce as many numbers in the same order, or raise together, only if this does not depend on whose
        gradients, or whose plain tensors, lie where.

        Raises:
            RuntimeError: a parameter is known to be sharded, and not over which processes.
        """
        if self.control is None:
            return []
        process_group = self.options.process_group
        norms = range(self.control.num_norms if process_group is not None else 0)
        domains = [NormDomain(norm, (process_group,)) for norm in norms]
        for index, group in enumerate(self.lists):
            for i, p in enumerate(group["params"]):
                if self.control.measures and process_group is None and is_flat_shard(p):
                    raise RuntimeError(
                        f"{self._name(index, i)} is sharded by FullyShardedDataParallel, and gradient norms and guards "
                        "need to know over which processes. Pass process_group= to FusedAdamW."
                    )
                domains.append(self._domain(index, p))
        return domains


def _addresses(local: torch.Tensor, state: dict[str, Any]) -> dict[str, int]:
    """Where a parameter and its state live; the user's own entries beside them are not ours to look at."""
    return {"param": local.data_ptr()} | {key: value.data_ptr() for key, value in local_state(state).items()}
