# The three variables that terraform.tfvars must set.

variable "ibmcloud_api_key" {
  description = "IBM Cloud API key that Terraform uses to create the database in your account."
  type        = string
  sensitive   = true
  nullable    = false

  validation {
    condition     = trimspace(var.ibmcloud_api_key) != "" && !strcontains(var.ibmcloud_api_key, "<")
    error_message = "Set ibmcloud_api_key to an IBM Cloud API key: Manage > Access (IAM) > API keys > Create."
  }
}

variable "region" {
  description = "IBM Cloud region of the database, for example us-south, eu-de or eu-gb."
  type        = string
  nullable    = false

  validation {
    condition     = can(regex("^[a-z]{2}-[a-z]+$", var.region))
    error_message = "Set region to the name of an IBM Cloud region, such as us-south, us-east, eu-de, eu-gb or jp-tok (a zone such as us-south-1 is not a region)."
  }
}

variable "elastic_password" {
  description = "Password to set for the database user admin: 15 to 32 letters, digits, - and _, beginning with a letter or digit, with a lowercase letter, an uppercase letter and a digit among them. Terraform also stores it in the state file."
  type        = string
  sensitive   = true
  nullable    = false
}

# Everything else has a default: the smallest size that does the job.

variable "name" {
  description = "Name of the database in your account."
  type        = string
  default     = "image-similarity-search"
  nullable    = false

  validation {
    condition     = can(regex("^[A-Za-z0-9]([A-Za-z0-9 ._:-]*[A-Za-z0-9])?$", var.name)) && length(var.name) <= 180
    error_message = "name must have at most 180 letters, digits, spaces and . _ : - and begin and end with a letter or digit."
  }
}

variable "resource_group" {
  description = "Name of an existing resource group for the database; null is the account's default group."
  type        = string
  default     = null

  validation {
    condition     = var.resource_group == null || try(trimspace(var.resource_group), "") != ""
    error_message = "Set resource_group to the name of an existing resource group, or leave it out for the account's default one."
  }
}

variable "plan" {
  description = "Service plan: enterprise, or platinum, which costs more, adds Elastic's machine learning and runs on isolated machines only, so it needs an isolated host_flavor. Changing the plan replaces the database."
  type        = string
  default     = "enterprise"
  nullable    = false

  validation {
    condition     = contains(["enterprise", "platinum"], var.plan)
    error_message = "plan must be enterprise or platinum."
  }

  validation {
    condition     = var.plan != "platinum" || var.host_flavor != "multitenant"
    error_message = "plan = \"platinum\" runs on isolated machines only: also set host_flavor to an isolated flavor such as b3c.4x16.encrypted."
  }
}

variable "elasticsearch_version" {
  description = "Elasticsearch version, major.minor; search.py needs 8.18 or newer. Changing it upgrades the database in place, one step at a time. IBM upgrades old versions by itself after five weeks' notice; every plan, also that of destroy, then fails until you set this to the version that the console shows. To list the versions offered: ibmcloud cdb deployables-show."
  type        = string
  default     = "8.19"
  nullable    = false

  validation {
    condition     = can(regex("^\\d+\\.\\d+$", var.elasticsearch_version))
    error_message = "elasticsearch_version must be major.minor in quotes, for example \"8.19\"."
  }

  validation {
    condition = !can(regex("^\\d+\\.\\d+$", var.elasticsearch_version)) || try(
      tonumber(split(".", var.elasticsearch_version)[0]) > 8 ||
      tonumber(split(".", var.elasticsearch_version)[0]) == 8 && tonumber(split(".", var.elasticsearch_version)[1]) >= 18,
      false
    )
    error_message = "elasticsearch_version must be 8.18 or newer, because search.py uses rescore_vector. To list the versions that IBM Cloud offers: ibmcloud cdb deployables-show."
  }
}

variable "service_endpoints" {
  description = "Where the database can be reached: public (the internet), private (IBM Cloud's network) or public-and-private. IBM's pages disagree on whether Elasticsearch can have both; if apply rejects public-and-private, choose one. The outputs give the public address if there is one. With public endpoints the provider warns that IBM recommends private ones: the warning is harmless."
  type        = string
  default     = "public"
  nullable    = false

  validation {
    condition     = contains(["public", "private", "public-and-private"], var.service_endpoints)
    error_message = "service_endpoints must be public, private or public-and-private."
  }
}

variable "allowlist" {
  description = "IPv4 addresses or CIDR ranges that may connect, for example [\"203.0.113.7\", \"198.51.100.0/24\"]. Empty: anyone who has the password. Every apply sets exactly this list, so an entry added in the console must be added here too."
  type        = set(string)
  default     = []
  nullable    = false

  validation {
    condition = alltrue([
      for entry in var.allowlist :
      can(regex("^\\d+\\.\\d+\\.\\d+\\.\\d+(/\\d+)?$", entry)) && can(cidrhost(strcontains(entry, "/") ? entry : "${entry}/32", 0))
    ])
    error_message = "Each entry of allowlist must be an IPv4 address such as 203.0.113.7 or a range such as 198.51.100.0/24."
  }

  validation {
    condition     = length(var.allowlist) <= 100
    error_message = "allowlist must have at most 100 entries: combine neighboring addresses into ranges."
  }
}

variable "deletion_protection" {
  description = "True makes terraform destroy fail until it is set back to false and applied."
  type        = bool
  default     = false
  nullable    = false
}

variable "host_flavor" {
  description = "Machine size of each member: multitenant (shared machines, the cheapest) or an isolated flavor such as b3c.4x16.encrypted."
  type        = string
  default     = "multitenant"
  nullable    = false

  validation {
    condition     = can(regex("^(multitenant|[a-z0-9]+\\.\\d+x\\d+(\\.encrypted)?)$", var.host_flavor))
    error_message = "host_flavor must be multitenant or the name of an isolated flavor such as b3c.4x16.encrypted."
  }
}

variable "member_memory_mb" {
  description = "Memory of each of the three members in MB, with host_flavor multitenant only; null leaves it to the service."
  type        = number
  default     = null

  validation {
    condition     = var.member_memory_mb == null || try(var.member_memory_mb >= 4096 && floor(var.member_memory_mb) == var.member_memory_mb, false)
    error_message = "member_memory_mb must be a whole number of at least 4096 (4 GB a member, the smallest shared size)."
  }

  validation {
    condition     = var.member_memory_mb == null || var.host_flavor == "multitenant"
    error_message = "member_memory_mb applies to host_flavor multitenant only: an isolated flavor has its own memory. Leave out one of the two."
  }
}

variable "member_disk_mb" {
  description = "Disk of each of the three members in MB; null leaves it to the service. If the disk has grown beyond this size, plan and destroy fail."
  type        = number
  default     = null

  validation {
    condition     = var.member_disk_mb == null || try(var.member_disk_mb >= 5120 && floor(var.member_disk_mb) == var.member_disk_mb, false)
    error_message = "member_disk_mb must be a whole number of at least 5120 (5 GB a member, the smallest size)."
  }
}

variable "tags" {
  description = "Tags of the database in your account."
  type        = set(string)
  default     = []
  nullable    = false

  validation {
    condition     = alltrue([for tag in var.tags : can(regex("^[A-Za-z0-9:_ .-]{1,128}$", tag))])
    error_message = "Each of tags must have 1 to 128 letters, digits, spaces and : _ . -"
  }
}
