"""What a probe of tokens can know by the token itself: how often it has each class, and a task that remembering tokens solves."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from exactivations.datamodules.text_rows import NO_TOKEN, IntArray, TextTokens, check_numbers
from exactivations.store.errors import InvalidInputError

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TokenIdentity:
    """How often a token has each class, by its id and the id before it: what a probe of tokens can know without the model.

    The rates back off from the pair of ids to the id, and from there to all tokens: each level adds one observation, spread as the
    level above says (add-one smoothing with a prior: MacKay and Peto 1995, "A hierarchical Dirichlet language model"; at the top it
    is one observation of each class). A pair that was never seen has the rates of its id.

    Attributes:
        share: float64 [K], the rate of each class over all training tokens.
        ids: int64 [U], the ids that were seen, ascending, and by_id: float64 [U, K], how often each with each class.
        pairs: int64 [P], keys of the pairs that were seen, ascending, and by_pair: float64 [P, K], likewise.
    """

    share: FloatArray
    ids: IntArray
    by_id: FloatArray
    pairs: IntArray
    by_pair: FloatArray

    @classmethod
    def of(cls, tokens: TextTokens, classes: IntArray, n_classes: int, train: IntArray) -> "TokenIdentity":
        """Counts classes.

        Args:
            tokens: T of them.
            classes: int64 [T], the class of each token, as in `TokenLabels.numbers`.
            n_classes: K.
            train: int64, the numbers (0 to T-1) of the training tokens.

        Raises:
            InvalidInputError: If there are no training tokens, or one of them is not there or not labelled.
        """
        check_numbers("training tokens", train, len(tokens.ids))
        if len(classes) != len(tokens.ids):
            raise InvalidInputError(
                f"there are {len(tokens.ids):,} tokens, but {len(classes):,} classes: they are of another store"
            )
        of_train = classes[train]
        if of_train.min() < 0 or of_train.max() >= n_classes:
            wrong = int(np.flatnonzero((of_train < 0) | (of_train >= n_classes))[0])
            raise InvalidInputError(
                f"training token {train[wrong]} has class {of_train[wrong]}, expected 0 to {n_classes - 1}: leave out tokens "
                "that are not labelled"
            )
        counts = np.bincount(of_train, minlength=n_classes) + 1.0
        by_id = _count(tokens.ids[train], of_train, n_classes)
        return cls(counts / counts.sum(), *by_id, *_count(_pairs(tokens, train), of_train, n_classes))

    def probabilities(self, tokens: TextTokens, numbers: IntArray) -> FloatArray:
        """Returns the probability of each class of tokens by number, float64 [m, K]; none is 0.

        Raises:
            InvalidInputError: If there are no numbers, or one of them is not that of a token.
        """
        check_numbers("tokens", numbers, len(tokens.ids))
        of_id = _smoothed(_look_up(self.ids, self.by_id, tokens.ids[numbers]), self.share)
        return _smoothed(_look_up(self.pairs, self.by_pair, _pairs(tokens, numbers)), of_id)


def control_labels(ids: IntArray, shares: FloatArray, seed: int) -> IntArray:
    """Returns the labels of a control task (Hewitt and Liang 2019, doi 10.18653/v1/D19-1275): a random class for each token id.

    A probe can solve it only by remembering ids. Its selectivity is its accuracy on the true labels minus that of a probe of the
    same kind on these. An id has the same class wherever it is, whatever other ids there are.

    Args:
        ids: int64 [T], token ids.
        shares: float64 [K], with which probability an id gets each class: the share of tokens that have it.
        seed: Of the draw.

    Returns:
        int64 [T].

    Raises:
        InvalidInputError: If shares are no probabilities of at least two classes.
    """
    if len(shares) < 2 or not (shares >= 0).all() or not np.isclose(shares.sum(), 1):
        raise InvalidInputError(f"the shares of classes must be at least two, none negative, and sum to 1, got {shares.tolist()}")
    dice = np.random.default_rng(seed).random(int(ids.max()) + 1)
    return np.searchsorted(np.cumsum(shares)[:-1], dice, side="right")[ids]


def _pairs(tokens: TextTokens, numbers: IntArray) -> IntArray:
    """Returns the ids before tokens and their own as one key."""
    return (tokens.previous[numbers] - NO_TOKEN) * 2**32 + tokens.ids[numbers]


def _count(keys: IntArray, classes: IntArray, n_classes: int) -> tuple[IntArray, FloatArray]:
    """Returns the different keys [U], ascending, and how often each has each class [U, K]."""
    different, number = np.unique(keys, return_inverse=True)
    counts = np.bincount(number * n_classes + classes, minlength=len(different) * n_classes)
    return different, counts.reshape(-1, n_classes).astype(np.float64)


def _look_up(different: IntArray, counts: FloatArray, keys: IntArray) -> FloatArray:
    """Returns the counts of each key [n, K]; 0 of those that were not seen."""
    number = np.searchsorted(different, keys).clip(max=len(different) - 1)
    return np.where((different[number] == keys)[:, None], counts[number], 0.0)


def _smoothed(counts: FloatArray, prior: FloatArray) -> FloatArray:
    rates: FloatArray = (counts + prior) / (counts.sum(axis=1, keepdims=True) + 1)
    return rates
