variable "region" {
  description = "AWS region."
  type        = string
  default     = "eu-central-1"

  validation {
    condition     = can(regex("^[a-z]{2}(-[a-z]+)+-[0-9]$", var.region))
    error_message = "region must be an AWS region, e.g. eu-central-1."
  }
}

variable "kubernetes_api_cidrs" {
  description = "Your own addresses, e.g. [\"203.0.113.7/32\"]; empty keeps the Kubernetes API private."
  type        = set(string)
  default     = []
}
