"""That the processes which reduce sums together hold the same parameters, and that each of them can take the step.

A reduction in which not all take part, or with different numbers of words, waits for ever or adds up what does not
belong together. A process that is about to raise therefore tells the others first, and they raise too.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Shares = dict[Any, list[int]]
"""Process groups in the order of reduction, and which words each of them reduces."""


def shares_of(groups: Sequence[tuple[Any, ...]]) -> Shares:
    """Which words are reduced over which processes: each over its own groups, and the one after them over all."""
    return {
        group: [i for i, of_word in enumerate(groups) if group in of_word] + [len(groups)]
        for group in dict.fromkeys(group for of_word in groups for group in of_word)
    }


def all_reduce(words: torch.Tensor, members: list[int], group: Any) -> None:
    """Sum up some of the words over the processes of a group, in place."""
    if len(members) == len(words):
        torch.distributed.all_reduce(words, group=group)
        return
    part = torch.stack([words[i] for i in members])
    torch.distributed.all_reduce(part, group=group)
    for i, value in zip(members, part.unbind(), strict=True):
        words[i] = value


@dataclass(frozen=True)
class Roster:
    """What the processes of a group must have in common before they reduce sums.

    Attributes:
        lines: returns a line a parameter.
        groups: with whose processes lines are compared.
        norms: what processes that hold different shards of plain tensors must have in common, too.
        plain_group: whose processes those are, or None; `lines` then has none of these tensors.
        digest: of `lines`.
    """

    lines: Callable[[], list[str]]
    groups: tuple[Any, ...]
    norms: str
    plain_group: Any
    digest: bytes

    @classmethod
    def of(cls, lines: Callable[[], list[str]], groups: Iterable[Any], num_norms: int, plain_group: Any) -> Roster:
        """Read the lines once, in a microsecond or two each."""
        return cls(lines, tuple(groups), f"{num_norms} gradient norm(s)", plain_group, digest_of(lines()))

    def lines_for(self, group: Any) -> list[str]:
        """What this process must have in common with the others of a group."""
        return [self.norms] if group is self.plain_group else [self.norms, *self.lines()]

    def digest_for(self, group: Any) -> tuple[str, bytes]:
        """The same, short."""
        return self.norms, b"" if group is self.plain_group else self.digest


class Agreement:
    """Between the processes over which one optimizer's sums of squares and signals are reduced.

    Before their first reduction, the processes of each group compare what they hold. Later, one that cannot take a
    step, or whose parameters have changed, takes part nevertheless, with NaN for its signal, which otherwise is a sum
    of zeros and ones. Where the sums are in host memory all see it, tell each other what is the matter, and raise, or
    reduce anew. On a GPU nobody looks, because looking waits: all skip that step, on the device, and the one that could
    not take it raises.

    A warm step pays for a copy of a few words and a look at the last one.

    Attributes:
        roster: what this process holds, as its plan was built. Without one, nothing is compared.
        engaged: whether this step has begun to communicate, so that others know, or will know, of its errors.
    """

    def __init__(self) -> None:
        """Nothing is agreed upon yet."""
        self.roster: Roster | None = None
        self.engaged = False
        self._shares: Shares | None = None  # in which all reduce, as was agreed upon
        self._groups: tuple[Any, ...] = ()
        self._digest = b""
        self._complaint: str | None = None  # the first that was heard in this step, our own included

    @property
    def is_settled(self) -> bool:
        """Whether processes have compared what they hold."""
        return self._shares is not None

    def settle(self, shares: Shares) -> None:
        """Compare, the first time.

        Args:
            shares: as for `reduce`.

        Raises:
            RuntimeError: as `reduce`.
        """
        if shares and self._shares is None and self.roster is not None:
            self.engaged = True
            self._complaint = None
            self._accept(shares, self.roster)

    def _accept(self, shares: Shares, roster: Roster) -> None:
        """Compare with whom nothing was compared yet; then what all have now is what was agreed upon."""
        self._compare([group for group in roster.groups if group not in self._groups])
        self._shares, self._groups, self._digest = shares, roster.groups, roster.digest

    def reduce(self, words: torch.Tensor, shares: Shares) -> None:
        """Sum up over the processes, in place.

        Args:
            words: float64, the signal last.
            shares: what is summed up over which processes.

        Raises:
            RuntimeError: on every process alike: they hold different parameters, or one cannot take this step.
        """
        self.engaged = True
        if not shares:
            return
        self.settle(shares)
        self._complaint = None
        is_visible = self.is_visible(words.device)
        if self.roster is not None and (self._shares, self._digest) != (shares, self.roster.digest):
            if is_visible:
                self._call(words.device)
            self._accept(shares, self.roster)
        if not is_visible:
            for group, members in shares.items():
                all_reduce(words, members, group)
            return
        own = words.clone()
        while self._reduce(words, shares):  # somebody called, and nothing was the matter
            words.copy_(own)

    def refuse(
        self, error: Exception, groups: Iterable[Any], device: torch.device, shares: Shares | None = None
    ) -> None:
        """Tell the processes that would wait for this one that it cannot take the step.

        Args:
            error: why not; to be raised here.
            groups: with whose processes lines would have been compared.
            device: where the sums are.
            shares: how all reduce, if that does not have to be agreed upon.
        """
        if self.engaged:
            return
        self._shares = shares or self._shares
        self.engaged = True
        self._complaint = (
            f"rank {torch.distributed.get_rank()} cannot take this step, so no rank does: "
            f"{type(error).__name__}: {error}"
        )
        with contextlib.suppress(RuntimeError):  # what the others say, or that they are gone; ours is raised
            if self._shares is None:
                self._compare(groups)
            else:
                self._call(device)

    @staticmethod
    def is_visible(device: torch.device) -> bool:
        """Whether the host can look at sums on this device without waiting for it."""
        return device.type == "cpu"

    def _call(self, device: torch.device) -> None:
        """Make the others listen, by a reduction of the shape that they expect."""
        assert self._shares is not None
        size = 1 + max(i for members in self._shares.values() for i in members)
        words = torch.full((size,), math.nan, dtype=torch.float64, device=device)
        if self.is_visible(device):
            self._reduce(words, self._shares)
            return
        for group, members in self._shares.items():
            all_reduce(words, members, group)

    def _reduce(self, words: torch.Tensor, shares: Shares) -> bool:
        """Reduce, and listen where somebody calls; whether anybody did. Raises as `reduce`."""
        has_called = False
        for group, members in shares.items():
            all_reduce(words, members, group)
            if math.isnan(words[-1]):  # every process of the group sees it; those of later ones will
                has_called = True
                self._listen(group, len(shares))
        if self._complaint is not None:
            raise RuntimeError(self._complaint)
        return has_called

    def _compare(self, groups: Iterable[Any]) -> None:
        """Listen to every group. Raises as `reduce`."""
        # In one order for all, so that no two processes wait for each other whatever the order of their parameters.
        ordered = sorted(groups, key=lambda group: str(group.group_name))
        for group in ordered:
            if not self._listen(group, len(ordered)):
                break  # in the groups that some do not know of they would be waited for
        if self._complaint is not None:
            raise RuntimeError(self._complaint)

    def _listen(self, group: Any, num_groups: int) -> bool:
        """Hear what the processes of a group have to say; whether they know of as many groups."""
        if group.size() == 1:
            return True
        digest = None if self.roster is None else self.roster.digest_for(group)
        try:
            said = _exchange((self._complaint, digest, num_groups), group)
            complaints = [complaint for complaint, _, _ in said if complaint is not None]
            if not complaints and len({digest for _, digest, _ in said}) > 1:
                assert self.roster is not None, "only who complains may have none"
                complaints = [_difference(self.roster.lines_for(group), group)]
        except (RuntimeError, ValueError) as error:
            lines = [] if self.roster is None else self.roster.lines()
            which = f"{len(lines)} parameters, of which the first is {lines[0]}" if lines else "its parameters"
            raise RuntimeError(
                f"ranks {torch.distributed.get_process_group_ranks(group)} reduce gradient norms and signals together, "
                f"and not all of them came to this step. This rank has {which}; expected every rank to hold the same, "
                "to ask for the same norms and guards, and to take every step. `check_ranks()` compares the lists."
            ) from error
        if complaints and self._complaint is None:
            self._complaint = complaints[0]
        return len({count for _, _, count in said}) == 1


def compare(lines: list[str], group: Any) -> None:
    """Compare lines with all processes of a group; all of them must call this.

    Raises:
        RuntimeError: on every process alike: they differ, with the first difference.
    """
    if len(set(_exchange(digest_of(lines), group))) > 1:
        raise RuntimeError(_difference(lines, group))


def digest_of(lines: Iterable[str]) -> bytes:
    """What two lists have in common only if they are the same."""
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).digest()


def _exchange(value: Any, group: Any) -> list[Any]:
    """Every process's value, in the order of their ranks."""
    values: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(values, value, group=group)
    return values


def _difference(lines: Sequence[str], group: Any) -> str:
    """Say, to all processes of a group alike, where their lines first differ from the first process's."""
    first: list[Any] = [[*lines]]
    torch.distributed.broadcast_object_list(first, group=group, group_src=0)
    pairs = itertools.zip_longest(first[0], lines)
    found = next(((i, *pair) for i, pair in enumerate(pairs) if pair[0] != pair[1]), None)
    ranks = torch.distributed.get_process_group_ranks(group)
    differing = [(place[0], rank, place) for rank, place in zip(ranks, _exchange(found, group), strict=True) if place]
    _, rank, (_, expected, present) = min(differing)
    return (
        f"rank {ranks[0]} and rank {rank} hold different parameters: the first has {expected or 'nothing more'} where "
        f"the other has {present or 'nothing more'}. Expected the same parameters in the same order on every rank, "
        "shards of the same tensors: build the optimizer from the same model and groups everywhere."
    )
