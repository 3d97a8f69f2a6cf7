variable "role_name" {
  description = "Name of the IAM role."
  type        = string

  validation {
    condition     = length(var.role_name) <= 64
    error_message = "role_name must have at most 64 characters."
  }
}

variable "oidc_provider_arn" {
  description = "ARN of the cluster's OpenID Connect provider."
  type        = string
}

variable "oidc_issuer_url" {
  description = "Issuer of the cluster's service account tokens."
  type        = string
}

variable "namespace" {
  description = "Kubernetes namespace of the service account."
  type        = string
}

variable "service_account" {
  description = "Name of the service account."
  type        = string

  validation {
    condition     = can(regex("^[a-z0-9-]+$", var.service_account))
    error_message = "service_account must be one exact name, without wildcards."
  }
}
