"""Settings, from environment variables and from `.env` beside this file. `.env.example` explains each of them."""

import re
from email.utils import parseaddr
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

HERE = Path(__file__).resolve().parent
STATIC = HERE / "static"
VERSION = "0.1.0"
# OWASP ASVS 5.0, 6.2.4: at least the 3,000 most common passwords that are long enough.
COMMON_PASSWORDS = frozenset((STATIC / "common_passwords.txt").read_text().splitlines()[1:])


def matches(pattern: str, example: str) -> AfterValidator:
    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(f"must be {example}")
        return value

    return AfterValidator(check)


def check_database_url(url: str) -> str:
    if match := re.fullmatch(r"(?:postgres|postgresql|postgresql\+psycopg)://(.+)", url):
        return f"postgresql+psycopg://{match[1]}"
    if not url.startswith("sqlite:///") or url == "sqlite:///" or ":memory:" in url:
        raise ValueError(
            "must name an SQLite file (sqlite:////absolute/path/books.db) or a PostgreSQL database "
            "(postgresql://user:password@host/name)"
        )
    if not Path(url.removeprefix("sqlite:///")).absolute().parent.is_dir():
        raise ValueError("names an SQLite file in a folder that does not exist")
    return url


def check_web_url(url: str) -> str:
    port = re.match(r"https?://[^/]+:(\d+)(/|$)", url)
    if not re.fullmatch(r"https?://[^\s/?#]+(/[^\s?#]*)?", url) or (port and int(port[1]) > 65535):
        raise ValueError("must be like https://books.example.com")
    return url.rstrip("/")


def check_sender(sender: str) -> str:
    if not re.fullmatch(r"[^@\s]+@[^@\s]+", parseaddr(sender)[1]) or "\n" in sender:
        raise ValueError("must be like Books API <books@example.com>")
    return sender


def check_log_file(path: Path) -> Path:
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError("must be a file in a folder that exists")
    return path


def split_origins(origins: object) -> object:
    return [part.strip().rstrip("/") for part in origins.split(",")] if isinstance(origins, str) else origins


WebUrl = Annotated[str, AfterValidator(check_web_url)]
Origin = Annotated[str, matches(r"\*|https?://[^\s/?#*]+", "like https://books.example.com,http://localhost:3000")]
LimitStorage = Annotated[str, matches(r"(memory|rediss?)://.*", "memory:// or redis://host:6379/0")]
HostName = Annotated[
    str,
    matches(r"(?i)[\w.-]+|[\da-f]*:[\da-f]*:[\da-f:.]*", "a name like smtp.example.com; the port goes into SMTP_PORT"),
]


class Settings(BaseSettings):
    """An unsafe or impossible value stops the start, with an error that names the setting."""

    model_config = SettingsConfigDict(
        alias_generator=str.upper,  # errors name settings as the environment does
        env_file=HERE / ".env",
        env_ignore_empty=True,  # `SECRET_KEY=` means "not set": with an empty key anyone could forge tokens
        extra="ignore",
        validate_assignment=True,
        hide_input_in_errors=True,  # the input holds passwords
    )

    database_url: Annotated[str, AfterValidator(check_database_url)] = f"sqlite:///{HERE / 'books.db'}"
    secret_key: SecretStr | None = None
    admin_username: str = "admin"
    admin_password: SecretStr | None = None
    admin_email: str = "admin@example.com"
    access_token_expire_minutes: Annotated[int, Field(ge=1, le=1440)] = 30
    refresh_token_expire_days: Annotated[int, Field(ge=1, le=365)] = 14
    readers_can_add: bool = True
    public_catalogue: bool = True
    require_verified_email: bool = False
    public_url: WebUrl = "http://localhost:8000"
    smtp_host: HostName | None = None
    smtp_port: Annotated[int, Field(ge=1, le=65535)] = 587
    smtp_username: str | None = None
    smtp_password: SecretStr | None = None
    smtp_tls: bool = True
    mail_from: Annotated[str, AfterValidator(check_sender)] = "Books API <books@localhost>"
    max_upload_mb: Annotated[int, Field(ge=1, le=1024)] = 100
    event_retention: Annotated[int, Field(ge=1, le=100_000_000)] = 100_000
    sample: bool = False
    loan_days: Annotated[int, Field(ge=1, le=365)] = 21
    google_books_url: WebUrl = "https://www.googleapis.com/books/v1"
    google_books_key: SecretStr | None = None
    open_library_url: WebUrl = "https://openlibrary.org"
    covers: bool = True
    covers_url: WebUrl = "https://covers.openlibrary.org"
    harvest_query: Annotated[str, Field(max_length=300)] | None = None
    rate_limits: bool = True
    rate_limit_storage: LimitStorage = "memory://"
    cors_origins: Annotated[tuple[Origin, ...], NoDecode, BeforeValidator(split_origins)] = ()
    log_file: Annotated[Path, AfterValidator(check_log_file)] | None = None
    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(str.upper)] = "INFO"

    @model_validator(mode="after")
    def check_unsafe(self) -> Self:
        password = self.first_password
        if self.secret_key is not None:
            if len(self.secret_key.get_secret_value().strip()) < 32:
                raise ValueError("SECRET_KEY must have at least 32 characters; try: openssl rand -hex 32")
            if password == "admin":
                raise ValueError("ADMIN_PASSWORD must not be 'admin' where SECRET_KEY is set")
            if password and password.lower() in (self.admin_username.strip().lower(), self.admin_email.strip().lower()):
                raise ValueError("ADMIN_PASSWORD must not be ADMIN_USERNAME or ADMIN_EMAIL")
            if password and password.lower() in COMMON_PASSWORDS:
                raise ValueError("ADMIN_PASSWORD is one of the most common passwords: choose another")
        if password not in (None, "admin") and not 8 <= len(password) <= 128:
            raise ValueError("ADMIN_PASSWORD must have 8 to 128 characters")
        if (self.smtp_username is None) != (self.smtp_password is None):
            raise ValueError("SMTP_USERNAME and SMTP_PASSWORD go together")
        return self

    @property
    def first_password(self) -> str | None:
        """The first admin's; in development mode it is `admin` by default."""
        if self.admin_password is not None:
            return self.admin_password.get_secret_value()
        return "admin" if self.secret_key is None else None

    @property
    def makes_admin_admin(self) -> bool:
        """Whether the first account is `admin` / `admin`."""
        return (self.admin_username, self.first_password) == ("admin", "admin")


settings = Settings()
