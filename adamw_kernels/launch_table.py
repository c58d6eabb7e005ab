"""Launch tables: which tensors a step updates, where they live, how they are cut into chunks.

A table is built once, kept on its device and reused. A warm step rewrites the gradients' addresses and, where they
changed, the groups' hyperparameters; nothing else is sent again. The structs are those of `csrc/launch_table.h`.
"""

from __future__ import annotations

import math
import numbers
import sys
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from adamw_kernels.formats import DTYPE_CODES

if TYPE_CHECKING:
    from adamw_kernels.backends import Backend

# --- the layout, as csrc/launch_table.h declares it ---------------------------------------------------------------

WORDS_PER_ROW = 8  # int64 words of a TensorRow, a HyperRow and a coefficient row alike
ROW_PARAM, ROW_EXP_AVG, ROW_EXP_AVG_SQ, ROW_MAX_EXP_AVG_SQ, ROW_STEP, ROW_NUMEL, ROW_HYPER, ROW_FLAGS = range(8)
HYPER_SOURCE = 5  # word of a HyperRow that says, two bits a field, what each field holds
FROM_VALUE, FROM_FLOAT32, FROM_FLOAT64 = range(3)

AMSGRAD = 1
MAXIMIZE = 2
L2 = 4
FLOAT64 = 8
PARAM_DTYPE_SHIFT = 8
GRAD_DTYPE_SHIFT = 12
CHUNK_TENSOR_SHIFT = 32

LAYOUT: dict[str, Any] = {
    "tensor_row_bytes": 8 * WORDS_PER_ROW,
    "hyper_row_bytes": 8 * WORDS_PER_ROW,
    "coefficient_row_bytes": 8 * WORDS_PER_ROW,
    "launch_table_bytes": 64,
    "amsgrad": AMSGRAD,
    "maximize": MAXIMIZE,
    "l2": L2,
    "float64": FLOAT64,
    "param_dtype_shift": PARAM_DTYPE_SHIFT,
    "grad_dtype_shift": GRAD_DTYPE_SHIFT,
    "dtype_codes": tuple(DTYPE_CODES.values()),
    "from_float32": FROM_FLOAT32,
    "from_float64": FROM_FLOAT64,
    "chunk_tensor_shift": CHUNK_TENSOR_SHIFT,
}
"""Compared with `_C.layout()` when the compiled module is loaded: a stale build is refused."""

# Chunk sizes are multiples of this many elements, so that 16-byte accesses stay aligned from chunk to chunk.
CHUNK_MULTIPLE = 16

# More chunks than this and they grow instead: 8 MiB of chunk table serve any number of elements.
MAX_CHUNKS = 1 << 20

# Host copies of a table in flight before the host waits for the oldest one to arrive.
UPLOADS_IN_FLIGHT = 8

HYPERPARAMETERS = ("lr", "beta1", "beta2", "eps", "weight_decay")
"""The fields of a HyperRow, in order."""


# Bounds of a float in each of these fields: low <= value < high. The widest finite ones where any value is accepted.
_LOW = (-sys.float_info.max, 0.0, 0.0, 0.0, -sys.float_info.max)
_HIGH = (math.inf, 1.0, 1.0, math.inf, math.inf)


@dataclass(frozen=True)
class Hyperparameters:
    """One parameter group's hyperparameters: Python floats or one-element tensors."""

    lr: float | torch.Tensor
    beta1: float | torch.Tensor
    beta2: float | torch.Tensor
    eps: float | torch.Tensor
    weight_decay: float | torch.Tensor


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a table: local, strided, real tensors of one layout that have been checked."""

    name: str
    param: torch.Tensor
    grad_dtype: torch.dtype
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    max_exp_avg_sq: torch.Tensor | None
    step: torch.Tensor
    hyper: int
    amsgrad: bool
    maximize: bool
    decoupled: bool

    def flags(self) -> int:
        """The word TensorRow::flags."""
        return (
            (AMSGRAD if self.amsgrad else 0)
            | (MAXIMIZE if self.maximize else 0)
            | (0 if self.decoupled else L2)
            | (FLOAT64 if self.param.dtype == torch.float64 else 0)
            | DTYPE_CODES[self.param.dtype] << PARAM_DTYPE_SHIFT
            | DTYPE_CODES[self.grad_dtype] << GRAD_DTYPE_SHIFT
        )


@dataclass(frozen=True)
class Batch:
    """Chunks [begin, end) of a table, whose tensors share parameter and gradient dtype: one update launch."""

    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    begin: int
    end: int


def zero_words(count: int) -> array[int]:
    """`count` int64 zeros in host memory at a fixed address."""
    return array("q", bytes(8 * count))


def as_tensor(words: array[int]) -> torch.Tensor:
    """The same memory as a 1-D int64 CPU tensor."""
    return torch.frombuffer(words, dtype=torch.int64) if len(words) else torch.empty(0, dtype=torch.int64, device="cpu")


def cut_into_chunks(numels: Sequence[int], chunk_size: int) -> tuple[array[int], list[int]]:
    """Every chunk of tensors of these sizes, as `launch_table.h` writes it, and where each tensor's chunks end."""
    # No tensor operation here: torch's own threads do not survive a fork, and the user's default device is not ours.
    chunks = array("q")
    ends: list[int] = []
    for tensor, numel in enumerate(numels):
        first = tensor << CHUNK_TENSOR_SHIFT
        chunks.extend(range(first, first + -(-numel // chunk_size)))
        ends.append(len(chunks))
    return chunks, ends


class Upload:
    """Host words and their copy on a GPU, sent again only when they changed.

    The copy leaves from pinned memory, asynchronously. A slot is reused only after its copy has arrived, which
    makes the host wait only when it runs `UPLOADS_IN_FLIGHT` changed steps ahead of the device.
    """

    def __init__(self, words: array[int], device: torch.device) -> None:
        """Allocate the device tensor; nothing is sent yet."""
        self._host = as_tensor(words)
        self.on_device = torch.empty(len(words), dtype=torch.int64, device=device)
        self._pinned = torch.empty((UPLOADS_IN_FLIGHT, len(words)), dtype=torch.int64, device="cpu", pin_memory=True)
        self._arrived = [torch.cuda.Event() for _ in range(UPLOADS_IN_FLIGHT)]  # type: ignore[no-untyped-call]
        self._slot = -1

    def send(self) -> None:
        """Enqueue the copy on the current stream unless the device already has these words."""
        if self._slot >= 0 and torch.equal(self._pinned[self._slot], self._host):
            return
        slot = (self._slot + 1) % UPLOADS_IN_FLIGHT
        self._arrived[slot].synchronize()
        pinned = self._pinned[slot]
        pinned.copy_(self._host)
        self.on_device.copy_(pinned, non_blocking=True)
        self._arrived[slot].record(torch.cuda.current_stream(self.on_device.device))
        self._slot = slot  # last: an interrupt before this line makes the next step send again


class LaunchTable:
    """All of one device's tensors, in the order of their dtype combinations.

    Attributes:
        device: where the tensors live.
        batches: one entry a dtype combination.
        grads: int64 addresses, one a row, in host memory; 0 leaves a tensor alone.
        rows, chunks, coefficients, hypers, device_grads: int64 tensors on `device`.
    """

    def __init__(
        self, device: torch.device, specs: Sequence[TensorSpec], num_hypers: int, backend: Backend, chunk_size: int
    ) -> None:
        """Build every array and, on a GPU, send them."""
        self.device = device
        self.backend = backend
        self.num_tensors = len(specs)
        self.chunk_size = chunk_size

        words: list[int] = []
        for spec in specs:
            words += (
                spec.param.data_ptr(),
                spec.exp_avg.data_ptr(),
                spec.exp_avg_sq.data_ptr(),
                0 if spec.max_exp_avg_sq is None else spec.max_exp_avg_sq.data_ptr(),
                spec.step.data_ptr(),
                spec.param.numel(),
                spec.hyper,
                spec.flags(),
            )
        self._row_words = array("q", words)

        chunk_words, ends = cut_into_chunks(words[ROW_NUMEL::WORDS_PER_ROW], chunk_size)
        self.num_chunks = len(chunk_words)
        self.batches = self._find_batches(specs, ends)

        self.grads = zero_words(self.num_tensors)
        self._hyper_words = zero_words(num_hypers * WORDS_PER_ROW)
        self.hyper_words = memoryview(self._hyper_words)
        self.hyper_values = self.hyper_words.cast("B").cast("d")
        self._uploads: tuple[Upload, ...] = ()
        self.rows, self.chunks = as_tensor(self._row_words), as_tensor(chunk_words)
        self.device_grads, self.hypers = as_tensor(self.grads), as_tensor(self._hyper_words)
        if device.type != "cpu":
            # From pinned memory, so that the host does not wait for the device.
            self.rows, self.chunks = (
                words.pin_memory().to(device, non_blocking=True) for words in (self.rows, self.chunks)
            )
            self._uploads = (Upload(self.grads, device), Upload(self._hyper_words, device))
            self.device_grads, self.hypers = (upload.on_device for upload in self._uploads)
        self.coefficients = torch.empty(self.num_tensors * WORDS_PER_ROW, dtype=torch.int64, device=device)
        # The struct LaunchTable, in host memory, and its batches as the CUDA launcher reads them.
        self._struct = array(
            "q",
            [
                self.rows.data_ptr(),
                self.device_grads.data_ptr(),
                self.hypers.data_ptr(),
                self.coefficients.data_ptr(),
                self.chunks.data_ptr(),
                self.num_tensors,
                self.num_chunks,
                chunk_size,
            ],
        )
        self._batch_words = array("q")
        for batch in self.batches:
            codes = DTYPE_CODES[batch.param_dtype], DTYPE_CODES[batch.grad_dtype]
            self._batch_words.extend((*codes, batch.begin, batch.end))
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self.address = self._struct.buffer_info()[0]
        self.batches_address = self._batch_words.buffer_info()[0]

    @staticmethod
    def _find_batches(specs: Sequence[TensorSpec], chunk_ends: list[int]) -> list[Batch]:
        batches: list[Batch] = []
        begin = 0
        for i, spec in enumerate(specs):
            key = (spec.param.dtype, spec.grad_dtype)
            following = specs[i + 1] if i + 1 < len(specs) else None
            if following is None or (following.param.dtype, following.grad_dtype) != key:
                batches.append(Batch(*key, begin, chunk_ends[i]))
                begin = chunk_ends[i]
        return batches

    def slot(self, row: int) -> int:
        """Host address where the address of this row's gradient is written."""
        return self.grads.buffer_info()[0] + 8 * row

    def launch(self) -> None:
        """Run prepare and update for every tensor whose gradient address is not 0."""
        if self._stream is not None:
            stream = torch.cuda.current_stream(self.device)
            if stream != self._stream:
                # Freed, the table's memory must not be handed out while this other stream still reads it.
                for tensor in (self.rows, self.chunks, self.device_grads, self.hypers, self.coefficients):
                    tensor.record_stream(stream)
                self._stream = stream
        for upload in self._uploads:
            upload.send()
        self.backend.launch(self)


class HyperparameterRows:
    """Writes the groups' hyperparameters into every table, and keeps tensors among them live.

    A float is written by value. A one-element float32 or float64 tensor on the table's own device is read there by
    each step, through its address. A CPU tensor beside a GPU table is read by the host on each step, which needs no
    synchronisation; a tensor on another GPU is copied over on each step, on the device.

    Attributes:
        written: the objects, five a group, that the rows now hold. Kept here and not by the optimizer: a wrapper that
            copies an optimizer's `__dict__` shares the rows with it.
    """

    def __init__(self, tables: Sequence[LaunchTable]) -> None:
        """Remember the tables; `write_all` fills them."""
        self._tables = tables
        self.written: list[float | torch.Tensor] = []
        self._live: list[Callable[[], bool]] = []
        self._kept_alive: list[torch.Tensor] = []

    def write_all(self, values: Sequence[float | torch.Tensor]) -> None:
        """Write every row anew: five values a group, in the order of HYPERPARAMETERS, already checked."""
        self._live.clear()
        self._kept_alive.clear()
        self.written = [*values]
        for table in self._tables:
            for group in range(len(values) // len(HYPERPARAMETERS)):
                source = 0
                base = group * WORDS_PER_ROW
                for field in range(len(HYPERPARAMETERS)):
                    value = values[group * len(HYPERPARAMETERS) + field]
                    if isinstance(value, torch.Tensor):
                        source |= self._bind(table, base + field, value) << (2 * field)
                    else:
                        table.hyper_values[base + field] = value
                table.hyper_words[base + HYPER_SOURCE] = source

    def update(self, values: Sequence[float | torch.Tensor]) -> None:
        """Check and write the values that are other objects than those written last.

        Raises:
            ValueError: a value that `check_hyperparameters` refuses; then no row was written.
        """
        before = self.written
        changed = [i for i, (new, old) in enumerate(zip(values, before, strict=True)) if new is not old]
        fields = len(HYPERPARAMETERS)
        # A scheduler changes every group on every step: floats within their bounds are told at a glance.
        unusual = [
            i for i in changed if type(values[i]) is not float or not _LOW[i % fields] <= values[i] < _HIGH[i % fields]
        ]
        for group in sorted({i // fields for i in unusual}):
            check_hyperparameters(
                Hyperparameters(*values[group * fields : (group + 1) * fields]), f"param_groups[{group}]"
            )
        if any(isinstance(values[i], torch.Tensor) for i in unusual) or any(
            isinstance(before[i], torch.Tensor) for i in changed
        ):
            self.write_all(values)
            return
        self.written = [*values]
        for table in self._tables:
            for i in changed:
                table.hyper_values[i // fields * WORDS_PER_ROW + i % fields] = values[i]  # type: ignore[assignment]

    def _bind(self, table: LaunchTable, position: int, value: torch.Tensor) -> int:
        """Make a tensor's value reach word `position` of a table; what that word then holds."""
        if value.device == table.device and value.dtype in (torch.float32, torch.float64):
            self._kept_alive.append(value)

            dtype = value.dtype

            def point_at_it() -> bool:  # `tensor.data = ...` gives the same tensor other memory, even another dtype
                table.hyper_words[position] = value.data_ptr()
                return value.dtype == dtype and value.device == table.device

            point_at_it()
            self._live.append(point_at_it)
            return FROM_FLOAT32 if dtype == torch.float32 else FROM_FLOAT64
        if value.device.type == "cpu":

            def read_on_host() -> bool:
                table.hyper_values[position] = value.item()
                return True

            read_on_host()
            self._live.append(read_on_host)
            return FROM_VALUE
        mirror = torch.empty((), dtype=torch.float64, device=table.device)
        self._kept_alive.append(mirror)

        def copy_over() -> bool:
            mirror.copy_(value.detach().reshape(()), non_blocking=True)
            return True

        copy_over()
        self._live.append(copy_over)
        table.hyper_words[position] = mirror.data_ptr()
        return FROM_FLOAT64

    def refresh(self) -> bool:
        """Bring over the values or addresses of the tensors among the hyperparameters; False if one no longer fits."""
        return all([read() for read in self._live])


class LaunchPlan:
    """One step over any number of tensors: a table a device.

    `slots[i]` is the host address where the gradient's address of `specs[i]` goes before each `launch()`.
    """

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        num_hypers: int,
        choose: Callable[[torch.device], Backend],
        chunk_size: int | None = None,
    ) -> None:
        """Group by device, order by dtype combination, build the tables. Nothing is launched.

        Args:
            specs: checked tensors; their order is free and does not change any bit of the result.
            num_hypers: number of hyperparameter rows that `specs` refer to.
            choose: the backend for a device; raises where there is none.
            chunk_size: elements a chunk, instead of the backend's own choice.

        Raises:
            ValueError: `chunk_size` is not a positive multiple of CHUNK_MULTIPLE.
        """
        if chunk_size is not None and (chunk_size < CHUNK_MULTIPLE or chunk_size % CHUNK_MULTIPLE):
            raise ValueError(f"chunk_size is {chunk_size}; expected a positive multiple of {CHUNK_MULTIPLE}")
        by_device: dict[torch.device, list[int]] = {}
        for i, spec in enumerate(specs):
            by_device.setdefault(spec.param.device, []).append(i)
        self._places: list[tuple[LaunchTable, int]] = [None] * len(specs)  # type: ignore[list-item]  # filled below
        self.tables: list[LaunchTable] = []
        for device, members in by_device.items():
            backend = choose(device)
            members.sort(key=lambda i: (DTYPE_CODES[specs[i].param.dtype], DTYPE_CODES[specs[i].grad_dtype]))
            numel = sum(specs[i].param.numel() for i in members)
            size = chunk_size or backend.chunk_size
            while numel // size > MAX_CHUNKS:
                size *= 2
            table = LaunchTable(device, [specs[i] for i in members], num_hypers, backend, size)
            for row, i in enumerate(members):
                self._places[i] = (table, row)
            self.tables.append(table)
        self.slots = [table.slot(row) for table, row in self._places]
        self.hypers = HyperparameterRows(self.tables)
        # Whatever may fail (compiling a kernel, say) fails here, before anything is written.
        for table in self.tables:
            table.backend.warm_up(table)

    def write_grad(self, index: int, address: int) -> None:
        """Write the address of the gradient of `specs[index]`; 0 leaves it alone."""
        table, row = self._places[index]
        table.grads[row] = address

    def write_grads(self, addresses: Sequence[int]) -> None:
        """Write the address of every gradient; 0 leaves a tensor alone."""
        for index, address in enumerate(addresses):
            self.write_grad(index, address)

    def launch(self) -> None:
        """One step: prepare and update on every device."""
        for table in self.tables:
            table.launch()


def check_hyperparameters(hyper: Hyperparameters, where: str) -> None:
    """Refuse values with which a step would destroy the weights.

    Tensors on a GPU are checked for their shape alone: reading them would synchronise.

    Raises:
        ValueError: naming the hyperparameter, its value, and what is accepted.
    """
    for key in HYPERPARAMETERS:
        value = getattr(hyper, key)
        if isinstance(value, torch.Tensor):
            if value.numel() != 1 or value.is_complex():
                raise ValueError(
                    f"{where}: {key} is a tensor of shape {tuple(value.shape)} and dtype {value.dtype}; "
                    "expected a float or a tensor with one real element"
                )
            if value.device.type != "cpu":
                continue
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise ValueError(f"{where}: {key} is {value!r}; expected a finite number or a one-element tensor")
        value = float(value)
        if key in ("beta1", "beta2") and not 0.0 <= value < 1.0:
            raise ValueError(f"{where}: {key} is {value!r}; expected 0 <= {key} < 1")
        if key == "eps" and value < 0.0:
            raise ValueError(f"{where}: eps is {value!r}; expected eps >= 0")
