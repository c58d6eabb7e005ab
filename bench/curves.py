"""Loss curves of the storage formats: the model of examples/train_gpt.py, same weights, same batches, several seeds.

Every run computes in bfloat16 under autocast; what differs is what the optimizer remembers. Small losses hardly tell
formats apart (`quality.py` does): this shows that nothing breaks in training.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import rows

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SEEDS = (1337, 1338, 1339)
STEPS = 1500
LOG_EVERY = 25  # steps averaged in a row
VALIDATIONS = 5  # on the last step of a row
VALIDATION_WINDOWS = 512


@dataclass(frozen=True)
class Run:
    """What one curve trains with: dtype of the weights, and formats, or torch's AdamW where `moment_format` is None."""

    name: str
    dtype: torch.dtype
    param_format: str = "native"
    moment_format: str | None = None


RUNS = (
    Run("float32/float32", torch.float32, "native", "float32"),
    Run("split32/float32", torch.bfloat16, "split32", "float32"),
    Run("split24/8bit", torch.bfloat16, "split24", "8bit"),
    Run("stochastic/8bit", torch.bfloat16, "stochastic", "8bit"),
    Run("native/bfloat16", torch.bfloat16, "native", "bfloat16"),
    Run("torch bfloat16", torch.bfloat16),
)


def train(run: Run, seed: int, device: torch.device) -> Iterator[rows.CurveRow]:
    """One run; a row every `LOG_EVERY` steps, with the validation loss where it was measured."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    import train_gpt  # type: ignore[import-not-found]

    args: argparse.Namespace = train_gpt.parse_arguments(
        ["--preset", "small", "--steps", str(STEPS), "--seed", str(seed), "--device", str(device)]
    )
    args.val_windows = VALIDATION_WINDOWS
    text = train_gpt.standard_library_bytes().to(device)
    split = len(text) * 9 // 10
    train_text, val_text = text[:split], text[split:]
    torch.manual_seed(seed)  # the same weights, and below the same batches, for every run
    model = train_gpt.GPT(train_gpt.GPTConfig.of(args))
    starts = torch.randint(len(train_text) - args.block_size, (STEPS, args.batch_size)).to(device)
    model.to(device, run.dtype)
    optimizer = make_optimizer(run, model, args)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: train_gpt.lr_factor(step, args.warmup, STEPS))
    losses: list[torch.Tensor] = []
    for step in range(1, STEPS + 1):
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(*train_gpt.windows(train_text, starts[step - 1], args.block_size))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(loss.detach())
        if step % LOG_EVERY == 0:
            validated = None
            if step % (STEPS // VALIDATIONS) == 0:
                with torch.autocast(device.type, torch.bfloat16):
                    validated = train_gpt.validation_loss(model, val_text, args)
            mean = float(torch.stack(losses).mean())
            losses.clear()
            state = train_gpt.state_bytes(optimizer) + sum(p.nbytes for p in model.parameters())
            kept = state / sum(p.numel() for p in model.parameters())
            yield rows.CurveRow(run.name, seed, step, mean, validated, kept)


def make_optimizer(run: Run, model: torch.nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """Matrices and embeddings decay, biases and norms do not."""
    params = [*model.parameters()]
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (0.9, args.beta2)
    if run.moment_format is None:
        return torch.optim.AdamW(groups, lr=args.lr, betas=betas, eps=1e-8, fused=True)
    from adamw_kernels import FusedAdamW

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="param_format='native'")
        return FusedAdamW(
            groups,
            lr=args.lr,
            betas=betas,
            eps=1e-8,
            param_format=run.param_format,
            moment_format=run.moment_format,
            seed=args.seed,
        )
