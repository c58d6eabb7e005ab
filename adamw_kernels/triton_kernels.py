"""The Triton kernel of the update, and the launchers of all of them.

The update rule is the twin of `csrc/rule.h`: the same IEEE-754 operations in the same order. Every kernel is compiled
with `enable_fp_fusion=False`; division and root are the round-to-nearest ones.

Source: Loshchilov & Hutter, Decoupled Weight Decay Regularization (2019), Algorithms 1 and 2.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import triton
import triton.language as tl

from adamw_kernels import control, hyperparameters
from adamw_kernels import launch_table as layout
from adamw_kernels.formats import GROUP, MOMENT_FORMATS, PARAM_FORMATS, compute_dtype
from adamw_kernels.launch_table import LaunchTable
from adamw_kernels.triton_formats import (
    bits_for_average,
    bits_for_first_moment,
    bits_for_second_moment,
    bits_for_weight,
    from_int8,
    from_storage,
    merge_weight,
    random_words,
    split_weight,
    to_bfloat16_stochastic,
    to_storage,
    to_storage_stochastic,
)
from adamw_kernels.triton_moments8 import decode_moments, encode_moments
from adamw_kernels.triton_norm import decide_kernel, measure_kernel, sum_up_kernel
from adamw_kernels.triton_prepare import prepare_kernel

# --- element math: the rule -----------------------------------------------------------------------------------------


@triton.jit
def _divide(a, b):
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def _square_root(x):
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def _moments(p, grad, m, v, w1, w2, scale, l2, has_l2):
    """The first half of the update: gradient and moments. `has_l2` is the same for the whole tensor."""
    g = scale * grad
    g = tl.where(has_l2, g + l2 * p, g)
    m = m + w1 * (g - m)
    v = v + w2 * (g * g - v)
    return g, m, v


@triton.jit
def _bounded(u, bound):
    """The update within +-bound; a NaN passes."""
    u = tl.where(u > bound, bound, u)
    lower = bound * -1.0  # Triton's minus is a subtraction from 0, which has no -0
    return tl.where(u < lower, lower, u)


@triton.jit
def _weight(p, g, m, s, step_size, inv_sqrt_bc2, decay, eps, bound, flags, BOUNDED: tl.constexpr):
    """The second half: the weight, from the first moment and the second moment or its running maximum.

    BOUNDED: whether to apply the bound, which may be infinite, without a look at the tensor's flags.
    """
    d = _square_root(s) * inv_sqrt_bc2 + eps
    u = _divide(step_size * m, d)
    if BOUNDED:
        u = _bounded(u, bound)
    r = decay * p
    if (flags & (48 if BOUNDED else 0x40030)) != 0:  # the same for the whole tensor
        if not BOUNDED:
            u = _bounded(u, bound)
        u = tl.where(((flags & 16) != 0) & (((m > 0) & (g <= 0)) | ((m < 0) & (g >= 0))), 0.0, u)
        r = tl.where(((flags & 32) != 0) & (((u > 0) & (p < 0)) | ((u < 0) & (p > 0))), 0.0, r)
    return p - (r + u)


@triton.jit
def _sgdw(p, grad, m, w1, momentum, step_size, decay, scale, l2, flags):
    """SGD's whole update: the weight and the momentum buffer. `flags` are the same for the whole tensor."""
    g = scale * grad
    g = tl.where((flags & 4) != 0, g + l2 * p, g)
    entering = w1 * g
    m = momentum * m + entering
    direction = tl.where((flags & 0x4000000) != 0, entering + momentum * m, m)
    u = step_size * direction
    r = decay * p
    return p - (r + u), m


@triton.jit
def _moving_average(ema, current, weight_of_new):
    """The exponential moving average of the weight as it is remembered."""
    return ema + weight_of_new * (current - ema)


# --- index mapping --------------------------------------------------------------------------------------------------


@triton.jit
def _pointer(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """An int64 address as a pointer, declared as aligned to this many elements."""
    pointer = address.to(tl.pointer_type(DTYPE))
    return tl.multiple_of(pointer, ALIGNED * DTYPE.primitive_bitwidth // 8)


@triton.jit
def _zeros_in_layout_of(like):
    """Zeros, int32, in the same threads as a loaded tensor.

    What does not come out of memory, such as random bits, Triton would compute in a layout of its own choice and hand
    to other threads through shared memory. What begins with these zeros is computed where it is needed; that they are
    zeros only LLVM sees, when the layouts are settled.
    """
    BITS: tl.constexpr = like.dtype.primitive_bitwidth
    UNSIGNED: tl.constexpr = tl.uint8 if BITS == 8 else tl.uint16 if BITS == 16 else tl.uint32
    return (like.to(UNSIGNED, bitcast=True).to(tl.uint64) >> BITS).to(tl.int32)


@triton.jit
def _load_weight(p, remainder, offsets, mask, flags, PARAM: tl.constexpr, COMPUTE: tl.constexpr, ALIGNED: tl.constexpr):
    """The weight as it is stored, and as it is remembered."""
    stored = tl.load(_pointer(p, PARAM, ALIGNED) + offsets, mask=mask)
    weight = from_storage(stored, COMPUTE)
    if PARAM.primitive_bitwidth == 16:
        if (flags & 0x200000) != 0:  # split; the same for the whole tensor, as all of `flags`
            if (flags & 0x100000) != 0:
                rest = tl.load(_pointer(remainder, tl.int16, ALIGNED) + offsets, mask=mask).to(tl.int32)
            else:
                rest = from_int8(tl.load(_pointer(remainder, tl.int8, ALIGNED) + offsets, mask=mask), PARAM)
            weight = merge_weight(stored, rest)
    return stored, weight


@triton.jit
def _store_weight(p, remainder, offsets, mask, flags, weight, random, PARAM: tl.constexpr, ALIGNED: tl.constexpr):
    """Store the weight; what is stored in 16 bits, and what is remembered of the rest."""
    BITS: tl.constexpr = 16 if PARAM == tl.bfloat16 else 13
    rest = tl.full(weight.shape, 0, tl.int32)
    if (flags & 0x200000) != 0:
        if (flags & 0x100000) != 0:
            stored, rest = split_weight(weight, random, PARAM, BITS)
            tl.store(_pointer(remainder, tl.int16, ALIGNED) + offsets, rest.to(tl.int16), mask=mask)
        else:
            stored, rest = split_weight(weight, random, PARAM, 8)
            tl.store(_pointer(remainder, tl.int8, ALIGNED) + offsets, rest.to(tl.int8), mask=mask)
            rest = from_int8(rest.to(tl.int8), PARAM)
    else:
        if (flags & 0x100000) != 0:
            stored = to_storage_stochastic(weight, random, PARAM)
        else:
            stored = to_storage(weight, PARAM)
    tl.store(_pointer(p, PARAM, ALIGNED) + offsets, stored, mask=mask)
    return stored, rest


@triton.jit
def _average_block(ema, offsets, mask, current, weight_of_new, DTYPE: tl.constexpr, random, ALIGNED: tl.constexpr):
    """Load, update, store the moving average of one block, whose weights now are `current`."""
    ema = _pointer(ema, DTYPE, ALIGNED) + offsets
    average = _moving_average(from_storage(tl.load(ema, mask=mask), current.dtype), current, weight_of_new)
    if DTYPE == tl.bfloat16:
        tl.store(ema, to_bfloat16_stochastic(average, random), mask=mask)
    else:
        tl.store(ema, average, mask=mask)


@triton.jit
def _update_block(
    at,  # addresses of the operands
    element,  # int64 index, in the whole tensor, of offset 0
    start,
    stop,
    c,  # the tensor's coefficients
    key,
    flags,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    COMPUTE: tl.constexpr,
    MOMENTS: tl.constexpr,
    SGD: tl.constexpr,
    ALIGNED: tl.constexpr,  # elements to which all operands are aligned
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Load, update, store offsets [start, start + BLOCK); if MASKED, those below `stop`."""
    p, g, m, v, v_max, ema, remainder, groups = at
    w1, w2, step_size, inv_sqrt_bc2, decay, eps, scale, l2, weight_of_new, bound, unscale, rescale = c
    if MOMENTS == 2:  # a row a group
        row = tl.arange(0, BLOCK // 16)[:, None]
        within = row * 16 + tl.arange(0, 16)[None, :]
        row = row.to(tl.int64)
        groups = _pointer(groups, tl.uint16, 1) + start // 16 + row
        group_mask = start + row * 16 < stop if MASKED else None
    else:
        within = tl.arange(0, BLOCK)
    offsets = start + within.to(tl.int64)
    mask = offsets < stop if MASKED else None

    stored, weight = _load_weight(p, remainder, offsets, mask, flags, PARAM, COMPUTE, ALIGNED)
    grad = from_storage(tl.load(_pointer(g, GRAD, ALIGNED) + offsets, mask=mask), COMPUTE)
    MOMENT: tl.constexpr = COMPUTE if MOMENTS == 0 else tl.bfloat16 if MOMENTS == 1 else tl.int8
    m = _pointer(m, MOMENT, ALIGNED) + offsets
    if SGD:
        first = tl.zeros(weight.shape, COMPUTE)
        if (flags & 0x2000000) != 0:
            first = from_storage(tl.load(m, mask=mask), COMPUTE)
        weight, first = _sgdw(weight, grad, first, w1, w2, step_size, decay, scale, l2, flags)
        if MOMENTS == 0:
            if (flags & 0x2000000) != 0:
                tl.store(m, first, mask=mask)
    else:
        v = _pointer(v, tl.uint8 if MOMENTS == 2 else MOMENT, ALIGNED) + offsets
        first = tl.load(m, mask=mask)
        second = tl.load(v, mask=mask)
        if MOMENTS == 2:
            first, second = decode_moments(first, second, tl.load(groups, mask=group_mask), unscale)
            before = first
        else:
            first = from_storage(first, COMPUTE)
            second = from_storage(second, COMPUTE)
        grad, first, second = _moments(weight, grad, first, second, w1, w2, scale, l2, (flags & 4) != 0)
        largest = second
        if MOMENTS == 0:
            # Stored at once: the second moment need not stay in registers beside its maximum.
            tl.store(m, first, mask=mask)
            tl.store(v, second, mask=mask)
            if (flags & 1) != 0:
                maximum_at = _pointer(v_max, COMPUTE, ALIGNED) + offsets
                maximum = tl.load(maximum_at, mask=mask)
                largest = tl.where((second > maximum) | (second != second), second, maximum)
                tl.store(maximum_at, largest, mask=mask)
        weight = _weight(
            weight, grad, first, largest, step_size, inv_sqrt_bc2, decay, eps, bound, flags, BOUNDED=MOMENTS != 0
        )

    random = tl.full(offsets.shape, 0, tl.uint32)
    if MOMENTS != 0:
        random = random_words(key, element + start, within + _zeros_in_layout_of(stored))
    elif PARAM.primitive_bitwidth == 16:
        # A bfloat16 average, stochastic or split24.
        if ((flags & 0x10000) != 0) | (((flags & 0x300000) != 0) & ((flags & 0x300000) != 0x300000)):
            random = random_words(key, element + start, within + _zeros_in_layout_of(stored))
    if PARAM.primitive_bitwidth == 16:
        for_weight = bits_for_weight(random)
        stored, rest = _store_weight(p, remainder, offsets, mask, flags, weight, for_weight, PARAM, ALIGNED)
    else:
        tl.store(_pointer(p, PARAM, ALIGNED) + offsets, weight, mask=mask)

    if MOMENTS == 1:
        if SGD:
            if (flags & 0x2000000) != 0:
                tl.store(m, to_bfloat16_stochastic(first, bits_for_first_moment(random)), mask=mask)
        else:
            tl.store(m, to_bfloat16_stochastic(first, bits_for_first_moment(random)), mask=mask)
            tl.store(v, to_bfloat16_stochastic(second, bits_for_second_moment(random)), mask=mask)
    elif MOMENTS == 2:
        if MASKED:  # what is not there takes part in nothing
            first = tl.where(mask, first, 0.0)
            second = tl.where(mask, second, 0.0)
        first_code, second_code, word = encode_moments(first, second, before, rescale, random)
        tl.store(m, first_code, mask=mask)
        tl.store(v, second_code, mask=mask)
        tl.store(groups, word, mask=group_mask)

    if (flags & 128) != 0:
        current = weight
        if PARAM.primitive_bitwidth == 16:
            current = merge_weight(stored, rest)
        if COMPUTE == tl.float64:  # beside which no average is bfloat16
            _average_block(ema, offsets, mask, current, weight_of_new, COMPUTE, random, ALIGNED)
        elif (flags & 0x10000) != 0:
            if MOMENTS == 0 and PARAM == tl.float32:  # here alone: kept in registers from above, they make it spill
                random = random_words(key, element + start, within + _zeros_in_layout_of(stored))
            random = bits_for_average(random)
            _average_block(ema, offsets, mask, current, weight_of_new, tl.bfloat16, random, ALIGNED)
        else:
            _average_block(ema, offsets, mask, current, weight_of_new, COMPUTE, random, ALIGNED)


@triton.jit(do_not_specialize=["first_chunk"])
def update_kernel(
    rows,
    grads,
    coefficients,
    chunks,
    decision,
    first_chunk,  # of this batch: program 0's
    chunk_size,  # elements
    PARAM: tl.constexpr,  # storage dtype of the parameter
    GRAD: tl.constexpr,  # storage dtype of the gradient
    COMPUTE: tl.constexpr,  # dtype of the arithmetic
    MOMENTS: tl.constexpr,  # 0: of the compute dtype, 1: bfloat16, 2: 8 bits
    SGD: tl.constexpr,  # the rule is SGD's, else Adam's
    PARAM_BYTES: tl.constexpr,
    GRAD_BYTES: tl.constexpr,
    COMPUTE_BYTES: tl.constexpr,
    MOMENT_BYTES: tl.constexpr,
    VECTOR: tl.constexpr,  # elements a thread loads and stores at once
    BLOCK: tl.constexpr,  # elements a program holds at a time
    MASKED_BLOCK: tl.constexpr,  # the same where elements are masked
):
    """Update one chunk a program, unless the step is skipped.

    Chunk boundaries are moved down by the number of elements by which all operands sit past a 16-byte boundary, so
    that full blocks are loaded and stored VECTOR elements at a time; only the blocks at a tensor's ends are masked.
    Operands that do not sit alike are masked throughout. Moments of 8 bits keep their groups together: there no
    boundary is moved, and operands must begin on one.

    Every operand is declared as aligned to VECTOR elements, not to 16 bytes. Told of 16 bytes, Triton would load more
    elements a thread of narrower ones, and hand them to other threads through shared memory before it stores others.
    """
    chunk = tl.load(chunks + first_chunk + tl.program_id(0))
    tensor = chunk >> 32
    index = chunk & 0xFFFFFFFF
    g = tl.load(grads + tensor)
    if (g != 0) & (tl.load(decision) == 0):
        row = rows + tensor * 16
        p = tl.load(row)
        m = tl.load(row + 1)
        v = m if SGD else tl.load(row + 2)
        numel = tl.load(row + 5)
        flags = tl.load(row + 7)
        ema = tl.load(row + 8)
        first_element = tl.load(row + 14)
        c_row = coefficients.to(tl.pointer_type(COMPUTE)) + tensor * (128 // COMPUTE_BYTES)
        c = (
            tl.load(c_row),
            tl.load(c_row + 1),
            tl.load(c_row + 2),
            tl.load(c_row + 3),
            tl.load(c_row + 4),
            tl.load(c_row + 5),
            tl.load(c_row + 6),
            tl.load(c_row + 7),
            tl.load(c_row + 8),
            tl.load(c_row + 9),
            tl.load(c_row + 10),
            tl.load(c_row + 11),
        )
        key = tl.load(coefficients + tensor * 16 + 15).to(tl.uint64, bitcast=True)

        past = (p & 15) // PARAM_BYTES
        if MOMENTS == 2:
            past = past * 0  # groups begin with the tensor
        p -= past * PARAM_BYTES
        g -= past * GRAD_BYTES
        if SGD:  # 0 without momentum
            m = tl.where((flags & 0x2000000) != 0, m - past * MOMENT_BYTES, 0)
            v = m
        else:
            m -= past * MOMENT_BYTES
            v -= past * MOMENT_BYTES
        misaligned = (p & (VECTOR * PARAM_BYTES - 1)) | (g & (VECTOR * GRAD_BYTES - 1))
        misaligned |= (m | v) & (VECTOR * MOMENT_BYTES - 1)
        v_max = v
        if MOMENTS == 0 and not SGD:
            v_max = tl.where((flags & 1) != 0, tl.load(row + 3) - past * COMPUTE_BYTES, 0)
            misaligned |= v_max & (VECTOR * COMPUTE_BYTES - 1)
        ema_bytes = tl.where((flags & 0x10000) != 0, 2, COMPUTE_BYTES)
        ema = tl.where((flags & 128) != 0, ema - past * ema_bytes, 0)
        misaligned |= ema & (VECTOR * ema_bytes - 1)
        remainder = p
        groups = p
        if PARAM_BYTES == 2:
            remainder_bytes = tl.where((flags & 0x100000) != 0, 2, 1)
            remainder = tl.where((flags & 0x200000) != 0, tl.load(row + 11) - past * remainder_bytes, 0)
            misaligned |= remainder & (VECTOR * remainder_bytes - 1)
        if MOMENTS == 2:
            groups = tl.load(row + 12)
        at = (p, g, m, v, v_max, ema, remainder, groups)
        element = first_element - past

        # In elements from the addresses just moved: the tensor is [past, past + numel).
        begin = index * chunk_size
        end = tl.where(begin + chunk_size >= numel, past + numel, begin + chunk_size)
        # Hoisted out of the loop, what is cheap to compute again takes some 20 registers a thread.
        for start in tl.range(begin, end, BLOCK, disable_licm=True):
            if (misaligned == 0) & (start >= past) & (start + BLOCK <= end):
                start = tl.multiple_of(start, 16)  # chunk sizes are multiples of 16 elements
                _update_block(
                    at, element, start, end, c, key, flags, PARAM, GRAD, COMPUTE, MOMENTS, SGD, VECTOR, BLOCK, False
                )
            else:
                stop = tl.minimum(start + BLOCK, end)
                for masked in tl.range(tl.maximum(start, past), stop, MASKED_BLOCK, disable_licm=True):
                    _update_block(
                        *(at, element, masked, stop, c, key, flags),
                        *(PARAM, GRAD, COMPUTE, MOMENTS, SGD, 1, MASKED_BLOCK, True),
                    )


# --- launchers --------------------------------------------------------------------------------------------------------

PREPARE_BLOCK = 128
UPDATE_BLOCK = 1024  # 8 elements a thread, in two accesses; half as many in float64
UPDATE_WARPS = 4
# A masked element needs an address and a mask of its own. Masking a whole block, a half or a quarter of it at a time
# takes 212, 112 or 83 registers (bfloat16, sm_90), 246, 138 or 123 with moments in 8 bits.
MASKED_SHARE = 4

_TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}

# Contraction off: with it, the bits would differ from the CPU's. Always said, because Triton's default is changing.
COMPILE_OPTIONS = {"enable_fp_fusion": False}


def update_options(
    param_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    moment_format: str,
    rule: str = "adamw",
    *,
    interpreted: bool = False,
) -> dict[str, Any]:
    """The constexpr arguments of `update_kernel` for what one launch shares, and its number of warps."""
    compute = compute_dtype(param_dtype)
    moments = MOMENT_FORMATS.index(moment_format)
    moment_bytes = (compute.itemsize, 2, 1)[moments]
    vector = 16 // max(param_dtype.itemsize, moment_bytes)
    if moments == 0 or interpreted:  # the interpreter takes as long for a small block as for a large one
        warps, block = UPDATE_WARPS, UPDATE_BLOCK * torch.float32.itemsize // compute.itemsize
    else:
        # One access a thread: two would take the kernel of 8 bits from 88 to 150 registers (float32, sm_90). One warp,
        # within which Triton moves values by shuffles; between several it would take shared memory and barriers. AMD's
        # warps of 64 so make accesses of half the width, and need 86 registers instead of 133.
        warps, block = 1, vector * 32
    return {
        "PARAM": _TRITON_DTYPES[param_dtype],
        "GRAD": _TRITON_DTYPES[grad_dtype],
        "COMPUTE": _TRITON_DTYPES[compute],
        "MOMENTS": moments,
        "SGD": rule == "sgdw",
        "PARAM_BYTES": param_dtype.itemsize,
        "GRAD_BYTES": grad_dtype.itemsize,
        "COMPUTE_BYTES": compute.itemsize,
        "MOMENT_BYTES": moment_bytes,
        "VECTOR": vector,
        "BLOCK": block,
        "MASKED_BLOCK": block // MASKED_SHARE,
        "num_warps": warps,
    }


class TritonBackend:
    """prepare, one program a block of tensors; update, one program a chunk; before them, where wanted, the norm."""

    name: ClassVar[str] = "triton"

    # Elements a chunk: several blocks, so that reading the table is a small part of a program's work.
    chunk_size = 4 * UPDATE_BLOCK

    def warm_up(self, table: LaunchTable, stages: int) -> None:
        """Compile and load every kernel that these stages launch; one that cannot run on this device fails here."""
        if table.device.type == "cpu":
            return  # the interpreter compiles nothing
        with torch.cuda.device(table.device):
            for compiled in self._run(table, stages, dry=True):
                _ = compiled.run  # loads the machine code, which compiling alone does not

    def launch(self, table: LaunchTable, stages: int) -> None:
        """Enqueue the stages' kernels, one update a dtype combination, on the current stream of the table's device."""
        if table.device.type == "cpu" or table.device.index == torch.cuda.current_device():
            self._run(table, stages, dry=False)
        else:
            with torch.cuda.device(table.device):
                self._run(table, stages, dry=False)

    @staticmethod
    def _run(table: LaunchTable, stages: int, *, dry: bool) -> list[Any]:
        """Launch the kernels or, if `dry`, only compile them; the compiled kernels."""
        compiled: list[Any] = []

        def run(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
            if dry:
                compiled.append(kernel.warmup(*arguments, grid=(programs,), **options, **COMPILE_OPTIONS))
            else:
                compiled.append(kernel[(programs,)](*arguments, **options, **COMPILE_OPTIONS))

        signals, decision = table.verdict.signals, table.verdict.decision
        if stages & layout.MEASURE:
            if table.num_norm_chunks:
                run(
                    measure_kernel,
                    table.num_norm_chunks,
                    table.rows,
                    table.device_grads,
                    table.norm_chunks,
                    table.partials,
                    CHUNK=layout.NORM_CHUNK,
                    LANES=layout.NORM_LANES,
                    num_warps=4,
                )
            run(
                sum_up_kernel,
                table.num_domains + 1,
                table.domains,
                signals,
                table.partials,
                table.totals,
                table.num_domains,
                LANES=layout.NORM_LANES,
                num_warps=4,
            )
        if stages & layout.DECIDE:
            run(decide_kernel, 1, table.domains, signals, table.totals, decision, table.num_domains, num_warps=1)
        if table.num_tensors == 0 or not stages & layout.UPDATE:
            return compiled
        run(
            prepare_kernel,
            triton.cdiv(table.num_tensors, PREPARE_BLOCK),
            table.rows,
            table.device_grads,
            table.hypers,
            table.coefficients,
            decision,
            table.num_tensors,
            BLOCK=PREPARE_BLOCK,
            num_warps=4,
        )
        interpreted = table.device.type == "cpu"
        for batch in table.batches:
            if batch.begin == batch.end:
                continue  # nothing but empty tensors
            combination = batch.param_dtype, batch.grad_dtype, batch.moment_format, batch.rule
            run(
                update_kernel,
                batch.end - batch.begin,
                table.rows,
                table.device_grads,
                table.coefficients,
                table.chunks,
                decision,
                batch.begin,
                table.chunk_size,
                **update_options(*combination, interpreted=interpreted and not dry),
            )
        return compiled


# The kernels read tables with literal offsets (Triton sees no Python objects); this ties them to the layout.
assert (layout.ROW_PARAM, layout.ROW_EXP_AVG, layout.ROW_EXP_AVG_SQ, layout.ROW_MAX_EXP_AVG_SQ) == (0, 1, 2, 3)
assert (layout.ROW_STEP, layout.ROW_NUMEL, layout.ROW_HYPER, layout.ROW_FLAGS) == (4, 5, 6, 7)
assert (layout.ROW_EMA, layout.ROW_NORM, layout.ROW_RANDOM_STREAM, layout.WORDS_PER_ROW) == (8, 9, 10, 16)
assert (layout.ROW_REMAINDER, layout.ROW_GROUPS, layout.ROW_SCALE) == (11, 12, 13)
assert (layout.ROW_FIRST_ELEMENT, layout.ROW_UPDATE_BOUND) == (14, 15)
assert (layout.AMSGRAD, layout.MAXIMIZE, layout.L2, layout.FLOAT64) == (1, 2, 4, 8)
assert (layout.CAUTIOUS, layout.CAUTIOUS_DECAY, layout.CLIP, layout.EMA) == (16, 32, 64, 128)
assert (layout.EMA_BFLOAT16, layout.EMA_WARMUP, layout.BOUND) == (0x10000, 0x20000, 0x40000)
assert (layout.SCHEDULE_DECAY, layout.SGD, layout.MOMENTUM) == (0x80000, 0x1000000, 0x2000000)
assert (layout.NESTEROV, layout.LR_IN_MOMENTUM) == (0x4000000, 0x8000000)
assert (layout.GRAD_DTYPE_SHIFT, layout.PARAM_FORMAT_SHIFT, GROUP) == (12, 20, 16)
assert PARAM_FORMATS == ("native", "stochastic", "split24", "split32")
assert MOMENT_FORMATS == ("float32", "bfloat16", "8bit")
assert (layout.COEFFICIENT_ROW_BYTES, layout.KEY_OFFSET) == (128, 120)
assert (hyperparameters.HYPER_SOURCE, hyperparameters.FROM_FLOAT32, hyperparameters.FROM_FLOAT64) == (8, 1, 2)
assert (hyperparameters.WORDS_PER_HYPER_ROW, layout.WORDS_PER_DOMAIN, layout.CHUNK_TENSOR_SHIFT) == (9, 4, 32)
assert (control.DECISION_SKIP, control.DECISION_SKIPPED_STEPS, control.DECISION_NORM) == (0, 1, 2)
assert (control.DECISION_INV_SCALE, control.DECISION_NORMS) == (3, 4)
