"""Warm restarts (AdamWR, SGDWR): cosine annealing in cycles, decay normalized to a cycle, weights at each restart."""

from __future__ import annotations

import bisect
import math
import numbers
import operator
import sys
import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import Optimizer

_SIMPLE_DENOMINATOR = 10**6  # of fractions that a float may have been meant as; n batches an epoch, and decimals
_EXACT_DENOMINATOR = 2**64  # of cycle lengths and starts; beyond it, they are rounded
_RESOLUTION = 2**128  # to this fraction of an epoch, which float64 does not tell from exact


def normalized_weight_decay(lambda_norm: float, batch_size: float, num_samples: float, epochs: float) -> float:
    r"""The weight decay of a run, or of a cycle, from a normalized one that suits runs of any length.

    .. math::
        \lambda = \lambda_{\mathrm{norm}} \sqrt{\frac{b}{B\,T}}

    This :math:`\lambda` is multiplied by :math:`\eta_t` alone and not by the learning rate: it belongs with
    `decay_coupling="schedule"`. For torch's coupling, "lr", divide it by the learning rate.

    Args:
        lambda_norm: :math:`\lambda_{\mathrm{norm}}`, not negative.
        batch_size: :math:`b`, samples a step.
        num_samples: :math:`B`, samples an epoch.
        epochs: :math:`T`, of the run; with restarts, of the cycle. May be fractional.

    Returns:
        :math:`\lambda`.

    Raises:
        ValueError: `lambda_norm` is negative, one of the others is not above 0, or any is no finite number.

    Source: Loshchilov & Hutter, *Decoupled Weight Decay Regularization* (2019), appendix B.1.
    """
    where = "normalized_weight_decay: "
    lambda_norm = _number(lambda_norm, f"{where}lambda_norm", "a finite number >= 0", lambda x: x >= 0)
    sizes = {"batch_size": batch_size, "num_samples": num_samples, "epochs": epochs}
    b, samples, t = (_number(x, where + name, "a finite number > 0", lambda x: x > 0) for name, x in sizes.items())
    return lambda_norm * math.sqrt(b / samples / t)


class Snapshot(NamedTuple):
    """The weights with which a cycle ended.

    Attributes:
        cycle: which one, from 0.
        time: epochs when its successor began.
        weights: CPU tensors in the order of the parameters: float32 where the optimizer has `fp32_weights()` (float64
            and complex parameters keep their dtype), else in the parameters' dtypes.
    """

    cycle: int
    time: float
    weights: list[torch.Tensor]


class WarmRestarts(LRScheduler):
    r"""Cosine annealing with warm restarts: what makes AdamW AdamWR, and SGDW SGDWR.

    .. math::
        \eta_t = \eta_{\min} + (1 - \eta_{\min}) \big(0.5 + 0.5 \cos(\pi\, T_{\mathrm{cur}} / T_i)\big), \qquad
        \mathrm{lr} = \mathrm{initial\_lr} \cdot \eta_t, \qquad T_{i+1} = \mathrm{cycle\_mult} \cdot T_i

    With :math:`\eta_{\min} = 0` it is `torch.optim.lr_scheduler.CosineAnnealingWarmRestarts`, whose `eta_min` is a
    learning rate and not a share of one: the same restarts, and learning rates that differ by float64's rounding, 1e-14
    of the initial ones at most. Works with any optimizer. The paper's decay, proportional to :math:`\eta_t`,
    follows with `decay_coupling="schedule"`.

    The learning rate depends on the time alone. Time is exact: `steps_per_epoch` counts batches, and a float that is
    the nearest one to a fraction with a denominator of at most 10^6 is taken as that fraction. So with
    `first_cycle=0.07` and 100 batches an epoch every cycle has seven batches, which 0.07 in binary, a little more than
    that, would not give. Cycles of equal length are found by division. Others are added up from the first, each once,
    as fractions with denominators below 2^64 (which hold any number of cycles for a whole `cycle_mult`, 64 for 1.5),
    or else rounded to 2^-128 epochs. What is seen of them is float64.

    Args:
        optimizer: whose learning rates it sets: floats, or tensors in place.
        first_cycle: :math:`T_0` in epochs, above 0; may be fractional.
        cycle_mult: how many times longer each cycle is than the one before, at least 1; may be fractional.
        eta_min: :math:`\eta_{\min}`, in [0, 1).
        steps_per_epoch: `step()` is called after each batch, so many times an epoch. None: after each epoch.
        weight_decay: the weight decay of a cycle by its length in epochs, for example `functools.partial(
            normalized_weight_decay, 0.05, batch_size, num_samples)`. Set when a cycle begins, in every group whose
            weight decay was not 0 when the scheduler was made; floats, or tensors in place.
        snapshots: how many of the latest weights with which a cycle ended are kept, in `snapshots`. Each costs four
            bytes a parameter on the CPU, the same on the device while it is copied, and a wait for the device.
        last_epoch: -1 to begin; to go on without a state dict, how often `step()` was called, less one.

    Attributes:
        snapshots: the latest, oldest first.

    Raises:
        TypeError: no optimizer; no integer where one is expected; `weight_decay` cannot be called.
        ValueError: an argument out of range; a `weight_decay` that no group would get.

    Source: Loshchilov & Hutter, *Decoupled Weight Decay Regularization* (2019), appendix B.2; *SGDR: Stochastic
    Gradient Descent with Warm Restarts* (2017), equation 5.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        first_cycle: float,
        cycle_mult: float = 1.0,
        *,
        eta_min: float = 0.0,
        steps_per_epoch: int | None = None,
        weight_decay: Callable[[float], float] | None = None,
        snapshots: int = 0,
        last_epoch: int = -1,
    ) -> None:
        """Check every argument, then set the first learning rate and weight decay."""
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"WarmRestarts: optimizer is a {type(optimizer).__name__}; expected a torch.optim.Optimizer"
            )
        if weight_decay is not None and not callable(weight_decay):
            raise TypeError(
                f"WarmRestarts: weight_decay is {weight_decay!r}; expected a function of a cycle's length in epochs. "
                "A constant belongs in the optimizer's groups."
            )
        schedule = _Schedule(first_cycle, cycle_mult, eta_min, steps_per_epoch, snapshots).checked("WarmRestarts")
        last_epoch = _whole(last_epoch, "WarmRestarts: last_epoch", least=-1)
        self._use(schedule)
        self._weight_decay = weight_decay
        self._decays = [bool(group.get("weight_decay", 0) != 0) for group in optimizer.param_groups]
        if weight_decay is not None and not any(self._decays):
            raise ValueError(
                "WarmRestarts: weight_decay is given, and every group's weight_decay is 0, which stays; expected one "
                "other than 0, of any size, in each group that is to decay"
            )
        self._origin = (Fraction(0), 0)  # a time, and what last_epoch was then
        self._place: _Place | None = None  # None: no cycle has begun
        self.snapshots: list[Snapshot] = []
        super().__init__(optimizer, last_epoch)

    def _use(self, schedule: _Schedule) -> None:
        self._schedule = schedule
        self._cycles = schedule.cycles()

    # --- where the schedule is ------------------------------------------------------------------------------------

    @property
    def time(self) -> float:
        """Epochs since the beginning."""
        return float(self._now().time)

    @property
    def cycle(self) -> int:
        """Index of the cycle, from 0."""
        return self._now().cycle

    @property
    def cycle_length(self) -> float:
        """T_i: epochs that the cycle takes."""
        return self._now().length_in_float

    @property
    def position(self) -> float:
        """T_cur: epochs since the cycle began."""
        return float(self._now().position)

    @property
    def multiplier(self) -> float:
        """eta_t: what the initial learning rates are multiplied by."""
        place, eta_min = self._now(), self._schedule.eta_min
        return eta_min + (1.0 - eta_min) * (0.5 + 0.5 * math.cos(math.pi * float(place.position / place.length)))

    def _now(self) -> _Place:
        assert self._place is not None  # the constructor has taken a step
        return self._place

    # --- stepping -------------------------------------------------------------------------------------------------

    def get_lr(self) -> list[float | torch.Tensor]:
        """The learning rates of the groups at this time; for `step`. `get_last_lr` is for everybody else."""
        if not self._get_lr_called_within_step:
            warnings.warn(
                "get_lr() is what step() asks; to get the last learning rate computed by the scheduler, please use "
                "`get_last_lr()`.",
                stacklevel=2,
            )
        eta = self.multiplier
        return [base_lr * eta for base_lr in self.base_lrs]

    def step(self, epoch: float | None = None) -> None:
        """Go on: set the groups' learning rates and, where a cycle begins, their weight decays; keep a snapshot.

        Where a later cycle begins, the snapshot is of the weights as they are now, before its learning rates are used.
        One is kept if several cycles are jumped over, none on the way back.

        Args:
            epoch: the time to go to, in epochs, also with `steps_per_epoch`; may be fractional (`epoch + batch /
                batches`) and earlier. None: one epoch later, or with `steps_per_epoch` one batch.

        Raises:
            ValueError: a time that is negative or not finite; groups that the scheduler does not know; a weight decay
                that is none. Then nothing was changed.
            RuntimeError: a snapshot is due and the optimizer shows averages of its weights. Likewise.
        """
        per_epoch = self._schedule.per_epoch
        if epoch is None:
            origin, count = self._origin, self.last_epoch + 1
            time = _elapsed(origin, count, per_epoch)
        else:
            epoch = _number(epoch, "WarmRestarts: epoch", "a finite number >= 0, or None", lambda x: x >= 0)
            time = _meant(epoch)
            count = math.floor(time * per_epoch)
            origin = time, count
        if len(self.optimizer.param_groups) != len(self.base_lrs):
            raise ValueError(
                f"WarmRestarts: the optimizer has {len(self.optimizer.param_groups)} groups, and had "
                f"{len(self.base_lrs)} when the scheduler was made; expected as many. Make the scheduler after "
                "add_param_group, with last_epoch= to go on."
            )

        place = self._cycles.locate(time)
        before = self._place
        begins = before is None or place.cycle != before.cycle
        decay = self._decay_of(place) if begins else None
        snapshot = None
        if before is not None and place.cycle > before.cycle and self._schedule.num_snapshots:
            snapshot = Snapshot(before.cycle, float(time), self._copy_weights())

        undo = self._origin, self.last_epoch, before
        self._origin, self.last_epoch, self._place = origin, count - 1, place
        try:
            # Adds one to last_epoch. Without an argument: torch warns of those, as they are deprecated elsewhere.
            super().step()
        except BaseException:
            self._origin, self.last_epoch, self._place = undo
            raise
        self._set_decay(decay)
        if snapshot is not None:
            self.snapshots = [*self.snapshots, snapshot][-self._schedule.num_snapshots :]

    def _decay_of(self, place: _Place) -> float | None:
        """The weight decay of a cycle; None: it is not ours."""
        if self._weight_decay is None:
            return None
        length = place.length_in_float
        what = f"WarmRestarts: weight_decay({length!r}), of a cycle of so many epochs,"
        return _number(self._weight_decay(length), what, "a finite number >= 0", lambda x: x >= 0)

    def _set_decay(self, decay: float | None) -> None:
        if decay is None:
            return
        for group, decays in zip(self.optimizer.param_groups, self._decays, strict=True):
            if decays and isinstance(group["weight_decay"], torch.Tensor):
                group["weight_decay"].fill_(decay)
            elif decays:
                group["weight_decay"] = decay

    # --- snapshots ------------------------------------------------------------------------------------------------

    def _params(self) -> list[torch.Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _copy_weights(self) -> list[torch.Tensor]:
        remembered = getattr(self.optimizer, "fp32_weights", None)
        if remembered is None:
            return [p.detach().to("cpu", copy=True) for p in self._params()]
        weights = remembered()  # new tensors, also on the CPU
        return [weights[p].cpu() for p in self._params()]

    @torch.no_grad()
    def load_snapshot(self, index: int = -1) -> None:
        """Write the weights of `snapshots[index]` into the parameters; moments and the schedule stay as they are.

        Bitwise what they were, also what the formats of a `FusedAdamW` remember beside 16-bit weights.

        Raises:
            TypeError: `index` is no integer.
            IndexError: there is no such snapshot.
            ValueError: the parameters are others than when it was taken. In each case nothing was written.
        """
        index = _whole(index, "WarmRestarts: index")
        kept = len(self.snapshots)
        if not kept:
            reason = "no cycle has ended yet"
            if not self._schedule.num_snapshots:
                reason = "none are kept; make the scheduler with snapshots=1 or more"
            raise IndexError(f"WarmRestarts: load_snapshot({index}), and there is no snapshot: {reason}")
        if not -kept <= index < kept:
            raise IndexError(f"WarmRestarts: load_snapshot({index}); expected an index from {-kept} to {kept - 1}")
        weights, params = self.snapshots[index].weights, self._params()
        shapes = [tuple(p.shape) for p in params]
        if [tuple(weight.shape) for weight in weights] != shapes:
            raise ValueError(
                f"WarmRestarts: snapshot {index} has weights of shapes {[tuple(weight.shape) for weight in weights]}; "
                f"the parameters have {shapes}. They can be copied from `snapshots` one by one."
            )
        load = getattr(self.optimizer, "load_fp32_weights", None)
        if load is not None:
            load(weights)
            return
        for p, weight in zip(params, weights, strict=True):
            p.copy_(weight)

    # --- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything but the optimizer and `weight_decay`; numbers, lists and tensors, so that `torch.load` trusts it.

        Snapshots are part of it, and not copied.
        """
        return {
            **self._schedule._asdict(),
            "base_lrs": [*self.base_lrs],
            "decays": [*self._decays],
            "last_epoch": self.last_epoch,
            "origin_time": float(self._origin[0]),
            "origin_count": self._origin[1],
            "step_count": self._step_count,
            "last_lr": [*self.get_last_lr()],
            "snapshots": [snapshot._asdict() for snapshot in self.snapshots],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the scheduler was that this is the state of.

        As with torch's schedulers, what was saved replaces the constructor's arguments, and learning rates are the
        optimizer's to load. Weight decays are set to those of the loaded cycle if there is a `weight_decay`.

        Raises:
            ValueError: not the state of a WarmRestarts, or for other groups or parameters. Then nothing was loaded.
        """
        expected = self.state_dict().keys()
        if not isinstance(state_dict, dict) or state_dict.keys() != expected:
            found = sorted(map(str, state_dict)) if isinstance(state_dict, dict) else type(state_dict).__name__
            raise ValueError(
                f"WarmRestarts: the loaded state is {found}; expected {sorted(expected)}. To take over from another "
                "scheduler, call step(epoch) with the time to go on from."
            )
        groups, num_params = len(self.optimizer.param_groups), len(self._params())
        for key in ("base_lrs", "decays"):
            if len(state_dict[key]) != groups:
                raise ValueError(
                    f"WarmRestarts: the loaded {key} are of {len(state_dict[key])} groups; the optimizer has {groups}"
                )
        snapshots = [Snapshot(entry["cycle"], entry["time"], entry["weights"]) for entry in state_dict["snapshots"]]
        for snapshot in snapshots:
            if len(snapshot.weights) != num_params:
                raise ValueError(
                    f"WarmRestarts: the loaded snapshot of cycle {snapshot.cycle} is of {len(snapshot.weights)} "
                    f"parameters; the optimizer has {num_params}. Without it: set state_dict['snapshots'] to []."
                )
        schedule = _Schedule(*(state_dict[key] for key in _Schedule._fields)).checked("WarmRestarts: loaded")
        origin = (_meant(state_dict["origin_time"]), state_dict["origin_count"])
        place = schedule.cycles().locate(_elapsed(origin, state_dict["last_epoch"], schedule.per_epoch))
        decay = self._decay_of(place)

        self._use(schedule)
        self._place, self._origin = place, origin
        self._decays = [*state_dict["decays"]]
        self.base_lrs = [*state_dict["base_lrs"]]
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = state_dict["step_count"]
        self._last_lr = [*state_dict["last_lr"]]
        self.snapshots = [s._replace(weights=[weight.cpu() for weight in s.weights]) for s in snapshots]
        self._set_decay(decay)


# --- cycles ----------------------------------------------------------------------------------------------------------


class _Schedule(NamedTuple):
    """The constructor's numbers."""

    first_cycle: float
    cycle_mult: float
    eta_min: float
    steps_per_epoch: int | None
    num_snapshots: int

    def checked(self, where: str) -> _Schedule:
        """The same as plain floats and ints.

        Raises:
            TypeError, ValueError: naming the argument, what it is and what is expected.
        """
        per_epoch = self.steps_per_epoch
        return _Schedule(
            _number(self.first_cycle, f"{where}: first_cycle", "a finite number of epochs > 0", lambda x: x > 0),
            _number(self.cycle_mult, f"{where}: cycle_mult", "a finite number >= 1", lambda x: x >= 1),
            _number(self.eta_min, f"{where}: eta_min", "0 <= eta_min < 1, a share of lr", lambda x: 0 <= x < 1),
            None if per_epoch is None else _whole(per_epoch, f"{where}: steps_per_epoch", least=1),
            _whole(self.num_snapshots, f"{where}: snapshots", least=0),
        )

    @property
    def per_epoch(self) -> int:
        """How many calls of step() an epoch has."""
        return self.steps_per_epoch or 1

    def cycles(self) -> _Cycles:
        """Its cycles, none of them reached yet."""
        return _Cycles(_meant(self.first_cycle), _meant(self.cycle_mult))


class _Place(NamedTuple):
    """A time, and where in which cycle it is; times in epochs."""

    time: Fraction
    cycle: int
    length: Fraction
    position: Fraction

    @property
    def length_in_float(self) -> float:
        return float(min(self.length, Fraction(sys.float_info.max)))  # Fraction's own conversion raises beyond it


class _Cycles:
    """The lengths and beginnings of all cycles, as far as they were needed: a function of two numbers."""

    def __init__(self, first: Fraction, mult: Fraction) -> None:
        self._mult = mult
        self._lengths = [first]
        self._starts = [Fraction(0)]

    def locate(self, time: Fraction) -> _Place:
        """Find the cycle of a time; costs a division, or one addition for each cycle never reached before."""
        if self._mult == 1:
            cycle, position = divmod(time, self._lengths[0])
            return _Place(time, cycle, self._lengths[0], position)
        while time >= (end := _storable(self._starts[-1] + self._lengths[-1])):
            self._starts.append(end)
            self._lengths.append(_storable(self._lengths[-1] * self._mult))
        cycle = bisect.bisect_right(self._starts, time) - 1
        return _Place(time, cycle, self._lengths[cycle], time - self._starts[cycle])


def _elapsed(origin: tuple[Fraction, int], count: int, per_epoch: int) -> Fraction:
    """The time at a count of steps, exactly: from 0, or from a time that step(epoch) was given."""
    return max(origin[0] + Fraction(count - origin[1], per_epoch), Fraction(0))  # SequentialLR takes a first step back


def _storable(value: Fraction) -> Fraction:
    """The value, rounded where it has many digits: exact fractions would grow with every cycle."""
    return value if value.denominator < _EXACT_DENOMINATOR else Fraction(round(value * _RESOLUTION), _RESOLUTION)


def _meant(value: float) -> Fraction:
    """The simple fraction whose nearest float this is, such as 7/100 for 0.07; else the float itself."""
    simple = Fraction(value).limit_denominator(_SIMPLE_DENOMINATOR)
    return simple if float(simple) == value else Fraction(value)


# --- checks ----------------------------------------------------------------------------------------------------------


def _number(value: Any, what: str, expected: str, accepts: Callable[[float], bool]) -> float:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not accepts(value):
        raise ValueError(f"{what} is {value!r}; expected {expected}")
    return float(value)


def _whole(value: Any, what: str, least: int | None = None) -> int:
    expected = "an integer" if least is None else f"an integer >= {least}"
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{what} is {value!r}; expected {expected}")
    number = operator.index(value)
    if least is not None and number < least:
        raise ValueError(f"{what} is {value!r}; expected {expected}")
    return number
