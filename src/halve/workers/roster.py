"""Who works for a run: workers are hired, heard, given up when they are lost, and replaced."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from halve.errors import HalveError
from halve.run.executor import Tell
from halve.run.phases import Phase
from halve.workers import terms
from halve.workers.cluster import Cluster, Hand, Pending
from halve.workers.fetching import LostError, fetch
from halve.workers.messages import Message, unpack

Files = Mapping[str, Callable[[], Iterator[Message]]]
"""The files of a model by their names in the charge, each read chunk by chunk."""
BEGINS = 600.0
"""Seconds within which the first workers have to be there: the cluster may be busy."""
_STARTS = 120.0
"""The same of a worker that takes the place of a lost one."""
_MOST_LOST = 3
"""How often each worker may be lost at one block: more is no accident."""
_PATIENCE = 60.0
_SLOWER = 5.0
"""A worker is given up if it takes this many times as long as the slowest of the others has, and `_PATIENCE` seconds
at least: its shards, or its matrices, go to others."""


@dataclass(eq=False)
class Member:
    """A worker, as the driver sees it.

    Attributes:
        number: in the order of hiring.
        hand: what reaches it.
        node: name of its machine.
        shards: that it holds.
        block: that its shards are at.
        collected: whether it has gathered the statistics of that block.
        alive: whether it answers.
        why: how it was lost.
        began: when it was hired.
    """

    number: int
    hand: Hand
    node: str = ""
    shards: list[int] = field(default_factory=list)
    block: int = 0
    collected: bool = False
    alive: bool = True
    why: str = ""
    began: float = field(default_factory=time.monotonic)


class Roster:
    """The workers of a run.

    Args:
        cluster: that they are hired on.
        charge: a reference to the message with what they are to work on.
        files: the model's files, for workers that do not have them.
        tell: told of losses.
        together: whether one worker has to hold all shards.

    Attributes:
        members: all that were hired, but for those that were lost and replaced.
        busy: those that have something to do which the others have not.
    """

    def __init__(self, cluster: Cluster, charge: Any, files: Files, tell: Tell, *, together: bool) -> None:
        self._cluster = cluster
        self._charge = charge
        self._files = files
        self._tell = tell
        self._together = together
        self._hired = 0
        self._lost = 0
        self.members: list[Member] = []
        self.busy: Collection[Member] = ()

    def progress(self) -> None:
        """Count losses from here: a block is finished."""
        self._lost = 0

    @property
    def alive(self) -> list[Member]:
        """The workers that answer."""
        return [member for member in self.members if member.alive]

    def hire(self) -> Member:
        """Ask for one more worker."""
        member = Member(self._hired, self._cluster.hire())
        self._hired += 1
        self.members.append(member)
        return member

    def open(self, shards: Mapping[Member, list[int]], *, within: float) -> None:
        """Let new workers take on the charge, and load the model for their shards; those that fail are given up."""
        for member, mine in shards.items():
            member.shards = list(mine)
        calls = {member: member.hand.call("hire", self._charge) for member in shards}
        for member, message in self.answers(calls, within=within):
            answer, _ = unpack(message, terms.Hired)
            terms.check(answer)
            member.node = answer.node
            if answer.needs_files:
                self._send_files(member)
        self._load({member: mine for member, mine in shards.items() if member.alive})

    def _load(self, shards: Mapping[Member, list[int]]) -> None:
        """Let workers load the model for shards, which begin at the first block."""
        calls = {member: member.hand.call("open", mine) for member, mine in shards.items()}
        for _, message in self.answers(calls, within=BEGINS):
            terms.check(unpack(message, terms.Answer)[0])

    def _send_files(self, member: Member) -> None:
        for name, chunks in self._files.items():
            for chunk in chunks():
                pending = member.hand.call("receive", name, self._cluster.put(chunk))
                for _, message in self.answers({member: pending}, within=BEGINS):
                    terms.check(unpack(message, terms.Answer)[0])
                if not member.alive:
                    return

    def replace_lost(self, block: int) -> None:
        """Hire a worker in the place of each that was lost, or deal its shards out to the others if none can come."""
        for lost in [member for member in self.members if not member.alive]:
            self.members.remove(lost)
            self._lost += 1
            where = f" on {lost.node}" if lost.node else ""
            note = f"worker {lost.number}{where} was lost, and is replaced ({lost.why})"
            self._tell(block, Phase.REPLAY, note=note)
            if self._lost > _MOST_LOST * self._cluster.workers:
                raise HalveError(
                    f"{self._lost} workers were lost at one block, the last one by this: {lost.why}; look at the "
                    "memory of their machines and at Ray's log, then go on with halve resume"
                )
            new = self.hire()
            self.open({new: lost.shards}, within=_STARTS)
            if new.alive:
                continue
            self.members.remove(new)
            rest = self.alive
            if not rest:
                raise HalveError(
                    f"no worker is left, and no other could be started ({new.why}): go on with halve resume"
                )
            self._tell(block, Phase.REPLAY, note="no other worker could be started: the rest share its shards")
            if lost.shards:
                self._deal_out(lost.shards, rest)

    def _deal_out(self, shards: Sequence[int], members: Sequence[Member]) -> None:
        """Give shards to workers that have others; they begin at the first block, and are brought forward alone.

        The one that reconstructs has to hold them all.
        """
        takers = members[:1] if self._together else members
        for member, more in zip(takers, dealt(shards, len(takers)), strict=True):
            if more:
                member.shards = sorted([*member.shards, *more])
                member.block, member.collected = 0, False
                self._load({member: more})

    def give_up(self, member: Member, why: str) -> None:
        """End a worker, whose shards have to go to another one."""
        member.alive, member.why = False, why
        member.hand.kill()

    def answers(
        self, calls: Mapping[Member, Pending], *, within: float | None = None
    ) -> Iterator[tuple[Member, Message]]:
        """Yield answers as they come; a worker that is lost, or far slower than the others, has none and is given up.

        Args:
            calls: the call that each was given.
            within: seconds after which those without an answer are given up; None goes by how slow the others are.
        """
        waiting = {call: member for member, call in calls.items()}
        began, slowest = time.monotonic(), 0.0
        while waiting:
            call = self._cluster.first_of(list(waiting))
            now = time.monotonic() - began
            if call is not None:
                member = waiting.pop(call)
                slowest = max(slowest, now)
                try:
                    message = fetch(call)
                except LostError as error:
                    self.give_up(member, str(error))
                else:
                    yield member, message
                continue
            late = list(waiting.values()) if within is not None and now > within else []
            if within is None and len(calls) > len(waiting) and is_late(now, slowest):
                late = [member for member in waiting.values() if member not in self.busy]
            for member in late:
                self.give_up(member, f"it did not answer for {now:.0f} s")
            waiting = {call: member for call, member in waiting.items() if member.alive}


def is_late(seconds: float, others: float) -> bool:
    """Whether a worker takes much longer than it should.

    Args:
        seconds: that it has taken.
        others: that the slowest of the others has.
    """
    return seconds > max(_PATIENCE, _SLOWER * others)


def dealt(shards: Sequence[int], workers: int) -> list[list[int]]:
    """Deal shards out to workers, neighbours to the same one."""
    return [list(shards[len(shards) * i // workers : len(shards) * (i + 1) // workers]) for i in range(workers)]
