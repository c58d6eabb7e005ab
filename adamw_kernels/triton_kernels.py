"""The Triton kernels and their launchers; nothing else.

The update rule is the twin of `csrc/rule.h`: the same IEEE-754 operations in the same order. Every kernel is compiled
with `enable_fp_fusion=False`; division and root are the round-to-nearest ones; 16-bit values are rounded in integer
arithmetic, because the interpreter's own cast to bfloat16 truncates.

Source: Loshchilov & Hutter, Decoupled Weight Decay Regularization (2019), Algorithm 2.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import triton
import triton.language as tl

from adamw_kernels import launch_table as layout
from adamw_kernels.formats import compute_dtype
from adamw_kernels.launch_table import LaunchTable

# --- element math: storage ------------------------------------------------------------------------------------------


@triton.jit
def _to_bfloat16(x):
    """float32 -> bfloat16 to nearest even; NaN stays NaN."""
    u = x.to(tl.uint32, bitcast=True)
    rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
    quiet = (u >> 16) | 0x40
    is_nan = (u & 0x7FFFFFFF) > 0x7F800000
    return tl.where(is_nan, quiet, rounded).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _from_storage(x, COMPUTE: tl.constexpr):
    if x.dtype == tl.bfloat16:  # by hand: the interpreter's own cast is wrong for subnormals
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(COMPUTE)


@triton.jit
def _to_storage(x, STORAGE: tl.constexpr):
    if STORAGE == tl.bfloat16:
        return _to_bfloat16(x)
    else:
        return x.to(STORAGE)  # float16's own cast is to nearest even everywhere; the others are exact


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
    return m, v


@triton.jit
def _weight(p, m, s, step_size, inv_sqrt_bc2, decay, eps):
    """The second half: the weight, from the first moment and the second moment or its running maximum."""
    d = _square_root(s) * inv_sqrt_bc2 + eps
    return p - (decay * p + _divide(step_size * m, d))


@triton.jit
def _power(base, exponent):
    """base^exponent in float64 by repeated squaring; 0 <= exponent < 2^31."""
    result = tl.full(base.shape, 1.0, tl.float64)
    for bit in range(31):
        result = tl.where(((exponent >> bit) & 1) != 0, result * base, result)
        base = base * base
    return result


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
def prepare_kernel(rows, grads, hypers, coefficients, num_tensors, BLOCK: tl.constexpr):
    """Advance every tensor's step and write its coefficient row; BLOCK tensors a program."""
    tensor = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = tensor < num_tensors
    active = inside & (tl.load(grads + tensor, mask=inside, other=0) != 0)
    row = rows + tensor * 8
    step = tl.load(row + 4, mask=active, other=0).to(tl.pointer_type(tl.float32))
    group = tl.load(row + 6, mask=active, other=0)
    flags = tl.load(row + 7, mask=active, other=0)

    taken = tl.load(step, mask=active, other=0.0) + 1.0
    tl.store(step, taken, mask=active)
    t = taken.to(tl.int64)

    source = tl.load(hypers + group * 8 + 5, mask=active, other=0)
    lr = _hyper_field(hypers, group, source, active, 0)
    beta1 = _hyper_field(hypers, group, source, active, 1)
    beta2 = _hyper_field(hypers, group, source, active, 2)
    eps = _hyper_field(hypers, group, source, active, 3)
    weight_decay = _hyper_field(hypers, group, source, active, 4)

    one = tl.full((BLOCK,), 1.0, tl.float64)
    zero = tl.full((BLOCK,), 0.0, tl.float64)
    maximize = (flags & 2) != 0
    l2 = (flags & 4) != 0
    w1 = one - beta1
    w2 = one - beta2
    step_size = lr / (one - _power(beta1, t))
    inv_sqrt_bc2 = one / tl.sqrt(one - _power(beta2, t))
    decay = tl.where(l2, zero, lr * weight_decay)
    scale = tl.where(maximize, -one, one)
    l2_decay = tl.where(l2, weight_decay, zero)

    is_double = (flags & 8) != 0
    _store_coefficient(coefficients, tensor, 0, w1, active, is_double)
    _store_coefficient(coefficients, tensor, 1, w2, active, is_double)
    _store_coefficient(coefficients, tensor, 2, step_size, active, is_double)
    _store_coefficient(coefficients, tensor, 3, inv_sqrt_bc2, active, is_double)
    _store_coefficient(coefficients, tensor, 4, decay, active, is_double)
    _store_coefficient(coefficients, tensor, 5, eps, active, is_double)
    _store_coefficient(coefficients, tensor, 6, scale, active, is_double)
    _store_coefficient(coefficients, tensor, 7, l2_decay, active, is_double)


@triton.jit
def _store_coefficient(coefficients, tensor, position, value, active, is_double):
    """Round once to the compute type. A row is eight float64, or eight float32 in its first half."""
    double = coefficients.to(tl.pointer_type(tl.float64)) + tensor * 8 + position
    single = coefficients.to(tl.pointer_type(tl.float32)) + tensor * 16 + position
    tl.store(double, value, mask=active & is_double)
    tl.store(single, value.to(tl.float32), mask=active & (is_double == 0))


@triton.jit
def _update_block(p, g, m, v, v_max, offsets, mask, c, amsgrad, has_l2, PARAM: tl.constexpr, COMPUTE: tl.constexpr):
    """Load, update, store one block. `c`: the tensor's coefficients. `mask` is None where the block is full."""
    w1, w2, step_size, inv_sqrt_bc2, decay, eps, scale, l2 = c
    weight = _from_storage(tl.load(p + offsets, mask=mask), COMPUTE)
    grad = _from_storage(tl.load(g + offsets, mask=mask), COMPUTE)
    first = tl.load(m + offsets, mask=mask)
    second = tl.load(v + offsets, mask=mask)
    first, second = _moments(weight, grad, first, second, w1, w2, scale, l2, has_l2)
    bound = second
    if amsgrad:
        maximum = tl.load(v_max + offsets, mask=mask)
        bound = tl.where((second > maximum) | (second != second), second, maximum)
        tl.store(v_max + offsets, bound, mask=mask)
    weight = _weight(weight, first, bound, step_size, inv_sqrt_bc2, decay, eps)
    tl.store(p + offsets, _to_storage(weight, PARAM), mask=mask)
    tl.store(m + offsets, first, mask=mask)
    tl.store(v + offsets, second, mask=mask)


@triton.jit(do_not_specialize=["first_chunk"])
def update_kernel(
    rows,
    grads,
    coefficients,
    chunks,
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
    """Update one chunk a program.

    Chunk boundaries are moved down by the number of elements by which all operands sit past a 16-byte boundary, so
    that full blocks are loaded and stored 16 bytes at a time; only the blocks at a tensor's ends are masked. Operands
    that do not sit alike are masked throughout.
    """
    chunk = tl.load(chunks + first_chunk + tl.program_id(0))
    tensor = chunk >> 32
    index = chunk & 0xFFFFFFFF
    grad_address = tl.load(grads + tensor)
    if grad_address != 0:
        row = rows + tensor * 8
        p_address = tl.load(row)
        m_address = tl.load(row + 1)
        v_address = tl.load(row + 2)
        v_max_address = tl.load(row + 3)
        numel = tl.load(row + 5)
        flags = tl.load(row + 7)
        amsgrad = (flags & 1) != 0
        has_l2 = (flags & 4) != 0
        c_row = coefficients.to(tl.pointer_type(COMPUTE)) + tensor * (64 // COMPUTE_BYTES)
        c = (
            tl.load(c_row),
            tl.load(c_row + 1),
            tl.load(c_row + 2),
            tl.load(c_row + 3),
            tl.load(c_row + 4),
            tl.load(c_row + 5),
            tl.load(c_row + 6),
            tl.load(c_row + 7),
        )

        past = (p_address & 15) // PARAM_BYTES
        p_address -= past * PARAM_BYTES
        g_address = grad_address - past * GRAD_BYTES
        m_address -= past * COMPUTE_BYTES
        v_address -= past * COMPUTE_BYTES
        v_max_address = tl.where(amsgrad, v_max_address - past * COMPUTE_BYTES, 0)
        aligned = ((p_address | g_address | m_address | v_address | v_max_address) & 15) == 0

        # In elements from the addresses just moved: the tensor is [past, past + numel).
        begin = index * chunk_size
        end = tl.where(begin + chunk_size >= numel, past + numel, begin + chunk_size)
        p = p_address.to(tl.pointer_type(PARAM))
        g = g_address.to(tl.pointer_type(GRAD))
        m = m_address.to(tl.pointer_type(COMPUTE))
        v = v_address.to(tl.pointer_type(COMPUTE))
        v_max = v_max_address.to(tl.pointer_type(COMPUTE))
        for start in range(begin, end, BLOCK):
            if aligned & (start >= past) & (start + BLOCK <= end):
                start = tl.multiple_of(start, 16)  # chunk sizes are multiples of 16 elements
                _update_block(
                    tl.multiple_of(p, 16),
                    tl.multiple_of(g, 16),
                    tl.multiple_of(m, 16),
                    tl.multiple_of(v, 16),
                    tl.multiple_of(v_max, 16),
                    start + tl.arange(0, BLOCK),
                    None,
                    c,
                    amsgrad,
                    has_l2,
                    PARAM,
                    COMPUTE,
                )
            else:
                stop = tl.minimum(start + BLOCK, end)
                for masked in range(tl.maximum(start, past), stop, MASKED_BLOCK):
                    # Under the interpreter `masked` is a Python number, which int32 offsets could not be added to.
                    offsets = masked + tl.arange(0, MASKED_BLOCK).to(tl.int64)
                    _update_block(p, g, m, v, v_max, offsets, offsets < stop, c, amsgrad, has_l2, PARAM, COMPUTE)


# --- launchers --------------------------------------------------------------------------------------------------------

PREPARE_BLOCK = 128
UPDATE_BLOCK = 1024  # 8 elements a thread: 16 bytes of bfloat16, 32 of float32; half as many in float64
UPDATE_WARPS = 4
# A masked element needs an address and a mask of its own: masking half a block at a time takes the kernel from 106 to
# 72 registers (bfloat16, sm_90); tests/test_compiled_triton.py holds the figures.
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
    """Two kernels: prepare, one program a block of tensors; update, one program a chunk."""

    name: ClassVar[str] = "triton"

    # Elements a chunk: several blocks, so that reading the table is a small part of a program's work.
    chunk_size = 4 * UPDATE_BLOCK

    def warm_up(self, table: LaunchTable) -> None:
        """Compile and load every kernel that the table will launch; one that cannot run on this device fails here."""
        if table.device.type == "cpu":
            return  # the interpreter compiles nothing
        with torch.cuda.device(table.device):
            for compiled in self._run(table, dry=True):
                _ = compiled.run  # loads the machine code, which compiling alone does not

    def launch(self, table: LaunchTable) -> None:
        """Enqueue prepare and one update a dtype combination on the current stream of the table's device."""
        if table.device.type == "cpu" or table.device.index == torch.cuda.current_device():
            self._run(table, dry=False)
        else:
            with torch.cuda.device(table.device):
                self._run(table, dry=False)

    @staticmethod
    def _run(table: LaunchTable, *, dry: bool) -> list[Any]:
        """Launch the kernels or, if `dry`, only compile them; the compiled kernels."""
        compiled: list[Any] = []

        def run(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
            if dry:
                compiled.append(kernel.warmup(*arguments, grid=(programs,), **options, **COMPILE_OPTIONS))
            else:
                compiled.append(kernel[(programs,)](*arguments, **options, **COMPILE_OPTIONS))

        if table.num_tensors == 0:
            return compiled
        run(
            prepare_kernel,
            triton.cdiv(table.num_tensors, PREPARE_BLOCK),
            table.rows,
            table.device_grads,
            table.hypers,
            table.coefficients,
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
                batch.begin,
                table.chunk_size,
                **update_constants(batch.param_dtype, batch.grad_dtype),
                num_warps=UPDATE_WARPS,
            )
        return compiled


# The kernels read tables with literal offsets (Triton sees no Python objects); this ties them to the layout.
assert (layout.ROW_PARAM, layout.ROW_EXP_AVG, layout.ROW_EXP_AVG_SQ, layout.ROW_MAX_EXP_AVG_SQ) == (0, 1, 2, 3)
assert (layout.ROW_STEP, layout.ROW_NUMEL, layout.ROW_HYPER, layout.ROW_FLAGS) == (4, 5, 6, 7)
assert (layout.AMSGRAD, layout.MAXIMIZE, layout.L2, layout.FLOAT64) == (1, 2, 4, 8)
assert (layout.HYPER_SOURCE, layout.FROM_FLOAT32, layout.FROM_FLOAT64) == (5, 1, 2)
assert layout.WORDS_PER_ROW == 8 and layout.CHUNK_TENSOR_SHIFT == 32
