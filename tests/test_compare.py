import pytest
import torch

from halve import check
from halve.checkpoint import LoadedModel
from halve.compare import Contender, as_json, checkpoint_directory, compare, evaluation_texts, make_requests
from halve.errors import InputError
from halve.tokens import TokenSet, hash_ids
from models import decoder, tokens


def token_set(seed, name):
    ids = tokens(seed=seed)
    return TokenSet(ids, name, hash_ids(ids), 1)


def test_a_name_alone_is_the_method_as_published():
    assert Contender.parse("wanda") == Contender("wanda", "none")
    assert Contender.parse(" wanda+cg ") == Contender("wanda", "cg")
    assert str(Contender.parse("wanda+cg")) == "wanda+cg"
    for text in ("", "+cg", "wanda+"):
        with pytest.raises(InputError, match="is not a method to compare"):
            Contender.parse(text)


def test_rows_come_in_order_and_the_dense_model_stays_dense(tmp_path):
    model = decoder("llama")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    contenders = [Contender.parse(name) for name in ("magnitude", "wanda", "wanda+cg")]
    rows = list(
        compare(
            LoadedModel(model, None, None),
            make_requests(contenders, {}, forward_dtype="float32"),
            token_set(0, "calibration"),
            [token_set(1, "one"), token_set(2, "two")],
            out=tmp_path,
            forward_dtype="float32",
        )
    )
    assert [row.name for row in rows] == ["dense", "magnitude", "wanda", "wanda+cg"]
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert rows[0].mean_relative_loss is None
    assert rows[3].mean_relative_loss < rows[2].mean_relative_loss < rows[1].mean_relative_loss
    assert len({row.perplexities[0].value for row in rows}) == 4
    assert as_json(rows)[1]["perplexity"].keys() == {"one", "two"}
    for contender in contenders:
        assert check(checkpoint_directory(tmp_path, contender)).ok


def test_options_go_to_their_method_or_refit():
    contenders = [Contender.parse(name) for name in ("prox-gradient+gd", "wanda+gd", "wanda")]
    requests = make_requests(contenders, {"prox-gradient": {"beta": 1.2}, "gd": {"steps": 7}})
    assert requests[contenders[0]].settings.options == {"beta": 1.2, "refit_steps": 7}
    assert requests[contenders[1]].settings.options == {"refit_steps": 7}
    assert requests[contenders[2]].settings.options == {}
    with pytest.raises(InputError, match="'sparsegpt' belong to none"):
        make_requests(contenders, {"sparsegpt": {"damping": 0.1}})


def test_a_model_without_tokenizer_cannot_read_text():
    with pytest.raises(InputError, match="has no tokenizer"):
        evaluation_texts(LoadedModel(decoder("llama"), None, None), ["x.txt"], seq_len=8, max_windows=1, text_field="")
