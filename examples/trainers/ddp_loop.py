"""DistributedDataParallel with gradients that are views of its buckets, and an average of the weights.

    torchrun --nproc-per-node 2 examples/trainers/ddp_loop.py               # seconds on a CPU
    torchrun --nproc-per-node 2 examples/trainers/ddp_loop.py --resume      # from the newest checkpoint in --out

All ranks have the same gradients, take the same step and need no word of each other for it.
"""

import torch
import torch.distributed as dist
from little_gpt import LittleGPT, batch_of_step, newest, options, rows_of_text, start_rank
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from adamw_kernels import FusedAdamW


def main(argv: list[str] | None = None) -> None:
    """Train; rank 0 prints the losses."""
    args = options(__doc__, "runs/ddp_loop").parse_args(argv)
    rank, world, device = start_rank()
    model = LittleGPT().to(device)
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    groups = model.groups(weight_decay=0.1)
    optimizer = FusedAdamW(groups, lr=3e-3, betas=(0.9, 0.95), max_grad_norm=1.0, ema_decay=0.99, ema_warmup=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    training = {"model": model, "optimizer": optimizer, "schedule": schedule}
    if args.resume:
        saved = torch.load(newest(args.out, "step-*.pt"), map_location=device, weights_only=True)
        for name, value in training.items():
            value.load_state_dict(saved[name])

    rows = rows_of_text().to(device)
    for step in tqdm(range(schedule.last_epoch, args.steps), disable=rank > 0):
        loss = ddp(batch_of_step(rows, step).chunk(world)[rank])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        dist.all_reduce(loss := loss.detach())
        if rank == 0 and (step % 10 == 0 or step + 1 == args.steps):
            tqdm.write(f"step {step + 1}: loss {loss / world:.4f}, norm {optimizer.grad_norm:.3f}")
        if rank == 0 and step + 1 in (args.steps // 2, args.steps):
            args.out.mkdir(parents=True, exist_ok=True)
            part = args.out / f"step-{step + 1:06}.part"
            torch.save({name: value.state_dict() for name, value in training.items()}, part)
            part.rename(part.with_suffix(".pt"))  # a checkpoint is there whole or not at all
    with optimizer.ema_weights(), torch.no_grad():
        if rank == 0:
            print(f"loss of the averaged weights on one batch: {model(rows[:8]):.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
