"""Who may talk to a cluster: nobody but those who have its certificates."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import socket
import ssl

import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from processes import (
    LOCAL,
    Faults,
    ended_at_last,
    finish,
    make_long_recipe,
    start,
    start_scheduler,
    start_worker,
    wait_for_commits,
    workers_of,
    write_recipe,
)
from support import all_bytes


def listening(pids):
    """Return the addresses on which processes of this machine listen."""
    found = psutil.net_connections("inet")
    return {(each.laddr.ip, each.laddr.port) for each in found if each.pid in pids and each.status == "LISTEN"}


def is_refused(port, *, tls):
    """Whether a stranger is cut off before a word of Dask's is spoken: without certificate, or without TLS."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as plain, contextlib.ExitStack() as stack:
        connection = plain
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            connection = stack.enter_context(context.wrap_socket(plain))
        else:
            connection.sendall(bytes(64))
        try:
            return connection.recv(1) == b""
        except (ssl.SSLError, ConnectionResetError):
            return True


def test_a_cluster_of_its_own_listens_on_loopback_to_those_with_its_certificate(tmp_path):
    recipe, out = write_recipe(make_long_recipe(**LOCAL), tmp_path / "recipe.yaml"), tmp_path / "run"
    faults = Faults(tmp_path / "faults")
    faults.stop_at(2, out)
    process = start(recipe, out, **faults.environment)
    with ended_at_last(process):
        wait_for_commits(process, out, 2)
        pids = {process.pid, *(worker.pid for worker in workers_of(process))}
        addresses = listening(pids)
        pages = {address for address in addresses if ask(address, "/health")}
        assert len(pids) == 3
        assert {ip for ip, _ in addresses} == {"127.0.0.1"}
        assert not any(b" 200 " in ask(address, f"/api/v1/{what}") for address in pages for what in COMMANDS)
        assert len(addresses - pages) >= 3, "the scheduler and two workers"
        for _, port in addresses - pages:
            assert is_refused(port, tls=True)
            assert is_refused(port, tls=False)


COMMANDS = ("get_workers", "retire_workers", "adaptive_target")


def ask(address, page):
    """Return the first line of an answer, empty where something else than HTTP is spoken."""
    with socket.create_connection(address, timeout=30) as connection:
        connection.sendall(f"GET {page} HTTP/1.0\r\n\r\n".encode())
        with contextlib.suppress(ConnectionResetError):
            line = connection.makefile("rb").readline()
            return line if line.startswith(b"HTTP") else b""
    return b""


def make_authority():
    key = ec.generate_private_key(ec.SECP256R1())
    return key, certificate("authority", key, key, is_authority=True)


def certificate(name, key, signed_by, *, is_authority=False):
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority")]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(signed_by, hashes.SHA256())
    )


def pem(thing):
    if isinstance(thing, x509.Certificate):
        return thing.public_bytes(serialization.Encoding.PEM)
    return thing.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


@pytest.fixture
def certificates(tmp_path):
    """Return the environment that docs/security.md tells to set."""
    folder = tmp_path / "certificates"
    folder.mkdir()
    authority_key, authority = make_authority()
    (folder / "ca.pem").write_bytes(pem(authority))
    settings = {"REQUIRE_ENCRYPTION": "True", "TLS__CA_FILE": str(folder / "ca.pem")}
    for role in ("scheduler", "worker", "client"):
        key = ec.generate_private_key(ec.SECP256R1())
        (folder / f"{role}.pem").write_bytes(pem(certificate(role, key, authority_key)))
        (folder / f"{role}.key").write_bytes(pem(key))
        settings[f"TLS__{role.upper()}__CERT"] = str(folder / f"{role}.pem")
        settings[f"TLS__{role.upper()}__KEY"] = str(folder / f"{role}.key")
    return {f"DASK_DISTRIBUTED__COMM__{key}": value for key, value in settings.items()}


@pytest.mark.slow
def test_a_cluster_with_certificates_of_ones_own_works_for_those_who_have_them(tmp_path, certificates):
    scheduler, address = start_scheduler("tls", **certificates)
    worker = start_worker(address, tmp_path / "scratch", **certificates)
    with ended_at_last(scheduler, worker):
        recipe = write_recipe(make_long_recipe(4, scheduler=address), tmp_path / "recipe.yaml")
        finish(recipe, tmp_path / "run", **certificates)
        assert is_refused(int(address.rpartition(":")[2]), tls=True)
        output = finish(recipe, tmp_path / "stranger", 1)
        assert f"{address} takes TLS only, and this process has no certificate for it" in output
        assert "Traceback" not in output
    finish(write_recipe(make_long_recipe(4), tmp_path / "one.yaml"), tmp_path / "one")
    assert all_bytes(tmp_path / "run") == all_bytes(tmp_path / "one")
