variable "name" {
  description = "Prefix of the key's name."
  type        = string
}

variable "bucket_name" {
  description = "Name of the bucket; unique in all of AWS."
  type        = string

  validation {
    condition     = can(regex("^[a-z0-9][a-z0-9-]{1,61}[a-z0-9]$", var.bucket_name))
    error_message = "bucket_name must be 3 to 63 lower-case letters, digits or '-'."
  }
}

variable "noncurrent_version_days" {
  description = "Days an overwritten or deleted object can still be brought back."
  type        = number

  validation {
    condition     = var.noncurrent_version_days >= 1
    error_message = "noncurrent_version_days must be at least 1."
  }
}

variable "force_destroy" {
  description = "Let `terraform destroy` delete a bucket that still holds objects."
  type        = bool
}

variable "key_deletion_window_days" {
  description = "Days during which the deleted key can still be brought back."
  type        = number
}
