# What each variable accepts, at its limits, and what it refuses at plan time.
#
# Each run starts the provider, which takes a second or two: so several variables are refused in one.

mock_provider "ibm" {}

variables {
  ibmcloud_api_key = "key"
  region           = "eu-de"
  elastic_password = "Correct-horse-1"
}

run "takes_the_smallest" {
  command = plan

  variables {
    elastic_password      = "Abcdefghijklmn1"
    elasticsearch_version = "8.18"
    member_memory_mb      = 4096
    member_disk_mb        = 5120
  }
}

run "takes_the_largest" {
  command = plan

  variables {
    elastic_password      = "A1bbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
    elasticsearch_version = "10.0"
    member_memory_mb      = 8192
    host_flavor           = "multitenant"
    allowlist             = [for number in range(100) : number % 2 == 0 ? "203.0.113.${number}" : "10.${number}.0.0/16"]
  }
}

run "takes_platinum_on_isolated_machines" {
  command = plan

  variables {
    elasticsearch_version = "9.1"
    plan                  = "platinum"
    host_flavor           = "b3c.4x16.encrypted"
  }
}

run "refuses_the_placeholders" {
  command = plan

  variables {
    ibmcloud_api_key = "<your_api_key>"
    region           = "<your_region>"
  }

  expect_failures = [var.ibmcloud_api_key, var.region]
}

run "refuses_what_is_empty" {
  command = plan

  variables {
    ibmcloud_api_key = " "
    region           = ""
    name             = ""
    resource_group   = " "
  }

  expect_failures = [var.ibmcloud_api_key, var.region, var.name, var.resource_group]
}

run "refuses_what_is_too_small_or_too_old" {
  command = plan

  variables {
    member_memory_mb      = 4095
    member_disk_mb        = 5119
    elasticsearch_version = "8.15"
  }

  expect_failures = [var.member_memory_mb, var.member_disk_mb, var.elasticsearch_version]
}

run "refuses_what_is_unknown" {
  command = plan

  variables {
    region                = "us-south-1"
    service_endpoints     = "internet"
    host_flavor           = "large"
    elasticsearch_version = "7.17"
  }

  expect_failures = [var.region, var.service_endpoints, var.host_flavor, var.elasticsearch_version]
}

run "refuses_what_is_malformed_and_an_unknown_plan" {
  command = plan

  variables {
    plan                  = "standard"
    elasticsearch_version = "8.19.9"
    member_memory_mb      = 4096.5
    tags                  = ["a,b"]
    allowlist             = ["office.example.com"]
  }

  expect_failures = [var.plan, var.elasticsearch_version, var.member_memory_mb, var.tags, var.allowlist]
}

run "refuses_a_version_without_a_minor_and_too_many_addresses" {
  command = plan

  variables {
    elasticsearch_version = "8"
    allowlist             = [for number in range(101) : "203.0.113.${number}"]
  }

  expect_failures = [var.elasticsearch_version, var.allowlist]
}

run "refuses_platinum_on_shared_machines_and_an_ipv6_address" {
  command = plan

  variables {
    plan      = "platinum"
    allowlist = ["2001:db8::1"]
  }

  expect_failures = [var.plan, var.allowlist]
}

run "refuses_memory_with_an_isolated_flavor_and_an_address_that_cannot_be" {
  command = plan

  variables {
    member_memory_mb = 16384
    host_flavor      = "b3c.4x16.encrypted"
    allowlist        = ["203.0.113.256"]
  }

  expect_failures = [var.member_memory_mb, var.allowlist]
}

run "refuses_a_range_that_cannot_be" {
  command = plan

  variables {
    allowlist = ["198.51.100.0/33"]
  }

  expect_failures = [var.allowlist]
}

run "refuses_a_short_password" {
  command = plan

  variables {
    elastic_password = "Abcdefghijklm1"
  }

  expect_failures = [ibm_database.elasticsearch]
}

run "refuses_a_long_password" {
  command = plan

  variables {
    elastic_password = "A1bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
  }

  expect_failures = [ibm_database.elasticsearch]
}

run "refuses_a_password_with_a_slash" {
  command = plan

  variables {
    elastic_password = "Abcdefghijklm/1"
  }

  expect_failures = [ibm_database.elasticsearch]
}

run "refuses_a_password_that_begins_with_a_hyphen" {
  command = plan

  variables {
    elastic_password = "-Abcdefghijklmn1"
  }

  expect_failures = [ibm_database.elasticsearch]
}

run "refuses_a_password_that_begins_with_an_underscore" {
  command = plan

  variables {
    elastic_password = "_Abcdefghijklmn1"
  }

  expect_failures = [ibm_database.elasticsearch]
}

run "refuses_a_password_without_an_uppercase_letter" {
  command = plan

  variables {
    elastic_password = "abcdefghijklmn1"
  }

  expect_failures = [ibm_database.elasticsearch]
}

run "refuses_a_password_without_a_lowercase_letter" {
  command = plan

  variables {
    elastic_password = "ABCDEFGHIJKLMN1"
  }

  expect_failures = [ibm_database.elasticsearch]
}

run "refuses_a_password_without_a_digit" {
  command = plan

  variables {
    elastic_password = "Abcdefghijklmno"
  }

  expect_failures = [ibm_database.elasticsearch]
}

run "refuses_the_examples_password" {
  command = plan

  variables {
    elastic_password = "<make-up-a-password>"
  }

  expect_failures = [ibm_database.elasticsearch]
}
