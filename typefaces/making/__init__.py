"""How the data set was made: Debian packages and hand-made decisions in, one Parquet file out.

Run as `python -m typefaces.making`; nothing else imports this package.
"""
