"""Plain-text e-mail: sent by SMTP, or logged if no server is configured."""

import asyncio
import functools
import logging
import smtplib
import ssl
from concurrent.futures import ThreadPoolExecutor
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import formatdate, make_msgid, parseaddr
from typing import NamedTuple

import database
from settings import settings

log = logging.getLogger("books.mail")

RETRY_DELAYS = (2, 10, 60)  # seconds
SMTP_TIMEOUT = 10  # seconds, for each step of the dialogue
IMPLICIT_TLS_PORT = 465  # RFC 8314, 3.3
# Threads of its own: a mail server that hangs must not block readers.
smtp_threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="smtp")


class Email(NamedTuple):
    to: str
    subject: str
    text: str


async def send(email: Email) -> None:
    """Deliver it, with retries. For background tasks: the final failure is logged, not raised."""
    if settings.smtp_host is None:
        log.warning("SMTP_HOST is not set. Mail to %s: %s\n\n%s", *email)
        return
    loop = asyncio.get_running_loop()
    for delay in (*RETRY_DELAYS, None):
        try:
            await loop.run_in_executor(smtp_threads, _deliver, email)
            log.info("mailed %r to %s", email.subject, email.to)
            return
        except (OSError, ValueError) as error:  # smtplib's errors are OSErrors; ValueError: an invalid header
            if delay is None or _is_permanent(error):
                log.error("mail to %s failed: %s", email.to, error)
                return
            log.warning("mail to %s failed, next try in %s s: %s", email.to, delay, error)
        retry_at = loop.time() + delay
        while (left := retry_at - loop.time()) > 0:
            if database.server_is_stopping():
                return
            await asyncio.sleep(min(left, 0.2))


def _deliver(email: Email) -> None:
    context = ssl.create_default_context()
    is_implicit = settings.smtp_tls and settings.smtp_port == IMPLICIT_TLS_PORT
    connect = functools.partial(smtplib.SMTP_SSL, context=context) if is_implicit else smtplib.SMTP
    with connect(settings.smtp_host or "", settings.smtp_port, timeout=SMTP_TIMEOUT) as server:
        if settings.smtp_tls and not is_implicit:
            server.starttls(context=context)
        if settings.smtp_username and settings.smtp_password:
            server.login(settings.smtp_username, settings.smtp_password.get_secret_value())
        # Explicit addresses: those in the headers could be decoded into others.
        server.send_message(_message(email), from_addr=parseaddr(settings.mail_from)[1], to_addrs=[email.to])


def _message(email: Email) -> EmailMessage:
    # The longest lines that SMTP takes (RFC 5321, 4.5.3.1.6), so that links are not broken.
    message = EmailMessage(SMTP.clone(max_line_length=998))
    message["From"] = settings.mail_from
    message["To"] = email.to
    message["Subject"] = email.subject
    message["Date"] = formatdate()
    message["Message-ID"] = make_msgid(domain=parseaddr(settings.mail_from)[1].rpartition("@")[2])
    message["Auto-Submitted"] = "auto-generated"  # RFC 3834: prevents out-of-office replies
    message.set_content(email.text)
    return message


def _is_permanent(error: OSError | ValueError) -> bool:
    """Whether a retry can't succeed. SMTP replies from 500 on are permanent (RFC 5321, 4.2.1)."""
    if isinstance(error, smtplib.SMTPRecipientsRefused):
        return all(code >= 500 for code, _ in error.recipients.values())
    return isinstance(error, ValueError) or getattr(error, "smtp_code", 0) >= 500


# --- texts --------------------------------------------------------------------------------------------------------
# The only name in them is the username, whose characters are restricted: it is chosen at registration, and the
# recipient may be somebody else.


def confirm_address(to: str, username: str, token: str) -> Email:
    text = (
        f'This address was given for the account "{username}" at Books API.\n'
        "If that was you, open this link within 24 hours to confirm it:\n\n"
        f"{settings.public_url}/auth/verify-email/{token}\n\n"
        "If it was not you, do nothing: nobody can confirm the address without this link.\n"
    )
    return Email(to, "Confirm your e-mail address", text)


def reset_code(to: str, username: str, code: str) -> Email:
    text = (
        f'A new password was requested for the account "{username}" at Books API\n'
        f"({settings.public_url}). If that was you, this is your code:\n\n"
        f"    {code}\n\n"
        "It is valid for 10 minutes and can be used once. Do not share it: we never ask for it.\n"
        "If it was not you, do nothing: your password stays as it is.\n"
    )
    return Email(to, "Your code for a new password", text)


def password_changed(to: str, username: str) -> Email:
    return _notice(to, "Your password was changed", f'The password of the account "{username}" was changed.')


def address_change_requested(to: str, username: str, new: str) -> Email:
    text = (
        f'A new e-mail address was given for the account "{username}": {new}.\n'
        "It takes effect when it is confirmed. A new password cancels the change."
    )
    return _notice(to, "A new e-mail address for your account", text)


def address_changed(to: str, username: str, new: str) -> Email:
    text = f'The e-mail address of the account "{username}" was changed to {new} by an admin.'
    return _notice(to, "Your e-mail address was changed", text)


def account_deleted(to: str, username: str) -> Email:
    text = f'The account "{username}" was deleted, with its shelf and reviews.'
    return _notice(to, "Your account was deleted", text)


def _notice(to: str, subject: str, text: str) -> Email:
    site = f"Books API ({settings.public_url})"
    return Email(to, subject, f"{text}\nThis happened at {site}. If it was not you, contact its operator soon.\n")
