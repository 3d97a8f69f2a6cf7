"""What an AWS account holds, asked through AWS's own API and kept as plain data.

Knows nothing of Terraform nor of what the answers should be.

    state = look(url)
    state.databases[0]["StorageEncrypted"]
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import boto3

Answer = dict[str, Any]
REGION = "eu-central-1"
_OWN_NETWORKS = [{"Name": "tag:project", "Values": ["heliostat"]}]


@dataclass(frozen=True)
class AwsState:
    """AWS's answers, by name where there is one; policies are parsed."""

    buckets: dict[str, Answer]
    security_groups: list[Answer]
    """Those of our own networks."""
    roles: dict[str, Answer]
    """Name → trust (a policy), inline (name → policy), attached (ARN → policy)."""
    keys: dict[str, Answer]
    """Id → metadata, policy and, where it is ours, is_rotated."""
    databases: list[Answer]
    secrets: dict[str, Answer]
    """ARN → description, value."""
    launch_templates: dict[str, Answer]
    clusters: dict[str, Answer]
    image_repositories: list[Answer]

    def policies(self) -> Iterator[tuple[str, Answer]]:
        """Every policy in force: of roles (trust, inline, attached) and keys."""
        for name, role in self.roles.items():
            yield f"trust of {name}", role["trust"]
            for policy, document in (role["inline"] | role["attached"]).items():
                yield f"{name}/{policy}", document
        for key_id, key in self.keys.items():
            yield f"key {key_id}", key["policy"]


def client(url: str, service: str) -> Any:
    """A boto3 client of a local AWS."""
    return boto3.client(
        service,
        endpoint_url=url,
        region_name=REGION,
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )


def look(url: str, *, except_buckets: tuple[str, ...] = ()) -> AwsState:
    """Ask for everything that a test may want to know."""
    eks = client(url, "eks")
    return AwsState(
        buckets={name: _bucket(url, name) for name in _buckets(url, except_buckets)},
        security_groups=_security_groups(url),
        roles=_roles(url),
        keys=_keys(url),
        databases=client(url, "rds").describe_db_instances()["DBInstances"],
        secrets=_secrets(url),
        launch_templates=_launch_templates(url),
        clusters={
            name: eks.describe_cluster(name=name)["cluster"]
            for name in eks.list_clusters()["clusters"]
        },
        image_repositories=client(url, "ecr").describe_repositories()["repositories"],
    )


def count(url: str, *, except_buckets: tuple[str, ...] = ()) -> dict[str, int]:
    """How many of each kind there are, of those that cost money or hold data."""
    ec2, kms = client(url, "ec2"), client(url, "kms")
    keys = [kms.describe_key(KeyId=key["KeyId"]) for key in kms.list_keys()["Keys"]]
    return {
        "buckets": len(_buckets(url, except_buckets)),
        "networks": len(_network_ids(url)),
        "addresses": len(ec2.describe_addresses()["Addresses"]),
        "clusters": len(client(url, "eks").list_clusters()["clusters"]),
        "databases": len(client(url, "rds").describe_db_instances()["DBInstances"]),
        "secrets": len(client(url, "secretsmanager").list_secrets()["SecretList"]),
        "image repositories": len(client(url, "ecr").describe_repositories()["repositories"]),
        "roles": len(client(url, "iam").list_roles()["Roles"]),
        "enabled keys": sum(key["KeyMetadata"]["Enabled"] for key in keys),
    }


def _buckets(url: str, left_out: tuple[str, ...]) -> list[str]:
    names = [bucket["Name"] for bucket in client(url, "s3").list_buckets()["Buckets"]]
    return [name for name in names if name not in left_out]


def _bucket(url: str, name: str) -> Answer:
    s3 = client(url, "s3")
    block = s3.get_public_access_block(Bucket=name)["PublicAccessBlockConfiguration"]
    encryption = s3.get_bucket_encryption(Bucket=name)["ServerSideEncryptionConfiguration"]
    return {
        "public_access_block": block,
        "encryption": encryption,
        "versioning": s3.get_bucket_versioning(Bucket=name)["Status"],
        "grants": s3.get_bucket_acl(Bucket=name)["Grants"],
        "policy": json.loads(s3.get_bucket_policy(Bucket=name)["Policy"]),
    }


def _network_ids(url: str) -> list[str]:
    networks = client(url, "ec2").describe_vpcs(Filters=_OWN_NETWORKS)["Vpcs"]
    return [network["VpcId"] for network in networks]


def _security_groups(url: str) -> list[Answer]:
    own = [{"Name": "vpc-id", "Values": _network_ids(url)}]
    return client(url, "ec2").describe_security_groups(Filters=own)["SecurityGroups"]


def _roles(url: str) -> dict[str, Answer]:
    iam = client(url, "iam")
    roles = {}
    for role in iam.list_roles()["Roles"]:
        name = role["RoleName"]
        inline = iam.list_role_policies(RoleName=name)["PolicyNames"]
        attached = iam.list_attached_role_policies(RoleName=name)["AttachedPolicies"]
        roles[name] = {
            "trust": _document(role["AssumeRolePolicyDocument"]),
            "inline": {policy: _inline(iam, name, policy) for policy in inline},
            "attached": {p["PolicyArn"]: _attached(iam, p["PolicyArn"]) for p in attached},
        }
    return roles


def _inline(iam: Any, role: str, policy: str) -> Answer:
    found = iam.get_role_policy(RoleName=role, PolicyName=policy)
    return _document(found["PolicyDocument"])


def _attached(iam: Any, arn: str) -> Answer:
    version = iam.get_policy(PolicyArn=arn)["Policy"]["DefaultVersionId"]
    found = iam.get_policy_version(PolicyArn=arn, VersionId=version)["PolicyVersion"]
    return _document(found["Document"])


def _document(value: str | Answer) -> Answer:
    return json.loads(unquote(value)) if isinstance(value, str) else value


def _keys(url: str) -> dict[str, Answer]:
    kms = client(url, "kms")
    keys: dict[str, Answer] = {}
    for key_id in [key["KeyId"] for key in kms.list_keys()["Keys"]]:
        metadata = kms.describe_key(KeyId=key_id)["KeyMetadata"]
        policy = kms.get_key_policy(KeyId=key_id, PolicyName="default")["Policy"]
        keys[key_id] = {"metadata": metadata, "policy": json.loads(policy)}
        if metadata["KeyManager"] == "CUSTOMER":
            rotation = kms.get_key_rotation_status(KeyId=key_id)
            keys[key_id]["is_rotated"] = rotation["KeyRotationEnabled"]
    return keys


def _secrets(url: str) -> dict[str, Answer]:
    secrets = client(url, "secretsmanager")
    return {
        secret["ARN"]: {
            "description": secrets.describe_secret(SecretId=secret["ARN"]),
            "value": secrets.get_secret_value(SecretId=secret["ARN"])["SecretString"],
        }
        for secret in secrets.list_secrets()["SecretList"]
    }


def _launch_templates(url: str) -> dict[str, Answer]:
    ec2 = client(url, "ec2")
    found = {}
    for template in ec2.describe_launch_templates()["LaunchTemplates"]:
        [version] = ec2.describe_launch_template_versions(
            LaunchTemplateId=template["LaunchTemplateId"], Versions=["$Latest"]
        )["LaunchTemplateVersions"]
        found[template["LaunchTemplateName"]] = version["LaunchTemplateData"]
    return found
