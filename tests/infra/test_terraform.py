"""infra/terraform: well-formed, and one whole life against a local AWS.

dev is applied, planned again, looked at through AWS's own API, and destroyed; prod is planned.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import boto3
import pytest
from kustomize import render
from terraform_runner import REGION, SOURCE, STATE_BUCKET, TerraformRoot, local_aws

pytestmark = [
    pytest.mark.skipif(shutil.which("terraform") is None, reason="Terraform is not installed"),
    # The provider sleeps 80 s after creating a database and 60 s after deleting one.
    pytest.mark.timeout(900),
]
NAME = "heliostat-dev"
ANYWHERE = {"0.0.0.0/0", "::/0"}


@dataclass(frozen=True)
class Applied:
    """A living dev environment."""

    root: TerraformRoot

    def client(self, service: str) -> Any:
        return _client(self.root.aws_url, service)

    @property
    def outputs(self) -> dict[str, Any]:
        return json.loads(self.root.run("output", "-json").stdout)["platform"]["value"]

    @property
    def buckets(self) -> list[str]:
        names = [bucket["Name"] for bucket in self.client("s3").list_buckets()["Buckets"]]
        return [name for name in names if name != STATE_BUCKET]

    @property
    def vpc_ids(self) -> list[str]:
        own = [{"Name": "tag:project", "Values": ["heliostat"]}]
        return [vpc["VpcId"] for vpc in self.client("ec2").describe_vpcs(Filters=own)["Vpcs"]]

    @property
    def security_groups(self) -> list[dict[str, Any]]:
        own = [{"Name": "vpc-id", "Values": self.vpc_ids}]
        return self.client("ec2").describe_security_groups(Filters=own)["SecurityGroups"]

    def everything(self) -> dict[str, int]:
        """How many of each kind there are, of those that cost money or hold data."""
        ec2, kms = self.client("ec2"), self.client("kms")
        keys = [kms.describe_key(KeyId=key["KeyId"]) for key in kms.list_keys()["Keys"]]
        return {
            "buckets": len(self.buckets),
            "networks": len(self.vpc_ids),
            "addresses": len(ec2.describe_addresses()["Addresses"]),
            "clusters": len(self.client("eks").list_clusters()["clusters"]),
            "databases": len(self.client("rds").describe_db_instances()["DBInstances"]),
            "secrets": len(self.client("secretsmanager").list_secrets()["SecretList"]),
            "image repositories": len(self.client("ecr").describe_repositories()["repositories"]),
            "roles": len(self.client("iam").list_roles()["Roles"]),
            "enabled keys": sum(key["KeyMetadata"]["Enabled"] for key in keys),
        }


@pytest.fixture(scope="module")
def aws_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with local_aws(tmp_path_factory.mktemp("aws") / "moto.log") as url:
        _client(url, "s3").create_bucket(
            Bucket=STATE_BUCKET, CreateBucketConfiguration={"LocationConstraint": REGION}
        )
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


@pytest.fixture(scope="module")
def dev(unapplied: TerraformRoot) -> Iterator[Applied]:
    """Applied here; destroyed at the end, whatever the tests found."""
    applied = Applied(unapplied)
    try:
        unapplied.run("apply", "-auto-approve", "-parallelism=30")
        yield applied
    finally:
        unapplied.run("destroy", "-auto-approve", "-parallelism=30")
    assert set(applied.everything().values()) == {0}, applied.everything()


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


def test_a_second_plan_changes_nothing(dev: Applied) -> None:
    dev.root.run("plan", "-detailed-exitcode", expected=0)


def test_the_kubernetes_overlay_names_what_was_made(dev: Applied) -> None:
    overlay = json.dumps(render(SOURCE.parent / "kubernetes" / "overlays" / "dev"))
    overlay = overlay.replace("111122223333", "123456789012")
    outputs = dev.outputs
    for name in ("image_repository", "storage_url", "mlflow_artifacts_url", "vpc_cidr"):
        assert f'"{outputs[name]}' in overlay, name
    for account, role in outputs["service_account_roles"].items():
        assert f'"eks.amazonaws.com/role-arn": "{role}"' in overlay, account


def test_no_bucket_is_public_and_all_are_encrypted(dev: Applied) -> None:
    s3 = dev.client("s3")
    assert dev.buckets == [f"{NAME}-123456789012"]
    for name in dev.buckets:
        block = s3.get_public_access_block(Bucket=name)["PublicAccessBlockConfiguration"]
        assert set(block.values()) == {True}
        encryption = s3.get_bucket_encryption(Bucket=name)["ServerSideEncryptionConfiguration"]
        default = encryption["Rules"][0]["ApplyServerSideEncryptionByDefault"]
        assert default["SSEAlgorithm"] == "aws:kms"
        assert s3.get_bucket_versioning(Bucket=name)["Status"] == "Enabled"
        grants = s3.get_bucket_acl(Bucket=name)["Grants"]
        assert all("URI" not in grant["Grantee"] for grant in grants)


def test_buckets_refuse_plain_http_and_allow_nobody(dev: Applied) -> None:
    for name in dev.buckets:
        policy = json.loads(dev.client("s3").get_bucket_policy(Bucket=name)["Policy"])
        [statement] = policy["Statement"]
        assert statement["Effect"] == "Deny"
        assert statement["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}


def test_no_security_group_is_open(dev: Applied) -> None:
    assert {group["GroupName"] for group in dev.security_groups} >= {"default", f"{NAME}-database"}
    for group in dev.security_groups:
        for rule in group["IpPermissions"]:
            sources = {r["CidrIp"] for r in rule["IpRanges"]}
            sources |= {r["CidrIpv6"] for r in rule["Ipv6Ranges"]}
            assert not sources & ANYWHERE, group["GroupName"]


def test_the_database_is_reached_by_its_clients_only(dev: Applied) -> None:
    groups = {group["GroupName"]: group for group in dev.security_groups}
    [rule] = groups[f"{NAME}-database"]["IpPermissions"]
    assert (rule["FromPort"], rule["ToPort"], rule["IpRanges"]) == (5432, 5432, [])
    [source] = rule["UserIdGroupPairs"]
    assert source["GroupId"] == groups[f"{NAME}-database-clients"]["GroupId"]
    assert groups["default"]["IpPermissions"] == []


def test_no_policy_allows_a_wildcard_action(dev: Applied) -> None:
    policies = dict(_policies(dev))
    assert len(policies) >= 15
    for owner, policy in policies.items():
        for statement in policy["Statement"]:
            if statement["Effect"] == "Allow":
                assert "NotAction" not in statement, owner
                wild = [action for action in _listed(statement["Action"]) if "*" in action]
                assert wild == [], f"{owner} allows {wild}"


def test_each_role_of_a_workload_trusts_one_service_account(dev: Applied) -> None:
    for name, arn in dev.outputs["service_account_roles"].items():
        role = dev.client("iam").get_role(RoleName=arn.rsplit("/", 1)[1])["Role"]
        [statement] = role["AssumeRolePolicyDocument"]["Statement"]
        conditions = statement["Condition"]["StringEquals"]
        assert f"system:serviceaccount:heliostat:{name}" in conditions.values()


def test_serving_can_read_packages_and_write_nothing(dev: Applied) -> None:
    document = dev.client("iam").get_role_policy(RoleName=f"{NAME}-serving", PolicyName="bucket")
    allowed = {
        action: statement["Resource"]
        for statement in document["PolicyDocument"]["Statement"]
        for action in _listed(statement["Action"])
    }
    assert set(allowed) == {"s3:ListBucket", "s3:GetObject", "kms:Decrypt"}
    assert allowed["s3:GetObject"].endswith(f"{NAME}-123456789012/platform/packages/*")


def test_the_database_is_encrypted_private_and_its_password_stays_out_of_the_state(
    dev: Applied,
) -> None:
    [database] = dev.client("rds").describe_db_instances()["DBInstances"]
    assert database["StorageEncrypted"]
    assert not database["PubliclyAccessible"]
    secrets = dev.client("secretsmanager")
    arn = dev.outputs["database"]["password_secret_arn"]
    assert secrets.describe_secret(SecretId=arn)["KmsKeyId"] == database["KmsKeyId"]
    password = secrets.get_secret_value(SecretId=arn)["SecretString"]
    assert len(password) == 40
    state = dev.client("s3").get_object(Bucket=STATE_BUCKET, Key="heliostat/dev.tfstate")
    assert password not in state["Body"].read().decode()


def test_nodes_have_encrypted_disks_and_guarded_metadata(dev: Applied) -> None:
    ec2 = dev.client("ec2")
    templates = ec2.describe_launch_templates()["LaunchTemplates"]
    assert {t["LaunchTemplateName"] for t in templates} == {f"{NAME}-cpu", f"{NAME}-gpu"}
    for template in templates:
        [version] = ec2.describe_launch_template_versions(
            LaunchTemplateId=template["LaunchTemplateId"], Versions=["$Latest"]
        )["LaunchTemplateVersions"]
        data = version["LaunchTemplateData"]
        assert all(device["Ebs"]["Encrypted"] for device in data["BlockDeviceMappings"])
        assert data["MetadataOptions"]["HttpTokens"] == "required"
        assert data["MetadataOptions"]["HttpPutResponseHopLimit"] == 1


def test_the_cluster_encrypts_its_secrets_and_keeps_an_audit_log(dev: Applied) -> None:
    cluster = dev.client("eks").describe_cluster(name=NAME)["cluster"]
    assert cluster["encryptionConfig"][0]["resources"] == ["secrets"]
    [logging] = [entry for entry in cluster["logging"]["clusterLogging"] if entry["enabled"]]
    assert "audit" in logging["types"]


def test_image_tags_are_immutable_scanned_and_encrypted(dev: Applied) -> None:
    [repository] = dev.client("ecr").describe_repositories()["repositories"]
    assert repository["imageTagMutability"] == "IMMUTABLE"
    assert repository["imageScanningConfiguration"]["scanOnPush"]
    assert repository["encryptionConfiguration"]["encryptionType"] == "KMS"


def test_every_key_is_rotated(dev: Applied) -> None:
    kms = dev.client("kms")
    keys = [key["KeyId"] for key in kms.list_keys()["Keys"]]
    own = [k for k in keys if kms.describe_key(KeyId=k)["KeyMetadata"]["KeyManager"] == "CUSTOMER"]
    assert len(own) >= 4
    assert all(kms.get_key_rotation_status(KeyId=key)["KeyRotationEnabled"] for key in own)


def _policies(dev: Applied) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every policy in force: of roles (trust, inline, attached), keys and repositories."""
    iam, kms = dev.client("iam"), dev.client("kms")
    for role in iam.list_roles()["Roles"]:
        name = role["RoleName"]
        yield f"trust of {name}", _document(role["AssumeRolePolicyDocument"])
        for policy in iam.list_role_policies(RoleName=name)["PolicyNames"]:
            found = iam.get_role_policy(RoleName=name, PolicyName=policy)
            yield f"{name}/{policy}", _document(found["PolicyDocument"])
        for attached in iam.list_attached_role_policies(RoleName=name)["AttachedPolicies"]:
            arn = attached["PolicyArn"]
            version = iam.get_policy(PolicyArn=arn)["Policy"]["DefaultVersionId"]
            found = iam.get_policy_version(PolicyArn=arn, VersionId=version)["PolicyVersion"]
            yield f"{name}/{arn}", _document(found["Document"])
    for key in kms.list_keys()["Keys"]:
        found = kms.get_key_policy(KeyId=key["KeyId"], PolicyName="default")
        yield f"key {key['KeyId']}", json.loads(found["Policy"])


def _document(value: str | dict[str, Any]) -> dict[str, Any]:
    return json.loads(unquote(value)) if isinstance(value, str) else value


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _resources(module: dict[str, Any]) -> Iterator[dict[str, Any]]:
    # An ephemeral resource has no values: it is never stored.
    yield from (r for r in module.get("resources", []) if "values" in r)
    for child in module.get("child_modules", []):
        yield from _resources(child)


def _client(aws_url: str, service: str) -> Any:
    return boto3.client(
        service,
        endpoint_url=aws_url,
        region_name=REGION,
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )
