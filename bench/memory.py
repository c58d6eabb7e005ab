"""Peak memory of training, with gradients kept until the step and with `release_gradients`.

Every row is a process of its own, because a peak cannot be taken back: a chain of square linear layers is trained for a
few iterations on a batch so small that, of what an iteration allocates, the gradients are nearly all.

On a CPU the peak is the high-water mark of resident memory (`VmHWM`, where /proc has it: `ru_maxrss` of a process
begins at the one of the process that started it). The kernel offers no portable way to lower the mark, and the first
step reaches it already. So what is subtracted is what was resident before the model was made, after a tiny model was
trained the same way, which loads all code and starts all threads; weights and state, whose sizes are known, are
subtracted from the rest. On a GPU the peak is the CUDA allocator's, work space of the matrix products included.

Nothing is reported before it is checked: the losses must fall, and be those of the same training with torch's AdamW;
those of optimizers with moments of 8 bits nearly.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import os
import resource
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench import contenders, rows, traffic
from bench.contenders import BASELINE, CONTENDERS, Contender, Optimizer
from bench.machine import REPOSITORY

WIDTH = 2048
LAYERS = 16  # 67 M parameters in 16 MiB matrices: a released gradient is a sixteenth of all
BATCH = 8
ITERATIONS = 4
LR = 1e-5
SEED = 2017
MIB = 1 << 20
LIMIT_S = 300  # of one training

# Measured: torch's own implementations differ by 1e-7, FusedAdamW from them by 2e-6. A loss is a fifth below the one
# before; a training that left out a matrix would be off by 1e-2, one that left out the biases by 1e-4.
LOSS_TOLERANCE = 3e-5
COARSE_LOSS_TOLERANCE = 3e-2  # for whom the check of a step allows whole learning rates (`Contender.update_errors`)

# Memory that is freed goes back to the system at once, so that the mark is what was alive and not what malloc kept.
CHILD_SETTINGS = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": str(1 << 16)}


class MeasurementError(RuntimeError):
    """A training process failed or did not train."""


@dataclass(frozen=True)
class Peak:
    """What a training process reports.

    Attributes:
        tensors: Number of parameters' tensors.
        params: Number of elements.
        weight_bytes: Size of the parameters.
        state_bytes: Size of the optimizer's state.
        largest_grad_bytes: Size of the largest gradient.
        peak_bytes: The peak, less what was there before the model.
        source: Where it was read.
        losses: The loss of each iteration.
    """

    tensors: int
    params: int
    weight_bytes: int
    state_bytes: int
    largest_grad_bytes: int
    peak_bytes: int
    source: str
    losses: list[float]


class Chain(torch.nn.Module):
    """Linear layers with a nonlinearity, each added to what came before."""

    def __init__(self, width: int, layers: int, device: torch.device) -> None:
        """Draws the weights from `SEED`."""
        super().__init__()
        torch.manual_seed(SEED)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(width, width, device=device) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Applies all layers."""
        for layer in self.layers:
            x = x + torch.nn.functional.gelu(layer(x))
        return x


def measure(device: torch.device, *, only: list[str] | None = None) -> tuple[list[rows.Row], list[str]]:
    """Trains with every contender, and with each of our backends with gradients kept and released.

    Returns:
        Rows, and one line for every training that failed or whose losses are wrong.
    """
    running, _ = contenders.available(device, torch.float32, only)
    result: list[rows.Row] = []
    failures: list[str] = []
    try:
        wanted = run_process(CONTENDERS[BASELINE], device, released=False)
        check_losses(wanted, wanted.losses)
    except MeasurementError as failure:
        return [], [f"{BASELINE}: {failure}"]
    for contender in running:
        for released in (False, True) if contender.is_ours else (False,):
            try:
                peak = wanted if contender.name == BASELINE else run_process(contender, device, released=released)
                coarse = (contender.update_error(torch.float32) or 0.0) >= 1.0
                error = check_losses(peak, wanted.losses, COARSE_LOSS_TOLERANCE if coarse else LOSS_TOLERANCE)
            except MeasurementError as failure:
                failures.append(f"{contender.name}, gradients {spell(released)}: {failure}")
                continue
            result.append(memory_row(contender, released, peak, error))
    return result, failures


def run_process(contender: Contender, device: torch.device, *, released: bool) -> Peak:
    """Trains in a new process."""
    command = [sys.executable, "-m", "bench.memory", contender.name, spell(released)]
    command += ["--device", str(device), "--threads", str(torch.get_num_threads())]
    try:
        finished = subprocess.run(
            command,
            cwd=REPOSITORY,
            env={**os.environ, **CHILD_SETTINGS},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        raise MeasurementError(f"took more than {LIMIT_S} s") from None
    if finished.returncode != 0:
        raise MeasurementError((finished.stderr.strip().splitlines() or [f"exit status {finished.returncode}"])[-1])
    return Peak(**json.loads(finished.stdout.splitlines()[-1]))


def check_losses(peak: Peak, wanted: list[float], tolerance: float = LOSS_TOLERANCE) -> float:
    """The largest relative difference of a loss.

    Raises:
        MeasurementError: It is above `tolerance`, or a loss did not fall.
    """
    if not all(after < before for before, after in zip(peak.losses, peak.losses[1:], strict=False)):
        raise MeasurementError(f"the losses {peak.losses} do not fall")
    error = max(abs(loss / want - 1) for loss, want in zip(peak.losses, wanted, strict=True))
    if not error <= tolerance:
        raise MeasurementError(f"the losses {peak.losses} are not those of torch's AdamW, {wanted}")
    return error


def memory_row(contender: Contender, released: bool, peak: Peak, loss_error: float) -> rows.MemoryRow:
    """One training's row."""
    return rows.MemoryRow(
        contender=contender.name,
        gradients=spell(released),
        tensors=peak.tensors,
        params=peak.params,
        iterations=ITERATIONS,
        weight_mib=peak.weight_bytes / MIB,
        state_mib=peak.state_bytes / MIB,
        peak_mib=peak.peak_bytes / MIB,
        transient_mib=(peak.peak_bytes - peak.weight_bytes - peak.state_bytes) / MIB,
        largest_grad_mib=peak.largest_grad_bytes / MIB,
        source=peak.source,
        loss_error=loss_error,
    )


def spell(released: bool) -> str:
    """How rows call what happens to the gradients."""
    return "released" if released else "kept"


# --- in the process that trains -------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """Trains and prints a `Peak` as JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description="One training process of memory.csv.")
    parser.add_argument("contender", choices=list(CONTENDERS))
    parser.add_argument("gradients", choices=("kept", "released"))
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    peak = train_twice(CONTENDERS[options.contender], options.device, released=options.gradients == "released")
    print(json.dumps(asdict(peak)))


def train_twice(contender: Contender, device: torch.device, *, released: bool) -> Peak:
    """Trains a tiny model, then the one that counts."""
    train(Chain(16, 2, device), contender, device, released=released)
    gc.collect()
    before = current_bytes(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    model = Chain(WIDTH, LAYERS, device)
    optimizer, losses = train(model, contender, device, released=released)
    peak, source = peak_bytes(device)
    params = list(traffic.parameters(optimizer))
    return Peak(
        tensors=len(params),
        params=sum(param.numel() for param in params),
        weight_bytes=sum(param.nbytes for param in params),
        state_bytes=sum(tensor.nbytes for tensor in traffic.state_tensors(optimizer)),
        largest_grad_bytes=max(param.nbytes for param in params),
        peak_bytes=peak - before,
        source=source,
        losses=losses,
    )


def train(model: Chain, contender: Contender, device: torch.device, *, released: bool) -> tuple[Optimizer, list[float]]:
    """A few iterations on one batch, as a training loop would write them."""
    optimizer = contender.build([{"params": list(model.parameters()), "lr": LR, "weight_decay": 0.1}])
    generator = torch.Generator(device).manual_seed(SEED)
    width = next(model.parameters()).shape[-1]
    x, y = (torch.randn(BATCH, width, device=device, generator=generator) for _ in range(2))
    losses = []
    release = importlib.import_module("adamw_kernels").release_gradients if released else None
    with release(model, optimizer) if release else contextlib.nullcontext():
        for _ in range(ITERATIONS):
            loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step()  # released gradients: backward did the work, this only ends the iteration
            optimizer.zero_grad()
            losses.append(loss.item())
    return optimizer, losses


def current_bytes(device: torch.device) -> int:
    """Memory held now; where there is no way to tell, the most that was held so far."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    resident = status_bytes("VmRSS")
    return peak_bytes(device)[0] if resident is None else resident


def peak_bytes(device: torch.device) -> tuple[int, str]:
    """The most memory held so far, and where that was read."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "CUDA allocator"
    mark = status_bytes("VmHWM")
    if mark is not None:
        return mark, "VmHWM"
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "ru_maxrss"


def status_bytes(name: str) -> int | None:
    """An entry of /proc/self/status, or None if there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    kib = next((line.split()[1] for line in lines if line.startswith(f"{name}:")), None)
    return int(kib) * 1024 if kib is not None else None


if __name__ == "__main__":
    main()
