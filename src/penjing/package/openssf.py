"""Signatures as OpenSSF's model-signing makes and verifies them: Sigstore bundles, by its own library, local keys."""

from __future__ import annotations

from pathlib import Path

from penjing.errors import InputError, KeyFileError, MissingExtraError
from penjing.files import appearing
from penjing.package.keys import Paths, signing_key
from penjing.package.signatures import beside

try:
    from model_signing import signing
except ImportError as error:
    raise MissingExtraError(
        f"OpenSSF signatures need model-signing, which cannot be imported ({error})",
        hint="pip install 'penjing[model-signing]'",
    ) from error

SUFFIX = ".sig"


def require(key: Paths, passphrase: str | None = None) -> None:
    """Raises KeyFileError unless model-signing takes the private key: of a NIST elliptic curve, kind p256."""
    if signing_key(key, passphrase).public_key.keytype != "ecdsa":
        raise KeyFileError(
            f"{key} is no key that model-signing takes", hint="make one with penjing keygen KEY --kind p256"
        )


def sign(path: Paths, key: Paths, *, passphrase: str | None = None, signature: Paths | None = None) -> Path:
    """Signs a file or folder; gives the path of the bundle, beside it unless `signature` says otherwise."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"there is no file {path}", hint="name the package or bundle to sign")
    require(key, passphrase)
    secret = None if passphrase is None else passphrase.encode()
    out = beside(path, SUFFIX) if signature is None else Path(signature)
    with appearing(out) as aside:
        # The password is declared as a text, but handed on to cryptography, which takes bytes.
        signing.Config().use_elliptic_key_signer(private_key=Path(key), password=secret).sign(path, aside)
    return out
