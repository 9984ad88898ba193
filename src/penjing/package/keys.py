"""Files of keys: made, never overwritten, and read.

A key of kind `ed25519` or `p256` signs: PEM, PKCS #8 (RFC 5208; with a passphrase PBES2, RFC 8018), beside it the
public half as SubjectPublicKeyInfo. A key of kind `age` opens what is sealed: a file as `age-keygen` writes it (with a
passphrase encrypted by age's scrypt recipient), beside it the recipient.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from penjing.errors import InputError, KeyFileError, MissingExtraError, OutputError

try:
    import pyrage
    from cryptography.exceptions import InternalError, UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from securesystemslib.signer import CryptoSigner, SSlibKey
except ImportError as error:
    raise MissingExtraError(
        f"keys need a package that is missing ({error})", hint="pip install 'penjing[secure]'"
    ) from error

KINDS = ("ed25519", "p256", "age")
_MAX = 64 << 10  # bytes that a file of keys may have
_RECIPIENTS = "write age1…, 'ssh-ed25519 …', or a file with a line for each"
_ENCRYPTED = b"ENCRYPTED"  # in the first line of PKCS #8, in the second of the older form of openssl
_AGE = b"age-encryption.org/v1"
_SSH = b"-----BEGIN OPENSSH PRIVATE KEY-----"

Paths = str | os.PathLike[str]


def keygen(path: Paths, *, kind: str = "ed25519", passphrase: str | None = None) -> str:
    """Makes a key: the private half in `path` (mode 0600), the public one in `path`.pub; gives the key's name.

    kind: "ed25519" or "p256" to sign with, "age" to seal to. The name is the key id of the signatures (SHA-256 of the
    public key), or the age recipient. Raises OutputError where one of the files exists: no key is ever overwritten.
    """
    if passphrase == "":
        raise InputError("the passphrase is empty", hint="give one of some words, or none at all")
    if kind == "age":
        identity = pyrage.x25519.Identity.generate()
        name = str(identity.to_public())
        private = f"# public key: {name}\n{identity}\n".encode()
        if passphrase is not None:
            private = bytes(pyrage.passphrase.encrypt(private, passphrase))
        public = f"{name}\n".encode()
    elif kind in KINDS:
        signer = CryptoSigner.generate_ed25519() if kind == "ed25519" else CryptoSigner.generate_ecdsa()
        name = signer.public_key.keyid
        made, pem = serialization.load_pem_private_key(signer.private_bytes, None), serialization.Encoding.PEM
        hidden: serialization.KeySerializationEncryption = serialization.NoEncryption()
        if passphrase is not None:
            hidden = serialization.BestAvailableEncryption(passphrase.encode())
        private = made.private_bytes(pem, serialization.PrivateFormat.PKCS8, hidden)
        public = made.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    else:
        raise InputError(f"there is no kind of key called {kind!r}", hint=f"kinds: {', '.join(KINDS)}")
    _write_new(Path(path), private, public)
    return name


def needs_passphrase(path: Paths) -> bool:
    """Whether a file holds a private key under a passphrase."""
    data = _read(path)
    return data.startswith(_AGE) or _ENCRYPTED in data


def signing_key(path: Paths, passphrase: str | None = None) -> CryptoSigner:
    """The private key in a PEM file. Raises KeyFileError where there is none, or not under this passphrase."""
    data = _read(path)
    try:
        key = serialization.load_pem_private_key(data, None if passphrase is None else passphrase.encode())
        return CryptoSigner(key)  # it says which kinds it does not take
    except TypeError as error:
        why = "is under a passphrase" if passphrase is None else "is under no passphrase, and one was given"
        raise KeyFileError(f"the key {path} {why}", hint="give the passphrase that the key was made with") from error
    except (ValueError, UnsupportedAlgorithm, InternalError) as error:
        if passphrase is not None and _ENCRYPTED in data:
            raise KeyFileError(
                f"the passphrase does not open the key {path}", hint="was it made with another?"
            ) from error
        raise KeyFileError(
            f"{path} holds no private key to sign with", hint="penjing keygen makes one; its private half has no .pub"
        ) from error


def public_key(path: Paths) -> SSlibKey:
    """The public key in a PEM file. Raises KeyFileError where there is none."""
    data = _read(path)
    if b"PRIVATE KEY" in data:
        raise KeyFileError(f"{path} is a private key", hint=f"to verify takes the public half, {path}.pub")
    try:
        return SSlibKey.from_crypto(serialization.load_pem_public_key(data))
    except (ValueError, UnsupportedAlgorithm, InternalError) as error:
        raise KeyFileError(
            f"{path} holds no public key to verify with", hint="penjing keygen writes one as KEY.pub"
        ) from error


def identities(path: Paths, passphrase: str | None = None) -> list[Any]:
    """The private keys to open sealed packages with: of a file of age identities, or an SSH key without passphrase."""
    data = _read(path)
    if data.startswith(_AGE):
        if passphrase is None:
            raise KeyFileError(f"the key {path} is under a passphrase", hint="give the passphrase it was made with")
        try:
            data = bytes(pyrage.passphrase.decrypt(data, passphrase))
        except pyrage.DecryptError as error:
            raise KeyFileError(
                f"the passphrase does not open the key {path}", hint="was it made with another?"
            ) from error
    if data.startswith(_SSH):
        return [_ssh_identity(path, data)]
    try:
        found = [pyrage.x25519.Identity.from_str(line) for line in _lines(data)]
    except (pyrage.IdentityError, UnicodeDecodeError) as error:
        raise KeyFileError(
            f"{path} holds no age identity", hint="penjing keygen --kind age makes one; its private half has no .pub"
        ) from error
    if not found:
        raise KeyFileError(f"{path} holds no age identity", hint="penjing keygen --kind age makes one")
    return found


def recipients(texts: Sequence[str]) -> list[Any]:
    """Those to seal for: each text is age1…, an SSH public key (ssh-ed25519 …, ssh-rsa …), or a file of such lines."""
    found: list[Any] = []
    for text in texts:
        for line in [text] if text.startswith(("age1", "ssh-")) else _recipient_lines(text):
            try:
                kind = pyrage.ssh if line.startswith("ssh-") else pyrage.x25519
                found.append(kind.Recipient.from_str(line))
            except pyrage.RecipientError as error:
                raise InputError(f"{_shown(line)} is no recipient", hint=_RECIPIENTS) from error
    if not found:
        raise InputError("nobody was named to seal for", hint=_RECIPIENTS)
    return found


def _recipient_lines(text: str) -> list[str]:
    try:
        there = Path(text).is_file()
    except OSError:  # longer than a name can be
        there = False
    if not there:
        raise InputError(f"{_shown(text)} is no recipient, nor a file of them", hint=_RECIPIENTS)
    try:
        lines = _lines(_read(text))
    except UnicodeDecodeError as error:
        raise KeyFileError(f"{text} holds no recipients", hint=_RECIPIENTS) from error
    if any(line.startswith("AGE-SECRET-KEY-") for line in lines):
        raise KeyFileError(f"{text} is a private key", hint=f"to seal takes the public half, {text}.pub")
    return lines


def _ssh_identity(path: Paths, data: bytes) -> Any:
    try:
        return pyrage.ssh.Identity.from_buffer(data)
    except pyrage.IdentityError as error:
        raise KeyFileError(
            f"the SSH key {path} opens nothing: {error}", hint="take an ed25519 or RSA key that is under no passphrase"
        ) from error


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:79] + "…")


def _lines(data: bytes) -> list[str]:
    lines = (line.strip() for line in data.decode().splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _read(path: Paths) -> bytes:
    try:
        with Path(path).open("rb") as file:
            data = file.read(_MAX + 1)
    except (OSError, ValueError) as error:
        raise KeyFileError(
            f"the key {path} cannot be read: {getattr(error, 'strerror', None) or error}",
            hint="penjing keygen makes keys",
        ) from error
    if len(data) > _MAX:
        raise KeyFileError(f"{path} is no key: it has more than {_MAX} bytes", hint="penjing keygen makes keys")
    return data


def _write_new(path: Path, private: bytes, public: bytes) -> None:
    """Both files or neither; what exists stays as it is."""
    made: list[Path] = []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for file, data, mode in ((path, private, 0o600), (path.with_name(path.name + ".pub"), public, 0o644)):
            handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            made.append(file)
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
        made.clear()
    except (OSError, ValueError) as error:
        if isinstance(error, FileExistsError) and path.parent.is_dir():
            raise OutputError(
                f"{error.filename} exists, and keys are never overwritten", hint="name another file"
            ) from error
        raise OutputError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or error}", hint="name another place"
        ) from error
    finally:  # also on Ctrl-C
        for file in made:
            with suppress(OSError):
                file.unlink()
