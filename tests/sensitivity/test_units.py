"""What stays dense or is pruned as one."""

from halve.maths.pattern import Pattern
from halve.model.classify import make_plan
from halve.model.plan import Matrix, Plan
from halve.sensitivity.units import units_of
from models import decoder

PATTERN = Pattern("2:4")


def matrix(name, block, parameter="", expert=None, d_out=4, d_in=8):
    return Matrix(name=name, parameter=parameter or name, block=block, d_out=d_out, d_in=d_in, expert=expert)


def plan(*matrices):
    return Plan(("a", "b"), (2,), matrices, ())


def test_every_matrix_of_its_own_parameter_is_a_unit():
    found = make_plan(decoder("llama"), PATTERN)
    units = units_of(found)
    assert [unit.name for unit in units] == [matrix.parameter for matrix in found.matrices]
    assert sum(unit.weights for unit in units) == found.weights


def test_experts_in_one_parameter_are_one_unit():
    units = units_of(plan(matrix("q", 0), matrix("e[0]", 0, "e", 0), matrix("e[1]", 0, "e", 1)))
    assert [(unit.name, unit.weights) for unit in units] == [("q", 32), ("e", 64)]


def test_what_is_stored_together_is_one_unit_in_all_its_blocks():
    parts = (matrix("q", 0), matrix("k", 0, d_out=2), matrix("o", 1), matrix("v", 1))
    units = units_of(plan(*parts), [("q", "k", "v")])
    assert [(unit.name, unit.weights) for unit in units] == [("q", 80), ("o", 32)]
    assert dict(units[0].parameters) == {"q": parts[:1], "k": parts[1:2], "v": parts[3:]}
    assert units[0].blocks == {0, 1}
