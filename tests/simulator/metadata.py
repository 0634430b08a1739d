"""The disk that a host keeps its map files on: a loss of power keeps, loses or tears what was not synced, page by page.

A failed sync leaves what was written in the cache, where it is read, and never gets to the disk any more: as in Linux.
"""

from collections.abc import Callable
from random import Random

PAGE_BYTES = 4096
ZEROES = bytes(PAGE_BYTES)


class Page:
    """``versions``: what is stable, then all that was written since, each with whether it may still become stable."""

    def __init__(self) -> None:
        self.versions: list[tuple[bytes, bool]] = [(ZEROES, True)]

    @property
    def content(self) -> bytes:
        """What the cache holds."""
        return self.versions[-1][0]

    def sync(self) -> None:
        """What can become stable is."""
        del self.versions[: max(at for at, (_, can) in enumerate(self.versions) if can)]

    def fail(self) -> None:
        """A sync has failed."""
        self.versions[1:] = [(content, False) for content, _ in self.versions[1:]]

    def lose_cache(self, random: Random) -> None:
        """It is as it was at some moment since it was stable, or half of it is."""
        contents = [content for content, _ in self.versions]
        content, other = random.choice(contents), random.choice(contents)
        if random.random() < 0.3:
            content = content[: PAGE_BYTES // 2] + other[PAGE_BYTES // 2 :]
        self.versions = [(content, True)]


class MapPages:
    """A file; it outlives processes. ``entered``: its name is on the disk, too."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self.pages: dict[int, Page] = {}
        self.entered = False
        self.changed = changed

    def read(self, number: int) -> bytes:
        """A page, as the cache has it; empty behind the end."""
        return self.pages[number].content if number in self.pages else b""

    def write(self, number: int, content: bytes) -> None:
        """Into the cache."""
        self.pages.setdefault(number, Page()).versions.append((content, True))
        self.changed()

    def extend(self, length: int) -> None:
        """It has at least so many pages."""
        for number in range(length):
            self.pages.setdefault(number, Page())

    def truncate(self) -> None:
        """All of it becomes a hole."""
        for number in self.pages:
            self.write(number, ZEROES)

    def sync(self) -> None:
        """All of it is stable."""
        for page in self.pages.values():
            page.sync()
        self.changed()

    def fail(self) -> None:
        """A sync has failed."""
        for page in self.pages.values():
            page.fail()

    def next_data(self, number: int) -> int:
        """The first page from here that is no hole, or the end."""
        while number in self.pages and self.pages[number].content == ZEROES:
            number += 1
        return number

    def lose_cache(self, random: Random) -> None:
        """With each page something else may happen."""
        for page in self.pages.values():
            page.lose_cache(random)


class Metadata:
    """All map files of a host, by their names."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self.files: dict[str, MapPages] = {}

    def open(self, name: str) -> MapPages:
        """That file, which is made if there is none."""
        if name not in self.files:
            self.files[name] = MapPages(self._changed)
        return self.files[name]

    def sync_names(self) -> None:
        """Of files that were made."""
        for pages in self.files.values():
            pages.entered = True

    def lose_cache(self, random: Random) -> None:
        """The power is gone."""
        for name, pages in list(self.files.items()):
            if not pages.entered and random.random() < 0.5:
                del self.files[name]
            pages.lose_cache(random)

    def spoil(self, random: Random) -> str:
        """One of them is lost, or some bytes of one of its pages are others; what was done."""
        if not self.files:
            return "nothing"
        name = random.choice(list(self.files))
        number = random.choice(list(self.files[name].pages) or [-1])
        if number < 0 or random.random() < 0.5:
            del self.files[name]
            self._changed()
            return f"{name} is LOST"
        page = self.files[name].pages[number]
        at = random.randrange(PAGE_BYTES - 8)
        rotten = page.content[:at] + random.randbytes(8) + page.content[at + 8 :]
        page.versions = [(rotten, True)]
        self._changed()
        return f"page {number} of {name} ROTS"
