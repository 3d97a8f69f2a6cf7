# Small, cheap, destroyed in one command. Its Kubernetes API may be opened to your own address.

module "platform" {
  source = "../../modules/platform"

  environment             = "dev"
  durable                 = false
  vpc_cidr                = "10.20.0.0/16"
  zone_count              = 2
  kubernetes_api_cidrs    = var.kubernetes_api_cidrs
  database_instance_class = "db.t4g.medium"
  database_storage_gib    = 20

  node_groups = {
    cpu = {
      instance_types = ["m7i.2xlarge"]
      min_size       = 1
      desired_size   = 2
      max_size       = 4
    }
    gpu = {
      instance_types = ["g6.xlarge"]
      gpu            = true
      spot           = true
      min_size       = 0
      desired_size   = 0
      max_size       = 2
    }
  }
}
