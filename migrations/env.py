"""Run by Alembic where a migration is missing. docs/contributing.md says how to add a revision."""

from alembic import context
from sqlalchemy import Connection, create_engine
from sqlmodel import SQLModel

import models  # noqa: F401
from settings import settings


def run(connection: Connection) -> None:
    context.configure(connection=connection, target_metadata=SQLModel.metadata, render_as_batch=True)
    with context.begin_transaction():
        context.run_migrations()
        if connection.dialect.name == "sqlite":  # whose foreign keys are off meanwhile
            broken = connection.exec_driver_sql("PRAGMA foreign_key_check").first()
            if broken is not None:
                raise RuntimeError(f"a row without its referenced row after the migrations: {tuple(broken)}")


# At the service's start the connection is given, and is inside the transaction that keeps other processes waiting.
given: Connection | None = context.config.attributes.get("connection")
if given is not None:
    run(given)
else:
    with create_engine(settings.database_url).begin() as own:
        run(own)
