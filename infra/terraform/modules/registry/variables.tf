variable "name" {
  description = "Name of the instance and prefix of the rest."
  type        = string
}

variable "vpc_id" {
  description = "VPC of the security groups."
  type        = string
}

variable "subnet_ids" {
  description = "Private subnets, at least two."
  type        = list(string)

  validation {
    condition     = length(var.subnet_ids) >= 2
    error_message = "RDS needs subnets in at least two zones."
  }
}

variable "postgres_version" {
  description = "Major version of PostgreSQL; minor upgrades are automatic."
  type        = string
  default     = "16"

  validation {
    condition     = can(regex("^1[5-9]$", var.postgres_version))
    error_message = "postgres_version must be a major version from 15 on, which refuses connections without TLS."
  }
}

variable "instance_class" {
  description = "RDS instance class."
  type        = string

  validation {
    condition     = startswith(var.instance_class, "db.")
    error_message = "instance_class must start with 'db.', e.g. db.t4g.medium."
  }
}

variable "storage_gib" {
  description = "Initial disk; it grows by itself up to four times this."
  type        = number

  validation {
    condition     = var.storage_gib >= 20
    error_message = "storage_gib must be at least 20, the smallest gp3 volume."
  }
}

variable "database_name" {
  description = "Database made with the instance."
  type        = string
  default     = "heliostat"
}

variable "user_name" {
  description = "PostgreSQL user that owns the database."
  type        = string
  default     = "heliostat"
}

variable "password_version" {
  description = "Raise it by one to make a new password."
  type        = number
  default     = 1

  validation {
    condition     = var.password_version >= 1
    error_message = "password_version must be at least 1."
  }
}

variable "multi_az" {
  description = "Keep a standby in a second zone."
  type        = bool
}

variable "backup_days" {
  description = "Days of point-in-time recovery."
  type        = number

  validation {
    condition     = var.backup_days >= 1 && var.backup_days <= 35
    error_message = "backup_days must be between 1 and 35."
  }
}

variable "deletion_protection" {
  description = "Refuse to delete the instance until this is lifted."
  type        = bool
}

variable "final_snapshot" {
  description = "Keep a snapshot when the instance is deleted."
  type        = bool
}

variable "secret_recovery_window_days" {
  description = "Days during which the deleted secret can be brought back; 0 deletes at once."
  type        = number

  validation {
    condition     = var.secret_recovery_window_days == 0 || (var.secret_recovery_window_days >= 7 && var.secret_recovery_window_days <= 30)
    error_message = "secret_recovery_window_days must be 0 or between 7 and 30."
  }
}

variable "key_deletion_window_days" {
  description = "Days during which the deleted key can still be brought back."
  type        = number
}
