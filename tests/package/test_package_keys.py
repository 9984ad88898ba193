"""Files of keys: private, whole, never overwritten; and what is no key is called none."""

import stat
import subprocess
import sys

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from penjing.errors import InputError, KeyFileError, OutputError
from penjing.package import keys


@pytest.mark.parametrize("kind", keys.KINDS)
@pytest.mark.parametrize("secret", [None, "grüne Bäume"])
def test_made_to_be_read(tmp_path, kind, secret):
    name = keys.keygen(tmp_path / "new" / "k", kind=kind, passphrase=secret)
    private, public = tmp_path / "new" / "k", tmp_path / "new" / "k.pub"
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert keys.needs_passphrase(private) == (secret is not None)
    if kind == "age":
        assert public.read_text().strip() == name
        assert str(keys.identities(private, secret)[0].to_public()) == name
    else:
        assert keys.public_key(public).keyid == name == keys.signing_key(private, secret).public_key.keyid


def test_under_a_passphrase_as_openssl_used_to_write_it(tmp_path):
    made = ec.generate_private_key(ec.SECP256R1())
    pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL
    (tmp_path / "k").write_bytes(made.private_bytes(pem, form, serialization.BestAvailableEncryption(b"pw")))
    assert keys.needs_passphrase(tmp_path / "k")
    assert keys.signing_key(tmp_path / "k", "pw").public_key.keytype == "ecdsa"


def test_private_whatever_the_umask_says(tmp_path):
    code = (
        "import os, sys; os.umask(0); from penjing.package import keys; "
        "[keys.keygen(f'{sys.argv[1]}/{k}', kind=k) for k in keys.KINDS]"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert {stat.S_IMODE((tmp_path / k).stat().st_mode) for k in keys.KINDS} == {0o600}


@pytest.mark.parametrize("taken", ["k", "k.pub"])
def test_never_overwritten(tmp_path, taken):
    (tmp_path / taken).write_text("precious")
    with pytest.raises(OutputError, match=f"{taken} exists, and keys are never overwritten"):
        keys.keygen(tmp_path / "k")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(taken, "precious")]


def test_never_through_a_link(tmp_path):
    (tmp_path / "k").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError):
        keys.keygen(tmp_path / "k")
    assert not (tmp_path / "elsewhere").exists()


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        keys.keygen(tmp_path / "file" / "k")


@pytest.mark.parametrize(
    ("kind", "secret", "says"), [("rsa", None, "no kind of key called 'rsa'"), ("age", "", "empty")]
)
def test_what_cannot_be_made(tmp_path, kind, secret, says):
    with pytest.raises(InputError, match=says):
        keys.keygen(tmp_path / "k", kind=kind, passphrase=secret)
    assert not list(tmp_path.iterdir())


def test_passphrases(tmp_path):
    keys.keygen(tmp_path / "k", passphrase="right")
    keys.keygen(tmp_path / "open")
    for given, says in ((None, "is under a passphrase"), ("wrong", "does not open")):
        with pytest.raises(KeyFileError, match=says):
            keys.signing_key(tmp_path / "k", given)
    with pytest.raises(KeyFileError, match="under no passphrase, and one was given"):
        keys.signing_key(tmp_path / "open", "right")


def test_the_wrong_half(tmp_path):
    keys.keygen(tmp_path / "k")
    keys.keygen(tmp_path / "a", kind="age")
    with pytest.raises(KeyFileError, match="is a private key") as caught:
        keys.public_key(tmp_path / "k")
    assert "k.pub" in caught.value.hint
    with pytest.raises(KeyFileError, match="no private key"):
        keys.signing_key(tmp_path / "k.pub")
    with pytest.raises(KeyFileError, match="no age identity"):
        keys.identities(tmp_path / "a.pub")


@pytest.mark.parametrize("data", [b"", b"hello", b"\xff\xfe\0", b"-----BEGIN PRIVATE KEY-----\nAAAA\n", b"x" * 70_000])
@pytest.mark.parametrize("read", [keys.signing_key, keys.public_key, keys.identities])
def test_what_is_no_key(tmp_path, data, read):
    (tmp_path / "k").write_bytes(data)
    with pytest.raises(KeyFileError):
        read(tmp_path / "k")


@pytest.mark.parametrize("read", [keys.signing_key, keys.public_key, keys.identities, keys.needs_passphrase])
def test_what_is_not_there(tmp_path, read):
    for path in (tmp_path / "k", tmp_path, "a\0b"):
        with pytest.raises(KeyFileError, match="cannot be read"):
            read(path)
