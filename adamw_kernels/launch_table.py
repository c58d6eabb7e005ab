"""Launch tables: which tensors a step updates, where they live, how they are cut into chunks.

A table is built once, kept on its device and reused. A warm step rewrites the gradients' addresses and, where they
changed, the groups' hyperparameters; nothing else is sent again. The structs are those of `csrc/launch_table.h`.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch

from adamw_kernels.control import DECISION_NORMS, SIGNALS, NormDomain, StepControl, Verdict, add_up
from adamw_kernels.formats import DTYPE_CODES, GROUP, MOMENT_FORMATS, PARAM_FORMATS
from adamw_kernels.hyperparameters import FROM_FLOAT32, FROM_FLOAT64, WORDS_PER_HYPER_ROW, HyperparameterRows

if TYPE_CHECKING:
    from adamw_kernels.backends import Backend

# --- the layout, as csrc/launch_table.h declares it ---------------------------------------------------------------

WORDS_PER_ROW = 16  # int64 words of a TensorRow
ROW_PARAM, ROW_EXP_AVG, ROW_EXP_AVG_SQ, ROW_MAX_EXP_AVG_SQ, ROW_STEP, ROW_NUMEL, ROW_HYPER, ROW_FLAGS = range(8)
ROW_EMA, ROW_NORM, ROW_RANDOM_STREAM, ROW_REMAINDER, ROW_GROUPS, ROW_SCALE = range(8, 14)
ROW_FIRST_ELEMENT, ROW_UPDATE_BOUND = range(14, 16)
COEFFICIENT_ROW_BYTES = 128
KEY_OFFSET = 120  # bytes into a coefficient row

AMSGRAD = 1
MAXIMIZE = 2
L2 = 4
FLOAT64 = 8
CAUTIOUS = 16
CAUTIOUS_DECAY = 32
CLIP = 64
EMA = 128
PARAM_DTYPE_SHIFT = 8
GRAD_DTYPE_SHIFT = 12
EMA_BFLOAT16 = 1 << 16
EMA_WARMUP = 1 << 17
BOUND = 1 << 18
SCHEDULE_DECAY = 1 << 19
PARAM_FORMAT_SHIFT = 20
MOMENT_FORMAT_SHIFT = 22
SGD = 1 << 24
MOMENTUM = 1 << 25
NESTEROV = 1 << 26
LR_IN_MOMENTUM = 1 << 27
# What tensors must share to be updated by one launch: rule, both dtypes, the moments' format.
COMBINATION = SGD | 0xF << PARAM_DTYPE_SHIFT | 0xF << GRAD_DTYPE_SHIFT | 3 << MOMENT_FORMAT_SHIFT
CHUNK_TENSOR_SHIFT = 32

# The shape of the sum behind a gradient norm: part of the arithmetic, unlike the chunks of an update.
NORM_CHUNK = 1 << 14
NORM_LANES = 1 << 10
WORDS_PER_DOMAIN = 4

MEASURE, DECIDE, UPDATE = 1, 2, 4  # stages of a step

LAYOUT: dict[str, Any] = {
    "tensor_row_bytes": 8 * WORDS_PER_ROW,
    "hyper_row_bytes": 8 * WORDS_PER_HYPER_ROW,
    "coefficient_row_bytes": COEFFICIENT_ROW_BYTES,
    "launch_table_bytes": 136,
    "amsgrad": AMSGRAD,
    "maximize": MAXIMIZE,
    "l2": L2,
    "float64": FLOAT64,
    "cautious": CAUTIOUS,
    "cautious_decay": CAUTIOUS_DECAY,
    "clip": CLIP,
    "ema": EMA,
    "ema_bfloat16": EMA_BFLOAT16,
    "ema_warmup": EMA_WARMUP,
    "bound": BOUND,
    "schedule_decay": SCHEDULE_DECAY,
    "sgd": SGD,
    "momentum": MOMENTUM,
    "nesterov": NESTEROV,
    "lr_in_momentum": LR_IN_MOMENTUM,
    "param_format_shift": PARAM_FORMAT_SHIFT,
    "moment_format_shift": MOMENT_FORMAT_SHIFT,
    "group": GROUP,
    "param_dtype_shift": PARAM_DTYPE_SHIFT,
    "grad_dtype_shift": GRAD_DTYPE_SHIFT,
    "dtype_codes": tuple(DTYPE_CODES.values()),
    "from_float32": FROM_FLOAT32,
    "from_float64": FROM_FLOAT64,
    "chunk_tensor_shift": CHUNK_TENSOR_SHIFT,
    "key_offset": KEY_OFFSET,
    "norm_chunk": NORM_CHUNK,
    "norm_lanes": NORM_LANES,
    "norm_domain_bytes": 8 * WORDS_PER_DOMAIN,
    "signals_bytes": 8 * SIGNALS,
    "decision_norms_offset": 8 * DECISION_NORMS,
    "measure": MEASURE,
    "decide": DECIDE,
    "update": UPDATE,
}
"""Compared with `_C.layout()` when the compiled module is loaded: a stale build is refused."""

# Chunk sizes are multiples of this many elements, so that 16-byte accesses stay aligned from chunk to chunk and no
# group of 8-bit moments is cut.
CHUNK_MULTIPLE = 16

# More chunks than this and they grow instead: 8 MiB of chunk table serve any number of elements.
MAX_CHUNKS = 1 << 20

# Host copies of a table in flight before the host waits for the oldest one to arrive.
UPLOADS_IN_FLIGHT = 8


@dataclass(slots=True, eq=False)  # not frozen: that would cost 4 us a tensor more
class TensorSpec:
    """One tensor of a table: local, strided, real tensors of one layout that have been checked.

    `rule` is "adamw" or "sgdw". SGD's momentum buffer is `exp_avg`, None without momentum; it has no `exp_avg_sq`.
    """

    name: str
    param: torch.Tensor
    grad_dtype: torch.dtype
    exp_avg: torch.Tensor | None
    exp_avg_sq: torch.Tensor | None
    max_exp_avg_sq: torch.Tensor | None
    step: torch.Tensor
    hyper: int
    rule: str = "adamw"
    nesterov: bool = False
    lr_in_momentum: bool = False
    schedule_decay: bool = False
    amsgrad: bool = False
    maximize: bool = False
    decoupled: bool = True
    cautious: bool = False
    cautious_decay: bool = False
    clip: bool = False
    ema: torch.Tensor | None = None
    ema_warmup: bool = False
    domain: NormDomain = NormDomain()
    random_stream: int = 0
    param_format: str = "native"
    moment_format: str = "float32"
    remainder: torch.Tensor | None = None
    groups: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    first_element: int = 0
    update_bound: float = math.inf  # times lr; negative: what exact moments cannot exceed
    copy: torch.Tensor | None = None  # where the weights are also written, on a CPU

    def flags(self) -> int:
        """The word TensorRow::flags."""
        is_sgd = self.rule == "sgdw"
        return (
            (AMSGRAD if self.amsgrad else 0)
            | (MAXIMIZE if self.maximize else 0)
            | (0 if self.decoupled else L2)
            | (FLOAT64 if self.param.dtype == torch.float64 else 0)
            | (CAUTIOUS if self.cautious else 0)
            | (CAUTIOUS_DECAY if self.cautious_decay else 0)
            | (CLIP if self.clip else 0)
            | (0 if self.ema is None else EMA)
            | (EMA_BFLOAT16 if self.ema is not None and self.ema.dtype == torch.bfloat16 else 0)
            | (EMA_WARMUP if self.ema_warmup else 0)
            | (BOUND if self.update_bound != math.inf else 0)
            | (SCHEDULE_DECAY if self.schedule_decay else 0)
            | (SGD if is_sgd else 0)
            | (MOMENTUM if is_sgd and self.exp_avg is not None else 0)
            | (NESTEROV if self.nesterov else 0)
            | (LR_IN_MOMENTUM if self.lr_in_momentum else 0)
            | PARAM_FORMATS.index(self.param_format) << PARAM_FORMAT_SHIFT
            | MOMENT_FORMATS.index(self.moment_format) << MOMENT_FORMAT_SHIFT
            | DTYPE_CODES[self.param.dtype] << PARAM_DTYPE_SHIFT
            | DTYPE_CODES[self.grad_dtype] << GRAD_DTYPE_SHIFT
        )


@dataclass(frozen=True)
class Batch:
    """Chunks [begin, end) of a table, whose tensors share the flags in COMBINATION: one update launch."""

    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    moment_format: str
    rule: str
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
    counts = [-(-numel // chunk_size) for numel in numels]
    numbers = array("i", range(max(counts, default=0)))
    halves = array("i"), array("i")  # of every word: the chunk within its tensor, the tensor
    for tensor, count in enumerate(counts):
        halves[0].extend(numbers[:count])
        halves[1].extend(array("i", (tensor,)) * count)
    chunks = zero_words(len(halves[0]))
    with memoryview(chunks).cast("B").cast("i") as words:
        words[0::2], words[1::2] = halves
    return chunks, list(accumulate(counts))


class Upload:
    """Host words and their copy on a GPU, sent again only when they changed.

    The copy leaves from pinned memory, asynchronously. A slot is reused only after its copy has arrived, which
    makes the host wait only when it runs `UPLOADS_IN_FLIGHT` changed steps ahead of the device.

    A copy that is captured in a CUDA graph reads its slot again on every replay, so that slot is set aside for good;
    it is reserved beforehand, because pinned memory cannot be allocated during a capture.
    """

    def __init__(self, words: array[int], device: torch.device) -> None:
        """Allocate the device tensor; nothing is sent yet."""
        self._host = as_tensor(words)
        self.on_device = torch.empty(len(words), dtype=torch.int64, device=device)
        self._pinned = torch.empty((UPLOADS_IN_FLIGHT, len(words)), dtype=torch.int64, device="cpu", pin_memory=True)
        self._arrived = [torch.cuda.Event() for _ in range(UPLOADS_IN_FLIGHT)]  # type: ignore[no-untyped-call]
        self._slot = -1
        self._reserved: torch.Tensor | None = self._pinned_words()
        self._captured: list[torch.Tensor] = []  # read by graphs

    def _pinned_words(self) -> torch.Tensor:
        return torch.empty(len(self._host), dtype=torch.int64, device="cpu", pin_memory=True)

    def is_current(self) -> bool:
        """Whether the words on the device, sent by `send`, are the host's."""
        return self._slot >= 0 and torch.equal(self._pinned[self._slot], self._host)

    def send(self) -> None:
        """Enqueue the copy on the current stream unless the device already has these words."""
        # A replay may have written its own words since; nobody tells us.
        if not self._captured and self.is_current():
            return
        if self._reserved is None:
            self._reserved = self._pinned_words()
        slot = (self._slot + 1) % UPLOADS_IN_FLIGHT
        self._arrived[slot].synchronize()
        pinned = self._pinned[slot]
        pinned.copy_(self._host)
        self.on_device.copy_(pinned, non_blocking=True)
        self._arrived[slot].record(torch.cuda.current_stream(self.on_device.device))
        self._slot = slot  # last: an interrupt before this line makes the next step send again

    def capture(self) -> None:
        """Make the copy of these words part of the CUDA graph that is being captured.

        Raises:
            RuntimeError: no slot is left.
        """
        if self._reserved is None:
            raise RuntimeError(
                "this optimizer's step was captured in a CUDA graph a moment ago; take one eager step before capturing "
                "it again, so that the second graph gets host memory of its own"
            )
        slot, self._reserved = self._reserved, None
        slot.copy_(self._host)
        self._captured.append(slot)
        self.on_device.copy_(slot, non_blocking=True)


class LaunchTable:
    """All of one device's tensors, in the order of their dtype combinations.

    Attributes:
        device: where the tensors live.
        batches: one entry a dtype combination.
        grads: int64 addresses, one a row, in host memory; 0 leaves a tensor alone.
        rows, chunks, coefficients, hypers, device_grads: int64 tensors on `device`.
        norm_chunks, domains, partials, totals: of the sums of squares, on `device`; empty where nothing is measured.
        num_domains: how many there are, over all tables alike.
    """

    def __init__(
        self,
        device: torch.device,
        specs: Sequence[TensorSpec],
        num_hypers: int,
        backend: Backend,
        chunk_size: int,
        *,
        order: Sequence[int] | None = None,
        domains: Sequence[NormDomain] = (),
        verdict: Verdict | None = None,
        measured: bool = False,
    ) -> None:
        """Build every array and, on a GPU, send them.

        Args:
            device: where the tensors live.
            specs: them, by dtype combination.
            num_hypers: number of hyperparameter rows.
            backend: what launches the table.
            chunk_size: elements a chunk of the update.
            order: positions in `specs` in the order of the parameters, in which squares are added up.
            domains: of all tables, by norm.
            verdict: where the step's decision is kept; by default one that always says: apply.
            measured: whether norms are wanted.
        """
        self.device = device
        self.backend = backend
        self.num_tensors = len(specs)
        self.chunk_size = chunk_size

        def addresses(of: str) -> list[int]:
            return [0 if tensor is None else tensor.data_ptr() for tensor in map(attrgetter(of), specs)]

        # A column at a time, comprehensions and slices: faster than a tuple a row.
        columns = {
            ROW_PARAM: addresses("param"),
            ROW_EXP_AVG: addresses("exp_avg"),
            ROW_EXP_AVG_SQ: addresses("exp_avg_sq"),
            ROW_MAX_EXP_AVG_SQ: addresses("max_exp_avg_sq"),
            ROW_STEP: addresses("step"),
            ROW_NUMEL: [spec.param.numel() for spec in specs],
            ROW_HYPER: [spec.hyper for spec in specs],
            ROW_FLAGS: [spec.flags() for spec in specs],
            ROW_EMA: addresses("ema"),
            ROW_NORM: [spec.domain.norm for spec in specs],
            ROW_RANDOM_STREAM: [spec.random_stream for spec in specs],
            ROW_REMAINDER: addresses("remainder"),
            ROW_GROUPS: addresses("groups"),
            ROW_SCALE: addresses("scale"),
            ROW_FIRST_ELEMENT: [spec.first_element for spec in specs],
            ROW_UPDATE_BOUND: array("q", array("d", [spec.update_bound for spec in specs]).tobytes()),
        }
        words = zero_words(len(specs) * WORDS_PER_ROW)
        for word, column in columns.items():
            words[word::WORDS_PER_ROW] = array("q", column)
        self._row_words = words
        # ParamCopy of each tensor: address, dtype.
        self._copy_words = array("q")
        if any(spec.copy is not None for spec in specs):
            for spec in specs:
                self._copy_words.extend(
                    (0, 0) if spec.copy is None else (spec.copy.data_ptr(), DTYPE_CODES[spec.copy.dtype])
                )

        numels = words[ROW_NUMEL::WORDS_PER_ROW]
        chunk_words, ends = cut_into_chunks(numels, chunk_size)
        self.num_chunks = len(chunk_words)
        self.batches = self._find_batches(specs, words[ROW_FLAGS::WORDS_PER_ROW], ends)
        self.num_domains = len(domains)
        norm_chunk_words, domain_words = array("q"), array("q")
        rows_of: dict[NormDomain, list[int]] = {domain: [] for domain in domains}
        for row in (range(len(specs)) if order is None else order) if measured else ():
            rows_of[specs[row].domain].append(row)
        for domain, rows in rows_of.items():
            begin = len(norm_chunk_words)
            for row in rows:
                first = row << CHUNK_TENSOR_SHIFT
                norm_chunk_words.extend(range(first, first + -(-numels[row] // NORM_CHUNK)))
            domain_words.extend((begin, len(norm_chunk_words), domain.norm, 0))
        self.num_norm_chunks = len(norm_chunk_words)

        self.grads = zero_words(self.num_tensors)
        self._hyper_words = zero_words(num_hypers * WORDS_PER_HYPER_ROW)
        self.hyper_words = memoryview(self._hyper_words)
        self.hyper_values = self.hyper_words.cast("B").cast("d")
        self._uploads: tuple[Upload, ...] = ()
        self._constants = self._row_words, chunk_words, norm_chunk_words, domain_words
        self.rows, self.chunks, self.norm_chunks, self.domains = (as_tensor(words) for words in self._constants)
        self.device_grads, self.hypers = as_tensor(self.grads), as_tensor(self._hyper_words)
        if device.type != "cpu":
            # From pinned memory, so that the host does not wait for the device.
            self.rows, self.chunks, self.norm_chunks, self.domains = (
                tensor.pin_memory().to(device, non_blocking=True)
                for tensor in (self.rows, self.chunks, self.norm_chunks, self.domains)
            )
            self._uploads = (Upload(self.grads, device), Upload(self._hyper_words, device))
            self.device_grads, self.hypers = (upload.on_device for upload in self._uploads)
        self.coefficients = torch.empty(self.num_tensors * COEFFICIENT_ROW_BYTES // 8, dtype=torch.int64, device=device)
        self.partials = torch.empty(self.num_norm_chunks, dtype=torch.float64, device=device)
        self.totals = torch.zeros(self.num_domains + 1, dtype=torch.float64, device=device)
        self.verdict = verdict or Verdict(device, 1)
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
                self.verdict.decision.data_ptr(),
                self.verdict.signals.data_ptr(),
                self.norm_chunks.data_ptr(),
                self.num_norm_chunks,
                self.partials.data_ptr(),
                self.domains.data_ptr(),
                self.num_domains,
                self.totals.data_ptr(),
                self._copy_words.buffer_info()[0] if self._copy_words else 0,
            ],
        )
        self._batch_words = array("q")
        for batch in self.batches:
            dtypes = DTYPE_CODES[batch.param_dtype], DTYPE_CODES[batch.grad_dtype]
            moments = MOMENT_FORMATS.index(batch.moment_format)
            self._batch_words.extend((int(batch.rule == "sgdw"), *dtypes, moments, batch.begin, batch.end))
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self.address = self._struct.buffer_info()[0]
        self.batches_address = self._batch_words.buffer_info()[0]

    @staticmethod
    def _find_batches(specs: Sequence[TensorSpec], flags: Sequence[int], chunk_ends: list[int]) -> list[Batch]:
        batches: list[Batch] = []
        begin = 0
        for _, members in groupby(range(len(specs)), lambda i: flags[i] & COMBINATION):
            *_, last = members
            spec, end = specs[last], chunk_ends[last]
            shared = spec.param.dtype, spec.grad_dtype, spec.moment_format, spec.rule
            batches.append(Batch(*shared, begin, end))
            begin = end
        return batches

    def slot(self, row: int) -> int:
        """Host address where the address of this row's gradient is written."""
        return self.grads.buffer_info()[0] + 8 * row

    def launch(self, stages: int, *, capturing: bool = False) -> None:
        """Run these stages, in one call, for every tensor whose gradient address is not 0.

        Args:
            stages: MEASURE, DECIDE, UPDATE, added up.
            capturing: the current stream is being captured in a CUDA graph.
        """
        if self._stream is not None:
            stream = torch.cuda.current_stream(self.device)
            if stream != self._stream:
                # Freed, the table's memory must not be handed out while this other stream still reads it.
                for tensor in self._device_tensors():
                    tensor.record_stream(stream)
                self._stream = stream
        if self._uploads:
            grads, hypers = self._uploads
            if not capturing:
                grads.send()
                hypers.send()
            elif stages & (MEASURE if self.num_norm_chunks else UPDATE):  # the first stage to read them
                grads.capture()
        self.backend.launch(self, stages)

    def send_hyperparameters(self) -> None:
        """Bring the device's rows up to date, between replays of a captured step, say."""
        for upload in self._uploads[1:]:
            upload.send()

    def has_current_hyperparameters(self) -> bool:
        """Whether the device's rows are up to date."""
        return all(upload.is_current() for upload in self._uploads[1:])

    def _device_tensors(self) -> tuple[torch.Tensor, ...]:
        read = self.rows, self.chunks, self.device_grads, self.hypers, self.coefficients
        decided = self.verdict.signals, self.verdict.decision
        return (*read, self.norm_chunks, self.domains, self.partials, self.totals, *decided)


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
        control: StepControl | None = None,
        stages: int | None = None,
        domains: Iterable[NormDomain] = (),
        home: torch.device | None = None,
    ) -> None:
        """Group by device, order by dtype combination, build the tables. Nothing is launched.

        Args:
            specs: checked tensors. Their order is that in which a gradient norm is summed; no other bit depends on it.
            num_hypers: number of hyperparameter rows that `specs` refer to.
            choose: the backend for a device; raises where there is none.
            chunk_size: elements a chunk, instead of the backend's own choice.
            control: what decides over each step; None: every step is applied, with gradients as they are.
            stages: which will ever be launched; by default what `launch` needs.
            domains: in the order of their sums. Beyond those of `specs`, ones of tensors that have no gradient here but
                may have one in another process, which expects this one to take part.
            home: where to decide if `specs` is empty.

        Raises:
            ValueError: `chunk_size` is not a positive multiple of CHUNK_MULTIPLE.
        """
        if chunk_size is not None and (chunk_size < CHUNK_MULTIPLE or chunk_size % CHUNK_MULTIPLE):
            raise ValueError(f"chunk_size is {chunk_size}; expected a positive multiple of {CHUNK_MULTIPLE}")
        by_device: dict[torch.device, list[int]] = {}
        for i, spec in enumerate(specs):
            by_device.setdefault(spec.param.device, []).append(i)
        self.control = control
        if not specs and control is not None and home is not None:
            by_device[home] = []
        found = dict.fromkeys((*domains, *(spec.domain for spec in specs)))
        self.domains = sorted(found, key=lambda domain: domain.norm)
        self._places: list[tuple[LaunchTable, int]] = [None] * len(specs)  # type: ignore[list-item]  # filled below
        self.tables: list[LaunchTable] = []
        for device, members in by_device.items():
            backend = choose(device)
            members.sort(key=lambda i: specs[i].flags() & COMBINATION)
            numel = sum(specs[i].param.numel() for i in members)
            size = chunk_size or backend.chunk_size
            while numel // size > MAX_CHUNKS:
                size *= 2
            rows = {i: row for row, i in enumerate(members)}
            table = LaunchTable(
                device,
                [specs[i] for i in members],
                num_hypers,
                backend,
                size,
                order=[rows[i] for i in sorted(members)],
                domains=self.domains,
                verdict=control.verdict(device) if control else None,
                measured=control is not None and control.measures,
            )
            for i, row in rows.items():
                self._places[i] = (table, row)
            self.tables.append(table)
        self.slots = [table.slot(row) for table, row in self._places]
        self.hypers = HyperparameterRows(self.tables)
        # Whatever may fail (compiling a kernel, say) fails here, before anything is written.
        for table in self.tables:
            table.backend.warm_up(table, stages or (UPDATE if control is None else MEASURE | DECIDE | UPDATE))

    def write_grad(self, index: int, address: int) -> None:
        """Write the address of the gradient of `specs[index]`; 0 leaves it alone."""
        table, row = self._places[index]
        table.grads[row] = address

    def write_grads(self, addresses: Sequence[int]) -> None:
        """Write the address of every gradient; 0 leaves a tensor alone."""
        for index, address in enumerate(addresses):
            self.write_grad(index, address)

    def launch(self, *, capturing: bool = False) -> None:
        """One step on every device: measure and decide where there is something to decide, then update."""
        if self.control is None:
            for table in self.tables:
                table.launch(UPDATE, capturing=capturing)
            return
        if len(self.tables) == 1 and not any(domain.process_groups for domain in self.domains):
            self.tables[0].launch(MEASURE | DECIDE | UPDATE, capturing=capturing)
            return
        self.measure(capturing=capturing)
        for table in self.tables:
            table.launch(DECIDE | UPDATE, capturing=capturing)

    def measure(self, *, capturing: bool = False) -> None:
        """The totals of every domain, over all tables and processes, into every table."""
        if not self.tables:
            return
        for table in self.tables:
            table.launch(MEASURE, capturing=capturing)
        agreement = None if self.control is None else self.control.agreement
        add_up([table.totals for table in self.tables], self.domains, agreement)
