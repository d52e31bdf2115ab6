"""The one exception that users see: a sentence that says what is wrong and what to do."""


class DeltacomeError(Exception):
    """Bad input or a failed check. The command line prints it as one line and exits with status 1."""


class UnreachableRatioError(DeltacomeError):
    """A ratio that the method cannot compress these checkpoints to."""


def reason(error: BaseException) -> str:
    """The first line of another library's message, or the error's type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
