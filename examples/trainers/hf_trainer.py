"""Hugging Face Trainer: a small bfloat16 Llama, from 5.1 bytes a parameter, weight and optimizer state included.

    python examples/trainers/hf_trainer.py               # seconds on a CPU; saves halfway and at the end
    python examples/trainers/hf_trainer.py --resume      # from the newest checkpoint in --out

The Trainer makes the groups with and without decay, accumulates, clips, schedules, saves and resumes. Learning rate,
betas and eps are those given with the class: the ones in TrainingArguments are for the Trainer's own optimizers.
"""

import torch
from little_gpt import options, rows_of_text
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from adamw_kernels import FusedAdamW


def main(argv: list[str] | None = None) -> Trainer:
    """Train; the Trainer, whose log has the losses."""
    parser = options(__doc__, "runs/hf_trainer")
    parser.add_argument("--formats", nargs=2, default=("split24", "8bit"), help="of weights and moments: split24 8bit")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    shape = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **shape)).bfloat16()
    formats = {"param_format": args.formats[0], "moment_format": args.formats[1]}
    trainer = Trainer(
        model,
        TrainingArguments(
            str(args.out),
            max_steps=args.steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_grad_norm=1.0,
            weight_decay=0.1,
            lr_scheduler_type="cosine",
            warmup_steps=args.steps // 10,
            logging_steps=max(1, args.steps // 20),
            save_steps=max(1, args.steps // 2),
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows_of_text()],
        optimizer_cls_and_kwargs=(FusedAdamW, {"lr": 5e-3, "betas": (0.9, 0.95), **formats}),
    )
    trainer.train(resume_from_checkpoint=args.resume or None)
    return trainer


if __name__ == "__main__":
    main()
