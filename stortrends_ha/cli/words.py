"""How what the nodes say becomes sentences."""

_ENDS = (".", "?", "!")


def sentence(clause: str) -> str:
    """With one full stop at its end, unless a question or an exclamation ends it."""
    return clause if clause.endswith(_ENDS) else f"{clause}."
