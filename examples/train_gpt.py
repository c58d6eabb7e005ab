"""Train a small byte-level GPT with FusedAdamW and with torch.optim.AdamW, and compare the two.

Plain PyTorch in one file, to be read from top to bottom: data, model, optimizer, training loop, summary.

The text is on every machine that can run this: the source of Python's own standard library, as bytes. So there is no
tokenizer and nothing to download. Both optimizers start from the same weights and see the same batches in the same
order, so what differs between the two runs is the optimizer alone.

    python examples/train_gpt.py                                         # a few minutes on two CPU cores
    python examples/train_gpt.py --preset tiny                           # seconds
    python examples/train_gpt.py --preset gpt2-124m --dtype bfloat16     # GPT-2 small; wants a GPU

Writes into --out: one CSV a run with a row a step, summary.json, and training.png (drawn by plot_training.py).
Ctrl-C stops the training and still writes all of them.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import platform
import sys
import sysconfig
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import plot_training
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

# A preset gives every flag that the user did not. `small` is sized so that both runs together take four to five
# minutes on two cores. `gpt2-124m` is the model of GPT-2 small to the last parameter (148 tensors, 124,439,808
# parameters); it is fed bytes like the others, so it uses only the first 256 rows of its 50,257-row embedding.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        layers=2, heads=2, width=64, block_size=64, vocab=256, batch_size=8, steps=100, lr=5e-3, warmup=5,
        val_windows=16,
    ),
    "small": dict(
        layers=4, heads=6, width=192, block_size=128, vocab=256, batch_size=8, steps=1500, lr=2e-3, warmup=60,
        val_windows=96,
    ),
    "gpt2-124m": dict(
        layers=12, heads=12, width=768, block_size=1024, vocab=50257, batch_size=8, steps=500, lr=6e-4, warmup=50,
        val_windows=32,
    ),
}  # fmt: skip
VALIDATIONS = 16  # a run, evenly spread; the last one after the last step
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# ------------------------------------------------------------------------------------------------------------- data


def standard_library_bytes() -> Tensor:
    """All Python source files of the running interpreter's standard library, one after the other, as uint8.

    The order is that of the sorted paths, so the same Python version gives the same text. Left out: installed
    packages, tests, what some distributions do not ship (IDLE, turtledemo), and files generated on the machine.
    """
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "idle_test", "lib2to3", "turtledemo"}
    files = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        generated = parts[0].startswith(("config-", "_sysconfigdata"))
        if not generated and skipped.isdisjoint(parts[:-1]):
            files.append(path)
    text = b"".join(path.read_bytes() for path in sorted(files, key=lambda path: path.relative_to(root).as_posix()))
    if len(text) < 1_000_000:
        raise SystemExit(
            f"train_gpt.py: the standard library of {sys.executable} has {len(text):,} bytes of Python source, "
            "expected several million; use a Python that ships its library as .py files, not zipped or compiled"
        )
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def windows(text: Tensor, starts: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Inputs and next-byte targets, both (len(starts), block_size), that begin at `starts`."""
    chunk = text.unfold(0, block_size + 1, 1)[starts].long()
    return chunk[:, :-1], chunk[:, 1:]


# ------------------------------------------------------------------------------------------------------------ model


@dataclass(frozen=True)
class GPTConfig:
    """The shape of the model."""

    layers: int
    heads: int
    width: int
    block_size: int
    vocab: int

    @classmethod
    def of(cls, args: argparse.Namespace) -> GPTConfig:
        """The shape that the flags ask for."""
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})


class Block(nn.Module):
    """One pre-norm transformer layer: causal self-attention, then a four times wider MLP."""

    def __init__(self, config: GPTConfig) -> None:
        """The weights of one layer."""
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, width) → the same shape."""
        batch, time_, width = x.shape
        qkv = self.query_key_value(self.attention_norm(x))
        q, k, v = qkv.view(batch, time_, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, time_, width))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x)), approximate="tanh"))


class GPT(nn.Module):
    """GPT-2: learned positions, biases everywhere, output weights tied to the token embedding."""

    def __init__(self, config: GPTConfig) -> None:
        """The weights, drawn as GPT-2's are."""
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab, config.width)
        self.position_embedding = nn.Embedding(config.block_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_norm = nn.LayerNorm(config.width)
        for name, param in self.named_parameters():  # the norms keep PyTorch's ones and zeros
            if param.dim() == 2:
                into_residual = name.endswith(("attention_out.weight", "mlp_out.weight"))
                nn.init.normal_(param, std=0.02 / math.sqrt(2 * config.layers) if into_residual else 0.02)
            elif "norm" not in name:
                nn.init.zeros_(param)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats per byte of (batch, time) inputs and targets."""
        positions = torch.arange(inputs.shape[1], device=inputs.device)
        x = self.token_embedding(inputs) + self.position_embedding(positions)
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.final_norm(x), self.token_embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


# -------------------------------------------------------------------------------------------------------- optimizer


def make_optimizer(name: str, model: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """FusedAdamW ("fused") or torch.optim.AdamW ("torch"); matrices and embeddings decay, biases and norms do not."""
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (0.9, args.beta2)
    if name == "torch":
        return torch.optim.AdamW(groups, lr=args.lr, betas=betas, eps=1e-8, fused=True)
    from adamw_kernels import FusedAdamW  # here, so that `--optimizer torch` also runs without the package

    return FusedAdamW(groups, lr=args.lr, betas=betas, eps=1e-8, max_grad_norm=args.clip, backend=args.backend)


def clip_and_step(optimizer: torch.optim.Optimizer, model: nn.Module, args: argparse.Namespace) -> Tensor:
    """One clipped step of either optimizer; the gradients' norm before clipping, which stays on the device."""
    if isinstance(optimizer, torch.optim.AdamW):
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        return grad_norm
    optimizer.step()  # clips as it goes
    return optimizer.grad_norm


def lr_factor(step: int, warmup: int, steps: int) -> float:
    """Linear warm-up to 1, then half a cosine down to 0.1."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.45 * (1.0 + math.cos(math.pi * progress))


# --------------------------------------------------------------------------------------------------------- training


class RunLog:
    """The rows of one run, as a list and as a CSV file.

    What a step computes stays on its device until `read`, which the loop calls every few steps. So on a GPU nothing
    in between waits for anything, and `optimizer.step()` is timed by a pair of events in the stream.
    """

    def __init__(self, path: Path, device: torch.device, tokens_per_step: int) -> None:
        """Open `path` and start the clock."""
        self.rows: list[dict[str, Any]] = []
        self._on_gpu = device.type == "cuda"
        self._tokens_per_step = tokens_per_step
        self._pending: list[tuple[float, Tensor, Tensor, Any, Any]] = []
        self._written = 0
        self._file = path.open("w", newline="")
        self._writer = csv.DictWriter(self._file, plot_training.COLUMNS)
        self._writer.writeheader()
        self._resumed = time.perf_counter()

    def now(self) -> Any:
        """A point in time: an event in the current stream, or the host's clock."""
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, lr: float, loss: Tensor, grad_norm: Tensor, start: Any, end: Any) -> None:
        """Remember one step; `start` and `end` enclose clipping and `optimizer.step()`."""
        self._pending.append((lr, loss, grad_norm, start, end))

    def read(self) -> None:
        """Turn the steps since the last call into rows. Waits for the device; the only place in the loop that does."""
        if not self._pending:
            return
        numbers = torch.stack([torch.stack((loss, norm.float())) for _, loss, norm, _, _ in self._pending]).tolist()
        speed = len(self._pending) * self._tokens_per_step / (time.perf_counter() - self._resumed)
        for (lr, _, _, start, end), (loss, norm) in zip(self._pending, numbers, strict=True):
            milliseconds = start.elapsed_time(end) if self._on_gpu else 1e3 * (end - start)
            values = (len(self.rows) + 1, lr, loss, None, norm, milliseconds, speed)
            self.rows.append(dict(zip(plot_training.COLUMNS, values, strict=True)))
        self._pending.clear()

    def write(self) -> None:
        """Append the new rows to the file and start the clock of the next ones."""
        self._writer.writerows(self.rows[self._written :])
        self._written = len(self.rows)
        self._file.flush()
        self._resumed = time.perf_counter()

    def close(self) -> None:
        """Read and write what is left."""
        self.read()
        self.write()
        self._file.close()


@torch.no_grad()
def validation_loss(model: nn.Module, text: Tensor, args: argparse.Namespace) -> float:
    """Mean loss on `args.val_windows` windows spread evenly over the validation text, the same ones every time."""
    last = len(text) - args.block_size - 1
    starts = torch.linspace(0, last, args.val_windows, dtype=torch.float64).long().to(text.device)
    total = sum(model(*windows(text, part, args.block_size)) * len(part) for part in starts.split(args.batch_size))
    return float(total) / args.val_windows


def train(name: str, train_text: Tensor, val_text: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """One run with one optimizer, "fused" or "torch". Its rows also go to `<out>/<name>.csv`, even if interrupted."""
    torch.manual_seed(args.seed)  # the same weights, and two lines below the same batches, for every optimizer
    model = GPT(GPTConfig.of(args))
    starts = torch.randint(len(train_text) - args.block_size, (args.steps, args.batch_size)).to(args.device)
    model.to(args.device, DTYPES[args.dtype])
    optimizer = make_optimizer(name, model, args)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, args.warmup, args.steps))

    interrupted = False
    bar = tqdm(total=args.steps, desc=f"{name:>5}", unit="step", dynamic_ncols=True)
    log = RunLog(args.out / f"{name}.csv", args.device, args.batch_size * args.block_size)
    try:
        for step in range(args.steps):
            loss = model(*windows(train_text, starts[step], args.block_size))
            loss.backward()
            lr = optimizer.param_groups[0]["lr"]
            start = log.now()
            grad_norm = clip_and_step(optimizer, model, args)
            end = log.now()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            log.add(lr, loss.detach(), grad_norm, start, end)
            bar.update()

            validate = (step + 1) * VALIDATIONS // args.steps > step * VALIDATIONS // args.steps
            if validate or (step + 1) % args.log_every == 0:
                log.read()
                row = log.rows[-1]
                if validate:
                    row["val_loss"] = validation_loss(model, val_text, args)
                log.write()
                bar.set_postfix_str(
                    f"loss {row['train_loss']:.3f}, {row['tokens_per_s']:,.0f} tokens/s, "
                    f"optimizer {row['optimizer_ms']:.2f} ms"
                )
    except KeyboardInterrupt:
        interrupted = True
    finally:
        log.close()
        bar.close()
    return summarise(name, model, optimizer, log) | {"interrupted": interrupted, "rows": log.rows}


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors that the optimizer keeps beside the parameters."""
    return sum(v.nbytes for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))


def summarise(name: str, model: nn.Module, optimizer: torch.optim.Optimizer, log: RunLog) -> dict[str, Any]:
    """What the table and the picture say about a run, without its first step, which allocates the state.

    Medians, because whatever else runs on the machine makes single steps many times slower.
    """
    params = list(model.parameters())
    parameters, state = sum(p.numel() for p in params), state_bytes(optimizer)
    warm = log.rows[1:] or log.rows
    val = [row["val_loss"] for row in warm if row["val_loss"] is not None]
    low, median, high = np.percentile([row["optimizer_ms"] for row in warm] or np.nan, (20, 50, 80)).tolist()
    return {
        "optimizer": plot_training.LABELS[name],
        "steps": len(log.rows),
        "train_loss": float(np.mean([row["train_loss"] for row in warm[-plot_training.LAST_STEPS :]] or np.nan)),
        "val_loss": val[-1] if val else np.nan,
        "optimizer_ms": {"p20": low, "median": median, "p80": high},
        "tokens_per_s": float(np.median([row["tokens_per_s"] for row in warm] or np.nan)),
        "parameters": parameters,
        "weight_bytes": sum(p.nbytes for p in params),
        "state_bytes": state,
        "state_bytes_per_parameter": state / parameters,
    }


# ------------------------------------------------------------------------------------------------------------- main


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The flags, with what was not given filled in from the preset."""
    parser = argparse.ArgumentParser(
        description="Train a byte-level GPT with FusedAdamW and with torch.optim.AdamW, and compare the two.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="small", help="gives every flag below whose default is None")
    add("--optimizer", choices=("fused", "torch", "both"), default="both", help="FusedAdamW, torch.optim.AdamW, both")
    add("--backend", default="auto", help="backend of FusedAdamW")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    add("--dtype", choices=DTYPES, default="float32", help="dtype of the weights, and of all the arithmetic on them")
    add("--steps", type=int, help="optimizer steps of each run")
    add("--batch-size", type=int, help="sequences a step")
    add("--block-size", type=int, help="bytes a sequence")
    add("--layers", type=int, help="transformer layers")
    add("--heads", type=int, help="attention heads; must divide the width")
    add("--width", type=int, help="width of the residual stream")
    add("--lr", type=float, help="peak learning rate")
    add("--warmup", type=int, help="steps of linear warm-up")
    add("--weight-decay", type=float, default=0.1, help="decay of matrices and embeddings")
    add("--beta2", type=float, default=0.95, help="decay rate of the second moment")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--seed", type=int, default=1337, help="of the weights and the batches")
    add("--log-every", type=int, default=10, help="steps between two readings of the loss and the clocks")
    add("--out", type=Path, default=Path("runs/train_gpt"), help="folder for the CSV files, summary.json and the PNG")
    args = parser.parse_args(argv)
    for key, value in PRESETS[args.preset].items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)

    for key in ("steps", "batch_size", "block_size", "layers", "heads", "width", "log_every"):
        if getattr(args, key) < 1:
            parser.error(f"--{key.replace('_', '-')} is {getattr(args, key)}, expected at least 1")
    if args.width % args.heads:
        parser.error(f"--width is {args.width}, expected a multiple of --heads, which is {args.heads}")
    try:
        args.device = torch.device(args.device)
    except RuntimeError as error:
        parser.error(f"--device: {error}")
    if args.device.type not in ("cpu", "cuda"):
        parser.error(f"--device is {args.device}, expected cpu, cuda or cuda:N")
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device is {args.device}, but torch {torch.__version__} finds no GPU; use --device cpu")
    return args


def describe_environment(args: argparse.Namespace) -> dict[str, str]:
    """Machine class and versions, for the table and the picture."""
    if args.device.type == "cuda":
        machine = torch.cuda.get_device_name(args.device)
    else:
        machine = f"{torch.get_num_threads()} CPU threads ({torch.backends.cpu.get_cpu_capability()})"
    versions = {"machine": machine, "python": platform.python_version(), "torch": torch.__version__}
    if args.optimizer != "torch":
        import adamw_kernels

        versions["adamw_kernels"] = adamw_kernels.__version__
    return versions


def main(argv: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Train with each of the optimizers asked for, print the summary, draw the picture.

    Args:
        argv: the flags; None takes the command line's.

    Returns:
        For "fused" and "torch", as far as they ran: the summary of the run, and its rows under "rows".
    """
    args = parse_arguments(argv)
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
        torch.set_float32_matmul_precision("high")  # TF32, as everybody trains float32 weights
    environment = describe_environment(args)
    text = standard_library_bytes().to(args.device)
    split = len(text) * 9 // 10
    args.out.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        sizes = [p.numel() for p in GPT(GPTConfig.of(args)).parameters()]
    print(f"{environment['machine']}; " + ", ".join(f"{k} {v}" for k, v in environment.items() if k != "machine"))
    print(f"text   {len(text):,} bytes of Python's standard library, the last {len(text) - split:,} for validation")
    print(f"model  {sum(sizes):,} {args.dtype} parameters in {len(sizes)} tensors")
    print(f"run    {args.steps:,} steps of {args.batch_size} x {args.block_size} bytes")

    results: dict[str, dict[str, Any]] = {}
    for name in ("fused", "torch") if args.optimizer == "both" else (args.optimizer,):
        results[name] = train(name, text[:split], text[split:], args)
        if results[name]["interrupted"]:
            print("interrupted: writing what there is", file=sys.stderr)
            break

    flags = {key: value if isinstance(value, (int, float)) else str(value) for key, value in vars(args).items()}
    runs = {name: {k: v for k, v in result.items() if k != "rows"} for name, result in results.items()}
    summary = {"environment": environment, "flags": flags, "runs": runs}
    (args.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(plot_training.summary_table(summary))
    print(f"\n{plot_training.draw(args.out)}")
    return results


if __name__ == "__main__":
    finished = main()
    sys.exit(130 if any(result["interrupted"] for result in finished.values()) else 0)
