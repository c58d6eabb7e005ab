"""A plain loop as torchtitan's: FSDP2, distributed checkpoints, and bfloat16 weights in 5.1 bytes with their state.

    torchrun --nproc-per-node 2 examples/trainers/fsdp2_loop.py             # seconds on a CPU
    torchrun --nproc-per-node 2 examples/trainers/fsdp2_loop.py --resume    # from the newest checkpoint in --out

All state is sharded as the weights are; the step clips by the norm over all ranks.
"""

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from little_gpt import LittleGPT, batch_of_step, newest, options, rows_of_text, start_rank
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from tqdm import tqdm

from adamw_kernels import FusedAdamW


def main(argv: list[str] | None = None) -> None:
    """Train; rank 0 prints the losses."""
    parser = options(__doc__, "runs/fsdp2_loop")
    parser.add_argument("--formats", nargs=2, default=("split24", "8bit"), help="of weights and moments: split24 8bit")
    args = parser.parse_args(argv)
    rank, world, device = start_rank()
    model = LittleGPT().to(device, torch.bfloat16)
    for module in (*model.layers, model):
        fully_shard(module)
    formats = {"param_format": args.formats[0], "moment_format": args.formats[1]}
    optimizer = FusedAdamW(model.groups(weight_decay=0.1), lr=3e-3, betas=(0.9, 0.95), max_grad_norm=1.0, **formats)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)

    def training() -> dict[str, object]:
        weights, state = get_state_dict(model, optimizer)
        return {"model": weights, "optimizer": state, "schedule": schedule.state_dict()}

    if args.resume:
        saved = training()  # room for what is read
        dcp.load(saved, checkpoint_id=newest(args.out, "step-*/.metadata").parent)  # which is written last
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])

    rows = rows_of_text().to(device)
    for step in tqdm(range(schedule.last_epoch, args.steps), disable=rank > 0):
        loss = model(batch_of_step(rows, step).chunk(world)[rank])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        dist.all_reduce(loss := loss.detach())
        if rank == 0 and (step % 10 == 0 or step + 1 == args.steps):
            tqdm.write(f"step {step + 1}: loss {loss / world:.4f}, norm {optimizer.grad_norm:.3f}")
        if step + 1 in (args.steps // 2, args.steps):
            dcp.save(training(), checkpoint_id=args.out / f"step-{step + 1:06}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
