"""Unsafe or impossible settings stop the start, with an error that names the setting."""

import pytest
from pydantic import ValidationError

from settings import Settings

LONG_KEY = "k" * 32

REFUSED = {
    "short key": ({"SECRET_KEY": "short"}, "SECRET_KEY"),
    "blank key": ({"SECRET_KEY": " " * 40}, "SECRET_KEY"),
    "database in a missing folder": ({"DATABASE_URL": "sqlite:////nowhere/books.db"}, "DATABASE_URL"),
    "log file in a missing folder": ({"LOG_FILE": "/nowhere/books.log"}, "LOG_FILE"),
    "log file is a folder": ({"LOG_FILE": "/tmp"}, "LOG_FILE"),
    "password of development mode with a key": (
        {"SECRET_KEY": LONG_KEY, "ADMIN_PASSWORD": "admin"},
        "ADMIN_PASSWORD",
    ),
    "password equal to the user name": (
        {"SECRET_KEY": LONG_KEY, "ADMIN_USERNAME": "head-librarian", "ADMIN_PASSWORD": "Head-Librarian"},
        "ADMIN_PASSWORD must not be ADMIN_USERNAME or ADMIN_EMAIL",
    ),
    "password equal to the e-mail address": (
        {"SECRET_KEY": LONG_KEY, "ADMIN_EMAIL": "Me@example.com", "ADMIN_PASSWORD": "me@example.com"},
        "ADMIN_PASSWORD must not be ADMIN_USERNAME or ADMIN_EMAIL",
    ),
    "common password": (
        {"SECRET_KEY": LONG_KEY, "ADMIN_PASSWORD": "Password123"},
        "ADMIN_PASSWORD is one of the most common",
    ),
    "short password": ({"ADMIN_PASSWORD": "1234567"}, "ADMIN_PASSWORD"),
    "in-memory database": ({"DATABASE_URL": "sqlite:///:memory:"}, "DATABASE_URL"),
    "unsupported database": ({"DATABASE_URL": "mysql://localhost/books"}, "DATABASE_URL"),
    "token lifetime of zero": ({"ACCESS_TOKEN_EXPIRE_MINUTES": "0"}, "ACCESS_TOKEN_EXPIRE_MINUTES"),
    "upload limit is not a number": ({"MAX_UPLOAD_MB": "many"}, "MAX_UPLOAD_MB"),
    "public URL without a scheme": ({"PUBLIC_URL": "books.example.com"}, "PUBLIC_URL"),
    "port out of range": ({"PUBLIC_URL": "https://books.example.com:99999/"}, "PUBLIC_URL"),
    "mail server with a port": ({"SMTP_HOST": "smtp.example.com:587"}, "SMTP_HOST"),
    "mail server with a scheme": ({"SMTP_HOST": "https://smtp.example.com"}, "SMTP_HOST"),
    "mail account without a password": ({"SMTP_USERNAME": "books"}, "SMTP_USERNAME and SMTP_PASSWORD"),
    "Google Books URL without a scheme": ({"GOOGLE_BOOKS_URL": "www.googleapis.com"}, "GOOGLE_BOOKS_URL"),
    "Open Library URL with a query": ({"OPEN_LIBRARY_URL": "https://openlibrary.org?x=y"}, "OPEN_LIBRARY_URL"),
    "harvest query too long": ({"HARVEST_QUERY": "x" * 301}, "HARVEST_QUERY"),
    "sender without an address": ({"MAIL_FROM": "Books"}, "MAIL_FROM"),
    "unsupported rate limit storage": ({"RATE_LIMIT_STORAGE": "memcached://localhost"}, "RATE_LIMIT_STORAGE"),
    "CORS origin without a scheme": ({"CORS_ORIGINS": "books.example.com"}, "CORS_ORIGINS"),
    "CORS origin with a wildcard": ({"CORS_ORIGINS": "https://*.example.com"}, "CORS_ORIGINS"),
    "unknown log level": ({"LOG_LEVEL": "LOUD"}, "LOG_LEVEL"),
}


@pytest.mark.parametrize(("environment", "named"), REFUSED.values(), ids=REFUSED)
def test_unsafe_settings_are_refused(environment: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError, match=named):
        Settings(_env_file=None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PUBLIC_URL", "https://books.example.com:8443/books"),
        ("PUBLIC_URL", "http://[::1]:8000"),
        ("SMTP_HOST", "smtp.example.com"),
        ("SMTP_HOST", "::1"),
        ("SMTP_HOST", "mail_server"),
    ],
)
def test_valid_addresses_are_accepted_unchanged(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert getattr(Settings(_env_file=None), name.lower()) == value


def test_errors_contain_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {"SECRET_KEY": "abcdefgh", "ADMIN_PASSWORD": "hunter2hunter2", "DATABASE_URL": "x://p:w@h"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError) as error:
        Settings(_env_file=None)
    assert not [secret for secret in secrets.values() if secret in str(error.value)]


def test_an_empty_key_means_development_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "")
    assert Settings(_env_file=None).secret_key is None


def test_repr_contains_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", LONG_KEY)
    assert LONG_KEY not in repr(Settings(_env_file=None))
