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
        exceeds_caches: Whether a step's tensors are far larger than any cache, so that bandwidth is the limit and
            "% of the roof" means something. Elsewhere the wall-clock of an eager step is what is measured.
    """

    name: str
    title: str
    groups: tuple[Group, ...]
    exceeds_caches: bool

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """All shapes, group after group."""
        return tuple(shape for group in self.groups for shape in group.shapes)

    @property
    def numel(self) -> int:
        """Number of parameters, in elements."""
        return sum(math.prod(shape) for shape in self.shapes)


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


@functools.cache
def cases() -> dict[str, Case]:
    """Every case by name, in the order of rows and figures."""
    built = (one_large(), gpt2_small(), resnet50(), many_small(), groups_465())
    return {case.name: case for case in built}
