"""Runs Terraform on a copy of `infra/terraform` against a local AWS (moto_server).

Everything Terraform writes lies in the copy. Knows nothing of what is asserted.

    with local_aws() as url:
        root = TerraformRoot.copy_of("dev", directory, url)
        root.init()
        root.run("apply", "-auto-approve")
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from aws_state import REGION, client

SOURCE = Path(__file__).parents[2] / "infra" / "terraform"
STATE_BUCKET = "heliostat-terraform-state"

# What moto 5.2 cannot do. Addresses in moto are paths, it has no EKS add-ons, and it answers some
# questions with less (access_config, cluster security group) or more (remote_access, tags of the
# template itself) than was set. The plan of prod, made without this, covers these fields.
_ENVIRONMENT_OVERRIDE = """
provider "aws" {
  s3_use_path_style = true
}
"""
_CLUSTER_OVERRIDE = """
resource "aws_eks_addon" "network_plugin" {
  count = 0
}

resource "aws_eks_addon" "proxy" {
  count = 0
}

resource "aws_eks_addon" "dns" {
  count = 0
}

resource "aws_eks_cluster" "this" {
  lifecycle {
    ignore_changes = [access_config]
  }
}

resource "aws_eks_node_group" "this" {
  lifecycle {
    ignore_changes = [remote_access, scaling_config[0].desired_size]
  }
}

resource "aws_launch_template" "node" {
  lifecycle {
    ignore_changes = [tag_specifications, vpc_security_group_ids]
  }
}
"""
_BACKEND = f"""
bucket         = "{STATE_BUCKET}"
region         = "{REGION}"
use_path_style = true
"""


@dataclass(frozen=True)
class TerraformRoot:
    """One environment's root module in a private copy of the tree."""

    directory: Path
    aws_url: str

    @classmethod
    def copy_of(cls, environment: str, directory: Path, aws_url: str) -> TerraformRoot:
        shutil.copytree(
            SOURCE, directory, ignore=shutil.ignore_patterns(".terraform*", "*.tfstate*")
        )
        return cls(directory / "envs" / environment, aws_url)

    def adapt_to_moto(self) -> None:
        (self.directory / "moto_override.tf").write_text(_ENVIRONMENT_OVERRIDE)
        cluster = self.directory.parents[1] / "modules" / "cluster"
        (cluster / "moto_override.tf").write_text(_CLUSTER_OVERRIDE)

    def init(self) -> None:
        (self.directory / "backend.hcl").write_text(_BACKEND)
        plugins = plugin_directory()
        mirror = [f"-plugin-dir={plugins}"] if plugins else []
        self.run("init", "-backend-config=backend.hcl", *mirror)

    def run(self, *arguments: str, expected: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Run Terraform and check its exit status, unless None is expected."""
        command = ["terraform", *arguments]
        if arguments[0] not in ("fmt", "show", "output", "validate"):
            command += ["-input=false", "-no-color"]
        done = subprocess.run(
            command, cwd=self.directory, env=self._environment(), capture_output=True, text=True
        )
        assert expected in (done.returncode, None), (
            f"terraform {' '.join(arguments)} ended with {done.returncode}, expected {expected}:\n"
            f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
        )
        return done

    def _environment(self) -> dict[str, str]:
        dropped = ("TF_", "AWS_")  # a user's own credentials and settings have no business here
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
        return {
            **inherited,
            "TF_IN_AUTOMATION": "1",
            "TF_DATA_DIR": str(self.directory / ".terraform"),
            "CHECKPOINT_DISABLE": "1",
            "AWS_ENDPOINT_URL": self.aws_url,
            "AWS_ENDPOINT_URL_S3": self.aws_url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@functools.cache
def reason_to_skip() -> str:
    """Why Terraform cannot run on this machine; empty if it can."""
    if shutil.which("terraform") is None:
        return "Terraform is not installed"
    if plugin_directory() is None and not _registry_answers():
        return "Terraform is not installed with its AWS provider, nor is there a network"
    return ""


def plugin_directory() -> Path | None:
    """A local mirror of providers, or None: then `init` asks the public registry."""
    named = os.environ.get("HELIOSTAT_TERRAFORM_PLUGINS")
    found = [Path(named)] if named else sorted(Path("/").glob("*/tf-plugins"))
    return found[0] if found else None


def _registry_answers() -> bool:
    try:
        urllib.request.urlopen("https://registry.terraform.io/", timeout=5).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def local_aws(log: Path) -> Iterator[str]:
    """A moto_server on a free port, with a bucket for states; its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            env={**os.environ, "MOTO_IAM_LOAD_MANAGED_POLICIES": "true"},
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
        try:
            _wait_until_answering(url, process, log)
            client(url, "s3").create_bucket(
                Bucket=STATE_BUCKET, CreateBucketConfiguration={"LocationConstraint": REGION}
            )
            yield url
        finally:
            process.terminate()
            process.wait(timeout=10)


def _wait_until_answering(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"{url}/moto-api/data.json", timeout=2).close()
            return
        except OSError:
            assert process.poll() is None, f"moto_server ended:\n{log.read_text()[-2000:]}"
            assert time.monotonic() < deadline, "moto_server did not answer within 60 s"
            time.sleep(0.1)
