"""``bench/recovery.py`` at a small fraction of its size: every stage comes to a line, and a second call goes on."""

import json

import recovery
from tiny_tokenizers import SENTENCES


def call(checkpoint, folder, *stages):
    text = folder / "text.jsonl"
    lines = [json.dumps({"text": " ".join(SENTENCES)}) for _ in range(60)]
    text.write_text("\n".join(lines), encoding="utf-8")
    sizes = ["--seq-len", "32", "--windows", "4", "--samples", "4", "--time-limit", "1", "--share", "0.0001"]
    steps = ["--batch-tokens", "128", "--forward-tokens", "64", "--learning-rate", "0.001"]
    places = ["--train", str(text), "--evaluate", str(text), "--work", str(folder / "work"), "--device", "cpu"]
    asked = [
        str(checkpoint),
        *places,
        *sizes,
        *steps,
        "--headline",
        "1000000",
        "--methods",
        "proxsparse",
        "--stages",
        *stages,
    ]
    recovery.Recovery(recovery.parse(asked)).run()
    return [json.loads(line) for line in (folder / "work" / "results.jsonl").read_text().splitlines()]


def test_every_stage_comes_to_a_line_and_none_is_done_twice(checkpoint, tmp_path, capsys):
    lines = call(checkpoint, tmp_path, "starts", "short")
    assert [line["name"] for line in lines] == [
        "auto+block",
        "wanda",
        "auto",
        "short: from auto",
        "short: from wanda",
        "short: from auto, cross-entropy",
        "short: from auto, norms and biases",
        "short: proxsparse",
    ]
    assert "failed" not in capsys.readouterr().out
    trained = lines[3]
    assert (trained["steps"], trained["tokens"]) == (2, 256)
    assert trained["start"] == "auto"
    assert len(trained["ratio"]) == len(trained["texts"]) == 1
    assert [point["perplexity"] for point in trained["curve"] if point["perplexity"]]
    again = call(checkpoint, tmp_path, "starts", "headline", "short")
    assert [line["name"] for line in again[len(lines) :]] == ["headline 1000000"]
