"""What the examples beside this file share: a model, a text, orders of batches, options, the start of a rank."""

import argparse
import os
import pathlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F


class LittleGPT(torch.nn.Module):
    """A byte-level transformer; called with rows of bytes, (batch, time + 1), it returns the loss of each next byte."""

    def __init__(self, layers: int = 2, width: int = 64, seed: int = 0) -> None:
        """The same weights for the same arguments."""
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = torch.nn.Embedding(256, width)
        self.layers = torch.nn.ModuleList(
            torch.nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.head = torch.nn.Linear(width, 256)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy, in nats a byte."""
        x = self.embedding(rows[:, :-1])
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        for layer in self.layers:
            x = layer(x, src_mask=future)
        return F.cross_entropy(self.head(x).flatten(0, 1).float(), rows[:, 1:].flatten())

    def groups(self, weight_decay: float) -> list[dict[str, object]]:
        """Matrices decay, biases and norms do not."""
        matrices = [p for p in self.parameters() if p.ndim >= 2]
        vectors = [p for p in self.parameters() if p.ndim < 2]
        return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def rows_of_text(count: int = 512, length: int = 65) -> torch.Tensor:
    """The source of argparse.py, which is wherever Python is: (count, length) bytes, as int64."""
    text = bytearray(pathlib.Path(argparse.__file__).read_bytes()[: count * length])
    return torch.frombuffer(text, dtype=torch.uint8).view(count, length).long()


def batch_of_step(rows: torch.Tensor, step: int, size: int = 8) -> torch.Tensor:
    """Rows drawn by the step's number alone: the same on all ranks, and nothing to save for a resumed run."""
    return rows[torch.randint(len(rows), (size,), generator=torch.Generator().manual_seed(step))]


class Batches:
    """Batches of rows, in another order each epoch; it can say where it is and go on from there."""

    def __init__(self, rows: torch.Tensor, size: int) -> None:
        """Start with the first epoch."""
        self.rows, self.size, self.epoch, self.next = rows, size, 0, 0

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self.rows) // self.size

    def __iter__(self) -> Iterator[torch.Tensor]:
        """The rest of the epoch."""
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(self.epoch)).split(self.size)
        while self.next < len(self):
            self.next += 1
            yield self.rows[order[self.next - 1]]
        self.epoch, self.next = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """Where it is."""
        return {"epoch": self.epoch, "next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go there."""
        self.epoch, self.next = state["epoch"], state["next"]


def options(description: str | None, out: str, steps: int = 200) -> argparse.ArgumentParser:
    """--steps, --out, --resume; an example adds its own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=steps, help=f"of the optimizer, {steps} if not given")
    parser.add_argument("--out", type=pathlib.Path, default=out, help=f"folder of the checkpoints, {out} if not given")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    return parser


def newest(out: pathlib.Path, pattern: str) -> pathlib.Path:
    """The last of the files in --out that match, by name."""
    found = sorted(out.glob(pattern))
    if not found:
        raise SystemExit(f"--resume: there is no checkpoint in {out}; train without it first, or give another --out")
    return found[-1]


def start_rank() -> tuple[int, int, torch.device]:
    """Join the others that torchrun started: this rank, how many there are, the device."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size(), device
