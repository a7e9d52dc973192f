"""The one error that conversion raises on bad input."""


class ConversionError(ValueError):
    """A checkpoint cannot be converted; the message is one line and nothing was written."""


def one_line(error: BaseException) -> str:
    """Another library's message without its line breaks."""
    return " ".join(str(error).split())
