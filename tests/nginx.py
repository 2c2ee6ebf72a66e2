"""Debian's nginx in front of a hub, as an ingress: it speaks TLS, and passes websockets on or does not."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from processes import clean_environment, end_now, free_port, start_process
from tool import wait_until

PLACES = "".join(
    f"{kind}_temp_path {kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
)  # below the folder, where nginx may write
HOST = "proxy_set_header Host $http_host;"
UPGRADES = """
proxy_set_header Upgrade $http_upgrade;
proxy_set_header Connection "upgrade";
"""
CONFIGURATION = """
daemon off;
master_process off;
pid nginx.pid;
error_log stderr;
events {{}}
http {{
    {places}
    access_log access.log;
    server {{
        listen 127.0.0.1:{port} ssl;
        ssl_certificate {pem};
        ssl_certificate_key {key_pem};
        location / {{
            proxy_pass {upstream};
            proxy_http_version 1.1;
            {host}
            proxy_set_header X-Forwarded-Proto https;
            proxy_buffering off;
            {upgrades}
        }}
        {more}
    }}
}}
"""


def certificate_for_loopback(folder: Path) -> tuple[Path, Path]:
    """The files of a certificate, which is its own authority, for 127.0.0.1, and of its key."""
    pem, key_pem = folder / "ca.pem", folder / "key.pem"
    words = "-newkey rsa:2048 -nodes -subj /CN=authority -addext subjectAltName=IP:127.0.0.1"
    command = ["openssl", "req", "-x509", *words.split(), "-out", pem, "-keyout", key_pem]
    subprocess.run(command, check=True, capture_output=True)
    return pem, key_pem


@contextlib.contextmanager
def nginx(
    upstream: str, folder: Path, upgrades: bool = True, host: bool = True, more: str = ""
) -> Iterator[tuple[str, Path]]:
    """The URL at which it stands before the upstream (a URL), and the file of the authority that makes it known.

    It passes on upgrades and the Host header, or does not; `more` are further lines for its server.
    """
    port = free_port()
    pem, key_pem = certificate_for_loopback(folder)
    given = {"places": PLACES, "port": port, "pem": pem, "key_pem": key_pem, "upgrades": UPGRADES if upgrades else ""}
    given |= {"host": HOST if host else "", "more": more}
    configuration = folder / "nginx.conf"
    configuration.write_text(CONFIGURATION.format(upstream=upstream.rstrip("/"), **given))
    ends_with_us = ["setpriv", "--pdeathsig", "KILL"]
    command = [*ends_with_us, "/usr/sbin/nginx", "-p", str(folder), "-c", str(configuration), "-e", "stderr"]
    process = start_process(command, clean_environment(), folder / "nginx.log")

    def listens() -> bool:
        assert process.poll() is None, (folder / "nginx.log").read_text(errors="replace")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return True
        return False

    try:
        wait_until(listens)
        yield f"https://127.0.0.1:{port}/", pem
    finally:
        end_now(process)
