"""Errors that are told to users as one sentence."""


class UserError(ValueError):
    """An argument, a file or a data set that cannot be used; the message names it and the remedy.

    Every error that a user can mend is one of these, whatever else it is. The command line prints the message without
    a traceback.
    """

    def __init__(self, message: object = "", *more: object) -> None:
        # Loader workers pass an error on as text, behind their traceback.
        if isinstance(message, str) and message.startswith("Caught ") and "Original Traceback" in message:
            message = message.rpartition(f"{type(self).__name__}: ")[2].strip()
        super().__init__(message, *more)


class UnusableData(UserError, RuntimeError):
    """Data that prove unusable while a run reads them."""


class MissingPath(UserError, FileNotFoundError):
    """A path that does not exist."""
