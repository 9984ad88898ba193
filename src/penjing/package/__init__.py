"""The coded single-file form of a network, for transport. Works on plain values and never imports torch.

`encode`/`decode` go between plain values and bytes, `write`/`read` between plain values and a file, `inspect` and
`verify` look at a file. docs/format.md describes the bytes.
"""

from penjing.package.archive import decode, encode, read, verify, write
from penjing.package.contents import Contents, Row, inspect
from penjing.package.layout import VERSION

__all__ = ["VERSION", "Contents", "Row", "decode", "encode", "inspect", "read", "verify", "write"]
