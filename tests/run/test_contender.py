import pytest

from halve.errors import InputError
from halve.model.reconstruct import Reconstruction
from halve.run.contender import Contender, make_requests
from halve.sensitivity.keep_dense import KeepDense


def test_a_name_alone_is_the_method_as_published():
    assert Contender.parse("wanda") == Contender("wanda", "none")
    assert Contender.parse(" wanda+cg ") == Contender("wanda", "cg")
    assert str(Contender.parse("wanda+cg")) == "wanda+cg"
    for text in ("wanda+block", "wanda+cg+block"):
        parsed = Contender.parse(text)
        assert parsed.reconstruct
        assert str(parsed) == text
    assert Contender.parse("wanda++") == Contender("wanda++", "none")
    assert Contender.parse("wanda+++cg+block") == Contender("wanda++", "cg", reconstruct=True)
    for text in ("wanda+block", "wanda+cg+block", "wanda++", "wanda+++cg", "wanda+++block"):
        assert str(Contender.parse(text)) == text
    for text in (
        "wanda++cg",
        "wanda++++cg",
        "wanda+++",
        "",
        "+cg",
        "wanda+",
        "wanda+cg+gd",
        "wanda+block+cg",
        "+block",
    ):
        with pytest.raises(InputError, match="is not a method to compare"):
            Contender.parse(text)


def test_a_name_may_say_how_much_stays_dense():
    for text in ("wanda+keep-dense=10%", "wanda+cg+keep-dense=1.5x", "wanda+++cg+block+keep-dense=0.5%"):
        assert str(Contender.parse(text)) == text
    assert Contender.parse("wanda + keep-dense= 10%") == Contender("wanda", "none", keep_dense="10%")
    with pytest.raises(InputError, match=r"keep_dense = '10' is neither a share"):
        Contender.parse("wanda+keep-dense=10")
    for text in ("wanda+keep-dense=10%+cg", "wanda+keep-dense=10%+block", "+keep-dense=10%"):
        with pytest.raises(InputError, match="is not a method to compare"):
            Contender.parse(text)


def test_what_stays_dense_is_the_contenders_own_or_that_of_all():
    own, other = Contender.parse("wanda+keep-dense=10%"), Contender.parse("wanda")
    asked = make_requests([own, other], {})
    assert [asked[each].settings.keep_dense for each in (own, other)] == [KeepDense("10%"), None]
    asked = make_requests([own, other], {}, keep_dense_tokens=64)
    assert [asked[each].settings.keep_dense for each in (own, other)] == [KeepDense("10%", 64), None]
    asked = make_requests([own, other], {}, keep_dense="5%", keep_dense_tokens=32)
    assert [asked[each].settings.keep_dense for each in (own, other)] == [KeepDense("10%", 32), KeepDense("5%", 32)]
    with pytest.raises(InputError, match=r"keep_dense_tokens goes with keep_dense, which is not given"):
        make_requests([other], {}, keep_dense_tokens=64)


def test_a_contender_named_twice_is_refused():
    with pytest.raises(InputError, match=r"wanda\+cg is named twice"):
        make_requests([Contender.parse(name) for name in ("wanda+cg", "wanda", " wanda+cg")], {})


def test_options_go_to_their_method_or_refit():
    contenders = [Contender.parse(name) for name in ("prox-gradient+gd", "wanda+gd", "wanda")]
    requests = make_requests(contenders, {"prox-gradient": {"beta": 1.2}, "gd": {"steps": 7}})
    assert requests[contenders[0]].settings.options == {"beta": 1.2, "refit_steps": 7}
    assert requests[contenders[1]].settings.options == {"refit_steps": 7}
    assert requests[contenders[2]].settings.options == {}
    with pytest.raises(InputError, match=r"'sparsegpt' belong to none of the compared: gd, prox-gradient, wanda$"):
        make_requests(contenders, {"sparsegpt": {"damping": 0.1}})
    tuned = Contender.parse("wanda+block")
    asked = make_requests([*contenders, tuned], {"block": {"epochs": 3}})
    assert asked[tuned].settings.reconstruction == Reconstruction(epochs=3)
    assert asked[contenders[2]].settings.reconstruction is None
    assert make_requests(contenders, {}, min_expert_tokens=5)[contenders[0]].settings.min_expert_tokens == 5


@pytest.mark.parametrize("name", ["model", "method", "pattern", "steps"])
def test_an_option_of_neither_method_nor_refit_is_refused(name):
    message = f"prox-gradient\\+gd has no option '{name}': its options are lambda0, beta, max_iterations, refit_steps"
    with pytest.raises(InputError, match=message):
        make_requests([Contender("prox-gradient", "gd")], {"prox-gradient": {name: 3}})


@pytest.mark.parametrize(
    ("contender", "owner", "option", "value"),
    [
        ("prox-gradient", "prox-gradient", "beta", "abc"),
        ("prox-gradient", "prox-gradient", "lambda0", True),
        ("prox-gradient", "prox-gradient", "max_iterations", True),
        ("sparsegpt", "sparsegpt", "damping", True),
        ("sparsegpt", "sparsegpt", "damping", [1]),
        ("sparsegpt", "sparsegpt", "block_size", True),
        ("wanda+cg", "cg", "tolerance", "x"),
        ("wanda+cg", "cg", "max_iterations", True),
        ("wanda+gd", "gd", "steps", True),
    ],
)
def test_options_of_another_type_are_refused(contender, owner, option, value):
    with pytest.raises(InputError, match=f"{option} .*must be a .*number.*, got "):
        make_requests([Contender.parse(contender)], {owner: {option: value}})
