"""The Triton kernels and their launchers; nothing else.

The update rule is the twin of `csrc/rule.h`: the same IEEE-754 operations in the same order. Every kernel is compiled
with `enable_fp_fusion=False`; division and root are the round-to-nearest ones.

Source: Loshchilov & Hutter, Decoupled Weight Decay Regularization (2019), Algorithm 2.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import triton
import triton.language as tl

from adamw_kernels import control, hyperparameters
from adamw_kernels import launch_table as layout
from adamw_kernels.formats import compute_dtype
from adamw_kernels.launch_table import LaunchTable
from adamw_kernels.triton_formats import (
    from_storage,
    mix,
    random_word,
    to_bfloat16_stochastic,
    to_storage,
)

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
def _weight(p, g, m, s, step_size, inv_sqrt_bc2, decay, eps, flags):
    """The second half: the weight, from the first moment and the second moment or its running maximum."""
    d = _square_root(s) * inv_sqrt_bc2 + eps
    u = _divide(step_size * m, d)
    r = decay * p
    if (flags & 48) != 0:  # the same for the whole tensor
        u = tl.where(((flags & 16) != 0) & (((m > 0) & (g <= 0)) | ((m < 0) & (g >= 0))), 0.0, u)
        r = tl.where(((flags & 32) != 0) & (((u > 0) & (p < 0)) | ((u < 0) & (p > 0))), 0.0, r)
    return p - (r + u)


@triton.jit
def _moving_average(ema, stored, weight_of_new):
    """The exponential moving average of the weight as it is stored."""
    return ema + weight_of_new * (stored - ema)


@triton.jit
def _powers(base1, base2, exponent):
    """base1^exponent and base2^exponent in float64 by repeated squaring."""
    power1 = tl.full(base1.shape, 1.0, tl.float64)
    power2 = power1
    # As many rounds as the largest exponent has bits: a fixed number would be unrolled, at 160 registers a thread.
    bits = tl.max(exponent, axis=0)
    while bits > 0:
        odd = (exponent & 1) != 0
        power1 = tl.where(odd, power1 * base1, power1)
        power2 = tl.where(odd, power2 * base2, power2)
        base1 = base1 * base1
        base2 = base2 * base2
        exponent = exponent >> 1
        bits = bits >> 1
    return power1, power2


# --- index mapping --------------------------------------------------------------------------------------------------


@triton.jit
def _hyper_field(hypers, row, source, active, FIELD: tl.constexpr):
    """A hyperparameter in float64: the row's own value, or that of the float32 or float64 tensor it points to."""
    word = tl.load(hypers + row * 8 + FIELD, mask=active, other=0)
    kind = (source >> (2 * FIELD)) & 3
    value = word.to(tl.float64, bitcast=True)
    single = tl.load(word.to(tl.pointer_type(tl.float32)), mask=active & (kind == 1), other=0.0).to(tl.float64)
    double = tl.load(word.to(tl.pointer_type(tl.float64)), mask=active & (kind == 2), other=0.0)
    return tl.where(kind == 1, single, tl.where(kind == 2, double, value))


@triton.jit(do_not_specialize=["num_tensors"])
def prepare_kernel(rows, grads, hypers, coefficients, decision, num_tensors, BLOCK: tl.constexpr):
    """Advance every tensor's step and write its coefficient row, unless skipped; BLOCK tensors a program."""
    tensor = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = tensor < num_tensors
    inside = inside & (tl.load(decision + tensor * 0, mask=inside, other=1) == 0)  # the same word for all
    active = inside & (tl.load(grads + tensor, mask=inside, other=0) != 0)
    row = rows + tensor * 16
    step = tl.load(row + 4, mask=active, other=0).to(tl.pointer_type(tl.float32))
    group = tl.load(row + 6, mask=active, other=0)
    flags = tl.load(row + 7, mask=active, other=0)
    norm_index = tl.load(row + 9, mask=active, other=0)
    stream = tl.load(row + 10, mask=active, other=0).to(tl.uint64, bitcast=True)

    taken = tl.load(step, mask=active, other=0.0) + 1.0
    tl.store(step, taken, mask=active)
    t = taken.to(tl.int64)

    source = tl.load(hypers + group * 8 + 7, mask=active, other=0)
    lr = _hyper_field(hypers, group, source, active, 0)
    beta1 = _hyper_field(hypers, group, source, active, 1)
    beta2 = _hyper_field(hypers, group, source, active, 2)
    eps = _hyper_field(hypers, group, source, active, 3)
    weight_decay = _hyper_field(hypers, group, source, active, 4)
    max_grad_norm = _hyper_field(hypers, group, source, active, 5)
    ema_decay = _hyper_field(hypers, group, source, active, 6)

    one = tl.full((BLOCK,), 1.0, tl.float64)
    zero = tl.full((BLOCK,), 0.0, tl.float64)
    maximize = (flags & 2) != 0
    l2 = (flags & 4) != 0
    w1 = one - beta1
    w2 = one - beta2
    power1, power2 = _powers(beta1, beta2, t)
    step_size = lr / (one - power1)
    inv_sqrt_bc2 = one / tl.sqrt(one - power2)
    decay = tl.where(l2, zero, lr * weight_decay)
    l2_decay = tl.where(l2, weight_decay, zero)

    inv_scale = tl.load(decision + 3).to(tl.float64, bitcast=True)
    norm = tl.load(decision + 4 + norm_index, mask=active, other=0).to(tl.float64, bitcast=True)
    # In float64 throughout: a bare 1e-6 would be a float32 literal.
    clip = tl.where((flags & 64) != 0, max_grad_norm / (norm + tl.full((BLOCK,), 1e-6, tl.float64)), one)
    clip = tl.where((clip >= one) | (max_grad_norm == float("inf")), one, clip)  # a NaN stays
    scale = inv_scale * clip
    scale = tl.where(maximize, -scale, scale)

    taken64 = taken.to(tl.float64)
    warmup = (one + taken64) / (one * 10.0 + taken64)
    ema_decay = tl.where(((flags & 0x20000) != 0) & ((ema_decay < warmup) == 0), warmup, ema_decay)
    ema = tl.where((flags & 128) != 0, one - ema_decay, zero)
    key = mix(stream + t.to(tl.uint64) * 0x9E3779B97F4A7C15)

    is_double = (flags & 8) != 0
    _store_coefficient(coefficients, tensor, 0, w1, active, is_double)
    _store_coefficient(coefficients, tensor, 1, w2, active, is_double)
    _store_coefficient(coefficients, tensor, 2, step_size, active, is_double)
    _store_coefficient(coefficients, tensor, 3, inv_sqrt_bc2, active, is_double)
    _store_coefficient(coefficients, tensor, 4, decay, active, is_double)
    _store_coefficient(coefficients, tensor, 5, eps, active, is_double)
    _store_coefficient(coefficients, tensor, 6, scale, active, is_double)
    _store_coefficient(coefficients, tensor, 7, l2_decay, active, is_double)
    _store_coefficient(coefficients, tensor, 8, ema, active, is_double)
    tl.store(coefficients + tensor * 16 + 15, key.to(tl.int64, bitcast=True), mask=active)


@triton.jit
def _store_coefficient(coefficients, tensor, position, value, active, is_double):
    """Round once to the compute type. A row is of float64, or of float32 in its first half."""
    double = coefficients.to(tl.pointer_type(tl.float64)) + tensor * 16 + position
    single = coefficients.to(tl.pointer_type(tl.float32)) + tensor * 32 + position
    tl.store(double, value, mask=active & is_double)
    tl.store(single, value.to(tl.float32), mask=active & (is_double == 0))


@triton.jit
def _average_block(ema, offsets, mask, current, weight_of_new, COMPUTE: tl.constexpr):
    """Load, update, store the moving average of one block, whose weights now are `current`."""
    ema = ema.to(tl.pointer_type(COMPUTE))
    average = _moving_average(tl.load(ema + offsets, mask=mask), current, weight_of_new)
    tl.store(ema + offsets, average, mask=mask)


@triton.jit
def _average_block_in_bfloat16(ema, past, offsets, mask, current, weight_of_new, key):
    """The same where the average is bfloat16. The tensor begins at offset `past`."""
    ema = ema.to(tl.pointer_type(tl.bfloat16))
    if mask is None:
        ema = tl.multiple_of(ema, 8)  # four elements, as of the other operands: see update_kernel
    average = from_storage(tl.load(ema + offsets, mask=mask), tl.float32)
    average = _moving_average(average, current, weight_of_new)
    word = random_word(key, offsets.to(tl.int64) - past)
    tl.store(ema + offsets, to_bfloat16_stochastic(average, word), mask=mask)


@triton.jit
def _update_block(
    p, g, m, v, v_max, ema, past, offsets, mask, c, key, flags, PARAM: tl.constexpr, COMPUTE: tl.constexpr
):
    """Load, update, store one block. `c`: the tensor's coefficients. `mask` is None where the block is full."""
    w1, w2, step_size, inv_sqrt_bc2, decay, eps, scale, l2, weight_of_new = c
    weight = from_storage(tl.load(p + offsets, mask=mask), COMPUTE)
    grad = from_storage(tl.load(g + offsets, mask=mask), COMPUTE)
    first = tl.load(m + offsets, mask=mask)
    second = tl.load(v + offsets, mask=mask)
    grad, first, second = _moments(weight, grad, first, second, w1, w2, scale, l2, (flags & 4) != 0)
    # Stored at once: the second moment need not stay in registers beside its maximum.
    tl.store(m + offsets, first, mask=mask)
    tl.store(v + offsets, second, mask=mask)
    bound = second
    if (flags & 1) != 0:
        maximum = tl.load(v_max + offsets, mask=mask)
        bound = tl.where((second > maximum) | (second != second), second, maximum)
        tl.store(v_max + offsets, bound, mask=mask)
    weight = _weight(weight, grad, first, bound, step_size, inv_sqrt_bc2, decay, eps, flags)
    stored = to_storage(weight, PARAM)
    tl.store(p + offsets, stored, mask=mask)
    if (flags & 128) != 0:
        current = from_storage(stored, COMPUTE)
        if COMPUTE == tl.float64:  # beside which no average is bfloat16
            _average_block(ema, offsets, mask, current, weight_of_new, COMPUTE)
        elif (flags & 0x10000) != 0:
            _average_block_in_bfloat16(ema, past, offsets, mask, current, weight_of_new, key)
        else:
            _average_block(ema, offsets, mask, current, weight_of_new, COMPUTE)


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
    COMPUTE: tl.constexpr,  # dtype of the moments and of the arithmetic
    PARAM_BYTES: tl.constexpr,
    GRAD_BYTES: tl.constexpr,
    COMPUTE_BYTES: tl.constexpr,
    BLOCK: tl.constexpr,  # elements a program holds at a time
    MASKED_BLOCK: tl.constexpr,  # the same where elements are masked
):
    """Update one chunk a program, unless the step is skipped.

    Chunk boundaries are moved down by the number of elements by which all operands sit past a 16-byte boundary, so
    that full blocks are loaded and stored 16 bytes of the compute dtype at a time; only the blocks at a tensor's ends
    are masked. Operands that do not sit alike are masked throughout.

    Narrower operands are declared as aligned to as many elements, not to 16 bytes. Told of 16 bytes, Triton would load
    twice the elements a thread, and hand them to other threads through shared memory before it stores the moments.
    """
    chunk = tl.load(chunks + first_chunk + tl.program_id(0))
    tensor = chunk >> 32
    index = chunk & 0xFFFFFFFF
    grad_address = tl.load(grads + tensor)
    if (grad_address != 0) & (tl.load(decision) == 0):
        row = rows + tensor * 16
        p_address = tl.load(row)
        m_address = tl.load(row + 1)
        v_address = tl.load(row + 2)
        v_max_address = tl.load(row + 3)
        numel = tl.load(row + 5)
        flags = tl.load(row + 7)
        ema_address = tl.load(row + 8)
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
        )
        key = tl.load(coefficients + tensor * 16 + 15).to(tl.uint64, bitcast=True)

        past = (p_address & 15) // PARAM_BYTES
        p_address -= past * PARAM_BYTES
        g_address = grad_address - past * GRAD_BYTES
        m_address -= past * COMPUTE_BYTES
        v_address -= past * COMPUTE_BYTES
        v_max_address = tl.where((flags & 1) != 0, v_max_address - past * COMPUTE_BYTES, 0)
        ema_bytes = tl.where((flags & 0x10000) != 0, 2, COMPUTE_BYTES)
        ema_address = tl.where((flags & 128) != 0, ema_address - past * ema_bytes, 0)
        aligned = ((p_address | g_address | m_address | v_address | v_max_address | ema_address) & 15) == 0

        # In elements from the addresses just moved: the tensor is [past, past + numel).
        begin = index * chunk_size
        end = tl.where(begin + chunk_size >= numel, past + numel, begin + chunk_size)
        p = p_address.to(tl.pointer_type(PARAM))
        g = g_address.to(tl.pointer_type(GRAD))
        m = m_address.to(tl.pointer_type(COMPUTE))
        v = v_address.to(tl.pointer_type(COMPUTE))
        v_max = v_max_address.to(tl.pointer_type(COMPUTE))
        ema = ema_address.to(tl.pointer_type(tl.int8))  # of one dtype or another: see _update_block
        # Hoisted out of the loop, what is cheap to compute again takes some 20 registers a thread.
        for start in tl.range(begin, end, BLOCK, disable_licm=True):
            if aligned & (start >= past) & (start + BLOCK <= end):
                start = tl.multiple_of(start, 16)  # chunk sizes are multiples of 16 elements
                _update_block(
                    tl.multiple_of(p, 16 // COMPUTE_BYTES * PARAM_BYTES),
                    tl.multiple_of(g, 16 // COMPUTE_BYTES * GRAD_BYTES),
                    tl.multiple_of(m, 16),
                    tl.multiple_of(v, 16),
                    tl.multiple_of(v_max, 16),
                    tl.multiple_of(ema, 16),
                    past,
                    start + tl.arange(0, BLOCK),
                    None,
                    c,
                    key,
                    flags,
                    PARAM,
                    COMPUTE,
                )
            else:
                stop = tl.minimum(start + BLOCK, end)
                for masked in tl.range(tl.maximum(start, past), stop, MASKED_BLOCK, disable_licm=True):
                    # Under the interpreter `masked` is a Python number, which int32 offsets could not be added to.
                    offsets = masked + tl.arange(0, MASKED_BLOCK).to(tl.int64)
                    _update_block(p, g, m, v, v_max, ema, past, offsets, offsets < stop, c, key, flags, PARAM, COMPUTE)


# --- sums of squares and the decision ---------------------------------------------------------------------------------


@triton.jit
def _fold(lanes, LANES: tl.constexpr):
    """Add the upper half of the lanes to the lower half until one is left; tl.sum has an order of its own."""
    for level in tl.static_range(LANES.bit_length() - 1):
        lanes = tl.sum(tl.reshape(lanes, (2, LANES >> (level + 1))), axis=0)
    return tl.sum(lanes, axis=0)  # of one


@triton.jit
def _add_squares(lanes, address, count, GRAD: tl.constexpr, LANES: tl.constexpr):
    """Every lane plus the squares of its elements among [0, count), in float64."""
    x = address.to(tl.pointer_type(GRAD))
    full = count - count % LANES
    if (address & 15) == 0:
        for start in range(0, full, LANES):
            start = tl.multiple_of(start, 16)
            value = from_storage(tl.load(tl.multiple_of(x, 16) + start + tl.arange(0, LANES)), tl.float64)
            lanes = lanes + value * value
    else:
        for start in range(0, full, LANES):
            value = from_storage(tl.load(x + start + tl.arange(0, LANES)), tl.float64)
            lanes = lanes + value * value
    if full < count:
        offsets = full + tl.arange(0, LANES)
        value = from_storage(tl.load(x + offsets, mask=offsets < count, other=0.0), tl.float64)
        lanes = lanes + value * value
    return lanes


@triton.jit
def measure_kernel(rows, grads, norm_chunks, partials, CHUNK: tl.constexpr, LANES: tl.constexpr):
    """The sum of squares of one norm chunk a program."""
    chunk = tl.load(norm_chunks + tl.program_id(0))
    tensor = chunk >> 32
    first = (chunk & 0xFFFFFFFF) * CHUNK
    grad = tl.load(grads + tensor)
    row = rows + tensor * 16
    count = tl.minimum(tl.load(row + 5) - first, CHUNK)
    dtype = (tl.load(row + 7) >> 12) & 15
    lanes = tl.full((LANES,), 0.0, tl.float64)
    if grad != 0:
        if dtype == 0:
            lanes = _add_squares(lanes, grad + first * 4, count, tl.float32, LANES)
        elif dtype == 1:
            lanes = _add_squares(lanes, grad + first * 2, count, tl.bfloat16, LANES)
        elif dtype == 2:
            lanes = _add_squares(lanes, grad + first * 2, count, tl.float16, LANES)
        else:
            lanes = _add_squares(lanes, grad + first * 8, count, tl.float64, LANES)
    tl.store(partials + tl.program_id(0), _fold(lanes, LANES))


@triton.jit(do_not_specialize=["num_domains"])
def sum_up_kernel(domains, signals, partials, totals, num_domains, LANES: tl.constexpr):
    """The sum of one domain's partials a program; the last program writes whether a skip is signalled."""
    program = tl.program_id(0)
    if program == num_domains:
        tl.store(totals + program, tl.where(tl.load(signals + 1) == 0.0, 0.0, 1.0))
    else:
        begin = tl.load(domains + program * 4)
        end = tl.load(domains + program * 4 + 1)
        lanes = tl.full((LANES,), 0.0, tl.float64)
        for start in range(begin, end, LANES):
            offsets = start + tl.arange(0, LANES).to(tl.int64)
            lanes = lanes + tl.load(partials + offsets, mask=offsets < end, other=0.0)
        tl.store(totals + program, _fold(lanes, LANES))


@triton.jit(do_not_specialize=["num_domains"])
def decide_kernel(domains, signals, totals, decision, num_domains):
    """One program: norms out of totals, and whether the step is applied."""
    words = decision.to(tl.pointer_type(tl.float64))
    inv_scale = 1.0 / tl.load(signals)
    signalled = tl.load(totals + num_domains)
    zero = signalled * 0.0  # in float64, which a bare 0.0 is not
    total = zero
    total_of_norm = zero
    for i in range(0, num_domains):
        total_of_norm = total_of_norm + tl.load(totals + i)
        norm_index = tl.load(domains + i * 4 + 2)
        following = tl.load(domains + i * 4 + 6, mask=i + 1 < num_domains, other=-1)
        if following != norm_index:
            tl.store(words + 4 + norm_index, tl.sqrt(total_of_norm) * inv_scale)
            total = total + total_of_norm
            total_of_norm = zero
    norm = tl.sqrt(total) * inv_scale
    limit = tl.load(signals + 2)
    skip = signalled != 0.0
    skip = skip | ((tl.load(signals + 3) != 0.0) & (((total < float("inf")) & (norm < float("inf"))) == 0))
    skip = skip | ((limit != float("-inf")) & ((norm <= limit) == 0))
    tl.store(decision, skip.to(tl.int64))
    tl.store(decision + 1, tl.load(decision + 1) + skip.to(tl.int64))
    tl.store(words + 2, norm)
    tl.store(words + 3, inv_scale)


# --- launchers --------------------------------------------------------------------------------------------------------

PREPARE_BLOCK = 128
UPDATE_BLOCK = 1024  # 8 elements a thread, in two accesses; half as many in float64
UPDATE_WARPS = 4
# A masked element needs an address and a mask of its own: masking half a block at a time takes the kernel from 184 to
# 90 registers (bfloat16, sm_90); tests/test_compiled_triton.py holds the figures.
MASKED_SHARE = 2

_TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}

# Contraction off: with it, the bits would differ from the CPU's. Always said, because Triton's default is changing.
COMPILE_OPTIONS = {"enable_fp_fusion": False}


def update_constants(param_dtype: torch.dtype, grad_dtype: torch.dtype) -> dict[str, Any]:
    """The constexpr arguments of `update_kernel` for a dtype combination."""
    compute = compute_dtype(param_dtype)
    block = UPDATE_BLOCK * torch.float32.itemsize // compute.itemsize
    return {
        "PARAM": _TRITON_DTYPES[param_dtype],
        "GRAD": _TRITON_DTYPES[grad_dtype],
        "COMPUTE": _TRITON_DTYPES[compute],
        "PARAM_BYTES": param_dtype.itemsize,
        "GRAD_BYTES": grad_dtype.itemsize,
        "COMPUTE_BYTES": compute.itemsize,
        "BLOCK": block,
        "MASKED_BLOCK": block // MASKED_SHARE,
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
        for batch in table.batches:
            if batch.begin == batch.end:
                continue  # nothing but empty tensors
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
                **update_constants(batch.param_dtype, batch.grad_dtype),
                num_warps=UPDATE_WARPS,
            )
        return compiled


# The kernels read tables with literal offsets (Triton sees no Python objects); this ties them to the layout.
assert (layout.ROW_PARAM, layout.ROW_EXP_AVG, layout.ROW_EXP_AVG_SQ, layout.ROW_MAX_EXP_AVG_SQ) == (0, 1, 2, 3)
assert (layout.ROW_STEP, layout.ROW_NUMEL, layout.ROW_HYPER, layout.ROW_FLAGS) == (4, 5, 6, 7)
assert (layout.ROW_EMA, layout.ROW_NORM, layout.ROW_RANDOM_STREAM, layout.WORDS_PER_ROW) == (8, 9, 10, 16)
assert (layout.AMSGRAD, layout.MAXIMIZE, layout.L2, layout.FLOAT64) == (1, 2, 4, 8)
assert (layout.CAUTIOUS, layout.CAUTIOUS_DECAY, layout.CLIP, layout.EMA) == (16, 32, 64, 128)
assert (layout.EMA_BFLOAT16, layout.EMA_WARMUP, layout.GRAD_DTYPE_SHIFT) == (0x10000, 0x20000, 12)
assert (layout.COEFFICIENT_ROW_BYTES, layout.KEY_OFFSET) == (128, 120)
assert (hyperparameters.HYPER_SOURCE, hyperparameters.FROM_FLOAT32, hyperparameters.FROM_FLOAT64) == (7, 1, 2)
assert (hyperparameters.WORDS_PER_HYPER_ROW, layout.WORDS_PER_DOMAIN, layout.CHUNK_TENSOR_SHIFT) == (8, 4, 32)
assert (control.DECISION_SKIP, control.DECISION_SKIPPED_STEPS, control.DECISION_NORM) == (0, 1, 2)
assert (control.DECISION_INV_SCALE, control.DECISION_NORMS) == (3, 4)
