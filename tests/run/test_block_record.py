import json
import math

import pytest

from halve.model.reconstruct import Tuned
from halve.order.reordering import Reordered
from halve.run.block_record import from_record, to_record
from halve.run.events import BlockReport, MatrixReport
from halve.solve.outcome import Status

FACTS = {"relative_loss": 0.1 + 0.2, "tiny": 5e-324, "huge": 1.7976931348623157e308, "seconds": 1 / 3}


def matrix(**changes):
    given = {"name": "a.b", "parameter": "a.b", "expert": None, "shape": (4, 8), "layout": "out_in", "asked": "auto"}
    given |= {"method": "prox-admm", "refit": "cg", "status": Status.OK, "reason": "", "facts": dict(FACTS)}
    return MatrixReport(**{**given, **changes})


@pytest.mark.parametrize(
    "block",
    [
        None,
        BlockReport(
            "a", ("a.b", "a.c"), Tuned(before=0.3, after=0.1, epoch=4, learning_rate=2e-3, steps=12, held_out=1)
        ),
        BlockReport("a", (), Tuned(before=1.0, after=1.0, epoch=0, learning_rate=None, steps=6, held_out=0)),
    ],
)
def test_reports_come_back_exactly(block):
    matrices = [matrix(), matrix(name="e[3]", expert=3, status=Status.FELL_BACK, reason="why", layout="in_out")]
    spent = {"seconds": {"solve": 0.1 + 0.2}, "peak_memory": {"solve": 1 << 40}, "peak_device_memory": {}}
    reordered, norms = Reordered((), found=3, proven=2), ["a.norm.running_mean"]
    record = json.loads(json.dumps(to_record(matrices, block, reordered, norms, spent)))
    assert from_record(record) == (matrices, block, reordered, norms, spent)


def test_facts_that_are_not_finite_survive():
    record = json.loads(
        json.dumps(to_record([matrix(facts={"a": math.inf, "b": math.nan})], None, Reordered(), [], {}))
    )
    facts = from_record(record)[0][0].facts
    assert facts["a"] == math.inf
    assert math.isnan(facts["b"])
