output "vpc_id" {
  description = "Id of the VPC."
  value       = aws_vpc.this.id
}

output "cidr" {
  description = "Address range of the VPC: the NetworkPolicies open the database port to it."
  value       = aws_vpc.this.cidr_block
}

output "private_subnet_ids" {
  description = "Subnets of nodes and database, one per zone."
  value       = [for subnet in aws_subnet.private : subnet.id]
}
