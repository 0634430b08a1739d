"""The witness's memory: one durable register for each group of each cluster, and the history of its changes.

Job: carry out a request as one SQLite transaction. Blocking; used by one thread.
Invariants:
- What `carry_out` returns has been made durable before: after kill -9 or a loss of power at any moment the register
  holds every change that was granted, and at most one more whose answer nobody got.
- After any error of the disk the database is closed, and serves again only when it could be opened, checked and
  durably written to, so a change that may not have reached the disk is never taken for one that has.
Bounds: `HISTORY_PER_GROUP` changes are kept of each group, `GROUPS_PER_CLUSTER` groups of each cluster.

Why a rollback journal and not WAL: a change is then complete in the one file as soon as it is granted, so a copy of
that file is a backup; and of a write-ahead log whose tail is damaged SQLite silently drops that tail, which would be
granted changes. It costs some more syncs for each change, and records change seldom. `synchronous=EXTRA` also syncs
the directory after the journal has been deleted: a journal that reappeared would undo a change that was granted.
"""

import contextlib
import datetime
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from stortrends_ha.errors import StorageError
from stortrends_ha.protocol.witness import Answer, Force, Propose, Read, Seed
from stortrends_ha.record import Record

HISTORY_PER_GROUP = 1000
GROUPS_PER_CLUSTER = 1000
# An operator may look into the history while we run (it is a file for `sqlite3`); not for longer than this.
BUSY_S = 0.3

FORM = 1  # of the tables, in `user_version`
_TABLES = """
CREATE TABLE IF NOT EXISTS registers (
    cluster TEXT, "group" TEXT, epoch INTEGER NOT NULL, record TEXT NOT NULL, PRIMARY KEY (cluster, "group"));
CREATE TABLE IF NOT EXISTS history (
    id INTEGER PRIMARY KEY AUTOINCREMENT, cluster TEXT NOT NULL, "group" TEXT NOT NULL, epoch INTEGER NOT NULL,
    record TEXT NOT NULL, "when" TEXT NOT NULL, who TEXT NOT NULL, note TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS history_of_group ON history (cluster, "group", id);
CREATE TABLE IF NOT EXISTS opened (times INTEGER NOT NULL);
"""

Change = Propose | Seed | Force


def judge(current: Record | None, change: Change) -> tuple[Answer, Record | None]:
    """The answer to a change, and the record to set for it. Asked twice, what has been granted is granted again."""
    new = change.new if isinstance(change, Propose) else change.record
    granted = Answer("granted")
    if current == new:
        return granted, None
    match change:
        case Propose(_, old, _):
            allowed = current == old and new.epoch == old.epoch + 1
        case Seed():
            allowed = current is None
        case Force():
            allowed = current is None or new.epoch > current.epoch
    return (granted, new) if allowed else (Answer("refused", current), None)


class Registers:
    """All registers of a witness."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._database: sqlite3.Connection | None = None

    def open(self) -> None:
        """Open, or make, the database and prove that it can be written to. Raises StorageError."""
        with self._said():
            self._opened()

    def close(self) -> None:
        """Close the database; nothing is lost by not doing it."""
        if self._database:
            with contextlib.suppress(sqlite3.Error):
                self._database.close()
            self._database = None

    def carry_out(self, cluster: str, who: str, request: Read | Change) -> Answer:
        """Answer a request of `who`, a node of this cluster. Raises StorageError: then the outcome is not known."""
        with self._said():
            database = self._opened()
            if isinstance(request, Read):
                return Answer("known", _current(database, cluster, request.group))
            with _transaction(database):
                return _change(database, cluster, who, request)

    def _opened(self) -> sqlite3.Connection:
        if self._database is None:
            self._database = sqlite3.connect(self._path, isolation_level=None, timeout=BUSY_S, check_same_thread=False)
            _prepare(self._database)
        return self._database

    @contextlib.contextmanager
    def _said(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            self.close()
            raise StorageError(_sentence(self._path, error)) from error
        except _OtherForm as error:
            self.close()
            raise StorageError(f"The witness's registers {self._path} cannot be used: {error}.") from error
        except (ValueError, _Damaged) as error:
            self.close()
            raise StorageError(_damaged(self._path, error)) from error


class _Damaged(Exception):
    pass


class _OtherForm(Exception):
    pass


def _prepare(database: sqlite3.Connection) -> None:
    database.execute("PRAGMA trusted_schema = OFF")
    database.execute("PRAGMA journal_mode = DELETE")
    database.execute("PRAGMA synchronous = EXTRA")
    found = database.execute("PRAGMA quick_check(1)").fetchone()[0]
    if found != "ok":
        raise _Damaged(found.splitlines()[-1])
    form = database.execute("PRAGMA user_version").fetchone()[0]
    if form not in (0, FORM):
        raise _OtherForm(f"their tables have form {form}, this version of stortrends-ha knows form {FORM}")
    with _transaction(database):
        for statement in _TABLES.split(";"):
            database.execute(statement)
        database.execute(f"PRAGMA user_version = {FORM}")
        # A change that is certainly durable: with it, everything that the file shows is, too.
        times = database.execute("SELECT coalesce(max(times), 0) FROM opened").fetchone()[0]
        database.execute("DELETE FROM opened")
        database.execute("INSERT INTO opened VALUES (?)", (times + 1,))


@contextlib.contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[None]:
    """Durable when it is left without an error. An error closes the database, which undoes it."""
    database.execute("BEGIN IMMEDIATE")
    yield
    database.execute("COMMIT")


def _current(database: sqlite3.Connection, cluster: str, group: str) -> Record | None:
    row = database.execute(
        'SELECT epoch, record FROM registers WHERE cluster = ? AND "group" = ?', (cluster, group)
    ).fetchone()
    if row is None:
        return None
    record = Record.decode(json.loads(row[1]))
    if record.epoch != row[0]:
        raise _Damaged(f"the register of {cluster} {group} contradicts itself")
    return record


def _change(database: sqlite3.Connection, cluster: str, who: str, change: Change) -> Answer:
    current = _current(database, cluster, change.group)
    answer, record = judge(current, change)
    if record is None:
        return answer
    if current is None and _groups(database, cluster) >= GROUPS_PER_CLUSTER:
        return Answer("error", why=f"it keeps {GROUPS_PER_CLUSTER} groups of cluster {cluster} already")
    text = json.dumps(record.encode())
    database.execute("REPLACE INTO registers VALUES (?, ?, ?, ?)", (cluster, change.group, record.epoch, text))
    _remember(database, cluster, who, change, record.epoch, text)
    return answer


def _groups(database: sqlite3.Connection, cluster: str) -> int:
    return int(database.execute("SELECT count(*) FROM registers WHERE cluster = ?", (cluster,)).fetchone()[0])


def _remember(database: sqlite3.Connection, cluster: str, who: str, change: Change, epoch: int, record: str) -> None:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    database.execute(
        'INSERT INTO history (cluster, "group", epoch, record, "when", who, note) VALUES (?, ?, ?, ?, ?, ?, ?)',
        (cluster, change.group, epoch, record, now, who, note_of(change)),
    )
    database.execute(
        'DELETE FROM history WHERE cluster = ?1 AND "group" = ?2 AND id <= coalesce('
        ' (SELECT id FROM history WHERE cluster = ?1 AND "group" = ?2 ORDER BY id DESC LIMIT 1 OFFSET ?3), -1)',
        (cluster, change.group, HISTORY_PER_GROUP),
    )


def note_of(change: Change) -> str:
    """How a change came about, for people."""
    match change:
        case Propose():
            return "granted"
        case Seed():
            return "seeded"
        case Force(_, _, note):
            return f"forced: {note}"


def _sentence(path: Path, error: sqlite3.Error) -> str:
    if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return _damaged(path, error)
    return f"The witness's registers {path} cannot be used: {error}."


def _damaged(path: Path, error: Exception) -> str:
    return (
        f"The witness's registers {path} are damaged: {error}. Move the file away and start the witness again:"
        " it begins without records, and two nodes that are in sync with each other give it theirs."
    )
