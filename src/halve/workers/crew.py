"""The driver's side: what `halve.run.loop` asks for is dealt out to workers, and done again where one is lost."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from halve.errors import counted
from halve.model.collect import check_called, merge_leaders
from halve.model.layers import parameter_or_buffer
from halve.model.plan import Matrix
from halve.model.reconstruct import Reconstruction, Tuned
from halve.order.recording import from_plain
from halve.order.reordering import Reordered
from halve.run.bundles import operations
from halve.run.events import WorkerReport
from halve.run.executor import Inputs, Job
from halve.run.phases import Phase
from halve.solve.outcome import Outcome
from halve.workers import terms
from halve.workers.cluster import Cluster, Pending
from halve.workers.fetching import LostError, fetch
from halve.workers.messages import pack, unpack
from halve.workers.roster import BEGINS, Files, Member, Roster, dealt, is_late

A = TypeVar("A", bound=terms.Answer)


@dataclass(frozen=True)
class _Task:
    """What any worker can do once it has what was summed over the inputs of a matrix.

    Attributes:
        method: of the worker (`halve.workers.worker.Worker`).
        matrix: its name.
        cost: what this takes, in any unit that the tasks dealt out with it have too.
        content: returns that of the message; called when the task is begun.
    """

    method: str
    matrix: str
    cost: float
    content: Callable[[], Mapping[str, Any]]


@dataclass(frozen=True)
class _Work:
    """What a worker is doing.

    Attributes:
        task: index of the task.
        call: that will be answered.
        holders: workers that have summed over the inputs of its matrix.
        began: when.
    """

    task: int
    call: Pending
    holders: Sequence[Member]
    began: float


class Crew:
    """Does the work of a job on the workers of a cluster (`halve.run.executor.Executor`).

    Args:
        job: what to work on; its model stays with the driver.
        cluster: that workers are hired on.
        charge: what they are to work on.
        files: the model's files, by their names in the charge, for workers that do not have them.
    """

    def __init__(self, job: Job, cluster: Cluster, charge: terms.Charge, files: Files) -> None:
        self._job = job
        self._cluster = cluster
        tensors = {
            f"{number}.{name}": tensor for number, batch in enumerate(job.batches) for name, tensor in batch.items()
        }
        tuned = job.settings.reconstruction is not None
        self._roster = Roster(cluster, cluster.put(pack(terms.plain(charge), tensors)), files, job.tell, together=tuned)
        self._passed: list[tuple[str, ...]] = []  # names of the parameters that each finished block has changed
        self._leaders: dict[str, str] = {}
        self._parts: dict[int, tuple[Member, terms.Part]] = {}
        self._sums: dict[str, dict[int, tuple[Member, Pending]]] = {}
        self._orders: list[dict[str, Any]] = []  # of the block that is being pruned
        self._at_work: dict[Member, _Work] = {}
        self._roster.busy = self._at_work.keys()

    def begin(self, block: int) -> None:
        """See `Executor`; the first block is when workers are hired."""
        if self._roster.members:
            return
        self._job.tell(block, Phase.CAPTURE)
        with self._job.phases.timing(Phase.CAPTURE):
            # A reconstruction goes through all batches one by one: one worker holds them all, the others solve.
            tuned = self._job.settings.reconstruction is not None
            holding = 1 if tuned else min(self._cluster.workers, len(self._job.shards))
            shares = dealt(range(len(self._job.shards)), holding)
            shares += [[] for _ in range(self._cluster.workers - holding)]
            self._roster.open({self._roster.hire(): mine for mine in shares}, within=BEGINS)
            self._roster.replace_lost(block)
        held, idle = counted(len(self._job.shards), "shard"), self._cluster.workers - holding
        if tuned:
            held += ", all held by one of them, which reconstructs"
        elif idle:
            held += f", so that {idle} only prune matrices: give more shards, or more samples for them"
        self._job.tell(block, Phase.CAPTURE, note=f"{counted(len(self._roster.alive), 'worker')} for {held}")

    def follow(self, block: int, tensors: Mapping[str, Tensor]) -> None:
        """See `Executor`."""
        self._roster.progress()
        self._passed.append(tuple(tensors))
        with self._job.phases.timing(Phase.REPLAY):
            self._advance_to(block + 1, dict(tensors))

    def finish(self, block: int, tensors: Mapping[str, Tensor]) -> None:
        """See `Executor`."""
        self._sums.clear()
        self._parts.clear()
        self._orders = []
        self._roster.progress()
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
            for member, message in self._roster.answers(calls):
                answer, _ = unpack(message, terms.Collected)
                terms.check(answer)
                member.collected = True
                for part in answer.parts:
                    self._parts[part.first] = (member, part)
                    for leader in part.sums:
                        pending = member.hand.call("sums", part.first, leader)
                        self._sums.setdefault(leader, {})[part.first] = (member, pending)
            # A worker answers in order: what it answers after its sums says that these are there.
            for _ in self._roster.answers({member: member.hand.call("spent") for member in missing if member.alive}):
                pass
        summed = sorted(shard for _, part in self._parts.values() for shard in part.shards)
        if summed != list(range(len(self._job.shards))):
            raise AssertionError(f"shards {summed} were summed")
        return [self._parts[first][1] for first in sorted(self._parts)]

    def _without_sums(self, block: int) -> list[Member]:
        """Return the workers whose shards have still to be summed at a block, with those in place of lost ones."""
        self._advance_to(block)
        for leader, parts in self._sums.items():
            self._sums[leader] = {first: entry for first, entry in parts.items() if entry[0].alive}
        self._parts = {first: entry for first, entry in self._parts.items() if entry[0].alive}
        return [member for member in self._roster.alive if member.shards and not member.collected]

    def reorder(self, block: int) -> Reordered:
        """See `Executor`: one worker finds what folds, and orders are chosen by all of them."""
        job = self._job
        job.tell(block, Phase.REORDER)
        with job.phases.timing(Phase.REORDER):
            folds = self._folds(block)
            consumers = [f"{job.plan.blocks[block]}.{fold['consumer']}" for fold in folds.folds]
            tasks = []
            for matrix in job.plan.of_block(block):
                if matrix.parameter in consumers:
                    content = {"block": block, "matrix": matrix.name, "folds": folds.folds}
                    tasks.append(_Task("choose", matrix.name, operations(matrix), partial(dict, content)))
            answers = self._dealt_out(block, tasks, terms.Chosen)
        for answer, _ in answers:
            for caution in answer.cautions:
                job.tell(block, Phase.REORDER, caution=caution)
        chosen = {order["consumer"]: order for answer, _ in answers for order in answer.orders}
        self._orders = [chosen[fold["consumer"]] for fold in folds.folds if fold["consumer"] in chosen]
        return Reordered(tuple(from_plain(order) for order in self._orders), folds.found, len(folds.folds))

    def _folds(self, block: int) -> terms.Folds:
        """Let a worker that has run a block find its folds."""
        while True:
            self._collected(block)
            holder = next(member for member in self._roster.alive if member.shards)
            for _, message in self._roster.answers({holder: holder.hand.call("folds", block)}):
                answer, _ = unpack(message, terms.Folds)
                terms.check(answer)
                return answer

    def solve(
        self, block: int, bundles: Sequence[Sequence[Matrix]], options: Callable[[Sequence[Matrix]], dict[str, Any]]
    ) -> Iterator[list[Outcome]]:
        """See `Executor`."""

        def content(bundle: Sequence[Matrix]) -> dict[str, Any]:
            names = [matrix.name for matrix in bundle]
            return {"block": block, "matrices": names, "options": options(bundle), "orders": self._orders}

        tasks = []
        for bundle in bundles:
            cost = sum(operations(matrix) for matrix in bundle)
            tasks.append(_Task("solve", bundle[0].name, cost, partial(content, bundle)))
        with self._job.phases.timing(Phase.SOLVE):
            done = self._dealt_out(block, tasks, terms.Solved)
        yield from (answer.outcomes_with(tensors) for answer, tensors in done)

    def _dealt_out(self, block: int, tasks: Sequence[_Task], kind: type[A]) -> list[tuple[A, dict[str, Tensor]]]:
        """Deal tasks out to whoever has nothing to do, the costliest first, until all are done; return the answers."""
        waiting = sorted(range(len(tasks)), key=lambda index: tasks[index].cost)
        done: dict[int, tuple[A, dict[str, Tensor]]] = {}
        at_work = self._at_work
        pace = 0.0  # seconds a unit of cost, of the slowest so far
        while len(done) < len(tasks):
            if not self._roster.alive:
                self._collected(block)
            for idle in [each for each in self._roster.alive if each not in at_work][: len(waiting)]:
                index = waiting.pop()
                at_work[idle] = self._begin_work(idle, index, tasks[index])
            found = self._cluster.first_of([work.call for work in at_work.values()])
            member = next((each for each, work in at_work.items() if work.call == found), None)
            if member is None:
                self._give_up_late({each: pace * tasks[work.task].cost for each, work in at_work.items()})
            else:
                work = at_work.pop(member)
                answer = self._answer(block, member, work, kind)
                if answer is None:
                    waiting.append(work.task)
                else:
                    done[work.task] = answer
                    pace = max(pace, (time.monotonic() - work.began) / tasks[work.task].cost)
            for lost in [each for each in at_work if not each.alive]:
                waiting.append(at_work.pop(lost).task)
        return [done[index] for index in range(len(tasks))]

    def _begin_work(self, member: Member, index: int, task: _Task) -> _Work:
        """Let a worker do a task."""
        leader = self._leaders.get(task.matrix)  # none of an expert that no token reached
        parts = {} if leader is None else self._sums[leader]
        call = member.hand.call(task.method, pack(task.content()), [parts[first][1] for first in sorted(parts)])
        return _Work(index, call, [parts[first][0] for first in sorted(parts)], time.monotonic())

    def _answer(self, block: int, member: Member, work: _Work, kind: type[A]) -> tuple[A, dict[str, Tensor]] | None:
        """Return the answer to a task; None where the worker was lost, or sums that it needs.

        Lost sums have been summed again by then.
        """
        try:
            message = fetch(work.call)
        except LostError as error:
            self._roster.give_up(member, str(error))
            return None
        answer, tensors = unpack(message, kind)
        if answer.failed is None or answer.failed[0] != terms.LOST:
            terms.check(answer)
            return answer, tensors
        self._roster.give_up(work.holders[int(answer.failed[1])], "its sums could not be fetched")
        self._collected(block)
        return None

    def _give_up_late(self, expected: Mapping[Member, float]) -> None:
        """Give up workers that take much longer than they should, if there are others."""
        now = time.monotonic()
        for member, work in self._at_work.items():
            late = is_late(now - work.began, expected[member])
            if late and expected[member] and len(self._roster.alive) > 1:
                self._roster.give_up(member, "it is much slower than the others")

    def estimate_norms(self, block: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Executor`; `halve.workers.hiring` refuses models that have any."""
        del block, tensors
        return {}

    def reconstruct(
        self, block: int, tensors: Mapping[str, Tensor], options: Reconstruction
    ) -> tuple[Tuned, dict[str, Tensor]]:
        """See `Executor`."""
        job = self._job
        job.tell(block, Phase.RECONSTRUCT)
        with job.phases.timing(Phase.RECONSTRUCT):
            while True:
                self._collected(block)  # the shards have to be there, and at this block
                (holder,) = (member for member in self._roster.alive if member.shards)
                tuning = self._cluster.put(pack({"block": block, "options": asdict(options)}, tensors))
                for _, message in self._roster.answers({holder: holder.hand.call("reconstruct", tuning)}):
                    answer, changed = unpack(message, terms.TunedBlock)
                    terms.check(answer)
                    return Tuned(**answer.tuned), changed

    def reports(self) -> tuple[WorkerReport, ...]:
        """See `Executor`."""
        found = []
        calls = {member: member.hand.call("spent") for member in self._roster.alive}
        for member, message in self._roster.answers(calls):
            answer, _ = unpack(message, terms.Spent)
            seconds = dict(answer.seconds)
            waited = max(0.0, time.monotonic() - member.began - sum(seconds.values()))
            found.append(WorkerReport(member.number, member.node, tuple(member.shards), seconds, round(waited, 3)))
        return tuple(sorted(found, key=lambda each: each.number))

    def leave(self) -> None:
        """See `Executor`."""
        for member in self._roster.members:
            if member.alive and member not in self._at_work:
                member.hand.close()
            member.hand.kill()
        self._roster.members.clear()

    def _advance_to(self, block: int, newest: Mapping[str, Tensor] | None = None) -> None:
        """Bring all shards to the input of a block, and those of lost workers to others, or to new ones.

        Args:
            block: index of the block.
            newest: the changed parameters of the block before it, where they are at hand.
        """
        sent: dict[int, Any] = {}
        while True:
            self._roster.replace_lost(block)
            behind = [member for member in self._roster.alive if member.shards and member.block < block]
            if len(self._roster.alive) < len(self._roster.members):
                continue
            if not behind:
                return
            index = min(member.block for member in behind)
            if index not in sent:
                sent = {index: self._cluster.put(pack({"block": index}, self._changed(index, block, newest)))}
            those = [member for member in behind if member.block == index]
            calls = {member: member.hand.call("advance", sent[index]) for member in those}
            for member, message in self._roster.answers(calls):
                terms.check(unpack(message, terms.Answer)[0])
                member.block, member.collected = index + 1, False

    def _changed(self, index: int, block: int, newest: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
        """Return the changed parameters of a finished block: at hand, or in the driver's model."""
        if newest is not None and index == block - 1:
            return newest
        return {name: parameter_or_buffer(self._job.model, name).data for name in self._passed[index]}
