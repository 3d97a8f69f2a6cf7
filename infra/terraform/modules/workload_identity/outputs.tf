output "role_arn" {
  description = "Value of the service account's eks.amazonaws.com/role-arn annotation."
  value       = aws_iam_role.this.arn
}

output "role_name" {
  description = "Name of the role, to attach policies to."
  value       = aws_iam_role.this.name
}
