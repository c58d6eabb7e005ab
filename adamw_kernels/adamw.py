"""`FusedAdamW`: AdamW and Adam with the options of torch's."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from adamw_kernels.optimizer import FusedOptimizer, ParamCopyT, ParamsT


class FusedAdamW(FusedOptimizer):
    r"""AdamW in one pass over memory: a drop-in for `torch.optim.AdamW`.

    .. math::
        \theta_t = \theta_{t-1} - \Big(\mathrm{lr}\cdot\frac{\hat m_t}{\sqrt{\hat v_t} + \epsilon}
                   + \mathrm{lr}\,\lambda\,\theta_{t-1}\Big)

    The paper's Algorithm 2 is `FusedAdamW(params, lr=alpha, weight_decay=lambda, decay_coupling="schedule")`, where
    schedules of lr are :math:`\eta_t\alpha`:

    .. math::
        \theta_t = \theta_{t-1} - \eta_t \Big(\alpha\cdot\frac{\hat m_t}{\sqrt{\hat v_t} + \epsilon}
                   + \lambda\,\theta_{t-1}\Big)

    and with `decoupled=False` its Adam with L2, :math:`g_t + \lambda\theta_{t-1}` in the place of the gradient
    :math:`g_t` and no other decay.

    Source: Loshchilov & Hutter, *Decoupled Weight Decay Regularization* (2019), Algorithm 2.

    All tensors of all parameter groups that share a dtype combination are updated by one launch a device, whatever
    their learning rates, decays, betas and step counts. Same inputs give the same bits on every backend.

    State per parameter, as in torch: `step` (float32 scalar on the parameter's device), `exp_avg`, `exp_avg_sq`, with
    `amsgrad` `max_exp_avg_sq`, with `ema_decay` `param_ema` (shape, device and layout of the parameter; float32, or
    float64 for float64 parameters); beside split weights `param_remainder` (int16) or, under "split24",
    `param_remainder_8bit` (int8). 8-bit moments are `exp_avg_code`, `exp_avg_sq_code`, `moment_groups` and
    `exp_avg_sq_scale` instead: no values that other code could mistake for its own. State dicts load both ways with
    `torch.optim.AdamW` and `torch.optim.Adam`; see `export_state_dict`.

    Args:
        params: parameters, groups, or named parameters: float32, bfloat16, float16, float64 or complex tensors of any
            dense layout, on CPUs and GPUs.
        lr: learning rate; like betas, eps and weight_decay a float or a one-element tensor. A float32 or float64
            tensor on the parameters' device is read by the device itself on each step.
        betas: decay of the first and second moment, each in [0, 1).
        eps: added to the denominator.
        weight_decay: :math:`\lambda`.
        amsgrad: divide by the running maximum of the second moment.
        maximize: ascend instead of descend.
        foreach: accepted; there is one implementation, and it handles all tensors at once.
        capturable: accepted; there is one implementation, which never waits for the device. After one eager step it
            can be captured in a CUDA graph; see `upload_hyperparameters`.
        differentiable: must be False: the update is invisible to autograd.
        fused: True: `torch.amp.GradScaler` hands over its scale and its flag, and the device unscales and skips, as
            with torch's `fused=True`. None (as torch's default): the scaler unscales the gradients itself and skips
            on the host, which wrappers that clip or watch for skips (Lightning, accelerate) rely on. With True, call
            `unscale_` of FSDP1's ShardedGradScaler first: nowhere else does it agree on a scale with its peers.
        decoupled: True: decay the weight (AdamW). False: add :math:`\lambda\theta` to the gradient (Adam with L2).
        decay_coupling: what the weight decays by. "lr" (torch): :math:`\mathrm{lr}\,\lambda`. "schedule" (the paper):
            :math:`\eta_t\,\lambda`, :math:`\eta_t` being lr over the group's `initial_lr`; the lr can then be tuned
            without a change of the decay. torch's schedules write `initial_lr` when they are made: the group's lr at
            that time, but OneCycleLR and CyclicLR the low one that they start from, over which :math:`\eta_t` rises
            above 1. Until then, and under ReduceLROnPlateau, it is the group's lr when it was added. A group may also
            name it.
        cautious: no update of an element where first moment and gradient disagree in sign (Liang et al., Cautious
            Optimizers, 2024; without their rescaling by the mean of the mask).
        cautious_weight_decay: no decay of an element where it and the update disagree in sign (Chen et al., Cautious
            Weight Decay, 2025).
        max_grad_norm: gradients enter multiplied by min(1, max_grad_norm / (norm + 1e-6)), norm being the 2-norm of
            all (unscaled) gradients together, over all devices and shards. They are read once more and not written.
            A number or a one-element tensor above 0; infinity measures only.
        clip_per_group: norm is that of a group's own gradients.
        skip_nonfinite: a step whose gradients hold inf or NaN changes nothing.
        max_skip_norm: nor does one whose norm is larger than this, or NaN. A number or a one-element tensor.
        ema_decay: keep an average of the weights beside them, `ema = ema + (1 - ema_decay) (weight - ema)` after each
            step of a parameter, starting at the weight before its first. In [0, 1); a number or a one-element tensor.
        ema_warmup: use (1 + t) / (10 + t) as long as that is less than `ema_decay`.
        ema_format: "float32" (float64 for float64 parameters) or "bfloat16", rounded stochastically.
        param_format: how a bfloat16 or float16 weight remembers what its dtype cannot hold: "native" (nothing, rounded
            to nearest: what torch does, small updates are lost), "stochastic" (nothing, rounded by chance without
            bias), "split24" (8 more bits, an int8 beside it), "split32" (all of a float32's bits, an int16 beside it:
            updates as those of a float32 master weight). "auto": "split32". Wider weights hold everything themselves.
        moment_format: "float32" (float64 for float64 parameters), "bfloat16" (rounded stochastically) or "8bit" (8.5
            bits a moment; parameters below 4,096 elements keep float32).
        update_bound: :math:`|\hat m|/\sqrt{\hat v}` at most. "auto": where moments are rounded, the limit that exact
            ones cannot exceed under the present betas (7.27 in the long run for the default ones); None: no limit.
        process_group: over which plain tensors are shards, for norms and skips; DTensors know by themselves.
        param_copy: where steps also write the weights, rounded to nearest even: bfloat16 or float16 CPU tensors of
            their parameters' shape and layout, by parameter, or one a parameter in order (None where there is none);
            also an entry of a group. For float32 weights on a CPU whose model computes elsewhere. Filled at once;
            written by every step that writes the weight; see `write_param_copies`. In no state dict, and backend "cpu"
            only.
        seed: of the random bits of stochastic rounding, which depend on it, the parameter's position (or number, see
            `number_parameters`), its step count and the element's index alone. An int (modulo 2^64). Part of
            `state_dict()`.
        backend: "auto", "cpu", "triton" or "cuda"; see `adamw_kernels.describe()`.

    max_grad_norm, ema_decay, ema_warmup, ema_format, param_format, moment_format, update_bound, decay_coupling,
    cautious and cautious_weight_decay are options of each group.

    Raises:
        ValueError: a hyperparameter out of range, options that contradict each other, an unknown backend.
        TypeError: not a process group, no integer as seed; an average or moments too coarse for their parameter.
        RuntimeError: an option that cannot be met.
    """

    foreign_options: ClassVar[frozenset[str]] = frozenset({"lr_in_momentum"})

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float | torch.Tensor = 1e-8,
        weight_decay: float | torch.Tensor = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled: bool = True,
        decay_coupling: str = "lr",
        cautious: bool = False,
        cautious_weight_decay: bool = False,
        max_grad_norm: float | torch.Tensor | None = None,
        clip_per_group: bool = False,
        skip_nonfinite: bool = False,
        max_skip_norm: float | torch.Tensor | None = None,
        ema_decay: float | torch.Tensor | None = None,
        ema_warmup: bool = False,
        ema_format: str = "float32",
        param_format: str = "auto",
        moment_format: str = "float32",
        update_bound: float | str | None = "auto",
        process_group: Any = None,
        param_copy: ParamCopyT = None,
        seed: int = 0,
        backend: str = "auto",
    ) -> None:
        """Check every option; nothing is allocated before the first step."""
        options: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled,
        }
        further = {
            "decay_coupling": decay_coupling,
            "cautious": cautious,
            "cautious_weight_decay": cautious_weight_decay,
            "max_grad_norm": max_grad_norm,
            "ema_decay": ema_decay,
            "ema_warmup": ema_warmup,
            "ema_format": ema_format,
            "param_format": param_format,
            "moment_format": moment_format,
            "update_bound": update_bound,
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
