output "repository_url" {
  description = "Where to push and pull, without a tag."
  value       = aws_ecr_repository.this.repository_url
}
