"""Accelerate: bfloat16 autocast, accumulation, checkpoints; the step itself clips.

    python examples/trainers/accelerate_loop.py                # seconds on a CPU; saves halfway and at the end
With --resume it goes on from the newest checkpoint in --out.
"""

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from little_gpt import LittleGPT, newest, options, rows_of_text
from tqdm import tqdm

from adamw_kernels import FusedAdamW


def main(argv: list[str] | None = None) -> tuple[FusedAdamW, list[float]]:
    """Train; the optimizer, and the loss of each step."""
    args = options(__doc__, "runs/accelerate_loop").parse_args(argv)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="bf16",
        gradient_accumulation_steps=2,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0),  # an order an epoch
    )
    model = LittleGPT()
    inner = FusedAdamW(model.groups(weight_decay=0.1), lr=3e-3, betas=(0.9, 0.95), max_grad_norm=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(inner, args.steps)
    loader = torch.utils.data.DataLoader(rows_of_text(), batch_size=4, shuffle=True)
    model, optimizer, loader, schedule = accelerator.prepare(model, inner, loader, schedule)
    losses, done = [], 0
    if args.resume:
        checkpoint = newest(args.out, "step-*")
        accelerator.load_state(str(checkpoint))
        done = int(checkpoint.name[5:])
    bar = tqdm(total=args.steps, initial=done, disable=not accelerator.is_main_process)
    while done < args.steps:
        epoch, seen = divmod(2 * done, len(loader))
        batches = accelerator.skip_first_batches(loader, seen)
        batches.set_epoch(epoch)
        for rows in batches:
            with accelerator.accumulate(model):
                loss = model(rows)
                accelerator.backward(loss)
                optimizer.step()  # with every second batch, as the next two
                schedule.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                done += 1
                losses.append(loss.item())
                bar.set_postfix_str(f"loss {losses[-1]:.3f}, norm {inner.grad_norm:.3f}", refresh=False)
                bar.update()
                if done in (args.steps // 2, args.steps):
                    accelerator.save_state(str(args.out / f"step-{done:06}"))
                if done == args.steps:
                    break
    return inner, losses


if __name__ == "__main__":
    main()
