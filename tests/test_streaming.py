"""Runs whose weights stay on disk: the same bytes as in memory, whatever the family and however they are stopped."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import halve
from halve.errors import CorruptFileError, InputError
from halve.run.loop import _Loop
from models import DECODERS, ENCODER_DECODERS, OF_ONE_RUN, decoder, encoder_decoder, llava, pairs, save, tokens

TEXT = [{"input_ids": tokens(4, 16)}]
WAYS = {
    "wanda": {"method": "wanda"},
    "best": {"method": "auto", "effort": "best", "reconstruct_epochs": 1},
}
FEW = {"min_expert_tokens": 1, "fallback": "magnitude"}


def written(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name not in OF_ONE_RUN}


def same_bytes(source: Path, calibration, **options):
    places = [source.parent / stream for stream in ("never", "always")]
    for place in places:
        halve.prune(source, place, calibration=calibration, stream=place.name, **FEW, **options)
    one, other = map(written, places)
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []
    assert halve.check(places[1], against=source).ok


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", DECODERS)
def test_streamed_equals_in_memory(tmp_path, family, way):
    source = save(decoder(family), tmp_path / "model", max_shard_size="20KB")
    same_bytes(source, TEXT, **WAYS[way])


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_encoder_decoders_too(tmp_path, family):
    same_bytes(save(encoder_decoder(family), tmp_path / "model"), [pairs(family)], method="wanda")


def test_a_model_of_text_and_images_too(tmp_path):
    same_bytes(save(llava(), tmp_path / "model"), TEXT, method="sparsegpt")


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_half_precision_and_dense_targets_too(tmp_path, family):
    source = save(decoder(family).bfloat16(), tmp_path / "model")
    matching = {} if family == "mixtral" else {"match_dense": 0.5}
    same_bytes(source, TEXT, method="auto", **matching)


@pytest.mark.parametrize(("family", "way"), [("llama", "best"), ("mixtral", "wanda"), ("t5", "wanda")])
def test_a_stopped_run_goes_on_in_either_way(tmp_path, family, way, monkeypatch):
    made = encoder_decoder(family) if family == "t5" else decoder(family)
    source = save(made, tmp_path / "model")
    options = {"calibration": [pairs(family)] if family == "t5" else TEXT, **WAYS[way], **FEW}
    halve.prune(source, tmp_path / "whole", stream="never", **options)
    real = _Loop._prune_block

    def stopping(self, index, executor):
        if index == 2:
            raise KeyboardInterrupt
        return real(self, index, executor)

    for first, then in (("always", "never"), ("never", "always"), ("always", "always")):
        out = tmp_path / f"{first}-{then}"
        monkeypatch.setattr(_Loop, "_prune_block", stopping)
        with pytest.raises(KeyboardInterrupt):
            halve.prune(source, out, stream=first, **options)
        monkeypatch.setattr(_Loop, "_prune_block", real)
        done = halve.prune(source, out, stream=then, **options)
        assert done.report.resumed_blocks == 2
        assert written(out) == written(tmp_path / "whole")
        assert not (out / ".halve").exists()


def test_a_run_that_was_stopped_after_its_last_block_goes_on_too(tmp_path, monkeypatch):
    source = save(decoder("mixtral"), tmp_path / "model")
    options = {"calibration": TEXT, "method": "wanda", "stream": "always", **FEW}
    halve.prune(source, tmp_path / "whole", **options)

    def stopping(*_given, **_more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("halve.whole_model.write_checkpoint", stopping)
        with pytest.raises(KeyboardInterrupt):
            halve.prune(source, tmp_path / "out", **options)
    (tmp_path / "out" / ".halve" / "hidden-old").mkdir()
    assert (tmp_path / "out" / ".halve" / "weights").exists()
    assert halve.prune(source, tmp_path / "out", **options).report.resumed_blocks == 3
    assert written(tmp_path / "out") == written(tmp_path / "whole")


def test_a_block_that_was_damaged_after_it_was_kept_is_no_checkpoint(tmp_path, monkeypatch):
    source = save(decoder("llama"), tmp_path / "model")
    real = _Loop._prune_block

    def damaging(self, index, executor):
        if index == 2:
            path = self._ledger.path(0)
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)
        return real(self, index, executor)

    monkeypatch.setattr(_Loop, "_prune_block", damaging)
    with pytest.raises(CorruptFileError, match=r"block-00000\.safetensors"):
        halve.prune(source, tmp_path / "out", calibration=TEXT, stream="always", method="wanda")
    assert not (tmp_path / "out" / "config.json").exists()


def test_what_a_killed_process_has_left_does_not_stand_in_the_way(tmp_path, monkeypatch):
    source = save(decoder("mixtral"), tmp_path / "model")
    home = tmp_path / "out" / ".halve"
    for name in ("weights", "hidden-text-0", "output"):
        (home / name).mkdir(parents=True)
        (home / name / "left").write_bytes(b"x" * 1000)
    real = shutil.disk_usage

    def small(path):
        left = [each for each in ("weights", "hidden-text-0", "output") if (home / each / "left").exists()]
        return real(path) if not left else SimpleNamespace(free=0)

    monkeypatch.setattr("halve.checkpoint.room.shutil.disk_usage", small)
    options = {"calibration": TEXT, "method": "wanda", "stream": "always", **FEW}
    assert halve.prune(source, tmp_path / "out", **options).out == tmp_path / "out"


def test_the_model_that_is_returned_is_the_one_on_disk(tmp_path):
    source = save(decoder("mixtral"), tmp_path / "model")
    pruned = halve.prune(source, tmp_path / "out", calibration=TEXT, stream="always", method="wanda", **FEW)
    again = halve.load(tmp_path / "out").model
    for (name, one), other in zip(pruned.model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize(
    ("free", "stream", "streamed"), [(3, "auto", False), (1, "auto", True), (1, "never", False), (9, "always", True)]
)
def test_models_that_would_fill_the_memory_are_streamed_by_themselves(tmp_path, monkeypatch, free, stream, streamed):
    source = save(decoder("llama"), tmp_path / "model")
    size = (source / "model.safetensors").stat().st_size
    seen = []
    real = halve.whole_model.load_streamed

    def watched(*given, **more):
        seen.append(given)
        return real(*given, **more)

    monkeypatch.setattr(halve.whole_model, "load_streamed", watched)
    monkeypatch.setattr("halve.memory.available_memory", lambda: free * size)
    halve.prune(source, tmp_path / "out", method="magnitude", refit="none", stream=stream)
    assert bool(seen) == streamed


_MEASURED = """
import sys
import psutil, torch
import halve
from halve.run.loop import _Loop

source, out, stream = sys.argv[1:]
torch.set_num_threads(1)
real, held = _Loop._prune_block, []

def used():
    return psutil.Process().memory_full_info().uss

def watched(self, index, executor):
    tensors = real(self, index, executor)
    held.append(used())
    return tensors

_Loop._prune_block = watched
text = [{"input_ids": torch.randint(3, 64, (4, 16))}]
for place in (out + "-first", out):  # the first loads all libraries
    held.clear()
    before = used()
    halve.prune(source, place, calibration=text, stream=stream, method="wanda", refit="none")
print(max(held) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives pages back on demand")
def test_it_takes_the_memory_of_a_block_not_of_the_model(tmp_path):
    model = decoder("llama", hidden_size=512, intermediate_size=2048, num_hidden_layers=12)
    source = save(model, tmp_path / "model")
    size = (source / "model.safetensors").stat().st_size
    most = {}

    def measured(stream, attempt=0):  # in a process of its own, whose memory holds nothing else
        command = [sys.executable, "-c", _MEASURED, source, tmp_path / f"{stream}{attempt}", stream]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])

    most["always"] = measured("always")
    # Memory that the libraries' first run has freed makes up for some of it, by chance.
    attempts = (measured("never", attempt) for attempt in range(3))
    most["never"] = next((found for found in attempts if found > 0.9 * size), 0)
    assert most["always"] < 0.6 * size  # of twelve blocks one, its copy, its statistics, and what libraries keep
    assert most["never"] > 0.9 * size  # so the measure would show it


@pytest.mark.parametrize(
    ("made", "more", "said"),
    [
        ("directory", {"stream": "sometimes"}, "stream = 'sometimes' is not known: choose one of auto, always, never"),
        ("memory", {"stream": "always"}, "leave it out for a model in memory"),
    ],
)
def test_what_cannot_be_streamed_is_refused(tmp_path, made, more, said):
    model = decoder("llama")
    given = model if made == "memory" else save(model, tmp_path / "model")
    with pytest.raises(InputError, match=said):
        halve.prune(given, tmp_path / "out", method="magnitude", refit="none", **more)
    assert not (tmp_path / "out").exists()


def test_without_a_directory_nothing_can_stay_on_disk(tmp_path):
    with pytest.raises(InputError, match="leaves pruned weights on disk too, where a checkpoint is put: give out"):
        halve.prune(save(decoder("llama"), tmp_path / "model"), method="magnitude", refit="none", stream="always")


@pytest.mark.parametrize("way", WAYS)
def test_hidden_states_go_to_disk_where_they_would_fill_the_memory(tmp_path, monkeypatch, way):
    source = save(decoder("llama"), tmp_path / "model")
    batches = [{"input_ids": part} for part in tokens(6, 16).split(2)]
    halve.prune(source, tmp_path / "memory", calibration=batches, **WAYS[way])
    monkeypatch.setattr("halve.model.blocks.would_fill", lambda _size: True)
    heard, there = [], []

    def listen(step):
        heard.append(step.caution)
        there.extend(path.name for path in (tmp_path / "disk" / ".halve").glob("hidden-*"))

    halve.prune(source, tmp_path / "disk", calibration=batches, listen=listen, **WAYS[way])
    assert written(tmp_path / "disk") == written(tmp_path / "memory")
    assert "hidden-model.layers-0" in there
    assert any("hidden states of the calibration set" in each and "are kept on disk" in each for each in heard)
    assert not (tmp_path / "disk" / ".halve").exists()


def test_hidden_states_that_do_not_fit_are_refused_where_there_is_no_place_for_them(tmp_path, monkeypatch):
    monkeypatch.setattr("halve.memory.available_memory", lambda: 10)
    with pytest.raises(InputError, match="the hidden states of the calibration set need"):
        halve.prune(decoder("llama"), calibration=TEXT, method="wanda")
