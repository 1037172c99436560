"""Settings that would be unsafe, or can't work, stop the start and say which one it is."""

import pytest
from pydantic import ValidationError

from settings import Settings

LONG_KEY = "k" * 32

REFUSED = {
    "a short key": ({"SECRET_KEY": "short"}, "SECRET_KEY"),
    "a key of blanks": ({"SECRET_KEY": " " * 40}, "SECRET_KEY"),
    "a database in no folder": ({"DATABASE_URL": "sqlite:////nowhere/books.db"}, "DATABASE_URL"),
    "a log in no folder": ({"LOG_FILE": "/nowhere/books.log"}, "LOG_FILE"),
    "a folder for a log": ({"LOG_FILE": "/tmp"}, "LOG_FILE"),
    "the password of development mode with a key": (
        {"SECRET_KEY": LONG_KEY, "ADMIN_PASSWORD": "admin"},
        "ADMIN_PASSWORD",
    ),
    "the name for a password": (
        {"SECRET_KEY": LONG_KEY, "ADMIN_USERNAME": "head-librarian", "ADMIN_PASSWORD": "Head-Librarian"},
        "ADMIN_PASSWORD must not be ADMIN_USERNAME or ADMIN_EMAIL",
    ),
    "the address for a password": (
        {"SECRET_KEY": LONG_KEY, "ADMIN_EMAIL": "Me@example.com", "ADMIN_PASSWORD": "me@example.com"},
        "ADMIN_PASSWORD must not be ADMIN_USERNAME or ADMIN_EMAIL",
    ),
    "a common password": (
        {"SECRET_KEY": LONG_KEY, "ADMIN_PASSWORD": "Password123"},
        "ADMIN_PASSWORD is one of the most common",
    ),
    "a short password": ({"ADMIN_PASSWORD": "1234567"}, "ADMIN_PASSWORD"),
    "a database that vanishes": ({"DATABASE_URL": "sqlite:///:memory:"}, "DATABASE_URL"),
    "a database that nobody knows": ({"DATABASE_URL": "mysql://localhost/books"}, "DATABASE_URL"),
    "tokens that never expire": ({"ACCESS_TOKEN_EXPIRE_MINUTES": "0"}, "access_token_expire_minutes"),
    "an upload limit that is no number": ({"MAX_UPLOAD_MB": "many"}, "max_upload_mb"),
    "a place that is no web address": ({"PUBLIC_URL": "books.example.com"}, "PUBLIC_URL"),
    "a port that can't be": ({"PUBLIC_URL": "https://books.example.com:99999/"}, "PUBLIC_URL"),
    "a mail server with its port": ({"SMTP_HOST": "smtp.example.com:587"}, "SMTP_HOST"),
    "a mail server as a web address": ({"SMTP_HOST": "https://smtp.example.com"}, "SMTP_HOST"),
    "an account there without its password": ({"SMTP_USERNAME": "books"}, "SMTP_USERNAME and SMTP_PASSWORD"),
    "a catalogue that is no web address": ({"GOOGLE_BOOKS_URL": "www.googleapis.com"}, "GOOGLE_BOOKS_URL"),
    "a catalogue with a query": ({"OPEN_LIBRARY_URL": "https://openlibrary.org?x=y"}, "OPEN_LIBRARY_URL"),
    "a harvest of everything": ({"HARVEST_QUERY": "x" * 301}, "harvest_query"),
    "a sender without an address": ({"MAIL_FROM": "Books"}, "MAIL_FROM"),
    "counters that nobody knows": ({"RATE_LIMIT_STORAGE": "memcached://localhost"}, "RATE_LIMIT_STORAGE"),
    "a site without its scheme": ({"CORS_ORIGINS": "books.example.com"}, "CORS_ORIGINS"),
    "a pattern of sites": ({"CORS_ORIGINS": "https://*.example.com"}, "CORS_ORIGINS"),
    "an unknown log level": ({"LOG_LEVEL": "LOUD"}, "log_level"),
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
def test_places_are_taken_as_they_are_written(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert getattr(Settings(_env_file=None), name.lower()) == value


def test_what_is_said_of_a_setting_gives_no_secret_away(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {"SECRET_KEY": "abcdefgh", "ADMIN_PASSWORD": "hunter2hunter2", "DATABASE_URL": "x://p:w@h"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError) as refused:
        Settings(_env_file=None)
    assert not [secret for secret in secrets.values() if secret in str(refused.value)]


def test_an_empty_key_is_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "")
    assert Settings(_env_file=None).development


def test_secrets_are_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", LONG_KEY)
    assert LONG_KEY not in repr(Settings(_env_file=None))
