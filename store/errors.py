"""Errors that a user can act on. The command line prints them as they are, without a traceback."""


def shown(value: object) -> str:
    """Returns a value as messages show it: its repr, or the beginning of that."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class ExactivationsError(Exception):
    """Base of all errors whose message says what is wrong, where, what was expected, what was found, and what to do."""

    known_to_all_ranks = False
    """Set on an error that every rank raises, so that only the first one tells it."""


class InvalidInputError(ExactivationsError, ValueError):
    """A dataset, option or model that cannot be used as asked."""


class StoreError(ExactivationsError):
    """A run folder that cannot be read or written."""


class IncompleteStoreError(StoreError):
    """A store of which shards are missing."""


class CorruptShardError(StoreError):
    """A shard file that is not, bit for bit, what was written."""


class IdentityError(StoreError):
    """A run folder that belongs to another run: something that decides the values differs."""


class LockedRunError(StoreError):
    """A run folder into which another live process writes."""


class VerificationError(StoreError):
    """A store that failed its verification, or was never verified."""


class NotFiniteError(StoreError):
    """Activations with inf or NaN in them, which are never stored."""
