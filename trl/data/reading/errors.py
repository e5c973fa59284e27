"""The error that this room raises."""


class DataError(ValueError):
    """A mistake in the data or in how it is described. The message says where it is and what to do about it."""
