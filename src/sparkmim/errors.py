"""Errors that are told to users as one sentence."""


class UserError(ValueError):
    """An argument, a file or a data set that cannot be used; the message names it and the remedy.

    Every error that a user can mend is one of these, whatever else it is. The command line prints the message without
    a traceback.
    """


class UnusableData(UserError, RuntimeError):
    """Data that prove unusable while a run reads them."""


class MissingPath(UserError, FileNotFoundError):
    """A path that does not exist."""
