"""The document's case: 207 samples, masks saved by another run. Foreign ones are refused, matching ones change not a bit."""

import numpy as np
import pytest
import torch

from exactivations.datamodules.activations import ActivationDataModule
from exactivations.lit_modules.moderation.aggregations import Aggregations
from exactivations.lit_modules.moderation.masked_rows import MaskedRows
from exactivations.lit_modules.moderation.prototype_moderator import PrototypeModerator
from exactivations.scripts.import_masks import import_masks
from exactivations.store import ActivationStore
from exactivations.store.errors import InvalidInputError, StoreError
from tests.lit_modules.probe_stores import trainer
from tests.store.mask_folders import POOLED, foreign, store_of
from tests.store.stores import mask_of, row

N, NAME = 207, "resid_post.1/tokens"
LENGTHS = np.random.default_rng(0).integers(2, 30, N).tolist()


def kept(n=N):
    return {"label": [f"class {at % 2}" for at in range(n)], "group": [f"group {at % 20}" for at in range(n)]}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return store_of(tmp_path_factory.mktemp("masked") / "run", LENGTHS, **kept())


def moderated(source, batch_size=None):
    data = ActivationDataModule(Aggregations([source]), "label", group="group", batch_size=batch_size)
    moderator, made = PrototypeModerator(n_folds=None), trainer()
    made.fit(moderator, datamodule=data)
    made.test(moderator, datamodule=data, verbose=False)
    return moderator


def test_masks_of_another_run_with_other_texts_are_refused_naming_the_first_sample_and_why(run, tmp_path):
    others = range(1000, 1000 + N)
    with pytest.raises(InvalidInputError, match=r"sample 0: token_mask belongs to other tokens \(token hash differs\); sample 1"):
        import_masks(
            str(foreign(tmp_path / "same", LENGTHS, [64, 64, 64, 15], samples=others)),
            store=str(run),
            out=str(tmp_path / "m.parquet"),
        )
    lengths = [498, *LENGTHS[1:]]
    with pytest.raises(
        InvalidInputError,
        match=rf"sample 0: token_mask has 498 positions .*activations have {LENGTHS[0]}; it belongs to other tokens",
    ):
        import_masks(
            str(foreign(tmp_path / "long", lengths, [64, 64, 64, 15], samples=others)),
            store=str(run),
            out=str(tmp_path / "m.parquet"),
        )
    assert not (tmp_path / "m.parquet").exists()
    elsewhere = store_of(tmp_path / "elsewhere", [*LENGTHS[:5], LENGTHS[5] + 1, *LENGTHS[6:]])
    masks = foreign(tmp_path / "theirs", [*LENGTHS[:5], LENGTHS[5] + 1, *LENGTHS[6:]], [64, 64, 64, 15])
    import_masks(str(masks), store=str(elsewhere), out=str(tmp_path / "theirs.parquet"))
    with pytest.raises(StoreError, match=rf"sample 5 has {LENGTHS[5] + 1} positions and token hash .*belong to another dataset"):
        MaskedRows(ActivationStore(run), ["mean"], tmp_path / "theirs.parquet")


@pytest.mark.parametrize("sizes", [[50, 50, 50, 50, 7], [64, 64, 64, 15], [207], [1] * 207])
def test_masks_of_matching_texts_give_what_native_ones_do_to_the_last_bit(run, tmp_path, sizes):
    import_masks(str(foreign(tmp_path / "masks", LENGTHS, sizes)), store=str(run), out=str(tmp_path / "masks.parquet"))
    store, poolings = ActivationStore(run), ["mean", "last", "max"]
    native, imported = MaskedRows(store, poolings), MaskedRows(store, poolings, tmp_path / "masks.parquet")
    for name in native.per_token:
        assert torch.equal(native.rows(name, np.arange(N)), imported.rows(name, np.arange(N)))
    one, other = moderated(native), moderated(imported)
    assert one.chosen == other.chosen and one.validation == other.validation
    for entry, distances in one.tested.items():
        assert torch.equal(distances, other.tested[entry])


def test_rows_are_those_of_a_loop_over_samples_whatever_is_read_with_them(run):
    masked = MaskedRows(ActivationStore(run), ["mean", "last"])
    tokens = {at: np.array([row(at, NAME, token) for token in range(n)])[mask_of(at, n)] for at, n in enumerate(LENGTHS)}
    every = np.arange(N)
    for pooling, of in (("mean", lambda values: values.mean(0)), ("last", lambda values: values[-1])):
        found = masked.rows(f"resid_post.1/{pooling}", every)
        np.testing.assert_allclose(found.numpy(), np.stack([of(tokens[at]) for at in range(N)]), rtol=1e-6)
        order = np.random.default_rng(1).permutation(N)
        for block in np.array_split(order, 9):
            assert torch.equal(masked.rows(f"resid_post.1/{pooling}", block), found[torch.from_numpy(block)])


def test_a_mask_is_never_made_up(run, tmp_path):
    store = ActivationStore(run)
    import_masks(
        str(foreign(tmp_path / "bare", LENGTHS, [64, 64, 64, 15], with_ids=False)),
        store=str(run),
        out=str(tmp_path / "bare.parquet"),
    )
    with pytest.raises(InvalidInputError, match=r"nothing proves that the mask of sample 0 is its own .207 of 207 masks"):
        MaskedRows(store, ["mean"], tmp_path / "bare.parquet")
    empty = store_of(tmp_path / "empty", LENGTHS[:9], own=lambda i, n: [i != 4] * n)
    with pytest.raises(InvalidInputError, match=f"sample 4: its mask marks none of its {LENGTHS[4]} tokens"):
        MaskedRows(ActivationStore(empty), ["mean"]).rows("resid_post.1/mean", np.arange(9))
    with pytest.raises(InvalidInputError, match=r"sample 3 has 1 tokens that count, the pooling position:-2 needs 2 \(1 of 9"):
        MaskedRows(
            ActivationStore(store_of(tmp_path / "short", [5] * 9, own=lambda i, n: [i != 3] * (n - 1) + [True])), ["position:-2"]
        )
    few = store_of(tmp_path / "few", LENGTHS[:-1])
    import_masks(str(foreign(tmp_path / "fewer", LENGTHS[:-1], [100, 106])), store=str(few), out=str(tmp_path / "few.parquet"))
    with pytest.raises(StoreError, match="it was written for another store"):
        MaskedRows(store, ["mean"], tmp_path / "few.parquet")
    pooled = store_of(tmp_path / "pooled", LENGTHS, names=POOLED)
    with pytest.raises(InvalidInputError, match="holds no tokens to pool"):
        MaskedRows(ActivationStore(pooled), ["mean"])
    with pytest.raises(InvalidInputError, match="is not one of"):
        MaskedRows(store, ["median"])
