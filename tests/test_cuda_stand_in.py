"""The stand-in for CUDA that test_cuda_on_host.py relies on runs kernels whose threads wait, and shows their mistakes.

They wait at barriers of a block and where lanes of a warp exchange values. What stays invisible to it: blocks of one
launch that read what others write, threads that meet in different rounds of a loop, and whatever else depends on warps.
"""

import ctypes

import pytest
import torch
from cuda_stand_in import LAUNCH_FAILURE, MISALIGNED_ADDRESS, STAND_IN, compile_kernels

SUCCESS = 0
THREADS = 256

NO_BARRIER, *BARRIERS = range(4)  # Barrier of canary.cu
DIVERGENCES = range(3)  # Divergence of canary.cu
MISTAKES = [  # Mistake of canary.cu
    "lane_returns",
    "lane_waits_twice",
    "other_line",
    "other_mask",
    "other_lane",
    "not_in_mask",
    "partner_not_in_mask",
    "at_barrier",
]

either_order = pytest.mark.parametrize("backwards", [False, True], ids=["first_first", "last_first"])
# The odd one out among threads that wait: the one that runs first, one in between, or the one that runs last.
each_odd_one = pytest.mark.parametrize("odd_one", [0, 100, THREADS - 1])


@pytest.fixture(scope="session")
def canary(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """cuda_on_host/canary.cu, compiled as csrc/cuda.cu is."""
    return compile_kernels(tmp_path_factory.mktemp("canary"), STAND_IN / "canary.cu")


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    """The address of a tensor's elements."""
    return ctypes.c_void_p(tensor.data_ptr())


def make_blocks(blocks: int, threads: int) -> torch.Tensor:
    """Whole numbers, a row for each block."""
    generator = torch.Generator().manual_seed(threads)
    return torch.randint(1, 9, (blocks, threads), generator=generator).double()


def run_sums(
    canary: ctypes.CDLL, x: torch.Tensor, backwards: bool, left_out: int = NO_BARRIER, mirrored: bool = False
) -> torch.Tensor:
    """`sums` of canary.cu."""
    out = torch.full_like(x, -1.0)
    assert canary.sums(*x.shape, backwards, left_out, mirrored, pointer(x), pointer(out)) == SUCCESS
    return out


def expected_sums(x: torch.Tensor) -> torch.Tensor:
    """What `sums` has to give, exactly: all numbers are whole and below 2**53."""
    return x * x.sum(1, keepdim=True) ** 3


@either_order
@pytest.mark.parametrize("threads", [1, 2, 32, THREADS, 1024])
def test_threads_meet_at_barriers(canary: ctypes.CDLL, threads: int, backwards: bool) -> None:
    """Sums over a block by trees in shared memory are right in either order, for one thread up to 1,024."""
    x = make_blocks(5, threads)
    assert torch.equal(run_sums(canary, x, backwards), expected_sums(x))


@either_order
def test_block_returns_as_a_whole(canary: ctypes.CDLL, backwards: bool) -> None:
    """Blocks that return in front of every barrier write nothing, and those around them are right."""
    x = make_blocks(7, THREADS)
    x[::3, 0] = -1.0
    expected = expected_sums(x)
    expected[::3] = -1.0
    assert torch.equal(run_sums(canary, x, backwards), expected)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("left_out", BARRIERS)
def test_missing_barrier_shows(canary: ctypes.CDLL, left_out: int, mirrored: bool) -> None:
    """Without one of its barriers, the kernel is wrong in one order of threads: which one depends on the kernel."""
    x = make_blocks(3, THREADS)
    right = [torch.equal(run_sums(canary, x, order, left_out, mirrored), expected_sums(x)) for order in (False, True)]
    assert right == [mirrored, not mirrored]


def test_shared_memory_is_not_inherited(canary: ctypes.CDLL) -> None:
    """What a block stored in shared memory is gone in the next: there it is NaN until stored to."""
    out = torch.zeros(3, dtype=torch.float64)
    assert canary.unset(3, THREADS, False, pointer(out)) == SUCCESS
    assert out[0] == 1.0
    assert out[1:].isnan().all()


@either_order
@each_odd_one
@pytest.mark.parametrize("kind", DIVERGENCES, ids=["returns", "waits_twice", "other_barrier"])
def test_divergent_barrier_is_reported(canary: ctypes.CDLL, kind: int, odd_one: int, backwards: bool) -> None:
    """A barrier that one thread does not reach, or reaches alone, fails the launch; the next launch is sound."""
    assert canary.divergent(2, THREADS, backwards, kind, odd_one) == LAUNCH_FAILURE
    x = make_blocks(2, THREADS)
    assert torch.equal(run_sums(canary, x, backwards), expected_sums(x))


def test_no_divergence_without_an_odd_one(canary: ctypes.CDLL) -> None:
    """The same kernels succeed where no thread differs."""
    assert [canary.divergent(2, THREADS, False, kind, THREADS) for kind in DIVERGENCES] == [SUCCESS] * len(DIVERGENCES)


def run_lane_sums(canary: ctypes.CDLL, lanes: int, backwards: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`lane_sums` of canary.cu on three blocks of 64 threads, and what it has to give."""
    generator = torch.Generator().manual_seed(lanes)
    x = torch.randint(1, 9, (3 * 64 // lanes, lanes), generator=generator, dtype=torch.int32)
    x[::3, 0] = 0  # these lanes return
    out = torch.full_like(x, -1)
    assert canary.lane_sums(3, 64, backwards, lanes, pointer(x), pointer(out)) == SUCCESS
    expected = x.long()
    for _ in range(3):
        expected = expected * expected.sum(1, keepdim=True) % 2**32
    expected[::3] = 2**32 - 1
    return out.long() % 2**32, expected


@either_order
@pytest.mark.parametrize("lanes", [1, 2, 4, 8, 16, 32])
def test_lanes_exchange_values(canary: ctypes.CDLL, lanes: int, backwards: bool) -> None:
    """Sums over neighbouring lanes by butterflies are right, round after round, while other lanes have returned."""
    sums, expected = run_lane_sums(canary, lanes, backwards)
    assert torch.equal(sums, expected)


@either_order
@each_odd_one
@pytest.mark.parametrize("kind", range(len(MISTAKES)), ids=MISTAKES)
def test_mistaken_exchange_is_reported(canary: ctypes.CDLL, kind: int, odd_one: int, backwards: bool) -> None:
    """Lanes that do not meet, or not with the same mask and distance, fail the launch; the next launch is sound."""
    out = torch.empty(THREADS, dtype=torch.int32)
    assert canary.mistaken_exchange(2, THREADS, backwards, kind, odd_one, pointer(out)) == LAUNCH_FAILURE
    sums, expected = run_lane_sums(canary, 16, backwards)
    assert torch.equal(sums, expected)


def test_no_mistake_without_an_odd_one(canary: ctypes.CDLL) -> None:
    """The same kernel succeeds where no lane differs, and every lane gets its neighbour's number."""
    out = torch.empty(THREADS, dtype=torch.int32)
    neighbours = torch.arange(THREADS, dtype=torch.int32) ^ 1
    for kind in range(len(MISTAKES)):
        assert canary.mistaken_exchange(2, THREADS, False, kind, THREADS, pointer(out.fill_(-1))) == SUCCESS
        assert torch.equal(out, neighbours)


@either_order
@each_odd_one
def test_misaligned_access_between_barriers(canary: ctypes.CDLL, odd_one: int, backwards: bool) -> None:
    """It fails the launch while other threads wait, before its value is used; the next launch is sound."""
    x, out = make_blocks(2, THREADS), torch.zeros(1, dtype=torch.float64)
    arguments = (pointer(x), pointer(out))
    assert canary.misaligned(2, THREADS, backwards, odd_one, *arguments) == MISALIGNED_ADDRESS
    assert out == 0
    assert canary.misaligned(2, THREADS, backwards, THREADS, *arguments) == SUCCESS
    assert torch.equal(run_sums(canary, x, backwards), expected_sums(x))
