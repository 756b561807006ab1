"""`optimise-ci`: the file holds what was optimised, the table tells it, the model's own set stands beside it, bad input."""

import json

import pytest
import torch

from exactivations.lit_modules.decomposition.causal_importance import CausalImportanceFunction
from exactivations.lit_modules.decomposition.ci_function_file import causal_importances, write_ci_function
from exactivations.lit_modules.decomposition.component_file import write_components
from exactivations.lit_modules.models.language_model import ModelOptions
from exactivations.scripts.component_loading import load_components
from exactivations.scripts.main import main
from exactivations.scripts.optimise_ci import optimise_ci
from exactivations.store.ci_sets import read_ci_sets
from exactivations.store.errors import InvalidInputError

PROMPT = "def add(left, right):\n    return left +"
MAPS = ["*.layers.1.mlp.*", "*.layers.2.attention.*"]
COMMON = {"prompt": PROMPT, "steps": 12, "accelerator": "cpu"}


def test_the_file_holds_a_set_for_each_seed_and_the_table_counts_them(tmp_path, capsys):
    out = tmp_path / "sets.json"
    asked = ["--prompt", PROMPT, "--svd", *MAPS, "--n-components", "4", "--seeds", "3", "0", "--out", str(out), "--steps", "12"]
    main(["optimise-ci", "demo", *asked, "--learning-rate", "0.2", "--accelerator", "cpu"])
    sets, said = read_ci_sets(out), capsys.readouterr().out
    assert sets.prompt == PROMPT
    assert sets.names == ("seed_3", "seed_0")
    assert {values.shape for values in sets.values.values()} == {(2, 11, 4)}
    assert list(json.loads(out.read_text())) == ["prompt", "ci_sets"]
    for path, values in sets.values.items():
        (line,) = [line for line in said.splitlines() if line.strip().startswith(path)]
        assert line.split()[1:] == [str(int(of_set.sum())) for of_set in (values >= 1e-6)]
    assert "' right' (0.8" in said
    assert "alive (position, component) of 176" in said
    again = tmp_path / "again.json"
    optimise_ci("demo", svd=MAPS, n_components=4, seeds=[0], out=str(again), learning_rate=0.2, **COMMON)
    for path, values in read_ci_sets(again).values.items():
        torch.testing.assert_close(values[0], sets.values[path][1], atol=1e-4, rtol=0)


def test_a_file_that_is_there_is_replaced_only_where_that_is_asked_for(tmp_path):
    out = tmp_path / "sets.json"
    out.write_text("hours of work")
    asked = {**COMMON, "svd": MAPS, "n_components": 2, "seeds": [0], "steps": 1, "out": str(out)}
    with pytest.raises(InvalidInputError, match=r"sets\.json is there already: name another file, or pass --overwrite"):
        optimise_ci("demo", **asked)
    assert out.read_text() == "hours of work"
    optimise_ci("demo", **asked, overwrite=True)
    assert read_ci_sets(out).names == ("seed_0",)


def test_a_ci_function_says_what_takes_part_and_is_a_set_of_its_own(tmp_path):
    options, out = ModelOptions(dtype="float32"), tmp_path / "sets.json"
    components = load_components("demo", options, None, MAPS, 4)
    function = CausalImportanceFunction({path: of_map.n_components for path, of_map in components.maps.items()}, 2)
    write_components(tmp_path, components, {"model": "demo"})
    write_ci_function(tmp_path, function, components)
    folder = str(tmp_path)
    optimise_ci("demo", components=folder, ci_function=folder, seeds=[0], target=" left", out=str(out), **COMMON)
    sets = read_ci_sets(out)
    assert sets.names == ("seed_0", "own")
    ids = torch.tensor([load_ids()])
    for path, values in causal_importances(components, function, ids).items():
        torch.testing.assert_close(sets.values[path][1], values[0], atol=1e-5, rtol=0)
        assert (sets.values[path][0][sets.values[path][1] == 0] == 0).all()


def load_ids():
    from exactivations.datamodules.named_tokenizer import load_tokenizer

    return load_tokenizer("demo")(PROMPT)["input_ids"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"prompt": ""}, "has no tokens"),
        ({"target": " right left"}, "is 2 tokens"),
        ({"svd": None}, "one of the two"),
        ({"components": "x"}, "one of the two"),
        ({"svd": None, "components": "x", "n_components": 3}, "--n-components is for --svd"),
        ({"svd": ["*.nothing"]}, "matches '*.nothing'"),
        ({"out": "sets.txt"}, "must end in .json"),
        ({"out": "/no/such/folder/sets.json"}, "its folder must be there"),
        ({"seeds": [0, 0]}, "each given once"),
        ({"steps": 0}, "steps must be at least 1"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(change, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidInputError) as error:
        optimise_ci("demo", **{**COMMON, "svd": MAPS, "out": "sets.json", **change})
    assert told in str(error.value)
    assert not list(tmp_path.iterdir())
