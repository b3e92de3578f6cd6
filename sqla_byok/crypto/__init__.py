"""Bytes in, bytes out: formats, codecs, search hashes and values. No I/O, no SQLAlchemy."""
