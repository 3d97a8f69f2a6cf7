"""infra/terraform's dev environment, alive on a local AWS: stable, closed, encrypted, destroyable.

It was applied, planned again, looked at through AWS's own API and destroyed in the background.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from dev_life import DEADLINE_S, Life
from kustomize import render
from terraform_runner import SOURCE

# The first of them may wait for the background program from its start to its deadline.
pytestmark = pytest.mark.timeout(DEADLINE_S + 60)
NAME = "heliostat-dev"
BUCKET = f"{NAME}-123456789012"
ANYWHERE = {"0.0.0.0/0", "::/0"}


def test_a_second_plan_changes_nothing(dev_life: Life) -> None:
    assert dev_life.second_plan_status == 0, dev_life.second_plan[-6000:]


def test_destroying_it_leaves_nothing(dev_life: Life) -> None:
    assert all(dev_life.living.values()), dev_life.living
    assert set(dev_life.left.values()) == {0}, dev_life.left


def test_the_kubernetes_overlay_names_what_was_made(dev_life: Life) -> None:
    overlay = json.dumps(render(SOURCE.parent / "kubernetes" / "overlays" / "dev"))
    overlay = overlay.replace("111122223333", "123456789012")
    for name in ("image_repository", "storage_url", "mlflow_artifacts_url", "vpc_cidr"):
        assert f'"{dev_life.outputs[name]}' in overlay, name
    for account, role in dev_life.outputs["service_account_roles"].items():
        assert f'"eks.amazonaws.com/role-arn": "{role}"' in overlay, account


def test_no_bucket_is_public_and_all_are_encrypted(dev_life: Life) -> None:
    assert list(dev_life.aws.buckets) == [BUCKET]
    for bucket in dev_life.aws.buckets.values():
        assert set(bucket["public_access_block"].values()) == {True}
        default = bucket["encryption"]["Rules"][0]["ApplyServerSideEncryptionByDefault"]
        assert default["SSEAlgorithm"] == "aws:kms"
        assert bucket["versioning"] == "Enabled"
        assert all("URI" not in grant["Grantee"] for grant in bucket["grants"])


def test_buckets_refuse_plain_http_and_allow_nobody(dev_life: Life) -> None:
    for bucket in dev_life.aws.buckets.values():
        [statement] = bucket["policy"]["Statement"]
        assert statement["Effect"] == "Deny"
        assert statement["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}


def test_no_security_group_is_open(dev_life: Life) -> None:
    groups = dev_life.aws.security_groups
    assert {group["GroupName"] for group in groups} >= {"default", f"{NAME}-database"}
    for group in groups:
        for rule in group["IpPermissions"]:
            sources = {r["CidrIp"] for r in rule["IpRanges"]}
            sources |= {r["CidrIpv6"] for r in rule["Ipv6Ranges"]}
            assert not sources & ANYWHERE, group["GroupName"]


def test_the_database_is_reached_by_its_clients_only(dev_life: Life) -> None:
    groups = {group["GroupName"]: group for group in dev_life.aws.security_groups}
    [rule] = groups[f"{NAME}-database"]["IpPermissions"]
    assert (rule["FromPort"], rule["ToPort"], rule["IpRanges"]) == (5432, 5432, [])
    [source] = rule["UserIdGroupPairs"]
    assert source["GroupId"] == groups[f"{NAME}-database-clients"]["GroupId"]
    assert groups["default"]["IpPermissions"] == []


def test_no_policy_allows_a_wildcard_action(dev_life: Life) -> None:
    policies = dict(dev_life.aws.policies())
    assert len(policies) >= 15
    for owner, policy in policies.items():
        for statement in policy["Statement"]:
            if statement["Effect"] == "Allow":
                assert "NotAction" not in statement, owner
                wild = [action for action in _listed(statement["Action"]) if "*" in action]
                assert wild == [], f"{owner} allows {wild}"


def test_each_role_of_a_workload_trusts_one_service_account(dev_life: Life) -> None:
    for name, arn in dev_life.outputs["service_account_roles"].items():
        [statement] = dev_life.aws.roles[arn.rsplit("/", 1)[1]]["trust"]["Statement"]
        conditions = statement["Condition"]["StringEquals"]
        assert f"system:serviceaccount:heliostat:{name}" in conditions.values()


def test_serving_can_read_packages_and_write_nothing(dev_life: Life) -> None:
    allowed = {
        action: statement["Resource"]
        for statement in dev_life.aws.roles[f"{NAME}-serving"]["inline"]["bucket"]["Statement"]
        for action in _listed(statement["Action"])
    }
    assert set(allowed) == {"s3:ListBucket", "s3:GetObject", "kms:Decrypt"}
    assert allowed["s3:GetObject"].endswith(f"{BUCKET}/platform/packages/*")


def test_the_database_is_encrypted_private_and_its_password_stays_out_of_the_state(
    dev_life: Life,
) -> None:
    [database] = dev_life.aws.databases
    assert database["StorageEncrypted"]
    assert not database["PubliclyAccessible"]
    secret = dev_life.aws.secrets[dev_life.outputs["database"]["password_secret_arn"]]
    assert secret["description"]["KmsKeyId"] == database["KmsKeyId"]
    assert len(secret["value"]) == 40
    assert secret["value"] not in dev_life.state


def test_nodes_have_encrypted_disks_and_guarded_metadata(dev_life: Life) -> None:
    templates = dev_life.aws.launch_templates
    assert set(templates) == {f"{NAME}-cpu", f"{NAME}-gpu"}
    for template in templates.values():
        assert all(device["Ebs"]["Encrypted"] for device in template["BlockDeviceMappings"])
        assert template["MetadataOptions"]["HttpTokens"] == "required"
        assert template["MetadataOptions"]["HttpPutResponseHopLimit"] == 1


def test_the_cluster_encrypts_its_secrets_and_keeps_an_audit_log(dev_life: Life) -> None:
    cluster = dev_life.aws.clusters[NAME]
    assert cluster["encryptionConfig"][0]["resources"] == ["secrets"]
    [logging] = [entry for entry in cluster["logging"]["clusterLogging"] if entry["enabled"]]
    assert "audit" in logging["types"]


def test_image_tags_are_immutable_scanned_and_encrypted(dev_life: Life) -> None:
    [repository] = dev_life.aws.image_repositories
    assert repository["imageTagMutability"] == "IMMUTABLE"
    assert repository["imageScanningConfiguration"]["scanOnPush"]
    assert repository["encryptionConfiguration"]["encryptionType"] == "KMS"


def test_every_key_is_rotated(dev_life: Life) -> None:
    keys = dev_life.aws.keys.values()
    own = [key for key in keys if key["metadata"]["KeyManager"] == "CUSTOMER"]
    assert len(own) >= 4
    assert all(key["is_rotated"] for key in own)


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else value
