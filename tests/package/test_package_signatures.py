"""Signatures: what was signed is told as it was, and everything that is wrong is named for what it is."""

import base64
import hashlib
import json
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from model_signing import verifying
from securesystemslib.dsse import Envelope

from penjing.digests import digest
from penjing.errors import InputError, KeyFileError, PackageError, SignatureError
from penjing.package import encode, keys, layout, openssf, provenance, sealing, signatures, write

NOW = datetime(2027, 3, 1, tzinfo=UTC)
HISTORY = [
    {"event": "capture", "torch": "2.13", "notes": []},
    {"event": "step", "name": "PruneChannels", "settings": {"ratio": 0.5}, "seed": 2**60 + 1, "before": "a" * 64},
    {"event": "step", "name": "Quantize", "settings": {"weights": "int8"}, "seed": 0, "before": "b" * 64},
]
TOPOLOGY = json.dumps({"name": "net", "history": HISTORY})
ARRAYS = {"w": np.arange(600, dtype=np.float32).reshape(20, 30), "q": np.arange(100, dtype=np.int8)}


@pytest.fixture(scope="module")
def ring(tmp_path_factory):
    """Keys of a maker, of a stranger, and of one whose key is under a passphrase."""
    folder = tmp_path_factory.mktemp("ring")
    for name in ("maker", "stranger"):
        keys.keygen(folder / name)
    keys.keygen(folder / "curve", kind="p256", passphrase="pw")
    return folder


@pytest.fixture
def net(tmp_path):
    write(tmp_path / "net.penjing", TOPOLOGY, ARRAYS, metadata={"name": "net"})
    return tmp_path / "net.penjing"


@pytest.fixture
def bundle(tmp_path):
    folder = tmp_path / "bundle"
    write(folder / "network.penjing", TOPOLOGY, ARRAYS)
    (folder / "network.onnx").write_bytes(b"graph")
    (folder / "report.json").write_text(json.dumps(report()))
    return folder


def report(of=None):
    return {
        "schema": 1,
        "network": {"digest": of or digest(TOPOLOGY, ARRAYS), "baseline_digest": "a" * 64},
        "baseline": {"metric": {"value": 0.9}},
        "result": {"metric": {"value": 0.89}, "latency_ms": {"p50": 1.5}},
        "verdict": {"met": True, "constraints": []},
    }


def forged(ring, path, *, payload=None, payload_type=signatures.PAYLOAD_TYPE, key="maker", change=None):
    """A signature that the maker's key really made, of whatever was put into it."""
    place = signatures.sign(path, ring / "maker")
    statement = json.loads(base64.b64decode(json.loads(place.read_text())["payload"]))
    if change:
        change(statement)
    data = json.dumps(statement).encode() if payload is None else payload
    envelope = Envelope(data, payload_type, {})
    envelope.sign(keys.signing_key(ring / key))
    place.write_text(json.dumps(envelope.to_dict()))
    return place


# -------------------------------------------------------------------------------------------------- what is signed
def test_a_package(ring, net):
    place = signatures.sign(net, ring / "maker", release=7, expires=NOW)
    assert place == net.with_name("net.penjing.dsse.json")
    before = net.read_bytes()
    signed = signatures.verify(net, [ring / "maker.pub"], at_least=7, now=NOW - timedelta(seconds=1))
    assert net.read_bytes() == before
    assert (signed.release, signed.expires) == (7, NOW)
    assert signed.key == keys.public_key(ring / "maker.pub").keyid
    assert signed.files == {"net.penjing": hashlib.sha256(before).hexdigest()}
    said = signed.predicate
    assert said["package"]["digest"] == layout.parse_header(before).digest.hex()
    assert said["package"]["bytes"] == len(before) and said["package"]["sealed"] is False
    assert said["network"] == {"name": "net", "digest": digest(TOPOLOGY, ARRAYS), "original": "a" * 64}
    assert said["history"] == provenance.read(net).to_dict()["links"]
    assert said["history"][1]["seed"] == 2**60 + 1


def test_the_envelope_is_one_that_others_read(ring, net):
    """DSSE v1 and in-toto Statement v1 by the letter of their specifications, checked without our reader."""
    envelope = json.loads(signatures.sign(net, ring / "maker").read_text())
    assert set(envelope) == {"payload", "payloadType", "signatures"}
    payload = base64.b64decode(envelope["payload"], validate=True)
    kind = envelope["payloadType"].encode()
    assert kind == b"application/vnd.in-toto+json"
    pae = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
    public = keys.serialization.load_pem_public_key((ring / "maker.pub").read_bytes())
    public.verify(base64.b64decode(envelope["signatures"][0]["sig"], validate=True), pae)
    statement = json.loads(payload)
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == signatures.PREDICATE_TYPE
    (subject,) = statement["subject"]
    assert subject["name"] == "net.penjing" and set(subject["digest"]) == {"sha256", "penjing"}


def test_the_same_signature_twice(ring, net):
    """ed25519 is deterministic, and the statement holds no time of its making."""
    first = signatures.sign(net, ring / "maker").read_bytes()
    assert signatures.sign(net, ring / "maker").read_bytes() == first


def test_parents_and_measurements(ring, net, tmp_path):
    write(tmp_path / "parent.penjing", '{"name": "parent"}', {"w": ARRAYS["w"]})
    (tmp_path / "report.json").write_text(json.dumps(report()))
    signatures.sign(net, ring / "maker", report=tmp_path / "report.json", parents=[tmp_path / "parent.penjing"])
    said = signatures.verify(net, [ring / "maker.pub"]).predicate
    (parent,) = said["parents"]
    data = (tmp_path / "parent.penjing").read_bytes()
    assert parent["name"] == "parent.penjing"
    assert parent["digest"] == {
        "sha256": hashlib.sha256(data).hexdigest(),
        "penjing": layout.parse_header(data).digest.hex(),
        "penjing-network": digest('{"name": "parent"}', {"w": ARRAYS["w"]}),
    }
    assert said["measurements"]["result"]["latency_ms"] == {"p50": 1.5}
    assert said["measurements"]["verdict"]["met"] is True
    text = (tmp_path / "report.json").read_bytes()
    assert said["measurements"]["report"] == {"sha256": hashlib.sha256(text).hexdigest()}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"network": 3}', '{"network": {"digest": NaN}}', json.dumps(report("c" * 64))]
)
def test_reports_that_cannot_be_signed(ring, net, tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(InputError, match=r"is no report\.json|is the report of another network"):
        signatures.sign(net, ring / "maker", report=tmp_path / "report.json")
    assert not signatures.beside(net).exists()


def test_a_bundle_with_all_its_files(ring, bundle):
    place = signatures.sign(bundle, ring / "maker", release=2)
    assert place == bundle.with_name("bundle.dsse.json") and len(list(bundle.iterdir())) == 3
    signed = signatures.verify(bundle, [ring / "maker.pub"])
    assert set(signed.files) == {"network.penjing", "network.onnx", "report.json"}
    assert signed.predicate["measurements"]["baseline"]["metric"]["value"] == 0.9
    alone = signatures.verify(bundle / "network.penjing", [ring / "maker.pub"], signature=place)
    assert alone == signed


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda b: (b / "network.onnx").write_bytes(b"grapf"), "network.onnx in .* is not what was signed"),
        (lambda b: (b / "network.onnx").unlink(), "network.onnx in .* was signed, and is missing"),
        (lambda b: (b / "more.txt").write_text(""), "holds more.txt, which was not signed"),
        (lambda b: ((b / "in").mkdir(), (b / "in" / "x").write_text("")), "holds in/x, which was not signed"),
    ],
)
def test_changed_bundles(ring, bundle, change, says):
    signatures.sign(bundle, ring / "maker")
    change(bundle)
    with pytest.raises(SignatureError, match=says):
        signatures.verify(bundle, [ring / "maker.pub"])


def test_a_link_to_a_folder_is_not_passed_over(ring, bundle, tmp_path):
    signatures.sign(bundle, ring / "maker")
    (bundle / "in").symlink_to(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        signatures.verify(bundle, [ring / "maker.pub"])


def test_a_sealed_package_tells_nothing_that_its_seal_hides(ring, net, tmp_path):
    who = keys.keygen(tmp_path / "reader", kind="age")
    sealing.encrypt(net, tmp_path / "sealed.penjing", [who])
    place = signatures.sign(tmp_path / "sealed.penjing", ring / "maker")
    said = signatures.verify(tmp_path / "sealed.penjing", [ring / "maker.pub"]).predicate
    assert said["package"]["sealed"] is True and set(said) == {"package", "penjing", "release"}
    assert b"PruneChannels" not in base64.b64decode(json.loads(place.read_text())["payload"])


def test_a_signature_outlives_sealing(ring, net, tmp_path):
    """Decrypting gives the same bytes, so what was signed before still is."""
    place = signatures.sign(net, ring / "maker")
    who = keys.keygen(tmp_path / "reader", kind="age")
    sealing.encrypt(net, tmp_path / "sealed.penjing", [who])
    sealing.decrypt(tmp_path / "sealed.penjing", tmp_path / "again.penjing", tmp_path / "reader")
    assert signatures.verify(tmp_path / "again.penjing", [ring / "maker.pub"], signature=place).release == 1


# ------------------------------------------------------------------------------------------------------ what is wrong
def test_another_key(ring, net):
    signatures.sign(net, ring / "maker")
    with pytest.raises(SignatureError, match="is by another key") as caught:
        signatures.verify(net, [ring / "stranger.pub"])
    assert keys.public_key(ring / "maker.pub").keyid[:12] in caught.value.message
    assert signatures.verify(net, [ring / "stranger.pub", ring / "maker.pub"]).release == 1
    with pytest.raises(InputError, match="no key was given"):
        signatures.verify(net, [])


def test_a_key_id_proves_nothing(ring, net):
    """The stranger signs under the maker's key id."""
    place = forged(ring, net, key="stranger")
    envelope = json.loads(place.read_text())
    envelope["signatures"][0]["keyid"] = keys.public_key(ring / "maker.pub").keyid
    place.write_text(json.dumps(envelope))
    with pytest.raises(SignatureError, match="does not match its own text"):
        signatures.verify(net, [ring / "maker.pub"])


def test_another_package(ring, net):
    signatures.sign(net, ring / "maker")
    net.write_bytes(encode(TOPOLOGY, {**ARRAYS, "q": ARRAYS["q"] + 1}, metadata={"name": "net"}))
    with pytest.raises(SignatureError, match="is not what was signed"):
        signatures.verify(net, [ring / "maker.pub"])


def test_a_damaged_package(ring, net):
    signatures.sign(net, ring / "maker")
    data = bytearray(net.read_bytes())
    data[-1] ^= 1
    net.write_bytes(data)
    with pytest.raises(PackageError, match=r"part \d .* does not match its SHA-256"):
        signatures.verify(net, [ring / "maker.pub"])
    net.write_bytes(data[:-1])
    with pytest.raises(PackageError, match="cut short"):
        signatures.verify(net, [ring / "maker.pub"])
    net.unlink()
    with pytest.raises(InputError, match="there is no file"):
        signatures.verify(net, [ring / "maker.pub"])


def test_rollback(ring, net):
    signatures.sign(net, ring / "maker", release=4)
    with pytest.raises(SignatureError, match="is release 4, and at least 5 is asked for"):
        signatures.verify(net, [ring / "maker.pub"], at_least=5)
    assert signatures.verify(net, [ring / "maker.pub"], at_least=4).release == 4


def test_expired(ring, net):
    signatures.sign(net, ring / "maker", expires=NOW)
    with pytest.raises(SignatureError, match="expired on 2027-03-01 00:00 UTC"):
        signatures.verify(net, [ring / "maker.pub"], now=NOW)


def test_a_change_of_release_or_time_is_seen(ring, net):
    place = signatures.sign(net, ring / "maker", release=4, expires=NOW)
    envelope = json.loads(place.read_text())
    text = base64.b64decode(envelope["payload"]).replace(b'"release":4', b'"release":9').replace(b"2027", b"2099")
    place.write_text(json.dumps({**envelope, "payload": base64.b64encode(text).decode()}))
    with pytest.raises(SignatureError, match="does not match its own text: it was changed"):
        signatures.verify(net, [ring / "maker.pub"])


@pytest.mark.parametrize("release", [-1, 1.5, True, "2", 2**53])
def test_releases_that_are_none(ring, net, release):
    with pytest.raises(InputError, match="the release must be a whole number"):
        signatures.sign(net, ring / "maker", release=release)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b"[" * 100_000,
        b"9" * 10_000,
        b"{}",
        b'{"payload": "", "payloadType": "application/vnd.in-toto+json"}',
        b'{"payload": 3, "payloadType": "t", "signatures": []}',
        b'{"payload": "?", "payloadType": "t", "signatures": []}',
        b'{"payload": "", "payloadType": 3, "signatures": []}',
        b'{"payload": "", "payloadType": "t", "signatures": 3}',
        b'{"payload": "", "payloadType": "t", "signatures": [3]}',
        b'{"payload": "", "payloadType": "t", "signatures": [{}]}',
        b'{"payload": "", "payloadType": "t", "signatures": [{"sig": "?", "keyid": "a"}]}',
        b'{"payload": "", "payloadType": "t", "signatures": [{"sig": "", "keyid": ["a"]}]}',
        b'{"payload": "", "payloadType": "t", "signatures": [{"sig": "", "keyid": "a"}, {"sig": "", "keyid": "a"}]}',
        b'{"payload": "\\ud800", "payloadType": "\\ud800", "signatures": []}',
        b"\x89PJG\r\n\x1a\n",
    ],
)
def test_what_is_no_envelope(ring, net, text):
    signatures.beside(net).write_bytes(text)
    with pytest.raises(SignatureError, match="is no DSSE envelope"):
        signatures.verify(net, [ring / "maker.pub"])


def test_an_endless_envelope(ring, net):
    with signatures.beside(net).open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(SignatureError, match="is no DSSE envelope"):
        signatures.verify(net, [ring / "maker.pub"])


def test_an_envelope_without_signatures(ring, net):
    place = signatures.sign(net, ring / "maker")
    place.write_text(json.dumps({**json.loads(place.read_text()), "signatures": []}))
    with pytest.raises(SignatureError, match=r"by another key \(none\)"):
        signatures.verify(net, [ring / "maker.pub"])


def test_no_signature(ring, net):
    with pytest.raises(SignatureError, match="there is no signature"):
        signatures.verify(net, [ring / "maker.pub"])


def test_another_payload_type(ring, net):
    forged(ring, net, payload_type="text/plain")
    with pytest.raises(SignatureError, match="signs 'text/plain', not 'application/vnd.in-toto"):
        signatures.verify(net, [ring / "maker.pub"])
    place = signatures.sign(net, ring / "maker")
    place.write_text(json.dumps({**json.loads(place.read_text()), "payloadType": "\x1b[31m" * 100}))
    with pytest.raises(SignatureError) as caught:
        signatures.verify(net, [ring / "maker.pub"])
    assert "\x1b" not in caught.value.message and len(caught.value.message) < 1000


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.update(predicateType="https://slsa.dev/provenance/v1"), "statement of type 'https://slsa.dev"),
        (lambda s: s.update(_type="https://in-toto.io/Statement/v0.1"), "no in-toto statement"),
        (lambda s: s.update(subject=[]), "no in-toto statement"),
        (lambda s: s.update(subject=[{"name": "net.penjing"}]), "no in-toto statement"),
        (lambda s: s.update(subject="net.penjing"), "no in-toto statement"),
        (lambda s: s.pop("predicate"), "no in-toto statement"),
        (lambda s: s.update(predicate=[1]), "no in-toto statement"),
        (lambda s: s["predicate"].pop("release"), "lacks its release or time"),
        (lambda s: s["predicate"].update(release=True), "lacks its release or time"),
        (lambda s: s["predicate"].update(release=1e400), "no in-toto statement|lacks its release"),
        (lambda s: s["predicate"].update(expires="soon"), "lacks its release or time"),
        (lambda s: s["predicate"].update(expires=4), "lacks its release or time"),
        (lambda s: s["subject"][0]["digest"].pop("sha256"), "is not what was signed"),
        (lambda s: s["subject"][0]["digest"].update(sha256="0" * 64), "is not what was signed"),
    ],
)
def test_statements_by_the_right_key_that_say_the_wrong_thing(ring, net, change, says):
    forged(ring, net, change=change)
    with pytest.raises(SignatureError, match=says):
        signatures.verify(net, [ring / "maker.pub"])


@pytest.mark.parametrize("payload", [b"", b"hello", b"\xff", b"[]", b"null", b"[" * 100_000, b'{"_type": 3}'])
def test_payloads_that_are_no_statement(ring, net, payload):
    forged(ring, net, payload=payload)
    with pytest.raises(SignatureError, match="no in-toto statement"):
        signatures.verify(net, [ring / "maker.pub"])


def test_what_comes_later_in_a_statement_is_no_hindrance(ring, net):
    forged(ring, net, change=lambda s: (s.update(more=1), s["predicate"].update(more=[1]), s["subject"][0].update(x=1)))
    assert signatures.verify(net, [ring / "maker.pub"]).predicate["more"] == [1]


def test_packages_that_cannot_say_who_they_are(ring, tmp_path):
    for topology in ("no JSON", "[]", '{"history": 3}', '{"history": [3]}', '{"name": "\\ud800"}'):
        write(tmp_path / "net.penjing", topology, {})
        with pytest.raises((PackageError, InputError)):
            signatures.sign(tmp_path / "net.penjing", ring / "maker")
        assert [p.name for p in tmp_path.iterdir()] == ["net.penjing"]


# ------------------------------------------------------------------------------------------------------------ OpenSSF
def test_openssf_by_its_own_verifier(ring, net, bundle):
    for what in (net, bundle):
        place = openssf.sign(what, ring / "curve", passphrase="pw")
        assert place == what.with_name(what.name + ".sig")
        verifier = verifying.Config().use_elliptic_key_verifier(public_key=ring / "curve.pub")
        verifier.verify(what, place)
        changed = what / "network.onnx" if what.is_dir() else what
        changed.write_bytes(changed.read_bytes() + b"x")
        verifier = verifying.Config().use_elliptic_key_verifier(public_key=ring / "curve.pub")
        with pytest.raises(ValueError, match="mismatch"):
            verifier.verify(what, place)


def test_openssf_takes_other_keys(ring, net):
    with pytest.raises(KeyFileError, match="no key that model-signing takes") as caught:
        openssf.sign(net, ring / "maker")
    assert "--kind p256" in caught.value.hint
    with pytest.raises(KeyFileError, match="passphrase"):
        openssf.sign(net, ring / "curve")
    with pytest.raises(InputError, match="there is no file"):
        openssf.sign(net.with_name("nothing"), ring / "curve", passphrase="pw")


def test_a_curve_signs_the_statement_too(ring, net):
    signatures.sign(net, ring / "curve", passphrase="pw")
    assert signatures.verify(net, [ring / "curve.pub"]).release == 1
