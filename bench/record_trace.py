"""The recorded gradient trace: how it was made, and how `quality` reads it.

    python -m bench.record_trace        # about 40 seconds on one core; writes bench/data/*.npz

The model is that of `examples/train_gpt.py` (3 layers, 4 heads, width 128, 128 bytes of context; 8 windows a step) on
the running Python's standard library, trained for 640 steps by torch's float32 AdamW: lr 2e-3 with 40 steps of warm-up
and a cosine, betas 0.9/0.95, decay 0.1 on matrices, gradients clipped to norm 1, seeds 0 (weights) and 1 (batches).
What is recorded is the clipped gradient of every step.

Of the 650,000 elements 2,816 are kept, so that the files stay small, in runs of 256 (or a whole vector): a format with
blocks of up to 256 sees true neighbours. They cover embedding rows of common, rare and never seen bytes, positions,
attention, MLP, biases (those of the keys have no gradient but rounding noise) and norms. Values are float16 after
multiplication by 2^10, rounded to 8 significant bits, which is what a bfloat16 gradient holds and what deflate can
shrink. Both Adams of a comparison see the same values, so this costs nothing.

Another Python has another library, and another machine rounds differently: a new recording differs from the committed
one in every value. Errors of formats on these elements are within 5 % of those on 12,032 elements of the same model,
and within a factor of five where a few exploding elements decide.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

DATA = Path(__file__).resolve().parent / "data"
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

STEPS = 640
WARMUP = 40
LR = 2e-3
BETAS = (0.9, 0.95)
BATCH = 8
CONTEXT = 128
WIDTH = 128

BLOCK = 256  # the largest block of a published format; every piece is padded to a multiple of it
SCALE = 2.0**10  # keeps gradients out of float16's subnormals; a power of two changes no digit

# What is kept: file, then parameter, then (first element, number of elements).
Piece = tuple[int, int]
KEPT: dict[str, dict[str, tuple[Piece, ...]]] = {
    "embeddings": {
        # two bytes each: "de" common, "@A" rare, 200 and 201 never in the text (they still push the logits down)
        "token_embedding.weight": ((100 * WIDTH, 256), (64 * WIDTH, 256), (200 * WIDTH, 256)),
    },
    "positions": {
        "position_embedding.weight": ((64 * WIDTH, 256),),
    },
    "attention": {
        "blocks.0.query_key_value.weight": ((96 * WIDTH, 256),),
        "blocks.1.attention_out.weight": ((64 * WIDTH, 256),),
        "blocks.2.query_key_value.bias": ((0, 256),),  # half queries, half keys
    },
    "mlp": {
        "blocks.1.mlp_in.weight": ((128 * WIDTH, 256),),
        "blocks.2.mlp_out.weight": ((32 * 4 * WIDTH, 256),),
        "blocks.1.mlp_in.bias": ((0, 256),),
    },
    "norms": {
        "blocks.0.attention_norm.weight": ((0, WIDTH),),
        "final_norm.bias": ((0, WIDTH),),
    },
}


def load(folder: Path = DATA) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """The trace as gradients of shape (steps, elements), and which elements are real.

    Every piece is padded with zeros to a multiple of `BLOCK` elements, as if it were a tensor of its own.
    """
    gradients, real = [], []
    for name in KEPT:
        with np.load(folder / f"{name}.npz") as file:
            for piece in np.split(file["grads"], np.cumsum(file["sizes"])[:-1]):
                size = len(piece)
                padding = -size % BLOCK
                gradients.append(np.pad(piece.T.astype(np.float32) / np.float32(SCALE), ((0, 0), (0, padding))))
                real.append(np.arange(size + padding) < size)
    return np.concatenate(gradients, axis=1), np.concatenate(real)


def record(steps: int, threads: int = 1) -> dict[str, npt.NDArray[np.float16]]:
    """Trains the model and returns the scaled gradients of each file's elements, of shape (elements, steps)."""
    sys.path.insert(0, str(EXAMPLES))
    train_gpt = importlib.import_module("train_gpt")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = train_gpt.GPTConfig(layers=3, heads=4, width=WIDTH, block_size=CONTEXT, vocab=256)
    model = train_gpt.GPT(config)
    text = train_gpt.standard_library_bytes()
    params = dict(model.named_parameters())
    matrices = [param for param in params.values() if param.dim() >= 2]
    vectors = [param for param in params.values() if param.dim() < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=1e-8)
    batches = torch.Generator().manual_seed(1)
    result = {
        name: np.zeros((sum(size for pieces in kept.values() for _, size in pieces), steps), np.float16)
        for name, kept in KEPT.items()
    }
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LR * train_gpt.lr_factor(step, WARMUP, STEPS)
        starts = torch.randint(len(text) - CONTEXT - 1, (BATCH,), generator=batches)
        loss = model(*train_gpt.windows(text, starts, CONTEXT))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for name, kept in KEPT.items():
            parts = [gradient(params[param])[a : a + size] for param, pieces in kept.items() for a, size in pieces]
            result[name][:, step] = (torch.cat(parts).bfloat16().float() * SCALE).half().numpy()
        optimizer.step()
        if (step + 1) % 80 == 0:
            print(f"step {step + 1:4}  loss {loss.item():.3f}", flush=True)
    return result


def gradient(param: torch.Tensor) -> torch.Tensor:
    """A parameter's gradient, flat."""
    assert param.grad is not None
    return param.grad.flatten()


def save(trace: dict[str, npt.NDArray[np.float16]], folder: Path) -> list[Path]:
    """Writes one file a part of the model and returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, grads in trace.items():
        sizes = np.array([size for pieces in KEPT[name].values() for _, size in pieces])
        paths.append(folder / f"{name}.npz")
        # (elements, steps): neighbours in the file are neighbours in time, whose exponents agree
        np.savez_compressed(paths[-1], grads=grads, sizes=sizes)
    return paths


def main(arguments: list[str] | None = None) -> int:
    """Records the trace and says what was written."""
    parser = argparse.ArgumentParser(prog="python -m bench.record_trace", description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="only the first steps of the run")
    parser.add_argument("--out", type=Path, default=DATA, help="folder of the files")
    options = parser.parse_args(arguments)
    for path in save(record(options.steps), options.out):
        print(f"{path}: {path.stat().st_size:,} bytes")
    gradients, real = load(options.out)
    print(f"{len(gradients)} steps, {real.sum():,} elements, {(gradients[:, real] == 0).mean():.2%} zeros")
    return 0


if __name__ == "__main__":
    sys.exit(main())
