"""Attributions come back under the names, and in the order, they were written with."""

import pytest
import torch

from exactivations.store.attributions import read_attributions, write_attributions
from tests.scripts.attribution_results import EMPTY, attributions_of


@pytest.mark.parametrize("names", [("seed_0", EMPTY, "own"), ("seed_0", "seed_1", "own"), tuple(f"seed_{n}" for n in range(11))])
def test_sets_keep_their_names_order_and_values(names, tmp_path):
    written = attributions_of(names)
    pairs = written.by_set[names[0]]
    written.by_set[names[0]] = [pairs[n] for n in (3, 0)]  # another list of pairs than other sets have
    found = read_attributions(write_attributions(tmp_path, written))
    assert found.set_names == names and list(found.alive) == list(names)
    assert torch.equal(found.output_probabilities, written.output_probabilities)
    assert found.output_tokens == written.output_tokens
    for name in names:
        assert list(found.alive[name]) == list(written.alive[name])
        assert all(torch.equal(mask, written.alive[name][layer]) for layer, mask in found.alive[name].items())
        for mine, other in zip(found.by_set[name], written.by_set[name], strict=True):
            assert (mine.source, mine.target, mine.is_kv_to_o_pair) == (other.source, other.target, other.is_kv_to_o_pair)
            assert torch.equal(mine.values, other.values) and torch.equal(mine.attribution, other.attribution)
            assert torch.equal(mine.original_alive_mask_in, other.original_alive_mask_in)
