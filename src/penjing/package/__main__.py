"""python -m penjing.package NET.penjing NET.onnx: needs numpy, constriction and zstandard, and no more of penjing."""

from __future__ import annotations

import argparse
import sys

from penjing.errors import OutputError, PenjingError
from penjing.package import onnx_model


def main() -> int:
    """Unpacks a package that was packed for a runtime; 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m penjing.package", description="Unpacks an ONNX model.")
    parser.add_argument("package", help="a .penjing file, its directory, or the folder of a pull under way")
    parser.add_argument("out", help="the .onnx file to write")
    parser.add_argument("--layers", type=int, metavar="N", help="only the first N quality layers")
    args = parser.parse_args()
    try:
        if not args.out.endswith(".onnx"):
            raise OutputError(f"{args.out} must end in .onnx", hint="for example net.onnx")
        size = onnx_model.write(args.package, args.out, layers=args.layers)
    except PenjingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
