"""PostgreSQL: one pool for the process, short transactions, psycopg's errors translated.

database      transactions and single statements, for the other wings
pool          the address, the embedded server behind it, the pool, and waiting for a connection
bounded       a connection that no server can hold up for ever; connecting makes it, resolving looks up names
lifeline      statements with a hard deadline, for the heartbeat
outages       whether the server answers; the log lines at the beginning and the end of an outage
lineage       which history of the database this process works on
statements    composes statements
conninfo      adds libpq's settings to the operator's address
errors        translates psycopg's errors
embedded      a private server in a folder; embedded_programs runs its programs
catalog       reads PostgreSQL's catalog
time_columns  reads and writes the web server's times, with a zone or without one
requirements  compares Cat Feeder's tables with a job's needs
schema        creates and upgrades the daemon's tables, Cat Feeder's tables, and indexes
"""

from catfeeder_cron.database.database import Database
from catfeeder_cron.database.errors import AllInUse, RollBack
from catfeeder_cron.database.lifeline import Lifeline
from catfeeder_cron.database.statements import Connection, identifier, single

__all__ = ["AllInUse", "Connection", "Database", "Lifeline", "RollBack", "identifier", "single"]
