"""What a batch costs besides the model's own forward pass, in counts, which no machine can disturb. Timings: benchmarks/speed."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from exactivations.datamodules import TextDataModule
from exactivations.datamodules.plan import PlanOptions
from exactivations.lit_modules.extraction import extractor as extractor_module
from exactivations.lit_modules.extraction.extractor import ActivationExtractor

HOOKS, POOLINGS = ["resid_post.0", "resid_post.1"], ["mean", "last"]
TEXTS = [f"def f{i}(x):\n    return [{', '.join('x' * (i % 40))}]\n" for i in range(120)]
WAITS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "unique", "equal", "item")
"""Operations whose result the host has to wait for, as its shape or its next step depends on it."""


class Operations(TorchDispatchMode):
    """Counts the operations inside it, by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def extractor():
    extractor = ActivationExtractor("demo", HOOKS, POOLINGS)
    extractor.load()
    return extractor


def data_of(**options):
    data = TextDataModule(TEXTS, "demo", plan_options=PlanOptions(token_budget=1024, **options))
    data.setup()
    return data


def steps_of(data):
    steps = data.steps_of(list(range(data.plan.n_shards)))
    return [steps[i] for i in range(len(steps))]


def test_small_batches_travel_together_and_none_is_padded():
    data = data_of()
    steps = steps_of(data)
    assert data.plan.n_batches > 30 and len(steps) < data.plan.n_batches / 3
    assert data.plan.padded_share == 0
    assert sum(step.computed_tokens for step in steps) == sum(map(len, data.tokenizer(TEXTS)["input_ids"]))


def test_the_model_computes_what_it_would_alone_and_one_copy_is_kept_of_each_hook_point_and_pooling(extractor):
    """No mask, no cache, no block behind the deepest hook point; nor does the host wait for more than transformers itself does."""
    model, steps = extractor.load().model, steps_of(data_of())
    batches = [batch.input_ids for step in steps for batch in step.batches()]
    with torch.no_grad():
        with Operations() as bare:
            for input_ids in batches:
                model(input_ids=input_ids, use_cache=False)
        with Operations() as ours:
            for step in steps:
                extractor.predict_step(step)
    bare.counts["native_layer_norm"] -= len(batches)  # the norm behind the last block, which the extractor leaves out
    kernels = ("mm", "addmm", "native_layer_norm", "gelu", "_scaled_dot_product_flash_attention_for_cpu", "embedding")
    assert {name: ours.counts[name] for name in kernels} == {name: bare.counts[name] for name in kernels}
    assert ours.counts["addmm"] == len(batches) * 2 * 4
    n_kept = len(batches) * len(HOOKS) * len(POOLINGS)
    assert ours.counts["copy_"] == n_kept + bare.counts["copy_"]
    assert not [name for name in WAITS if ours.counts[name] > bare.counts[name]], ours.counts
    # of a pooling at most ten: views of its rows, the weighted sum, the copy
    more = sum(ours.counts.values()) - sum(bare.counts.values())
    assert more / n_kept < 20, (ours.counts - bare.counts).most_common(12)


def test_python_calls_of_this_package_are_few_for_each_batch(extractor):
    package = Path(extractor_module.__file__).resolve().parents[2]
    ours = {str(package / folder) for folder in ("store", "datamodules", "lit_modules")}

    def calls(steps):
        found = Counter()

        def count(frame, event, argument):
            name = frame.f_code.co_filename
            if event == "call" and any(str(Path(name).resolve()).startswith(folder) for folder in ours):
                found[frame.f_code.co_qualname] += 1

        sys.setprofile(count)
        try:
            for step in steps:
                extractor.predict_step(step)
        finally:
            sys.setprofile(None)
        return found

    steps = steps_of(data_of())
    found, n_batches = calls(steps), sum(len(step.shapes) for step in steps)
    assert found["ActivationExtractor.predict_step"] == len(steps)
    assert sum(found.values()) < 19 * n_batches + 80 * len(steps), found.most_common(12)


@pytest.mark.parametrize("padding", ["none", "tail"])
def test_no_state_is_looked_at_on_the_host(extractor, padding, monkeypatch):
    """A copy to the host waits for the device, and on a CPU nothing shows it: so the ways to make one are barred."""
    steps = steps_of(data_of(padding=padding, max_padded_share=0.3 if padding == "tail" else 0.05))
    assert any(n_real < rows * width for step in steps for rows, width, n_real in step.shapes) == (padding == "tail")

    def barred(name, original):
        def method(self, *args, **kwargs):
            assert not self.is_floating_point(), f"Tensor.{name} of a state"
            return original(self, *args, **kwargs)

        return method

    for name in ("cpu", "item", "tolist", "numpy", "__bool__", "__float__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, barred(name, getattr(torch.Tensor, name)))
    for step in steps:
        extractor.predict_step(step)
