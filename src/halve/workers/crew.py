"""The driver's side: what `halve.run.loop` asks for is dealt out to workers, and done again where one is lost."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from halve.errors import HalveError, counted
from halve.model.collect import check_called, merge_leaders
from halve.model.plan import Matrix
from halve.model.reconstruct import Reconstruction, Tuned
from halve.run.bundles import operations
from halve.run.events import WorkerReport
from halve.run.executor import Inputs, Job
from halve.run.phases import Phase
from halve.solve.outcome import Outcome
from halve.workers import terms
from halve.workers.cluster import Cluster, Hand, LostError, Pending
from halve.workers.messages import Message, pack, unpack

_BEGINS = 600.0
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
class _Member:
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


@dataclass(frozen=True)
class _Work:
    """What a worker is pruning.

    Attributes:
        bundle: index of the bundle.
        call: that will be answered.
        holders: workers that have summed over its inputs.
        began: when.
    """

    bundle: int
    call: Pending
    holders: Sequence[_Member]
    began: float


class Crew:
    """Does the work of a job on the workers of a cluster (`halve.run.executor.Executor`).

    Args:
        job: what to work on; its model stays with the driver.
        cluster: that workers are hired on.
        charge: what they are to work on.
        files: the model's files, by their names in the charge, for workers that do not have them.
    """

    def __init__(
        self, job: Job, cluster: Cluster, charge: terms.Charge, files: Mapping[str, Callable[[], Iterator[Message]]]
    ) -> None:
        self._job = job
        self._cluster = cluster
        self._files = files
        tensors = {
            f"{number}.{name}": tensor for number, batch in enumerate(job.batches) for name, tensor in batch.items()
        }
        self._charge = cluster.put(pack(terms.plain(charge), tensors))
        self._members: list[_Member] = []
        self._hired = 0
        self._passed: list[tuple[str, ...]] = []  # names of the parameters that each finished block has changed
        self._leaders: dict[str, str] = {}
        self._parts: dict[int, tuple[_Member, terms.Part]] = {}
        self._sums: dict[str, dict[int, tuple[_Member, Pending]]] = {}
        self._at_work: dict[_Member, _Work] = {}
        self._lost = 0

    def begin(self, block: int) -> None:
        """See `Executor`; the first block is when workers are hired."""
        if self._members:
            return
        self._job.tell(block, Phase.CAPTURE)
        with self._job.phases.timing(Phase.CAPTURE):
            # A reconstruction goes through all batches one by one: one worker holds them all, the others solve.
            tuned = self._job.settings.reconstruction is not None
            holding = 1 if tuned else min(self._cluster.workers, len(self._job.shards))
            dealt = _dealt(range(len(self._job.shards)), holding)
            dealt += [[] for _ in range(self._cluster.workers - holding)]
            self._open({self._hire(): mine for mine in dealt}, within=_BEGINS)
            self._replace_lost(block)
        shards = counted(len(self._job.shards), "shard")
        held = f"{shards}, all held by one of them, which reconstructs" if tuned else shards
        self._job.tell(block, Phase.CAPTURE, note=f"{counted(len(self._alive()), 'worker')} for {held}")

    def follow(self, block: int, tensors: Mapping[str, Tensor]) -> None:
        """See `Executor`."""
        self._lost = 0
        self._passed.append(tuple(tensors))
        with self._job.phases.timing(Phase.REPLAY):
            self._advance_to(block + 1, dict(tensors))

    def finish(self, block: int, tensors: Mapping[str, Tensor]) -> None:
        """See `Executor`."""
        self._sums.clear()
        self._parts.clear()
        self._lost = 0
        self._passed.append(tuple(tensors))
        if block >= self._job.last:
            return
        self._job.tell(block, Phase.REPLAY)
        with self._job.phases.timing(Phase.REPLAY):
            self._advance_to(block + 1, dict(tensors))

    def collect(self, block: int) -> Mapping[str, Inputs]:
        """See `Executor`."""
        job = self._job
        matrices = job.plan.of_block(block)
        if not job.collect or not matrices:
            return {}
        job.tell(block, Phase.COLLECT)
        with job.phases.timing(Phase.COLLECT):
            parts = self._collected(block)
        self._leaders = {}
        tokens: dict[str, int] = {}
        widths: dict[str, int] = {}
        for part in parts:
            merge_leaders(self._leaders, part.leaders)
            for leader, (d_in, counts) in part.sums.items():
                widths[leader] = d_in
                tokens[leader] = tokens.get(leader, 0) + sum(counts)
        check_called(matrices, self._leaders)
        return {name: Inputs(leader, widths[leader], tokens[leader]) for name, leader in self._leaders.items()}

    def _collected(self, block: int) -> list[terms.Part]:
        """Let all shards be summed at a block, whoever is lost meanwhile, and return what each part is of."""
        if not self._job.collect:
            self._advance_to(block)
            return []
        while missing := self._without_sums(block):
            calls = {member: member.hand.call("collect", block) for member in missing}
            for member, message in self._answers(calls):
                answer, _ = unpack(message, terms.Collected)
                terms.check(answer)
                member.collected = True
                for part in answer.parts:
                    self._parts[part.first] = (member, part)
                    for leader in part.sums:
                        pending = member.hand.call("sums", part.first, leader)
                        self._sums.setdefault(leader, {})[part.first] = (member, pending)
            # A worker answers in order: what it answers after its sums says that these are there.
            for _ in self._answers({member: member.hand.call("spent") for member in missing if member.alive}):
                pass
        summed = sorted(shard for _, part in self._parts.values() for shard in part.shards)
        if summed != list(range(len(self._job.shards))):
            raise AssertionError(f"shards {summed} were summed")
        return [self._parts[first][1] for first in sorted(self._parts)]

    def _without_sums(self, block: int) -> list[_Member]:
        """Return the workers whose shards have still to be summed at a block, with those in place of lost ones."""
        self._advance_to(block)
        for leader, parts in self._sums.items():
            self._sums[leader] = {first: entry for first, entry in parts.items() if entry[0].alive}
        self._parts = {first: entry for first, entry in self._parts.items() if entry[0].alive}
        return [member for member in self._alive() if member.shards and not member.collected]

    def solve(
        self, block: int, bundles: Sequence[Sequence[Matrix]], options: Callable[[Sequence[Matrix]], dict[str, Any]]
    ) -> Iterator[list[Outcome]]:
        """See `Executor`."""
        with self._job.phases.timing(Phase.SOLVE):
            done = self._solved(block, bundles, options)
        yield from done

    def _solved(
        self, block: int, bundles: Sequence[Sequence[Matrix]], options: Callable[[Sequence[Matrix]], dict[str, Any]]
    ) -> list[list[Outcome]]:
        """Deal bundles out to whoever has nothing to do, the costliest first, until all are pruned."""
        costs = [sum(operations(matrix) for matrix in bundle) for bundle in bundles]
        waiting = sorted(range(len(bundles)), key=lambda index: costs[index])
        done: dict[int, list[Outcome]] = {}
        at_work = self._at_work
        pace = 0.0  # seconds an operation, of the slowest so far
        while len(done) < len(bundles):
            if not self._alive():
                self._collected(block)
            for idle in [each for each in self._alive() if each not in at_work][: len(waiting)]:
                index = waiting.pop()
                at_work[idle] = self._begin_work(idle, block, index, bundles[index], options)
            found = self._cluster.first_of([work.call for work in at_work.values()])
            member = next((each for each, work in at_work.items() if work.call == found), None)
            if member is None:
                self._give_up_late({each: pace * costs[work.bundle] for each, work in at_work.items()})
            else:
                work = at_work.pop(member)
                outcomes = self._outcomes(block, member, work)
                if outcomes is None:
                    waiting.append(work.bundle)
                else:
                    done[work.bundle] = outcomes
                    pace = max(pace, (time.monotonic() - work.began) / costs[work.bundle])
            for lost in [each for each in at_work if not each.alive]:
                waiting.append(at_work.pop(lost).bundle)
        return [done[index] for index in range(len(bundles))]

    def _begin_work(
        self,
        member: _Member,
        block: int,
        index: int,
        bundle: Sequence[Matrix],
        options: Callable[[Sequence[Matrix]], dict[str, Any]],
    ) -> _Work:
        """Let a worker prune a bundle."""
        names = [matrix.name for matrix in bundle]
        leader = self._leaders.get(names[0])  # none of an expert that no token reached
        parts = {} if leader is None else self._sums[leader]
        task = pack({"block": block, "matrices": names, "options": options(bundle)})
        call = member.hand.call("solve", task, [parts[first][1] for first in sorted(parts)])
        return _Work(index, call, [parts[first][0] for first in sorted(parts)], time.monotonic())

    def _outcomes(self, block: int, member: _Member, work: _Work) -> list[Outcome] | None:
        """Return the outcomes of a bundle; None where the worker was lost, or sums that it needs.

        Lost sums have been summed again by then.
        """
        try:
            message = self._cluster.answer(work.call)
        except LostError as error:
            self._give_up(member, str(error))
            return None
        answer, tensors = unpack(message, terms.Solved)
        if answer.failed is None or answer.failed[0] != terms.LOST:
            terms.check(answer)
            return answer.outcomes_with(tensors)
        self._give_up(work.holders[int(answer.failed[1])], "its sums could not be fetched")
        self._collected(block)
        return None

    def _give_up_late(self, expected: Mapping[_Member, float]) -> None:
        """Give up workers that take much longer than they should, if there are others."""
        now = time.monotonic()
        for member, work in self._at_work.items():
            late = now - work.began > max(_PATIENCE, _SLOWER * expected[member])
            if late and expected[member] and len(self._alive()) > 1:
                self._give_up(member, "it is much slower than the others")

    def reconstruct(
        self, block: int, tensors: Mapping[str, Tensor], options: Reconstruction
    ) -> tuple[Tuned, dict[str, Tensor]]:
        """See `Executor`."""
        job = self._job
        job.tell(block, Phase.RECONSTRUCT)
        with job.phases.timing(Phase.RECONSTRUCT):
            while True:
                self._collected(block)  # the shards have to be there, and at this block
                (holder,) = (member for member in self._alive() if member.shards)
                tuning = self._cluster.put(pack({"block": block, "options": asdict(options)}, tensors))
                for _, message in self._answers({holder: holder.hand.call("reconstruct", tuning)}):
                    answer, changed = unpack(message, terms.TunedBlock)
                    terms.check(answer)
                    return Tuned(**answer.tuned), changed

    def reports(self) -> tuple[WorkerReport, ...]:
        """See `Executor`."""
        found = []
        for member, message in self._answers({member: member.hand.call("spent") for member in self._alive()}):
            answer, _ = unpack(message, terms.Spent)
            seconds = dict(answer.seconds)
            waited = max(0.0, time.monotonic() - member.began - sum(seconds.values()))
            found.append(WorkerReport(member.number, member.node, tuple(member.shards), seconds, round(waited, 3)))
        return tuple(sorted(found, key=lambda each: each.number))

    def leave(self) -> None:
        """See `Executor`."""
        for member in self._members:
            if member.alive and member not in self._at_work:
                member.hand.close()
            member.hand.kill()
        self._members.clear()

    def _alive(self) -> list[_Member]:
        return [member for member in self._members if member.alive]

    def _hire(self) -> _Member:
        member = _Member(self._hired, self._cluster.hire())
        self._hired += 1
        self._members.append(member)
        return member

    def _open(self, shards: Mapping[_Member, list[int]], *, within: float) -> None:
        """Let new workers take on the charge, and load the model for their shards; those that fail are given up."""
        for member, mine in shards.items():
            member.shards = list(mine)
        calls = {member: member.hand.call("hire", self._charge) for member in shards}
        for member, message in self._answers(calls, within=within):
            answer, _ = unpack(message, terms.Hired)
            terms.check(answer)
            member.node = answer.node
            if answer.needs_files:
                self._send_files(member)
        self._load({member: mine for member, mine in shards.items() if member.alive})

    def _load(self, shards: Mapping[_Member, list[int]]) -> None:
        """Let workers load the model for shards, which begin at the first block."""
        calls = {member: member.hand.call("open", mine) for member, mine in shards.items()}
        for _, message in self._answers(calls, within=_BEGINS):
            terms.check(unpack(message, terms.Answer)[0])

    def _send_files(self, member: _Member) -> None:
        for name, chunks in self._files.items():
            for chunk in chunks():
                pending = member.hand.call("receive", name, self._cluster.put(chunk))
                for _, message in self._answers({member: pending}, within=_BEGINS):
                    terms.check(unpack(message, terms.Answer)[0])
                if not member.alive:
                    return

    def _advance_to(self, block: int, newest: Mapping[str, Tensor] | None = None) -> None:
        """Bring all shards to the input of a block, and those of lost workers to others, or to new ones.

        Args:
            block: index of the block.
            newest: the changed parameters of the block before it, where they are at hand.
        """
        sent: dict[int, Any] = {}
        while True:
            self._replace_lost(block)
            behind = [member for member in self._alive() if member.shards and member.block < block]
            if len(self._alive()) < len(self._members):
                continue
            if not behind:
                return
            index = min(member.block for member in behind)
            if index not in sent:
                sent = {index: self._cluster.put(pack({"block": index}, self._changed(index, block, newest)))}
            those = [member for member in behind if member.block == index]
            for member, message in self._answers({each: each.hand.call("advance", sent[index]) for each in those}):
                terms.check(unpack(message, terms.Answer)[0])
                member.block, member.collected = index + 1, False

    def _changed(self, index: int, block: int, newest: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
        """Return the changed parameters of a finished block: at hand, or in the driver's model."""
        if newest is not None and index == block - 1:
            return newest
        return {name: self._job.model.get_parameter(name).data for name in self._passed[index]}

    def _replace_lost(self, block: int) -> None:
        """Hire a worker in the place of each that was lost, or deal its shards out to the others if none can come."""
        for lost in [member for member in self._members if not member.alive]:
            self._members.remove(lost)
            self._lost += 1
            where = f" on {lost.node}" if lost.node else ""
            note = f"worker {lost.number}{where} was lost, and is replaced ({lost.why})"
            self._job.tell(block, Phase.REPLAY, note=note)
            if self._lost > _MOST_LOST * self._cluster.workers:
                raise HalveError(
                    f"{self._lost} workers were lost at one block, the last one by this: {lost.why}; look at the "
                    "memory of their machines and at Ray's log, then go on with halve resume"
                )
            new = self._hire()
            self._open({new: lost.shards}, within=_STARTS)
            if new.alive:
                continue
            self._members.remove(new)
            rest = self._alive()
            if not rest:
                raise HalveError(
                    f"no worker is left, and no other could be started ({new.why}): go on with halve resume"
                )
            self._job.tell(block, Phase.REPLAY, note="no other worker could be started: the rest share its shards")
            if lost.shards:
                self._deal_out(lost.shards, rest)

    def _deal_out(self, shards: Sequence[int], members: Sequence[_Member]) -> None:
        """Give shards to workers that have others; they begin at the first block, and are brought forward alone.

        The one that reconstructs has to hold them all.
        """
        takers = members[:1] if self._job.settings.reconstruction is not None else members
        for member, more in zip(takers, _dealt(shards, len(takers)), strict=True):
            if more:
                member.shards = sorted([*member.shards, *more])
                member.block, member.collected = 0, False
                self._load({member: more})

    def _give_up(self, member: _Member, why: str) -> None:
        member.alive, member.why = False, why
        member.hand.kill()

    def _answers(
        self, calls: Mapping[_Member, Pending], *, within: float | None = None
    ) -> Iterator[tuple[_Member, Message]]:
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
                    message = self._cluster.answer(call)
                except LostError as error:
                    self._give_up(member, str(error))
                else:
                    yield member, message
                continue
            late = list(waiting.values()) if within is not None and now > within else []
            if within is None and len(calls) > len(waiting) and now > max(_PATIENCE, _SLOWER * slowest):
                late = [member for member in waiting.values() if member not in self._at_work]
            for member in late:
                self._give_up(member, f"it did not answer for {now:.0f} s")
            waiting = {call: member for call, member in waiting.items() if member.alive}


def _dealt(shards: Sequence[int], workers: int) -> list[list[int]]:
    """Deal shards out to workers, neighbours to the same one."""
    return [list(shards[len(shards) * i // workers : len(shards) * (i + 1) // workers]) for i in range(workers)]
