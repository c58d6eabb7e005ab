"""More than 2^31 and 2^32 elements: index arithmetic, with hardly any memory.

On a CPU the operands are anonymous mappings without reserve, tens of GiB of address space of which only the touched
pages exist. A launch is restricted to the chunks at the interesting elements. `/proc/self/pagemap` then tells every
page of every operand that was read or written, so "nothing else was touched" covers all of it. On a GPU the memory is
real, and every element is looked at.
"""

import dataclasses
import mmap
import os
from array import array
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from conftest import Path
from problems import (
    HYPER,
    PLAIN,
    TORCH_DTYPE,
    as_tensor,
    assert_same_bits,
    ordinary_values,
    stored,
)
from reference import step_exact

from adamw_kernels import backends, fused_adamw_, launch_table
from adamw_kernels.launch_table import LaunchPlan, TensorSpec

# The interpreter computes with NumPy, which warns of what masked lanes hold.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

DTYPES = dict(param="bfloat16", grad="bfloat16", exp_avg="float32", exp_avg_sq="float32")

# Where arithmetic in 32 bits goes wrong: element numbers at 2^31 (signed) and 2^32 (unsigned), byte offsets of float32
# at 2^29 and 2^30 elements, of bfloat16 at 2^30 and 2^31.
LANDMARKS = (0, 2**29, 2**30, 2**31, 2**32)

PAGE = mmap.PAGESIZE
PAGE_MAP = "/proc/self/pagemap"
HAS_PAGE_MAP = os.path.exists(PAGE_MAP)


# --- memory that is hardly there ------------------------------------------------------------------------------------


def zeros_at_no_cost(numel: int, dtype: str, device: torch.device) -> torch.Tensor:
    """Return zeros: on a CPU, of which only touched pages take memory; on a GPU, real ones. Skip where neither is."""
    size = numel * TORCH_DTYPE[dtype].itemsize
    if device.type != "cpu":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        if free < size + (1 << 30):
            pytest.skip(f"needs {size >> 30} GiB of GPU memory for one operand, {free >> 30} GiB are free")
        return torch.zeros(numel, dtype=TORCH_DTYPE[dtype], device=device)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)  # named since Python 3.13
    try:
        memory = mmap.mmap(-1, size, flags=flags)
    except OSError as error:
        pytest.skip(f"the system refuses to map {size >> 30} GiB: {error}")
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)  # or touching one element would take 2 MiB
    return torch.frombuffer(memory, dtype=TORCH_DTYPE[dtype])


def touched_pages(tensor: torch.Tensor) -> np.ndarray:
    """Return which of the pages under a CPU tensor were read or written since they were mapped."""
    start = tensor.data_ptr() - tensor.storage_offset() * tensor.dtype.itemsize
    assert start % PAGE == 0
    pages = -(-tensor.untyped_storage().nbytes() // PAGE)
    entries = np.fromfile(PAGE_MAP, dtype=np.uint64, count=pages, offset=start // PAGE * 8)
    assert len(entries) == pages
    return np.flatnonzero(entries >> np.uint64(62))  # present or swapped out


@dataclasses.dataclass
class Large:
    """The operands of one large tensor, zero but for `windows`, where they hold what `values` says."""

    tensors: dict[str, torch.Tensor]
    step: torch.Tensor
    windows: list[range]
    values: dict[int, dict[str, np.ndarray]]  # by a window's start

    def update(self) -> None:
        """Take one step."""
        lists = ([self.tensors[key]] for key in DTYPES)
        fused_adamw_(*lists, [], [self.step], **HYPER, **PLAIN)


def make_large(numel: int, windows: list[range], device: torch.device, offset: int = 0) -> Large:
    """Return operands that start `offset` elements into their mappings, random within windows of elements."""
    rng = np.random.default_rng(51)
    tensors = {key: zeros_at_no_cost(numel + offset, dtype, device)[offset:] for key, dtype in DTYPES.items()}
    values: dict[int, dict[str, np.ndarray]] = {}
    for window in windows:
        values[window.start] = {}
        for key, dtype in DTYPES.items():
            drawn = ordinary_values(rng, (len(window),), dtype)
            drawn = np.abs(drawn) if key == "exp_avg_sq" else drawn
            tensors[key][window.start : window.stop] = as_tensor(drawn, dtype).to(device)
            values[window.start][key] = drawn
    return Large(tensors, torch.zeros((), device=device), windows, values)


def merged(ranges: Sequence[range]) -> list[range]:
    """Return ascending ranges that cover the same numbers and do not touch."""
    result: list[range] = []
    for r in sorted(ranges, key=lambda r: r.start):
        if result and r.start <= result[-1].stop:
            result[-1] = range(result[-1].start, max(result[-1].stop, r.stop))
        else:
            result.append(r)
    return result


def launch_only(monkeypatch: pytest.MonkeyPatch, wanted: Sequence[int]) -> None:
    """Let launch tables of one tensor hold only these of its chunks."""
    cut = launch_table.cut_into_chunks

    def cut_and_choose(numels: Sequence[int], chunk_size: int) -> tuple[array, list[int]]:
        chunks, ends = cut(numels, chunk_size)
        assert ends == [len(chunks)] and chunks[-1] == len(chunks) - 1
        return array("q", (chunks[i] for i in wanted)), [len(wanted)]

    monkeypatch.setattr(launch_table, "cut_into_chunks", cut_and_choose)


# --- the step -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numel", "offset"),
    [(2**31 - 1, 0), (2**31 + 12_345, 0), (2**32 + 4_099, 0), (2**32 + 4_099, 3)],
    ids=["2^31-1", "2^31", "2^32", "2^32-at-offset-3"],
)
def test_more_elements_than_32_bits_count(path: Path, monkeypatch: pytest.MonkeyPatch, numel: int, offset: int) -> None:
    """The elements around 0, 2^29 ... 2^32 and the last have the judge's bits, and no other element is touched."""
    chunk_size = backends.choose(path.device).chunk_size
    while numel // chunk_size > launch_table.MAX_CHUNKS:  # as the plan does
        chunk_size *= 2
    last = (numel - 1) // chunk_size
    near = [chunk for mark in LANDMARKS if mark < numel for chunk in ((mark - 1) // chunk_size, mark // chunk_size)]
    chunks = sorted({chunk for chunk in (*near, last - 1, last) if chunk >= 0})
    updated = merged([range(c * chunk_size, min((c + 1) * chunk_size, numel)) for c in chunks])
    # What lies around is not zero either, so that an update that goes astray by less than a chunk shows.
    windows = merged([range(max(r.start - chunk_size, 0), min(r.stop + chunk_size, numel)) for r in updated])

    large = make_large(numel, windows, path.device, offset)
    launch_only(monkeypatch, chunks)
    if path.device.type == "cpu" and HAS_PAGE_MAP:
        touched = {key: touched_pages(tensor) for key, tensor in large.tensors.items()}
        assert all(len(pages) * PAGE < 64 << 20 for pages in touched.values())
    large.update()

    if path.device.type == "cpu" and HAS_PAGE_MAP:
        for key, tensor in large.tensors.items():
            assert np.array_equal(touched_pages(tensor), touched[key]), f"{key}: memory far from any chunk was touched"
    elif path.device.type != "cpu":
        for key, tensor in large.tensors.items():
            ends = [0, *(end for window in windows for end in (window.start, window.stop)), numel]
            for begin, end in zip(ends[::2], ends[1::2], strict=True):
                for start in range(begin, end, 1 << 28):
                    piece = tensor[start : min(start + (1 << 28), end)]
                    assert not piece.any(), f"{key}: written between {begin} and {end}"
    assert float(large.step) == 1.0

    # Chunk boundaries of operands that sit alike past a 16-byte boundary may move down by less than 16 elements.
    slack = 16 if offset else 0
    for window in windows:
        before = large.values[window.start]
        p, m, v, _ = step_exact(
            *before.values(), None, 1, param_dtype="bfloat16", grad_dtype="bfloat16", **HYPER, **PLAIN
        )
        after = dict(param=p, grad=before["grad"], exp_avg=m, exp_avg_sq=v)
        index = np.arange(window.start, window.stop)
        inside = np.zeros(len(window), dtype=bool)
        either = np.zeros(len(window), dtype=bool)
        for r in updated:
            inside |= (index >= r.start) & (index < r.stop)
            for edge in (r.start, r.stop):
                either |= (index >= edge - slack) & (index < edge) if 0 < edge < numel else False
        for key, dtype in DTYPES.items():
            got = stored(large.tensors[key][window.start : window.stop])
            expected = np.where(inside, after[key], before[key])
            expected[either] = got[either]
            assert_same_bits(got, expected, dtype, f"{key} of elements {window}")


# --- chunk tables ---------------------------------------------------------------------------------------------------


class NoBackend:
    """Stands for a backend where only the table is looked at."""

    name = "none"
    chunk_size = 4096

    def warm_up(self, table: launch_table.LaunchTable, stages: int) -> None:
        """Nothing to compile."""


def plan_for(numels: Sequence[int], chunk_size: int | None = None) -> launch_table.LaunchTable:
    """Return the table of tensors of these sizes; each is one element expanded, for only sizes matter."""
    specs = []
    for i, numel in enumerate(numels):
        operands = {key: torch.zeros((), dtype=TORCH_DTYPE[dtype]).expand(numel) for key, dtype in DTYPES.items()}
        specs.append(
            TensorSpec(
                name=f"tensor {i}",
                param=operands["param"],
                grad_dtype=torch.bfloat16,
                exp_avg=operands["exp_avg"],
                exp_avg_sq=operands["exp_avg_sq"],
                max_exp_avg_sq=None,
                step=torch.zeros(()),
                hyper=0,
                amsgrad=False,
                maximize=False,
                decoupled=True,
            )
        )
    (table,) = LaunchPlan(specs, 1, lambda device: NoBackend(), chunk_size).tables
    return table


@pytest.mark.parametrize("chunk_size", [None, 16, 48])
@pytest.mark.parametrize(
    "numels",
    [[10**12], [2**40 + 1], [2**36 - 1] * 16, [10**12, 1, 0, 1000, 2**33]],
    ids=["10^12", "2^40+1", "16-of-2^36-1", "mixed"],
)
def test_chunk_table_stays_small(numels: list[int], chunk_size: int | None) -> None:
    """A trillion elements take at most 8 MiB of chunks beside one a tensor, and the chunks cover every element."""
    table = plan_for(numels, chunk_size)
    assert table.num_chunks <= launch_table.MAX_CHUNKS + len(numels)
    assert table.num_chunks >= launch_table.MAX_CHUNKS // 2
    assert table.chunk_size % launch_table.CHUNK_MULTIPLE == 0
    chunks = table.chunks.numpy()
    tensor, index = chunks >> 32, chunks & 0xFFFFFFFF
    for i, numel in enumerate(numels):
        mine = index[tensor == i]
        assert np.array_equal(mine, np.arange(len(mine)))
        assert (len(mine) - 1) * table.chunk_size < numel <= len(mine) * table.chunk_size


def test_cutting_into_chunks() -> None:
    """A chunk is `tensor << 32 | index`; sizes at a chunk's end make no empty chunk, and empty tensors none at all."""
    chunks, ends = launch_table.cut_into_chunks([0, 1, 16, 17, 0, 33], 16)
    assert [(c >> 32, c & 0xFFFFFFFF) for c in chunks] == [(1, 0), (2, 0), (3, 0), (3, 1), (5, 0), (5, 1), (5, 2)]
    assert ends == [0, 1, 2, 4, 4, 7]
    assert launch_table.cut_into_chunks([], 16) == (array("q"), [])


@pytest.mark.skipif(not HAS_PAGE_MAP, reason=f"the system has no {PAGE_MAP}")
def test_the_page_map_shows_a_stray_write() -> None:
    """What `test_more_elements_than_32_bits_count` relies on: one element read or written far out is one page more."""
    tensor = zeros_at_no_cost(2**31, "float32", torch.device("cpu"))
    assert len(touched_pages(tensor)) == 0
    tensor[2**30 + 5] = 1.0
    assert touched_pages(tensor).tolist() == [2**32 // PAGE]
    assert float(tensor[7]) == 0.0
    assert 0 in touched_pages(tensor)
