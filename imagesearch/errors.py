"""The exceptions that end a run, and exceptions of libraries in a few words."""


class ImageSearchError(Exception):
    """Something failed: the message says what, where, and what to do. Exit code 1."""

    exit_code = 1


class UsageError(ImageSearchError):
    """Wrong usage or configuration: the message says how to fix it. Exit code 2."""

    exit_code = 2


class OutputError(Exception):
    """The results could not be written to stdout; the cause is an OSError."""


def describe_error(error: BaseException) -> str:
    """Returns why something failed, in a few words on one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def root_cause(error: BaseException) -> BaseException:
    """Returns the innermost of nested network exceptions."""
    while True:
        nested = [getattr(error, "reason", None), *(getattr(error, "errors", None) or ()), *error.args, error.__cause__]
        inner = next((value for value in nested if isinstance(value, BaseException)), None)
        if inner is None:
            return error
        error = inner
