# An existing group: one of our own could stay undeletable for days after the database is gone.
data "ibm_resource_group" "this" {
  is_default = var.resource_group == null ? true : null
  name       = var.resource_group
}

locals {
  # Memory can be chosen on shared machines alone.
  host_flavor = var.host_flavor != null ? var.host_flavor : var.member_memory_mb != null ? "multitenant" : null
  sized       = local.host_flavor != null || var.member_disk_mb != null
}

resource "ibm_database" "elasticsearch" {
  service           = "databases-for-elasticsearch"
  name              = var.name
  location          = var.region # the provider's own; a different one creates the database and then fails
  resource_group_id = data.ibm_resource_group.this.id
  plan              = var.plan
  version           = var.elasticsearch_version
  service_endpoints = var.service_endpoints
  adminpassword     = var.elastic_password
  tags              = var.tags

  # Left out unless a size is asked for: the service may have grown the disk since, and a smaller
  # size here would then fail every plan, that of destroy too.
  dynamic "group" {
    for_each = local.sized ? ["member"] : []

    content {
      group_id = group.value

      dynamic "host_flavor" {
        for_each = local.host_flavor[*]
        content {
          id = host_flavor.value
        }
      }

      dynamic "memory" {
        for_each = var.member_memory_mb[*]
        content {
          allocation_mb = memory.value
        }
      }

      dynamic "disk" {
        for_each = var.member_disk_mb[*]
        content {
          allocation_mb = disk.value
        }
      }
    }
  }

  # The provider's 60 minutes are often too few; these are those of IBM's own module.
  timeouts {
    create = "120m"
    update = "120m"
    delete = "15m"
  }
}

data "ibm_database_connection" "this" {
  deployment_id = ibm_database.elasticsearch.id
  user_type     = "database"
  user_id       = "admin"
  endpoint_type = var.service_endpoints == "private" ? "private" : "public" # one that the database has
}
