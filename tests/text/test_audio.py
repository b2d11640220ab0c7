"""Audio with transcripts: wave files to features, by the model's own extractor."""

import json
import math
import struct
import wave

import pytest
import torch
import transformers as tf

import halve
from halve.errors import InputError
from halve.text.audio import read_wave
from models import encoder_decoder
from tiny_tokenizers import SENTENCES, surrounding, word_level

RATE = 16_000


def write_wave(path, frames, *, channels=1, rate=RATE, width=2):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(frames)
    return path


def tone(seconds, pitch, channels=1):
    samples = [int(20_000 * math.sin(pitch * index / RATE)) for index in range(int(seconds * RATE))]
    return struct.pack(f"<{channels * len(samples)}h", *(value for value in samples for _ in range(channels)))


@pytest.fixture
def whisper(tmp_path):
    """A tiny Whisper on disk, with an extractor of 1 second and a tokenizer that puts the start token first."""
    place = tmp_path / "whisper"
    model = encoder_decoder("whisper")
    model.config.decoder_start_token_id = 1
    model.save_pretrained(place)
    surrounding(word_level(), "<s> $A </s>").save_pretrained(place)
    tf.WhisperFeatureExtractor(feature_size=8, sampling_rate=RATE, hop_length=400, chunk_length=1).save_pretrained(
        place
    )
    return place


@pytest.fixture
def file(tmp_path):
    folder = tmp_path / "sounds"
    folder.mkdir()
    lines = []
    for index, sentence in enumerate(SENTENCES):
        write_wave(folder / f"{index}.wav", tone(0.3 + 0.2 * index, 2000 * (index + 1)))
        lines.append(json.dumps({"audio": f"{index}.wav", "text": sentence}))
    (folder / "all.jsonl").write_text("\n".join(lines))
    return folder / "all.jsonl"


def test_a_model_that_hears_is_pruned_on_audio_with_transcripts(whisper, file, tmp_path):
    asked = {"calibration": file, "pair_fields": "audio,text", "samples": 4}
    pruned = halve.prune(whisper, tmp_path / "out", method="wanda", refit="none", **asked)
    tokenizer = surrounding(word_level(), "<s> $A </s>")
    said = sum(len(tokenizer(sentence)["input_ids"]) - 1 for sentence in SENTENCES)  # the start token once, no </s>
    record = pruned.record["calibration"]
    assert (record["pairs"], record["decoder_tokens"], record["encoder_tokens"]) == (
        "fields audio and text",
        said,
        None,
    )
    counted = {m.name: m.facts["tokens"] for m in pruned.report.matrices}
    assert counted["model.encoder.layers.0.fc1.weight"] == 4 * 20  # all positions of the encoder, silence too
    assert counted["model.decoder.layers.0.encoder_attn.k_proj.weight"] == 4 * 20
    assert counted["model.decoder.layers.0.fc1.weight"] == said
    assert halve.check(tmp_path / "out", against=whisper).ok


def test_what_the_encoder_hears_is_what_the_extractor_makes(whisper, file):
    from halve.checkpoint.load import load_model
    from halve.text.calibration import Calibration

    loaded = load_model(whisper)
    found = Calibration(file, samples=4, pair_fields="audio,text").data(loaded)
    extractor = tf.WhisperFeatureExtractor.from_pretrained(whisper)
    expected = []
    for index in range(4):
        with wave.open(str(file.parent / f"{index}.wav")) as sound:
            values = struct.unpack(f"<{sound.getnframes()}h", sound.readframes(sound.getnframes()))
        features = extractor([value / 32768 for value in values], sampling_rate=RATE, return_tensors="pt")
        expected.append(features["input_features"])
    for row in found.rows:
        assert any(torch.allclose(row["input_features"], one, atol=1e-4) for one in expected)
        assert row["decoder_input_ids"][0, 0] == 1
        assert row["decoder_input_ids"][0, 1] > 2  # not the start token again


def test_channels_are_mixed_down(tmp_path):
    left, right = [100, -200, 300], [300, 200, -300]
    both = struct.pack("<6h", *(value for pair in zip(left, right, strict=True) for value in pair))
    found = read_wave(write_wave(tmp_path / "a.wav", both, channels=2), RATE, "x, line 1,")
    assert found.tolist() == [200 / 32768, 0.0, 0.0]


@pytest.mark.parametrize(
    ("frames", "settings", "message"),
    [
        (tone(0.1, 500), {"rate": 8000}, r"has 8000 samples a second, and the model's .* 16000: .*ffmpeg.*-ar 16000"),
        (b"\x01" * 64, {"width": 1}, r"has 8 bits a sample, and 16-bit PCM is needed"),
        (b"", {}, r"holds no audio"),
        (tone(1.5, 500), {}, r"is 1\.5 s long, and the model hears 1\.0 s at most"),
    ],
)
def test_other_audio_is_refused(whisper, file, frames, settings, message):
    write_wave(file.parent / "2.wav", frames, **settings)
    with pytest.raises(InputError, match=rf"2\.wav {message}"):
        halve.prune(whisper, calibration=file, pair_fields="audio,text", samples=4)


def test_what_is_no_wave_file_is_refused(whisper, file):
    (file.parent / "2.wav").write_bytes(b"ID3 this is an mp3")
    with pytest.raises(InputError, match=r"2\.wav is not a readable \.wav file .*ffmpeg"):
        halve.prune(whisper, calibration=file, pair_fields="audio,text", samples=4)
    (file.parent / "2.wav").unlink()
    with pytest.raises(InputError, match=r"all\.jsonl, line 3, names .*2\.wav, which does not exist"):
        halve.prune(whisper, calibration=file, pair_fields="audio,text", samples=4)


def test_a_model_without_an_extractor_is_refused(whisper, file):
    asked = {"calibration": file, "pair_fields": "audio,text", "samples": 4}
    with pytest.raises(InputError, match="a model in memory has no feature extractor"):
        halve.prune(encoder_decoder("whisper"), tokenizer=word_level(), **asked)
    (whisper / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r"the feature extractor of .* could not be loaded.*preprocessor_config"):
        halve.prune(whisper, **asked)


def test_text_alone_is_refused(whisper, text):
    with pytest.raises(InputError, match="takes input_features, not text, so a text cannot calibrate it"):
        halve.prune(whisper, calibration=text, samples=1)
    with pytest.raises(InputError, match="takes input_features, not text, so its perplexity on text"):
        halve.evaluate(whisper, text, seq_len=16)
