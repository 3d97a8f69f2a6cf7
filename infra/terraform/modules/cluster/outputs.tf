output "name" {
  description = "Name of the cluster, for `aws eks update-kubeconfig`."
  value       = aws_eks_cluster.this.name
}

output "oidc_provider_arn" {
  description = "ARN of the provider that IAM roles of service accounts trust."
  value       = aws_iam_openid_connect_provider.this.arn
}

output "oidc_issuer_url" {
  description = "Issuer of service account tokens."
  value       = aws_eks_cluster.this.identity[0].oidc[0].issuer
}
