"""Build the data set: Debian packages and manual decisions in, one Parquet file out.

Run as `python -m typefaces.making`; nothing else imports this package. `unipen` makes a file of people's handwriting.
"""
