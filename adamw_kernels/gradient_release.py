"""Gradient release: each parameter is stepped as its gradient arrives in backward, and the gradient is freed.

The memory of all gradients together is then never in use: only that of the few which are on their way.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch._compile import _disable_dynamo

from adamw_kernels.functional import is_capturing
from adamw_kernels.groups import param_name
from adamw_kernels.stepper import Stepper

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from adamw_kernels.optimizer import FusedOptimizer


def release_gradients(
    model: torch.nn.Module, opt: FusedOptimizer, *, accumulation_steps: int = 1, grad_scaler: Any = None
) -> GradientRelease:
    """Step each parameter of `model` in backward, as soon as its gradient is complete, and free the gradient.

    The training loop stays as it is: `opt.step()` then ends the iteration (it steps whatever still has a gradient, and
    runs hooks), so learning rate schedulers see what they expect. A parameter's step is the one that `opt.step()` would
    have taken, bit for bit. Works with FSDP2 (`fully_shard`), which calls the same hooks with reduced gradients.

    Args:
        model: whose parameters; those that `opt` does not hold keep their gradients.
        opt: the optimizer.
        accumulation_steps: how many backward passes the loop makes before each `opt.step()`: must be 1.
        grad_scaler: the loop's loss scaler, if any: must be None or disabled.

    Returns:
        A handle: `remove()` undoes it, and so does leaving it as a context manager.

    Not to be seen from here, and so not refused: clipping by others, which finds no gradients any more, and a loss
    scaler that is not passed.

    Raises:
        ValueError, RuntimeError, TypeError: a combination that cannot work, with the reason; a parameter without
            `requires_grad` is left alone. Nothing is changed then.
    """
    return GradientRelease(model, opt, accumulation_steps, grad_scaler)


class GradientRelease:
    """The handle that `release_gradients` returns."""

    def __init__(self, model: torch.nn.Module, opt: FusedOptimizer, accumulation_steps: int, grad_scaler: Any) -> None:
        """Check, then register one hook a parameter."""
        if not hasattr(opt, "_internals"):
            raise TypeError(
                f"release_gradients: opt is a {type(opt).__name__}; expected a FusedAdamW or FusedSGDW. "
                "Unwrap it: `opt.optimizer`."
            )
        _check_combination(opt, accumulation_steps, grad_scaler)
        _check_model(model)
        held = _find_places(opt.param_groups)
        members = [p for p in dict.fromkeys(model.parameters()) if id(p) in held and p.requires_grad]
        if not members:
            raise ValueError("release_gradients: opt holds none of the model's parameters; expected at least one")
        for p in members:
            if p.grad is not None:
                group, index, _ = held[id(p)]
                raise RuntimeError(
                    f"release_gradients: {param_name(opt.param_groups[group], group, index)} has a gradient already, "
                    "which the next backward would add to; call opt.step() and opt.zero_grad() first"
                )
        self._opt = opt
        self._steppers: dict[int, Stepper] = {}
        self._stepped: set[int] = set()
        self._places: dict[int, tuple[int, int, int]] | None = None  # None between iterations
        self._handles: list[RemovableHandle] = [
            p.register_post_accumulate_grad_hook(self._step)  # type: ignore[no-untyped-call]
            for p in members
        ]
        self._handles.append(model.register_forward_pre_hook(_refuse_data_parallel))
        opt._internals.release = self

    def remove(self) -> None:
        """Take the hooks away; from the next backward on, gradients stay until `opt.step()`."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._steppers.clear()
        if self._opt._internals.release is self:
            self._opt._internals.release = None

    def __enter__(self) -> GradientRelease:
        """The handle itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Call `remove`."""
        self.remove()

    def finish_iteration(self, *, scaled: bool) -> None:
        """Called by `opt.step()`: from here on, a parameter may be stepped again.

        Raises:
            RuntimeError: a loss scaler is at work: the gradients that were stepped were scaled.
        """
        if scaled:
            raise RuntimeError(
                "a GradScaler called step() while gradients are released: parameters were stepped in backward, with "
                "scaled gradients. Use bfloat16 or float32 without a scaler, or remove() the release."
            )
        self._stepped.clear()
        self._places = None

    def upload_hyperparameters(self) -> None:
        """As `FusedOptimizer.upload_hyperparameters`, for steps taken in a backward pass that was captured."""
        for stepper in self._steppers.values():
            stepper.upload_hyperparameters()

    @_disable_dynamo  # as FusedOptimizer._update
    def _step(self, p: torch.Tensor) -> None:
        """The hook: `p.grad` is complete."""
        if self._places is None:
            self._begin_iteration()
        if id(p) in self._stepped:
            raise RuntimeError(
                f"{self._name(p)} got a second gradient before opt.step(): with released gradients it was stepped and "
                "its gradient freed at the first, so gradients cannot be accumulated. Call opt.step() after every "
                "backward, or remove() the release."
            )
        self._opt._refuse_while_averages_are_shown("a backward pass that steps parameters")
        stepper = self._stepper_of(p)
        if stepper is None:  # no longer the optimizer's
            return
        capturing = is_capturing()
        try:
            stepper.step(capturing=capturing)
        except KeyError:
            if not self._opt._complete_groups():  # as FusedOptimizer.step
                raise
            stepper.step(capturing=capturing)
        if capturing:
            self._opt._internals.captured.append(stepper.plan)
        self._stepped.add(id(p))
        p.grad = None

    def _begin_iteration(self) -> None:
        """See where each parameter is now: groups may have changed since the last iteration."""
        _check_groups(self._opt)
        self._places = _find_places(self._opt.param_groups)
        self._steppers = {key: stepper for key, stepper in self._steppers.items() if key in self._places}

    def _stepper_of(self, p: torch.Tensor) -> Stepper | None:
        opt = self._opt
        place = (self._places or {}).get(id(p))
        if place is None:
            return None
        stepper = self._steppers.get(id(p))
        group, state = opt.param_groups[place[0]], opt.state[p]
        if stepper is None or stepper.place != place or stepper.groups[0] is not group or stepper.state[p] is not state:
            # `lists` is what the watch looks through: this one parameter instead of its whole group.
            stepper = Stepper([group], [{"params": [p]}], {p: state}, opt._internals.options, _no_control, place)
            self._steppers[id(p)] = stepper
        return stepper

    def _name(self, p: torch.Tensor) -> str:
        place = (self._places or {}).get(id(p))
        return param_name(self._opt.param_groups[place[0]], *place[:2]) if place is not None else "a parameter"


def _no_control(signalled: bool) -> None:
    """A released step is always applied; see `_check_combination`."""


def _find_places(param_groups: list[dict[str, Any]]) -> dict[int, tuple[int, int, int]]:
    """By id, each parameter's group, its index there, and its position over all groups."""
    places: dict[int, tuple[int, int, int]] = {}
    position = 0
    for group, options in enumerate(param_groups):
        for index, p in enumerate(options["params"]):
            places.setdefault(id(p), (group, index, position))
            position += 1
    return places


def _check_combination(opt: FusedOptimizer, accumulation_steps: int, grad_scaler: Any) -> None:
    """Refuse what would need all gradients at once.

    Raises:
        ValueError: naming the option and the reason.
        RuntimeError: gradients are released already.
    """
    if opt._internals.release is not None:
        raise RuntimeError(
            "release_gradients: the gradients of this optimizer are released already; remove() that first"
        )
    if accumulation_steps != 1:
        raise ValueError(
            f"release_gradients: accumulation_steps={accumulation_steps}: a released gradient is gone before the next "
            "backward could add to it; expected 1"
        )
    if grad_scaler is not None and grad_scaler.is_enabled():
        raise ValueError(
            "release_gradients: a GradScaler decides over the step when all gradients are there, and by then the "
            "parameters have been stepped; expected no enabled grad_scaler. Use bfloat16 or float32."
        )
    if opt.defaults.get("fused"):
        raise ValueError(
            "release_gradients: fused=True announces a GradScaler that unscales within step(), and here steps are "
            "taken before it is asked; expected fused=None"
        )
    _check_groups(opt)
    if opt._internals.guards["skip_nonfinite"] or opt._internals.guards["max_skip_norm"] is not None:
        raise ValueError(
            "release_gradients: skip_nonfinite and max_skip_norm decide over a step when all gradients are there, and "
            "by then parameters have been stepped; expected neither"
        )


def _refuse_data_parallel(module: torch.nn.Module, arguments: Any) -> None:
    """A forward hook: `module` may have been wrapped by somebody who is not to be seen from it."""
    if getattr(torch.nn.parallel.DistributedDataParallel, "_active_ddp_module", None) is not None:
        raise RuntimeError(
            "the gradients of this module are released, and it runs within DistributedDataParallel, which reduces them "
            "over processes after they have arrived: the replicas would drift apart. Use FSDP2 (fully_shard), or "
            "remove() the release."
        )


def _check_model(model: torch.nn.Module) -> None:
    """Refuse wrappers whose gradients are not complete yet when they arrive.

    Raises:
        ValueError: naming the wrapper and the reason.
    """
    early = {"DistributedDataParallel", "FullyShardedDataParallel"}  # by name: importing either may not be possible
    for name, module in model.named_modules():
        if not early.isdisjoint(cls.__name__ for cls in type(module).__mro__):
            raise ValueError(
                f"release_gradients: {name or 'model'} is a {type(module).__name__}, which reduces gradients over "
                "processes after they have arrived: parameters would be stepped with this process's gradients alone. "
                "Use FSDP2 (fully_shard), which reduces them before."
            )


def _check_groups(opt: FusedOptimizer) -> None:
    """Refuse clipping, which needs all gradients at once, in any group.

    Raises:
        ValueError: naming the group and the reason.
    """
    for index, group in enumerate(opt.param_groups):
        if group.get("max_grad_norm") is not None:
            raise ValueError(
                f"release_gradients: param_groups[{index}] has max_grad_norm={group['max_grad_norm']}: the norm is "
                "known when the last gradient has arrived, and by then the first is gone; expected None"
            )
