"""Tokens are the store's own or refused; what is counted of them is what counting by hand gives."""

import math
from collections import Counter, defaultdict
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from exactivations.datamodules.text import TextDataModule
from exactivations.datamodules.text_rows import TextTokens, bag_of_tokens, length_rows
from exactivations.datamodules.token_identity import TokenIdentity, control_labels
from exactivations.store.activation_store import ActivationStore
from exactivations.store.errors import InvalidInputError
from tests.datamodules.conftest import make_word_tokenizer
from tests.store.mask_folders import POOLED, hash_by_hand, store_of
from tests.store.stores import ids_of, make_store, mask_of


def ragged(samples):
    """TextTokens of samples given as lists of (id, whether it is content)."""
    flat = [pair for sample in samples for pair in sample]
    start = np.cumsum([0, *map(len, samples)])
    return TextTokens(np.array([i for i, _ in flat], dtype=np.int64), np.array([m for _, m in flat], dtype=bool), start)


samples_strategy = st.lists(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=12), min_size=1, max_size=8)

# --- whose they are


def test_tokens_of_a_store_with_rows_of_tokens_come_from_its_shards_in_the_order_of_its_samples(tmp_path):
    index, lengths = [3, 4, 7, 10, 11], [2, 5, 1, 3, 3]
    store = ActivationStore(store_of(tmp_path / "run", lengths, index))
    tokens = TextTokens.of(store)
    assert tokens.ids.tolist() == [i for s, n in zip(index, lengths, strict=True) for i in ids_of(s, n)]
    assert tokens.is_content.tolist() == [m for s, n in zip(index, lengths, strict=True) for m in mask_of(s, n)]
    assert (tokens.start.tolist(), len(tokens)) == ([0, 2, 7, 8, 11, 14], 5)
    assert tokens.sample.tolist() == [0] * 2 + [1] * 5 + [2] + [3] * 3 + [4] * 3
    assert tokens.previous.tolist() == [-1, 300, -1, 400, 401, 402, 403, -1, -1, 1000, 1001, -1, 1100, 1101]


def test_tokens_that_are_not_those_of_the_hash_are_refused(tmp_path):
    hashes = [hash_by_hand(ids_of(i, n)) for i, n in ((3, 2), (4, 5), (7, 1))]
    make_store(tmp_path / "run", [3, 4, 7], [2, 5, 1], token_hash=[hashes[0], hashes[2], hashes[1]])
    with pytest.raises(InvalidInputError, match=r"sample 4 has other tokens than .*hash differs; 2 of 3 samples"):
        TextTokens.of(ActivationStore(tmp_path / "run"))


TEXTS = ["a b c", "d", "a a a z b", "e f g h", "c", "b c d"]


def data_of(texts=TEXTS, **options):
    data = TextDataModule(texts, make_word_tokenizer(), **options)
    data.setup()
    return data


@pytest.fixture
def pooled(tmp_path):
    """A store without tokens, of the samples 0, 2, 3 and 5 of the texts, tokenized by hand."""
    ids = [[2, 5, 6, 7, 3], [2, 5, 5, 5, 1, 6, 3], [2, 9, 10, 11, 12, 3], [2, 6, 7, 8, 3]]
    hashes = [hash_by_hand(sample) for sample in ids]
    make_store(tmp_path / "run", [0, 2, 3, 5], [5, 7, 6, 5], names=POOLED, token_hash=hashes)
    return ActivationStore(tmp_path / "run"), ids


def test_tokens_of_a_pooled_store_come_from_the_texts(pooled):
    store, ids = pooled
    tokens = TextTokens.of(store, data_of())
    assert tokens.ids.tolist() == [i for sample in ids for i in sample]
    assert tokens.is_content.tolist() == [i not in (2, 3) for sample in ids for i in sample]
    assert tokens.start.tolist() == store.token_start.tolist() == [0, 5, 12, 18, 23]


def test_texts_that_are_not_those_of_the_store_are_refused(pooled):
    store, _ = pooled
    with pytest.raises(InvalidInputError, match=r"keeps no rows of tokens.*give the data module"):
        TextTokens.of(store)
    with pytest.raises(InvalidInputError, match=r"the dataset: sample 3 has other tokens .*1 of 4 samples"):
        TextTokens.of(store, data_of([*TEXTS[:3], "e f g i", *TEXTS[4:]]))
    with pytest.raises(InvalidInputError, match=r"the dataset has no sample 5, .*1 of 4 samples"):
        TextTokens.of(store, data_of(TEXTS[:5]))


# --- samples


@settings(max_examples=100, deadline=None)
@given(samples=samples_strategy, max_features=st.integers(1, 12), data=st.data())
def test_a_bag_of_tokens_is_what_counting_by_hand_gives(samples, max_features, data):
    train = sorted(data.draw(st.sets(st.integers(0, len(samples) - 1), min_size=1)))
    rows, columns = bag_of_tokens(ragged(samples), np.array(train), max_features)
    content = [[i for i, counts in sample if counts] for sample in samples]
    documents = Counter(i for at in train for i in set(content[at]))
    expected = sorted(sorted(documents, key=lambda i: (-documents[i], i))[:max_features])
    assert columns.tolist() == expected and rows.dtype == np.float32
    by_hand = [[math.log1p(sample.count(i)) for i in expected] for sample in content]
    np.testing.assert_allclose(rows, np.array(by_hand).reshape(len(samples), len(expected)), rtol=1e-6)


def test_no_sample_outside_training_changes_the_columns():
    samples = [[(1, True), (2, True)], [(1, True)], [(3, True), (3, True), (2, True)]]
    assert bag_of_tokens(ragged(samples), np.array([0, 1]), 1)[1].tolist() == [1]
    assert bag_of_tokens(ragged(samples), np.array([0, 1]))[1].tolist() == [1, 2]
    for train in ([], [-1], [0, 3]):
        with pytest.raises(InvalidInputError, match="training samples must be given by numbers from 0 to 2, at least one"):
            bag_of_tokens(ragged(samples), np.array(train, dtype=np.int64))


def test_a_linear_probe_on_length_rows_finds_a_class_of_middling_length_and_counts_content_only():
    dice = np.random.default_rng(0)
    labels = dice.integers(2, size=2000)
    lengths = np.exp(dice.normal(4, np.where(labels == 1, 0.2, 1.0))).astype(int) + 1
    samples = [[(1, False)] + [(2, True)] * n for n in lengths]
    rows = length_rows(ragged(samples))
    np.testing.assert_allclose(rows[:, 0], np.log(lengths), rtol=1e-6)
    assert rows.dtype == np.float32 and rows.shape == (2000, 2)

    def area(features):
        features = (features - features.mean(0)) / features.std(0)
        return roc_auc_score(labels, LogisticRegression(C=10).fit(features, labels).decision_function(features))

    best = roc_auc_score(labels, -np.abs(np.log(lengths) - 4))  # by the likelihood ratio
    assert area(rows) > best - 0.01 > 0.85 and area(rows[:, :1]) < 0.6
    with pytest.raises(InvalidInputError, match="the sample at position 1 has no content token"):
        length_rows(ragged([[(1, True)], [(1, False)]]))


# --- tokens


@settings(max_examples=60, deadline=None)
@given(samples=samples_strategy, n_classes=st.integers(2, 4), seed=st.integers(0, 1000), data=st.data())
def test_rates_by_token_are_those_of_exact_fractions(samples, n_classes, seed, data):
    tokens = ragged(samples)
    n = len(tokens.ids)
    classes = np.random.default_rng(seed).integers(n_classes, size=n)
    train = sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1)))
    found = TokenIdentity.of(tokens, classes, n_classes, np.array(train)).probabilities(tokens, np.arange(n))
    keys = [(None if at == 0 else sample[at - 1][0], i) for sample in samples for at, (i, _) in enumerate(sample)]
    by_id, by_pair = defaultdict(Counter), defaultdict(Counter)
    for number in train:
        by_id[keys[number][1]][classes[number]] += 1
        by_pair[keys[number]][classes[number]] += 1
    share = Counter(classes[train].tolist())
    for number, (before, i) in enumerate(keys):
        for k in range(n_classes):
            p = Fraction(share[k] + 1, len(train) + n_classes)
            p = (by_id[i][k] + p) / (by_id[i].total() + 1)
            p = (by_pair[before, i][k] + p) / (by_pair[before, i].total() + 1)
            assert found[number, k] == pytest.approx(float(p), rel=1e-12)
    np.testing.assert_allclose(found.sum(1), 1)


def test_the_token_before_decides_where_it_was_seen_and_unseen_ids_have_the_shares_of_all():
    after_1, after_2 = [(1, True), (5, True)], [(2, True), (5, True)]
    tokens = ragged([after_1] * 20 + [after_2] * 20 + [[(5, True)], [(9, True)]])
    classes = np.array([0, 0] * 20 + [0, 1] * 20 + [-1, -1])
    model = TokenIdentity.of(tokens, classes, 2, np.arange(80))
    found = model.probabilities(tokens, np.array([1, 41, 80, 81]))
    assert found[0, 0] > 0.97 and found[1, 1] > 0.97
    np.testing.assert_allclose(found[2], (np.array([20, 20]) + model.share) / 41)
    np.testing.assert_allclose(found[3], [61 / 82, 21 / 82])
    with pytest.raises(InvalidInputError, match="training token 80 has class -1, expected 0 to 1"):
        TokenIdentity.of(tokens, classes, 2, np.arange(82))
    with pytest.raises(InvalidInputError, match="there are 82 tokens, but 81 classes"):
        TokenIdentity.of(tokens, classes[1:], 2, np.arange(80))


def test_control_labels_belong_to_ids_and_have_the_shares_of_the_classes():
    dice = np.random.default_rng(1)
    ids, shares = dice.permutation(50_000), np.array([0.5, 0.0, 0.2, 0.3])
    labels = control_labels(ids, shares, seed=3)
    np.testing.assert_allclose(np.bincount(labels, minlength=4) / 50_000, shares, atol=0.01)
    some = dice.choice(ids, 1000)
    by_id = dict(zip(ids.tolist(), labels.tolist(), strict=True))
    assert control_labels(some, shares, seed=3).tolist() == [by_id[i] for i in some.tolist()]
    others = control_labels(ids, shares, seed=4)
    assert np.mean(labels == others) == pytest.approx((shares**2).sum(), abs=0.01)
    for wrong in ([1.0], [0.5, 0.6], [-0.5, 1.5], [math.nan, 1.0]):
        with pytest.raises(InvalidInputError, match="shares of classes must be at least two, none negative, and sum to 1"):
            control_labels(ids, np.array(wrong), seed=0)
