"""The bound on memory holds for what is between gradients and edges, too; that values are right: test_local_attributor.py."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from exactivations.lit_modules.attribution import local_attributor
from exactivations.lit_modules.attribution.local_attributor import AttributionOptions, LocalAttributor
from exactivations.lit_modules.attribution.row_attributions import MIB, attribute_rows
from exactivations.lit_modules.decomposition.component_model import ComponentModel
from tests.lit_modules.decompositions import random_prompt
from tests.lit_modules.pairs import language_model

pytestmark = pytest.mark.filterwarnings("ignore:set .* it does not explain the model's prediction")  # sets at random do not


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that an operation makes."""

    n_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.n_bytes = max(self.n_bytes, out.untyped_storage().nbytes())
        return out


def test_where_gradients_come_in_parts_no_tensor_is_larger_than_the_bound(monkeypatch):
    components = ComponentModel.from_random(language_model("llama"), ["*.0.self_attn.*"], 40, seed=0)
    prompt = random_prompt(components, 6, length=8, share=0.0)
    for values in prompt.sets.values.values():
        values[0] = 1.0  # all is alive in one set, next to nothing in the others
    attributor = LocalAttributor(components, "llama", AttributionOptions(memory_mib=2.0, output_threshold=1.0))
    assert attributor.paths
    largest = Largest()

    def measured(*arguments):
        with largest:
            return attribute_rows(*arguments)

    monkeypatch.setattr(local_attributor, "attribute_rows", measured)
    (found,) = attributor([prompt])
    (n_edges,) = {len(p.values) for p in found.by_set["set 0"] if p.source.endswith("v_proj")}
    assert n_edges == 40 * 40 * 8 * 9 / 2
    dense = 6 * 8 * 40 * (8 * 40) * components.model.dtype.itemsize  # sets, s_in, c_in, (s_out, c_out)
    assert 4 * n_edges < largest.n_bytes < 2.0 * MIB < dense / 2
