"""Measured claims: commands that print a table and write JSON, each against a named peer in the same run."""
