"""How far the weights end from AdamW in float64, for every contender that runs in float32.

Measure: after 500 steps, the root-mean-square error of the weights against torch's single-tensor AdamW on float64
copies, from the same float32 start and on the same float32 gradients, over the mean distance that the float64 weights
moved. Gradients are a fixed mean for each weight plus fresh noise of the same size; their scale varies by weight over
two orders of magnitude. `tests/test_accuracy.py` asserts the same claim against a NumPy reference.
"""

from __future__ import annotations

import torch

from bench import contenders, rows
from bench.contenders import Contender

STEPS = 500
WEIGHTS = 8192
SEED = 2019
WEIGHT_SPREAD = 0.3

# lr, weight_decay, beta2.
SETTINGS = ((1e-3, 0.1, 0.999), (3e-4, 0.1, 0.95), (1e-5, 1e-2, 0.9999), (1e-6, 1e-2, 0.999))


def measure(device: torch.device, *, only: list[str] | None = None) -> list[rows.Row]:
    """Trains every available contender through every setting and returns its rows."""
    running, _ = contenders.available(device, torch.float32, only)
    reference = Contender("float64", "float64", contenders.torch_adamw(foreach=False, fused=False), (device.type,))
    result: list[rows.Row] = []
    for setting in SETTINGS:
        start, truth = train(reference, setting, device, torch.float64)
        moved = (truth - start).abs().mean()
        for contender in running:
            _, weights = train(contender, setting, device, torch.float32)
            error = ((weights.double() - truth).square().mean().sqrt() / moved).item()
            lr, weight_decay, beta2 = setting
            result.append(
                rows.AccuracyRow(
                    contender=contender.name,
                    lr=lr,
                    weight_decay=weight_decay,
                    beta2=beta2,
                    steps=STEPS,
                    weights=WEIGHTS,
                    weight_spread=WEIGHT_SPREAD,
                    relative_error=error,
                )
            )
    return result


def train(
    contender: Contender, setting: tuple[float, float, float], device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights before and after all steps; the same numbers in either dtype."""
    lr, weight_decay, beta2 = setting
    generator = torch.Generator().manual_seed(SEED)

    def normal() -> torch.Tensor:
        return torch.randn(WEIGHTS, generator=generator)

    start = (WEIGHT_SPREAD * normal()).to(device=device, dtype=dtype)
    scale, mean = 1e-3 * normal().exp(), normal()
    param = torch.nn.Parameter(start.clone())
    group = {"params": [param], "lr": lr, "weight_decay": weight_decay, "betas": (0.9, beta2)}
    optimizer = contender.build([group])
    for _ in range(STEPS):
        param.grad = (scale * (mean + normal())).to(device=device, dtype=dtype)
        optimizer.step()
    return start, param.detach()
