"""The coded single-file form of a network, for transport. Works on plain values and never imports torch.

`encode`/`decode` go between plain values and bytes, `write`/`read` between plain values and a file, `inspect` and
`verify` look at a file. docs/format.md describes the bytes.

What needs the extra `secure` is imported by name (docs/sealing.md): `keys`, `signatures`, `sealing`, `bom`; and with
the extra `model-signing` `openssf`. `provenance` needs neither.
"""

from penjing.package.archive import decode, encode, read, verify, write
from penjing.package.contents import Contents, Row, inspect
from penjing.package.layout import VERSION

__all__ = ["VERSION", "Contents", "Row", "decode", "encode", "inspect", "read", "verify", "write"]
