"""Every tensor on disk has a home or is kept; nothing is dropped, renamed or held twice."""

from __future__ import annotations

import json
import weakref

import pytest
import torch
from random_models import make
from safetensors.torch import load_file, save_file

from nemotune.errors import CheckpointError, MissingFileError, RecipeError, UnsupportedError
from nemotune.models import load_model, locate, save_model
from nemotune.weights import Checkpoint


@pytest.fixture
def hybrid(tmp_path):
    make("hybrid").save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def change(directory, edit):
    """Edit the tensors of a one-file checkpoint."""
    tensors = load_file(directory / "model.safetensors")
    save_file(edit(tensors), directory / "model.safetensors", metadata={"format": "pt"})


def test_multi_token_prediction_is_kept_and_written_back(hybrid, tmp_path):
    extra = {"mtp.layers.0.eh_proj.weight": torch.randn(4, 6).bfloat16(), "mtp.layers.0.enorm.weight": torch.randn(4)}
    change(hybrid, lambda tensors: {**tensors, **extra})
    model = load_model(hybrid, dtype="float32")
    assert not any("mtp" in name for name in model.state_dict())
    save_model(model, tmp_path / "ours")
    after = load_file(tmp_path / "ours" / "model.safetensors")
    assert all(torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in extra.items())


def test_an_unknown_tensor_is_an_error(hybrid):
    change(hybrid, lambda tensors: {**tensors, "backbone.layers.0.mixer.surprise": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"backbone\.layers\.0\.mixer\.surprise: has no place"):
        load_model(hybrid)


def quantised(tensors):
    """As releases in FP8 store them: weights in eight bits, a scale for each and one for its input."""
    weights = [name for name in tensors if name.endswith("_proj.weight")]
    scales = {name.replace("weight", which): torch.ones(()) for name in weights for which in ("weight_scale", "input_scale")}
    return {**tensors, **{name: tensors[name].to(torch.float8_e4m3fn) for name in weights}, **scales}


def test_a_quantised_release_is_refused_by_its_dtype(hybrid):
    change(hybrid, quantised)
    with pytest.raises(UnsupportedError, match=r"hf: stored as F8_E4M3: quantised checkpoints cannot be tuned, use the BF16 release"):
        load_model(hybrid)


def test_a_quantised_release_is_refused_by_its_config(hybrid):
    config = json.loads((hybrid / "config.json").read_text())
    (hybrid / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "modelopt"}}))
    with pytest.raises(UnsupportedError, match=r"config\.json: quantization_config: got modelopt; quantised .* use the BF16 release"):
        load_model(hybrid)


def test_every_problem_is_told_at_once(hybrid):
    def edit(tensors):
        del tensors["backbone.norm_f.weight"]
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].contiguous()
        return tensors

    change(hybrid, edit)
    with pytest.raises(CheckpointError) as error:
        load_model(hybrid)
    assert "2 tensors do not fit" in str(error.value)
    assert "backbone.norm_f.weight: missing, expected shape (32,)" in str(error.value)
    assert "lm_head.weight: got shape (95, 32), expected (96, 32)" in str(error.value)


def test_names_that_other_tools_write_load_and_are_kept(hybrid, tmp_path):
    before = load_model(hybrid, dtype="float32")
    change(hybrid, lambda tensors: {name.replace("backbone.", "model."): tensor for name, tensor in tensors.items()})
    renamed = load_model(hybrid, dtype="float32")
    assert all(torch.equal(tensor, renamed.state_dict()[name]) for name, tensor in before.state_dict().items())
    save_model(renamed, tmp_path / "ours")
    assert Checkpoint(tmp_path / "ours").tensors.keys() == Checkpoint(hybrid).tensors.keys()


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_loading_holds_one_tensor_beside_the_model(hybrid, monkeypatch, quantization):
    alive: weakref.WeakSet = weakref.WeakSet()
    counts, read = [], Checkpoint.read

    def counted(self, name):
        tensor = read(self, name)
        counts.append(len(alive))
        alive.add(tensor)
        return tensor

    monkeypatch.setattr(Checkpoint, "read", counted)
    load_model(hybrid, quantization=quantization)
    assert len(counts) > 20 and max(counts) <= 1


def test_precision_that_must_hold_is_held_whatever_the_dtype(hybrid):
    model = load_model(hybrid, dtype="bfloat16")
    for name, tensor in model.state_dict().items():
        fp32 = name.endswith(("A_log", ".D", "dt_bias", "e_score_correction_bias"))
        assert tensor.dtype == (torch.float32 if fp32 else torch.bfloat16), name


def test_drawn_weights_repeat_with_their_seed(hybrid):
    one, same, other = (load_model(hybrid, dtype="float32", random_seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(tensor, same[name]) for name, tensor in one.items())
    assert any(not torch.equal(tensor, other[name]) for name, tensor in one.items())
    decay = one["backbone.layers.0.mixer.A_log"].exp()
    assert decay.min() >= 1 and decay.max() <= 16


def test_a_revision_of_what_is_no_hub_repository_is_an_error(tmp_path):
    for path in (tmp_path, "nemotron-tiny"):
        with pytest.raises(RecipeError, match=r"model\.revision: got 'main', expected null"):
            locate(path, "main")


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "one/two/three"])
def test_a_path_that_is_nothing_is_named(path):
    with pytest.raises(MissingFileError, match="model.path"):
        locate(path)


@pytest.fixture
def tied(tmp_path):
    """A llama with tied embeddings that also stores a head, as some tools write it."""
    make("llama_tied").save_pretrained(tmp_path / "hf")
    change(tmp_path / "hf", lambda tensors: {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    return tmp_path / "hf"


def test_a_head_that_differs_from_the_embeddings_that_it_is_tied_to_is_refused(tied):
    def edit(tensors):
        tensors["lm_head.weight"][5, 3] += 1.0
        return tensors

    change(tied, edit)
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings.*lm_head\.weight.*model\.embed_tokens\.weight differ.*set it to false"):
        load_model(tied)


def test_a_stored_copy_of_tied_embeddings_is_read_and_stays_a_copy(tied, tmp_path):
    model = load_model(tied, dtype="float32", trainable=True)
    with torch.no_grad():
        model.embeddings.weight += 0.5
    save_model(model, tmp_path / "ours")
    saved = load_file(tmp_path / "ours" / "model.safetensors")
    assert torch.equal(saved["model.embed_tokens.weight"], model.embeddings.weight)
    assert torch.equal(saved["lm_head.weight"], model.embeddings.weight)
    load_model(tmp_path / "ours")


def test_drawn_weights_are_saved_in_the_configs_dtype_but_for_what_stays_fp32(hybrid, tmp_path):
    config = json.loads((hybrid / "config.json").read_text())
    (hybrid / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    save_model(load_model(hybrid, dtype="float32", random_seed=0), tmp_path / "drawn")
    for name, info in Checkpoint(tmp_path / "drawn").tensors.items():
        assert info.dtype == ("F32" if name.endswith(("A_log", ".D", "dt_bias", "e_score_correction_bias")) else "BF16"), name


@pytest.mark.parametrize("options", [{}, {"trainable": True}, {"random_seed": 1}])
def test_a_loaded_model_is_in_evaluation_mode_and_trainable_where_asked(hybrid, options):
    model = load_model(hybrid, **options)
    assert not any(module.training for module in model.modules())
    assert {p.requires_grad for p in model.parameters()} == {options.get("trainable", False)}
