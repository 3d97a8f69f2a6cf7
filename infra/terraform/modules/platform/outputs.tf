output "cluster_name" {
  description = "Name of the cluster, for `aws eks update-kubeconfig`."
  value       = module.cluster.name
}

output "image_repository" {
  description = "Where to push the image; `newName` in the overlay."
  value       = module.images.repository_url
}

output "storage_url" {
  description = "HELIOSTAT_STORAGE_URL in the overlay."
  value       = "s3://${module.storage.bucket_name}/${local.platform_prefix}"
}

output "mlflow_artifacts_url" {
  description = "MLFLOW_ARTIFACTS_DESTINATION in the overlay."
  value       = "s3://${module.storage.bucket_name}/${local.mlflow_prefix}"
}

output "service_account_roles" {
  description = "IAM role of each Kubernetes service account; the overlay's annotations."
  value       = { for name, identity in module.workload_identity : name => identity.role_arn }
}

output "vpc_cidr" {
  description = "Where the database is; the overlay's NetworkPolicy opens its port to this range."
  value       = module.network.cidr
}

output "database" {
  description = "What the database URLs are made of; the password lies in the secret."
  value = {
    address             = module.registry.address
    user_name           = module.registry.user_name
    database_name       = module.registry.database_name
    password_secret_arn = module.registry.password_secret_arn
  }
}
