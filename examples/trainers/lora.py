"""LoRA with PEFT: hundreds of tiny tensors, where other fused optimizers spend their time between the kernels.

    python examples/trainers/lora.py                           # seconds on a CPU; saves halfway and at the end
    python examples/trainers/lora.py --resume                  # from the newest checkpoint in --out
    python examples/trainers/lora.py --optimizer torch         # torch.optim.AdamW(fused=True), for its time

Nothing is downloaded, so the weights under the adapters are random: the loss falls as far as adapters alone bring it.
"""

import time

import torch
from little_gpt import batch_of_step, newest, options, rows_of_text
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from adamw_kernels import FusedAdamW


def main(argv: list[str] | None = None) -> tuple[torch.optim.Optimizer, list[float]]:
    """Train the adapters; the optimizer, and the loss of each step."""
    parser = options(__doc__, "runs/lora", steps=100)
    parser.add_argument("--layers", type=int, default=16, help="of the model, with 14 adapter tensors each")
    parser.add_argument("--optimizer", choices=("fused", "torch"), default="fused", help="FusedAdamW or torch's")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=args.layers, num_attention_heads=4)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=256, initializer_range=0.1, **shape))
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = {"fused": FusedAdamW, "torch": torch.optim.AdamW}[args.optimizer](adapters, lr=1e-2, fused=True)
    rows, losses, milliseconds, done = rows_of_text(), [], [], 0
    if args.resume:
        saved = torch.load(newest(args.out, "step-*.pt"), weights_only=True)
        set_peft_model_state_dict(model, saved["adapters"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["done"]

    for step in (bar := tqdm(range(done, args.steps), initial=done, total=args.steps)):
        batch = batch_of_step(rows, step, size=4)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        begin = time.perf_counter()
        optimizer.step()
        milliseconds.append(1e3 * (time.perf_counter() - begin))
        optimizer.zero_grad()
        losses.append(loss.item())
        bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
        if step + 1 in (args.steps // 2, args.steps):
            args.out.mkdir(parents=True, exist_ok=True)
            saved = {"adapters": get_peft_model_state_dict(model), "optimizer": optimizer.state_dict()}
            torch.save(saved | {"done": step + 1}, args.out / f"step-{step + 1:06}.pt")
    print(f"{len(adapters)} adapter tensors, {torch.tensor(milliseconds).median():.2f} ms a step of the optimizer")
    return optimizer, losses


if __name__ == "__main__":
    main()
