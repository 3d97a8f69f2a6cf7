"""infra/terraform as it stands: well-formed, and what it plans for prod.

What it does for dev, from `apply` to `destroy`, is in `test_terraform_life.py`.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from terraform_runner import SOURCE, TerraformRoot, local_aws, reason_to_skip

pytestmark = pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip())


@pytest.fixture(scope="module")
def aws_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with local_aws(tmp_path_factory.mktemp("aws") / "moto.log") as url:
        yield url


@pytest.fixture(scope="module")
def prod(aws_url: str, tmp_path_factory: pytest.TempPathFactory) -> TerraformRoot:
    root = TerraformRoot.copy_of("prod", tmp_path_factory.mktemp("prod") / "terraform", aws_url)
    root.init()
    return root


@pytest.fixture(scope="module")
def planned(prod: TerraformRoot) -> dict[str, dict[str, Any]]:
    """Address → planned values of every resource of prod, exactly as the files stand."""
    prod.run("plan", "-out=prod.tfplan")
    plan = json.loads(prod.run("show", "-json", "prod.tfplan").stdout)
    resources = _resources(plan["planned_values"]["root_module"])
    return {r["address"].removeprefix("module.platform."): r["values"] for r in resources}


@pytest.fixture(scope="module")
def unapplied(aws_url: str, tmp_path_factory: pytest.TempPathFactory) -> TerraformRoot:
    root = TerraformRoot.copy_of("dev", tmp_path_factory.mktemp("dev") / "terraform", aws_url)
    root.adapt_to_moto()
    root.init()
    return root


def test_every_file_is_formatted() -> None:
    command = ["terraform", "fmt", "-check", "-recursive", "-diff"]
    done = subprocess.run(command, cwd=SOURCE, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_both_environments_are_valid(prod: TerraformRoot, unapplied: TerraformRoot) -> None:
    for root in (prod, unapplied):
        answer = json.loads(root.run("validate", "-json").stdout)
        assert answer["diagnostics"] == []


def test_opening_the_kubernetes_api_to_everybody_is_refused(unapplied: TerraformRoot) -> None:
    everybody = '-var=kubernetes_api_cidrs=["0.0.0.0/0"]'
    assert "never the whole internet" in unapplied.run("plan", everybody, expected=1).stderr


def test_prod_keeps_the_kubernetes_api_private(planned: dict[str, dict[str, Any]]) -> None:
    [network] = planned["module.cluster.aws_eks_cluster.this"]["vpc_config"]
    assert (network["endpoint_private_access"], network["endpoint_public_access"]) == (True, False)


def test_prod_enforces_network_policies(planned: dict[str, dict[str, Any]]) -> None:
    plugin = planned["module.cluster.aws_eks_addon.network_plugin"]
    assert json.loads(plugin["configuration_values"]) == {"enableNetworkPolicy": "true"}


def test_prod_survives_a_zone_and_a_careless_destroy(planned: dict[str, dict[str, Any]]) -> None:
    database = planned["module.registry.aws_db_instance.this"]
    assert database["multi_az"]
    assert database["deletion_protection"]
    assert not database["skip_final_snapshot"]
    assert database["backup_retention_period"] == 30
    assert not planned["module.storage.aws_s3_bucket.this"]["force_destroy"]
    assert sum(address.startswith("module.network.aws_nat_gateway") for address in planned) == 3


def test_prod_is_encrypted_and_closed(planned: dict[str, dict[str, Any]]) -> None:
    assert planned["module.registry.aws_db_instance.this"]["storage_encrypted"]
    assert not planned["module.registry.aws_db_instance.this"]["publicly_accessible"]
    [encryption] = planned["module.cluster.aws_eks_cluster.this"]["encryption_config"]
    assert encryption["resources"] == ["secrets"]
    rules = [v for a, v in planned.items() if "security_group_ingress_rule" in a]
    assert rules
    assert not any(rule["cidr_ipv4"] or rule["cidr_ipv6"] for rule in rules)


def test_prod_gpu_nodes_accept_only_pods_that_ask_for_one(
    planned: dict[str, dict[str, Any]],
) -> None:
    gpu = planned['module.cluster.aws_eks_node_group.this["gpu"]']
    assert gpu["ami_type"] == "AL2023_x86_64_NVIDIA"
    assert gpu["labels"] == {"heliostat.io/pool": "gpu"}
    assert gpu["taint"] == [{"key": "nvidia.com/gpu", "value": "true", "effect": "NO_SCHEDULE"}]


def _resources(module: dict[str, Any]) -> Iterator[dict[str, Any]]:
    # An ephemeral resource has no values: it is never stored.
    yield from (r for r in module.get("resources", []) if "values" in r)
    for child in module.get("child_modules", []):
        yield from _resources(child)
