"""Alembic: the schema, from the first table on."""
