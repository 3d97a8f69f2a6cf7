# Everything one environment of Heliostat needs from AWS.

data "aws_caller_identity" "current" {}

locals {
  name                     = "heliostat-${var.environment}"
  key_deletion_window_days = var.durable ? 30 : 7
}

module "network" {
  source = "../network"

  name                 = local.name
  cidr                 = var.vpc_cidr
  zone_count           = var.zone_count
  nat_gateway_per_zone = var.durable
}

module "storage" {
  source = "../storage"

  name                     = local.name
  bucket_name              = "${local.name}-${data.aws_caller_identity.current.account_id}"
  noncurrent_version_days  = var.durable ? 90 : 7
  force_destroy            = !var.durable
  key_deletion_window_days = local.key_deletion_window_days
}

module "registry" {
  source = "../registry"

  name                        = local.name
  vpc_id                      = module.network.vpc_id
  subnet_ids                  = module.network.private_subnet_ids
  instance_class              = var.database_instance_class
  storage_gib                 = var.database_storage_gib
  multi_az                    = var.durable
  backup_days                 = var.durable ? 30 : 1
  deletion_protection         = var.durable
  final_snapshot              = var.durable
  secret_recovery_window_days = var.durable ? 30 : 0
  key_deletion_window_days    = local.key_deletion_window_days
}

module "images" {
  source = "../images"

  name                     = local.name
  repository_name          = local.name
  force_delete             = !var.durable
  key_deletion_window_days = local.key_deletion_window_days
}

module "cluster" {
  source = "../cluster"

  name                     = local.name
  kubernetes_version       = var.kubernetes_version
  subnet_ids               = module.network.private_subnet_ids
  public_access_cidrs      = var.kubernetes_api_cidrs
  node_security_group_ids  = [module.registry.client_security_group_id]
  node_groups              = var.node_groups
  log_retention_days       = var.durable ? 365 : 14
  key_deletion_window_days = local.key_deletion_window_days
}
