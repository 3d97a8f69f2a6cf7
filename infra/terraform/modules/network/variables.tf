variable "name" {
  description = "Prefix of every name in this module."
  type        = string
}

variable "cidr" {
  description = "Address range of the VPC."
  type        = string

  validation {
    condition     = can(cidrhost(var.cidr, 0)) && try(tonumber(split("/", var.cidr)[1]), 0) >= 16 && try(tonumber(split("/", var.cidr)[1]), 99) <= 20
    error_message = "cidr must be an IPv4 range between /16 and /20, e.g. 10.20.0.0/16."
  }
}

variable "zone_count" {
  description = "Availability zones to spread over; EKS and RDS need two."
  type        = number

  validation {
    condition     = var.zone_count >= 2 && var.zone_count <= 4
    error_message = "zone_count must be between 2 and 4."
  }
}

variable "nat_gateway_per_zone" {
  description = "One NAT gateway per zone (survives the loss of a zone) instead of a single one."
  type        = bool
}
