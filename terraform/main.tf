# An existing group: a group created here could not be deleted while the database is pending reclamation.
data "ibm_resource_group" "this" {
  is_default = var.resource_group == null ? true : null
  name       = var.resource_group
}

resource "ibm_database" "elasticsearch" {
  service           = "databases-for-elasticsearch"
  name              = var.name
  location          = var.region # must be the provider's region: with another one, apply fails after creating the database
  resource_group_id = data.ibm_resource_group.this.id
  plan              = var.plan
  version           = var.elasticsearch_version
  service_endpoints = var.service_endpoints
  adminpassword     = var.elastic_password
  tags              = var.tags

  deletion_protection = var.deletion_protection

  group {
    group_id = "member"

    host_flavor {
      id = var.host_flavor
    }

    # No size unless one is set: the service may have grown the disk, and a smaller size here would
    # then fail every plan, including that of destroy.
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

  dynamic "allowlist" {
    for_each = var.allowlist
    content {
      address     = cidrsubnet(strcontains(allowlist.value, "/") ? allowlist.value : "${allowlist.value}/32", 0, 0)
      description = allowlist.value
    }
  }

  # The provider's default of 60 minutes is often too short; these are the values of IBM's own module.
  timeouts {
    create = "120m"
    update = "120m"
    delete = "15m"
  }

  # Not validations of the variable: if one fails, Terraform prints the refused value, even if it is sensitive.
  lifecycle {
    precondition {
      condition     = length(var.elastic_password) >= 15 && length(var.elastic_password) <= 32
      error_message = "elastic_password must have 15 to 32 characters."
    }

    precondition {
      condition     = can(regex("^[A-Za-z0-9][A-Za-z0-9_-]*$", var.elastic_password))
      error_message = "elastic_password may have only letters A-Z and a-z, digits, - and _, and must not begin with - or _."
    }

    precondition {
      condition = alltrue([
        can(regex("[a-z]", var.elastic_password)),
        can(regex("[A-Z]", var.elastic_password)),
        can(regex("[0-9]", var.elastic_password)),
      ])
      error_message = "elastic_password must have a lowercase letter, an uppercase letter and a digit."
    }
  }
}

data "ibm_database_connection" "this" {
  deployment_id = ibm_database.elasticsearch.id
  user_type     = "database"
  user_id       = "admin"
  endpoint_type = var.service_endpoints == "private" ? "private" : "public" # must be an endpoint that the database has
}
