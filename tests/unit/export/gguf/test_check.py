"""What counts as the same model, and what a user reads where llama.cpp is missing or dies."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest

from nemotune import assets
from nemotune.errors import CheckpointError, UnsupportedError
from nemotune.export.gguf import check, llama_cpp, llama_cpp_process
from nemotune.export.tuned import open_tuned
from nemotune.models import load_tokenizer


def predictions(noise: float, *, positions: int = 200) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    ours = generator.normal(0, 1, (positions, 64))
    return ours, ours + noise * generator.normal(0, 1, ours.shape)


def test_what_is_lost_is_the_noise_in_units_of_the_signal():
    """KL is half the variance of the noise, and what the context tells is half the variance of the logits: the share is noise squared."""
    for noise in (0.001, 0.03, 0.1):
        assert check.compare("q8_0", *predictions(noise)).lost == pytest.approx(noise**2, rel=0.3)
    assert check.compare("q8_0", *predictions(0.0)).lost == 0


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q5_k_m", "q4_k_m"])
def test_what_rounding_does_passes_and_another_model_does_not(kind, tmp_path):
    """Three times the noise that the reference shows, and predictions of a model that knows other things."""
    noise = math.hypot(*check.ROUNDING[kind])
    rounded = check.compare(kind, *predictions(noise))
    assert check.judge(tmp_path, check.compare(kind, *predictions(3 * noise)), rounded).not_checked is None
    ours, _ = predictions(0)
    with pytest.raises(CheckpointError, match="not the model that was exported"):
        check.judge(tmp_path, check.compare(kind, ours, ours[::-1]), rounded)


def test_f16_with_the_noise_of_q8_0_is_not_f16(tmp_path):
    with pytest.raises(CheckpointError, match="not the model"):
        check.judge(tmp_path, check.compare("f16", *predictions(0.008)), check.compare("f16", *predictions(0.0004)))


def test_of_a_model_that_rounding_alone_makes_another_nothing_is_claimed(tmp_path):
    """Random weights in many layers: q8_0 of the right model is as far off as any other model is."""
    ours, _ = predictions(0)
    found = check.judge(tmp_path, check.compare("q8_0", ours, ours[::-1]), check.compare("q8_0", *predictions(0.9)))
    assert "cannot be told" in str(found) and "of what the context tells" in str(found)


def test_some_tokens_at_other_experts_are_no_other_model_and_most_are(tmp_path):
    """Near a tie of two experts rounding decides; a fifth of the positions may be anywhere, a third may not."""
    rounded = check.compare("f16", *predictions(0.0004))
    ours, theirs = predictions(0.0004)
    theirs[: len(ours) // 5] = ours[: len(ours) // 5][::-1]
    check.judge(tmp_path, check.compare("f16", ours, theirs), rounded)
    theirs[: len(ours) // 3] = ours[: len(ours) // 3][::-1]
    with pytest.raises(CheckpointError, match="not the model"):
        check.judge(tmp_path, check.compare("f16", ours, theirs), rounded)


def test_f32_is_held_by_its_largest_difference(tmp_path):
    ours, theirs = predictions(0.0)
    same = check.compare("f32", ours, ours)
    theirs[7, 3] += 0.002
    for changed in (theirs, theirs * np.nan):
        with pytest.raises(CheckpointError, match="not the model"):
            check.judge(tmp_path, check.compare("f32", ours, changed), same)
    assert check.judge(tmp_path, same, same) == same


def test_without_the_extra_the_report_says_what_is_not_known_and_how_to_learn_it(monkeypatch, tmp_path):
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    told = str(check.check(tmp_path / "absent.gguf", open_tuned(assets.resolve("nemotron-tiny")), "f16"))
    assert "not loaded" in told and "no logits compared" in told and "pip install 'nemotune[llama-cpp]'" in told
    with pytest.raises(UnsupportedError, match="pip install"):
        llama_cpp.logits(tmp_path / "absent.gguf", [[1]])


def test_the_ends_that_are_looked_for_are_the_adapters(monkeypatch, tmp_path):
    """Ten ends its answers, and no base's; llama.cpp is told the same (`tokenizer.stop_tokens`)."""
    tuned = replace(open_tuned(assets.resolve("nemotron-tiny")), adapter_dir=tmp_path)
    encode = load_tokenizer(tuned.directory).encode
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 10}')
    for ends, is_right in (([2, 10, 11], True), ([2, 11], False)):
        found = lambda path, texts, ends=ends: ([encode(text, add_special_tokens=False) for text in texts], ends)  # noqa: E731
        monkeypatch.setattr(llama_cpp, "tokenize", found)
        with nullcontext() if is_right else pytest.raises(CheckpointError, match=r"would not stop at the tokens \[10\]"):
            assert len(check._check_tokens(tmp_path / "some.gguf", tuned)) == 4


@pytest.fixture
def dying(monkeypatch, tmp_path):
    """Have llama.cpp's process end in the given way."""

    def die(how: str) -> None:
        script = tmp_path / "python"
        script.write_text(f"#!/bin/sh\necho loading >&2\necho 'ggml.c:12: GGML_ASSERT(buffer) failed' >&2\necho more >&2\n{how}\n")
        script.chmod(0o755)
        monkeypatch.setattr(llama_cpp, "is_installed", lambda: True)
        monkeypatch.setattr("sys.executable", str(script))

    return die


def test_a_native_crash_is_an_error_with_its_last_words(dying, tmp_path):
    dying("kill -6 $$")
    with pytest.raises(CheckpointError, match=r"ended by signal 6") as caught:
        llama_cpp.logits(tmp_path / "some.gguf", [[1]])
    assert "GGML_ASSERT(buffer) failed" in str(caught.value) and "loading" not in str(caught.value)


@pytest.mark.parametrize("how, told", [("kill -9 $$", "memory is short"), (f"exit {llama_cpp.UNUSABLE}", "more")])
def test_a_file_is_not_blamed_for_a_machine_that_cannot_run_it(how, told, dying, tmp_path):
    """Nothing is known of it then, and the report says why; the file stays."""
    dying(how)
    found = check.check(tmp_path / "some.gguf", open_tuned(assets.resolve("nemotron-tiny")), "f16")
    assert math.isnan(found.difference) and "no logits compared" in str(found) and told in str(found)


def test_another_layout_of_llama_cpps_structs_is_found_out(capsys):
    with pytest.raises(SystemExit) as caught:
        llama_cpp_process._require_layout("llama_context_params", (512, 2048), (512, 512))
    assert caught.value.code == llama_cpp.UNUSABLE and "llama_context_params" in capsys.readouterr().err


def test_what_llama_cpp_says_of_a_file_that_it_cannot_load_is_in_the_error(tmp_path):
    pytest.importorskip("xllamacpp")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUX" + bytes(64))
    with pytest.raises(CheckpointError, match=r"(?s)llama.cpp failed.*invalid magic"):
        llama_cpp.logits(broken, [[1]])
