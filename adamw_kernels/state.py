"""What an optimizer keeps of a parameter: which tensors in which formats, and how loaded ones are brought into them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from adamw_kernels.formats import (
    COMMUNICABLE,
    FIRST_SCALE,
    GROUP,
    MIN_8BIT_NUMEL,
    REMAINDER_KEYS,
    compute_dtype,
    ema_dtype,
    moment_dtype,
    param_format,
    remainder_dtype,
)
from adamw_kernels.functional import local_view
from adamw_kernels.options import FORMAT_OPTIONS, FURTHER_OPTIONS, check_update_bound
from adamw_kernels.packing import merge_weight, pack_moments, split_weight, unpack_moments
from adamw_kernels.rules import moment_keys, rule_of
from adamw_kernels.sharding import description, on_one_mesh
from adamw_kernels.tensor_watch import STATE_KEYS, same_layout

# Largest step count, a float32, that the kernels' repeated squaring covers. As a float32 it stops growing at 2^24
# anyway, when the bias corrections have long been 1.
MAX_STEP = 2**31 - 128

BUFFER = "momentum_buffer"
REAL_MOMENTS = ("exp_avg", "exp_avg_sq")
CODES = ("exp_avg_code", "exp_avg_sq_code")
"""What 8-bit moments are kept under: whatever reads REAL_MOMENTS (torch's own AdamW) must not take codes for values."""

OF_8BIT = {
    "exp_avg_code": torch.int8,
    "exp_avg_sq_code": torch.uint8,
    "moment_groups": torch.int16,
    "exp_avg_sq_scale": torch.float32,
}
"""State that 8-bit moments have in place of exp_avg and exp_avg_sq."""

INT16_KEYS = (REMAINDER_KEYS[torch.int16], "moment_groups")
"""State that is saved as bfloat16 of the same bits; see COMMUNICABLE."""

_SAVED_OTHERWISE = frozenset({*INT16_KEYS, *REMAINDER_KEYS.values()})


class Formats(NamedTuple):
    """How one parameter is stored: one of PARAM_FORMATS, one of MOMENT_FORMATS."""

    param: str
    moments: str

    def covers(self, state: dict[str, Any]) -> bool:
        """Whether nothing of another format is left in a state."""
        extra = {key for dtype, key in REMAINDER_KEYS.items() if dtype != remainder_dtype(self.param)}
        extra |= {*(REAL_MOMENTS if self.moments == "8bit" else OF_8BIT)}
        return extra.isdisjoint(state)


def formats_of(p: torch.Tensor, options: dict[str, Any]) -> Formats:
    """The formats that a group's options give this parameter.

    Under "8bit", float32 moments stay with parameters below MIN_8BIT_NUMEL elements and with DTensors whose shards
    would cut a group of neighbours in two: their last dimension, or its shards, is no multiple of GROUP.
    """
    moments = options["moment_format"]
    if moments == "8bit" and (p.numel() < MIN_8BIT_NUMEL or not _has_whole_groups(p)):
        moments = "float32"
    return Formats(param_format(p.dtype, options["param_format"]), moments)


def _has_whole_groups(p: torch.Tensor) -> bool:
    if not hasattr(p, "_local_tensor"):
        return True
    if p.ndim == 0 or p.shape[-1] % GROUP:
        return False
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shard: Any = p
    local = local_view(p)
    *rows, last = local.shape
    groups = (*p.shape[:-1], p.shape[-1] // GROUP)
    shape, _ = compute_local_shape_and_global_offset(groups, shard.device_mesh, shard.placements)
    return local.is_contiguous() and last % GROUP == 0 and tuple(shape) == (*rows, last // GROUP)


def _groups_shape(p: torch.Tensor) -> tuple[int, ...]:
    """Of the words of 8-bit moments: the parameter's own, but for the last dimension, where rows are whole groups.

    So a checkpoint of whole tensors is one of shards, too. Else, or in another layout, 1-D in the order of memory.
    """
    if hasattr(p, "_local_tensor") or (p.ndim and p.shape[-1] % GROUP == 0 and p.is_contiguous()):
        return (*p.shape[:-1], p.shape[-1] // GROUP)
    return (-(-p.numel() // GROUP),)


def _new_groups(p: torch.Tensor) -> torch.Tensor:
    """The words of 8-bit moments' groups: int16; for a DTensor, one sharded as it is."""
    if not hasattr(p, "_local_tensor"):
        return torch.zeros(_groups_shape(p), dtype=torch.int16, device=p.device)
    import torch.distributed.tensor as distributed

    shard: Any = p
    groups: torch.Tensor = distributed.zeros(
        *_groups_shape(p),
        dtype=torch.int16,
        device_mesh=shard.device_mesh,
        placements=shard.placements,
    )
    return groups


def state_dtypes(local: torch.Tensor, formats: Formats, options: dict[str, Any]) -> dict[str, torch.dtype]:
    """Names and dtypes, of the local real memory, of everything that a stepped parameter's state holds."""
    compute = compute_dtype(local.dtype)
    wide = torch.bfloat16 if formats.moments == "bfloat16" else compute
    dtypes = {"step": torch.float32} | dict.fromkeys(moment_keys(options, formats.moments), wide)
    if formats.moments == "8bit":
        dtypes |= OF_8BIT
    if options["ema_decay"] is not None:
        dtypes["param_ema"] = torch.bfloat16 if options["ema_format"] == "bfloat16" else compute
    remainder = remainder_dtype(formats.param)
    return dtypes if remainder is None else dtypes | {REMAINDER_KEYS[remainder]: remainder}


def local_state(state: dict[str, Any]) -> dict[str, Any]:
    """The same state with every tensor as its local, real memory; the user's own entries left out."""
    return {
        key: local_view(value) for key, value in state.items() if key in STATE_KEYS and isinstance(value, torch.Tensor)
    }


def _seen_as(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same memory under a dtype of the same width; of a DTensor, one placed as it is."""
    if not hasattr(value, "_local_tensor"):
        return value.detach().view(dtype)
    from torch.distributed.tensor import DTensor

    shard: Any = value
    return DTensor.from_local(
        local_view(value).detach().view(dtype),
        shard.device_mesh,
        shard.placements,
        run_check=False,
        shape=value.shape,
        stride=value.stride(),
    )


def _of_dtype(state: dict[str, Any], keys: Iterable[str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {key: state[key] for key in keys if getattr(state.get(key), "dtype", None) == dtype}


def packed(state: dict[str, Any], *, is_flat_shard: bool = False) -> dict[str, Any]:
    """A state as it is saved: the same memory, int16 tensors as COMMUNICABLE.

    Beside a shard of FullyShardedDataParallel all of it is float32, which holds the values of every narrower dtype:
    `FullyShardedDataParallel.optim_state_dict` takes one dtype a parameter and no integers.
    """
    if is_flat_shard:
        narrow = {key: state[key] for key in STATE_KEYS if getattr(state.get(key), "ndim", 0)}
        return state | {key: value.float() for key, value in narrow.items() if value.dtype.itemsize < 4}
    found = _of_dtype(state, INT16_KEYS, torch.int16)
    return state | {key: _seen_as(value, COMMUNICABLE) for key, value in found.items()} if found else state


def unpacked(state: dict[str, Any]) -> dict[str, Any]:
    """A state as it is kept, of one that may be as it was saved; itself where there is no difference."""
    if _SAVED_OTHERWISE.isdisjoint(state):
        return state
    found = {key: _seen_as(value, torch.int16) for key, value in _of_dtype(state, INT16_KEYS, COMMUNICABLE).items()}
    for dtype, key in REMAINDER_KEYS.items():
        for value in _of_dtype(state, (key,), torch.float32).values():
            if torch.equal(local_view(value), local_view(value).to(dtype).float()):
                found[key] = value.to(dtype)
    return state | found if found else state


def remainder_in(state: dict[str, Any]) -> torch.Tensor | None:
    """The rest of a weight in a state, in whichever format; None where there is none."""
    return next((state[key] for key in REMAINDER_KEYS.values() if state.get(key) is not None), None)


def forget_remainder(state: dict[str, Any]) -> None:
    """Remove it."""
    for key in REMAINDER_KEYS.values():
        state.pop(key, None)


def moment_format_in(state: dict[str, Any]) -> str | None:
    """The format in which the moments of a state are, whatever the options say; None where there are none.

    A parameter has been stepped, here or where its state comes from, if and only if it has moments; but for SGD without
    momentum, which has none.
    """
    if "exp_avg_code" in state:
        return "8bit"
    first = state.get("exp_avg", state.get(BUFFER))
    if first is None:
        return None
    return "bfloat16" if first.dtype == torch.bfloat16 else "float32"


def real_moments(p: torch.Tensor, state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What the codes of a state mean: exp_avg and exp_avg_sq, new and float32."""
    wide = {key: like(p, torch.float32) for key in REAL_MOMENTS}
    codes = {key: value.to(local_view(p).device) for key, value in local_state(unpacked(state)).items()}
    # The codes' own layout may no longer be the parameter's.
    for target, value in zip(wide.values(), unpack_moments(codes, codes[CODES[0]]), strict=True):
        local_view(target).copy_(value)
    return wide


# --- checks -----------------------------------------------------------------------------------------------------------

_TOGETHER = (
    "Moments in 8 bits are exp_avg_code (int8), exp_avg_sq_code (uint8), moment_groups (int16) and exp_avg_sq_scale "
    "(float32) together."
)


def check_formats(name: str, p: torch.Tensor, group: dict[str, Any]) -> None:
    """Refuse unknown formats, and averages or moments that would be far coarser than their parameter.

    Raises:
        ValueError, TypeError: naming the parameter.
    """
    options = FURTHER_OPTIONS | group
    for key, accepted in FORMAT_OPTIONS.items():
        if options[key] not in accepted and (key != "ema_format" or options["ema_decay"] is not None):
            raise ValueError(f"{key} of {name} is {options[key]!r}; expected one of {', '.join(accepted)}")
    check_update_bound(options["update_bound"], f"update_bound of {name}")
    too_fine = p.dtype == torch.float64 or p.is_complex()
    for key in ("moment_format", "ema_format"):
        if too_fine and options[key] != "float32" and (key == "moment_format" or options["ema_decay"] is not None):
            what = "moments" if key == "moment_format" else "average"
            raise TypeError(
                f"{name} has dtype {p.dtype}, and {key} is {options[key]!r}; expected a float32, bfloat16 or float16 "
                f"parameter beside it. Use {key}='float32', which keeps the {what} in the compute dtype."
            )
    if rule_of(group) == "sgdw" and options["moment_format"] == "8bit":
        raise ValueError(
            f"moment_format of {name} is '8bit', and SGD has no second moment; expected float32 or bfloat16"
        )
    if options.get("amsgrad") and options["moment_format"] != "float32":
        raise ValueError(
            f"amsgrad=True beside moment_format={options['moment_format']!r} for {name}: a running maximum of values "
            "that are rounded by chance only ever grows; expected moment_format='float32', or amsgrad=False"
        )


def check_adoptable(name: str, p: torch.Tensor, local: torch.Tensor, state: dict[str, Any], rule: str) -> None:
    """Refuse a loaded or edited state that cannot be completed without losing something.

    Raises:
        ValueError, TypeError: naming the parameter, what it was, and the way out.
    """
    state = unpacked(state)
    foreign = (*REAL_MOMENTS, *CODES) if rule == "sgdw" else (BUFFER,)
    for key in foreign:
        if state.get(key) is not None:
            raise ValueError(
                f"the state of {name} has {key}, which another optimizer's rule keeps ({rule} is this one's); expected "
                "a state of the same rule. Load the checkpoint into the optimizer that wrote it."
            )
    coded = not state.keys().isdisjoint(CODES)
    if coded and not state.keys().isdisjoint(REAL_MOMENTS):
        both = ", ".join(key for key in (*REAL_MOMENTS, *CODES) if key in state)
        raise ValueError(
            f"the state of {name} has {both}; expected moments as real values or as codes, not both. Delete those that "
            "are out of date; or, if a checkpoint has codes where shards here cannot, or the reverse, save it after "
            "convert(moment_format='float32') and load it in that format."
        )
    if all(state.get(key) is not None for key in REMAINDER_KEYS.values()):
        raise ValueError(
            f"the state of {name} has {' and '.join(REMAINDER_KEYS.values())}; expected one rest of the weight at "
            "most. Delete the one that is out of date."
        )
    needed = ("step", *(CODES if coded else REAL_MOMENTS))
    known = [key for key in needed if key in state]
    if known and len(known) != 3 and rule == "adamw":
        missing = [key for key in needed if key not in state]
        raise ValueError(
            f"the state of {name} has {', '.join(known)} but no {', '.join(missing)}; expected all three or none. "
            "Load a complete state, or delete the entry to start anew."
        )
    for key in STATE_KEYS:
        if isinstance(state.get(key), torch.Tensor) and state[key].device.type == "meta":
            raise ValueError(
                f"{key} of {name} is on the meta device and has no values; expected a tensor that has. Load the state "
                "again without mapping it to meta, or delete the entry to start anew."
            )
        if key not in ("step", "exp_avg_sq_scale") and isinstance(state.get(key), torch.Tensor):
            _check_placement(name, key, p, state[key])
    if "step" in known:
        step = state["step"]
        if isinstance(step, torch.Tensor) and step.numel() != 1:
            raise ValueError(f"step of {name} has shape {tuple(step.shape)}; expected one element.")
        on_device = isinstance(step, torch.Tensor) and step.device == local.device and step.device.type != "cpu"
        if not on_device and not (0 <= float(step) <= MAX_STEP and float(step) == int(step)):
            raise ValueError(f"step of {name} is {float(step)}; expected a whole number from 0 to {MAX_STEP}.")
    if coded:
        _check_codes(name, local, state)
    remainders = {key: dtype for dtype, key in REMAINDER_KEYS.items()}
    for key in (*CODES, *REAL_MOMENTS, BUFFER, "max_exp_avg_sq", "param_ema", *remainders):
        value = state.get(key)
        if value is None:
            continue
        if key in remainders:
            if not isinstance(value, torch.Tensor) or value.dtype != remainders[key]:
                kind = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
                raise TypeError(
                    f"{key} of {name} is {kind}; expected a tensor of {remainders[key]}. If it has been through "
                    "torch's optimizer, which casts it, delete the entry: the weight goes on from its 16-bit value."
                )
        elif key not in CODES:
            if not isinstance(value, torch.Tensor) or not (value.is_floating_point() or value.is_complex()):
                kind = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
                way_out = f" {_TOGETHER}" if key in REAL_MOMENTS else ""
                raise TypeError(f"{key} of {name} is {kind}; expected a floating-point tensor.{way_out}")
            if value.is_complex() != p.is_complex():
                raise TypeError(f"{key} of {name} has dtype {value.dtype} beside a {p.dtype} parameter.")
        if value.layout != torch.strided:
            raise TypeError(
                f"{key} of {name} has layout {value.layout}; expected a strided tensor. Make it dense with "
                "`.to_dense()`."
            )
        view = local_view(value)
        if view.shape != local.shape:
            raise ValueError(
                f"{key} of {name} has shape {tuple(view.shape)}, the parameter {tuple(local.shape)}; expected the same "
                "shape. If the parameter was resized, delete its entry in the optimizer's state."
            )
        if key in CODES and not same_layout(view, local):
            # Neighbours share a group: in another order they would have to be rounded anew.
            raise ValueError(
                f"{key} of {name} has strides {view.stride()}, the parameter {local.stride()}; expected the same "
                "memory layout. convert(moment_format='float32') before the parameter's layout is changed, or load "
                "what export_state_dict() returns (and load_fp32_weights() what fp32_weights() does)."
            )


def _check_placement(name: str, key: str, p: torch.Tensor, value: torch.Tensor) -> None:
    """Refuse a state that is cut otherwise than its parameter: what lies here would belong to other elements.

    Raises:
        ValueError: naming both, and how each is cut.
    """
    placements = getattr(value, "placements", None)
    fits = on_one_mesh(p, value) and placements == getattr(p, "placements", None)
    if fits and (placements is None or key == "moment_groups" or value.shape == p.shape):
        return
    raise ValueError(
        f"{key} of {name} is {description(value)}, the parameter {description(p)}; expected the same shape, placements "
        "and mesh. Load it with torch.distributed.checkpoint, which cuts it anew, or delete the entry to start anew."
    )


def _check_codes(name: str, local: torch.Tensor, state: dict[str, Any]) -> None:
    """Refuse 8-bit codes that do not belong together.

    Raises:
        ValueError, TypeError: naming the parameter.
    """
    for key, dtype in OF_8BIT.items():
        present = getattr(state.get(key), "dtype", None)
        if present != dtype:
            found = "is missing" if present is None else f"has dtype {present}"
            raise TypeError(
                f"{key} of {name} {found}; expected {dtype}. {_TOGETHER} Load a complete state, or delete the entry to "
                "start anew."
            )
    groups = -(-local.numel() // GROUP)
    for key, numel in (("moment_groups", groups), ("exp_avg_sq_scale", 1)):
        here = local_view(state[key]).numel()
        if here != numel:
            raise ValueError(
                f"{key} of {name} has {here} elements; expected {numel} beside {local.numel()} "
                "elements of the parameter. A state of 8-bit moments must be loaded into the same shards."
            )


# --- completing -------------------------------------------------------------------------------------------------------


def complete_state(
    name: str, p: torch.Tensor, state: dict[str, Any], options: dict[str, Any], steps_seen: set[int]
) -> None:
    """Create what is missing in a parameter's state and bring the rest into the form that kernels read.

    Loaded steps may be numbers or tensors of any dtype, shape or device; loaded moments may have another format, dtype,
    device or layout. Nothing is narrowed but what the options' formats ask for, and float64 moments that a narrower
    model inherited. What `check_adoptable` refuses must not come here.
    """
    local = local_view(p)
    _unpack(state)
    if "step" not in state:
        # torch's SGD does not count: its buffer has received one gradient at least.
        taken = 0.0 if state.get(BUFFER) is None else 1.0
        state["step"] = torch.full((), taken, dtype=torch.float32, device=local.device)
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

    formats = formats_of(p, options)
    _complete_moments(name, p, state, options, formats.moments)
    complete_remainder(name, p, state, remainder_dtype(formats.param))
    if options["ema_decay"] is not None:
        _complete_average(p, state, options)


def _unpack(state: dict[str, Any]) -> None:
    kept = unpacked(state)
    if kept is not state:
        state.update(kept)


def like(p: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Zeros of the shape, device, sharding and layout of `p`."""
    return torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)


def placed(value: torch.Tensor, p: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`value` itself or, where device, dtype or layout are others, a copy as the kernels want it."""
    value = value.to(device=p.device, dtype=dtype)
    return value if same_layout(local_view(value), local_view(p)) else like(p, dtype).copy_(value)


def _replace(state: dict[str, Any], key: str, value: torch.Tensor) -> None:
    if value is not state.get(key):
        state[key] = value


def _complete_moments(name: str, p: torch.Tensor, state: dict[str, Any], options: dict[str, Any], wanted: str) -> None:
    present = moment_format_in(state)
    if present == "8bit" and wanted == "8bit":
        for key in CODES:
            _replace(state, key, state[key].to(p.device))
        device = local_view(p).device
        words = state["moment_groups"].to(device)
        if words.shape != _groups_shape(p):
            words = words.reshape(_groups_shape(p))
        _replace(state, "moment_groups", words)
        _replace(state, "exp_avg_sq_scale", state["exp_avg_sq_scale"].to(device).reshape(()))
        return
    if present == "8bit":
        state.update(real_moments(p, state))
    for key in OF_8BIT:
        state.pop(key, None)
    if wanted == "8bit":
        codes: dict[str, Any] = {key: like(p, OF_8BIT[key]) for key in CODES}
        codes["moment_groups"] = _new_groups(p)
        codes["exp_avg_sq_scale"] = torch.full((), FIRST_SCALE, dtype=torch.float32, device=local_view(p).device)
        if present is not None:
            m, v = (local_view(placed(state[key], p, torch.float32)) for key in REAL_MOMENTS)
            pack_moments(m, v, local_state(codes))
        state.update(codes)
        for key in REAL_MOMENTS:
            state.pop(key, None)
        return
    dtype = torch.bfloat16 if wanted == "bfloat16" else moment_dtype(p.dtype)
    for key in moment_keys(options, wanted):
        if state.get(key) is None:
            state[key] = like(p, dtype)
            continue
        if state[key].dtype == torch.float64 and dtype != torch.float64 and p.dtype != torch.float64:
            warnings.warn(
                f"{key} of {name} is float64 and its parameter {p.dtype}: it is rounded to {dtype}", stacklevel=2
            )
        _replace(state, key, placed(state[key], p, dtype))


def complete_remainder(name: str, p: torch.Tensor, state: dict[str, Any], wanted: torch.dtype | None) -> None:
    """A new remainder is 0: the weight is what it is. One in the other format is converted together with its weight."""
    _unpack(state)
    present = remainder_in(state)
    if present is None and wanted is None:
        return
    if wanted is None:
        if p.dtype not in (torch.bfloat16, torch.float16):
            drop_remainder(name, p, state)
        forget_remainder(state)
        return
    key = REMAINDER_KEYS[wanted]
    if present is None:
        state[key] = like(p, wanted)
        return
    present = placed(present, p, present.dtype)
    if present.dtype != wanted:
        local = local_view(p)
        values = merge_weight(local, local_view(present))
        present = like(p, wanted)
        split_weight(values, local, local_view(present))
        forget_remainder(state)
    _replace(state, key, present)


def drop_remainder(name: str, p: torch.Tensor, state: dict[str, Any]) -> None:
    """Forget the rest of a weight whose dtype has changed since."""
    warnings.warn(
        f"{name} is {p.dtype} now and its param_remainder, the rest of a 16-bit weight, is dropped: the cast did not "
        "know of it. Take fp32_weights() before changing a model's dtype.",
        stacklevel=2,
    )
    forget_remainder(state)


def _complete_average(p: torch.Tensor, state: dict[str, Any], options: dict[str, Any]) -> None:
    """A new average starts at the weight before this step's update."""
    dtype = ema_dtype(p.dtype, options["ema_format"])
    if "param_ema" in state:
        _replace(state, "param_ema", placed(state["param_ema"], p, dtype))
        return
    ema = state["param_ema"] = torch.empty_like(p, dtype=dtype, memory_format=torch.preserve_format)
    remainder = remainder_in(state)
    if remainder is None:
        ema.copy_(p)
    else:
        local_view(ema).copy_(merge_weight(local_view(p), local_view(remainder)))
