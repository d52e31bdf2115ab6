"""The one exception that users see: a sentence that says what is wrong and what to do."""


class DeltacomeError(Exception):
    """Bad input or a failed check. The command line prints it as one line and exits with status 1."""


class BadInputError(DeltacomeError):
    """Input that nothing good can come of: what has been computed from it is worth nothing either."""


class UnreachableRatioError(BadInputError):
    """A ratio that the method cannot compress these checkpoints to."""
