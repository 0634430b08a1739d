"""The benchmark's error: part of the project's one error tree."""

from stortrends_ha.errors import StorTrendsError


class BenchError(StorTrendsError):
    """A server or fio could not be run; the text says which and why."""
