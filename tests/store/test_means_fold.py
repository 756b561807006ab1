"""Sums are held against what they are sums of: wherever they are folded, verified or published."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from exactivations.store.errors import CorruptShardError, IdentityError, StoreError
from exactivations.store.means_file import read_means
from exactivations.store.means_fold import fold, publish_fold, sums_that_differ, withdraw_result
from exactivations.store.means_join import add, add_to
from exactivations.store.moments import Moments
from exactivations.store.run_folder import contents_of
from exactivations.store.shard import open_shard, write_shard
from exactivations.store.shard_content import ShardContent
from exactivations.store.shard_sums import CHECKSUM, ArrivedSums, Groups, MeanOptions, from_tensors, sealed, to_tensors
from exactivations.store.vectors import Vector
from exactivations.store.verification import write_verification
from tests.store.stores import verdict
from tests.store.test_means_file import POINTS, deal, tensors_of, texts, write_run


def spoil(folder, shard, change):
    """Changes the sums of a shard, with every checksum as it should be; the run's verdict holds for the new bytes."""
    info = folder.read_info()
    tensors, metadata = open_shard(folder.shard_path(shard))
    del metadata["checksum"]
    sums = from_tensors(tensors)
    change(sums)
    rows = {name: values.clone() for name, values in tensors.items() if not name.startswith("sums")}
    write_shard(folder.shard_path(shard), rows | sealed(to_tensors(sums)), metadata)
    contents = contents_of(folder.checksums(info), folder.samples_footer())
    write_verification(folder, verdict(info.fingerprint, contents=contents))


def without_a_sample(sums):
    name = "resid_post.0/last"
    sums[name] = Moments(sums[name].count - 1, sums[name].total, sums[name].squares)


def without_a_vector(sums):
    del sums["resid_post.0/last"]


def in_another_group(sums):
    name = "resid_post.0/last@groups"
    sums[name] = Moments(*(values[::-1].copy() for values in (sums[name].count, sums[name].total, sums[name].squares)))


def with_another_position(sums):
    name = next(name for name in sums if name.endswith("@positions"))
    sums[name] = Moments(sums[name].count + 1, sums[name].total, None)


@pytest.mark.parametrize("keeps_rows", [False, True])
@pytest.mark.parametrize("change", [without_a_sample, without_a_vector, in_another_group, with_another_position])
def test_sums_that_count_other_samples_are_never_folded(tmp_path, keeps_rows, change):
    """Of three groups, of which a shard's first and last never have the same number of samples here."""
    labels = ["a", "a", "a", "b", "c"]
    shards = [[replace(text, label=labels[i]) for i, text in enumerate(shard)] for shard in deal(texts(10), 2)]
    folder = write_run(tmp_path / "run", shards, keeps_rows=keeps_rows)
    before = fold(folder)
    spoil(folder, 1, change)
    for way in (lambda: fold(folder), lambda: add(replace(before, parts=[], token_hash=before.token_hash[:0]), folder)):
        with pytest.raises(CorruptShardError, match=r"00001\.safetensors"):
            way()
    assert list(sums_that_differ(folder, [0, 1])) == [1]


@pytest.mark.parametrize("name", ["resid_post.0/last", "resid_post.0/mean@groups", "resid_post.0@positions"])
def test_where_rows_are_kept_every_sum_is_held_against_them(tmp_path, name):
    folder = write_run(tmp_path / "run", deal(texts(12), 3))
    assert sums_that_differ(folder, [0, 1, 2]) == {}

    def change(sums):
        sums[name].total[0, 1] += 1e-9

    spoil(folder, 2, change)
    found = sums_that_differ(folder, [0, 1, 2])
    assert list(found) == [2] and f"its sums of {name} are not those of its rows" in found[2]


def test_samples_in_other_groups_than_the_runs_are_refused(tmp_path):
    """As when a node's copy of the dataset has other labels: the names of the groups are the same."""
    folder = write_run(tmp_path / "run", deal(texts(12), 2))
    table = pq.read_table(folder.path / "samples.parquet")
    labels = table.column("label").to_pylist()
    turned = table.set_column(table.column_names.index("label"), "label", pa.array(labels[1:] + labels[:1]))
    pq.write_table(turned, folder.path / "samples.parquet")
    with pytest.raises(IdentityError, match=r"the samples are not in the groups that the run put them in \(column 'label'"):
        fold(folder)
    info = folder.read_info()
    other = write_run(tmp_path / "other", [[replace(t, label="a") for t in s] for s in deal(texts(12), 2)])
    assert other.read_info().fingerprint != info.fingerprint


def test_a_result_is_withdrawn_when_its_run_fails_and_what_was_added_to_it_stays(tmp_path):
    first = write_run(tmp_path / "a", deal(texts(9), 2))
    publish_fold(first)
    withdraw_result(first, first.read_info())
    assert not (first.path / "means.safetensors").exists()
    publish_fold(first)
    second = write_run(tmp_path / "b", deal(texts(6, 1), 1), about={"dataset": "second"})
    add_to(first.path / "means.safetensors", second)
    publish_fold(first)
    assert [part.verified for part in read_means(first.path).parts] == [True, True]
    withdraw_result(second, second.read_info())  # it has no result of its own
    withdraw_result(first, replace(first.read_info(), identity={"of": "another run"}))
    assert [part.verified for part in read_means(first.path).parts] == [True, True]


def test_what_arrived_is_held_against_what_is_published():
    options = MeanOptions((Vector((POINTS[0],), "last"),), "label")
    tensors = tensors_of(texts(8), [f"{POINTS[0]}/last"], torch.float32)
    groups = Groups.of([text.label for text in texts(8)], np.arange(8), "label")
    content = ShardContent(options, lambda shard: groups)
    for left_out in (0, 1):
        arrived = ArrivedSums(options)
        for rows in (slice(left_out, 3), slice(3, 8)):
            arrived.update({name: values[rows] for name, values in tensors.items()})
        if left_out:
            with pytest.raises(StoreError, match=r"shard 5: the sums of resid_post.0/last are not those of the batches"):
                content.of(5, tensors, arrived)
        else:
            assert CHECKSUM in content.of(5, tensors, arrived)
