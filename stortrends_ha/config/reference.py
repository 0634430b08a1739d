"""The table of keys as documentation: run as a module, it prints the table of docs/configuration.md.

Invariant: says nothing of its own; a test compares it with the document.
"""

from stortrends_ha.config.keys import FILE
from stortrends_ha.config.kinds import Key, walk

HEADING = "| key | value | unit | default | meaning |\n|---|---|---|---|---|"


def reference_table() -> str:
    """A Markdown table with a row for every key."""
    return "\n".join([HEADING, *(_row(path, key) for path, key in walk(FILE))])


def default_text(key: Key) -> str:
    """The default as the documentation gives it."""
    return "required" if key.default is None else f"`{key.default}`: {key.reason}"


def _row(path: str, key: Key) -> str:
    return f"| `{path}` | {key.kind.expected} | {key.unit} | {default_text(key)} | {key.doc} |"


if __name__ == "__main__":
    print(reference_table())
