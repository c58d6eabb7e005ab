"""Split weights and 8-bit moments in plain torch: what checkpoints, conversions and evaluation need, on any device.

The kernels' own spellings are `csrc/formats.h` and `csrc/moments8.h`, where the formats are described; reading gives
the same values. What is written here is rounded to nearest, once: a conversion is not repeated step after step, where
it would need chance. Elements are in the order of memory throughout.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from adamw_kernels.formats import FIRST_SCALE, GROUP

_SLICE = 1 << 20  # elements at a time: temporaries stay small beside any state

# Bits of a split weight's magnitude below the 16-bit weight; the magnitude of infinity and the largest finite one.
_SPLIT = {torch.bfloat16: (16, 0x7F800000, 0x7F7FFFFF), torch.float16: (13, 0x0F800000, 0x0F7FEFFF)}


def in_memory_order(tensor: torch.Tensor) -> torch.Tensor:
    """A dense tensor's elements as a 1-D view."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _slices(numel: int) -> Iterator[slice]:
    return (slice(begin, min(begin + _SLICE, numel)) for begin in range(0, numel, _SLICE))


def _bits(x: torch.Tensor) -> torch.Tensor:
    """float32 -> its bits as non-negative int64."""
    return x.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF


def _floats(bits: torch.Tensor) -> torch.Tensor:
    """Bits as int64 -> float32."""
    return bits.to(torch.int32).view(torch.float32)


# --- weights ----------------------------------------------------------------------------------------------------------


def merge_weight(weight: torch.Tensor, remainder: torch.Tensor | None) -> torch.Tensor:
    """The float32 values of 16-bit weights and their remainders; of any weights, where there is none.

    Args:
        weight: dense, local.
        remainder: int8 (split24) or int16 (split32), in the layout of `weight`, or None.

    Returns:
        A new float32 tensor in the layout of `weight`.
    """
    merged = torch.empty_like(weight, dtype=torch.float32, memory_format=torch.preserve_format)
    if remainder is None or weight.dtype not in _SPLIT:
        return merged.copy_(weight)
    low, infinity, _ = _SPLIT[weight.dtype]
    shift = low - 8 if remainder.dtype == torch.int8 else 0
    p, r, out = in_memory_order(weight), in_memory_order(remainder), in_memory_order(merged)
    for part in _slices(p.numel()):
        stored = p[part].view(torch.int16).to(torch.int64) & 0xFFFF
        magnitude = (((stored & 0x7FFF) << low) + (r[part].to(torch.int64) << shift)).clamp_(min=0)
        if low == 13:
            finite = _bits(_floats(magnitude) * 2.0**112)
            magnitude = torch.where(magnitude >= infinity, magnitude | 0x7F800000, finite)
        out[part] = _floats(magnitude | (stored & 0x8000) << 16)
    return merged


def split_weight(values: torch.Tensor, weight: torch.Tensor, remainder: torch.Tensor | None) -> None:
    """Write float32 values into 16-bit weights and their remainders; round to nearest where there is none.

    Args:
        values: float32, in the layout of `weight`.
        weight: dense, local; written.
        remainder: int8 (split24), int16 (split32), or None; written.
    """
    if remainder is None or weight.dtype not in _SPLIT:
        weight.copy_(values)
        return
    low, infinity, largest = _SPLIT[weight.dtype]
    kept = 8 if remainder.dtype == torch.int8 else low
    x, p, r = in_memory_order(values), in_memory_order(weight), in_memory_order(remainder)
    for part in _slices(p.numel()):
        bits = _bits(x[part])
        a = bits & 0x7FFFFFFF
        magnitude = a if low == 16 else _bits(_floats(a) * 2.0**-112)
        half = (1 << (low - kept)) >> 1
        magnitude = torch.where(a < 0x7F800000, (magnitude + half).clamp_(max=largest), infinity) >> (low - kept)
        upper = (magnitude + (1 << (kept - 1))) >> kept
        nan = a > 0x7F800000
        r[part] = torch.where(nan, 0, magnitude - (upper << kept)).to(remainder.dtype)
        stored = torch.where(nan, 0x7FC0 if low == 16 else 0x7E00, upper) | (bits >> 16) & 0x8000
        p[part] = stored.to(torch.int16).view(weight.dtype)


# --- moments in 8 bits ------------------------------------------------------------------------------------------------

_ONE_127TH = float(np.float32(1) / np.float32(127))
_STEPS_OF_ODD = float(np.float32(127) * (np.float32(8) / np.float32(9)))
_CODES_AN_OCTAVE = (254, 127, 84, 63, 50, 42, 36, 31, 25, 21, 18, 15, 12, 10, 9, 7)  # of each mode
_SHIFTS = (8, 7, 7, 6, 6, 6, 6, 5, 5, 5, 5, 4, 4, 4, 4, 3)


def _of_mode(values: tuple[int, ...], mode: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, device=mode.device)[mode]


def _second_bits(code: torch.Tensor, e: torch.Tensor, mode: torch.Tensor) -> torch.Tensor:
    """Of codes of v, [groups, GROUP]: the bits of x, 0 for code 0."""
    n, shift = _of_mode(_CODES_AN_OCTAVE, mode), _of_mode(_SHIFTS, mode)
    spacing = ((1 << (23 + shift)) + n - 1) // n
    return torch.where(code > 0, (e << 23) + (((code - 1) * spacing) >> shift), 0)


def _reference(code: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Of codes of v and their bits of x: s, in multiples of which m is held; 0 for code 0."""
    half_octave = (bits >> 23) + 127
    return _floats(torch.where(code > 0, (half_octave << 22) - (half_octave & 1) * 0x155555, 0))


def _in_groups(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, -x.numel() % GROUP)).view(-1, GROUP)


def unpack_moments(state: dict[str, Any], param: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First and second moment of a parameter whose moments are kept in 8 bits.

    Args:
        state: its state, of local tensors: exp_avg_code, exp_avg_sq_code, moment_groups, exp_avg_sq_scale.
        param: the local parameter, for its layout.

    Returns:
        (m, v): new float32 tensors in the layout of `param`, as the next step reads them.
    """
    m, v = (torch.empty_like(param, dtype=torch.float32, memory_format=torch.preserve_format) for _ in range(2))
    first, second, words = (
        in_memory_order(state["exp_avg_code"]),
        in_memory_order(state["exp_avg_sq_code"]),
        in_memory_order(state["moment_groups"]),
    )
    unscale = (1.0 / state["exp_avg_sq_scale"].double()).float()
    flat_m, flat_v = in_memory_order(m), in_memory_order(v)
    for part in _slices(param.numel()):
        count = part.stop - part.start
        word = (words[part.start // GROUP : -(-part.stop // GROUP)].to(torch.int64) & 0xFFFF).unsqueeze(1)
        e, mode, j = word >> 8, (word >> 4) & 15, word & 15
        second_code = _in_groups(second[part].to(torch.int64))
        bits = _second_bits(second_code, e, mode)
        code = _in_groups(first[part].to(torch.int64))
        step = _floats((240 - j) << 22) * _ONE_127TH
        flat_v[part] = (_floats(bits) * unscale).view(-1)[:count]
        flat_m[part] = torch.where(code == -128, torch.nan, code.float() * (_reference(second_code, bits) * step)).view(
            -1
        )[:count]
    return m, v


def pack_moments(m: torch.Tensor, v: torch.Tensor, state: dict[str, Any]) -> None:
    """Write moments as 8-bit codes, to nearest, under the scale of a new tensor.

    Args:
        m: first moment: float32, dense, local.
        v: second moment, likewise, in the layout of `m`.
        state: of local tensors exp_avg_code (int8), exp_avg_sq_code (uint8), both in the layout of `m`, moment_groups
            (int16) and exp_avg_sq_scale (float32 scalar); all written.
    """
    state["exp_avg_sq_scale"].fill_(FIRST_SCALE)
    first, second, words = (
        in_memory_order(state["exp_avg_code"]),
        in_memory_order(state["exp_avg_sq_code"]),
        in_memory_order(state["moment_groups"]),
    )
    flat_m, flat_v = in_memory_order(m), in_memory_order(v)
    for part in _slices(m.numel()):
        count = part.stop - part.start
        moment = _in_groups(flat_m[part])
        bits = _bits(_in_groups(flat_v[part]) * FIRST_SCALE)
        not_finite = (bits >= 254 << 23) | ~moment.isfinite()
        bits = torch.where(not_finite, 0, bits)
        largest = bits.amax(1, keepdim=True)
        bits = torch.where((moment == 0) & (bits < (largest - (16 << 23)).clamp(min=0)), 0, bits)
        smallest = torch.where(bits == 0, 1 << 32, bits).amin(1, keepdim=True)
        smallest = torch.where(largest == 0, 0, smallest)
        beyond = (largest >> 23) - (smallest >> 23)
        mode = torch.where(beyond < 4, beyond, ((_bits(beyond.float()) >> 21) - 512).clamp(max=15))
        octaves = torch.where(mode < 4, mode + 1, (5 + (mode & 3)) << ((mode >> 2) - 1).clamp(min=0))
        e = torch.maximum(smallest >> 23, (largest >> 23) + 1 - octaves)
        n = _of_mode(_CODES_AN_OCTAVE, mode)
        q = ((bits >> 23) - e) * n + (((bits & 0x7FFFFF) * n + 0x400000) >> 23)  # as chance that is one half
        code = torch.where(bits > 0, q.clamp(0, 254) + 1, 0)
        octave = (code - 1).clamp(min=0) // n
        inverse = torch.where(code > 0, _floats((381 - e - octave) << 22), 0.0)
        ratio = torch.where(not_finite, 0.0, moment * inverse)
        j = (240 - ((_bits(ratio.abs().amax(1, keepdim=True)) + 0x3FFFFF) >> 22)).clamp(0, 15)
        half_octave = 240 - j
        steps = _floats((508 - half_octave) << 22) * torch.where((half_octave & 1) != 0, _STEPS_OF_ODD, 127.0)
        z = (ratio * steps).clamp(-127.0, 127.0)
        first_code = torch.where(not_finite, -128, (z + 128.5).to(torch.int64) - 128)
        second[part] = code.view(-1)[:count].to(torch.uint8)
        first[part] = first_code.view(-1)[:count].to(torch.int8)
        words[part.start // GROUP : -(-part.stop // GROUP)] = (e << 8 | mode << 4 | j).view(-1).to(torch.int16)
