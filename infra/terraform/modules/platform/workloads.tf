# What each Kubernetes service account may do with the bucket, and nothing else.

locals {
  platform_prefix = "platform"
  mlflow_prefix   = "mlflow"
  objects = {
    platform = "${module.storage.bucket_arn}/${local.platform_prefix}/*"
    packages = "${module.storage.bucket_arn}/${local.platform_prefix}/packages/*"
    mlflow   = "${module.storage.bucket_arn}/${local.mlflow_prefix}/*"
  }

  # Serving reads packages; training also writes them, next to datasets and checkpoints.
  workloads = {
    serving  = { read = local.objects.packages, write = null }
    training = { read = local.objects.platform, write = local.objects.platform }
    mlflow   = { read = local.objects.mlflow, write = local.objects.mlflow }
  }
}

data "aws_iam_policy_document" "workload" {
  for_each = local.workloads

  statement {
    # On the whole bucket: with a prefix condition S3 answers 403 where a missing object is a 404.
    sid       = "List"
    actions   = ["s3:ListBucket"]
    resources = [module.storage.bucket_arn]
  }

  statement {
    sid       = "Read"
    actions   = ["s3:GetObject"]
    resources = [each.value.read]
  }

  statement {
    sid       = "Decrypt"
    actions   = ["kms:Decrypt"]
    resources = [module.storage.key_arn]
  }

  dynamic "statement" {
    for_each = each.value.write[*]

    content {
      sid       = "Write"
      actions   = ["s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"]
      resources = [statement.value]
    }
  }

  dynamic "statement" {
    for_each = each.value.write[*]

    content {
      sid       = "Encrypt"
      actions   = ["kms:GenerateDataKey"]
      resources = [module.storage.key_arn]
    }
  }
}

module "workload_identity" {
  source   = "../workload_identity"
  for_each = local.workloads

  role_name         = "${local.name}-${each.key}"
  oidc_provider_arn = module.cluster.oidc_provider_arn
  oidc_issuer_url   = module.cluster.oidc_issuer_url
  namespace         = var.kubernetes_namespace
  service_account   = each.key
}

resource "aws_iam_role_policy" "workload" {
  for_each = local.workloads

  name   = "bucket"
  role   = module.workload_identity[each.key].role_name
  policy = data.aws_iam_policy_document.workload[each.key].json
}
