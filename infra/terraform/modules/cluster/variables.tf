variable "name" {
  description = "Name of the cluster and prefix of the rest."
  type        = string
}

variable "kubernetes_version" {
  description = "Minor version of Kubernetes."
  type        = string

  validation {
    condition     = can(regex("^1\\.[0-9]{2}$", var.kubernetes_version))
    error_message = "kubernetes_version must be a minor version, e.g. 1.33."
  }
}

variable "subnet_ids" {
  description = "Private subnets of control plane interfaces and nodes, at least two."
  type        = list(string)

  validation {
    condition     = length(var.subnet_ids) >= 2
    error_message = "EKS needs subnets in at least two zones."
  }
}

variable "public_access_cidrs" {
  description = "Addresses that may reach the Kubernetes API from the internet; empty keeps it private."
  type        = set(string)

  validation {
    condition     = alltrue([for cidr in var.public_access_cidrs : can(cidrhost(cidr, 0)) && !endswith(cidr, "/0")])
    error_message = "public_access_cidrs must be CIDR ranges, and never the whole internet."
  }
}

variable "node_security_group_ids" {
  description = "Security groups that nodes wear besides the cluster's own."
  type        = list(string)
}

variable "node_groups" {
  description = "Node groups by name; gpu chooses the image with NVIDIA's driver, a label and a taint."
  type = map(object({
    instance_types = list(string)
    gpu            = optional(bool, false)
    spot           = optional(bool, false)
    min_size       = number
    desired_size   = number
    max_size       = number
    disk_gib       = optional(number, 100)
  }))

  validation {
    condition = alltrue([
      for group in var.node_groups :
      group.min_size <= group.desired_size && group.desired_size <= group.max_size && length(group.instance_types) > 0
    ])
    error_message = "Each node group needs an instance type and min_size <= desired_size <= max_size."
  }

  validation {
    condition     = anytrue([for group in var.node_groups : !group.gpu && group.min_size >= 1])
    error_message = "At least one CPU node group needs min_size >= 1: cluster DNS and MLflow run there."
  }
}

variable "log_retention_days" {
  description = "Days to keep the control plane's logs, audit log included; one of CloudWatch's steps."
  type        = number

  validation {
    condition     = contains([7, 14, 30, 60, 90, 180, 365, 731], var.log_retention_days)
    error_message = "log_retention_days must be 7, 14, 30, 60, 90, 180, 365 or 731."
  }
}

variable "key_deletion_window_days" {
  description = "Days during which the deleted key can still be brought back."
  type        = number
}
