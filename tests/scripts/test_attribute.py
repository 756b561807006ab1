"""The command on the demo model: sets from a file in, attributions out, several files at once; what does not fit in words."""

import json

import pytest
import torch

from exactivations.datamodules.named_tokenizer import load_tokenizer
from exactivations.scripts.main import main
from exactivations.store.attributions import read_attributions
from exactivations.store.ci_sets import CiSets, write_ci_sets

N_COMPONENTS, LAYERS = 12, 4
MAPS = ["*.query_key_value", "*.dense", "*.dense_h_to_4h", "*.dense_4h_to_h"]
PATHS = [
    f"gpt_neox.layers.{layer}.{name}"
    for layer in range(LAYERS)
    for name in ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
]
ON_DEMO = ["attribute", "demo", "--svd", *MAPS, "--n-components", str(N_COMPONENTS)]

pytestmark = pytest.mark.filterwarnings("ignore:set .* it does not explain the model's prediction")  # sets at random do not


def sets_file(folder, name, prompt, n_sets=2):
    length = len(load_tokenizer("demo")(prompt)["input_ids"])
    generator = torch.Generator().manual_seed(len(prompt))
    shape = (n_sets, length, N_COMPONENTS)
    values = {p: torch.rand(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.3) for p in PATHS}
    file = folder / f"{name}.json"
    write_ci_sets(file, CiSets(prompt, tuple(f"seed_{n}" for n in range(n_sets)), values))
    return file


def failing(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_info:
        main([*map(str, arguments)])
    assert exit_info.value.code == 1
    return capsys.readouterr().err


def test_prompts_of_one_length_and_of_others_are_attributed_and_written(tmp_path, capsys):
    prompts = {"a": "def read(self", "b": "def save(self", "c": "import os\nimport sys"}
    files = [sets_file(tmp_path, name, prompt) for name, prompt in prompts.items()]
    main([*ON_DEMO, "--ci-sets", *map(str, files), "--out", f"{tmp_path}/out", "--own-ci", "seed_1", "--show", "2"])
    said = capsys.readouterr().out
    for name, prompt in prompts.items():
        found = read_attributions(tmp_path / "out" / name)
        assert found.prompt == prompt and "".join(found.tokens) == prompt and found.made.own == "seed_1"
        assert list(found.alive["seed_0"]) == ["wte", *PATHS, "output"]
        assert f"{prompt!r}, {len(found.tokens)} tokens -> {tmp_path}/out/{name}/attributions.safetensors" in said
        n_edges = sum(len(pair.values) for pair in found.by_set["seed_0"])
        assert n_edges and f"{n_edges:,} edges" in said
        of_set = found.predictions["seed_0"]
        assert f"predicted {of_set.text!r}: {of_set.probability:.3f} in the model, {of_set.of_set:.3f} with the set" in said
        assert found.faults and all(f"NOTE: {fault}" in said for fault in found.faults.values())  # sets at random
    main([*ON_DEMO, "--ci-sets", str(files[0]), "--out", f"{tmp_path}/apart", "--separate"])
    together = read_attributions(tmp_path / "out" / "a")
    for name in together.set_names:
        alone = read_attributions(tmp_path / "apart" / name)
        assert alone.set_names == (name,)
        for mine, other in zip(alone.by_set[name], together.by_set[name], strict=True):
            torch.testing.assert_close(mine.values, other.values, rtol=1e-4, atol=1e-6)


def test_what_cannot_be_attributed_is_refused_in_words(tmp_path, capsys):
    file, out = sets_file(tmp_path, "a", "def read(self"), tmp_path / "out"
    assert "give --components FILE, or --svd PATTERNS" in failing(capsys, "attribute", "demo", "--ci-sets", file, "--out", out)
    assert "matches '*.denze'" in failing(capsys, "attribute", "demo", "--svd", "*.denze", "--ci-sets", file, "--out", out)
    few = [*ON_DEMO[:-1], "5", "--ci-sets", file, "--out", out]
    assert f"{file}: set 'seed_0', layer '{PATHS[0]}', position 0: 12 components, the map has 5" in failing(capsys, *few)
    content = json.loads(file.read_text()) | {"prompt": "def"}
    (tmp_path / "short.json").write_text(json.dumps(content))
    short = failing(capsys, *ON_DEMO, "--ci-sets", tmp_path / "short.json", "--out", out)
    assert "short.json: set 'seed_0', layer" in short and "but the prompt 'def' has 1 tokens" in short
    assert "there is no set 'mine'" in failing(capsys, *ON_DEMO, "--ci-sets", file, "--out", out, "--own-ci", "mine")
    (tmp_path / "other").mkdir()
    twice = sets_file(tmp_path / "other", "a", "def")
    assert "two files of sets are called a" in failing(capsys, *ON_DEMO, "--ci-sets", file, twice, "--out", out)
    main([*map(str, [*ON_DEMO, "--ci-sets", file, "--out", out])])
    assert "is there already: name another folder" in failing(capsys, *ON_DEMO, "--ci-sets", file, "--out", out)
    main([*map(str, [*ON_DEMO, "--ci-sets", file, "--out", out, "--overwrite"])])
