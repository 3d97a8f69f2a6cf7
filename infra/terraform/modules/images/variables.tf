variable "name" {
  description = "Prefix of the key's name."
  type        = string
}

variable "repository_name" {
  description = "Name of the repository."
  type        = string

  validation {
    condition     = can(regex("^[a-z0-9]+([._/-][a-z0-9]+)*$", var.repository_name))
    error_message = "repository_name must be lower-case words joined by '.', '_', '-' or '/'."
  }
}

variable "force_delete" {
  description = "Let `terraform destroy` delete a repository that still holds images."
  type        = bool
}

variable "key_deletion_window_days" {
  description = "Days during which the deleted key can still be brought back."
  type        = number
}
