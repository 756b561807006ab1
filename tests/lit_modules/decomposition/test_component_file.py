"""Saved components go back into the model they were made of, to the bit, and into no other."""

import copy
import json

import pytest
import torch
from torch import nn

from exactivations.lit_modules.decomposition.component_file import read_components, write_components
from exactivations.lit_modules.decomposition.component_model import ComponentModel
from exactivations.store.errors import CorruptShardError, InvalidInputError, StoreError
from tests.lit_modules.pairs import language_model

from .test_component_model import MAPS


@pytest.mark.parametrize("family", MAPS)
def test_what_is_saved_comes_back(family, tmp_path):
    original = language_model(family)
    saved = ComponentModel.from_random(copy.deepcopy(original), MAPS[family], 5, seed=1)
    path = write_components(tmp_path / "made", saved, {"model": family})
    assert path == tmp_path / "made" / "components.safetensors"
    content = json.loads((tmp_path / "made" / "components.json").read_text())
    assert content["about"] == {"model": family} and set(content["maps"]) == set(saved.maps)
    for place in (path, tmp_path / "made"):
        read = read_components(place, copy.deepcopy(original))
        assert list(read.maps) == list(saved.maps) and read.original_hash == saved.original_hash
        for name, mine in read.maps.items():
            assert torch.equal(mine.V, saved.maps[name].V) and torch.equal(mine.U, saved.maps[name].U)


def test_another_model_or_a_damaged_file_is_refused(tmp_path):
    def net(**changes):
        torch.manual_seed(changes.pop("seed", 0))
        return nn.ModuleDict({"up": nn.Linear(4, 6), "down": nn.Linear(6, 4)} | changes)

    path = write_components(tmp_path, ComponentModel.from_svd(net(), ["*"]), {"model": "toy"})
    cases = {
        r"components of toy, with map (up|down), which Sequential lacks": nn.Sequential(nn.Linear(4, 6), nn.ReLU()),
        r"where map up is \[4, 6\]; in this ModuleDict it is \[5, 6\]": net(up=nn.Linear(5, 6)),
        r"components of toy with weights \w{32}; this ModuleDict has others": net(seed=1),
        r"in float32; this one is in float64": net().double(),
    }
    for message, model in cases.items():
        with pytest.raises(InvalidInputError, match=message):
            read_components(path, model)
    read_components(path, net())
    with pytest.raises(StoreError, match="does not exist: name what `exactivations decompose` wrote"):
        read_components(tmp_path / "elsewhere", net())
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptShardError, match="is damaged"):
        read_components(path, net())
