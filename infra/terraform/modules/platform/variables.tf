variable "environment" {
  description = "Name of the environment; part of every resource's name."
  type        = string

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,14}$", var.environment))
    error_message = "environment must be 2 to 15 lower-case letters, digits or '-', starting with a letter."
  }
}

variable "durable" {
  description = "Keep what is lost and survive what fails: standby database, a NAT gateway per zone, long backups, protection against deletion. false is cheap and can be destroyed in one command."
  type        = bool
}

variable "vpc_cidr" {
  description = "Address range of the VPC."
  type        = string
}

variable "zone_count" {
  description = "Availability zones to spread over."
  type        = number
}

variable "kubernetes_version" {
  description = "Minor version of Kubernetes."
  type        = string
  default     = "1.33"
}

variable "kubernetes_namespace" {
  description = "Namespace of the workloads; the IAM roles trust service accounts of this one only."
  type        = string
  default     = "heliostat"
}

variable "kubernetes_api_cidrs" {
  description = "Addresses that may reach the Kubernetes API from the internet; empty keeps it private."
  type        = set(string)
}

variable "node_groups" {
  description = "CPU and GPU node groups by name; see the cluster module."
  type = map(object({
    instance_types = list(string)
    gpu            = optional(bool, false)
    spot           = optional(bool, false)
    min_size       = number
    desired_size   = number
    max_size       = number
    disk_gib       = optional(number, 100)
  }))
}

variable "database_instance_class" {
  description = "RDS instance class."
  type        = string
}

variable "database_storage_gib" {
  description = "Initial disk of the database."
  type        = number
}
