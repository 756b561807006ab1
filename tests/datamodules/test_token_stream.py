"""Every token once an epoch, the same tokens in the same row of all hook points, shared by ranks, taken up where it was left."""

from collections import Counter

import lightning.pytorch as pl
import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.numpy import load_file

from exactivations.datamodules import TokenStream
from exactivations.store import ActivationStore
from exactivations.store.errors import InvalidInputError
from tests.store import stores as made_stores
from tests.store.stores import make_store, mask_of, row

NAMES = {"mlp_in/tokens": 3, "mlp_out/tokens": 2, "mlp_out/mean": 2}
HOOKS = ["mlp_in", "mlp_out"]


@pytest.fixture(autouse=True)
def widths(monkeypatch):
    monkeypatch.setattr(made_stores, "WIDTHS", NAMES)


def store_of(path, lengths, n_shards=3, **columns):
    index = list(range(5, 5 + 3 * len(lengths), 3))
    make_store(path, index, lengths, n_shards=n_shards, names=NAMES, **columns)
    return ActivationStore(path)


def tokens_in_files(path, content_only=True):
    """A plain loop over the files: (sample, position) of each token, and its row of each hook point."""
    found = {}
    for file in sorted((path / "shards").glob("*.safetensors")):
        tensors, at = load_file(file), 0
        for sample, n in zip(tensors["sample_index"].tolist(), tensors["n_tokens"].tolist(), strict=True):
            for position in range(n):
                if tensors["token_mask"][at] or not content_only:
                    rows = {hook: tensors[f"{hook}/tokens"][at].tolist() for hook in HOOKS}
                    found[sample, position] = (int(tensors["input_ids"][at]), rows)
                at += 1
    return found


def tokens_of(batch):
    """(sample, position) of each token of a batch, in its order."""
    return list(zip(batch.sample_index.tolist(), batch.position.tolist(), strict=True))


def in_order(batches):
    return [token for batch in batches for token in tokens_of(batch)]


def check_rows(batch, expected):
    for at, token in enumerate(tokens_of(batch)):
        input_id, rows = expected[token]
        assert int(batch.input_ids[at]) == input_id
        for hook in HOOKS:
            assert batch[hook][at].tolist() == rows[hook]


small_streams = given(
    lengths=st.lists(st.integers(1, 60), min_size=4, max_size=25), n_shards=st.integers(1, 4), seed=st.integers(0, 5),
    world_size=st.integers(1, 3), batch_size=st.integers(6, 40), buffer=st.integers(1, 300), block=st.sampled_from([8, 16, 64]),
    content_only=st.booleans(), data=st.data(),
)  # fmt: skip


@settings(max_examples=30, deadline=None)
@small_streams
def test_each_token_of_the_files_comes_once_an_epoch_on_any_ranks_and_after_any_kill(
    tmp_path_factory, lengths, n_shards, seed, world_size, batch_size, buffer, block, content_only, data
):
    path = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made_stores, "WIDTHS", NAMES)
        store = store_of(path, lengths, n_shards)
    expected = tokens_in_files(path, content_only)
    options = dict(batch_size=batch_size, seed=seed, epochs=2, buffer_tokens=buffer, block_tokens=block, content_only=content_only)
    if len(expected) < world_size:
        if not expected:
            refused(lambda: list(TokenStream(store, **options)), "no content token in train")
        else:
            refused(lambda: list(TokenStream(store, **options, rank=0, world_size=world_size)), "a token in every step")
        return
    whole = list(TokenStream(store, HOOKS, **options))
    n_steps = TokenStream(store, **options).n_steps
    assert len(whole) == 2 * n_steps and max(len(batch) for batch in whole) <= batch_size
    assert all(len(batch) == batch_size for batch in whole[: max(0, n_steps - 2)])
    for epoch in (whole[:n_steps], whole[n_steps:]):
        assert Counter(in_order(epoch)) == Counter([*expected])
        for batch in epoch:
            check_rows(batch, expected)
    ranks = [TokenStream(store, HOOKS, **options, rank=rank, world_size=world_size) for rank in range(world_size)]
    shared = [list(stream) for stream in ranks]
    assert {len(batches) for batches in shared} == {len(whole)}
    for step, batch in enumerate(whole):  # the step of one rank, dealt
        shares = [tokens_of(batches[step]) for batches in shared]
        assert [tokens_of(batch)[rank::world_size] for rank in range(world_size)] == shares and all(shares)
    rank, killed_at = data.draw(st.integers(0, world_size - 1)), data.draw(st.integers(0, len(whole)))
    killed = TokenStream(store, HOOKS, **options, rank=rank, world_size=world_size)
    steps = iter(killed)
    before = [next(steps) for _ in range(killed_at)]
    state = killed.state_dict()
    steps.close()
    resumed = TokenStream(store, HOOKS, **options, rank=rank, world_size=world_size)
    resumed.load_state_dict(state)
    assert in_order(before + list(resumed)) == in_order(shared[rank])
    alone = TokenStream(store, HOOKS, **options)  # on another number of ranks
    alone.load_state_dict(state)
    assert in_order(alone) == in_order(whole[killed_at:])


@pytest.fixture
def store(tmp_path):
    lengths = [int(n) for n in np.random.default_rng(0).integers(1, 40, 80)]
    return store_of(tmp_path / "run", lengths, module=[f"m{at % 11}" for at in range(80)])


def test_rows_are_those_of_the_store(store):
    start, place = store.token_start, {int(index): at for at, index in enumerate(store.sample_index)}
    for batch in TokenStream(store, batch_size=50):
        numbers = np.array([start[place[sample]] + position for sample, position in tokens_of(batch)])
        for hook in HOOKS:
            assert torch.equal(batch[hook], store.rows(f"{hook}/tokens", numbers))
        assert torch.equal(batch.input_ids, store.token_ids(numbers)) and store.are_content(numbers).all()
        sample, position = tokens_of(batch)[0]
        assert batch["mlp_in"][0].tolist() == row(sample, "mlp_in/tokens", position) and mask_of(sample, position + 1)[position]


def test_epochs_and_seeds_differ_and_the_same_seed_gives_the_same(store):
    stream = TokenStream(store, batch_size=32, epochs=2)
    tokens = in_order(stream)
    first, second = tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :]
    other = in_order(TokenStream(store, batch_size=32, seed=1))
    assert sum(a == b for a, b in zip(first, second, strict=True)) < len(first) / 10
    assert sum(a == b for a, b in zip(first, other, strict=True)) < len(first) / 10
    assert list(stream) == []  # it is at its end
    stream.rewind()
    assert in_order(stream) == tokens
    assert [batch.position.tolist() for batch in TokenStream(store, batch_size=32)] != [list(range(32))]


def test_a_window_has_blocks_of_all_shards(tmp_path):
    store = store_of(tmp_path / "run", [40] * 100, n_shards=10)
    shard = dict(zip(store.samples["sample_index"].to_pylist(), store.samples["shard"].to_pylist(), strict=True))
    batch = next(iter(TokenStream(store, batch_size=256, buffer_tokens=1024, block_tokens=16, content_only=False)))
    counts = Counter(shard[sample] for sample in batch.sample_index.tolist())
    assert len(counts) == 10 and len(set(batch.sample_index.tolist())) > 35  # of the 64 blocks that a window has of 250


@pytest.mark.parametrize("group", [None, "module"])
def test_no_sample_or_group_is_in_both_parts_and_both_parts_are_all(store, tmp_path, group):
    streams = [TokenStream(store, batch_size=64, validation=0.25, group=group, rank=r, world_size=2) for r in range(2)]
    train, validation = (
        [token for stream in streams for token in in_order(getattr(stream, f"{part}_dataloader")())] for part in ("train", "val")
    )
    assert Counter(train + validation) == Counter([*tokens_in_files(tmp_path / "run")])
    owner = {
        s: (s if group is None else m)
        for s, m in zip(store.sample_index.tolist(), store.samples["module"].to_pylist(), strict=True)
    }
    owners = [{owner[sample] for sample, _ in part} for part in (train, validation)]
    assert not owners[0] & owners[1]
    assert 0.15 < len(owners[1]) / len({*owner.values()}) < 0.4
    again = TokenStream(store, batch_size=64, validation=0.25, group=group)
    assert in_order(again.val_dataloader()) == in_order(again.val_dataloader())


def test_statistics_are_those_of_all_rows_in_float64(store, tmp_path):
    stream = TokenStream(store, batch_size=50, buffer_tokens=120)
    for hook in HOOKS:
        rows = np.array([rows[hook] for _, rows in tokens_in_files(tmp_path / "run").values()], dtype=np.float64)
        found = stream.statistics(hook)
        np.testing.assert_allclose(found.mean.numpy(), rows.mean(axis=0), rtol=1e-12)
        assert found.mean_squared_norm == pytest.approx((rows**2).sum(axis=1).mean(), rel=1e-12)
        assert found.total_variance == pytest.approx(rows.var(axis=0).sum(), rel=1e-12)
        assert found.n_tokens == len(rows) and stream.statistics(hook, n_tokens=130).n_tokens == 130
    refused(lambda: stream.statistics("other"), "mlp_in, mlp_out", "other")


class Recorder(pl.LightningModule):
    """Learns something, and notes which tokens it was given; it may fail in a step."""

    def __init__(self, fails_at=None):
        super().__init__()
        self.weight, self.seen, self.fails_at = torch.nn.Parameter(torch.zeros(3)), [], fails_at

    def training_step(self, batch, batch_idx):
        if self.global_step == self.fails_at:
            raise RuntimeError("killed")
        self.seen.append(tokens_of(batch))
        return ((batch["mlp_in"] - self.weight) ** 2).mean()

    def validation_step(self, batch, batch_idx):
        self.log("loss", batch["mlp_out"].mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-6)


def fitted(store, folder, every, fails_at=None, ckpt_path=None, save_on_exception=False, **options):
    module = Recorder(fails_at)
    checkpoint = ModelCheckpoint(
        folder, every_n_train_steps=every, save_top_k=-1, filename="{step}", save_on_exception=save_on_exception
    )
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=3, logger=False, callbacks=[checkpoint], enable_progress_bar=False, enable_model_summary=False
    )
    try:
        trainer.fit(module, datamodule=TokenStream(store, batch_size=64, validation=0.25, **options), ckpt_path=ckpt_path)
    except RuntimeError as error:
        assert str(error) == "killed"
    return module.seen


@pytest.mark.filterwarnings("error:.*not resumable")
def test_a_fit_that_is_killed_at_any_step_goes_on_where_its_checkpoint_is(store, tmp_path):
    whole = fitted(store, tmp_path / "whole", 1)
    n_steps = TokenStream(store, batch_size=64, validation=0.25).n_steps
    assert len(whole) == 3 * n_steps and n_steps > 4
    for epoch in range(3):
        tokens = [token for step in whole[epoch * n_steps : (epoch + 1) * n_steps] for token in step]
        assert len({*tokens}) == len(tokens)
    for done in (1, 2, n_steps - 1, n_steps, n_steps + 1, 2 * n_steps + 3):
        ckpt = next((tmp_path / "whole").glob(f"step={done}.ckpt"))
        assert fitted(store, tmp_path / f"from {done}", 1000, ckpt_path=ckpt) == whole[done:], done


def test_a_step_in_which_a_fit_fails_is_given_again(store, tmp_path):
    whole = fitted(store, tmp_path / "whole", 1000)
    before = fitted(store, tmp_path / "killed", 1000, fails_at=3, save_on_exception=True)
    (ckpt,) = (tmp_path / "killed").glob("*.ckpt")
    state = torch.load(ckpt, weights_only=False)["TokenStream"]
    assert (state["epoch"], state["step"]) == (0, 3)
    assert before + fitted(store, tmp_path / "after", 1000, ckpt_path=ckpt) == whole
    plain = TokenStream(store, batch_size=64, validation=0.25, epochs=3)
    plain.load_state_dict(state)
    assert [tokens_of(batch) for batch in plain] == whole[3:]


def refused(call, *parts):
    with pytest.raises(InvalidInputError) as error:
        call()
    for part in parts:
        assert part in str(error.value)


def test_what_cannot_be_used_is_refused_by_name(store, monkeypatch):
    refused(lambda: TokenStream(store, ["mlp_in", "resid"]), "no token rows of resid", "mlp_in, mlp_out")
    refused(lambda: TokenStream(store, []), "no token rows of any hook point")
    refused(lambda: TokenStream(store, batch_size=0), "batch_size must be at least 1, got 0")
    refused(lambda: TokenStream(store, block_tokens=12), "multiple of 8, got 12")
    refused(lambda: TokenStream(store, validation=1.0), "from 0 to below 1")
    refused(lambda: TokenStream(store, group="module"), "above 0 with a group")
    refused(lambda: TokenStream(store, rank=2, world_size=2), "got 2 and 2")
    refused(lambda: list(TokenStream(store, batch_size=5, rank=0, world_size=3)), "batch_size of at least 6")
    state = TokenStream(store, seed=1).state_dict()
    refused(lambda: TokenStream(store).load_state_dict(state), "its seed is 1, here it is 0")
    refused(lambda: TokenStream(store).load_state_dict({}), "its store is None")
    stream = TokenStream(store, batch_size=64)
    free = stream.held_bytes - 1
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": free}))
    refused(lambda: list(stream), "fewer buffer_tokens")


def test_only_two_windows_are_held_of_a_store_of_any_size(store):
    few, many = (TokenStream(store, batch_size=16, buffer_tokens=n) for n in (64, 512))
    of_row = 3 * 4 + 2 * 4 + 8 + 8 + 4
    assert 2 * 48 * of_row < few.held_bytes - few._tokens.nbytes <= 2 * 64 * (of_row + 8)
    assert few.held_bytes < many.held_bytes
    batch = next(iter(many))
    assert batch["mlp_in"].untyped_storage().nbytes() == 16 * 3 * 4  # a batch keeps no window alive
