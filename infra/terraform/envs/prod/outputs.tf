output "platform" {
  description = "What infra/kubernetes and its secrets are filled from."
  value       = module.platform
}
