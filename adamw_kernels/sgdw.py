"""`FusedSGDW`: SGD with momentum and decoupled or L2 decay, with the options of torch's."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from adamw_kernels.optimizer import FusedOptimizer, ParamCopyT, ParamsT


class FusedSGDW(FusedOptimizer):
    r"""SGD with momentum and decoupled weight decay in one pass over memory: a drop-in for `torch.optim.SGD`.

    .. math::
        b_t &= \mu\,b_{t-1} + (1-\tau)\,g_t \qquad (b_1 = g_1) \\
        \theta_t &= \theta_{t-1} - (\mathrm{lr}\cdot b_t + \mathrm{lr}\,\lambda\,\theta_{t-1})

    With `nesterov`, :math:`g_t + \mu\,b_t` takes the place of :math:`b_t` in the second line.

    The paper's Algorithm 1 is `FusedSGDW(params, lr=alpha, momentum=beta_1, weight_decay=lambda, lr_in_momentum=True,
    decay_coupling="schedule")`, where schedules of lr are :math:`\eta_t\alpha`:

    .. math::
        m_t &= \beta_1 m_{t-1} + \eta_t\,\alpha\,g_t \\
        \theta_t &= \theta_{t-1} - m_t - \eta_t\,\lambda\,\theta_{t-1}

    Source: Loshchilov & Hutter, *Decoupled Weight Decay Regularization* (2019), Algorithm 1.

    The engine, and so launches, storage formats, clipping, guards, averages and bits, is that of :class:`FusedAdamW`.

    State per parameter: with momentum `momentum_buffer` as in torch (shape, device and layout of the parameter;
    float32, or float64 for float64 parameters), `step` (float32 scalar on the parameter's device), with `ema_decay`
    `param_ema`, beside split weights `param_remainder` or `param_remainder_8bit`. State dicts load both ways with
    `torch.optim.SGD`; a buffer that is loaded without a `step` is taken for one that has received its first gradient.

    Args:
        params: parameters, groups, or named parameters: float32, bfloat16, float16, float64 or complex tensors of any
            dense layout, on CPUs and GPUs.
        lr: learning rate; like momentum, dampening and weight_decay a float or a one-element tensor.
        momentum: :math:`\mu`, at least 0. Where it is 0 there is no buffer.
        dampening: :math:`\tau`. A parameter's first gradient is not dampened; the first one of a buffer that is made
            later, when momentum is switched on, is.
        weight_decay: :math:`\lambda`.
        nesterov: look ahead; needs momentum and no dampening.
        maximize: ascend instead of descend.
        foreach: accepted; there is one implementation, and it handles all tensors at once.
        differentiable: must be False: the update is invisible to autograd.
        fused: as :class:`FusedAdamW`: True lets `torch.amp.GradScaler` hand over its scale and its flag.
        decoupled: True: decay the weight (SGDW). False: add :math:`\lambda\theta` to the gradient (SGD with L2, which
            is what torch does).
        decay_coupling: "lr": decay by :math:`\mathrm{lr}\,\lambda`. "schedule" (the paper): by
            :math:`\eta_t\,\lambda`, :math:`\eta_t` being lr over the group's `initial_lr`; see :class:`FusedAdamW`.
        lr_in_momentum: lr multiplies what enters the buffer, not what leaves it (the paper): a change of lr then
            reaches the steps only as the buffer forgets. Under a constant lr both are the same. Buffers of the one are
            no buffers of the other, nor of torch's: neither loads into the other.
        max_grad_norm, clip_per_group, skip_nonfinite, max_skip_norm: as :class:`FusedAdamW`.
        ema_decay, ema_warmup, ema_format, param_format, process_group, param_copy, seed, backend: likewise.
        moment_format: of the momentum buffer: "float32" (float64 for float64 parameters) or "bfloat16".

    lr, momentum, dampening, weight_decay, nesterov, max_grad_norm, ema_decay, ema_warmup, ema_format, param_format,
    moment_format, decay_coupling and lr_in_momentum are options of each group.

    Raises:
        ValueError: a hyperparameter out of range, Nesterov without momentum, an unknown backend.
        TypeError: not a process group, no integer as seed; an average or a buffer too coarse for its parameter.
        RuntimeError: an option that cannot be met.
    """

    # By its betas a group is told to be Adam's.
    foreign_options: ClassVar[frozenset[str]] = frozenset(
        {"betas", "cautious", "cautious_weight_decay", "update_bound"}
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        momentum: float | torch.Tensor = 0.0,
        dampening: float | torch.Tensor = 0.0,
        weight_decay: float | torch.Tensor = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled: bool = True,
        decay_coupling: str = "lr",
        lr_in_momentum: bool = False,
        max_grad_norm: float | torch.Tensor | None = None,
        clip_per_group: bool = False,
        skip_nonfinite: bool = False,
        max_skip_norm: float | torch.Tensor | None = None,
        ema_decay: float | torch.Tensor | None = None,
        ema_warmup: bool = False,
        ema_format: str = "float32",
        param_format: str = "auto",
        moment_format: str = "float32",
        process_group: Any = None,
        param_copy: ParamCopyT = None,
        seed: int = 0,
        backend: str = "auto",
    ) -> None:
        """Check every option; nothing is allocated before the first step."""
        options: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled,
        }
        further = {
            "decay_coupling": decay_coupling,
            "lr_in_momentum": lr_in_momentum,
            "max_grad_norm": max_grad_norm,
            "ema_decay": ema_decay,
            "ema_warmup": ema_warmup,
            "ema_format": ema_format,
            "param_format": param_format,
            "moment_format": moment_format,
        }
        super().__init__(
            params,
            options,
            further,
            clip_per_group=clip_per_group,
            skip_nonfinite=skip_nonfinite,
            max_skip_norm=max_skip_norm,
            process_group=process_group,
            param_copy=param_copy,
            seed=seed,
            backend=backend,
        )
