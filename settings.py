"""Every setting of the service: read from the environment, then from `.env` beside this file."""

import re
from email.utils import parseaddr
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, SecretStr, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

HERE = Path(__file__).resolve().parent
STATIC = HERE / "static"
VERSION = "0.1.0"
PORT_MAX = 65535
# As OWASP's ASVS 5.0 asks (6.2.4): at least the 3,000 most common ones that are long enough.
COMMON_PASSWORDS = frozenset((HERE / "common_passwords.txt").read_text().splitlines()[1:])


class Settings(BaseSettings):
    """Unsafe or impossible values stop the start with a message that names the setting."""

    # An empty variable (`SECRET_KEY=` in a copied .env.example) means "not set", never "set to nothing":
    # an empty signing key would let anyone forge tokens.
    model_config = SettingsConfigDict(
        env_file=HERE / ".env",
        env_ignore_empty=True,
        extra="ignore",
        validate_assignment=True,
        hide_input_in_errors=True,  # there are passwords in it
    )

    database_url: str = Field(
        default=f"sqlite:///{HERE / 'books.db'}",
        description="Where the data lives: the SQLite file beside `main.py` unless set; `postgresql://…` for more "
        "than one machine.",
    )
    secret_key: SecretStr | None = Field(
        default=None,
        description="Signs tokens; at least 32 characters. Unset: development mode, with a random key kept in "
        "the database and the account `admin` / `admin`.",
    )
    admin_username: str = Field(default="admin", description="User name of the account made on the first start.")
    admin_password: SecretStr | None = Field(
        default=None, description="Its password. With `SECRET_KEY` set and this unset, no account is made."
    )
    admin_email: str = Field(default="admin@example.com", description="Its e-mail address.")
    access_token_expire_minutes: Annotated[int, Field(ge=1, le=1440)] = Field(
        default=30, description="How long an access token is good for, in minutes."
    )
    refresh_token_expire_days: Annotated[int, Field(ge=1, le=365)] = Field(
        default=14, description="How long a login lasts without being used, in days."
    )
    readers_can_add: bool = Field(
        default=True, description="Whether readers may add books and upload CSV files; `false` leaves that to staff."
    )
    require_verified_email: bool = Field(
        default=False, description="Whether an e-mail address must be confirmed before its account can sign in."
    )
    public_url: str = Field(
        default="http://localhost:8000", description="Where people reach the service: what links in mails begin with."
    )
    smtp_host: str | None = Field(default=None, description="The mail server. Unset: mails are written to the log.")
    smtp_port: Annotated[int, Field(ge=1, le=PORT_MAX)] = Field(default=587, description="Its port.")
    smtp_username: str | None = Field(default=None, description="The account there, if it wants one.")
    smtp_password: SecretStr | None = Field(default=None, description="Its password.")
    smtp_tls: bool = Field(
        default=True, description="Whether to insist on TLS: from the first byte on port 465, else by STARTTLS."
    )
    mail_from: str = Field(default="Books API <books@localhost>", description="The sender of mails.")
    max_upload_mb: Annotated[int, Field(ge=1, le=1024)] = Field(
        default=100, description="The largest file taken by an upload, in MiB; a larger one gets 413."
    )
    event_retention: Annotated[int, Field(ge=1, le=100_000_000)] = Field(
        default=100_000, description="How many changes the log keeps; who was away for longer reads its lists anew."
    )
    loan_days: Annotated[int, Field(ge=1, le=365)] = Field(
        default=21, description="How long a loan lasts, and each renewal adds, in days."
    )
    google_books_url: str = Field(
        default="https://www.googleapis.com/books/v1", description="Where the interface of Google Books begins."
    )
    google_books_key: SecretStr | None = Field(
        default=None, description="A key of its own is asked more often; without one Google Books soon answers 429."
    )
    open_library_url: str = Field(
        default="https://openlibrary.org", description="Where the interface of Open Library begins."
    )
    harvest_query: Annotated[str, Field(max_length=300)] | None = Field(
        default=None, description="What to ask Google Books for once a day, to add what is new. Unset: nothing."
    )
    rate_limits: bool = Field(
        default=True, description="Whether logins, registrations and the like are limited, see the README."
    )
    rate_limit_storage: str = Field(
        default="memory://", description="Where attempts are counted; `redis://host:6379/0` for several processes."
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), description="Web sites whose pages may call the service, separated by commas; `*` for any."
    )
    log_file: Path | None = Field(
        default=None, description="A file to log to besides the console; kept under 10 MB, with five older ones."
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="The least level that is logged. `WARNING` silences the line per request."
    )

    @field_validator("database_url")
    @classmethod
    def _database(cls, url: str) -> str:
        if match := re.fullmatch(r"(?:postgres|postgresql|postgresql\+psycopg)://(.+)", url):
            return f"postgresql+psycopg://{match[1]}"
        if not url.startswith("sqlite:///") or url == "sqlite:///" or ":memory:" in url:
            raise ValueError(
                "DATABASE_URL must name an SQLite file (sqlite:////absolute/path/books.db) or a PostgreSQL database "
                "(postgresql://user:password@host/name)"
            )
        if not Path(url.removeprefix("sqlite:///")).absolute().parent.is_dir():
            raise ValueError("DATABASE_URL names an SQLite file in a folder that does not exist")
        return url

    @field_validator("log_file")
    @classmethod
    def _can_be_written(cls, path: Path | None) -> Path | None:
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise ValueError("LOG_FILE must be a file in a folder that exists")
        return path

    @field_validator("public_url", "google_books_url", "open_library_url")
    @classmethod
    def _web_address(cls, url: str, info: ValidationInfo) -> str:
        port = re.search(r"^https?://[^/]+:(\d+)(/|$)", url)
        if not re.fullmatch(r"https?://[^\s/?#]+(/[^\s?#]*)?", url) or (port and int(port[1]) > PORT_MAX):
            raise ValueError(f"{(info.field_name or '').upper()} must be like https://books.example.com")
        return url.rstrip("/")

    @field_validator("smtp_host")
    @classmethod
    def _host(cls, host: str | None) -> str | None:
        if host is not None and not re.fullmatch(r"[\w.-]+|[\da-fA-F]*:[\da-fA-F]*:[\da-fA-F:.]*", host):
            raise ValueError("SMTP_HOST must be a name like smtp.example.com; the port goes into SMTP_PORT")
        return host

    @field_validator("mail_from")
    @classmethod
    def _sender(cls, sender: str) -> str:
        if not re.fullmatch(r"[^@\s]+@[^@\s]+", parseaddr(sender)[1]) or "\n" in sender:
            raise ValueError("MAIL_FROM must be like Books API <books@example.com>")
        return sender

    @field_validator("rate_limit_storage")
    @classmethod
    def _counters(cls, url: str) -> str:
        if not url.startswith(("memory://", "redis://", "rediss://")):
            raise ValueError("RATE_LIMIT_STORAGE must be memory:// or redis://host:6379/0")
        return url

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _origins(cls, origins: object) -> object:
        return [part.strip().rstrip("/") for part in origins.split(",")] if isinstance(origins, str) else origins

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not re.fullmatch(r"https?://[^\s/?#*]+", origin):
                raise ValueError("CORS_ORIGINS must be like https://books.example.com,http://localhost:3000")
        return origins

    @field_validator("log_level", mode="before")
    @classmethod
    def _upper(cls, level: str) -> str:
        return level.upper()

    @model_validator(mode="after")
    def _refuse_unsafe(self) -> Self:
        if self.secret_key is not None:
            if len(self.secret_key.get_secret_value().strip()) < 32:
                raise ValueError("SECRET_KEY must have at least 32 characters; try: openssl rand -hex 32")
            if self.admin_password is not None and self.admin_password.get_secret_value() == "admin":
                raise ValueError("ADMIN_PASSWORD must not be 'admin' where SECRET_KEY is set")
            self._refuse_a_first_guess()
        if self.admin_password is not None and not (
            self.admin_password.get_secret_value() == "admin" or 8 <= len(self.admin_password.get_secret_value()) <= 128
        ):
            raise ValueError("ADMIN_PASSWORD must have 8 to 128 characters")
        if (self.smtp_username is None) != (self.smtp_password is None):
            raise ValueError("SMTP_USERNAME and SMTP_PASSWORD go together")
        return self

    def _refuse_a_first_guess(self) -> None:
        password = self.admin_password.get_secret_value().lower() if self.admin_password else None
        if password in (self.admin_username.strip().lower(), self.admin_email.strip().lower()):
            raise ValueError("ADMIN_PASSWORD must not be ADMIN_USERNAME or ADMIN_EMAIL")
        if password in COMMON_PASSWORDS:
            raise ValueError("ADMIN_PASSWORD is one of the most common passwords: choose another")

    @property
    def development(self) -> bool:
        return self.secret_key is None

    @property
    def makes_admin_admin(self) -> bool:
        """Whether the first account is `admin` / `admin`."""
        given = self.admin_password.get_secret_value() if self.admin_password else "admin"
        return self.development and (self.admin_username, given) == ("admin", "admin")


settings = Settings()
