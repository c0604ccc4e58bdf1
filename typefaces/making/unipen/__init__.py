"""Convert the public UNIPEN distribution of handwriting into one Parquet file of people's characters.

`format` reads one file, `distribution` all of them; `strokes` selects characters, `layout` places them at one scale and
on one baseline per person, `render` draws them, `roles` assigns pseudonyms and roles, `table` has the Parquet file.

Not run on the whole distribution: tested on small files in its format, one for each case.
"""
