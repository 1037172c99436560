"""What the service writes down: settings, uploads, events; next to each table the shapes that go out."""

from datetime import datetime
from enum import StrEnum
from typing import Any, Literal

import sqlalchemy as sa
from pydantic import BaseModel
from pydantic import Field as Limit
from sqlmodel import Field, SQLModel

import people  # noqa: F401  # the foreign keys here refer to it
from values import key_column, moment_column, stamp_column, table_options

# --- settings -----------------------------------------------------------------------------------------------------


class Setting(SQLModel, table=True):
    """What a database knows of itself: `book_count`, `event_floor` (ids up to it are not in the log, or no longer),
    `harvest_due` (when the daily job is), `last_…` (when recurring work was done), `probed` (by /health), and in
    development mode `secret_key`, `open_hash` (of the password `admin`) and `last_start` (which was told of)."""

    __tablename__ = "setting"

    key: str = Field(primary_key=True, max_length=50)
    value: str


# --- uploads ------------------------------------------------------------------------------------------------------


class UploadStatus(StrEnum):
    queued = "queued"
    processing = "processing"
    completed = "completed"
    failed = "failed"
    cancelled = "cancelled"


class OnDuplicate(StrEnum):
    skip = "skip"
    update = "update"


class Upload(SQLModel, table=True):
    __tablename__ = "upload"
    __table_args__ = table_options(
        sa.CheckConstraint("status IN ('queued', 'processing', 'completed', 'failed', 'cancelled')", name="status"),
        sa.CheckConstraint("rows = inserted + updated + skipped + failed", name="rows"),
        sa.CheckConstraint("progress BETWEEN 0 AND 1", name="progress"),
    )

    id: int = key_column()
    user_id: int = Field(foreign_key="user.id", ondelete="CASCADE", index=True)
    filename: str = Field(max_length=255)
    size: int
    status: str = Field(default=UploadStatus.queued, max_length=20, index=True)
    rows: int = 0
    inserted: int = 0
    updated: int = 0
    skipped: int = 0
    failed: int = 0
    warnings: int = 0
    progress: float = 0
    ignored_columns: list[str] = Field(default_factory=list, sa_type=sa.JSON, nullable=False)
    error: str | None = None
    shelve: bool = Field(default=False, sa_column_kwargs={"server_default": sa.false()})
    on_duplicate: str = Field(
        default=OnDuplicate.skip, max_length=10, sa_column_kwargs={"server_default": OnDuplicate.skip}
    )
    dry_run: bool = Field(default=False, sa_column_kwargs={"server_default": sa.false()})
    enrich: bool = Field(default=False, sa_column_kwargs={"server_default": sa.false()})
    format: str | None = Field(default=None, max_length=20)
    encoding: str | None = Field(default=None, max_length=20)
    delimiter: str | None = Field(default=None, max_length=1)
    header: list[str] | None = Field(default=None, sa_type=sa.JSON)
    created_at: datetime = stamp_column()
    started_at: datetime | None = moment_column()
    finished_at: datetime | None = moment_column()
    worker: str | None = Field(default=None, max_length=20)  # the job that is at it
    lease_until: datetime | None = moment_column()  # while a worker is at it; an old one means that it died


class UploadChunk(SQLModel, table=True):
    """A piece of the file as it came, so that it outlives the request and the process."""

    __tablename__ = "upload_chunk"

    upload_id: int = Field(foreign_key="upload.id", ondelete="CASCADE", primary_key=True)
    number: int = Field(primary_key=True)
    data: bytes


class UploadError(SQLModel, table=True):
    __tablename__ = "upload_error"
    __table_args__ = table_options(sa.CheckConstraint("severity IN ('error', 'warning')", name="severity"))

    id: int = key_column()
    upload_id: int = Field(foreign_key="upload.id", ondelete="CASCADE", index=True)
    row: int
    severity: str = Field(max_length=10)
    field: str | None = Field(default=None, max_length=100)
    value: str | None = None
    message: str
    cells: list[str] | None = Field(default=None, sa_type=sa.JSON)  # of a refused row, to be given back


class UploadPublic(BaseModel):
    model_config = {"from_attributes": True}

    id: int
    filename: str
    status: UploadStatus
    rows: int = Limit(description="Each is in exactly one of inserted, updated, skipped and failed.")
    inserted: int
    updated: int
    skipped: int
    failed: int
    warnings: int = Limit(description="Rows that went in without one bad value.")
    progress: float = Limit(description="From 0 to 1, by the bytes of the file.")
    ignored_columns: list[str] = Limit(description="Columns that the catalogue does not know.")
    shelve: bool = Limit(description="Whether the books go on your shelf, too.")
    on_duplicate: OnDuplicate
    dry_run: bool = Limit(description="Whether it only counts and explains.")
    enrich: bool = Limit(description="Whether Open Library fills in what the file does not say.")
    format: str | None = Limit(description="What was found: `books`, `books-api`, `goodreads` or `storygraph`.")
    encoding: str | None = Limit(description="What was found.", examples=["utf-8"])
    delimiter: str | None = Limit(description="What was found.", examples=[","])
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    error: str | None = Limit(description="Why the upload as a whole failed.")


class UploadErrorPublic(BaseModel):
    model_config = {"from_attributes": True}

    row: int = Limit(description="As a spreadsheet counts: the header is row 1.")
    severity: Literal["error", "warning"]
    field: str | None
    value: str | None
    message: str


# --- events -------------------------------------------------------------------------------------------------------


class Event(SQLModel, table=True):
    """One committed change. The ids of one database only ever grow; the first is the time of its making in ms."""

    __tablename__ = "event"
    __table_args__ = table_options()

    id: int = Field(
        default=None,
        primary_key=True,
        sa_type=sa.BigInteger().with_variant(sa.Integer, "sqlite"),
    )
    at: datetime = stamp_column()
    type: str = Field(max_length=50)
    private: bool = False
    user_id: int | None = Field(default=None, foreign_key="user.id", ondelete="CASCADE", index=True)
    data: dict[str, Any] = Field(sa_type=sa.JSON, nullable=False)


class EventPublic(BaseModel):
    model_config = {"from_attributes": True}

    id: int
    at: datetime
    type: str
    data: dict[str, Any]
