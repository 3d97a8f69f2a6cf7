# The EKS control plane and its add-ons. Nodes are in nodes.tf.

module "key" {
  source = "../encryption_key"

  name                 = "${var.name}-cluster"
  description          = "Kubernetes secrets of ${var.name}"
  deletion_window_days = var.key_deletion_window_days
}

data "aws_partition" "current" {}

locals {
  managed_policy_prefix = "arn:${data.aws_partition.current.partition}:iam::aws:policy"
}

data "aws_iam_policy_document" "control_plane_trust" {
  statement {
    actions = ["sts:AssumeRole"]

    principals {
      type        = "Service"
      identifiers = ["eks.amazonaws.com"]
    }
  }
}

resource "aws_iam_role" "control_plane" {
  name               = "${var.name}-control-plane"
  assume_role_policy = data.aws_iam_policy_document.control_plane_trust.json
}

resource "aws_iam_role_policy_attachment" "control_plane" {
  role       = aws_iam_role.control_plane.name
  policy_arn = "${local.managed_policy_prefix}/AmazonEKSClusterPolicy"
}

data "aws_iam_policy_document" "secrets_key" {
  statement {
    actions   = ["kms:DescribeKey", "kms:Encrypt", "kms:Decrypt", "kms:ListGrants"]
    resources = [module.key.arn]
  }
}

resource "aws_iam_role_policy" "secrets_key" {
  name   = "secrets-key"
  role   = aws_iam_role.control_plane.id
  policy = data.aws_iam_policy_document.secrets_key.json
}

# Made here because the one EKS makes by itself keeps its logs for ever.
resource "aws_cloudwatch_log_group" "control_plane" {
  name              = "/aws/eks/${var.name}/cluster"
  retention_in_days = var.log_retention_days
}

resource "aws_eks_cluster" "this" {
  name                          = var.name
  version                       = var.kubernetes_version
  role_arn                      = aws_iam_role.control_plane.arn
  enabled_cluster_log_types     = ["api", "audit", "authenticator", "controllerManager", "scheduler"]
  bootstrap_self_managed_addons = false

  vpc_config {
    subnet_ids              = var.subnet_ids
    endpoint_private_access = true
    endpoint_public_access  = length(var.public_access_cidrs) > 0
    public_access_cidrs     = length(var.public_access_cidrs) > 0 ? var.public_access_cidrs : null
  }

  access_config {
    authentication_mode                         = "API"
    bootstrap_cluster_creator_admin_permissions = true
  }

  encryption_config {
    resources = ["secrets"]

    provider {
      key_arn = module.key.arn
    }
  }

  depends_on = [
    aws_cloudwatch_log_group.control_plane,
    aws_iam_role_policy.secrets_key,
    aws_iam_role_policy_attachment.control_plane,
  ]
}

resource "aws_iam_openid_connect_provider" "this" {
  url            = aws_eks_cluster.this.identity[0].oidc[0].issuer
  client_id_list = ["sts.amazonaws.com"]
}

module "network_plugin_identity" {
  source = "../workload_identity"

  role_name         = "${var.name}-network-plugin"
  oidc_provider_arn = aws_iam_openid_connect_provider.this.arn
  oidc_issuer_url   = aws_eks_cluster.this.identity[0].oidc[0].issuer
  namespace         = "kube-system"
  service_account   = "aws-node"
}

resource "aws_iam_role_policy_attachment" "network_plugin" {
  role       = module.network_plugin_identity.role_name
  policy_arn = "${local.managed_policy_prefix}/AmazonEKS_CNI_Policy"
}

# Nodes become ready only once they have a network, so these come first.
resource "aws_eks_addon" "network_plugin" {
  cluster_name             = aws_eks_cluster.this.name
  addon_name               = "vpc-cni"
  service_account_role_arn = module.network_plugin_identity.role_arn

  # Without this NetworkPolicies are accepted and enforce nothing.
  configuration_values = jsonencode({ enableNetworkPolicy = "true" })

  depends_on = [aws_iam_role_policy_attachment.network_plugin]
}

resource "aws_eks_addon" "proxy" {
  cluster_name = aws_eks_cluster.this.name
  addon_name   = "kube-proxy"
}

# Its pods need nodes to run on.
resource "aws_eks_addon" "dns" {
  cluster_name = aws_eks_cluster.this.name
  addon_name   = "coredns"

  depends_on = [aws_eks_node_group.this]
}
