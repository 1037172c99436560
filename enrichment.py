"""Filling in what the rows of a file do not say, by asking Open Library for their ISBNs.

It runs in the thread of a job, outside of every transaction, and tells the job's database now and then that it is
alive. Whatever the source does, each row ends as a book or with the reason why it is none.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence

from fastapi import HTTPException

import catalogues
import settings
from csv_files import LOOKED_UP, FileBook, ImportRow, RowIssue
from schemas import CSV_CONTEXT
from sources import Candidate, Source

log = logging.getLogger("books.enrichment")

PAUSE_SECONDS = 1.0  # between two questions of a job: Open Library asks for it
TICK_SECONDS = 0.5  # between two looks whether the server stops
KEEP_SECONDS = 4.0  # between two signs of life: well under a job's LEASE


class Stopping(Exception):
    """The server stops: the rows that wait are asked for again after its next start."""


class Enricher:
    """`keep` tells that the job is alive. It raises where the job is no longer this one's."""

    def __init__(self, keep: Callable[[], None]) -> None:
        self.keep = keep
        self.patience = catalogues.A_JOB_WAITS
        self.has_asked = False

    def fill_in(self, rows: Sequence[ImportRow]) -> bool:
        """Decide the rows that wait for what is looked up. False where the server stops first."""
        waiting = [row for row in rows if row.wanted]
        if not waiting:
            return True
        try:
            found, down = asyncio.run(self._look_up(list(dict.fromkeys(row.wanted for row in waiting if row.wanted))))
        except Stopping:
            return False
        for row in waiting:
            complete(row, found.get(row.wanted or ""), down)
        return True

    async def _look_up(self, isbns: Sequence[str]) -> tuple[dict[str, Candidate], str | None]:
        """What is known of them, or why nothing could be asked."""
        asking = asyncio.create_task(self._ask(isbns))
        clock = asyncio.get_running_loop().time
        kept = clock()
        try:
            while not (await asyncio.wait({asking}, timeout=TICK_SECONDS))[0]:
                if settings.server_is_stopping():
                    raise Stopping
                if clock() - kept >= KEEP_SECONDS:
                    kept = clock()
                    await asyncio.to_thread(self.keep)
            # A source that is down is asked once for each batch from then on, until it answers.
            answer = asking.result(), None
            self.patience = catalogues.A_JOB_WAITS
            return answer
        except HTTPException as error:
            self.patience = catalogues.ONCE
            return {}, str(error.detail).rstrip(".")
        finally:
            asking.cancel()
            await asyncio.wait({asking})

    async def _ask(self, isbns: Sequence[str]) -> dict[str, Candidate]:
        if self.has_asked:
            await asyncio.sleep(PAUSE_SECONDS)
        self.has_asked = True
        return await catalogues.by_isbn(isbns, self.patience)


def complete(row: ImportRow, found: Candidate | None, down: str | None) -> None:
    """Make the book of what the row says and of what was found; what the row says wins."""
    source = Source.openlibrary.label
    lacks = {"title", "author"} - row.values.keys()
    if found is None and lacks:
        if down is None:
            row.refuse("isbn", row.values["isbn"], f"is not known to {source}")
        else:
            row.refuse(None, row.values["isbn"], f"could not be looked up: {down}")
        return
    if found is not None:
        fills = {name: getattr(found, name) for name in LOOKED_UP | {"published_date", "language"}}
        if row.values.keys() & {"published_date", "publication_year"}:  # two halves of one thing
            fills["published_date"] = fills["publication_year"] = None
        row.filled = {name for name, value in fills.items() if value is not None} - row.values.keys()
        row.values |= {name: fills[name] for name in row.filled}
    elif down is not None:
        row.problems.append(
            RowIssue("isbn", row.values["isbn"], f"could not be looked up, the book is in as it is: {down}")
        )
    row.book, row.wanted = FileBook.model_validate(row.values, context=CSV_CONTEXT), None
