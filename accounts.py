"""Accounts: registration, confirming an e-mail address, passwords; plain-text mail by SMTP, or logged without it."""

import asyncio
import functools
import html
import logging
import secrets
import smtplib
import ssl
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import formatdate, make_msgid, parseaddr
from typing import Annotated, Any, NamedTuple

import sqlalchemy as sa
from fastapi import BackgroundTasks, HTTPException, Path, Request, Response
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, Field
from sqlalchemy import ColumnElement
from sqlmodel import Session, col

import database
import models
import security
from api import MAX_ACCOUNT_BODY, Router, errors, or_404
from auth import ENDS_SESSION, end_sessions
from events import record_account_event
from models import CodePurpose, InvalidField, LoginSession, OneTimeCode, Principal, Role, User
from pagination import json_response
from schemas import EmailAddress, Password, RequestModel, Storable, UserCreate, UserPublic, pattern
from security import CurrentUser, authorized, unauthorized
from settings import STATIC, settings

router = Router(tags=["Accounts"], max_body_size=MAX_ACCOUNT_BODY)
log = logging.getLogger("books.mail")

# --- mail ---------------------------------------------------------------------------------------------------------

RETRY_DELAYS = (2, 10, 60)  # seconds
SMTP_TIMEOUT = 10  # seconds, for each step of the dialogue
IMPLICIT_TLS_PORT = 465  # RFC 8314, 3.3
MAILS = tomllib.loads((STATIC / "mails.toml").read_text("utf-8"))
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


def compose(kind: str, to: str, **values: str) -> Email:
    """A mail of static/mails.toml."""
    return Email(to, MAILS[kind]["subject"], MAILS[kind]["text"].format(**values, site=settings.public_url))


# --- registration -------------------------------------------------------------------------------------------------


@router.post("/auth/register", status_code=201, responses=errors(409, 429, sends={201: "Location"}))
async def register(new: UserCreate, request: Request, response: Response, tasks: BackgroundTasks) -> UserPublic:
    """Sign up. The account has the role reader; a link that confirms its address is mailed.

    User names and e-mail addresses are unique whatever their case; 409 names the one that is taken.
    """
    await security.check_rate_limit("register", request, new.email)
    response.headers["Location"] = "/users/me"
    return await create_account(new, Role.reader, tasks, by=None)


async def create_account(new: UserCreate, role: Role, tasks: BackgroundTasks, by: Principal | None) -> UserPublic:
    security.check_password_strength("password", new.password, new.username, new.email)
    password_hash = await security.hash_password(new.password)
    return await database.write(insert_account, new, password_hash, role, tasks, by)


@authorized
def insert_account(
    session: Session, new: UserCreate, password_hash: str, role: Role, tasks: BackgroundTasks, by: Principal | None
) -> UserPublic:
    fields = new.model_dump(exclude={"password", "role"}) | {"email": "new"}
    user = User(**fields, password_hash=password_hash, role=role)
    session.add(user)
    session.flush()  # where both are taken, every database must report the user name: it tells nothing of the address
    user.email = new.email
    session.flush()
    record_account_event(session, user.id, "created", username=user.username, role=role, by=by.id if by else user.id)
    tasks.add_task(send, confirmation_email(session, user, user.email))
    return UserPublic.model_validate(user)


# --- confirming an address ----------------------------------------------------------------------------------------

LINK_LIFETIME = timedelta(hours=24)
MAX_CODE_ATTEMPTS = 5
IS_LINK = col(OneTimeCode.purpose) == CodePurpose.verify_email
IS_RESET = col(OneTimeCode.purpose) == CodePurpose.reset_password
PAGE = (STATIC / "confirm.html").read_text("utf-8")
LINK_RESPONSES = errors(404, 409) | {200: {"content": {"text/html": {"schema": {"type": "string"}}}}}
LinkToken = Annotated[str, Path(max_length=100, examples=["kJ3vYd0Tn1xQ"]), Storable]


class Confirmed(BaseModel):
    email: str
    email_verified_at: datetime


class Notice(BaseModel):
    detail: str


def confirmation_email(session: Session, user: User, address: str) -> Email:
    """A mail to this address with a new link that confirms it. Earlier links stay valid."""
    token = secrets.token_urlsafe(24)
    add_code(session, CodePurpose.verify_email, user.id, address, LINK_LIFETIME, token)
    return compose("confirm", address, username=user.username, token=token)


def add_code(
    session: Session, purpose: CodePurpose, user_id: int, address: str, lifetime: timedelta, *secret: object
) -> None:
    code_hash, expires_at = security.hmac_hash(purpose, *secret), models.utcnow() + lifetime
    session.add(
        OneTimeCode(user_id=user_id, purpose=purpose, email=address, code_hash=code_hash, expires_at=expires_at)
    )


@router.get("/auth/verify-email/{token}", response_model=Confirmed, responses=LINK_RESPONSES | errors(507))
async def verify_email(token: LinkToken, request: Request) -> Response:
    """Open the page whose button confirms an address: mail scanners that follow links confirm nothing.

    A request that accepts `application/json`, and no HTML, confirms it at once.
    """
    accepted = accepted_types(request)
    if "application/json" in accepted and "text/html" not in accepted:
        return await confirm_email(token, request)
    button = '<form method="post"><p><button class="strong">Confirm my address</button></p></form>'
    return HTMLResponse(PAGE.format(heading="Confirm your e-mail address", content=button))


@router.post("/auth/verify-email/{token}", response_model=Confirmed, responses=LINK_RESPONSES)
async def confirm_email(token: LinkToken, request: Request) -> Response:
    """Confirm an address with the link that was mailed there. The link works once, for 24 hours."""
    confirmed = await database.write(confirm_address, token)
    if "text/html" not in accepted_types(request):
        return json_response(confirmed.model_dump_json())
    text = f"<p>The address {html.escape(confirmed.email)} is confirmed.</p>"
    return HTMLResponse(PAGE.format(heading="Your e-mail address is confirmed", content=text))


def accepted_types(request: Request) -> set[str]:
    return {part.partition(";")[0].strip() for part in request.headers.get("accept", "").lower().split(",")}


def confirm_address(session: Session, token: str) -> Confirmed:
    token_hash = security.hmac_hash(CodePurpose.verify_email, token)
    codes = sa.select(OneTimeCode, User).join_from(OneTimeCode, User).where(col(OneTimeCode.code_hash) == token_hash)
    is_awaited = col(OneTimeCode.email).in_((User.email, User.pending_email))
    row = session.execute(codes.where(is_awaited, is_valid())).first()
    code, user = or_404(row, "This link is used up or too old. POST /auth/verify-email mails another.")
    if code.email != user.email:  # 409 if it has been taken since
        record_account_event(session, user.id, "email_changed", old=user.email, new=code.email, by=user.id)
        user.email, user.email_verified_at, user.pending_email = code.email, None, None
        cancel_codes(session, user.id, IS_RESET)  # these went to the old address
    cancel_codes(session, user.id, IS_LINK, col(OneTimeCode.email) == code.email)
    mark_verified(session, user)
    return Confirmed(email=user.email, email_verified_at=user.email_verified_at or models.utcnow())


def mark_verified(session: Session, user: User) -> None:
    if user.email_verified_at is None:
        user.email_verified_at = models.utcnow()
        record_account_event(session, user.id, "email_verified", email=user.email)


def is_valid() -> ColumnElement[bool]:
    return sa.and_(col(OneTimeCode.expires_at) > models.utcnow(), col(OneTimeCode.attempts) < MAX_CODE_ATTEMPTS)


def cancel_codes(session: Session, user_id: int, *which: ColumnElement[bool]) -> None:
    session.execute(sa.delete(OneTimeCode).where(col(OneTimeCode.user_id) == user_id, *which))


def cancel_address_change(session: Session, user: User) -> None:
    cancel_codes(session, user.id, IS_LINK, col(OneTimeCode.email) == user.pending_email)
    user.pending_email = None


def cancel_all_mailed(session: Session, user: User) -> None:
    """Cancel every code and link, and a change of address."""
    cancel_codes(session, user.id)
    user.pending_email = None


class VerificationRequest(RequestModel):
    email: EmailAddress = Field(examples=["rita@example.com"])


@router.post("/auth/verify-email", status_code=202, responses=errors(429))
async def request_verification(body: VerificationRequest, request: Request, tasks: BackgroundTasks) -> Notice:
    """Request another link for an address that waits for confirmation. The answer is the same for every address."""
    await security.check_rate_limit("verify", request, body.email)
    tasks.add_task(mail_if_allowed, "verify", another_link, body.email)
    return Notice(detail="If an account waits for this address to be confirmed, a link is on its way to it.")


async def mail_if_allowed(action: str, make_email: Callable[[Session, str], Email | None], address: str) -> None:
    """Do this well after the response, so that its time does not tell whether there is such an account."""
    await asyncio.sleep(0.05)  # uvloop writes the response only after this first step, and the thread takes the GIL
    if await security.can_mail(action, address) and (email := await database.write(make_email, address)):
        await send(email)


def another_link(session: Session, address: str) -> Email | None:
    unverified = sa.and_(col(User.email) == address, col(User.email_verified_at).is_(None))
    waiting = sa.select(User).where(unverified | (col(User.pending_email) == address), col(User.is_active))
    # Of several accounts that wait for one address, the one that has it comes first.
    user = session.scalars(waiting.order_by(col(User.email) != address, col(User.id)).limit(1)).first()
    return None if user is None else confirmation_email(session, user, address)


# --- passwords ----------------------------------------------------------------------------------------------------

CODE_LIFETIME = timedelta(minutes=10)
REFUSAL_SECONDS = 0.3  # minimum time of a refused code, so that it tells nothing of the reason


class ForgottenPassword(RequestModel):
    email: EmailAddress = Field(examples=["rita@example.com"])


@router.post("/auth/forgot-password", status_code=202, responses=errors(429))
async def forgot_password(body: ForgottenPassword, request: Request, tasks: BackgroundTasks) -> Notice:
    """Request a code for a new password. It has 6 digits, and is valid for 10 minutes, 5 attempts and one use.

    It replaces an earlier one. The answer is the same whether or not there is such an account. After ten codes in an
    hour, one a minute is mailed.
    """
    await security.check_rate_limit("forgot", request, body.email)
    tasks.add_task(mail_if_allowed, "forgot", reset_email, body.email)
    return Notice(detail="If an account has this address, a code is on its way to it.")


def reset_email(session: Session, address: str) -> Email | None:
    user = session.scalars(sa.select(User).where(col(User.email) == address, col(User.is_active))).first()
    record_account_event(session, user.id if user else None, "reset_requested")
    if user is None:
        return None
    code = f"{secrets.randbelow(10**6):06}"
    cancel_codes(session, user.id, IS_RESET)
    add_code(session, CodePurpose.reset_password, user.id, user.email, CODE_LIFETIME, user.id, code)
    return compose("reset_code", user.email, username=user.username, code=code)


OneTimePassword = Annotated[str, Field(pattern=pattern(r"^[0-9]{6}$", "must be the six digits of the code"))]


class PasswordReset(RequestModel):
    email: EmailAddress = Field(examples=["rita@example.com"])
    otp: OneTimePassword = Field(description="The code.", examples=["271828"])
    new_password: Password = Field(examples=["a short way home"])


@router.post("/auth/reset-password", status_code=204, dependencies=ENDS_SESSION, responses=errors(429))
async def reset_password(body: PasswordReset, request: Request, tasks: BackgroundTasks) -> None:
    """Set a new password with the code that was mailed. Ends every session."""
    refuse_at = asyncio.get_running_loop().time() + REFUSAL_SECONDS
    await security.check_rate_limit("reset", request, body.email)
    security.check_password_strength("new_password", body.new_password, body.email)
    password_hash = await security.hash_password(body.new_password)
    username = await database.write(use_code, body, password_hash, tasks)
    if username is None:
        await asyncio.sleep(refuse_at - asyncio.get_running_loop().time())
        raise HTTPException(400, "The code is wrong, used up or too old. Ask for a new one.")
    await security.reset_rate_limit("reset", request, body.email)
    for name in (body.email, username.lower()):
        await security.reset_rate_limit("login", request, name)


def use_code(session: Session, body: PasswordReset, password_hash: str, tasks: BackgroundTasks) -> str | None:
    """Set the password; the user's name. None for a wrong code: the transaction counts the attempt."""
    codes = sa.select(OneTimeCode, User).join_from(OneTimeCode, User).where(col(User.email) == body.email)
    row = session.execute(codes.where(IS_RESET, is_valid(), col(User.is_active))).first()
    if row is None:
        return None
    code, user = row
    if not secrets.compare_digest(code.code_hash, security.hmac_hash(CodePurpose.reset_password, user.id, body.otp)):
        code.attempts += 1
        return None
    security.check_password_strength("new_password", body.new_password, user.username)
    mark_verified(session, user)  # the code was mailed to that address
    tasks.add_task(send, set_password(session, user, password_hash, "password_reset", sa.true()))
    return str(user.username)


def set_password(session: Session, user: User, password_hash: str, event: str, ending: ColumnElement[bool]) -> Email:
    user.password_hash = password_hash
    cancel_all_mailed(session, user)  # somebody who knew the old password may have requested it
    end_sessions(session, user.id, ending)
    record_account_event(session, user.id, event)
    return compose("password_changed", user.email, username=user.username)


class PasswordChange(RequestModel):
    current_password: Annotated[str, Field(max_length=1000), Storable] = Field(examples=["a long way to Arrakis"])
    new_password: Password = Field(examples=["a short way home"])


@router.post("/auth/change-password", status_code=204, responses=errors(403, 429))
async def change_password(body: PasswordChange, user: CurrentUser, request: Request, tasks: BackgroundTasks) -> None:
    """Change my password. Ends all my sessions but this one."""
    if body.new_password == body.current_password:
        raise InvalidField("new_password", "must not be the current one")
    me = await confirm_password(user, body.current_password, request)
    security.check_password_strength("new_password", body.new_password, me.username, me.email)
    password_hash = await security.hash_password(body.new_password)
    tasks.add_task(send, await database.write(replace_password, user, password_hash))


@authorized
def replace_password(session: Session, user: Principal, password_hash: str) -> Email:
    me, others = session.get_one(User, user.id), col(LoginSession.id) != user.session_id
    return set_password(session, me, password_hash, "password_changed", others)


async def confirm_password(user: Principal, password: str, request: Request) -> Any:
    """The user's row. 403 if the password is wrong. A change of it ends the session, so that later writes are 401."""
    await security.check_rate_limit("password", request, user.id)
    me = await read_account(user)
    is_right, _ = await security.verify_password(password, me.password_hash)
    if not is_right:
        await database.write(record_refusal, user)
        raise HTTPException(403, "This is not your password.")
    return me


@authorized
def record_refusal(session: Session, user: Principal) -> None:
    record_account_event(session, user.id, "password_refused")


async def read_account(user: Principal) -> Any:
    """The user's row; 401 if the account was deleted since the token was verified."""
    mine = sa.select(User).where(col(User.id) == user.id)
    me = await database.read(lambda connection: connection.execute(mine).first())
    if me is None:
        raise unauthorized()
    return me
