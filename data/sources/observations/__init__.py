"""Readers of observations, one module a format, each with `read(path, *, start=None, stop=None) -> Table`.

start, stop: int64 seconds since 1970 UTC; rows with start < time <= stop are kept. Rows come in the order of the file.
Readers raise OSError where a file is missing or damaged and ValueError where it lacks what the format promises.
"""

FORMATS = ("bufr", "dart_text", "madis", "metar_csv", "roms", "ufs_parquet")
