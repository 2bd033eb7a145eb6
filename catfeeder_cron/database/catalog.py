"""Reads from PostgreSQL's catalog about a table of the web server: leaves, column types, indexes, privileges."""

from dataclasses import dataclass
from typing import NamedTuple

from psycopg import sql

from catfeeder_cron.database.statements import Connection, single
from catfeeder_cron.errors import SchemaProblem, UndefinedObject


class WantedIndex(NamedTuple):
    """An index that makes a job cheap, on `column` of the table that `table` names in [database.tables]."""

    table: str
    column: str
    state: str | None = None
    """The job reads only rows with this value in the column "state"; None: all rows."""


@dataclass(frozen=True)
class Leaf:
    """A table that holds rows itself: a plain table, or a partition at the bottom of its tree."""

    oid: int
    schema: str
    name: str
    blocks: int
    estimated_rows: float
    """The number at the last ANALYZE, scaled to today's size; without an ANALYZE, 50 rows a block."""
    indexed: bool
    """Whether a valid B-tree index leads to the rows that `leaves` was asked about."""

    def __str__(self) -> str:
        return self.identifier.as_string()

    @property
    def identifier(self) -> sql.Identifier:
        """Return the qualified name, for a statement."""
        return sql.Identifier(self.schema, self.name)


@dataclass(frozen=True)
class ForeignKey:
    """A foreign key that forbids to delete the rows it refers to."""

    constraint: str
    schema: str
    table: str
    partitioned: bool
    of_itself: bool
    """Whether the table refers to itself."""
    indexed: bool
    """Whether an index leads from a referenced row to those that refer to it."""
    columns: tuple[tuple[str, str], ...]
    """Pairs of (its column, the referenced column)."""


INSTANT = "timestamp with time zone"
INSTANTS = (INSTANT, "timestamp without time zone")
TIMES = (*INSTANTS, "date")

_KINDS = {"v": "a view", "m": "a materialized view", "f": "a foreign table", "S": "a sequence", "i": "an index"}

_TABLE = """
    SELECT c.oid, c.relkind,
           (SELECT format_type(CASE t.typtype WHEN 'd' THEN t.typbasetype ELSE t.oid END, NULL)
            FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
            WHERE a.attrelid = c.oid AND a.attname = %(column)s AND a.attnum > 0 AND NOT a.attisdropped),
           (SELECT array_agg(a.attname) FROM pg_attribute a
            WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped)
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = %(schema)s AND c.relname = %(name)s"""

_COLUMN_TYPES = """
    SELECT attname, format_type(CASE t.typtype WHEN 'd' THEN t.typbasetype ELSE t.oid END, NULL)
    FROM pg_attribute JOIN pg_type t ON t.oid = atttypid
    WHERE attrelid = %(oid)s AND attnum > 0 AND NOT attisdropped"""

# The recursive CTE walks pg_inherits, so it finds partitions of any depth and plain inheritance (TimescaleDB's chunks).
_LEAVES = """
    WITH RECURSIVE tree AS (
        SELECT %(oid)s::oid AS oid
        UNION
        SELECT i.inhrelid FROM pg_inherits i JOIN tree ON i.inhparent = tree.oid WHERE NOT i.inhdetachpending)
    SELECT c.oid, n.nspname, c.relname, size.blocks,
           CASE WHEN c.reltuples > 0 AND c.relpages > 0 THEN c.reltuples / c.relpages * size.blocks
                ELSE 50.0 * size.blocks END,
           EXISTS (SELECT FROM pg_index i
                   JOIN pg_class ic ON ic.oid = i.indexrelid JOIN pg_am am ON am.oid = ic.relam
                   JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = i.indkey[0]
                   LEFT JOIN pg_attribute b ON b.attrelid = c.oid AND b.attnum = i.indkey[1]
                   WHERE i.indrelid = c.oid AND am.amname = 'btree' AND i.indisvalid AND i.indisready
                     AND CASE WHEN %(state)s::text IS NULL THEN a.attname = %(column)s AND i.indpred IS NULL
                              WHEN i.indpred IS NULL THEN a.attname = 'state' AND b.attname = %(column)s
                              ELSE a.attname = %(column)s
                                   AND pg_get_expr(i.indpred, i.indrelid) LIKE '(state = ''' || %(state)s || '''%%'
                         END)
    FROM tree JOIN pg_class c ON c.oid = tree.oid JOIN pg_namespace n ON n.oid = c.relnamespace,
         LATERAL (SELECT pg_relation_size(c.oid) / current_setting('block_size')::int AS blocks) size
    WHERE c.relkind = 'r'
    ORDER BY n.nspname, c.relname"""

# Keys as declared, for the leaf or for a table that it is a partition of; not those that PostgreSQL derives from them.
_REFERENCES = """
    SELECT k.conname, n.nspname, r.relname, r.relkind = 'p', k.conrelid = k.confrelid,
           EXISTS (SELECT FROM pg_index i
                   WHERE i.indrelid = k.conrelid AND i.indisvalid AND i.indkey[0] = ANY (k.conkey)),
           array(SELECT a.attname FROM unnest(k.conkey) WITH ORDINALITY key(num, place)
                 JOIN pg_attribute a ON a.attrelid = k.conrelid AND a.attnum = key.num ORDER BY place),
           array(SELECT a.attname FROM unnest(k.confkey) WITH ORDINALITY key(num, place)
                 JOIN pg_attribute a ON a.attrelid = k.confrelid AND a.attnum = key.num ORDER BY place)
    FROM pg_constraint k JOIN pg_class r ON r.oid = k.conrelid JOIN pg_namespace n ON n.oid = r.relnamespace
    WHERE k.contype = 'f' AND k.conparentid = 0 AND k.confdeltype IN ('a', 'r')
      AND (k.confrelid = %(leaf)s::oid OR k.confrelid IN (SELECT pg_partition_ancestors(%(leaf)s::oid)))
      AND has_table_privilege(k.conrelid, 'SELECT') AND has_schema_privilege(r.relnamespace, 'USAGE')
    ORDER BY k.conname"""

# DELETE can only be granted on a whole table, the other privileges on columns too.
_MISSING_PRIVILEGES = """
    SELECT privilege FROM unnest(%(privileges)s::text[]) privilege
    WHERE NOT CASE privilege WHEN 'DELETE' THEN has_table_privilege(%(oid)s::oid, privilege)
                             ELSE has_any_column_privilege(%(oid)s::oid, privilege) END"""


def has_table(connection: Connection, schema: str, name: str) -> bool:
    """Tell whether there is a table, or another relation, of this name."""
    return connection.execute(_TABLE, {"schema": schema, "name": name, "column": ""}).fetchone() is not None


def find_table(connection: Connection, schema: str, name: str, column: str) -> tuple[int, str]:
    """Return the table's oid and the column's type (for a domain its base type).

    Raises SchemaProblem where the table or the column is missing, or the name is not that of a table.
    """
    described = f'"{schema}"."{name}"'
    row = connection.execute(_TABLE, {"schema": schema, "name": name, "column": column}).fetchone()
    if row is None:
        raise UndefinedObject(
            f"there is no table {described}; correct [database.tables], or create Cat Feeder's tables with "
            "`catfeeder-cron init-db --with-app-tables`"
        )
    oid, kind, column_type, columns = row
    if kind not in ("r", "p"):
        raise SchemaProblem(f"{described} is {_KINDS.get(kind, 'no table')}; set [database.tables] to the table itself")
    if column_type is None:
        raise UndefinedObject(f'table {described} has no column "{column}"; it has {", ".join(columns or ["none"])}')
    return oid, column_type


def column_types(connection: Connection, oid: int) -> dict[str, str]:
    """Return the type of every column of a table by its name; for a domain its base type."""
    return dict(connection.execute(_COLUMN_TYPES, {"oid": oid}).fetchall())


def leaves(connection: Connection, oid: int, column: str, state: str | None = None) -> list[Leaf]:
    """Return the tables that hold the rows of table `oid`, which may be that table itself.

    `Leaf.indexed` tells of an index on `column`; with `state`, of one on `column` that leads to the rows of that state.
    """
    parameters = {"oid": oid, "column": column, "state": state}
    return [Leaf(*row) for row in connection.execute(_LEAVES, parameters)]


def foreign_keys(connection: Connection, leaf: Leaf) -> list[ForeignKey]:
    """Return the foreign keys that forbid to delete rows of this leaf, if this role may read their tables."""
    found = connection.execute(_REFERENCES, {"leaf": leaf.oid})
    return [
        ForeignKey(constraint, schema, table, partitioned, of_itself, indexed, tuple(zip(own, referenced, strict=True)))
        for constraint, schema, table, partitioned, of_itself, indexed, own, referenced in found
    ]


def may_hide_rows(connection: Connection, leaf: Leaf) -> bool:
    """Tell whether row-level security may hide rows from this role."""
    return bool(single(connection, "SELECT row_security_active(%s::oid)", [leaf.oid])[0])


def require_privileges(connection: Connection, leaf: Leaf, *privileges: str) -> None:
    """Raise SchemaProblem, with the GRANT that would help, unless the role has all these privileges."""
    usable, user = single(connection, "SELECT has_schema_privilege(%s, 'USAGE'), current_user", [leaf.schema])
    role, schema = sql.Identifier(user).as_string(), sql.Identifier(leaf.schema).as_string()
    if not usable:
        raise SchemaProblem(
            f"role {role} lacks USAGE on schema {schema}; its owner can say: GRANT USAGE ON SCHEMA {schema} TO {role}"
        )
    parameters = {"privileges": list(privileges), "oid": leaf.oid}
    missing = [row[0] for row in connection.execute(_MISSING_PRIVILEGES, parameters)]
    if missing:
        raise SchemaProblem(
            f"role {role} lacks {', '.join(missing)} on {leaf}; its owner can say: "
            f"GRANT {', '.join(privileges)} ON {leaf} TO {role}"
        )
