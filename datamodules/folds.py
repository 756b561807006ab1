"""Folds of the training part: as its groups are not to straddle parts, so they are not to straddle folds."""

import numpy as np

from exactivations.datamodules.activations import ActivationDataModule
from exactivations.datamodules.dealing import deal_groups, deal_samples
from exactivations.datamodules.examples import IntArray
from exactivations.store.errors import InvalidInputError


def folds_of_train(data: ActivationDataModule, n_folds: int) -> IntArray:
    """Deals training samples to folds, whole groups together and each class as evenly as can be.

    The same data and seed give the same folds.

    Args:
        data: Of samples with classes. Its seed is the folds', too.
        n_folds: F, at least 2.

    Returns:
        int64 [n], the fold of each of `data.numbers("train")`, 0 to F - 1.

    Raises:
        InvalidInputError: If labels are no classes of samples, there are fewer groups (or samples) than folds, or a class is in one
            fold only, so that nothing is left of it when that is held out.
    """
    if data.unit != "sample" or not data.classes:
        raise InvalidInputError(f"folds are of samples with classes: {data.label} must be a label of samples, and no real values")
    train, labels = data.numbers("train"), data.targets("train")[0].numpy()
    names = data.groups_of("train")
    number = {name: at for at, name in enumerate(sorted(set(names)))}
    what = "samples" if data.group is None else f"groups of column {data.group!r}"
    if not 2 <= n_folds <= len(number):
        raise InvalidInputError(f"{len(number):,} {what} of train cannot be dealt to {n_folds} folds: take 2 to {len(number):,}")
    shares, dice = (1 / n_folds,) * n_folds, np.random.default_rng([data.seed, n_folds])
    if data.group is None:
        folds = deal_samples(labels, shares, dice)
    else:
        folds = deal_groups(labels, np.array([number[name] for name in names], dtype=np.int64), shares, dice)
    assert len(folds) == len(train)
    for at, name in enumerate(data.classes):
        if len(set(folds[labels == at].tolist())) < 2:
            raise InvalidInputError(
                f"class {name!r} of {data.label} is in one fold of train only ({int((labels == at).sum()):,} samples): its "
                f"prototype could not be held out. It must be in at least two {what}; add samples, or leave the class out"
            )
    return folds
