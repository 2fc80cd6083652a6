"""What a recipe's names stand for: blend files as Megatron spells them, prefixes, mock; and what is refused."""

from __future__ import annotations

import pytest
from toy_blend import make_blend, make_dataset

from nemotune.data.megatron.blend import Blend, parse_blend, read_blends, require_files
from nemotune.errors import DataError, MissingFileError, RecipeError
from nemotune.recipe.schema import Data


def blends(**data):
    return read_blends(Data.model_validate({"format": "megatron", **data}))


@pytest.mark.parametrize(
    ("value", "prefixes", "weights"),
    [
        ("0.7 web 0.3 books", ("web", "books"), (0.7, 0.3)),
        ([30, "web", "70", " books "], ("web", "books"), (30.0, 70.0)),
        (["web", "books"], ("web", "books"), None),
        ("web", ("web",), None),
        (["1", "2", "3"], ("1", "2", "3"), None),  # an odd number: prefixes
    ],
)
def test_a_blend_is_prefixes_or_weights_and_prefixes(value, prefixes, weights):
    assert parse_blend(value, key="train") == Blend(prefixes, weights)


@pytest.mark.parametrize(
    "value", [[], "", 3, {"a": 1}, [["web"]], ["0.5", "web", "books", "wiki"], "0 web 1 books", "-1 web 1 b", "nan web 1 b"]
)
def test_what_is_no_blend_is_refused_with_its_key(value):
    with pytest.raises(DataError, match=r"^blend\.json: train: got "):
        parse_blend(value, key="blend.json: train")


def test_a_blend_file_gives_every_split_and_the_recipe_goes_first(tmp_path):
    path = str(make_blend(tmp_path / "blend.json", train="2 web 1 books", valid=["held"], test="last"))
    assert blends(train=path) == {"train": Blend(("web", "books"), (2.0, 1.0)), "validation": Blend(("held",)), "test": Blend(("last",))}
    assert blends(train=path, validation=0.1, test="other") == {
        "train": Blend(("web", "books"), (2.0, 1.0)), "validation": 0.1, "test": Blend(("other",)),
    }  # fmt: skip
    assert blends(train="web", test=path)["test"] == Blend(("last",))
    assert set(blends(train=path, validation=0)) == {"train", "test"}  # null is not asked for, 0 is none
    assert blends(train="mock", validation=0.25) == {"train": Blend(("mock",)), "validation": 0.25}
    assert blends(train="web.bin") == blends(train="web.idx") == {"train": Blend(("web",))}


def test_prefixes_are_found_from_here_or_beside_the_file(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    path = make_blend(tmp_path / "there" / "blend.json", train=["web", "books"])
    make_dataset(tmp_path / "there" / "web", [3])
    make_dataset(tmp_path / "there" / "books", [3])
    make_dataset(tmp_path / "books", [3])
    monkeypatch.chdir(tmp_path)
    assert blends(train=str(path))["train"].prefixes == (str(tmp_path / "there" / "web"), "books")
    require_files(Data.model_validate({"format": "megatron", "train": str(path)}))


def test_what_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(DataError, match="unknown key 'validation', expected train, valid or test. Did you mean 'valid'"):
        blends(train=str(make_blend(tmp_path / "a.json", train="web", validation="held")))
    with pytest.raises(DataError, match="data.train: .*b.json has no 'train'"):
        blends(train=str(make_blend(tmp_path / "b.json", valid="web")))
    with pytest.raises(MissingFileError, match=r"c\.json: no such file"):
        blends(train=str(tmp_path / "c.json"))
    with pytest.raises(RecipeError, match="data.validation: got mock, expected a share"):
        blends(train="mock", validation="mock")
    with pytest.raises(RecipeError, match="data.train: got config or split"):
        blends(train={"path": "web", "split": "train"})
    with pytest.raises(MissingFileError, match=r"web\.idx: no such file; a dataset is PREFIX\.bin with PREFIX\.idx"):
        require_files(Data.model_validate({"format": "megatron", "train": str(tmp_path / "web")}))
