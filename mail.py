"""Mail in plain text: by SMTP, or to the log where no server is set."""

import asyncio
import logging
import smtplib
import ssl
from concurrent.futures import ThreadPoolExecutor
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import formatdate, make_msgid, parseaddr
from http import HTTPStatus
from typing import NamedTuple

import database
from settings import settings

log = logging.getLogger("books.mail")

SECONDS_BETWEEN_TRIES = (2, 10, 60)
SMTP_SECONDS = 10  # for each step of the conversation
IMPLICIT_TLS_PORT = 465  # RFC 8314, 3.3
# Threads of their own: a mail server that hangs must not keep readers waiting.
posters = ThreadPoolExecutor(max_workers=4, thread_name_prefix="smtp")


class Email(NamedTuple):
    to: str
    subject: str
    text: str


async def send(letter: Email) -> None:
    """Deliver it, with a few tries. For background tasks: what fails for good is logged, not raised."""
    if settings.smtp_host is None:
        log.warning("SMTP_HOST is not set. Mail to %s: %s\n\n%s", *letter)
        return
    for seconds in (*SECONDS_BETWEEN_TRIES, None):
        try:
            await asyncio.get_running_loop().run_in_executor(posters, _deliver, letter)
            log.info("mailed %r to %s", letter.subject, letter.to)
            return
        except (OSError, ValueError) as error:  # smtplib's own errors are OSErrors; ValueError: no such header
            final = seconds is None or _is_permanent(error)
            log.log(logging.ERROR if final else logging.WARNING, "mail to %s failed: %s", letter.to, error)
            if final or await _stopping_within(seconds or 0):
                return


def _deliver(letter: Email) -> None:
    host, port = settings.smtp_host or "", settings.smtp_port
    context = ssl.create_default_context()
    if settings.smtp_tls and port == IMPLICIT_TLS_PORT:
        server: smtplib.SMTP = smtplib.SMTP_SSL(host, port, timeout=SMTP_SECONDS, context=context)
    else:
        server = smtplib.SMTP(host, port, timeout=SMTP_SECONDS)
    with server:
        if settings.smtp_tls and port != IMPLICIT_TLS_PORT:
            server.starttls(context=context)
        if settings.smtp_username and settings.smtp_password:
            server.login(settings.smtp_username, settings.smtp_password.get_secret_value())
        # Named here, and not read from the headers: those could be decoded into other addresses.
        server.send_message(_message(letter), from_addr=parseaddr(settings.mail_from)[1], to_addrs=[letter.to])


def _message(letter: Email) -> EmailMessage:
    # Lines up to what SMTP takes (RFC 5321, 4.5.3.1.6), so that a link is never broken in two.
    message = EmailMessage(SMTP.clone(max_line_length=998))
    message["From"] = settings.mail_from
    message["To"] = letter.to
    message["Subject"] = letter.subject
    message["Date"] = formatdate()
    message["Message-ID"] = make_msgid(domain=parseaddr(settings.mail_from)[1].rpartition("@")[2])
    message["Auto-Submitted"] = "auto-generated"  # RFC 3834: no out-of-office replies, please
    message.set_content(letter.text)
    return message


def _is_permanent(error: OSError | ValueError) -> bool:
    """Whether the mail server said that it would never take this mail (RFC 5321, 4.2.1)."""
    if isinstance(error, smtplib.SMTPRecipientsRefused):
        return all(code >= HTTPStatus.INTERNAL_SERVER_ERROR for code, _ in error.recipients.values())
    if isinstance(error, smtplib.SMTPResponseException):
        return error.smtp_code >= HTTPStatus.INTERNAL_SERVER_ERROR
    return isinstance(error, ValueError)


async def _stopping_within(seconds: float) -> bool:
    """Wait so long, or until the server is told to stop."""
    until = asyncio.get_running_loop().time() + seconds
    while (left := until - asyncio.get_running_loop().time()) > 0:
        if database.server_is_stopping():
            return True
        await asyncio.sleep(min(left, 0.2))
    return False


# --- what is mailed -----------------------------------------------------------------------------------------------
# No names but the user name, whose letters are bounded: whoever registers chooses what stands here, and the reader
# may be somebody else.


def confirm_address(to: str, username: str, token: str) -> Email:
    return Email(
        to,
        "Confirm your e-mail address",
        f'This address was given for the account "{username}" at Books API.\n'
        "If that was you, open this link within 24 hours to confirm it:\n\n"
        f"{settings.public_url}/auth/verify-email/{token}\n\n"
        "If it was not you, do nothing: nobody can confirm the address without this link.\n",
    )


def reset_code(to: str, username: str, code: str) -> Email:
    return Email(
        to,
        "Your code for a new password",
        f'Somebody asked for a new password for the account "{username}" at Books API\n'
        f"({settings.public_url}). If that was you, this is your code:\n\n"
        f"    {code}\n\n"
        "It is good for 10 minutes, once. Tell it to nobody: we never ask for it.\n"
        "If it was not you, do nothing: your password stays as it is.\n",
    )


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
    where = f"at Books API ({settings.public_url})"
    return Email(to, subject, f"{text}\nThis happened {where}. If it was not you, write to whoever runs it, soon.\n")
