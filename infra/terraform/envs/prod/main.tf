# Three zones, a standby database, a private Kubernetes API, nothing that one command destroys.

module "platform" {
  source = "../../modules/platform"

  environment             = "prod"
  durable                 = true
  vpc_cidr                = "10.30.0.0/16"
  zone_count              = 3
  kubernetes_api_cidrs    = []
  database_instance_class = "db.m7g.large"
  database_storage_gib    = 100

  node_groups = {
    cpu = {
      instance_types = ["m7i.4xlarge"]
      min_size       = 3
      desired_size   = 3
      max_size       = 12
    }
    gpu = {
      instance_types = ["g6e.2xlarge"]
      gpu            = true
      min_size       = 0
      desired_size   = 2
      max_size       = 8
      disk_gib       = 300
    }
  }
}
