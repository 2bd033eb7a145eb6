"""PostgreSQL: one pool for the process, short transactions, psycopg's errors translated."""

from catfeeder_cron.database.errors import AllInUse, RollBack
from catfeeder_cron.database.pool import Connection, Database, identifier, single

__all__ = ["AllInUse", "Connection", "Database", "RollBack", "identifier", "single"]
