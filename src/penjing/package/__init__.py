"""The coded form of a network, for transport: one file, or a directory. Works on plain values, never imports torch.

`encode`/`decode` go between plain values and bytes, `write`/`read` between plain values and a file, `inspect` and
`verify` look at a package, `save` writes an encoded one in either layout, `split` and `join` divide it and put it
together; `penjing.package.transfer` fetches one, `penjing.package.onnx_model` makes the file of a runtime of one.
docs/format.md describes the bytes.

What needs the extra `secure` is imported by name (docs/sealing.md): `keys`, `signatures`, `sealing`, `bom`; and with
the extra `model-signing` `openssf`. `provenance` needs neither.
"""

from penjing.package.archive import decode, encode, read, verify, write
from penjing.package.contents import Contents, Row, inspect
from penjing.package.directory import save
from penjing.package.layout import VERSION
from penjing.package.volumes import join, split

__all__ = [
    "VERSION",
    "Contents",
    "Row",
    "decode",
    "encode",
    "inspect",
    "join",
    "read",
    "save",
    "split",
    "verify",
    "write",
]
