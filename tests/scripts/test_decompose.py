"""`decompose` and `decompose-toy`, in process: what they write, that they go on, and what they refuse."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from exactivations.datamodules.embedded import DEMO_MODEL
from exactivations.lit_modules.decomposition.ci_function_file import causal_importances, read_ci_function
from exactivations.lit_modules.decomposition.component_file import read_components
from exactivations.scripts import decompose_run
from exactivations.scripts.decompose import decompose, decompose_toy
from exactivations.scripts.main import main
from exactivations.store.errors import IdentityError, InvalidInputError

TOY = {"components": 6, "batch_size": 8, "toy_steps": 5, "toy_batch_size": 8, "save_every": 2}


def test_a_language_model_is_decomposed_and_what_is_written_works_on_it(tmp_path, capsys):
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"def f{i}(x):\n" for i in range(30)))
    options = {
        "dataset": str(texts), "out": str(tmp_path / "out"), "maps": ["*.1.mlp.*"], "components": 5, "steps": 3, "held_out": 1,
        "token_budget": 20, "save_every": 1, "accelerator": "cpu",
    }  # fmt: skip
    decompose("demo", **options)
    printed = capsys.readouterr().out
    assert "step 3 of 3: minimality" in printed and "as many as are alive, the largest" in printed
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "components.safetensors", "components.json", "ci_function.safetensors", "ci_function.json", "figures.json",
    }  # fmt: skip
    components = read_components(tmp_path / "out", AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype="float32"))
    importances = causal_importances(components, read_ci_function(tmp_path / "out", components), torch.tensor([[5, 6, 7]]))
    assert {path: g.shape for path, g in importances.items()} == {
        f"gpt_neox.layers.1.mlp.{name}": (1, 3, 5) for name in ("dense_h_to_4h", "dense_4h_to_h")
    }
    decompose("demo", **options)
    assert capsys.readouterr().out == printed[printed.index("  map ") :]  # done before: told again
    with pytest.raises(IdentityError, match="holds a decomposition with components 5, and 4 was asked for"):
        decompose("demo", **{**options, "components": 4})
    for message, changed in (
        ("at least 1 step", {"steps": 0}),
        ("no linear map of GPTNeoXForCausalLM matches", {"maps": ["*.9.mlp.*"]}),
        ("were to be held out", {"held_out": 1000}),
    ):
        with pytest.raises(InvalidInputError, match=message):
            decompose("demo", **{**options, "overwrite": True, **changed})


def test_toys_of_several_seeds_are_told_and_a_stopped_one_goes_on_to_the_same_end(tmp_path, capsys, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    decompose_toy(out=str(whole), seeds=[0, 3], steps=5, hidden_identity=True, **TOY)
    told = capsys.readouterr().out
    assert "over 2 seeds" in told and "alive (ever) in linear1, identity, linear2" in told
    monkeypatch.setattr(decompose_run, "write_components", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        decompose_toy(out=str(stopped), seeds=[0], steps=5, hidden_identity=True, **TOY)
    monkeypatch.undo()
    capsys.readouterr()
    decompose_toy(out=str(stopped), seeds=[0], steps=5, hidden_identity=True, **TOY)
    again = capsys.readouterr().out
    assert "going on from" in again and "step 2 of 5" not in again  # from step 4 on
    for name in ("figures.json", "components.safetensors"):
        assert (stopped / "seed-0" / name).read_bytes() == (whole / "seed-0" / name).read_bytes()
    assert not (stopped / "seed-0" / "checkpoint.ckpt").exists()
    figures = json.loads((whole / "seed-3" / "figures.json").read_text())
    alive, every = figures["recovery"], figures["recovery_by_all"]
    assert figures["options"]["seed"] == 3 and 0 < alive["mean_max_cosine_similarity"] <= every["mean_max_cosine_similarity"] <= 1
    (line,) = [line for line in told.splitlines() if line.split()[:1] == ["3"]]
    expected = [*alive.values(), every["mean_max_cosine_similarity"], every["mean_length_ratio"]]
    assert line.split()[1:7] == [f"{value:.4f}" for value in expected]


def test_from_the_command_line_maps_seeds_and_the_shipped_configuration(tmp_path, capsys):
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"def f{i}(x):\n" for i in range(30)))
    asked = ["decompose", "demo", "--dataset", texts, "--out", tmp_path / "demo", "--maps", "*.1.mlp.*", "*.2.attention.dense"]
    main([*map(str, [*asked, "--components", 3, "--steps", 1, "--held-out", 1, "--token-budget", 20, "--accelerator", "cpu"])])
    assert set(json.loads((tmp_path / "demo" / "components.json").read_text())["maps"]) == {
        "gpt_neox.layers.1.mlp.dense_h_to_4h", "gpt_neox.layers.1.mlp.dense_4h_to_h", "gpt_neox.layers.2.attention.dense",
    }  # fmt: skip
    small = [word for name, n in TOY.items() for word in (f"--{name.replace('_', '-')}", n) if name != "components"]
    asked = ["decompose-toy", "--config", "toy-40-10", "--seeds", 0, 1, 2, "--steps", 1, "--out", tmp_path / "toy"]
    main([*map(str, [*asked, *small])])
    told = capsys.readouterr().out
    assert "40 features in 10 dimensions" in told and "over 3 seeds" in told
    for seed in (0, 1, 2):
        options = json.loads((tmp_path / "toy" / f"seed-{seed}" / "figures.json").read_text())["options"]
        assert (options["seed"], options["features"], options["components"]) == (seed, 40, 200)
