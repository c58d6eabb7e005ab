"""What is stepped: named lists of parameter shapes, in the parameter groups their training recipe uses.

Shapes are written down from the architectures, so the suite needs no model library.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """One parameter group: its shapes and the two hyperparameters recipes vary."""

    shapes: tuple[Shape, ...]
    lr: float = 1e-3
    weight_decay: float = 0.1


@dataclass(frozen=True)
class Case:
    """A named workload.

    Attributes:
        name: How rows and the command line call it.
        title: How figures call it.
        groups: Parameter groups, in order.
        exceeds_caches: Whether bandwidth is the limit and "% of the roof" means something: a step's tensors, or those
            of as many copies as take turns (`throughput.py`), are far larger than any cache. Elsewhere the wall-clock
            of an eager step is what is measured.
        grad_rows: Share of the rows of each matrix that have a gradient; in the others it is zero.
    """

    name: str
    title: str
    groups: tuple[Group, ...]
    exceeds_caches: bool
    grad_rows: float = 1.0

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """All shapes, group after group."""
        return tuple(shape for group in self.groups for shape in group.shapes)

    @property
    def numel(self) -> int:
        """Number of parameters, in elements."""
        return sum(math.prod(shape) for shape in self.shapes)


def one_tensor(exponent: int) -> Case:
    """One tensor of a power of two: the roofline's series, beside `one_large`."""
    return Case(f"one_2p{exponent}", f"one tensor, 2^{exponent} elements", (Group(((1 << exponent,),)),), True)


def counted(tensors: int) -> Case:
    """Tensors of 4,096 elements: the series of tensor counts."""
    title = f"{tensors:,} tensor{'s' if tensors > 1 else ''} of 4,096"
    return Case(f"count_{tensors}", title, (Group(((4096,),) * tensors),), exceeds_caches=False)


def one_large() -> Case:
    """One tensor of 64 Mi elements: 1 GiB of float32 parameter, gradient and moments."""
    return Case("one_large", "one tensor, 64 Mi elements", (Group(((64 << 20,),)),), exceeds_caches=True)


def gpt2_small() -> Case:
    """GPT-2 small: 148 tensors, 124,439,808 parameters, matrices decayed and vectors not (the usual recipe)."""
    width, vocabulary, context = 768, 50257, 1024
    block: tuple[Shape, ...] = (
        (width,), (width,),  # ln_1
        (width, 3 * width), (3 * width,),  # attn.c_attn
        (width, width), (width,),  # attn.c_proj
        (width,), (width,),  # ln_2
        (width, 4 * width), (4 * width,),  # mlp.c_fc
        (4 * width, width), (width,),  # mlp.c_proj
    )  # fmt: skip
    shapes = ((vocabulary, width), (context, width), *block * 12, (width,), (width,))
    groups = (
        Group(tuple(shape for shape in shapes if len(shape) >= 2), lr=6e-4, weight_decay=0.1),
        Group(tuple(shape for shape in shapes if len(shape) < 2), lr=6e-4, weight_decay=0.0),
    )
    return Case("gpt2_small", "GPT-2 small, 148 tensors", groups, exceeds_caches=True)


def resnet50() -> Case:
    """ResNet-50 with 1,000 classes: 161 tensors, 25,557,032 parameters."""

    def convolution_and_norm(outputs: int, inputs: int, kernel: int) -> Iterator[Shape]:
        yield outputs, inputs, kernel, kernel
        yield from ((outputs,), (outputs,))

    def shapes() -> Iterator[Shape]:
        yield from convolution_and_norm(64, 3, 7)
        inputs = 64
        for width, depth in ((64, 3), (128, 4), (256, 6), (512, 3)):
            for index in range(depth):
                yield from convolution_and_norm(width, inputs, 1)
                yield from convolution_and_norm(width, width, 3)
                yield from convolution_and_norm(4 * width, width, 1)
                if index == 0:
                    yield from convolution_and_norm(4 * width, inputs, 1)  # the shortcut of a stage's first block
                inputs = 4 * width
        yield from ((1000, inputs), (1000,))

    return Case("resnet50", "ResNet-50, 161 tensors", (Group(tuple(shapes())),), exceeds_caches=True)


def many_small() -> Case:
    """2,000 tensors of 256 elements in one group: a step is launching, not moving."""
    return Case("many_small", "2,000 tensors of 256", (Group(((256,),) * 2000),), exceeds_caches=False)


def groups_465() -> Case:
    """465 groups of one tensor each, all with their own lr and weight decay.

    Detection fine-tuning recipes decay the learning rate per layer and hand every tensor over in a group of its
    own; roboflow/rf-detr#1409 reports 465 groups and 58.8 ms a step. The shapes here are the parameter-efficient
    form of such a recipe: a 12-block, 384-wide ViT and a 6-layer, 256-wide decoder, in which norms, biases and
    layer scales are trained whole and each matrix through a rank-8 pair, about 1 M parameters in all. (With whole
    matrices the same 465 groups are about 30 M parameters, and memory traffic hides part of the launch cost.)
    """

    def adapters(rank: int, *matrices: Shape) -> Iterator[Shape]:
        for outputs, inputs in matrices:
            yield from ((rank, inputs), (outputs, rank), (outputs,))

    def shapes() -> Iterator[Shape]:
        wide, hidden, narrow = 384, 1536, 256
        for _ in range(12):  # 24 tensors a block
            yield from ((wide,),) * 6  # two norms, two layer scales
            yield from adapters(8, *((wide, wide),) * 4, (hidden, wide), (wide, hidden))
        yield from ((wide,), (wide,))  # final norm
        for _ in range(6):  # 28 tensors a layer
            yield from ((narrow,),) * 6  # three norms
            yield from adapters(8, *((narrow, narrow),) * 7)  # self attention 4, cross attention 3
            yield (narrow,)  # query position
        yield from ((91,), (narrow,), (narrow,), (narrow,), (narrow,), (4, narrow), (4,))  # class bias and box head

    groups = tuple(
        Group((shape,), lr=1e-4 * (1 + index / 465), weight_decay=0.05 * (1 + index / 465))
        for index, shape in enumerate(shapes())
    )
    return Case("groups_465", "465 groups of one tensor", groups, exceeds_caches=False)


def llama3_8b(ranks: int) -> Case:
    """Llama-3 8 B, 291 tensors, 8,030,261,248 parameters, as one of `ranks` processes holds it under FSDP2.

    Every tensor is sharded along its first dimension, which 8 divides throughout.
    """
    width, hidden, key_value, vocabulary = 4096, 14336, 1024, 128256
    block: tuple[Shape, ...] = (
        (width,),
        *((width, width), (key_value, width), (key_value, width), (width, width)),
        (width,),
        *((hidden, width), (hidden, width), (width, hidden)),
    )
    whole = ((vocabulary, width), *block * 32, (width,), (vocabulary, width))
    shapes = tuple((shape[0] // ranks, *shape[1:]) for shape in whole)
    groups = (
        Group(tuple(shape for shape in shapes if len(shape) >= 2), lr=3e-4, weight_decay=0.1),
        Group(tuple(shape for shape in shapes if len(shape) < 2), lr=3e-4, weight_decay=0.0),
    )
    name = "llama3_8b" if ranks == 1 else f"llama3_8b_of_{ranks}"
    part = "" if ranks == 1 else f", one of {ranks} shards"
    return Case(name, f"Llama-3 8 B{part}, 291 tensors", groups, exceeds_caches=True)


def mixture_of_experts() -> Case:
    """10,000 tensors, 82 M parameters: 52 layers of 64 experts, as a process of expert parallelism holds them.

    Experts are three matrices of 256 x 32 each, thin slices of wider ones; 16 norms make the number round.
    """
    expert: tuple[Shape, ...] = ((32, 256), (32, 256), (256, 32))
    shapes = (*expert * (52 * 64), *((256,),) * 16)
    return Case("moe_10000", "mixture of experts, 10,000 tensors", (Group(shapes),), exceeds_caches=True)


def lora() -> Case:
    """1,000 tensors of 4,096 elements: rank-4 pairs beside 500 matrices of 1,024 x 1,024."""
    pairs: tuple[Shape, ...] = ((4, 1024), (1024, 4)) * 500
    return Case("lora_1000", "LoRA, 1,000 tensors", (Group(pairs, lr=2e-4, weight_decay=0.0),), exceeds_caches=False)


def embedding() -> Case:
    """GPT-2's embedding after a batch of 4,096 different tokens: 92 % of the gradient's rows are zero."""
    group = Group(((50257, 768),), lr=6e-4, weight_decay=0.1)
    title = "an embedding, 8 % of its rows hit"
    return Case("embedding", title, (group,), exceeds_caches=True, grad_rows=4096 / 50257)


@functools.cache
def cases() -> dict[str, Case]:
    """Every case by name, in the order of rows and figures."""
    built = (
        *(one_tensor(exponent) for exponent in (20, 22, 24)),
        one_large(),
        *(one_tensor(exponent) for exponent in (28, 30, 32)),
        gpt2_small(),
        resnet50(),
        embedding(),
        *(llama3_8b(ranks) for ranks in (8, 1)),
        mixture_of_experts(),
        many_small(),
        groups_465(),
        lora(),
        *(counted(tensors) for tensors in (1, 10, 100, 1000, 10000)),
    )
    return {case.name: case for case in built}
