output "address" {
  description = "Host name of the database."
  value       = aws_db_instance.this.address
}

output "user_name" {
  description = "PostgreSQL user."
  value       = aws_db_instance.this.username
}

output "database_name" {
  description = "Database of the registry."
  value       = aws_db_instance.this.db_name
}

output "password_secret_arn" {
  description = "Secrets Manager secret that holds the password."
  value       = aws_secretsmanager_secret.master.arn
}

output "client_security_group_id" {
  description = "Security group that opens the database to whatever wears it."
  value       = aws_security_group.clients.id
}
