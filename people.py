"""Users, their logins, and the codes that are mailed to them; next to each table the shapes that go in and out."""

import math
from datetime import datetime
from enum import StrEnum
from typing import Annotated, NamedTuple

import sqlalchemy as sa
from pydantic import AfterValidator, BaseModel, StrictBool, StringConstraints
from pydantic import Field as Limit
from sqlmodel import Field, SQLModel

from values import (
    BlankIsNull,
    Shape,
    Storable,
    Word,
    in_words,
    key_column,
    moment_column,
    stamp_column,
    table_options,
)


class Role(StrEnum):
    reader = "reader"
    librarian = "librarian"
    admin = "admin"


def _no_encoded_word(email: str) -> str:
    # Mail headers would decode it (RFC 2047): one mailbox would have endlessly many addresses.
    if "=?" in email:
        raise ValueError("must not contain =?")
    return email


NAME = in_words(
    r"^[A-Za-z0-9][A-Za-z0-9._-]*$", "must be of the letters A to Z, digits, '.', '_' and '-', a letter or digit first"
)
Username = Annotated[str, StringConstraints(strip_whitespace=True, min_length=2, max_length=50, pattern=NAME)]
# The rule of HTML's <input type=email> (HTML Living Standard, "valid e-mail address"), with a dot in the domain.
# Whether mail arrives there, only mail can tell.
Email = Annotated[
    str,
    StringConstraints(
        strip_whitespace=True,
        to_lower=True,
        max_length=254,
        pattern=in_words(
            r"^[a-zA-Z0-9.!#$%&'*+/=?^_`{|}~-]+@[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
            r"(?:\.[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?)+$",
            "must be an e-mail address, like ada@example.com",
        ),
    ),
    AfterValidator(_no_encoded_word),
]
Password = Annotated[str, StringConstraints(min_length=8, max_length=128), Storable]


class UserCreate(Shape):
    username: Username = Limit(examples=["ada"])
    email: Email = Limit(examples=["ada@example.com"])
    password: Password = Limit(examples=["a long way to Arrakis"])
    full_name: Annotated[Word | None, BlankIsNull] = None


class AccountCreate(UserCreate):
    role: Role = Role.reader


class UserUpdate(Shape):
    """A field that is left out stays; `full_name: null` clears it."""

    email: Email = ""
    full_name: Annotated[Word | None, BlankIsNull] = None


class AccountUpdate(UserUpdate):
    role: Role = Role.reader
    is_active: StrictBool = True


class UserPublic(BaseModel):
    model_config = {"from_attributes": True}

    id: int
    username: str
    email: str
    full_name: str | None
    role: Role
    is_active: bool
    email_verified_at: datetime | None
    created_at: datetime


class User(SQLModel, table=True):
    __tablename__ = "user"
    __table_args__ = table_options(
        sa.CheckConstraint("role IN ('reader', 'librarian', 'admin')", name="role"),
        sa.Index("uq_user_username", sa.text("lower(username)"), unique=True),
    )

    id: int = key_column()
    username: str = Field(max_length=50)
    email: str = Field(max_length=254, unique=True)  # in lower case, see Email
    password_hash: str = Field(max_length=255)
    full_name: str | None = Field(default=None, max_length=100)
    role: str = Field(default=Role.reader, max_length=20)
    is_active: bool = True
    email_verified_at: datetime | None = moment_column()
    created_at: datetime = stamp_column()


class Principal(NamedTuple):
    """Who is asking: the owner of a good access token, and the login that it belongs to."""

    id: int
    username: str
    role: str
    session_id: int
    expires_at: float = math.inf  # of the access token, in seconds since 1970

    @property
    def is_staff(self) -> bool:
        return self.role in (Role.librarian, Role.admin)


class LoginSession(SQLModel, table=True):
    """One login, from its password to its logout. Access tokens name it and live only as long as it does."""

    __tablename__ = "login_session"
    __table_args__ = table_options()

    id: int = key_column()
    user_id: int = Field(foreign_key="user.id", ondelete="CASCADE", index=True)
    refresh_hash: str = Field(max_length=64)  # SHA-256 of the id of the one refresh token that is good now
    previous_hash: str | None = Field(default=None, max_length=64)  # of the one before, for clients that try again
    user_agent: str | None = Field(default=None, max_length=200)
    created_at: datetime = stamp_column()
    last_used_at: datetime = stamp_column()
    expires_at: datetime = stamp_column()
    revoked_at: datetime | None = moment_column()


class SessionPublic(BaseModel):
    id: int
    user_agent: str | None
    created_at: datetime
    last_used_at: datetime
    expires_at: datetime
    current: bool = Limit(description="Whether it is the one that asks.")


class CodePurpose(StrEnum):
    verify_email = "verify_email"
    reset_password = "reset_password"


class OneTimeCode(SQLModel, table=True):
    """A code or link that was mailed, as a hash."""

    __tablename__ = "one_time_code"
    __table_args__ = table_options(
        sa.CheckConstraint("purpose IN ('verify_email', 'reset_password')", name="purpose"),
        sa.CheckConstraint("attempts >= 0", name="attempts"),
    )

    id: int = key_column()
    user_id: int = Field(foreign_key="user.id", ondelete="CASCADE", index=True)
    purpose: str = Field(max_length=20)
    email: str | None = Field(default=None, max_length=254)  # that it was mailed to
    code_hash: str = Field(max_length=64, index=True)
    attempts: int = 0
    expires_at: datetime = stamp_column()
    created_at: datetime = stamp_column()
