"""E-mail to a real SMTP server: aiosmtpd, of tests/requirements.txt."""

import asyncio
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import default
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult, Envelope, LoginPassword
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

import accounts
from accounts import Email
from settings import settings
from tests.fixtures import PASSWORD, Person, Server, code_in, free_port, sign_up, token_in, wait_for

pytestmark = pytest.mark.slow


class Inbox:
    """Handler of the SMTP server: stores messages, after replying with `refusals`."""

    def __init__(self) -> None:
        self.messages: list[EmailMessage] = []
        self.refusals: list[str] = []
        self.accounts: list[tuple[str, str]] = []
        self.attempts = self.port = 0

    async def handle_DATA(self, _server: Any, session: Any, envelope: Envelope) -> str:  # noqa: N802  # aiosmtpd's name
        self.attempts += 1
        if self.refusals:
            return self.refusals.pop(0)
        assert isinstance(envelope.content, bytes)
        message = message_from_bytes(envelope.content, policy=default)
        message["X-TLS"] = "yes" if session.ssl else "no"
        self.messages.append(message)
        return "250 OK"

    def authenticate(self, _server: Any, _session: Any, _envelope: Any, _mechanism: Any, data: Any) -> AuthResult:
        assert isinstance(data, LoginPassword)
        self.accounts.append((data.login.decode(), data.password.decode()))
        return AuthResult(success=True)

    def email(self, number: int) -> Email:
        message = wait_for(lambda: self.messages[number] if len(self.messages) > number else None)
        return Email(message["To"], message["Subject"], message.get_content())


@pytest.fixture
def inbox() -> Iterator[Inbox]:
    inbox = Inbox()
    with listening(inbox) as inbox.port:
        yield inbox


@contextmanager
def listening(inbox: Inbox, **options: Any) -> Iterator[int]:
    """Run an SMTP server; yields its port."""
    port = free_port()
    controller = Controller(inbox, hostname="127.0.0.1", port=port, **options)
    controller.start()
    try:
        yield port
    finally:
        controller.stop()


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A self-signed certificate for localhost, with its key."""
    key = rsa.generate_private_key(65537, 2048)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(datetime.now(UTC) - timedelta(days=1))
        .not_valid_after(datetime.now(UTC) + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = tmp_path / "mail.pem"
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    file.write_bytes(certificate.public_bytes(pem) + private)
    return file


def test_each_email_arrives(serve: Callable[..., Server], inbox: Inbox) -> None:
    port = str(inbox.port)
    server = serve(
        SMTP_HOST="127.0.0.1",
        SMTP_PORT=port,
        SMTP_TLS="false",
        MAIL_FROM="Our books <books@example.com>",
        PUBLIC_URL="https://books.example.com/",
    )
    rita = sign_up(server.client, "rita")
    link = inbox.email(0)
    assert (link.to, link.subject) == ("rita@example.com", "Confirm your e-mail address")
    assert "https://books.example.com/auth/verify-email/" in link.text
    assert server.client.get(f"/auth/verify-email/{token_in(link)}").status_code == 200

    server.client.post("/auth/forgot-password", json={"email": "rita@example.com"})
    body = {"email": "rita@example.com", "otp": code_in(inbox.email(1)), "new_password": "another horse"}
    assert server.client.post("/auth/reset-password", json=body).status_code == 204
    assert inbox.email(2).subject == "Your password was changed"

    rita = Person(server.client, "rita", "another horse")
    rita.post("/auth/change-password", json={"current_password": "another horse", "new_password": PASSWORD})
    assert inbox.email(3).subject == "Your password was changed"
    assert rita.patch("/users/me", json={"email": "new@example.com", "current_password": PASSWORD}).status_code == 200
    assert inbox.email(4)[:2] == ("rita@example.com", "A new e-mail address for your account")
    link = inbox.email(5)
    assert (link.to, link.subject) == ("new@example.com", "Confirm your e-mail address")
    assert server.client.post(f"/auth/verify-email/{token_in(link)}").json()["email"] == "new@example.com"
    assert rita.delete("/users/me", json={"password": PASSWORD}).status_code == 204
    assert inbox.email(6)[:2] == ("new@example.com", "Your account was deleted")
    for message in inbox.messages:
        assert message["From"] == "Our books <books@example.com>"
        assert message["Auto-Submitted"] == "auto-generated"
        assert message["Message-ID"].endswith("@example.com>")
        assert message["Date"]
        assert message["Content-Transfer-Encoding"] == "7bit", "links are not wrapped in the source"
    assert "another horse" not in server.log.read_text()
    assert token_in(link) not in server.log.read_text()


def test_smtp_uses_tls_and_a_login(serve: Callable[..., Server], certificate: Path) -> None:
    inbox = Inbox()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with listening(inbox, tls_context=context, authenticator=inbox.authenticate, auth_required=True) as port:
        options = {"SMTP_HOST": "localhost", "SMTP_PORT": str(port), "SSL_CERT_FILE": str(certificate)}
        server = serve(**options, SMTP_USERNAME="books", SMTP_PASSWORD="a secret")
        sign_up(server.client, "rita")
        inbox.email(0)
        assert inbox.messages[0]["X-TLS"] == "yes"
        assert inbox.accounts == [("books", "a secret")]
        assert "a secret" not in server.log.read_text()


@pytest.mark.parametrize("fault", ["no TLS", "untrusted certificate"])
def test_nothing_is_sent_without_verified_tls(serve: Callable[..., Server], certificate: Path, fault: str) -> None:
    inbox = Inbox()
    context = None
    if fault == "untrusted certificate":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
    with listening(inbox, tls_context=context) as port:
        server = serve(SMTP_HOST="localhost", SMTP_PORT=str(port))
        sign_up(server.client, "rita")
        wait_for(lambda: "mail to rita@example.com failed" in server.log.read_text() or None)
        assert inbox.messages == []


def test_temporary_failures_are_retried(inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    send(inbox, monkeypatch, ["451 try later", "421 busy"])
    assert (inbox.attempts, len(inbox.messages)) == (3, 1)


def test_retries_are_limited(inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    send(inbox, monkeypatch, ["451 try later"] * 9)
    assert (inbox.attempts, len(inbox.messages)) == (4, 0)


def test_permanent_failures_are_not_retried(inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    send(inbox, monkeypatch, ["550 no such user"])
    assert (inbox.attempts, len(inbox.messages)) == (1, 0)


def send(inbox: Inbox, monkeypatch: pytest.MonkeyPatch, refusals: list[str]) -> None:
    monkeypatch.setattr(settings, "smtp_host", "127.0.0.1")
    monkeypatch.setattr(settings, "smtp_port", inbox.port)
    monkeypatch.setattr(settings, "smtp_tls", False)
    monkeypatch.setattr(accounts, "RETRY_DELAYS", (0.01, 0.01, 0.01))
    inbox.refusals = refusals
    asyncio.run(accounts.send(Email("rita@example.com", "Subject", "Text")))


def test_sigterm_does_not_wait_for_retries(serve: Callable[..., Server]) -> None:
    server = serve(SMTP_HOST="127.0.0.1", SMTP_PORT="9", SMTP_TLS="false")
    sign_up(server.client, "rita")
    wait_for(lambda: "mail to rita@example.com failed" in server.log.read_text() or None)
    assert server.stop() < 5
