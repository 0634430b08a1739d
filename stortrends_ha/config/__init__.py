"""The cluster's configuration: one YAML file, identical on both nodes.

Job: turn the file into a `Cluster` that is right in every respect that can be judged from the file alone,
or say every mistake in it at once, each with its path, what was found and what was expected.
Invariants: `load` returns a complete `Cluster` or raises `ConfigError`, never anything else; nothing
outside the file is looked at, so both nodes judge the same file alike.
Inside, in the order of a load: `document` (YAML to a tree with line numbers), `reader` (tree to values, by
the table in `keys`, made of `kinds` with the parsers in `values`), `checks` and `clashes` (rules between keys),
`model` (what the others use). `reference` is the table of keys as documentation. `sections` tells nodes whether
their files are the same. `key_file` reads the cluster's
secret, which `load` does not, so that a file can be judged on any machine.
"""

import os
from pathlib import Path

from stortrends_ha.config.addresses import on_one_machine
from stortrends_ha.config.checks import check_relations
from stortrends_ha.config.document import Problems, parse, read_text
from stortrends_ha.config.key_file import read_key
from stortrends_ha.config.model import (
    Address,
    Arbiter,
    Cluster,
    Etcd,
    Failover,
    FenceAgent,
    Fencing,
    Floating,
    Group,
    Limits,
    Manual,
    Node,
    Volume,
    Witness,
    build,
)
from stortrends_ha.config.reader import read
from stortrends_ha.config.sections import BINDING, Sections, sections
from stortrends_ha.errors import ConfigError

__all__ = [
    "BINDING",
    "Address",
    "Arbiter",
    "Cluster",
    "Etcd",
    "Failover",
    "FenceAgent",
    "Fencing",
    "Floating",
    "Group",
    "Limits",
    "Manual",
    "Node",
    "Sections",
    "Volume",
    "Witness",
    "load",
    "on_one_machine",
    "read_key",
    "sections",
]


def load(path: Path) -> Cluster:
    """The cluster that the file describes; raises `ConfigError` with every problem at once."""
    text = read_text(path)
    problems = Problems()
    try:
        values = read(parse(text, problems), Path(os.path.abspath(path)).parent, problems)
        check_relations(values, problems)
        problems.raise_if_any()
    except ConfigError as error:
        raise ConfigError(error.problems, path) from error
    return build(values)
