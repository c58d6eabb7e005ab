"""Lightning: bfloat16 autocast, `gradient_clip_val`, accumulation, and a resume in the middle of an epoch.

    python examples/trainers/lightning_module.py               # seconds on a CPU; saves halfway and at the end
    python examples/trainers/lightning_module.py --resume      # from the newest checkpoint in --out

Batches is the loader: it tells Lightning where it is, so that a resumed run goes on with the very next batch.
"""

from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from little_gpt import Batches, LittleGPT, newest, options, rows_of_text

from adamw_kernels import FusedAdamW


class Module(lightning.LightningModule):
    """The model, its optimizer, and the losses so far."""

    def __init__(self, steps: int) -> None:
        """So many steps of the schedule."""
        super().__init__()
        self.model, self.steps, self.losses = LittleGPT(), steps, []

    def training_step(self, rows: torch.Tensor, index: int) -> torch.Tensor:
        """The loss, also for the progress bar."""
        loss = self.model(rows)
        self.losses.append(loss.item())
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        """Without `fused=True`, which Lightning does not clip for."""
        optimizer = FusedAdamW(self.model.groups(weight_decay=0.1), lr=3e-3, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main(argv: list[str] | None = None) -> Module:
    """Train; the module, which knows its optimizer and losses."""
    args = options(__doc__, "runs/lightning_module").parse_args(argv)
    module = Module(args.steps)
    trainer = lightning.Trainer(
        max_steps=args.steps,
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        accumulate_grad_batches=2,
        callbacks=[ModelCheckpoint(args.out, "{step:06}", every_n_train_steps=max(1, args.steps // 2), save_top_k=-1)],
        logger=False,
    )
    checkpoint = newest(args.out, "*.ckpt") if args.resume else None
    trainer.fit(module, Batches(rows_of_text(), size=4), ckpt_path=checkpoint)
    return module


if __name__ == "__main__":
    main()
