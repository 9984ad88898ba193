"""Signatures of packages and bundles: a DSSE envelope around an in-toto statement, in a file beside what is signed.

The statement (in-toto Attestation Framework, Statement v1) names the package by its digest and by the SHA-256 of its
file, and says where the network comes from and what was measured. The envelope and its signature are securesystemslib's
(DSSE v1).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import stat
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from penjing._version import __version__
from penjing.digests import digest
from penjing.errors import InputError, MissingExtraError, SignatureError
from penjing.files import appearing
from penjing.package import archive, bundles, directory, layout, provenance
from penjing.package.claims import shown
from penjing.package.keys import Paths, public_key, signing_key
from penjing.package.manifest import Manifest

try:
    from google.protobuf.json_format import ParseDict, ParseError
    from in_toto_attestation.v1 import statement_pb2
    from in_toto_attestation.v1.statement import STATEMENT_TYPE_URI, Statement
    from securesystemslib.dsse import Envelope
    from securesystemslib.exceptions import FormatError, VerificationError
    from securesystemslib.signer import SSlibKey
except ImportError as error:
    raise MissingExtraError(
        f"signatures need a package that is missing ({error})", hint="pip install 'penjing[secure]'"
    ) from error

PAYLOAD_TYPE = "application/vnd.in-toto+json"
PREDICATE_TYPE = "urn:penjing:network:1"
SUFFIX = ".dsse.json"
PACKAGE = "penjing"  # names, among a subject's digests, the digest in a package's header
NETWORK = "penjing-network"  # and the digest of a network (penjing.digests)

_MAX = 32 << 20  # bytes that an envelope may have


@dataclasses.dataclass(frozen=True, kw_only=True)
class Signed:
    """What a signature says, after it was verified.

    Attributes:
        release: the number that rollbacks are told by.
        expires: until when the signature holds; None: for ever.
        files: SHA-256 of every file that was signed, by name.
        predicate: network, history, parents and measurements, as docs/sealing.md lists them.
        key: the id of the key that signed.
    """

    release: int
    expires: datetime | None
    files: dict[str, str]
    predicate: dict[str, Any]
    key: str


def beside(path: Paths, suffix: str = SUFFIX) -> Path:
    """Where the signature of `path` is looked for: in the same folder, under its name and .dsse.json."""
    place = _named(Path(path))
    return place.parent / (place.name + suffix)


def sign(
    path: Paths,
    key: Paths,
    *,
    passphrase: str | None = None,
    release: int = 1,
    expires: datetime | None = None,
    report: Paths | None = None,
    parents: Sequence[Paths] = (),
    signature: Paths | None = None,
) -> Path:
    """Signs a package, or a bundle's folder with every file in it; gives the path of the signature.

    key: the file of a private key, with `passphrase` if it is under one. release: grows with every release of the same
    network. report: a report.json whose measurements are signed too (a bundle's own is found). parents: packages that
    the network was made of. Raises InputError, KeyFileError, PackageError, OutputError.
    """
    if type(release) is not int or not 0 <= release < 1 << 53:
        raise InputError(f"the release must be a whole number of at least 0, got {release!r}")
    signer = signing_key(key, passphrase)
    statement = _statement(_named(Path(path)), release, expires, report, parents)
    text = json.dumps(statement, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    envelope = Envelope(text.encode(), PAYLOAD_TYPE, {})
    envelope.sign(signer)
    out = beside(path) if signature is None else Path(signature)
    with appearing(out) as aside:
        aside.write_text(json.dumps(envelope.to_dict(), indent=1) + "\n", encoding="utf8")
    return out


def verify(
    path: Paths,
    keys: Sequence[Paths],
    *,
    signature: Paths | None = None,
    at_least: int | None = None,
    now: datetime | None = None,
) -> Signed:
    """What a signature says of `path`, once one of `keys` (files of public keys) made it and nothing has changed since.

    at_least: the oldest release to accept. now: the time that expiry is held against. Raises SignatureError where the
    signature is malformed, made by another key, of something else, expired, or of an older release; PackageError where
    the package itself is damaged.
    """
    place = beside(path) if signature is None else Path(signature)
    signed = _opened(place, keys)
    _compare(Path(path), signed)
    return _in_force(signed, path, place, at_least, now)


def verify_manifest(
    front: Manifest,
    path: Paths,
    keys: Sequence[Paths],
    *,
    signature: Paths | None = None,
    at_least: int | None = None,
    now: datetime | None = None,
) -> Signed:
    """The same of a package whose manifest was read from `path`, and whose parts come later, or not all: the digest in
    its header is signed, and covers the digest of every part."""
    folder = Path(path)
    whole = folder.with_name(folder.name.removesuffix(directory.PULL)) if folder.name else folder
    place = beside(whole) if signature is None else Path(signature)
    signed = _opened(place, keys)
    _same_package(folder, front.data, signed)
    return _in_force(signed, path, place, at_least, now)


def _in_force(signed: Signed, path: Paths, place: Path, at_least: int | None, now: datetime | None) -> Signed:
    """Raises SignatureError where the signature is of an older release than wanted, or expired."""
    if at_least is not None and signed.release < at_least:
        raise SignatureError(
            f"{path} is release {signed.release}, and at least {at_least} is asked for",
            hint="an older release was put in the place of a newer one: get the newer",
        )
    if signed.expires is not None and (now or datetime.now(UTC)) >= signed.expires:
        raise SignatureError(
            f"the signature {place} expired on {signed.expires:%Y-%m-%d %H:%M} UTC",
            hint="get a newer one from the signer",
        )
    return signed


# ------------------------------------------------------------------------------------------------------- saying
def _statement(
    path: Path, release: int, expires: datetime | None, report: Paths | None, parents: Sequence[Paths]
) -> dict[str, Any]:
    is_bundle = bundles.is_bundle(path)
    package = path / bundles.INNER if is_bundle else path
    data = archive.load(package)
    said = _said(data)
    if is_bundle and report is None and (path / "report.json").is_file():
        report = path / "report.json"
    predicate: dict[str, Any] = {"penjing": __version__, "release": release, **said}
    if expires is not None:
        predicate["expires"] = expires.astimezone(UTC).isoformat()
    if parents:
        predicate["parents"] = [{"name": Path(p).name, **_identified(Path(p))} for p in parents]
    if report is not None:
        predicate["measurements"] = _measurements(Path(report), said)
    # The package was read once: what is told of it and its digest are of the same bytes.
    own = {"sha256": _sha256(data), PACKAGE: said["package"]["digest"]}
    digests = {n: {"sha256": sha} for n, sha in bundles.files(path).items()} if is_bundle else {}
    subjects = [{"name": name, "digest": held} for name, held in (digests | {package.name: own}).items()]
    statement = {
        "_type": STATEMENT_TYPE_URI,
        "subject": subjects,
        "predicateType": PREDICATE_TYPE,
        "predicate": predicate,
    }
    try:
        json.dumps(statement, allow_nan=False).encode()
        _checked(statement)
    except (ValueError, TypeError, RecursionError, ParseError) as error:
        raise InputError(
            f"what {path} says of itself cannot be signed: {error}", hint="pack the network again"
        ) from error
    return statement


def _checked(statement: Any) -> Any:
    """The statement as in-toto reads it. Raises ValueError or ParseError where it is none."""
    parsed = ParseDict(statement, statement_pb2.Statement(), ignore_unknown_fields=True)
    Statement.copy_from_pb(parsed).validate()
    return parsed


def _said(data: bytes) -> dict[str, Any]:
    """What the statement says of a package: of a sealed one, nothing that the seal hides."""
    header, index, _ = archive.open_bytes(data)
    sealed = bool(header.required & layout.SEALED)
    said: dict[str, Any] = {
        "package": {
            "digest": header.digest.hex(),
            "bytes": len(data),
            "format": header.version,
            "parts": len(index.parts) + 1,
            "sealed": sealed,
        }
    }
    if not sealed:
        topology, arrays, _ = archive.decode(data)
        chain = provenance.trace(topology, digest(topology, arrays)).to_dict()
        said["network"] = {"name": chain["name"], "digest": chain["digest"], "original": chain["original"]}
        said["history"] = chain["links"]
    return said


def _identified(path: Path) -> dict[str, Any]:
    """The digests of a parent: of its package, and of its network unless that is sealed."""
    data = archive.load(path)
    said = _said(data)
    network = {NETWORK: said["network"]["digest"]} if "network" in said else {}
    return {"digest": {"sha256": _sha256(data), PACKAGE: said["package"]["digest"]} | network}


def _measurements(path: Path, said: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a report.json, which must be of the very network that is signed."""
    try:
        report = json.loads(path.read_text(encoding="utf8"), parse_constant=_no_constant)
        of = report["network"]["digest"]
        found = {k: report[k] for k in ("baseline", "result", "change", "verdict") if k in report}
        found["baseline_network"] = report["network"].get("baseline_digest")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path} is no report.json ({type(error).__name__})", hint="penjing evaluate writes one"
        ) from error
    if "network" in said and of != said["network"]["digest"]:
        raise InputError(f"{path} is the report of another network", hint="evaluate the network that is signed")
    return {**found, "network": of, "report": {"sha256": bundles.sha256_of(path)}}


def _no_constant(word: str) -> NoReturn:
    raise ValueError(word)


def _named(path: Path) -> Path:
    """The same place under a path that ends in its name."""
    return path if path.name not in ("", "..") else path.resolve()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# ------------------------------------------------------------------------------------------------------ checking
def _opened(place: Path, paths: Sequence[Paths]) -> Signed:
    """The statement in an envelope that was signed by one of the keys in the files `paths`."""
    keys: list[SSlibKey] = [public_key(path) for path in paths]
    if not keys:
        raise InputError("no key was given to verify with", hint="name the signer's public key, KEY.pub")
    envelope = _envelope(place)
    if envelope.payload_type != PAYLOAD_TYPE:
        raise SignatureError(
            f"{place} signs {envelope.payload_type[:80]!r}, not {PAYLOAD_TYPE!r}",
            hint="it is not the signature of a package",
        )
    try:
        accepted = envelope.verify(keys, 1)
    except VerificationError as error:
        named = {key.keyid for key in keys} & set(envelope.signatures)
        why = (
            "does not match its own text: it was changed after it was signed"
            if named
            else f"is by another key ({', '.join(_short(k) for k in envelope.signatures) or 'none'})"
        )
        given = ", ".join(_short(key.keyid) for key in keys)
        raise SignatureError(
            f"the signature {place} {why}", hint=f"verified with {given}: is that the signer's key?"
        ) from error
    try:
        payload = json.loads(envelope.payload)
        parsed = _checked(payload)
    except (ValueError, TypeError, AttributeError, RecursionError, ParseError) as error:
        raise SignatureError(
            f"{place} signs no in-toto statement", hint="it is not the signature of a package"
        ) from error
    if parsed.predicate_type != PREDICATE_TYPE:
        raise SignatureError(
            f"{place} signs a statement of type {parsed.predicate_type[:80]!r}, not {PREDICATE_TYPE!r}",
            hint="it is not the signature of a package, or needs a newer penjing",
        )
    predicate = payload["predicate"]
    try:
        release, expires = predicate["release"], predicate.get("expires")
        if type(release) is not int or not isinstance(predicate.get("package", {}), dict):
            raise TypeError(release)
        return Signed(
            release=release,
            expires=None if expires is None else _time(expires),
            files={s.name: s.digest["sha256"] for s in parsed.subject if "sha256" in s.digest},
            predicate=predicate,
            key=next(iter(accepted)),
        )
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise SignatureError(
            f"{place} signs a statement that lacks its release or time", hint="sign it again"
        ) from error


def _envelope(place: Path) -> Envelope:
    try:
        if not stat.S_ISREG(place.stat().st_mode):  # a pipe, say, would never end
            raise OSError("it is no ordinary file")
        with place.open("rb") as file:
            data = file.read(_MAX + 1)
    except (OSError, ValueError) as error:
        raise SignatureError(
            f"there is no signature {place}" if isinstance(error, FileNotFoundError) else f"{place} cannot be read",
            hint="penjing sign writes one; --signature names it where it lies elsewhere",
        ) from error
    try:
        if len(data) > _MAX:
            raise ValueError("too large")
        envelope = Envelope.from_dict(json.loads(data))
        if not isinstance(envelope.payload_type, str):
            raise TypeError("payloadType")
        if not all(isinstance(keyid, str) for keyid in envelope.signatures):
            raise TypeError("keyid")
        return envelope
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, FormatError) as error:
        raise SignatureError(
            f"{place} is no DSSE envelope", hint="it is damaged, or no signature: get it again"
        ) from error


def _compare(path: Path, signed: Signed) -> None:
    """Raises SignatureError unless every file that was signed, and no other, is there unchanged."""
    if not path.exists():
        raise InputError(f"there is no file {path}", hint="name the package or bundle that was signed")
    if not bundles.is_bundle(path):
        data = archive.load(path)
        _, index, _ = archive.open_bytes(data)  # it names damage better
        _same_package(path, data, signed)
        if _sha256(data) not in signed.files.values():
            raise _not_the_same(path)
        if path.is_dir() and (more := directory.others(path, index.parts)):
            raise _not_signed(path, more[0])
        return
    found = bundles.files(path)
    for name, expected in signed.files.items():
        if found.get(name) != expected:
            what = "is not what was signed" if name in found else "was signed, and is missing"
            raise SignatureError(f"{shown(name)} in {path} {what}", hint="get the bundle again")
    more = sorted(set(found) - set(signed.files))
    if more:
        raise _not_signed(path, more[0])


def _same_package(path: Path, data: bytes, signed: Signed) -> None:
    """Raises SignatureError unless the package that begins with `data` is the one that the statement tells of: in a
    bundle others may have been signed beside it."""
    if signed.predicate.get("package", {}).get("digest") != layout.parse_header(data).digest.hex():
        raise _not_the_same(path)


def _not_the_same(path: Path) -> SignatureError:
    return SignatureError(f"{path} is not what was signed", hint="it was changed, or the signature is of another")


def _not_signed(folder: Path, name: str) -> SignatureError:
    return SignatureError(
        f"{folder} holds {shown(name)}, which was not signed", hint="take it out, or sign the folder again"
    )


def _time(text: Any) -> datetime:
    when = datetime.fromisoformat(text)
    return when.replace(tzinfo=UTC) if when.tzinfo is None else when.astimezone(UTC)


def _short(keyid: str) -> str:
    return keyid[:12] if keyid.isalnum() else repr(keyid[:12])
