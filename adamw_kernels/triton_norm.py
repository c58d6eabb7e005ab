"""The Triton kernels that come before an update: sums of squares of the gradients, and whether the step is applied.

The twin of what `csrc/rule.h` says about the step as a whole. Compiled as the kernels of `triton_kernels.py` are.
"""

import triton
import triton.language as tl

from adamw_kernels.triton_formats import from_storage


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
